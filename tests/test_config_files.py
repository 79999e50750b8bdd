"""The ready-made files in configs/: every one is read, and the tables in them say what they are meant to say."""

import dataclasses
from dataclasses import replace
from pathlib import Path

import pytest

from training.config import Config
from training.config.command_line import parse_config
from training.config.stages import Stage, read_stages
from training.schedule.plan import Plan, make_plan
from training.schedule.train_state import LoopState

ROOT = Path(__file__).resolve().parent.parent
RUNS, TABLES = sorted(ROOT.glob("configs/*.yaml")), sorted(ROOT.glob("configs/stages/*.yaml"))


def config_of(name: str, *words: str) -> Config:
    return parse_config(["--config", str(ROOT / "configs" / name), *words])[0]


def plan_of(stages: list[Stage], rows_per_epoch: int = 288) -> Plan:
    """The plan of a run whose mini-epochs have so many rows."""
    window_rows = [stage.config.global_batch_size or 16 for stage in stages]
    return make_plan(stages, lambda epoch: rows_per_epoch, window_rows, LoopState())


@pytest.fixture(autouse=True)
def in_the_directory_of_the_project(monkeypatch):
    """Where the tables that a file names are found."""
    monkeypatch.chdir(ROOT)


def test_the_files_are_there():
    assert [path.name for path in RUNS] == [
        "adaptive.yaml", "demo.yaml", "distillation.yaml", "gsm8k.yaml", "llama_8b_fsdp_8gpus.yaml",
        "lora.yaml", "qwen3_0.6b_one_gpu.yaml", "staged.yaml",
    ]  # fmt: skip
    assert [path.name for path in TABLES] == ["curriculum.yaml", "document.yaml", "gsm8k.yaml"]


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.name)
def test_a_file_is_read_from_the_command_line_and_has_a_plan(path):
    config, _ = parse_config(["--config", str(path)])
    assert config.save_dir.startswith("runs/") and config.save_dir != Config().save_dir
    plan = plan_of(read_stages(config))
    assert 0.0 <= plan.lr(plan.total_steps) <= max(plan.lr(step) for step in range(1, plan.total_steps + 1, 7)) <= 2e-3
    assert path.read_text().startswith("# "), "a file says what it is for"


def test_no_two_files_write_into_the_same_directory():
    assert len({config_of(path.name).save_dir for path in RUNS}) == len(RUNS)


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.name)
def test_a_table_goes_with_any_run(path):
    config, _ = parse_config(["--data_path", "x.jsonl", "--stages", str(path)])
    assert all(stage.epochs >= 1 for stage in read_stages(config))


# ---------------------------------------------------------------------------------------------------------------------
# The staged run

RATES = [1e-4, 3e-5, 1e-5, 3e-6, 1e-6]
WEIGHTS = [(1, 0.02), (2, 0.005), (4, 0.002), (8, 0.001), (16, 0.001)]


def test_the_staged_run_has_five_stages_of_forty_times_ten_mini_epochs():
    stages = read_stages(config_of("staged.yaml"))
    assert [stage.epochs for stage in stages] == [400] * 5
    assert [stage.config.learning_rate for stage in stages] == RATES
    for stage in stages:
        config = stage.config
        assert (config.lr_schedule, config.files_per_epoch, config.file_fraction) == ("mini_epoch", 6, 0.2)
        assert config.val_fraction and config.eval_interval == "1epoch", "validation after every mini-epoch"


def test_learning_rates_and_weights_hold_at_every_boundary_of_a_stage():
    stages = read_stages(config_of("staged.yaml"))
    plan = plan_of(stages)
    assert (len(plan.spans), plan.epochs) == (5, 2000)
    for span, rate, (ce, z) in zip(plan.spans, RATES, WEIGHTS, strict=True):
        first, last, per_epoch = span.steps_before + 1, span.steps_before + span.length, span.epoch_ends[0]
        assert plan.lr(first) == pytest.approx(0.1 * rate, rel=1e-12), "the first mini-epoch"
        assert plan.lr(first + per_epoch - 1) == plan.lr(first)
        assert plan.lr(first + 9 * per_epoch) == plan.lr(last) == rate, "the tenth and the last"
        assert plan.loss_weights(first) == plan.loss_weights(last) == {"ce": ce, "z": z}
    assert last == plan.total_steps
    switches = [span.steps_before for span in plan.spans[1:]]
    assert [plan.loss_weights(step)["ce"] for step in switches] == [1, 2, 4, 8]
    assert [plan.loss_weights(step + 1)["ce"] for step in switches] == [2, 4, 8, 16]


def test_in_a_longer_repeat_the_rate_falls_by_a_twentieth_from_the_eleventh_mini_epoch_on():
    stages = read_stages(config_of("staged.yaml"))
    plan = plan_of([replace(stage, repeats=20, mini_epochs=20) for stage in stages])
    span = plan.spans[1]
    rates = [plan.lr(span.steps_before + end) for end in span.epoch_ends]
    assert rates[9:13] == pytest.approx([3e-5, 3e-5 * 0.95, 3e-5 * 0.95**2, 3e-5 * 0.95**3], rel=1e-12)


def test_the_small_staged_run_goes_from_short_problems_to_all():
    config = config_of("gsm8k.yaml", "--stages", "configs/stages/gsm8k.yaml")
    stages = read_stages(config)
    assert [(stage.name, stage.epochs) for stage in stages] == [("short", 2), ("all", 2), ("gentle", 1)]
    assert [stage.config.max_tokens for stage in stages] == [200, None, None]
    assert {(stage.config.prompt_field, stage.config.response_field) for stage in stages} == {("question", "answer")}
    plan = plan_of(stages)
    assert plan.lr(plan.total_steps) == 0.0
    assert plan.loss_weights(1) == {"ce": 1.0, "z": 1e-4} and plan.loss_weights(plan.total_steps) == {"z": 0}


# ---------------------------------------------------------------------------------------------------------------------
# The others


def test_the_adaptive_run_rises_linearly_from_1e_5_to_5e_4_in_ten_epochs():
    config = config_of("adaptive.yaml")
    plan = plan_of(read_stages(config))
    (span,) = plan.spans
    rates = [plan.lr(end) for end in span.epoch_ends]
    expected = [1e-5 + (5e-4 - 1e-5) * epoch / 10 for epoch in range(11)] + [5e-4] * 89
    assert rates == pytest.approx(expected, rel=1e-12)
    assert (config.optimizer, config.init, config.adam_eps, config.grad_clip) == ("adamw", "kaiming", 1e-8, 1.0)
    adapt = {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.name.startswith("lr_adapt_")}
    assert config.lr_adapt == "adaptive" and adapt == {
        "lr_adapt_patience": 50, "lr_adapt_factor": 0.7, "lr_adapt_threshold": 0.001, "lr_adapt_window": 20,
            "lr_adapt_cooldown": None,
        "lr_adapt_boost": 1.5, "lr_adapt_drop": 0.8, "lr_adapt_drop_patience": 30,
    }  # fmt: skip
    assert (config.min_lr, config.max_lr_factor) == (1e-6, 3.0)


def test_what_builds_on_a_base_has_its_data():
    of_the_hub = ("lora.yaml", "qwen3_0.6b_one_gpu.yaml", "llama_8b_fsdp_8gpus.yaml")
    for name in ("adaptive.yaml", "distillation.yaml", *of_the_hub):
        config, base = config_of(name), config_of("gsm8k.yaml")
        assert config.data_request == base.data_request
        assert (config.prompt_field, config.response_field) == ("question", "answer")


def test_large_models_are_loaded_in_half_precision_arithmetic_and_one_of_them_is_sharded():
    one, many = config_of("qwen3_0.6b_one_gpu.yaml"), config_of("llama_8b_fsdp_8gpus.yaml")
    for config in (one, many):
        assert config.dtype == "bfloat16" and config.gradient_checkpointing and not config.shape
    assert (one.from_weight, one.strategy) == ("Qwen/Qwen3-0.6B", "ddp")
    assert (many.from_weight, many.strategy) == ("meta-llama/Llama-3.1-8B-Instruct", "fsdp")


def test_adapters_of_the_default_kind():
    adapters = config_of("lora.yaml").model_request["lora"]
    assert adapters == {"rank": 16, "alpha": 32, "targets": "", "dropout": 0.05}
