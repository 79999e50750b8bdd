"""What is summed over the supervised tokens, and that chunks of it add up to the whole."""

import math

import pytest
import torch
import torch.nn.functional as F

import model.losses
from model.losses import make_sft_objective, sft_objective
from tests.tiny_model import FILLER, logits_of, pack, tiny, tokens

BATCH = pack([tokens(9, 1), tokens(6, 2), tokens(4, 3)], supervise=lambda position: position % 3 != 0)


def test_the_cross_entropy_is_the_sum_of_minus_log_probabilities():
    decoder = tiny().double()
    sums = sft_objective(decoder, BATCH)
    expected, correct = 0.0, 0
    for row, target in zip(logits_of(decoder, BATCH).tolist(), BATCH["targets"].tolist(), strict=True):
        expected -= row[target] - math.log(sum(math.exp(x) for x in row))
        correct += row.index(max(row)) == target
    assert sums.keys() == {"ce", "correct"}
    assert sums["ce"].item() == pytest.approx(expected, rel=1e-12)
    assert sums["correct"].item() == correct
    assert sums["ce"].requires_grad and not sums["correct"].requires_grad


def test_correct_counts_the_tokens_ranked_first():
    decoder = tiny()
    best = {**BATCH, "targets": logits_of(decoder, BATCH).argmax(-1)}
    assert sft_objective(decoder, best)["correct"].item() == len(BATCH["targets"])
    assert sft_objective(decoder, {**best, "targets": (best["targets"] + 1) % 97})["correct"].item() == 0


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.9])
def test_label_smoothing_is_that_of_torch(smoothing):
    decoder = tiny().double()
    expected = F.cross_entropy(logits_of(decoder, BATCH), BATCH["targets"], reduction="sum", label_smoothing=smoothing)
    torch.testing.assert_close(make_sft_objective(smoothing)(decoder, BATCH)["ce"], expected, rtol=1e-12, atol=0)
    assert smoothing == 0 or abs(expected - sft_objective(decoder, BATCH)["ce"]) > 0.1


@pytest.mark.parametrize("smoothing", [-0.1, 1.0, math.nan])
def test_impossible_smoothing_is_refused(smoothing):
    with pytest.raises(ValueError, match=f"label_smoothing must be in .*, got {smoothing}"):
        make_sft_objective(smoothing)


def test_the_sum_is_float32_under_autocast_and_float64_for_a_float64_model():
    with torch.autocast("cpu", torch.bfloat16):
        low = sft_objective(tiny(), BATCH)["ce"]
        assert logits_of(tiny(), BATCH).dtype == torch.bfloat16
    assert low.dtype == torch.float32
    assert low.item() == pytest.approx(sft_objective(tiny(), BATCH)["ce"].item(), rel=0.02)
    assert sft_objective(tiny().double(), BATCH)["ce"].dtype == torch.float64


def sums_and_gradients(objective):
    decoder = tiny().double()
    sums = objective(decoder, BATCH)
    sums["ce"].backward()
    return sums, {name: parameter.grad for name, parameter in decoder.named_parameters()}


@pytest.mark.parametrize("rows", [1, 3, 5, 10, 11])
def test_chunks_of_the_head_add_up(monkeypatch, rows):
    assert len(BATCH["targets"]) == 10
    whole, gradients = sums_and_gradients(sft_objective)
    seen = []

    def watched(decoder, batch):
        def terms(logits, positions):
            seen.append(len(logits))
            expected = batch["targets"][positions]
            ce = F.cross_entropy(logits, expected, reduction="sum")
            return {"ce": ce, "correct": (logits.detach().argmax(-1) == expected).sum()}

        return decoder(batch, terms)

    monkeypatch.setattr(model.losses, "MAX_LOGITS", rows * 97 + 96)
    chunked, chunked_gradients = sums_and_gradients(watched)
    assert max(seen) == min(rows, 10) and sum(seen) == (20 if rows < 10 else 10)  # made, and made again in the backward
    assert chunked["correct"] == whole["correct"]
    torch.testing.assert_close(chunked["ce"], whole["ce"], rtol=0, atol=1e-12)
    for name, gradient in gradients.items():
        torch.testing.assert_close(chunked_gradients[name], gradient, rtol=0, atol=1e-12)


def test_a_micro_batch_without_supervised_tokens_gives_zero_gradients_to_every_parameter():
    decoder = tiny().train()
    for batch in (FILLER, {**BATCH, "supervised_positions": FILLER["targets"], "targets": FILLER["targets"]}):
        sums = sft_objective(decoder, batch)
        assert sums["ce"].item() == 0 and sums["correct"].item() == 0
        sums["ce"].backward()
        for name, parameter in decoder.named_parameters():
            assert torch.equal(parameter.grad, torch.zeros_like(parameter)), name
    sft_objective(decoder, BATCH)["ce"].backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in decoder.parameters())


def test_sums_of_micro_batches_are_the_sum_of_the_batch():
    decoder = tiny().double()
    parts = [pack([d], supervise=lambda p: p % 3 != 0) for d in (tokens(9, 1), tokens(6, 2), tokens(4, 3))]
    total = sum(sft_objective(decoder, part)["ce"] for part in parts)
    torch.testing.assert_close(total, sft_objective(decoder, BATCH)["ce"], rtol=0, atol=1e-12)
