"""The trainer as its user sees it: files, records, errors, signals, and steps that must not count."""

import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from tests.small_world import TINY, log_of, records_of, result_of, sha256, train, without_events, write_rows

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"}
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def finished(tmp_path_factory, rows):
    """One uninterrupted run with validation."""
    run = tmp_path_factory.mktemp("finished") / "run"
    flags = {"data_path": str(rows), "val_data_path": str(rows), "eval_at_start": True, "keep_last": 2}
    assert train(1, run, **flags) == [0], log_of(run)
    return run


def test_a_run_writes_exactly_these_files(finished):
    names = sorted(os.listdir(finished))
    assert names == [
        ".job", ".lock", "alerts.jsonl", "checkpoints", "config.yaml", "data_report.json", "environment.json", "final",
        "metrics.jsonl", "state.json",
    ]  # fmt: skip
    assert len(os.listdir(finished / "checkpoints")) == 2
    assert sorted(os.listdir(finished / "final")) == [
        "README.md", "chat_template.jinja", "config.json", "generation_config.json", "model.safetensors",
        "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip


def test_a_checkpoint_holds_every_weight_once(finished):
    """A tied head would otherwise take its place twice, and two copies could differ."""
    newest = max((finished / "checkpoints").iterdir())
    saved = load_file(newest / "model-00001-of-00001.safetensors")
    assert saved.keys() == load_file(finished / "final" / "model.safetensors").keys()
    assert "lm_head.weight" not in saved


def test_half_precision_has_the_gradient_norm_of_float32(tmp_path, rows):
    """What is logged and clipped is the gradient without its loss scale."""
    norms = {}
    for dtype in ("float32", "float16"):
        flags = {"data_path": str(rows), "dtype": dtype, "max_steps": 3, "dropout": 0.0, "grad_clip": 0.5}
        assert train(1, tmp_path / dtype, **flags) == [0]
        norms[dtype] = [r["train/grad_norm"] for r in records_of(tmp_path / dtype, "train")]
    assert norms["float16"] == pytest.approx(norms["float32"], rel=0.02)


def test_the_records_say_what_happened(finished):
    steps = records_of(finished, "train")
    assert [r["step"] for r in steps] == list(range(1, len(steps) + 1))
    assert {
        "train/loss", "train/token_accuracy", "train/learning_rate", "train/grad_norm", "train/tokens_per_second",
        "train/epoch", "train/supervised_tokens", "train/data_wait_share", "eta_seconds", "time", "kind", "step",
    } <= set(steps[0])  # fmt: skip
    assert 8.0 < steps[0]["train/loss"] < 9.5, "a new model knows nothing: about ln 6400 = 8.76"
    assert steps[-1]["train/loss"] < steps[0]["train/loss"] - 1
    evaluations = records_of(finished, "eval")
    assert [r["step"] for r in evaluations] == [0, len(steps) // 2, len(steps)]
    epochs = records_of(finished, "epoch")
    assert [(r["epoch"], r["mini_epoch"], r["stage"]) for r in epochs] == [(1, 1, 0), (2, 2, 0)]
    assert {
        "train_loss", "train_accuracy", "val_loss", "val_accuracy", "learning_rate", "time_per_epoch", "memory_usage",
        "gpu_utilization",
    } <= set(epochs[0])  # fmt: skip
    assert epochs[1]["val_loss"] == evaluations[-1]["eval/loss"]


def test_the_state_names_the_end(finished):
    state = json.loads((finished / "state.json").read_text())
    assert (state["status"], state["step"]) == ("completed", state["total_steps"])
    assert state["exit_reason"] and state["pid"] and state["host"] and state["updated_at"]


def test_the_saved_configuration_is_resolved_and_usable(finished, tmp_path, rows):
    config = yaml.safe_load((finished / "config.yaml").read_text())
    assert (config["global_batch_size"], config["intermediate_size"], config["dtype"]) == (1, 32, "float32")
    words = ["--config", str(finished / "config.yaml"), "--save_dir", str(tmp_path / "again")]
    done = subprocess.run(
        [sys.executable, "train_full_sft.py", *words], cwd=ROOT, env=ENVIRONMENT, capture_output=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert result_of(tmp_path / "again")["final"] == result_of(finished)["final"]


def test_the_ledger_accounts_for_every_row(finished):
    report = json.loads((finished / "data_report.json").read_text())["train"]
    assert report["rows_read"] == report["rows_kept"] + report["rows_rejected"] == 24
    assert report["samples"] == 24 and report["rows"] > 1


def test_validation_is_token_weighted_whoever_shares_it(tmp_path, rows, finished):
    """Losses of three ranks with uneven shares are those of one, and of a plain sum over all tokens."""
    flags = {"data_path": str(rows), "val_data_path": str(rows), "eval_at_start": True, "max_steps": 1}
    assert train(3, tmp_path / "three", **flags, global_batch_size=1) == [0] * 3, log_of(tmp_path / "three")
    three, one = records_of(tmp_path / "three", "eval")[0], records_of(finished, "eval")[0]
    assert three["eval/loss"] == pytest.approx(one["eval/loss"], abs=1e-6)
    assert three["eval/token_accuracy"] == one["eval/token_accuracy"]


def test_a_part_of_the_data_can_be_held_out(tmp_path, rows):
    assert train(1, tmp_path / "run", data_path=str(rows), val_fraction=0.25, max_steps=2) == [0]
    report = json.loads((tmp_path / "run" / "data_report.json").read_text())
    assert (report["train"]["samples"], report["held_out"]["samples"]) == (18, 6)
    assert records_of(tmp_path / "run", "eval")


def test_wrong_rows_end_the_run_before_training_with_path_and_line(tmp_path, rows):
    lines = rows.read_text().splitlines()
    lines[4] = lines[4][:-5]
    lines[9] = '{"messages": [{"role": "user", "content": "no answer"}]}'
    (tmp_path / "bad.jsonl").write_text("\n".join(lines) + "\n")
    flags = {"data_path": str(tmp_path / "bad.jsonl")}
    assert train(1, tmp_path / "run", **flags) == [65]
    log = log_of(tmp_path / "run")
    assert "bad.jsonl:5: JSON" in log and "bad.jsonl:10: NO_ASSISTANT" in log and "Traceback" not in log
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [".lock", "rejects.jsonl", "state.json"]
    assert train(1, tmp_path / "run", bad_rows="skip", **flags) == [0]
    rejects = [json.loads(line) for line in (tmp_path / "run" / "rejects.jsonl").read_text().splitlines()]
    assert [(reject["line"], reject["code"]) for reject in rejects] == [(5, "JSON_SYNTAX"), (10, "NO_ASSISTANT")]
    report = json.loads((tmp_path / "run" / "data_report.json").read_text())["train"]
    assert (report["rows_read"], report["rows_kept"], report["rows_rejected"]) == (24, 22, 2)


def test_rows_of_one_sample_have_the_losses_of_packed_ones(tmp_path, rows, finished):
    flags = {"data_path": str(rows), "val_data_path": str(rows), "eval_at_start": True, "packing": False}
    assert train(1, tmp_path / "run", **flags, max_steps=2) == [0], log_of(tmp_path / "run")
    report = json.loads((tmp_path / "run" / "data_report.json").read_text())["train"]
    assert report["samples"] == report["rows"] == 24
    alone, packed = records_of(tmp_path / "run", "eval")[0], records_of(finished, "eval")[0]
    assert alone["eval/loss"] == pytest.approx(packed["eval/loss"], abs=1e-5)


class NonFinite:
    """Makes the loss of one rank NaN in the given forward passes."""

    def __init__(self, calls, victim=0):
        self.calls, self.victim = calls, victim

    def __call__(self, objective, rank):
        count = 0

        def poisoned(model, batch):
            nonlocal count
            terms = objective(model, batch)
            if model.training:
                count += 1
                if rank == self.victim and count in self.calls:
                    terms["ce"] = terms["ce"] * math.nan
            return terms

        return poisoned


@pytest.mark.parametrize(("world_size", "dtype"), [(1, "float32"), (2, "bfloat16")])
def test_a_step_with_a_gradient_that_is_not_finite_changes_no_weight(tmp_path, rows, world_size, dtype):
    flags = {"data_path": str(rows), "dtype": dtype, "lr_schedule": "constant", "max_steps": 4, "keep_last": 9}
    first_call = 2 if world_size > 1 else 1  # the pass that primes DDP comes before the first step
    poison = NonFinite({first_call + 2}, victim=world_size - 1)  # step 3
    assert train(world_size, tmp_path / "run", wrap_objective=poison, **flags) == [0] * world_size
    weights = {
        step: [
            sha256(file)
            for file in sorted((tmp_path / "run" / "checkpoints" / f"step-0000000{step}").glob("model-*.safetensors"))
        ]
        for step in (1, 2, 3, 4)
    }
    assert weights[2] == weights[3] != weights[4] and weights[1] != weights[2]
    (event,) = [r for r in records_of(tmp_path / "run", "event") if r["event"] == "non_finite_gradient"]
    assert event["step"] == 3
    assert "step 3: gradient norm nan, weights left alone; samples of rank" in log_of(tmp_path / "run", world_size - 1)
    assert "rows.jsonl:" in log_of(tmp_path / "run", world_size - 1)
    losses = [r["train/loss"] for r in records_of(tmp_path / "run", "train")]
    assert losses[2] is None and None not in (losses[0], losses[1], losses[3])


def test_three_such_steps_in_a_row_end_the_run_with_the_last_checkpoint_kept(tmp_path, rows):
    poison = NonFinite({3, 4, 5})
    assert train(1, tmp_path / "run", wrap_objective=poison, data_path=str(rows)) == [70]
    state = json.loads((tmp_path / "run" / "state.json").read_text())
    assert state["status"] == "failed" and "not finite 3 times in a row" in state["exit_reason"]
    assert (tmp_path / "run" / "checkpoints" / "step-00000004").exists()
    assert train(1, tmp_path / "run", from_resume="1", data_path=str(rows)) == [0]


def test_a_loss_that_is_not_finite_is_no_overflow_of_fp16(tmp_path, rows):
    poison = NonFinite({3, 4, 5})
    assert train(1, tmp_path / "run", wrap_objective=poison, data_path=str(rows), dtype="float16") == [70]
    assert "not finite 3 times in a row" in log_of(tmp_path / "run")


def test_the_third_save_in_a_row_that_fails_ends_all_ranks_alike_and_the_old_checkpoints_stand(tmp_path, rows):
    flags = {"data_path": str(rows), "max_steps": 8}
    codes = train(2, tmp_path / "run", wrap_objective=SmallFiles(call=5), **flags)
    assert codes == [74, 74], log_of(tmp_path / "run")
    log = log_of(tmp_path / "run")
    assert all(f"the checkpoint of step {step} could not be saved, older ones stand" in log for step in (4, 5, 6))
    assert [r["step"] for r in records_of(tmp_path / "run", "train")] == [1, 2, 3, 4, 5, 6], "it goes on meanwhile"
    assert sorted(os.listdir(tmp_path / "run" / "checkpoints")) == ["step-00000001", "step-00000002", "step-00000003"]
    assert train(2, tmp_path / "run", from_resume="1", **flags) == [0, 0]


class SmallFiles:
    """No file may grow beyond 10 kB from the n-th forward pass on (the first one primes DDP), as on a full disk."""

    def __init__(self, call):
        self.call = call

    def __call__(self, objective, rank):
        calls = 0

        def limited(model, batch):
            nonlocal calls
            calls += 1
            if calls == self.call:
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
            return objective(model, batch)

        return limited


@pytest.mark.slow
def test_sigterm_saves_and_a_resume_ends_with_the_same_bits(tmp_path, rows):
    flags = {**TINY, "data_path": rows, "epochs": 20, "save_interval": "500", "cache_dir": tmp_path / "cache"}
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, "train_full_sft.py", *words]
    quiet = {"cwd": ROOT, "env": ENVIRONMENT, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    subprocess.run([*command, "--save_dir", str(tmp_path / "whole")], check=True, timeout=120, **quiet)

    process = subprocess.Popen([*command, "--save_dir", str(tmp_path / "cut")], **quiet)
    metrics, deadline = tmp_path / "cut" / "metrics.jsonl", time.monotonic() + 60
    while time.monotonic() < deadline and (not metrics.exists() or metrics.read_bytes().count(b"\n") < 20):
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 75
    state = json.loads((tmp_path / "cut" / "state.json").read_text())
    assert state["status"] == "stopped" and 10 <= state["step"] < state["total_steps"]
    subprocess.run([*command, "--save_dir", str(tmp_path / "cut"), "--from_resume"], check=True, timeout=120, **quiet)
    assert without_events(tmp_path / "cut") == without_events(tmp_path / "whole")


def test_wandb_follows_offline_under_one_id(tmp_path, rows):
    words = [
        w
        for name, value in {**TINY, "data_path": rows, "cache_dir": tmp_path / "cache"}.items()
        for w in (f"--{name}", str(value))
    ]
    command = [sys.executable, "train_full_sft.py", *words, "--save_dir", str(tmp_path / "run"), "--use_wandb"]
    quiet = {"cwd": ROOT, "env": ENVIRONMENT, "capture_output": True, "timeout": 120}
    assert subprocess.run(command, **quiet).returncode == 0
    (first,) = (tmp_path / "run" / "wandb").glob("offline-run-*")
    again = [*command, "--from_resume", "1", "--epochs", "3", "--allow_change", "schedule"]
    assert subprocess.run(again, **quiet).returncode == 0
    ids = {path.name.rsplit("-", 1)[1] for path in (tmp_path / "run" / "wandb").glob("offline-run-*")}
    assert ids == {first.name.rsplit("-", 1)[1]}


def test_a_run_may_go_on_with_less_data(tmp_path, rows):
    assert train(1, tmp_path / "run", data_path=str(rows), max_steps=8) == [0]
    few = write_rows(tmp_path / "few.jsonl", 3)
    flags = {"data_path": str(few), "from_resume": "1", "epochs": 2, "max_steps": 10}
    assert train(1, tmp_path / "run", **flags, allow_change="data,schedule") == [0], log_of(tmp_path / "run")
    assert records_of(tmp_path / "run", "train")[-1]["step"] == 10


def test_a_template_and_system_prompts_come_from_files(tmp_path, rows):
    template, prompts = tmp_path / "chat.jinja", tmp_path / "prompts.txt"
    template.write_text(
        "{% for m in messages %}<|im_start|>{{ m.role | upper }}: {{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>ASSISTANT: {% endif %}"
    )
    prompts.write_text("Be brief.\n")
    flags = {
        "data_path": str(rows), "max_steps": 1, "chat_template": str(template), "system_prompts": str(prompts),
        "system_prompt_ratio": 1.0,
    }  # fmt: skip
    assert train(1, tmp_path / "run", **flags, dry_run=True) == [0], log_of(tmp_path / "run")
    assert "<|im_start|>SYSTEM: Be brief.<|im_end|><|im_start|>USER: Say 0" in log_of(tmp_path / "run")
    assert train(1, tmp_path / "run", **flags) == [0], log_of(tmp_path / "run")
    assert (tmp_path / "run" / "final" / "chat_template.jinja").read_text() == template.read_text()
    assert train(1, tmp_path / "no", **{**flags, "chat_template": "none.jinja"}) == [2]
    assert "--chat_template none.jinja: neither a file nor one of chatml, llama3" in log_of(tmp_path / "no")


def test_paths_to_resume_from_are_checked_first(tmp_path, rows, finished):
    for path, said in ((finished, "the newest of that run is"), (tmp_path, "is no checkpoint")):
        assert train(1, finished, data_path=str(rows), from_resume=str(path)) == [2]
        assert f"--from_resume {path} is no checkpoint" in log_of(finished) and said in log_of(finished)


def test_samples_beyond_the_positions_of_a_model_are_refused(tmp_path, rows, finished):
    shutil.copytree(finished / "final", tmp_path / "short")
    config = json.loads((tmp_path / "short" / "config.json").read_text())
    (tmp_path / "short" / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 20}))
    shape = dict.fromkeys(("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"))
    flags = {"data_path": str(rows), "from_weight": str(tmp_path / "short"), **shape}
    assert train(1, tmp_path / "run", **flags) == [2]
    assert "the model knows 20 positions" in log_of(tmp_path / "run")


def test_a_mixture_of_experts_is_trained_exported_and_trained_on(tmp_path, rows):
    flags = {"data_path": str(rows), "val_data_path": str(rows), "max_steps": 3, "eval_samples": 2}
    assert train(1, tmp_path / "new", **flags, use_moe=True) == [0], log_of(tmp_path / "new")
    config = json.loads((tmp_path / "new" / "final" / "config.json").read_text())
    assert config["model_type"] == "qwen3_moe" and (config["num_experts"], config["moe_intermediate_size"]) == (8, 16)
    saved = yaml.safe_load((tmp_path / "new" / "config.yaml").read_text())
    assert (saved["num_experts"], saved["num_experts_per_tok"], saved["qk_norm"]) == (8, 2, True)
    first, *_ = records_of(tmp_path / "new", "train")
    assert first["train/weight_aux"] == 0.01 and first["train/loss_aux"] >= 1 and first["train/loss_router_z"] > 0
    (evaluated, *_) = records_of(tmp_path / "new", "eval")
    assert 1 / 8 <= evaluated["eval/max_expert_share"] <= 1 / 2

    again = {**flags, "from_weight": str(tmp_path / "new"), "loss_weights": "aux=0.5, router_z=1e-3"}
    again |= {"eval_at_start": True, "eval_samples": 0}
    assert train(1, tmp_path / "more", **again, use_moe=True) == [0], log_of(tmp_path / "more")
    assert records_of(tmp_path / "more", "train")[0]["train/weight_aux"] == 0.5
    assert train(2, tmp_path / "shared", **again, strategy="fsdp") == [0, 0], log_of(tmp_path / "shared")
    starts = [records_of(tmp_path / run, "eval")[0] for run in ("more", "shared")]
    for name in ("eval/loss", "eval/loss_aux", "eval/loss_router_z"):
        assert starts[0][name] == pytest.approx(starts[1][name], rel=1e-5) == pytest.approx(evaluated[name], rel=1e-5)
    assert train(1, tmp_path / "other", **again, num_experts=4) == [2]
    assert "--num_experts 4: " in log_of(tmp_path / "other") and "has 8" in log_of(tmp_path / "other")
    assert train(1, tmp_path / "dense", **flags, loss_weights="aux=0.5") == [2]
    assert "--loss_weights aux: the terms are ce, z; aux needs experts" in log_of(tmp_path / "dense")


def test_a_rehearsal_shows_everything_and_writes_nothing(tmp_path, rows):
    assert train(1, tmp_path / "run", data_path=str(rows), dry_run=True) == [0]
    log = log_of(tmp_path / "run")
    assert (
        "<|im_start|>user" in log
        and "\x1b[32m" in log
        and "steps in all (of 1 rows" in log
        and "Nothing was saved" in log
    )
    assert not (tmp_path / "run").exists()
