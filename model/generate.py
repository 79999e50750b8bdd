"""Continues prompts: greedy or sampled decoding with a key/value cache, for whole batches or token by token."""

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from model.attention import document_attention
from model.decoder import Attend, Decoder
from model.isolation import APART, its_own_attention
from model.transformers_model import HFCausalLM


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen: temperature 0 is greedy; top_k 0 and top_p 1 switch those filters off."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 42

    def __post_init__(self) -> None:
        problems = []
        if not 0 <= self.temperature < math.inf:
            problems.append(f"temperature must be a finite number from 0, got {self.temperature}")
        if self.top_k < 0:
            problems.append(f"top_k must not be negative, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            problems.append(f"top_p must be in (0, 1], got {self.top_p}")
        if problems:
            raise ValueError("impossible sampling: " + "; ".join(problems))


GREEDY = Sampling()


def generate(
    model: Decoder | HFCausalLM, prompts: Sequence[Sequence[int]], *, max_new_tokens: int,
    eos_token_ids: Collection[int], sampling: Sampling = GREEDY,
) -> list[list[int]]:  # fmt: skip
    """New token ids of each prompt, without the end-of-sequence token that stopped it.

    A prompt's result does not depend on its neighbours: lengths may differ, and prompt i draws from its own random
    stream (seed + i).
    """
    results: list[list[int]] = [[] for _ in prompts]
    for prompt, token in _tokens(model, prompts, max_new_tokens, eos_token_ids, sampling):
        results[prompt].append(token)
    return results


def generate_stream(
    model: Decoder | HFCausalLM, prompt: Sequence[int], *, max_new_tokens: int, eos_token_ids: Collection[int],
    sampling: Sampling = GREEDY,
) -> Iterator[int]:  # fmt: skip
    """The new token ids of one prompt, each as soon as it is known."""
    for _, token in _tokens(model, [prompt], max_new_tokens, eos_token_ids, sampling):
        yield token


@torch.no_grad()
def _tokens(
    model: Decoder | HFCausalLM, prompts: Sequence[Sequence[int]], max_new_tokens: int, eos_token_ids: Collection[int],
    sampling: Sampling,
) -> Iterator[tuple[int, int]]:  # fmt: skip
    """(index of the prompt, next token) for every prompt that has not ended, step after step."""
    if not prompts:
        return
    empty = [index for index, prompt in enumerate(prompts) if not prompt]
    if empty:
        raise ValueError(f"prompt {empty[0]} is empty: there is nothing to continue")
    device = next(model.parameters()).device
    rows = torch.arange(len(prompts))  # the prompt that each sequence in the cache continues
    draws = torch.stack([_uniforms(sampling.seed + index, max_new_tokens) for index in range(len(prompts))])
    ended = torch.tensor(sorted(eos_token_ids))
    live = torch.ones(len(prompts), dtype=torch.bool)
    with _inference(model):
        cache = _cache_of(model)(model, prompts, max_new_tokens)
        logits = cache.prefill()
        for step in range(max_new_tokens):
            tokens = choose(logits, sampling, draws[rows, step].to(device)).cpu()
            live &= ~torch.isin(tokens, ended)
            yield from zip(rows[live].tolist(), tokens[live].tolist(), strict=True)
            if not live.any() or step == max_new_tokens - 1:
                return
            if live.sum() <= len(live) // 2:  # each time one sequence ends, the copying would cost more than it saves
                cache.keep(live.nonzero().flatten().to(device))
                rows, tokens, live = rows[live], tokens[live], live[live]
            logits = cache.step(tokens.to(device))


def _uniforms(seed: int, count: int) -> Tensor:
    return torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def choose(logits: Tensor, sampling: Sampling, draws: Tensor) -> Tensor:
    """Next tokens (B,) of logits (B, V); `draws` (B,) in [0, 1) pick from the filtered distribution by its inverse."""
    if sampling.temperature == 0:
        return logits.argmax(-1)
    ordered, tokens = logits.double().sort(descending=True)
    weights = (ordered / sampling.temperature).softmax(-1)
    if sampling.top_k:
        weights[:, sampling.top_k :] = 0
    mass = weights.cumsum(-1) / weights.sum(-1, keepdim=True)
    # Top-p keeps the smallest head of the order whose mass reaches top_p, so a token goes if those before it reach it.
    weights = weights.masked_fill(F.pad(mass[:, :-1], (1, 0)) >= sampling.top_p, 0)
    mass = weights.cumsum(-1)
    picked = torch.searchsorted(mass, draws[:, None] * mass[:, -1:], right=True)
    last_kept = (weights > 0).sum(-1, keepdim=True) - 1
    return tokens.gather(1, torch.minimum(picked, last_kept)).squeeze(1)


@contextmanager
def _inference(model: Decoder | HFCausalLM) -> Iterator[None]:
    """Evaluation mode and, where it is needed, the attention that understands transformers' cache and padding mask."""
    training = model.training
    model.eval()
    try:
        with its_own_attention(model) if _cache_of(model) is TransformersCache else nullcontext():
            yield
    finally:
        model.train(training)


def _cache_of(model: Decoder | HFCausalLM) -> "type[DecoderCache | TransformersCache | NoCache]":
    if isinstance(model, Decoder):
        return DecoderCache
    return NoCache if model.reading == APART else TransformersCache


class DecoderCache:
    """Keys and values of a decoder, (B, kv_heads, capacity, head_dim) per layer, each row filled to its own length.

    Prompts are packed like training documents, so there is no padding to attend to, and a new token of each sequence
    follows at that sequence's own position.
    """

    def __init__(self, model: Decoder, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
        self.model = model
        self.device = model.lm_head.weight.device
        self.input_ids = torch.tensor([token for prompt in prompts for token in prompt], device=self.device)
        self.prompt_lengths = [len(prompt) for prompt in prompts]
        self.lengths = torch.tensor(self.prompt_lengths, device=self.device)  # (B,) tokens stored of each sequence
        self.longest = max(self.prompt_lengths)
        self.capacity = self.longest + max_new_tokens
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def prefill(self) -> Tensor:
        """Logits (B, V) after the last token of each prompt."""
        self.boundaries = F.pad(self.lengths.cumsum(0), (1, 0)).to(torch.int32)
        positions = torch.cat([torch.arange(length, device=self.device) for length in self.prompt_lengths])
        states, _ = self.model.hidden_states(self.input_ids, positions, self._attends(self._attend_prompts))
        return self.model.lm_head(states[self.boundaries[1:].long() - 1])

    def step(self, tokens: Tensor) -> Tensor:
        """Logits (B, V) after one more token (B,) of each sequence."""
        states, _ = self.model.hidden_states(tokens, self.lengths, self._attends(self._attend_stored))
        self.lengths = self.lengths + 1
        self.longest += 1
        return self.model.lm_head(states)

    def keep(self, rows: Tensor) -> None:
        """Drop all sequences but these."""
        self.lengths = self.lengths[rows]
        self.longest = int(self.lengths.max())
        self.keys = [keys[rows] for keys in self.keys]
        self.values = [values[rows] for values in self.values]

    def _attends(self, attend: Callable[[int, Tensor, Tensor, Tensor], Tensor]) -> list[Attend]:
        return [partial(attend, layer) for layer in range(self.model.config.num_hidden_layers)]

    def _attend_prompts(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        for new, stored in ((k, self.keys), (v, self.values)):
            rows = new.new_zeros(len(self.prompt_lengths), new.shape[1], self.capacity, new.shape[2])
            for row, document in zip(rows, new.split(self.prompt_lengths), strict=True):
                row[:, : len(document)] = document.transpose(0, 1)
            stored.append(rows)
        return document_attention(q, k, v, self.boundaries, self.prompt_lengths)

    def _attend_stored(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows, filled = torch.arange(len(q), device=q.device), self.longest + 1
        self.keys[layer][rows, :, self.lengths] = k
        self.values[layer][rows, :, self.lengths] = v
        grouped = q.unflatten(1, (k.shape[1], -1))  # (B, kv_heads, heads per kv_head, head_dim)
        scores = (grouped @ self.keys[layer][:, :, :filled].transpose(-1, -2)).float() * q.shape[-1] ** -0.5
        visible = torch.arange(filled, device=q.device) <= self.lengths[:, None]
        weights = scores.masked_fill(~visible[:, None, None], -torch.inf).softmax(-1).to(v.dtype)
        return (weights @ self.values[layer][:, :, :filled]).flatten(1, 2)


class TransformersCache:
    """A transformers cache over prompts padded on the left, behind the same three methods."""

    def __init__(self, model: HFCausalLM, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
        self.model = model
        self.device = next(model.parameters()).device
        longest = max(len(prompt) for prompt in prompts)
        padding = [longest - len(prompt) for prompt in prompts]
        padded = [[0] * pad + list(prompt) for pad, prompt in zip(padding, prompts, strict=True)]
        self.input_ids = torch.tensor(padded, device=self.device)
        self.mask = (torch.arange(longest) >= torch.tensor(padding)[:, None]).long().to(self.device)
        self.cache = None

    def prefill(self) -> Tensor:
        return self._logits(self.input_ids, (self.mask.cumsum(-1) - 1).clamp(min=0))

    def step(self, tokens: Tensor) -> Tensor:
        self.mask = F.pad(self.mask, (0, 1), value=1)
        return self._logits(tokens[:, None], self.mask.sum(-1, keepdim=True) - 1)

    def keep(self, rows: Tensor) -> None:
        self.mask = self.mask[rows]
        self.cache.batch_select_indices(rows)

    def _logits(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        output = self.model.inner(
            input_ids=input_ids,
            position_ids=position_ids,
            attention_mask=self.mask,
            past_key_values=self.cache,
            use_cache=True,
        )
        self.cache = output.past_key_values
        return output.logits[:, -1]


class NoCache:
    """For families that cannot be packed: what they keep of a prompt takes no padding, so all is computed each time."""

    def __init__(self, model: HFCausalLM, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
        self.model = model
        self.device = next(model.parameters()).device
        self.sequences = [torch.tensor(prompt, device=self.device) for prompt in prompts]

    def prefill(self) -> Tensor:
        lengths = [len(sequence) for sequence in self.sequences]
        ends = torch.tensor(lengths, device=self.device).cumsum(0)
        batch = {
            "input_ids": torch.cat(self.sequences), "document_lengths": lengths, "supervised_positions": ends - 1,
        }  # fmt: skip
        states, head = self.model.supervised_states(batch)
        return head(states)

    def step(self, tokens: Tensor) -> Tensor:
        self.sequences = [torch.cat(pair) for pair in zip(self.sequences, tokens[:, None], strict=True)]
        return self.prefill()

    def keep(self, rows: Tensor) -> None:
        self.sequences = [self.sequences[row] for row in rows.tolist()]
