"""Tiny decoders, tiny models of transformers and hand-made batches of packed documents, for the tests of `model/`."""

import torch
from torch import Tensor, nn

from model.decoder import Decoder, DecoderConfig
from model.loading import build_model
from model.losses import sft_objective

SHAPE = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip


def tiny(seed: int = 0, **changes) -> Decoder:
    """A decoder whose weights are large enough that attention and positions show in its logits."""
    return build_model(DecoderConfig(**{**SHAPE, "initializer_range": 0.3, **changes}), seed).eval()


def foreign(directory, family, **changes):
    """A tiny model of a family of transformers with random weights, saved the way transformers does.

    A change to None leaves out what the family's configuration does not take.
    """
    import transformers

    shape = {
        **SHAPE, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.3,
        **changes,
    }  # fmt: skip
    kept = {name: value for name, value in shape.items() if value is not None}
    torch.manual_seed(0)
    network = transformers.AutoModelForCausalLM.from_config(getattr(transformers, f"{family}Config")(**kept))
    network.save_pretrained(directory)
    return network


def tokens(count: int, seed: int = 0, vocab_size: int = SHAPE["vocab_size"]) -> Tensor:
    return torch.randint(3, vocab_size, (count,), generator=torch.Generator().manual_seed(seed))


def pack(documents: list[Tensor], supervise=lambda position: True) -> dict:
    """A batch of whole documents (L tokens: L - 1 inputs and targets), supervised where `supervise(position)`."""
    lengths = [len(document) - 1 for document in documents]
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    chosen = [[p for p in range(length) if supervise(p)] for length in lengths]
    return {
        "input_ids": torch.cat([document[:-1] for document in documents]),
        "position_ids": torch.cat([torch.arange(length) for length in lengths]),
        "cu_seqlens": torch.tensor([*starts, sum(lengths)], dtype=torch.int32),
        "document_lengths": lengths,
        "supervised_positions": torch.tensor([s + p for s, ps in zip(starts, chosen, strict=True) for p in ps]).long(),
        "targets": torch.tensor([int(d[p + 1]) for d, ps in zip(documents, chosen, strict=True) for p in ps]).long(),
        "sample_ids": list(range(len(documents))),
    }


FILLER = {
    "input_ids": torch.zeros(1, dtype=torch.long),
    "position_ids": torch.zeros(1, dtype=torch.long),
    "cu_seqlens": torch.tensor([0, 1], dtype=torch.int32),
    "document_lengths": [1],
    "supervised_positions": torch.zeros(0, dtype=torch.long),
    "targets": torch.zeros(0, dtype=torch.long),
    "sample_ids": [-1],
}


def logits_of(model: nn.Module, batch: dict) -> Tensor:
    """Logits (S, V) at the supervised positions, with their gradient."""
    chunks: list[Tensor] = []

    def collect(logits: Tensor, positions: slice) -> dict[str, Tensor]:
        chunks.append(logits)
        return {"sum": logits.sum()}

    model(batch, collect)
    return torch.cat(chunks)


def slopes_of(model, loss, step):
    """For each parameter its name, the slope of loss() in a random direction by its gradient, and by a difference."""
    loss().backward()
    numbers = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        direction = torch.randn(parameter.shape, generator=numbers, dtype=torch.float64)
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter.add_(direction, alpha=sign * step)
                values.append(loss().item())
                parameter.sub_(direction, alpha=sign * step)
        yield name, (parameter.grad * direction).sum().item(), (values[0] - values[1]) / (2 * step)


def check_recomputed(model, batch, plain):
    """With gradient checkpointing the gradients are those that there were without it."""
    model.zero_grad()
    model.enable_gradient_checkpointing()
    sft_objective(model, batch)["ce"].backward()
    for gradient, parameter in zip(plain, model.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=0, atol=1e-5)
