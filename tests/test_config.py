"""The configuration: one definition for command line, YAML and the saved file; every problem in one message."""

import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from training.config.command_line import parse_config, read_yaml
from training.config.config import ALLOWED_CHANGES, Config, compute_dtype, field_types, make_config
from training.config.flags import ConfigError

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
        (["--num_experts_per_tok", "2"], "--num_experts_per_tok needs --num_experts or --use_moe 1"),
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


# ---------------------------------------------------------------------------------------------------------------------
# Files that build on others


def files(place, **texts):
    """Files of these names (a double underscore is a directory) and texts; the path of the first."""
    for name, text in texts.items():
        path = place / f"{name.replace('__', '/')}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return str(place / f"{next(iter(texts)).replace('__', '/')}.yaml")


def test_a_file_builds_on_its_base_and_that_on_another(tmp_path):
    path = files(
        tmp_path,
        runs__mine="base: ../small.yaml\nbatch_size: 2\n",
        small="base: defaults/all.yaml\nbatch_size: 8\nhidden_size: 64\n",
        defaults__all="data_path: x.jsonl\nhidden_size: 128\nlearning_rate: 1e-4\nseed: 3\n",
    )
    config, _ = parse_config(["--config", path, "--seed", "4"])
    assert (config.batch_size, config.hidden_size, config.learning_rate, config.seed) == (2, 64, 1e-4, 4)
    assert config.data_path == "x.jsonl"


def test_a_path_is_relative_to_the_file_that_names_it_wherever_the_process_is(tmp_path, monkeypatch):
    path = files(tmp_path, a__b__run="base: ../base.yaml\ndata_path: x\n", a__base="batch_size: 5\n")
    monkeypatch.chdir(tmp_path / "a")
    assert parse_config(["--config", "b/run.yaml"])[0].batch_size == 5
    monkeypatch.chdir("/")
    assert parse_config(["--config", path])[0].batch_size == 5
    files(tmp_path, run=f"base: {tmp_path}/a/base.yaml\ndata_path: x\n")
    assert parse_config(["--config", str(tmp_path / "run.yaml")])[0].batch_size == 5, "an absolute path"


@pytest.mark.parametrize(
    ("base", "child", "expected"),
    [
        ("warmup_steps: 5", "warmup_ratio: 0.1", {"warmup_steps": 0, "warmup_ratio": 0.1}),
        ("warmup_ratio: 0.1", "warmup_steps: 5", {"warmup_steps": 5, "warmup_ratio": 0.0}),
        ("max_steps: 9", "epochs: 3", {"max_steps": None, "epochs": 3}),
        ("val_fraction: 0.1", "val_data_path: y", {"val_fraction": 0.0, "val_data_path": "y"}),
        ("accumulation_steps: 4", "global_batch_size: 32", {"accumulation_steps": 1, "global_batch_size": 32}),
        ("warmup_steps: 5", "learning_rate: 1e-4", {"warmup_steps": 5, "warmup_ratio": 0.0}),
        ("stages: [{name: a}]", "stages: null", {"stages": None}),
    ],
)
def test_what_a_file_says_replaces_also_what_its_base_says_otherwise(tmp_path, base, child, expected):
    path = files(tmp_path, run=f"base: base.yaml\ndata_path: x\n{child}\n", base=f"{base}\n")
    config, _ = parse_config(["--config", path])
    assert {name: getattr(config, name) for name in expected} == expected


def test_the_command_line_wins_over_what_a_base_says_otherwise(tmp_path):
    path = files(tmp_path, run="base: base.yaml\n", base="data_path: x\nwarmup_steps: 5\nbatch_size: 3\n")
    config, _ = parse_config(["--config", path, "--warmup_ratio", "0.2", "--batch_size", "4"])
    assert (config.warmup_steps, config.warmup_ratio, config.batch_size) == (0, 0.2, 4)


def config_problems(*words):
    with pytest.raises(ConfigError) as caught:
        parse_config([*words])
    return caught.value.problems


def test_files_that_build_on_each_other_are_named(tmp_path):
    path = files(tmp_path, a="base: b.yaml\n", b="base: sub/c.yaml\n", sub__c="base: ../a.yaml\n")
    (problem,) = config_problems("--config", path)
    assert problem.endswith("base files that build on each other: a.yaml -> b.yaml -> c.yaml -> a.yaml")
    own = files(tmp_path, own="base: own.yaml\n")
    assert config_problems("--config", own)[0].endswith("build on each other: own.yaml -> own.yaml")


def test_two_files_may_build_on_the_same_third(tmp_path):
    path = files(tmp_path, a="base: b.yaml\ndata_path: x\n", b="base: c.yaml\n", c="seed: 5\n", other="base: c.yaml\n")
    assert parse_config(["--config", path])[0].seed == 5


def test_a_base_that_is_missing_or_wrong_is_named_with_the_file_that_wants_it(tmp_path):
    path = files(tmp_path, run="base: nowhere/base.yaml\n")
    assert config_problems("--config", path) == [
        f"--config {tmp_path}/nowhere/base.yaml (base of run.yaml): No such file or directory"
    ]
    assert config_problems("--config", files(tmp_path, run="base: [a.yaml, b.yaml]\n")) == [
        f"--config {path}: base ['a.yaml', 'b.yaml'] is not the name of a file"
    ]
    files(tmp_path, base="- a\n")
    assert config_problems("--config", files(tmp_path, run="base: base.yaml\n")) == [
        f"--config {tmp_path}/base.yaml: expected 'flag: value' lines, found list"
    ]
    assert parse_config(["--config", files(tmp_path, run="base: null\ndata_path: x\n")])[0].data_path == "x"


def test_an_unknown_name_anywhere_in_the_chain_gets_the_nearest_known_one(tmp_path):
    path = files(tmp_path, run="base: base.yaml\nlearning_rat: 1\ndata_path: x\n", base="warmup_stesp: 3\nxyzzy: 1\n")
    assert sorted(config_problems("--config", path, "--bathc_size", "3")) == [
        "unknown flag --bathc_size (did you mean --batch_size?)",
        "unknown flag --learning_rat (did you mean --learning_rate?)",
        "unknown flag --warmup_stesp (did you mean --warmup_steps?)",
        "unknown flag --xyzzy",
    ]


def other_value(f):
    """A value that a field does not have by itself."""
    plain, _ = field_types()[f.name]
    if f.metadata["choices"]:
        return next(choice for choice in f.metadata["choices"] if choice != f.default)
    if plain is bool:
        return not f.default
    if plain is str:
        special = {
            "stages": '[{"name": "é: [1]", "batch_size": 3}]', "loss_weights": "z=linear(0, 1e-4, 0, 2)",
            "lr_milestones": "3,4epoch", "allow_change": "seed,data", "lr_schedule": "step",
        }  # fmt: skip
        return special.get(f.name, "7epoch" if f.metadata["interval"] else "a b: 'c' # é.jsonl")
    low = f.metadata["minimum"] or f.metadata["above"] or 0
    values = (low + 3, low + 0.25) if plain is float else (low + 3, low + 4)
    top = f.metadata["maximum"]
    return plain(next(v for v in values if v != f.default and (top is None or v <= top)))


def test_a_saved_configuration_with_other_values_everywhere_reads_back_equal(tmp_path):
    alternatives = {"warmup_ratio", "val_fraction", "stages"}  # each excludes another flag
    apart = {"overwrite", "init", "optimizer", "system_field", "cpu_offload", "shard_size", "strategy", "data_format"}
    apart |= {"gradient_penalty", "trust_remote_code", "param_dtype"}
    values = {f.name: other_value(f) for f in fields(Config) if f.name not in alternatives | apart}
    values["template_date"] = "2026-01-30"
    config = make_config(values)
    assert all(getattr(config, f.name) != f.default for f in fields(Config) if f.name in values)
    saved = tmp_path / "config.yaml"
    saved.write_text(config.to_yaml())
    assert parse_config(["--config", str(saved)])[0] == config
    again, _ = parse_config(["--config", files(tmp_path, run="base: config.yaml\nwarmup_ratio: 0.5\n")])
    assert (again.warmup_steps, again.warmup_ratio, again.batch_size) == (0, 0.5, config.batch_size)


def test_one_flag_makes_a_mixture_of_experts():
    assert make_config({"use_moe": "1"}).shape == {"num_experts": 8}
    assert make_config({"use_moe": "1", "num_experts": 4, "qk_norm": "1"}).shape == {"num_experts": 4, "qk_norm": True}
    assert make_config({"qk_norm": "0"}).shape == {"qk_norm": False} and Config().shape == {}


def test_a_configuration_that_was_never_touched_reads_back_equal(tmp_path):
    (tmp_path / "config.yaml").write_text(Config().to_yaml())
    assert parse_config(["--config", str(tmp_path / "config.yaml")])[0] == Config()


def test_auto_means_the_same_dtype_everywhere():
    """Of the run, of its teacher, and of what the checks before the start reckon with."""
    assert compute_dtype("auto", "float32", on_gpu=False) == "float32"
    assert compute_dtype("auto", "float32", on_gpu=True) == compute_dtype("auto", "bfloat16", False) == "bfloat16"
    assert compute_dtype("float16", "float32", True) == "float16"
