"""Generation: a prompt's continuation does not depend on its neighbours, and greedy is what transformers gives."""

import pytest
import torch

from model.export import export_model
from model.generate import Sampling, choose, generate, generate_stream
from model.transformers_model import HFCausalLM
from tests.test_export import TOKENIZER
from tests.tiny_model import logits_of, pack, tiny, tokens

PROMPTS = [tokens(length, seed).tolist() for seed, length in enumerate((3, 11, 1, 6, 20))]
NO_END: list[int] = []


@pytest.fixture(scope="module")
def decoder():
    return tiny()


@pytest.fixture(scope="module")
def exported(decoder, tmp_path_factory):
    directory = tmp_path_factory.mktemp("model") / "final"
    export_model(directory, decoder, TOKENIZER)
    return directory


def test_greedy_batched_equals_alone_equals_transformers(decoder, exported):
    from transformers import AutoModelForCausalLM

    together = generate(decoder, PROMPTS, max_new_tokens=15, eos_token_ids=NO_END)
    llama = AutoModelForCausalLM.from_pretrained(exported)
    for prompt, answer in zip(PROMPTS, together, strict=True):
        assert generate(decoder, [prompt], max_new_tokens=15, eos_token_ids=NO_END) == [answer]
        theirs = llama.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), max_new_tokens=15, eos_token_id=None
        )
        assert theirs[0, len(prompt) :].tolist() == answer
    assert len({tuple(answer) for answer in together}) == len(PROMPTS)


def test_an_end_token_stops_one_sequence_and_not_its_neighbours(decoder):
    full = generate(decoder, PROMPTS, max_new_tokens=15, eos_token_ids=NO_END)
    ends = {full[0][2], full[1][5], full[3][0]}
    expected = [answer[: next((i for i, t in enumerate(answer) if t in ends), 15)] for answer in full]
    assert generate(decoder, PROMPTS, max_new_tokens=15, eos_token_ids=ends) == expected
    assert len({len(answer) for answer in expected}) > 2
    assert generate(decoder, PROMPTS, max_new_tokens=3, eos_token_ids=ends) == [answer[:3] for answer in expected]


def test_sampling_is_seeded_and_each_prompt_has_its_own_draws(decoder):
    hot = Sampling(temperature=3.0, seed=1)
    first = generate(decoder, PROMPTS, max_new_tokens=10, eos_token_ids=NO_END, sampling=hot)
    assert generate(decoder, PROMPTS, max_new_tokens=10, eos_token_ids=NO_END, sampling=hot) == first
    assert generate(decoder, PROMPTS[:2], max_new_tokens=10, eos_token_ids=NO_END, sampling=hot) == first[:2]
    other = Sampling(temperature=3.0, seed=2)
    assert generate(decoder, PROMPTS, max_new_tokens=10, eos_token_ids=NO_END, sampling=other) != first
    twice = generate(decoder, [PROMPTS[0]] * 2, max_new_tokens=10, eos_token_ids=NO_END, sampling=hot)
    assert twice[0] == first[0] and twice[1] != first[0]


@pytest.mark.parametrize("narrow", [Sampling(temperature=2.0, top_k=1), Sampling(temperature=2.0, top_p=1e-9)])
def test_the_narrowest_filters_are_greedy(decoder, narrow):
    greedy = generate(decoder, PROMPTS, max_new_tokens=8, eos_token_ids=NO_END)
    assert generate(decoder, PROMPTS, max_new_tokens=8, eos_token_ids=NO_END, sampling=narrow) == greedy


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(temperature=1.0), [0.5, 0.1, 0.25, 0.15]),
        (Sampling(temperature=0.5), [0.25 / 0.345, 0.01 / 0.345, 0.0625 / 0.345, 0.0225 / 0.345]),
        (Sampling(temperature=1.0, top_k=2), [0.5 / 0.75, 0.0, 0.25 / 0.75, 0.0]),
        (Sampling(temperature=1.0, top_p=0.7), [0.5 / 0.75, 0.0, 0.25 / 0.75, 0.0]),
        (Sampling(temperature=1.0, top_p=0.8), [0.5 / 0.9, 0.0, 0.25 / 0.9, 0.15 / 0.9]),
        (Sampling(temperature=1.0, top_k=3, top_p=0.5), [1.0, 0.0, 0.0, 0.0]),
    ],
)
def test_tokens_come_with_their_filtered_probability(sampling, expected):
    draws = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    logits = torch.tensor([0.5, 0.1, 0.25, 0.15]).log().expand(10_000, 4)
    shares = torch.bincount(choose(logits, sampling, draws), minlength=4) / 10_000
    torch.testing.assert_close(shares, torch.tensor(expected), rtol=0, atol=2e-4)
    extremes = choose(logits[:2], sampling, torch.tensor([0.0, 1.0], dtype=torch.float64))
    assert all(expected[token] > 0 for token in extremes.tolist())


def test_a_stream_gives_the_same_tokens_one_by_one(decoder):
    answer = generate(decoder, [PROMPTS[1]], max_new_tokens=9, eos_token_ids=NO_END)[0]
    stream = generate_stream(decoder, PROMPTS[1], max_new_tokens=9, eos_token_ids=NO_END)
    assert next(stream) == answer[0] and list(stream) == answer[1:]


def test_generation_works_without_dropout_and_leaves_the_mode_as_it_was(decoder):
    noisy = tiny(dropout=0.5).train()
    assert generate(noisy, PROMPTS, max_new_tokens=5, eos_token_ids=NO_END) == generate(
        decoder, PROMPTS, max_new_tokens=5, eos_token_ids=NO_END
    )
    assert noisy.training


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=2.0, top_k=20, top_p=0.9)])
def test_models_of_transformers_answer_alike(decoder, exported, sampling):
    foreign = HFCausalLM.from_pretrained(exported)
    full = generate(decoder, PROMPTS, max_new_tokens=12, eos_token_ids=NO_END, sampling=sampling)
    ends = {full[0][2], full[1][5], full[3][0]}
    expected = generate(decoder, PROMPTS, max_new_tokens=12, eos_token_ids=ends, sampling=sampling)
    assert generate(foreign, PROMPTS, max_new_tokens=12, eos_token_ids=ends, sampling=sampling) == expected
    assert foreign.inner.config._attn_implementation == "documents"


@pytest.mark.parametrize(
    "shape",
    [
        {"num_experts": 4}, {"num_experts": 4, "shared_expert_intermediate_size": 24, "qkv_bias": True},
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8}, "qk_norm": True},
    ],
)  # fmt: skip
def test_every_option_of_the_decoder_answers_as_it_would_without_a_cache(tmp_path, shape):
    varied = tiny(**shape)
    answers = generate(varied, PROMPTS, max_new_tokens=12, eos_token_ids=NO_END)
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        text = torch.tensor([*prompt, *answer, 0])
        assert logits_of(varied, pack([text])).argmax(-1).tolist()[len(prompt) - 1 : -1] == answer
    export_model(tmp_path / "final", varied, TOKENIZER)
    foreign = HFCausalLM.from_pretrained(tmp_path / "final")
    assert generate(foreign, PROMPTS, max_new_tokens=12, eos_token_ids=NO_END) == answers


def test_nothing_to_do_and_impossible_wishes(decoder):
    assert generate(decoder, [], max_new_tokens=5, eos_token_ids=NO_END) == []
    assert generate(decoder, PROMPTS[:2], max_new_tokens=0, eos_token_ids=NO_END) == [[], []]
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        generate(decoder, [[5], []], max_new_tokens=5, eos_token_ids=NO_END)
    with pytest.raises(ValueError) as error:
        Sampling(temperature=-1.0, top_k=-2, top_p=0.0)
    for part in ("temperature", "-1.0", "top_k", "-2", "top_p", "0.0"):
        assert part in str(error.value)
