"""A mixture of experts keeps documents apart, reaches every weight, and its balance adds up over documents."""

import pytest
import torch
import torch.nn.functional as F

from model.decoder import Decoder, DecoderConfig
from model.loading import build_model
from model.losses import make_sft_objective, sft_objective
from model.moe import block_size, grouped_linear, lay_out, router_terms
from tests.tiny_model import FILLER, SHAPE, logits_of, pack, slopes_of, tiny, tokens

EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
SHARED = {**EXPERTS, "shared_expert_intermediate_size": 24}
DOCUMENTS = [tokens(12, 1), tokens(2, 2), tokens(30, 3), tokens(7, 4), tokens(90, 5)]
LENGTHS = [len(document) - 1 for document in DOCUMENTS]
TERMS = {"ce", "correct", "aux", "router_z", "max_expert_share"}


def learnt(sums: dict) -> torch.Tensor:
    return sums["ce"] + 0.3 * sums["aux"] + 0.1 * sums["router_z"]


# --- packing


@pytest.mark.parametrize("shape", [EXPERTS, SHARED])
def test_packed_equals_alone(shape):
    decoder = tiny(**shape).double()
    packed = logits_of(decoder, pack(DOCUMENTS))
    alone = torch.cat([logits_of(decoder, pack([document])) for document in DOCUMENTS])
    torch.testing.assert_close(packed, alone, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("lengths", [[3, 6, 4], [12, 31, 7, 91]])
def test_touching_one_document_leaves_the_others_bit_identical(dtype, lengths):
    """Of few rows above all, where a product of one row rounds otherwise than one of two."""
    decoder = tiny(**SHARED, moe_intermediate_size=832).to(dtype)
    documents = [tokens(length, length) for length in lengths]
    sizes = [length - 1 for length in lengths]
    before = logits_of(decoder, pack(documents)).split(sizes)
    for seed in range(10):
        documents[1] = tokens(lengths[1], 99 + seed)
        after = logits_of(decoder, pack(documents)).split(sizes)
        same = [torch.equal(a, b) for a, b in zip(before, after, strict=True)]
        assert same == [True, False, *[True] * (len(lengths) - 2)], seed


def test_the_loss_of_one_document_sends_no_gradient_to_another():
    decoder = tiny(tie_word_embeddings=False, **EXPERTS)
    first, second = torch.arange(3, 20), torch.arange(20, 50)  # no token in common
    batch = pack([first, second])
    batch["supervised_positions"] = batch["supervised_positions"][len(first) - 1 :]
    batch["targets"] = batch["targets"][len(first) - 1 :]
    learnt(sft_objective(decoder, batch)).backward()
    gradient = decoder.model.embed_tokens.weight.grad
    assert torch.equal(gradient[3:20], torch.zeros_like(gradient[3:20]))
    assert (gradient[20:49].abs().amax(-1) > 0).all()


# --- the arithmetic


def test_rows_of_an_expert_are_laid_out_in_whole_blocks():
    experts = torch.tensor([2, 0, 2, 3, 2, 0])
    places, sizes = lay_out(experts, 4, block=2)
    assert sizes.tolist() == [2, 0, 4, 2]
    assert places.tolist() == [2, 0, 3, 6, 4, 1]
    assert [block_size(rows, 8) for rows in (2, 16, 64, 1024, 10**6)] == [1, 2, 8, 128, 128]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_grouped_product_is_one_product_per_expert(dtype):
    numbers = torch.Generator().manual_seed(0)
    x = torch.randn(14, 5, generator=numbers, dtype=dtype, requires_grad=True)
    weight = torch.randn(4, 3, 5, generator=numbers, dtype=dtype, requires_grad=True)
    sizes = [4, 0, 8, 0]
    ours = grouped_linear(x, weight, torch.tensor(sizes), block=4)[:12]
    theirs = torch.cat([F.linear(rows, matrix) for rows, matrix in zip(x[:12].split(sizes), weight, strict=True)])
    torch.testing.assert_close(ours, theirs)
    grad = torch.randn(ours.shape, generator=numbers, dtype=dtype)
    for a, b in zip(*(torch.autograd.grad(y, (x, weight), grad) for y in (ours, theirs)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.skipif(not hasattr(F, "grouped_mm"), reason="this torch has no grouped product")
def test_the_grouped_kernel_learns_the_same(monkeypatch):
    """It runs on CPUs too, only not in blocks; what it leaves in rows that belong to nobody must not be read."""
    kernel, results = F.grouped_mm, []

    def spoiling(x, weight, offs):
        output, used = kernel(x, weight, offs=offs), int(offs[-1])
        return torch.cat([output[:used], torch.full_like(output[used:], torch.nan)])

    monkeypatch.setattr(F, "grouped_mm", spoiling)
    for applies in (False, True):
        monkeypatch.setattr("model.moe._grouped_kernel_applies", lambda x, applies=applies: applies)
        decoder = tiny(**SHARED)
        sums = sft_objective(decoder, pack(DOCUMENTS))
        learnt(sums).backward()
        results.append([*sums.values(), *(parameter.grad for parameter in decoder.parameters())])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("shape", [EXPERTS, {**SHARED, "qkv_bias": True}])
def test_gradients_agree_with_finite_differences(shape):
    decoder = tiny(num_hidden_layers=1, **shape).double()
    batch = pack(DOCUMENTS[:3], supervise=lambda position: position % 2 == 0)
    for name, slope, difference in slopes_of(decoder, lambda: learnt(sft_objective(decoder, batch)), step=1e-6):
        assert slope == pytest.approx(difference, rel=1e-5, abs=1e-6), name


def test_gradients_of_gradients_agree_with_finite_differences():
    decoder, objective = tiny(num_hidden_layers=1, **EXPERTS).double(), make_sft_objective(gradient_penalty=True)
    batch = pack(DOCUMENTS[:2])
    objective(decoder, batch)["gp"].backward()
    for name, parameter in decoder.named_parameters():
        if "experts" in name or "gate" in name:
            direction, values = torch.ones_like(parameter) * 1e-6, []
            for sign in (1, -1):
                with torch.no_grad():
                    parameter.add_(direction, alpha=sign)
                values.append(objective(decoder, batch)["gp"].item())
                with torch.no_grad():
                    parameter.sub_(direction, alpha=sign)
            slope = (parameter.grad * direction).sum().item()
            assert slope == pytest.approx((values[0] - values[1]) / 2, rel=1e-4), name


def test_the_router_is_not_rounded_under_autocast():
    decoder = tiny(**EXPERTS)
    router = decoder.model.layers[0].mlp.gate
    with torch.autocast("cpu", torch.bfloat16):
        sums = sft_objective(decoder, pack(DOCUMENTS))
        assert router(torch.randn(3, 32).bfloat16()).dtype == torch.float32
    assert {sums[name].dtype for name in TERMS - {"correct"}} == {torch.float32}
    assert sums["ce"].item() == pytest.approx(sft_objective(decoder, pack(DOCUMENTS))["ce"].item(), rel=0.05)


def test_every_weight_gets_a_gradient_also_of_an_expert_without_tokens():
    decoder = tiny(num_experts=64, num_experts_per_tok=1)
    sft_objective(decoder, pack(DOCUMENTS[:1]))["ce"].backward()
    idle = [layer.mlp.experts.gate_up_proj.grad.abs().amax((1, 2)) == 0 for layer in decoder.model.layers]
    assert all(each.any() and not each.all() for each in idle)
    assert all(parameter.grad is not None for parameter in decoder.parameters())
    decoder.zero_grad()
    learnt(sft_objective(decoder, FILLER)).backward()
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in decoder.parameters())


def test_gradient_checkpointing_changes_no_gradient():
    gradients = []
    for recompute in (False, True):
        decoder = tiny(dropout=0.1, **SHARED).double().train()
        if recompute:
            decoder.enable_gradient_checkpointing()
        torch.manual_seed(0)
        learnt(sft_objective(decoder, pack(DOCUMENTS))).backward()
        gradients.append([parameter.grad for parameter in decoder.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


# --- the balance


def batch_of(lengths: list[int], supervised: list[int]) -> dict:
    """Boundaries of documents whose first so many positions are supervised."""
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    positions = [start + p for start, count in zip(starts, supervised, strict=True) for p in range(count)]
    return {
        "cu_seqlens": torch.tensor([*starts, sum(lengths)], dtype=torch.int32),
        "supervised_positions": torch.tensor(positions),
    }


def test_the_balance_is_1_where_all_is_even_and_the_number_of_experts_where_one_has_all():
    even, all_to_one = torch.eye(4).repeat(2, 1) * 50, F.one_hot(torch.zeros(8).long(), 4) * 50.0
    batch = batch_of([8], [5])
    for logits, aux, share in ((even, 1.0, 0.25), (all_to_one, 4.0, 1.0)):
        sums = router_terms([logits, logits], batch, 1)
        assert sums["aux"].item() == pytest.approx(5 * aux) and sums["max_expert_share"].item() == pytest.approx(
            5 * share
        )
        assert sums["router_z"].item() == pytest.approx(5 * 50**2)


def test_the_balance_of_documents_is_the_formula_written_out():
    numbers = torch.Generator().manual_seed(0)
    layers = [torch.randn(10, 6, generator=numbers, dtype=torch.float64) for _ in range(3)]
    batch, expected = batch_of([7, 3], [2, 3]), 0.0
    for rows, supervised in ((slice(0, 7), 2), (slice(7, 10), 3)):
        for logits in layers:
            probabilities = logits[rows].softmax(-1)
            counts = torch.bincount(probabilities.topk(2).indices.flatten(), minlength=6)
            length = len(probabilities)
            expected += supervised * 6 / (2 * length) * (counts * probabilities.mean(0)).sum() / 3
    assert router_terms(layers, batch, 2)["aux"].item() == pytest.approx(expected.item(), rel=1e-12)


def test_terms_add_up_over_documents():
    decoder = tiny(**EXPERTS).double()
    whole = sft_objective(decoder, pack(DOCUMENTS, supervise=lambda position: position > 3))
    parts = [sft_objective(decoder, pack([d], supervise=lambda position: position > 3)) for d in DOCUMENTS]
    assert whole.keys() == TERMS and not whole["max_expert_share"].requires_grad
    for name in TERMS:
        total = sum(part[name] for part in parts).item()
        assert whole[name].item() == pytest.approx(total, rel=1e-12, abs=1e-12), name
    assert sft_objective(tiny(), pack(DOCUMENTS)).keys() == {"ce", "correct"}


def test_the_balance_evens_out_a_router():
    decoder = build_model(DecoderConfig(**SHAPE, num_experts=8, num_experts_per_tok=1), 0)
    for layer in decoder.model.layers:
        layer.mlp.gate.weight.data[0] += 0.1  # one expert is liked more
    batch = pack([tokens(60, seed) for seed in range(4)])
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=3e-3)
    shares = []
    for _ in range(60):
        sums = sft_objective(decoder, batch)
        shares.append(sums["max_expert_share"].item() / len(batch["targets"]))
        optimizer.zero_grad()
        (sums["aux"] / len(batch["targets"])).backward()
        optimizer.step()
    assert shares[-1] < 0.25 and shares[-1] < shares[0]


# --- shapes and counts


def test_experts_are_together_as_wide_as_one_mlp():
    config = DecoderConfig(num_experts=8)
    assert (config.num_experts_per_tok, config.moe_intermediate_size, config.norm_topk_prob) == (2, 832, True)
    assert config.qk_norm is True
    assert DecoderConfig(num_experts=8, num_experts_per_tok=4, intermediate_size=100).moe_intermediate_size == 32
    shared = DecoderConfig(num_experts=8, shared_expert_intermediate_size=1024)
    assert (shared.moe_intermediate_size, shared.qk_norm) == (320, False)


def test_counts_are_those_of_the_weights_that_a_token_meets():
    dense, mixture = Decoder(DecoderConfig(qk_norm=True)), Decoder(DecoderConfig(num_experts=8))
    (body, head), (active, same_head) = dense.parameter_counts(), mixture.parameter_counts()
    assert head == same_head and active == body + 8 * 8 * 512  # the routers
    held = sum(parameter.numel() for parameter in mixture.parameters())
    assert held == active + head + 8 * 6 * 3 * 512 * 832


def test_new_experts_are_as_large_as_one_mlp_would_be():
    mixture = build_model(DecoderConfig(num_experts=4, num_hidden_layers=2, hidden_size=128, qkv_bias=False), 0)
    layer = mixture.model.layers[0].mlp
    assert layer.experts.gate_up_proj.std().item() == pytest.approx(128**-0.5, rel=0.02)
    inputs = mixture.config.moe_intermediate_size
    assert layer.experts.down_proj.std().item() == pytest.approx((inputs * 4) ** -0.5, rel=0.02)
    assert layer.gate.weight.std().item() == pytest.approx(mixture.config.initializer_range, rel=0.2)
    biased = build_model(DecoderConfig(**SHAPE, qkv_bias=True), 0)
    assert all(not p.any() for name, p in biased.named_parameters() if name.endswith("bias"))
