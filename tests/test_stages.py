"""The stage table: rows inherit from the run, every problem is told at once, and what was read can be written again."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from training.config import Config, make_config
from training.config.command_line import parse_config
from training.config.flags import ConfigError
from training.config.stages import OWN_KEYS, STAGE_FLAGS, Stage, check_terms, idle_flags, read_stages, stages_as_text


def stages_of(rows, **flags) -> list[Stage]:
    return read_stages(make_config({"data_path": "x.jsonl", "stages": rows, **flags}))


def problems_of(rows, **flags) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        stages_of(rows, **flags)
    return caught.value.problems


def test_the_plain_run_is_a_table_of_one_row():
    config = make_config({"data_path": "x.jsonl", "epochs": 3})
    assert read_stages(config) == [Stage("train", "", 1, 3, config)]


def test_a_row_inherits_the_flags_of_the_run_and_replaces_those_that_it_names():
    first, second = stages_of(
        [
            {"name": "short", "description": "short ones first", "max_seq_len": 64, "learning_rate": "1e-4"},
            {"name": "long", "repeats": 3, "mini_epochs": 2, "loss_weights": {"ce": 1, "z": 0.02}},
        ],
        learning_rate=3e-4, batch_size=4, max_seq_len=512, hidden_size=64, loss_weights="z=1e-4",
    )  # fmt: skip
    assert (first.name, first.description, first.epochs) == ("short", "short ones first", 1)
    assert (first.config.max_seq_len, first.config.learning_rate, first.config.loss_weights) == (64, 1e-4, "z=1e-4")
    assert (second.name, second.description, second.epochs) == ("long", "", 6)
    assert (second.config.max_seq_len, second.config.learning_rate) == (512, 3e-4)
    assert second.config.loss_weights == "ce=1, z=0.02"
    for stage in (first, second):
        assert (stage.config.batch_size, stage.config.hidden_size) == (4, 64)
        assert stage.config.epochs == stage.epochs and stage.config.stages is None


def test_epochs_beside_a_table_are_refused_and_those_of_a_file_below_give_way(tmp_path):
    for name in ("epochs", "max_steps"):
        with pytest.raises(ConfigError, match=f"--{name} is for a run without --stages"):
            make_config({"data_path": "x.jsonl", name: 3, "stages": "[{}]"})
    (tmp_path / "run.yaml").write_text("data_path: x.jsonl\nepochs: 3\nmax_steps: 7\n")
    config, _ = parse_config(["--config", str(tmp_path / "run.yaml"), "--stages", "[{mini_epochs: 4}]"])
    assert [stage.epochs for stage in read_stages(config)] == [4]


def test_a_table_named_in_a_file_lies_beside_that_file(tmp_path):
    (tmp_path / "table.yaml").write_text("- {name: a}\n")
    (tmp_path / "base.yaml").write_text("data_path: x.jsonl\nstages: table.yaml\n")
    (tmp_path / "deeper").mkdir()
    (tmp_path / "deeper" / "run.yaml").write_text("base: ../base.yaml\nseed: 3\n")
    config, _ = parse_config(["--config", str(tmp_path / "deeper" / "run.yaml")])
    assert [stage.name for stage in read_stages(config)] == ["a"]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"lr_cycles": 3}, "--lr_cycles 3 does nothing without --lr_schedule cosine_restarts"),
        (
            {"lr_gamma": 0.5, "lr_schedule": "wsd"},
            "--lr_gamma 0.5 does nothing without --lr_schedule step or",
        ),
        ({"lr_adapt_boost": 2.0, "lr_adapt": "plateau", "val_fraction": 0.1}, "without --lr_adapt adaptive"),
        ({"momentum": 0.5}, "--momentum 0.5 does nothing without --optimizer sgd or muon"),
        ({"temperature": 2.0}, "--temperature 2.0 does nothing without --teacher"),
        ({"early_stopping_min_delta": 0.1}, "does nothing without --early_stopping_patience"),
    ],
)
def test_a_flag_that_does_nothing_is_named(flags, said):
    (line,) = idle_flags(read_stages(make_config({"data_path": "x.jsonl", **flags})))
    assert said in line


def test_a_flag_that_works_in_some_stage_is_not_idle():
    rows = [{"name": "a", "lr_schedule": "wsd"}, {"name": "b"}]
    assert idle_flags(stages_of(rows, lr_decay_ratio=0.5)) == []
    assert len(idle_flags(stages_of([{"name": "a"}, {"name": "b"}], lr_decay_ratio=0.5))) == 1
    assert idle_flags(read_stages(make_config({"data_path": "x.jsonl"}))) == []
    assert not [line for config in Path("configs").glob("*.yaml") for line in idle_of_file(config)]


def idle_of_file(path):
    config, _ = parse_config(["--config", str(path)])
    return idle_flags(read_stages(config))


def test_weights_of_terms_that_nothing_has_are_refused():
    for flags, known in (({}, "ce, z"), ({"teacher": "a"}, "ce, z, kd"), ({"gradient_penalty": 0.1}, "ce, z, gp")):
        with pytest.raises(ValueError, match=f"--loss_weights foo: the terms are {known}$"):
            check_terms(stages_of([{}, {"loss_weights": "foo=1"}], **flags))
    with pytest.raises(ValueError, match="kd needs --teacher"):
        check_terms(stages_of([{}], loss_weights="kd=1"))


def test_a_wrong_key_of_a_row_names_the_nearest_one():
    assert "lerning_rate (did you mean learning_rate?)" in problems_of([{"lerning_rate": 1}])[0]


def test_rows_without_a_name_are_numbered():
    assert [stage.name for stage in stages_of([{}, {"name": "b"}, {"name": None, "description": None}])] == [
        "stage 1", "b", "stage 3"
    ]  # fmt: skip
    assert stages_of([{"description": None}])[0].description == ""


@pytest.mark.parametrize(
    ("run", "row", "expected"),
    [
        ({"warmup_ratio": 0.1}, {"warmup_steps": 5}, {"warmup_steps": 5, "warmup_ratio": 0.0}),
        ({"warmup_steps": 5}, {"warmup_ratio": 0.1}, {"warmup_steps": 0, "warmup_ratio": 0.1}),
        ({"warmup_steps": 5}, {}, {"warmup_steps": 5, "warmup_ratio": 0.0}),
        ({"warmup_steps": 5}, {"warmup_steps": 0}, {"warmup_steps": 0, "warmup_ratio": 0.0}),
        ({"global_batch_size": 64}, {"accumulation_steps": 2}, {"global_batch_size": None, "accumulation_steps": 2}),
        ({"accumulation_steps": 2}, {"global_batch_size": 64}, {"global_batch_size": 64, "accumulation_steps": 1}),
        ({"max_tokens": 99}, {"max_tokens": None}, {"max_tokens": None}),
    ],
)
def test_what_a_row_says_replaces_also_what_the_run_says_otherwise(run, row, expected):
    (stage,) = stages_of([row], **run)
    assert {name: getattr(stage.config, name) for name in expected} == expected


def test_all_problems_of_all_rows_are_told_at_once(tmp_path):
    table = tmp_path / "table.yaml"
    table.write_text("""
- {name: first, learning_rate: 0, batch_size: many}
- {name: second, weight_decay: 0.1, repeats: 0, mini_epochs: 2.5}
- just words
- {name: first, warmup_steps: 3, warmup_ratio: 0.1}
- {lr_schedule: multistep, loss_weights: "z=cosine(0, 1, 0)"}
- {name: second}
""")
    where = f"--stages {table}, row"
    known = ", ".join((*OWN_KEYS, *STAGE_FLAGS))
    assert problems_of(str(table)) == [
        f"{where} 1 (first): --batch_size many: not a whole number",
        f"{where} 1 (first): --learning_rate 0.0: must be greater than 0",
        f"{where} 2 (second): repeats 0 is no whole number from 1",
        f"{where} 2 (second): mini_epochs 2.5 is no whole number from 1",
        f"{where} 2 (second): weight_decay is none of {known}",
        f"{where} 3: expected 'flag: value' lines, found str",
        f"{where} 4 (first): the name is given twice",
        f"{where} 4 (first): --warmup_steps and --warmup_ratio are both given: choose one",
        f"{where} 5 (stage 5): --lr_schedule multistep needs --lr_milestones",
        f"{where} 5 (stage 5): --loss_weights z=cosine(0, 1, 0): z: period must be greater than 0",
        f"{where} 6 (second): the name is given twice",
    ]


@pytest.mark.parametrize("count", [True, "2", -1, None, [1]])
def test_a_count_is_a_whole_number(count):
    assert problems_of([{"name": "a", "repeats": count}]) == [
        f"--stages, row 1 (a): repeats {count} is no whole number from 1"
    ]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("table.yaml", "- {name: a, learning_rate: 1e-4}\n- {name: b, mini_epochs: 2}\n"),
        ("table.yaml", "stages:\n- {name: a, learning_rate: 1e-4}\n- {name: b, mini_epochs: 2}\n"),
        ("table.json", '[{"name": "a", "learning_rate": 1e-4}, {"name": "b", "mini_epochs": 2}]'),
        ("table.json", '{"stages": [{"name": "a", "learning_rate": 1e-4}, {"name": "b", "mini_epochs": 2}]}'),
    ],
)
def test_a_file_is_yaml_or_json_with_or_without_the_key(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    first, second = stages_of(str(tmp_path / name))
    assert (first.name, first.epochs, first.config.learning_rate) == ("a", 1, 1e-4)
    assert (second.name, second.epochs, second.config.learning_rate) == ("b", 2, 5e-4)


def test_a_configuration_file_may_hold_the_table_itself(tmp_path):
    run = tmp_path / "run.yaml"
    run.write_text("""
data_path: x.jsonl
batch_size: 3
stages:
- {name: 2026-01-01, data_path: [a.jsonl, b.jsonl]}
- name: Füße 😀
  loss_weights: {ce: 1, z: 1e-4}
""")
    config, _ = parse_config(["--config", str(run)])
    first, second = read_stages(config)
    assert (first.name, first.config.data_path, first.config.batch_size) == ("2026-01-01", "a.jsonl,b.jsonl", 3)
    assert (second.name, second.config.data_path, second.config.loss_weights) == ("Füße 😀", "x.jsonl", "ce=1, z=1e-4")
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    assert parse_config(["--config", str(tmp_path / "config.yaml")])[0] == config
    inline, _ = parse_config(["--data_path", "x.jsonl", "--stages", "[{name: a, batch_size: 2}, {name: b}]"])
    assert [stage.config.batch_size for stage in read_stages(inline)] == [2, 16]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1", "expected a list of stages"),
        ("[]", "expected a list of stages"),
        ("", "expected a list of stages"),
        ("stages: 3", "expected a list of stages"),
        ("stages: []\nmore: 1", "expected a list of stages"),
        ("- {a: 1", "not valid YAML"),
        ("- {seed: 1, seed: 2}", "seed is given twice"),
        ("- &a {name: b}\n- *a", "aliases"),
    ],
)
def test_a_file_that_is_no_table_is_refused_by_its_name(tmp_path, text, message):
    (tmp_path / "table.yaml").write_text(text)
    (problem,) = problems_of(str(tmp_path / "table.yaml"))
    assert problem.startswith(f"--stages {tmp_path / 'table.yaml'}: ") and message in problem


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    (problem,) = problems_of(str(tmp_path / "missing.yaml"))
    assert problem.startswith(f"--stages {tmp_path}/missing.yaml: cannot be read:") and "No such file" in problem
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\xff")
    assert "cannot be read" in problems_of(str(tmp_path / "bytes.yaml"))[0]


# ---------------------------------------------------------------------------------------------------------------------
# Written and read again


def read_again(stages: list[Stage], config: Config) -> list[Stage]:
    text = stages_as_text(stages, config)
    again = make_config({**{f: getattr(config, f) for f in vars(config)}, "stages": text})
    return read_stages(again)


def test_a_table_written_as_text_is_read_back_equal():
    config = make_config({
        "data_path": "x.jsonl", "batch_size": 4, "warmup_ratio": 0.1, "learning_rate": 1e-5, "global_batch_size": 8,
        "stages": [
            {"name": "a", "description": "one: [two] # three", "warmup_steps": 7, "repeats": 2, "mini_epochs": 3},
            {"name": "😀", "accumulation_steps": 2, "data_path": "a b.jsonl:2,c.jsonl"},
            {"loss_weights": "z=linear(0, 1e-4, 0, 2)", "max_tokens": 80},
        ],
    })  # fmt: skip
    stages = read_stages(config)
    assert read_again(stages, config) == stages
    rows = json.loads(stages_as_text(stages, config))
    assert [(row["repeats"], row["mini_epochs"]) for row in rows] == [(2, 3), (1, 1), (1, 1)]
    assert "learning_rate" not in rows[0], "only what differs"


def test_rows_of_a_step_that_equal_those_of_the_run_are_not_lost_beside_other_micro_batches():
    """A row that says one of two alternatives takes the other one off the run."""
    config = make_config({"data_path": "x", "global_batch_size": 8, "stages": [{"name": "a"}]})
    (stage,) = read_stages(config)
    stage.config.accumulation_steps = 4  # as a run writes down what it does
    assert read_again([stage], config)[0].config.global_batch_size == 8


names = st.text(st.characters(codec="utf-8", exclude_categories=("C", "Z")), min_size=1, max_size=8)
flags = st.fixed_dictionaries(
    {},
    optional={
        "learning_rate": st.floats(1e-9, 1.0), "lr_schedule": st.sampled_from(["cosine", "step", "mini_epoch"]),
        "warmup_steps": st.integers(0, 9), "min_lr_ratio": st.floats(0.0, 1.0), "lr_interval": st.just("3epoch"),
        "batch_size": st.integers(1, 9), "accumulation_steps": st.integers(1, 9),
        "global_batch_size": st.none() | st.integers(1, 9), "max_tokens": st.none() | st.integers(2, 9),
        "file_fraction": st.floats(0.01, 1.0), "loss_weights": st.sampled_from(["", "z=1e-4", "ce=1, z=0"]),
        "data_path": names.map("{}.jsonl".format).filter(lambda text: "," not in text),
    },
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(run=flags, rows=st.lists(st.tuples(names, st.integers(1, 50), flags), min_size=1, max_size=4))
def test_any_table_is_read_back_equal(run, rows):
    table = [{"name": f"{number}{name}", "mini_epochs": count, **row} for number, (name, count, row) in enumerate(rows)]
    config = make_config({"data_path": "x.jsonl", **run, "stages": table})
    stages = read_stages(config)
    assert [stage.name for stage in stages] == [row["name"] for row in table]
    assert read_again(stages, config) == stages
