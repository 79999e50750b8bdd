"""The built-in decoder computes what transformers' Llama computes, and packing changes nothing."""

import math

import pytest
import torch
import torch.nn.functional as F

from model.decoder import Decoder, DecoderConfig
from model.loading import build_model
from model.losses import sft_objective
from model.norm import RMSNorm
from tests.tiny_model import SHAPE, logits_of, pack, slopes_of, tiny, tokens

DOCUMENTS = [tokens(12, 1), tokens(2, 2), tokens(30, 3), tokens(7, 4)]


def llama_like(decoder: Decoder):
    """transformers' Llama with the decoder's weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    names = ("head_dim", "rms_norm_eps", "max_position_embeddings", "tie_word_embeddings")
    shape = {name: getattr(decoder.config, name) for name in (*SHAPE, *names)}
    rope = {"rope_type": "default", "rope_theta": decoder.config.rope_theta}
    llama = LlamaForCausalLM(LlamaConfig(**shape, rope_parameters=rope)).eval()
    llama.load_state_dict(decoder.state_dict(), strict=True)
    return llama


# --- the same model as transformers' Llama


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": False},
        {"num_key_value_heads": 4},
        {"num_key_value_heads": 1, "head_dim": 16},
        {"rope_theta": 50.0, "rms_norm_eps": 1e-2},
    ],
)
def test_names_shapes_and_logits_are_those_of_llama(changes):
    decoder = tiny(**changes)
    llama = llama_like(decoder)
    assert {n: t.shape for n, t in decoder.state_dict().items()} == {n: t.shape for n, t in llama.state_dict().items()}
    assert [n for n, _ in decoder.named_parameters()] == [n for n, _ in llama.named_parameters()]
    for document in DOCUMENTS:
        with torch.no_grad():
            ours, theirs = logits_of(decoder, pack([document])), llama(input_ids=document[None, :-1]).logits[0]
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
        assert ours.abs().max() > 1


def test_a_bfloat16_model_stays_near_llama():
    decoder = tiny(initializer_range=0.05).bfloat16()
    with torch.no_grad():
        ours = logits_of(decoder, pack([DOCUMENTS[2]])).float()
        theirs = llama_like(decoder).bfloat16()(input_ids=DOCUMENTS[2][None, :-1]).logits[0].float()
    divergence = F.kl_div(ours.log_softmax(-1), theirs.log_softmax(-1), log_target=True, reduction="batchmean")
    assert divergence < 1e-3


def test_the_norm_and_its_gradient_are_those_of_torch():
    numbers = torch.Generator().manual_seed(0)
    x, gain, grad = (torch.randn(s, generator=numbers, dtype=torch.float64) for s in ((5, 8), (8,), (5, 8)))
    norm = RMSNorm(8, 1e-3).double()
    norm.weight.data.copy_(gain)
    x.requires_grad_()
    ours = torch.autograd.grad(norm(x), (x, norm.weight), grad)
    theirs = torch.autograd.grad(F.rms_norm(x, (8,), norm.weight, 1e-3), (x, norm.weight), grad)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


# --- packing


def test_packed_equals_alone():
    decoder = tiny().double()
    packed = logits_of(decoder, pack(DOCUMENTS))
    alone = torch.cat([logits_of(decoder, pack([document])) for document in DOCUMENTS])
    torch.testing.assert_close(packed, alone, rtol=0, atol=1e-12)


def test_a_missing_position_restart_or_boundary_would_show():
    decoder, batch = tiny().double(), pack(DOCUMENTS)
    right = logits_of(decoder, batch)
    total = len(batch["input_ids"])
    running_on = logits_of(decoder, {**batch, "position_ids": torch.arange(total)})
    assert 1e-12 < (running_on - right).abs().max() < 1e-3  # rotary positions are relative: only rounding tells
    merged = {**batch, "cu_seqlens": torch.tensor([0, total], dtype=torch.int32), "document_lengths": [total]}
    assert (logits_of(decoder, merged) - right).abs().max() > 0.1


def test_touching_one_document_leaves_the_others_bit_identical():
    decoder = tiny()
    before = logits_of(decoder, pack(DOCUMENTS)).split([len(d) - 1 for d in DOCUMENTS])
    touched = [*DOCUMENTS[:2], tokens(30, 99), DOCUMENTS[3]]
    after = logits_of(decoder, pack(touched)).split([len(d) - 1 for d in DOCUMENTS])
    assert [torch.equal(a, b) for a, b in zip(before, after, strict=True)] == [True, True, False, True]


def test_the_loss_of_one_document_sends_no_gradient_to_another():
    decoder = tiny(tie_word_embeddings=False)
    first, second = torch.arange(3, 20), torch.arange(20, 50)  # no token in common
    batch = pack([first, second])
    logits_of(decoder, batch)[len(first) - 1 :].sum().backward()
    gradient = decoder.model.embed_tokens.weight.grad
    assert torch.equal(gradient[3:20], torch.zeros_like(gradient[3:20]))
    assert (gradient[20:49].abs().amax(-1) > 0).all()


# --- weights


def test_weights_depend_on_the_seed_alone_and_leave_the_global_generator_alone():
    state = torch.get_rng_state()
    one = build_model(DecoderConfig(**SHAPE), 5).state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    same, other = (
        build_model(DecoderConfig(**SHAPE), 5).state_dict(),
        build_model(DecoderConfig(**SHAPE), 6).state_dict(),
    )
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not any(torch.equal(one[name], other[name]) for name in one if "norm" not in name)


def test_a_new_model_knows_nothing():
    config = DecoderConfig(vocab_size=997, hidden_size=128, num_hidden_layers=4, num_attention_heads=4)
    decoder = build_model(config, 0)
    batch = pack([tokens(200, i, 997) for i in range(4)])
    assert sft_objective(decoder, batch)["ce"].item() / len(batch["targets"]) == pytest.approx(math.log(997), abs=0.5)
    std = {name: parameter.std().item() for name, parameter in decoder.named_parameters() if parameter.dim() > 1}
    assert std["model.layers.0.mlp.up_proj.weight"] == pytest.approx(1 / math.sqrt(128), rel=0.05)
    assert std["model.layers.0.mlp.down_proj.weight"] == pytest.approx(1 / math.sqrt(448 * 8), rel=0.05)


def test_derived_shape_and_counts():
    config = DecoderConfig()
    assert (config.intermediate_size, config.num_key_value_heads, config.head_dim) == (1664, 4, 64)
    layer = 512 * (512 + 256 + 256 + 512) + 3 * 512 * 1664 + 2 * 512
    assert Decoder(config).parameter_counts() == (8 * layer + 512, 6400 * 512)
    untied = Decoder(DecoderConfig(tie_word_embeddings=False))
    assert untied.parameter_counts() == (8 * layer + 512, 6400 * 512)
    assert untied.shard_units() == list(untied.model.layers)


def test_all_impossible_values_are_named_at_once():
    with pytest.raises(ValueError) as error:
        DecoderConfig(hidden_size=0, num_hidden_layers=-1, dropout=1.0, initializer_range=0.0, head_dim=7)
    for part in ("hidden_size 0", "num_hidden_layers -1", "dropout 1.0", "initializer_range 0.0", "head_dim 7"):
        assert part in str(error.value)
    with pytest.raises(ValueError, match="num_attention_heads 8 is no multiple of num_key_value_heads 3"):
        DecoderConfig(num_key_value_heads=3)
    with pytest.raises(ValueError, match="hidden_size 100 is no multiple of num_attention_heads 8"):
        DecoderConfig(hidden_size=100)


# --- training


def test_gradients_agree_with_finite_differences():
    decoder = tiny(num_hidden_layers=1).double()
    batch = pack(DOCUMENTS[:3], supervise=lambda position: position % 2 == 0)
    for name, slope, difference in slopes_of(decoder, lambda: sft_objective(decoder, batch)["ce"], step=1e-5):
        assert slope == pytest.approx(difference, rel=1e-6), name
        assert abs(slope) > 1e-3, name


def test_dropout_acts_in_training_alone():
    batch = pack(DOCUMENTS)
    decoder = tiny(dropout=0.2)
    assert torch.equal(logits_of(decoder, batch), logits_of(tiny(), batch))
    decoder.train()
    torch.manual_seed(0)
    first, second = logits_of(decoder, batch), logits_of(decoder, batch)
    torch.manual_seed(0)
    assert not torch.equal(first, second) and torch.equal(first, logits_of(decoder, batch))
    assert torch.equal(logits_of(tiny().train(), batch), logits_of(tiny(), batch))


def test_gradient_checkpointing_changes_no_gradient():
    gradients = []
    for recompute in (False, True):
        decoder = tiny(dropout=0.1).double().train()
        if recompute:
            decoder.enable_gradient_checkpointing()
        torch.manual_seed(0)
        sft_objective(decoder, pack(DOCUMENTS))["ce"].backward()
        gradients.append([parameter.grad for parameter in decoder.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_four_samples_are_learned_by_heart():
    decoder = build_model(DecoderConfig(**SHAPE), 0).train()
    batch = pack([tokens(12, seed) for seed in range(4)], supervise=lambda position: position > 0)
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=1e-2)
    for _ in range(200):
        loss = sft_objective(decoder, batch)["ce"] / len(batch["targets"])
        if loss.item() < 0.01:
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.01
    assert sft_objective(decoder, batch)["correct"].item() == len(batch["targets"])
