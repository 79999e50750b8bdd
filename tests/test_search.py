"""scripts.search and scripts.plot_schedule as their users start them."""

import json
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from matplotlib.image import imread

from scripts.search import main, read_space, suggest
from tests.small_world import TINY
from training.config.flags import ConfigError


def words_of(tmp_path, rows, **more):
    flags = {
        **TINY, "data_path": rows, "val_data_path": rows, "cache_dir": tmp_path / "cache", "eval_interval": "4",
        "max_steps": 12, "keep_last": 3, **more,
    }  # fmt: skip
    return [f"--{name}={value}" for name, value in flags.items() if name not in ("save_interval",)]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("learning_rat: {low: 0.1, high: 0.2}", "did you mean --learning_rate"),
        ("learning_rate: 0.1", "learning_rate needs low and high"),
        ("learning_rate: {low: 0.1}", "learning_rate needs low and high"),
        ("learning_rate: {low: 1e-5, high: 0.2}", "low and high must be numbers"),
        ("learning_rate: {low: 0.3, high: 0.2}", "low is above high"),
        ("batch_size: {low: 2, high: 4, step: 0}", "step must be a number greater than 0"),
        ("batch_size: {low: 2, high: 4, step: 2, log: true}", "goes without step"),
        ("learning_rate: {low: 0.0, high: 0.2, log: true}", "with log, low must be greater than 0"),
        ("amsgrad: {low: 0, high: 1}", "amsgrad is no number: give it choices"),
        ("save_dir: {choices: [a, b]}", "save_dir is set by the search itself"),
        ("lr_schedule: {choices: []}", "choices must be a list"),
        ("[1, 2]", "expected"),
        ("", "expected"),
    ],
)
def test_a_space_that_cannot_be_is_refused(tmp_path, text, said):
    (tmp_path / "space.yaml").write_text(text)
    with pytest.raises(ConfigError, match=said):
        read_space(str(tmp_path / "space.yaml"))


def test_a_space_beside_flags_that_say_the_same_is_refused(tmp_path, capsys):
    space = tmp_path / "space.yaml"
    space.write_text("warmup_ratio: {low: 0.0, high: 0.1}\nepochs: {low: 1, high: 3}")
    words = ["--space", str(space), "--study_dir", str(tmp_path / "study"), "--data_path", "demo"]
    assert main([*words, "--warmup_steps", "2", "--max_steps", "4"]) == 2
    said = capsys.readouterr().err
    assert "warmup_ratio and --warmup_steps" in said and "epochs and --max_steps" in said
    assert main([*words, "--save_dir", "elsewhere"]) == 2
    assert "--save_dir: a search sets this itself" in capsys.readouterr().err


def test_values_are_drawn_as_the_space_says(tmp_path):
    text = "learning_rate: {low: 0.1, high: 0.2, log: true}\n"
    text += "batch_size: {low: 2, high: 8, step: 2}\noptimizer: {choices: [sgd]}"
    (tmp_path / "space.yaml").write_text(text)
    asked = {}
    trial = SimpleNamespace(
        suggest_float=lambda name, low, high, **more: asked.setdefault(name, (low, high, more)),
        suggest_int=lambda name, low, high, **more: asked.setdefault(name, (low, high, more)),
        suggest_categorical=lambda name, choices: asked.setdefault(name, choices),
    )
    suggest(trial, read_space(str(tmp_path / "space.yaml")))
    assert asked == {
        "learning_rate": (0.1, 0.2, {"log": True}), "batch_size": (2, 8, {"step": 2}), "optimizer": ["sgd"]
    }  # fmt: skip


def test_a_search_finds_the_better_rate_goes_on_where_it_stopped_and_shows_all(tmp_path, rows, capsys):
    (tmp_path / "space.yaml").write_text("learning_rate: {choices: [1.0e-7, 1.0e-2]}")
    study = tmp_path / "study"
    command = ["--space", str(tmp_path / "space.yaml"), "--study_dir", str(study), *words_of(tmp_path, rows)]
    assert main([*command, "--trials", "2"]) == 0
    assert main([*command, "--trials", "3"]) == 0
    said = capsys.readouterr().out
    assert "trial 2:" in said and "trial 3:" not in said
    lines = (study / "results.md").read_text().splitlines()
    assert lines[0] == "| trial | eval/loss | learning_rate |" and len(lines) == 5
    values = [float(line.split("|")[2]) for line in lines[2:] if "early" not in line]
    assert values == sorted(values)
    rates = {line.split("|")[3].strip() for line in lines[2:]}
    assert rates <= {"1e-07", "0.01"} and (len(rates) == 1 or lines[2].split("|")[3].strip() == "0.01")
    assert imread(study / "results.png").std() > 0
    assert main([*command, "--trials", "3", "--seed=8"]) == 2
    assert "holds a search with other flags" in capsys.readouterr().err


def test_a_killed_search_takes_its_trial_with_it_and_tries_its_values_again(tmp_path, rows):
    (tmp_path / "space.yaml").write_text("learning_rate: {choices: [1.0e-2]}")
    command = [
        sys.executable, "-m", "scripts.search", "--space", str(tmp_path / "space.yaml"), "--trials", "1",
        "--study_dir", str(tmp_path / "study"),
    ]  # fmt: skip
    command += words_of(tmp_path, rows, max_steps=60, eval_interval="30")
    search = subprocess.Popen(command)
    state = tmp_path / "study" / "trial-0000" / "state.json"
    assert comes_to_be("running", state, 60)
    search.kill()
    search.wait()
    assert comes_to_be("stopped", state, 30)
    again = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert again.returncode == 0, again.stderr
    assert "trial 0 was cut off, its values are tried again" in again.stdout and "trial 1: eval/loss" in again.stdout


def comes_to_be(status, state, seconds):
    deadline = time.monotonic() + seconds
    while not (state.exists() and json.loads(state.read_text())["status"] == status):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def test_trials_that_all_fail_end_the_search_with_the_reason(tmp_path, rows, capsys, monkeypatch):
    monkeypatch.setattr("scripts.search.MAX_FAILURES", 2)
    (tmp_path / "space.yaml").write_text("learning_rate: {low: 0.001, high: 0.002}")
    command = ["--space", str(tmp_path / "space.yaml"), "--study_dir", str(tmp_path / "study")]
    (tmp_path / "study" / "trial-0000").mkdir(parents=True)
    bad = words_of(tmp_path, rows, data_path=str(tmp_path / "nothing.jsonl"))
    assert main([*command, *bad]) == 70
    said = capsys.readouterr().err
    assert "nothing.jsonl" in said and "2 trials in a row have failed" in said


def test_the_schedule_is_drawn_before_the_run(tmp_path, rows):
    table = [{"name": "one", "loss_weights": "z=linear(0, 1, 0, 1)"}, {"name": "two", "lr_schedule": "wsd"}]
    words = words_of(tmp_path, rows, stages=json.dumps(table), save_dir=tmp_path / "run")
    words = [word for word in words if not word.startswith(("--max_steps", "--epochs"))]
    command = [
        sys.executable,
        "-m",
        "scripts.plot_schedule",
        "--out",
        str(tmp_path / "out.png"),
        "--processes",
        "2",
        *words,
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "stage one: steps 1 to" in done.stdout and imread(tmp_path / "out.png").std() > 0
    assert not (tmp_path / "run").exists()
