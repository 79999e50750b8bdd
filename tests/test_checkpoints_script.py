"""The program that looks after checkpoints, on runs of one process and of two that share a model."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from model.build import OWN_TOKENIZER
from scripts.checkpoints import main
from tests.small_world import log_of, resume_from, sha256, sign_again, train
from tests.tiny_model import foreign


@pytest.fixture(scope="module")
def finished(tmp_path_factory, rows):
    """Eight steps of one process, of which the last four checkpoints are kept."""
    run = tmp_path_factory.mktemp("finished") / "run"
    flags = {"data_path": str(rows), "val_data_path": str(rows), "eval_interval": "3", "keep_last": 4, "max_steps": 8}
    assert train(1, run, **flags) == [0], log_of(run)
    return run


@pytest.fixture
def run(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


def files_of(directory):
    return {path.name: sha256(path) for path in directory.iterdir()}


def damage(checkpoint):
    file = checkpoint / "model-00001-of-00001.safetensors"
    content = bytearray(file.read_bytes())
    content[-7] ^= 1
    file.write_bytes(content)


def steps_of(run):
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def test_the_list_has_every_version_with_its_size_ranks_metrics_and_reason(run, capsys):
    os.rename(run / "checkpoints" / "step-00000005", run / "checkpoints" / "aside-step-00000005")
    (run / "checkpoints" / "step-00000007" / "manifest.json").write_text("{")
    assert main(["list", str(run)]) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split() == ["version", "written", "size", "ranks", "kept", "as", "metrics"]
    assert [line.split()[0] for line in lines] == [
        "step-00000006", "step-00000007", "step-00000008", "aside-step-00000005",
    ]  # fmt: skip
    size = (
        sum(file.stat().st_size for file in (run / "checkpoints" / "step-00000006").glob("[mot]*[a-z]"))
        - (run / "checkpoints" / "step-00000006" / "manifest.json").stat().st_size
    )
    assert f"{size / 1e6:.1f} MB" in lines[0] and " 1 " in lines[0] and "last" in lines[0] and "eval/loss" in lines[0]
    assert "unreadable" in lines[1] and "manifest.json" in lines[1]
    assert "set aside" in lines[3] and "eval/loss" not in lines[3]


def test_good_files_are_told_from_damaged_ones(run, capsys):
    assert main(["verify", str(run)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(", ")[0] for line in lines] == [f"step-0000000{step}  good" for step in (5, 6, 7, 8)]
    damage(run / "checkpoints" / "step-00000007")
    assert main(["verify", str(run / "checkpoints")]) == 74
    lines = capsys.readouterr().out.splitlines()
    assert "step-00000007  DAMAGED" in lines[2] and "model-00001-of-00001.safetensors: content differs" in lines[2]
    assert [" good" in line for line in lines] == [True, True, False, True]
    assert main(["verify", str(run), "--step", "8"]) == 0
    assert main(["verify", str(run / "checkpoints" / "step-00000007")]) == 74


def test_a_manifest_that_points_outside_is_refused_for_security(run, capsys):
    manifest = run / "checkpoints" / "step-00000008" / "manifest.json"
    content = json.loads(manifest.read_text())
    content["files"][0]["name"] = "../step-00000007/trainer_state.json"
    manifest.write_text(json.dumps(content))
    assert main(["verify", str(run)]) == 77
    assert main(["export", str(manifest.parent)]) == 77
    assert "forbidden name" in capsys.readouterr().err


def test_the_export_of_the_last_version_is_the_final_one_and_of_an_older_one_its_own(run, capsys):
    assert main(["export", str(run)]) == 0
    assert files_of(run / "export-step-00000008") == files_of(run / "final")
    assert main(["export", str(run), "--step", "6", "--out", str(run / "older"), "--dtype", "bfloat16"]) == 0
    weights = load_file(run / "older" / "model.safetensors")
    saved = load_file(run / "checkpoints" / "step-00000006" / "model-00001-of-00001.safetensors")
    assert weights.keys() == saved.keys()
    assert all(torch.equal(weights[name], saved[name].bfloat16()) for name in saved)
    assert main(["export", str(run / "checkpoints" / "step-00000007")]) == 0
    assert (run / "export-step-00000007" / "config.json").is_file()
    capsys.readouterr()
    assert main(["export", str(run), "--out", str(run)]) == 2
    assert "exists already" in capsys.readouterr().err and (run / "final").exists()


def test_a_damaged_version_is_passed_over_or_refused_when_it_is_named(run, capsys):
    damage(run / "checkpoints" / "step-00000008")
    assert main(["export", str(run), "--step", "8"]) == 74
    assert "content differs" in capsys.readouterr().err and not (run / "export-step-00000008").exists()
    assert main(["export", str(run)]) == 0
    said = capsys.readouterr()
    assert "step 8 is damaged" in said.err and "step 7" in said.out and (run / "export-step-00000007").exists()


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("Mistral", {"tie_word_embeddings": True}),
        ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
        ("Qwen3Moe", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}),
        (None, {}),
    ],
)
def test_shards_of_two_processes_become_one_model(tmp_path, rows, family, changes):
    flags = {"data_path": str(rows), "strategy": "fsdp", "max_steps": 3, "keep_last": 2}
    if family:
        foreign(tmp_path / "base", family, vocab_size=6400, **changes)
        shape = dict.fromkeys(("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"))
        flags |= {"from_weight": str(tmp_path / "base"), "tokenizer": str(OWN_TOKENIZER), "dropout": 0.0}
        flags |= shape
    run = tmp_path / "run"
    assert train(2, run, **flags) == [0, 0], log_of(run)
    assert main(["export", str(run)]) == 0
    assert files_of(run / "export-step-00000003") == files_of(run / "final")


def test_the_last_and_the_best_survive_pruning_and_only_yes_deletes(run, capsys):
    checkpoints = run / "checkpoints"
    os.rename(checkpoints / "step-00000005", checkpoints / "aside-step-00000005")
    command = ["prune", str(run), "--keep_last", "1"]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert said.count("would delete") == 2 and "--yes" in said and len(steps_of(run)) == 4
    # after step 6 the loss is larger than after step 8
    assert main([*command, "--keep_best", "1", "--mode", "max", "--yes"]) == 0
    assert steps_of(run) == ["aside-step-00000005", "step-00000006", "step-00000008"]
    assert main([*command, "--aside", "--yes"]) == 0
    assert steps_of(run) == ["step-00000008"]
    assert main([*command, "--yes"]) == 0
    assert capsys.readouterr().out.endswith("kept: step-00000008\n")


def test_the_last_good_version_is_never_pruned(run, capsys):
    for step in (7, 8):
        damage(run / "checkpoints" / f"step-0000000{step}")
    assert main(["prune", str(run), "--keep_last", "1", "--yes"]) == 0
    assert steps_of(run) == ["step-00000006", "step-00000008"]
    assert "step 8 is damaged" in capsys.readouterr().err
    damage(run / "checkpoints" / "step-00000006")
    assert main(["prune", str(run), "--keep_last", "1", "--yes"]) == 74
    assert len(steps_of(run)) == 2


def test_nothing_is_pruned_while_a_trainer_has_the_run(run):
    code = "import sys, time; from pathlib import Path; from training.control.lock import lock_run\n"
    code += "held = lock_run(Path(sys.argv[1])); print('held', flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code, str(run)], stdout=subprocess.PIPE, text=True) as trainer:
        assert trainer.stdout.readline() == "held\n"
        words = [sys.executable, "-m", "scripts.checkpoints", "prune", str(run), "--keep_last", "1", "--yes"]
        refused = subprocess.run(words, capture_output=True, text=True, timeout=60)
        assert refused.returncode == 2
        assert f"being trained by process {trainer.pid} on {os.uname().nodename}" in refused.stderr
        assert len(steps_of(run)) == 4
        trainer.kill()
    assert subprocess.run(words, timeout=60).returncode == 0
    assert steps_of(run) == ["step-00000008"]


def test_errors_say_what_to_name(run, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    wrong = {
        ("list", str(tmp_path / "empty")): "holds no checkpoint: name a run",
        ("verify", str(run), "--step", "3"): "--step 3: not in",
        ("prune", str(run / "checkpoints" / "step-00000008")): "is one checkpoint",
        ("export", str(run), "--tokenizer", str(tmp_path)): "no tokenizer in",
    }
    for words, message in wrong.items():
        assert main([*words]) == 2
        assert message in capsys.readouterr().err


def test_a_checkpoint_that_does_not_fit_its_model_is_not_exported(run, capsys):
    state = run / "checkpoints" / "step-00000008" / "trainer_state.json"
    content = json.loads(state.read_text())
    content["config"]["num_hidden_layers"] = 1
    state.write_text(json.dumps(content))
    sign_again(state.parent)
    assert main(["export", str(run)]) == 2
    assert "model.layers.1." in capsys.readouterr().err


def test_a_pruned_run_goes_on(run, finished, rows):
    copy = resume_from(finished, 7, run.parent / "copy")
    assert main(["prune", str(copy), "--keep_last", "1", "--yes"]) == 0
    flags = {"data_path": str(rows), "val_data_path": str(rows), "eval_interval": "3", "keep_last": 4, "max_steps": 8}
    assert train(1, copy, from_resume="1", **flags) == [0], log_of(copy)
    assert files_of(copy / "final") == files_of(finished / "final")
