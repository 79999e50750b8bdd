"""A student learns the distributions of its teacher, token by token, and of nobody else's vocabulary."""

import copy
import json
import math
import os
import shutil
import sys

import pytest
import torch
import torch.nn.functional as F
import yaml

import model.losses
from model.build import OWN_TOKENIZER, load_tokenizer
from model.distillation import (
    check_teacher,
    distillation_weights,
    divergence,
    fingerprint,
    make_distillation_objective,
)
from model.loading import load_model
from model.losses import make_sft_objective
from scripts.train_distillation import weights_of_terms
from tests.small_world import TINY, log_of, records_of, result_of, resume_from, run_ranks, train
from tests.tiny_model import FILLER, foreign, logits_of, pack, tiny, tokens
from training.config.loss_weights import parse_loss_weights

DOCUMENTS = [tokens(9, 1), tokens(6, 2), tokens(4, 3)]
BATCH = pack(DOCUMENTS, supervise=lambda position: position % 3 != 0)
PARTS = [pack([document], supervise=lambda position: position % 3 != 0) for document in DOCUMENTS]


def sums_and_gradients(objective, batch=BATCH, **changes):
    student = tiny(**changes).double().train()
    torch.manual_seed(0)
    sums = objective(student, batch)
    sum(term for term in sums.values() if term.requires_grad).backward()
    return sums, {name: parameter.grad for name, parameter in student.named_parameters()}


def teacher_of(**changes):
    return tiny(seed=1, num_hidden_layers=3, hidden_size=64, **changes).double()


# --- the loss


@pytest.mark.parametrize(("temperature", "kd"), [(1.0, 0.14384103622589042), (2.0, 0.5753641449035617)])
def test_the_divergence_of_one_token_by_hand(temperature, kd):
    """Softened, the teacher says 1/2 and 1/2, the student 1/4 and 3/4: KL = ln(4/3) / 2."""
    own = (temperature * torch.tensor([[0.0, math.log(3)]], dtype=torch.float64)).requires_grad_()
    wanted = torch.tensor([[5.0, 5.0]], dtype=torch.float64)
    loss = divergence(own, wanted, temperature)
    assert loss.item() == pytest.approx(kd, rel=1e-14)
    loss.backward()
    assert own.grad.flatten().tolist() == pytest.approx([-0.25 * temperature, 0.25 * temperature], rel=1e-14)
    turned = divergence(wanted, own.detach(), temperature)
    assert abs(turned.item() - kd) > 1e-3 * kd, "the divergence has a direction"


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_the_terms_are_those_written_out(temperature):
    student, teacher = tiny().double(), teacher_of()
    sums = make_distillation_objective(teacher, 0.7, temperature)(student, BATCH)
    own, wanted = ((logits_of(each, BATCH) / temperature).softmax(-1) for each in (student, teacher))
    kd = temperature**2 * (wanted * (wanted / own).log()).sum().item()
    assert sums.keys() == {"ce", "kd", "correct"}
    assert sums["kd"].item() == pytest.approx(kd, rel=1e-11) and kd > 1
    plain = make_sft_objective()(student, BATCH)
    assert torch.equal(sums["ce"], plain["ce"]) and torch.equal(sums["correct"], plain["correct"])


def test_the_balance_of_a_student_with_experts_is_learnt_too():
    student = tiny(num_experts=4).double()
    sums = make_distillation_objective(teacher_of(), 0.7, 4.0)(student, BATCH)
    assert sums.keys() == {"ce", "kd", "correct", "aux", "router_z", "max_expert_share"}
    assert torch.equal(sums["aux"], make_sft_objective()(student, BATCH)["aux"])


def test_a_teacher_who_is_the_student_teaches_nothing():
    student = tiny().double()
    objective = make_distillation_objective(copy.deepcopy(student), 0.7, 4.0)
    sums = objective(student, BATCH)
    assert sums["kd"].item() == 0
    (gradient,) = torch.autograd.grad(sums["kd"], student.lm_head.weight)
    assert gradient.abs().max() < 1e-12
    assert make_distillation_objective(teacher_of(), 0.7, 4.0)(student, BATCH)["kd"].item() > 1


def test_sums_of_micro_batches_are_the_sum_of_the_batch():
    student, objective = tiny().double(), make_distillation_objective(teacher_of(), 0.7, 4.0, z=True)
    whole, parts = objective(student, BATCH), [objective(student, part) for part in PARTS]
    for name, value in whole.items():
        torch.testing.assert_close(sum(part[name] for part in parts), value, rtol=1e-12, atol=0)
        assert name == "correct" or abs(parts[0][name] - value) > 0.1
    assert objective(student, FILLER)["kd"].item() == 0


@pytest.mark.parametrize("rows", [1, 3, 10])
def test_chunks_add_up_and_no_more_logits_are_alive_at_once(monkeypatch, rows):
    teacher, seen = teacher_of(), []
    objective = make_distillation_objective(teacher, 0.7, 4.0, label_smoothing=0.1)
    whole, gradients = sums_and_gradients(objective)
    teacher.lm_head.register_forward_hook(lambda _module, _args, logits: seen.append(len(logits)))
    monkeypatch.setattr(model.losses, "MAX_LOGITS", rows * 97)
    chunked, chunked_gradients = sums_and_gradients(objective)
    assert max(seen) == rows and sum(seen) == (20 if rows < 10 else 10)  # and again in the backward pass
    for name, value in whole.items():
        torch.testing.assert_close(chunked[name], value, rtol=1e-12, atol=0)
    for name, gradient in gradients.items():
        torch.testing.assert_close(chunked_gradients[name], gradient, rtol=0, atol=1e-11)
    other = sums_and_gradients(make_distillation_objective(teacher, 0.7, 3.0, label_smoothing=0.1))[1]
    assert all((other[name] - gradient).abs().max() > 1e-3 for name, gradient in gradients.items())


class Sleeping(torch.nn.Module):
    """A teacher that nobody may ask."""

    def supervised_states(self, batch):
        raise AssertionError("the teacher was run")


def test_with_alpha_0_the_teacher_is_never_run_and_no_bit_is_another():
    options = {"label_smoothing": 0.1, "z": True, "neftune_alpha": 5.0}
    silent = make_distillation_objective(Sleeping(), 0.0, 4.0, **options)
    (sums, gradients), (plain, expected) = (
        sums_and_gradients(objective, dropout=0.1) for objective in (silent, make_sft_objective(**options))
    )
    assert sums.keys() == plain.keys() and all(torch.equal(sums[name], plain[name]) for name in plain)
    assert all(torch.equal(gradients[name], gradient) for name, gradient in expected.items())
    with pytest.raises(AssertionError, match="the teacher was run"):
        sums_and_gradients(make_distillation_objective(Sleeping(), 0.7, 4.0))


def test_the_weights_of_the_terms():
    assert distillation_weights(0.7) == "ce=0.3, kd=0.7"
    assert distillation_weights(0.0) == "ce=1, kd=0" and distillation_weights(1.0) == "ce=0, kd=1"
    weights = {name: weight.at(0, 1) for name, weight in parse_loss_weights(distillation_weights(0.9)).items()}
    assert weights == {"ce": 0.1, "kd": 0.9}


@pytest.mark.parametrize("alpha", [-0.1, 1.5, math.nan])
def test_impossible_alpha_is_refused(alpha):
    with pytest.raises(ValueError, match=f"--alpha must be in .*, got {alpha}"):
        make_distillation_objective(tiny(), alpha, 4.0)


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.inf, math.nan])
def test_impossible_temperature_is_refused(temperature):
    with pytest.raises(ValueError, match=f"--temperature must be .*, got {temperature}"):
        make_distillation_objective(tiny(), 0.5, temperature)


def test_labels_are_smoothed_in_training_alone():
    student, objective = tiny().double(), make_distillation_objective(teacher_of(), 0.7, 4.0, label_smoothing=0.1)
    plain, smooth = (make_sft_objective(smoothing)(student, BATCH)["ce"] for smoothing in (0.0, 0.1))
    assert torch.equal(objective(student, BATCH)["ce"], plain) and not torch.equal(plain, smooth)
    assert torch.equal(objective(student.train(), BATCH)["ce"], smooth)


# --- the teacher


def test_the_teacher_is_left_as_it_is():
    """No gradient, no dropout, no noise: it says the same in every step."""
    teacher = teacher_of(dropout=0.5).train()
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    asked = []
    teacher.model.layers[0].register_forward_pre_hook(lambda _module, args: asked.append(args[0].detach().clone()))
    objective = make_distillation_objective(teacher, 0.7, 4.0, neftune_alpha=5.0, gradient_penalty=True)
    sums, gradients = zip(*(sums_and_gradients(objective, dropout=0.1) for _ in range(2)), strict=True)
    looked_up = before["model.embed_tokens.weight"][BATCH["input_ids"]]
    assert torch.equal(asked[0], looked_up) and torch.equal(asked[1], looked_up)
    assert torch.equal(sums[0]["kd"], sums[1]["kd"]) and sums[0].keys() == {"ce", "kd", "correct", "gp"}
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])
    assert all(parameter.grad is None for parameter in teacher.parameters()) and not teacher.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("low", [False, True])
def test_the_teacher_computes_in_its_own_type(dtype, low):
    teacher, seen = tiny(seed=1).to(dtype), []
    teacher.lm_head.register_forward_hook(lambda _module, _args, logits: seen.append(logits.dtype))
    with torch.autocast("cpu", torch.bfloat16, enabled=low):
        sums = make_distillation_objective(teacher, 0.7, 4.0)(tiny().train(), BATCH)
    assert seen == [dtype] and sums["kd"].dtype == torch.float32
    exact = make_distillation_objective(tiny(seed=1), 0.7, 4.0)(tiny(), BATCH)["kd"].item()
    assert sums["kd"].item() == pytest.approx(exact, rel=0.05)


@pytest.mark.parametrize(("family", "changes"), [("Mistral", {}), ("Gemma2", {"final_logit_softcapping": 5.0})])
def test_teacher_and_student_may_be_models_of_transformers(tmp_path, family, changes):
    foreign(tmp_path / "model", family, **changes)
    network = load_model(tmp_path / "model").double()
    assert network._plain_head == (family == "Mistral"), "with a head, and with more than a head"
    for student, teacher in ((tiny().double(), network), (network, tiny().double())):
        kd = make_distillation_objective(teacher, 0.7, 2.0)(student, BATCH)["kd"]
        own, wanted = ((logits_of(each, BATCH) / 2).log_softmax(-1) for each in (student, teacher))
        expected = 4 * F.kl_div(own, wanted, reduction="sum", log_target=True)
        torch.testing.assert_close(kd, expected, rtol=1e-10, atol=0)
    same = make_distillation_objective(copy.deepcopy(network), 0.7, 2.0)(network, BATCH)["kd"]
    assert same.item() == 0 and expected.item() > 1


def test_a_student_comes_to_say_what_its_teacher_says():
    teacher, student = tiny(seed=1), tiny().train()
    objective = make_distillation_objective(teacher, 1.0, 2.0)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        loss = objective(student, BATCH)["kd"]
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.05 * losses[0]
    agreed = logits_of(student, BATCH).argmax(-1) == logits_of(teacher, BATCH).argmax(-1)
    assert agreed.all() and not torch.equal(logits_of(teacher, BATCH).argmax(-1), BATCH["targets"])


# --- whose vocabulary


def own_tokenizer():
    return load_tokenizer(str(OWN_TOKENIZER))


def test_the_same_vocabulary_is_accepted():
    check_teacher(tiny(), tiny(seed=1, num_hidden_layers=1), own_tokenizer(), own_tokenizer())


def test_the_first_difference_between_two_vocabularies_is_named(tmp_path):
    other = own_tokenizer()
    other.add_tokens(["<new>"])
    with pytest.raises(ValueError, match="token 6400 is '<new>' for the teacher and None for the student"):
        check_teacher(tiny(), tiny(), own_tokenizer(), other)
    with pytest.raises(ValueError, match="token 6400 is None for the teacher and '<new>' for the student"):
        check_teacher(tiny(), tiny(), other, own_tokenizer())

    other = own_tokenizer()
    other.unk_token = "<|endoftext|>"
    check_teacher(tiny(), tiny(), own_tokenizer(), other)
    other.eos_token = "<|endoftext|>"
    with pytest.raises(ValueError, match=r"eos_token is '<\|endoftext\|>' for the teacher and '<\|im_end\|>' for"):
        check_teacher(tiny(), tiny(), own_tokenizer(), other)

    with pytest.raises(ValueError, match="the number of logits is 98 for the teacher and 97 for the student"):
        check_teacher(tiny(), tiny(vocab_size=98), own_tokenizer(), own_tokenizer())

    shutil.copytree(OWN_TOKENIZER, tmp_path / "swapped")
    file = tmp_path / "swapped" / "tokenizer.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    vocabulary = content["model"]["vocab"]
    first, second = sorted(vocabulary, key=vocabulary.get)[300:302]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    file.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ValueError, match="token 300 is .* for the teacher and .* for the student") as error:
        check_teacher(tiny(), tiny(), own_tokenizer(), load_tokenizer(str(tmp_path / "swapped")))
    assert f"{second!r} for the teacher and {first!r} for the student" in str(error.value)


def test_a_fingerprint_tells_weights_apart():
    assert fingerprint(tiny()) == fingerprint(tiny()) == fingerprint(copy.deepcopy(tiny()))
    assert len({fingerprint(each) for each in (tiny(), tiny(seed=1), tiny(num_hidden_layers=1))}) == 3
    trained = tiny()
    trained.model.norm.weight.data[0] += 1e-6
    assert fingerprint(trained) != fingerprint(tiny())


# --- the script


def test_without_a_teacher_and_with_one_in_the_wrong_place_it_is_said(tmp_path, rows, teacher):
    assert distill(1, tmp_path / "none", data_path=rows) == [2]
    assert "--teacher is missing" in log_of(tmp_path / "none")
    assert train(1, tmp_path / "plain", data_path=str(rows), teacher=str(teacher)) == [2]
    assert "is started by torchrun -m scripts.train_distillation" in log_of(tmp_path / "plain")


def test_the_saved_settings_start_the_same_run_again(tmp_path, rows, teacher):
    words = ("--teacher", str(teacher), "--temperature", "2", "--alpha", "0.6", "--max_steps", "2")
    assert distill(1, tmp_path / "first", *words, data_path=rows) == [0], log_of(tmp_path / "first")
    saved = yaml.safe_load((tmp_path / "first" / "config.yaml").read_text())
    assert (saved["teacher"], saved["temperature"], saved["alpha"]) == (str(teacher), 2.0, 0.6)
    config = str(tmp_path / "first" / "config.yaml")
    argv = ["--config", config, f"--save_dir={tmp_path / 'again'}"]
    assert run_ranks(_distill_rank, 1, (argv, str(tmp_path / "again"))) == [0], log_of(tmp_path / "again")
    assert result_of(tmp_path / "again") == result_of(tmp_path / "first")
    card = (tmp_path / "first" / "final" / "README.md").read_text()
    assert f"| train | `{rows}` | 24 | 24 | 0 |" in card and f"teacher: {teacher}\n" in card
    assert f"| teacher | {teacher} |" in card and "| loss weights | ce=0.4, kd=0.6 |" in card


@pytest.mark.parametrize(
    ("given", "alpha", "expected"),
    [
        ("", None, "ce=0.3, kd=0.7"), ("", 0.9, "ce=0.1, kd=0.9"), ("z=1e-4", None, "ce=0.3, kd=0.7, z=1e-4"),
        ("kd=linear(0, 1, 0, 3)", None, "ce=0.3, kd=linear(0, 1, 0, 3)"), ("ce=2, kd=1", None, "ce=2, kd=1"),
        ("ce=0.3, kd=0.7", 0.7, "ce=0.3, kd=0.7"),
    ],
)  # fmt: skip
def test_weights_that_are_given_stay(given, alpha, expected):
    assert weights_of_terms(given, alpha) == expected
    assert parse_loss_weights(expected)


def test_two_weights_for_one_term_are_refused():
    with pytest.raises(ValueError, match="--alpha 0.5 means ce=0.5, kd=0.5, --loss_weights says kd=1: give one"):
        weights_of_terms("kd=1", 0.5)


NOISY = {"neftune_alpha": 5.0}  # and TINY has dropout: what is drawn has to be drawn again


def distill(world_size, save_dir, *words, **flags):
    """Exit codes of the ranks of the script, as torchrun would start it."""
    values = {**TINY, "save_dir": str(save_dir), "cache_dir": str(save_dir.parent / "cache"), "max_steps": 4, **flags}
    save_dir.parent.mkdir(parents=True, exist_ok=True)
    argv = [*words, *(f"--{name}={value}" for name, value in values.items() if name != "epochs")]
    return run_ranks(_distill_rank, world_size, (argv, str(save_dir)))


def _distill_rank(rank, argv, save_dir):
    descriptor = os.open(f"{save_dir}.rank{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    from scripts.train_distillation import main
    from training.config.command_line import config_from_command_line

    sys.exit(main(config_from_command_line(argv)))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory, rows):
    """A finished run, twice as wide as its students."""
    run = tmp_path_factory.mktemp("teacher") / "run"
    assert train(1, run, data_path=str(rows), hidden_size=32, max_steps=4) == [0], log_of(run)
    return run


@pytest.fixture(scope="module")
def distilled(tmp_path_factory, rows, teacher):
    run = tmp_path_factory.mktemp("distilled") / "run"
    flags = {"data_path": rows, "val_data_path": rows, "eval_at_start": 1, **NOISY}
    assert distill(1, run, "--teacher", str(teacher), **flags) == [0], log_of(run)
    return run


def test_a_run_under_a_teacher_learns_from_both(distilled):
    steps, evaluations = records_of(distilled, "train"), records_of(distilled, "eval")
    assert len(steps) == 4 and all(record["train/loss_kd"] > 0 for record in steps)
    assert evaluations[-1]["eval/loss_kd"] < evaluations[0]["eval/loss_kd"]
    assert evaluations[-1]["eval/loss"] < evaluations[0]["eval/loss"]
    saved = yaml.safe_load((distilled / "config.yaml").read_text())
    assert saved["loss_weights"] == "ce=0.3, kd=0.7" and saved["hidden_size"] == 16
    assert "in float32" in log_of(distilled)


def test_a_resumed_run_under_a_teacher_ends_with_the_same_bits(tmp_path, rows, teacher, distilled):
    flags = {"data_path": rows, "val_data_path": rows, "eval_at_start": 1, "from_resume": 1, **NOISY}
    cut = resume_from(distilled, 2, tmp_path / "cut")
    moved = shutil.copytree(teacher / "final", tmp_path / "elsewhere")  # a teacher is known by its weights
    assert distill(1, cut, "--teacher", str(moved), **flags) == [0], log_of(cut)
    assert "resumed from" in log_of(cut)
    assert result_of(cut) == result_of(distilled)
    for name, value in {"seed": 8, "neftune_alpha": 0.0, "label_smoothing": 0.1}.items():
        changed = {**flags, "from_resume": 0, name: value}
        assert distill(1, tmp_path / name, "--teacher", str(teacher), **changed) == [0]
        assert result_of(tmp_path / name)["final"] != result_of(distilled)["final"], name


def test_a_resume_under_another_teacher_or_none_is_refused(tmp_path, rows, teacher, distilled):
    flags = {"data_path": str(rows), "val_data_path": str(rows), "from_resume": "1", **NOISY}
    cut = resume_from(distilled, 2, tmp_path / "cut")
    own, other = ("--teacher", str(teacher)), ("--teacher", str(distilled))
    for words in ((*own, "--temperature", "3"), (*own, "--alpha", "0.6"), (*own, "--teacher_dtype", "bfloat16"), other):
        assert distill(1, cut, *words, **flags) == [2], words
        assert "objective: the checkpoint has" in log_of(cut) and "--allow_change objective" in log_of(cut)
    assert train(1, cut, **flags, max_steps=4) == [2]
    assert "objective: the checkpoint has" in log_of(cut)
    assert distill(1, cut, *own, "--temperature", "3", "--allow_change", "objective", **flags) == [0], log_of(cut)


def test_two_ranks_learn_what_one_learns(tmp_path, rows, teacher):
    losses = []
    for world_size in (1, 2):
        run = tmp_path / str(world_size)
        flags = {"data_path": rows, "dropout": 0.0, "global_batch_size": 2, "gradient_penalty": 1e-3}
        codes = distill(world_size, run, "--teacher", str(teacher), **flags, loss_weights="z=1e-3")
        assert codes == [0] * world_size, log_of(run)
        records = records_of(run, "train")
        losses += [[r[f"train/loss{name}"] for r in records for name in ("", "_kd", "_z", "_gp")]]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_with_alpha_0_the_run_is_that_of_the_trainer(tmp_path, rows, teacher):
    flags = {"data_path": str(rows), "label_smoothing": 0.1, "val_data_path": str(rows)}
    assert distill(1, tmp_path / "silent", "--teacher", str(tmp_path / "nobody"), "--alpha", "0", **flags) == [0]
    assert train(1, tmp_path / "plain", **flags, max_steps=4) == [0]
    assert result_of(tmp_path / "silent") == result_of(tmp_path / "plain")
    assert distill(1, tmp_path / "taught", "--teacher", str(teacher), **flags) == [0]
    assert result_of(tmp_path / "taught")["final"] != result_of(tmp_path / "plain")["final"]


def test_a_teacher_that_does_not_fit_ends_the_run_with_one_message(tmp_path, rows, teacher):
    final = shutil.copytree(teacher / "final", tmp_path / "narrow")
    settings = json.loads((final / "config.json").read_text())
    (final / "config.json").write_text(json.dumps({**settings, "max_position_embeddings": 32}))
    program = shutil.copytree(teacher / "final", tmp_path / "program")
    (program / "model.safetensors").rename(program / "pytorch_model.bin")
    unlike = shutil.copytree(teacher / "final", tmp_path / "unlike")
    tokenizer = load_tokenizer(str(unlike))
    tokenizer.eos_token = "<|endoftext|>"
    tokenizer.save_pretrained(unlike)
    cases = [
        (tmp_path / "nobody", 2, "no model in"), (final, 2, "--max_seq_len 64: the teacher knows 32 positions"),
        (program, 77, "is a pickle"), (unlike, 2, "the teacher has another vocabulary than the student: eos_token"),
    ]  # fmt: skip
    for directory, code, said in cases:
        run = tmp_path / f"run-{directory.name}"
        assert distill(1, run, "--teacher", str(directory), data_path=rows) == [code], log_of(run)
        assert said in log_of(run) and "Traceback" not in log_of(run)
