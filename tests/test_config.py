"""The configuration: one definition for command line, YAML and the saved file; every problem in one message."""

import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from training.arguments import parse_config, read_yaml
from training.config import ALLOWED_CHANGES, Config, ConfigError, make_config

ROOT = Path(__file__).resolve().parent.parent


def problems_of(*words):
    with pytest.raises(ConfigError) as caught:
        parse_config(["--data_path", "x.jsonl", *words])
    return caught.value.problems


def test_all_problems_are_reported_at_once():
    problems = problems_of(
        "--batch_size", "many", "--dtype", "fp8", "--epochs", "0", "--learning_rat", "1", "--grad_clip=nan"
    )
    assert problems == [
        "unknown flag --learning_rat (did you mean --learning_rate?)",
        "--batch_size many: not a whole number",
        "--epochs 0: must be at least 1",
        "--grad_clip nan: not a finite number",
        "--dtype fp8: not one of auto, float32, bfloat16, float16",
    ]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--save_interval", "0"], "--save_interval 0: write N (steps) or Nepoch, N a whole number from 1"),
        (["--save_interval", "2epochs"], "--save_interval 2epochs: write N (steps) or Nepoch, N a whole number from 1"),
        (["--learning_rate", "0"], "--learning_rate 0.0: must be greater than 0"),
        (["--use_wandb", "maybe"], "--use_wandb maybe: not 0 or 1"),
        (["--prompt_field", "q"], "--prompt_field and --response_field belong together: give both or none"),
        (["--warmup_steps=5", "--warmup_ratio=.1"], "--warmup_steps and --warmup_ratio are both given: choose one"),
        (["--allow_change", "seed,weather"], "--allow_change weather: not one of " + ", ".join(ALLOWED_CHANGES)),
        (["stray"], "unexpected word 'stray'"),
        (["--config", "missing.yaml"], "--config missing.yaml: No such file or directory"),
    ],
)  # fmt: skip
def test_a_wrong_value_names_flag_value_and_what_is_allowed(words, message):
    assert problems_of(*words) == [message]


def test_flags_of_zero_and_one_also_work_bare():
    config, _ = parse_config(["--data_path", "x", "--from_resume", "--use_wandb", "--pin_memory", "0"])
    assert (config.from_resume, config.use_wandb, config.pin_memory) == ("1", True, False)
    assert parse_config(["--data_path", "x", "--from_resume", "runs/a/checkpoints/step-00000003"])[
        0
    ].from_resume.endswith("3")


def test_the_command_line_wins_over_the_file(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(
        "batch_size: 4\nlearning_rate: 1.0e-4\ndeterministic: true\nval_data_path: null\nsave_interval: 3\n"
    )
    config, _ = parse_config(["--config", str(file), "--batch_size", "8"])
    assert (config.batch_size, config.learning_rate, config.deterministic, config.save_interval) == (8, 1e-4, True, "3")


def test_a_saved_configuration_reads_back_equal(tmp_path):
    config = make_config({"data_path": "a b: c.jsonl", "learning_rate": "3e-5", "max_steps": "7", "from_resume": "1"})
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    assert parse_config(["--config", str(tmp_path / "config.yaml")])[0] == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a", "expected 'flag: value' lines, found list"),
        ("a: [", "not valid YAML"),
        ("seed: 1\nseed: 2", "given twice"),
    ],
)
def test_a_file_that_is_no_mapping_is_refused(tmp_path, text, message):
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_yaml(str(file))


def test_without_arguments_the_demo_is_trained():
    config, _ = parse_config([])
    assert config.data_path == "demo"


def test_every_flag_has_help_with_a_group():
    assert all(f.metadata["help"] and f.metadata["group"] for f in fields(Config))


@pytest.mark.parametrize("words", [["--help"], ["--batch_size", "x"], ["--print_config", "--batch_size", "3"]])
def test_help_and_wrong_flags_are_answered_before_torch_is_imported(words):
    code = (
        "import sys, runpy\n"
        "sys.argv = ['train_full_sft.py', *sys.argv[1:]]\n"
        "try: runpy.run_path('train_full_sft.py', run_name='__main__')\n"
        "finally: print('torch' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, *words], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "False", done.stderr
    assert done.returncode == (2 if words[0] == "--batch_size" else 0)


def test_the_command_line_replaces_what_the_file_says_otherwise(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("data_path: x.jsonl\nwarmup_ratio: 0.1\nmax_steps: 9\nval_fraction: 0.2\n")
    config, _ = parse_config(["--config", str(path), "--warmup_steps", "5", "--epochs", "3", "--val_data_path", "y"])
    assert (config.warmup_ratio, config.max_steps, config.val_fraction) == (0.0, None, 0.0)
    assert parse_config(["--config", str(path)])[0].max_steps == 9


def test_a_list_of_names_may_hold_no_comma(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("data_path: [a.jsonl, b.jsonl]\n")
    assert parse_config(["--config", str(path)])[0].data_path == "a.jsonl,b.jsonl"
    path.write_text("data_path: ['a,b.jsonl']\n")
    with pytest.raises(ConfigError, match="the comma in 'a,b.jsonl' separates names"):
        parse_config(["--config", str(path)])
