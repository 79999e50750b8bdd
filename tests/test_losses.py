"""What is summed over the supervised tokens, and that chunks of it add up to the whole."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import model.losses
from model.language_model import LanguageModel
from model.loading import load_model
from model.losses import make_sft_objective, sft_objective, sft_terms
from model.regularisers import twice_differentiable
from tests.small_world import answers_of
from tests.tiny_model import FILLER, foreign, logits_of, pack, tiny, tokens

DOCUMENTS = [tokens(9, 1), tokens(6, 2), tokens(4, 3)]
BATCH = pack(DOCUMENTS, supervise=lambda position: position % 3 != 0)
PARTS = [pack([document], supervise=lambda position: position % 3 != 0) for document in DOCUMENTS]


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


def sums_and_gradients(objective, decoder=None):
    """The sums, and the gradients of their total."""
    decoder = decoder or tiny().double()
    sums = objective(decoder, BATCH)
    sum(term for term in sums.values() if term.requires_grad).backward()
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


EVERY_TERM = {"label_smoothing": 0.1, "z": True, "gradient_penalty": True}


def test_sums_of_micro_batches_are_the_sum_of_the_batch():
    decoder, objective = tiny().double(), make_sft_objective(**EVERY_TERM)
    whole, parts = objective(decoder, BATCH), [objective(decoder, part) for part in PARTS]
    assert whole.keys() == {"ce", "correct", "z", "gp"}
    for name, value in whole.items():
        torch.testing.assert_close(sum(part[name] for part in parts), value, rtol=1e-12, atol=0)
        assert name == "correct" or abs(parts[0][name] - value) > 1


# --- z-loss


def test_the_terms_of_two_tokens_by_hand():
    """Probabilities 1/4 and 3/4, a half each; logsumexp ln 4 and ln 2."""
    logits = torch.tensor([[0.0, math.log(3)], [0.0, 0.0]], dtype=torch.float64)
    sums = sft_terms(torch.tensor([1, 0]), z=True)(logits, slice(0, 2))
    assert sums["ce"].item() == pytest.approx(0.28768207245178085 + 0.6931471805599453, rel=1e-15)
    assert sums["z"].item() == pytest.approx(1.9218120556728056 + 0.4804530139182014, rel=1e-15)
    assert sums["correct"].item() == 2
    assert sft_terms(torch.tensor([0]), z=True)(logits[:1], slice(0, 1))["correct"].item() == 0
    assert "z" not in sft_terms(torch.tensor([1, 0]))(logits, slice(0, 2))


def test_z_is_wide_under_autocast_and_pulls_the_logits_to_where_their_exponentials_sum_to_one():
    with torch.autocast("cpu", torch.bfloat16):
        assert make_sft_objective(z=True)(tiny(), BATCH)["z"].dtype == torch.float32
    assert make_sft_objective(z=True)(tiny().double(), BATCH)["z"].dtype == torch.float64
    logits = torch.tensor([[1.0, 2.0, 3.0]], requires_grad=True)
    for _ in range(300):
        (gradient,) = torch.autograd.grad(sft_terms(torch.tensor([0]), z=True)(logits, slice(0, 1))["z"], logits)
        logits = (logits - 0.1 * gradient).detach().requires_grad_()
    assert logits.exp().sum().item() == pytest.approx(1.0, abs=1e-4)


@pytest.mark.parametrize("rows", [1, 3, 10])
def test_chunks_of_the_head_add_up_for_every_term(monkeypatch, rows):
    whole, gradients = sums_and_gradients(make_sft_objective(**EVERY_TERM))
    monkeypatch.setattr(model.losses, "MAX_LOGITS", rows * 97)
    seen = []
    decoder = tiny().double()
    decoder.lm_head.register_forward_hook(lambda _module, _args, logits: seen.append(len(logits)))
    chunked, chunked_gradients = sums_and_gradients(make_sft_objective(**EVERY_TERM), decoder)
    assert max(seen) == rows and (len(seen) == 1) == (rows == 10)
    for name in whole:
        torch.testing.assert_close(chunked[name], whole[name], rtol=1e-12, atol=0)
    for name, gradient in gradients.items():
        torch.testing.assert_close(chunked_gradients[name], gradient, rtol=1e-12, atol=1e-9)
    plain = sums_and_gradients(make_sft_objective(label_smoothing=0.1, z=True))[1]
    name = "model.embed_tokens.weight"
    assert (plain[name] - gradients[name]).abs().max() > 1


# --- noise on the input embeddings


def embedded(decoder, objective, batch=BATCH, seed=0):
    """What the first layer gets."""
    seen = []
    with decoder.model.layers[0].register_forward_pre_hook(lambda _module, args: seen.append(args[0].detach())):
        torch.manual_seed(seed)
        objective(decoder, batch)
    return seen[0]


def noise(decoder, alpha, batch=BATCH, seed=0):
    noisy = embedded(decoder, make_sft_objective(neftune_alpha=alpha), batch, seed)
    return noisy - embedded(decoder, sft_objective, batch)


def test_the_size_of_the_noise_is_that_of_the_paper_for_each_document():
    documents = [tokens(5, 1), tokens(101, 2), tokens(1001, 3)]
    decoder, batch = tiny().double().train(), pack(documents)
    bounds = []
    for length, part in zip((4, 100, 1000), noise(decoder, 5.0, batch).split([4, 100, 1000]), strict=True):
        bound = 5.0 / math.sqrt(length * 32)
        assert part.abs().max() <= bound * (1 + 1e-9) and part.abs().max() > 0.95 * bound
        assert part.square().mean().sqrt().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)  # uniform
        assert abs(part.mean()) < 4 * bound / math.sqrt(3 * part.numel())
        bounds.append(bound)
        alone = noise(decoder, 5.0, pack([documents[len(bounds) - 1]]))  # the same size alone as packed
        assert 0.95 * bound < alone.abs().max() <= bound * (1 + 1e-9)
    assert bounds == pytest.approx([0.4419417382415922, 0.08838834764831845, 0.027950849718747374], rel=1e-12)


def test_noise_is_the_same_for_the_same_seed_alone():
    decoder = tiny().train()
    first = noise(decoder, 5.0)
    assert first.count_nonzero() == first.numel()
    assert torch.equal(noise(decoder, 5.0), first)
    assert (noise(decoder, 5.0, seed=1) - first).abs().max() > 0.01
    torch.testing.assert_close(noise(decoder, 10.0), 2 * first, rtol=0, atol=1e-6)


def test_noise_acts_in_training_alone_and_leaves_no_trace():
    decoder, noisy = tiny().double(), make_sft_objective(neftune_alpha=5.0)
    plain = sft_objective(decoder, BATCH)["ce"]
    state = torch.get_rng_state()
    assert torch.equal(noisy(decoder, BATCH)["ce"], plain) and torch.equal(torch.get_rng_state(), state)
    assert abs(noisy(decoder.train(), BATCH)["ce"] - plain) > 0.01
    assert torch.equal(sft_objective(decoder, BATCH)["ce"], plain)
    assert not decoder.model.embed_tokens._forward_hooks
    with pytest.raises(KeyError):
        noisy(decoder, {name: value for name, value in BATCH.items() if name != "position_ids"})
    assert not decoder.model.embed_tokens._forward_hooks


@pytest.mark.parametrize("alpha", [0.0, 5.0])
def test_without_noise_nothing_is_another_bit(alpha):
    """Dropout too: no number is drawn."""
    results = []
    for objective in (sft_objective, make_sft_objective(0.0, False, alpha)):
        torch.manual_seed(3)
        results.append(sums_and_gradients(objective, tiny(dropout=0.1).train()))
    (plain, gradients), (other, other_gradients) = results
    same = [torch.equal(other["ce"], plain["ce"])]
    same += [torch.equal(other_gradients[name], gradient) for name, gradient in gradients.items()]
    assert all(same) if alpha == 0 else not any(same)


def test_gradient_checkpointing_changes_no_gradient_under_noise():
    gradients = []
    for recompute in (False, True):
        decoder = tiny(dropout=0.1).double().train()
        if recompute:
            decoder.enable_gradient_checkpointing()
        torch.manual_seed(0)
        gradients.append(sums_and_gradients(make_sft_objective(neftune_alpha=5.0), decoder)[1])
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


# --- the gradient penalty


class TwoLogits(LanguageModel):
    """Embeds each token as one number e and says (e, -e): all is known in closed form."""

    def __init__(self, *embedding: float):
        super().__init__()
        self.table = nn.Embedding(len(embedding), 1)
        self.table.weight.data = torch.tensor(embedding, dtype=torch.float64)[:, None]

    def input_embeddings(self):
        return self.table

    def forward(self, batch, terms):
        e = self.table(batch["input_ids"])[batch["supervised_positions"]]
        return terms(torch.cat([e, -e], dim=-1), slice(0, len(e)))


def test_the_penalty_and_its_gradient_by_hand():
    """ce of target 0 is ln(1 + exp(-2 e)), its gradient -2 (1 - s) with s = sigmoid(2 e), the penalty 4 (1 - s)^2."""
    toy = TwoLogits(0.0, math.log(3) / 2)  # s = 1/2, 3/4
    batch = {
        "input_ids": torch.tensor([0, 1, 0]), "supervised_positions": torch.tensor([0, 1]),
        "targets": torch.tensor([0, 0]),
    }  # fmt: skip
    sums = make_sft_objective(gradient_penalty=True)(toy, batch)
    assert sums["gp"].item() == pytest.approx(1.0 + 0.25, rel=1e-14)
    sums["gp"].backward()
    assert toy.table.weight.grad.flatten().tolist() == pytest.approx([-2.0, -0.75], rel=1e-14)  # -16 s (1 - s)^2
    assert sums["ce"].item() == pytest.approx(math.log(2) + math.log(4 / 3), rel=1e-14)


def test_the_penalty_is_the_squared_gradient_that_the_ordinary_path_has():
    """Fused attention and norms have other code, and give the same first derivative."""
    decoder, seen = tiny().double(), []
    with decoder.model.embed_tokens.register_forward_hook(lambda *call: seen.append(call[2])):
        ce = sft_objective(decoder, BATCH)["ce"]
    (gradient,) = torch.autograd.grad(ce, seen)
    sums = make_sft_objective(gradient_penalty=True)(decoder, BATCH)
    assert sums["gp"].item() == pytest.approx(gradient.square().sum().item(), rel=1e-11)
    assert sums["ce"].item() == pytest.approx(ce.item(), rel=1e-13)
    unsupervised = [t for t in range(len(BATCH["input_ids"])) if t not in BATCH["supervised_positions"].tolist()]
    assert gradient[unsupervised].square().sum() > 1, "positions without a target of their own count too"


def test_the_gradient_of_the_penalty_agrees_with_finite_differences():
    decoder, objective = tiny(num_hidden_layers=1).double(), make_sft_objective(gradient_penalty=True)
    objective(decoder, BATCH)["gp"].backward()
    numbers, step = torch.Generator().manual_seed(0), 1e-5
    for name, parameter in decoder.named_parameters():
        direction = torch.randn(parameter.shape, generator=numbers, dtype=torch.float64)
        values = []
        for sign in (1, -1):
            parameter.data.add_(direction, alpha=sign * step)
            values.append(objective(decoder, BATCH)["gp"].item())
            parameter.data.sub_(direction, alpha=sign * step)
        slope = (parameter.grad * direction).sum().item()
        assert slope == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-5), name
        assert abs(slope) > 1e-3, name


def test_the_penalty_is_measured_where_gradients_are_recorded_and_leaves_no_trace():
    decoder = tiny().double()
    with torch.no_grad():
        assert make_sft_objective(gradient_penalty=True)(decoder, BATCH).keys() == {"ce", "correct"}
    make_sft_objective(gradient_penalty=True)(decoder, BATCH)["gp"].backward()
    assert not any(module._forward_hooks for module in decoder.modules())
    assert torch.backends.cuda.flash_sdp_enabled()  # on again
    with twice_differentiable(decoder):
        assert not torch.backends.cuda.flash_sdp_enabled()


def test_the_penalty_is_float32_under_autocast_and_near_that_without():
    objective = make_sft_objective(gradient_penalty=True)
    with torch.autocast("cpu", torch.bfloat16):
        low = objective(tiny().train(), BATCH)["gp"]
    low.backward()
    assert low.dtype == torch.float32
    assert low.item() == pytest.approx(objective(tiny(), BATCH)["gp"].item(), rel=0.1)


def test_noise_and_penalty_go_together():
    sums = {}
    for alpha in (0.0, 5.0):
        torch.manual_seed(0)
        sums[alpha] = make_sft_objective(neftune_alpha=alpha, gradient_penalty=True)(tiny().train(), BATCH)
        sums[alpha]["gp"].backward()
    torch.manual_seed(0)
    noisy = make_sft_objective(neftune_alpha=5.0)(tiny().train(), BATCH)
    assert sums[5.0]["ce"].item() == pytest.approx(noisy["ce"].item(), rel=1e-5)
    assert abs(sums[5.0]["gp"] - sums[0.0]["gp"]) > 1e-2


def test_what_cannot_be_differentiated_twice_is_refused():
    decoder = tiny()
    decoder.enable_gradient_checkpointing()
    with pytest.raises(ValueError, match="--gradient_penalty .* --gradient_checkpointing"):
        make_sft_objective(gradient_penalty=True)(decoder, BATCH)


NARROW = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}


def shared_sums(rank, answer, strategy, options):
    """The gradients of documents that two ranks share, or the message of a ValueError."""
    from trainer_utils import Strategy, close_processes, parallelize, start_processes

    processes = start_processes(torch.device("cpu"), 60)
    decoder, objective = tiny(**NARROW).double().train(), make_sft_objective(**options)
    mine = pack(DOCUMENTS[rank::2], supervise=lambda position: position % 3 != 0)
    try:
        wrapped = parallelize(decoder, processes, Strategy(strategy), lambda m: objective(m, FILLER)["ce"])
        sums = objective(wrapped, mine)
        (2 * sum(term for term in sums.values() if term.requires_grad)).backward()  # DDP and FSDP average
    except ValueError as error:
        answer(str(error))
    else:
        if rank == 0:
            answer({name: parameter.grad.numpy() for name, parameter in decoder.named_parameters()})
    close_processes(processes)


def test_ranks_share_the_penalty_under_ddp_and_fsdp_refuses_it():
    _, gradients = sums_and_gradients(make_sft_objective(**EVERY_TERM), tiny(**NARROW).double().train())
    (shared,) = answers_of(shared_sums, 2, "ddp", EVERY_TERM)
    for name, gradient in gradients.items():
        torch.testing.assert_close(torch.from_numpy(shared[name]), gradient, rtol=1e-10, atol=1e-8)
    messages = answers_of(shared_sums, 2, "fsdp", EVERY_TERM)
    assert len(messages) == 2 and all("use --strategy ddp" in message for message in messages)


# --- models of transformers


NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
FAMILIES = [("Qwen2", {}), ("Mistral", {}), ("Gemma2", {"sliding_window": 4}), ("GPT2", NO_DROPOUT)]


@pytest.mark.parametrize(("family", "changes"), FAMILIES)
def test_models_of_transformers_have_every_term(tmp_path, family, changes):
    foreign(tmp_path / "model", family, **changes)
    network = load_model(tmp_path / "model").double().train()
    plain = sft_objective(network, BATCH)
    objective = make_sft_objective(0.0, z=True, neftune_alpha=5.0, gradient_penalty=True)
    first, again, other = ((torch.manual_seed(seed), objective(network, BATCH))[1] for seed in (0, 0, 1))
    assert first.keys() == {"ce", "correct", "z", "gp"}
    assert torch.equal(first["ce"], again["ce"]) and not torch.equal(first["ce"], other["ce"])
    assert not torch.equal(first["ce"], plain["ce"])
    network.zero_grad()
    first["gp"].backward()
    assert network.input_embeddings().weight.grad.abs().max() > 0
    assert not any(module._forward_hooks for module in network.modules())
    torch.testing.assert_close(objective(network.eval(), BATCH)["ce"], plain["ce"], rtol=1e-9, atol=0)


@pytest.mark.parametrize("alpha", [-1.0, math.inf, math.nan])
def test_impossible_noise_is_refused(alpha):
    with pytest.raises(ValueError, match=f"neftune_alpha must be a number from 0, got {alpha}"):
        make_sft_objective(neftune_alpha=alpha)
