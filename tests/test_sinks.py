"""The curves of TensorBoard and wandb are those of metrics.jsonl, read back from their own files, also after a kill."""

import json
import math
import struct

import pytest

from scripts import replay
from tests.small_world import KillAtCall, log_of, records_of, train, write_rows
from training.config import Config
from training.records.metrics import MetricsLog
from training.records.sinks import FunctionSink, TensorBoardSink, scalars, sink_makers, text_of

FLAGS = {"max_steps": 9, "eval_interval": "3", "save_interval": "2"}


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return str(write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl"))


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")


def curves_of(records):
    """{key: [(step, value)]} of what metrics.jsonl holds, the last of each step."""
    curves = {}
    for record in records:
        for name, value in scalars(record).items():
            curves.setdefault(name, {})[record["step"]] = value
    return {name: sorted(points.items()) for name, points in curves.items()}


def tensorboard_of(run):
    """Curves, and the texts as the page of TensorBoard loads them: the reader of curves never drops a text."""
    from tensorboard.backend.event_processing import event_accumulator, plugin_event_accumulator

    events = event_accumulator.EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    curves = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    page = plugin_event_accumulator.EventAccumulator(str(run / "tensorboard"), tensor_size_guidance={"text": 0})
    page.Reload()
    texts = {
        tag: [(e.step, e.tensor_proto.string_val[0].decode()) for e in page.Tensors(tag)]
        for tag in page.Tags()["tensors"]
        if tag.endswith("/text_summary")
    }
    return curves, texts


def wandb_records(path):
    """The records of a transaction log: blocks of 32 KiB with parts of records, each a message of wandb's own."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, part = path.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        part, at = part + data[at + 7 : at + 7 + length], at + 7 + length
        if kind in (1, 4):  # whole, or its last part
            record = Record()
            record.ParseFromString(part)
            yield record
            part = b""


def wandb_of(run):
    """Curves and ids of all parts that `wandb sync` would send."""
    curves, ids = {}, set()
    for path in sorted((run / "wandb").glob("offline-run-*/run-*.wandb")):
        ids.add(path.stem)
        for record in wandb_records(path):
            if record.HasField("history"):
                row = {"/".join(item.nested_key) or item.key: item.value_json for item in record.history.item}
                for name in row.keys() - {"_step", "_runtime", "_timestamp"}:
                    curves.setdefault(name, []).append((int(row["_step"]), json.loads(row[name])))
    return curves, ids


def assert_same_curves(found, expected):
    assert found.keys() == expected.keys()
    for name, points in expected.items():
        steps, values = zip(*points, strict=True)
        assert tuple(step for step, _ in found[name]) == steps, name
        for (_, value), wanted in zip(found[name], values, strict=True):
            assert value == pytest.approx(wanted, rel=1e-6), name  # TensorBoard keeps float32


def test_both_hold_the_curves_of_the_run_also_after_a_kill(tmp_path, rows):
    flags = {**FLAGS, "data_path": rows, "val_data_path": rows, "report_to": "all", "accumulation_steps": 2}
    # In the step after an evaluation that came without a checkpoint, so that records are cut back and made again.
    assert train(1, tmp_path / "run", wrap_objective=KillAtCall(call=16), **flags) == [-9], log_of(tmp_path / "run")
    torn = records_of(tmp_path / "run")[-1]["step"]
    assert torn == 7 and records_of(tmp_path / "run", "eval")[-1]["step"] == 6
    assert train(1, tmp_path / "run", from_resume="1", **flags) == [0], log_of(tmp_path / "run")
    records = records_of(tmp_path / "run")
    expected = curves_of(records)
    assert [step for step, _ in expected["train/loss"]] == list(range(1, 10))
    assert {"train/loss", "eval/loss", "epoch/val_loss", "epoch/time_per_epoch"} <= expected.keys()

    curves, texts = tensorboard_of(tmp_path / "run")
    assert_same_curves(curves, expected)
    events = [r["step"] for r in records if r.get("event") == "checkpoint"]
    assert [step for step, _ in texts["event/checkpoint/text_summary"]] == events
    curves, ids = wandb_of(tmp_path / "run")
    assert_same_curves(curves, expected)
    assert len(ids) == 1
    assert len(list((tmp_path / "run" / "wandb").glob("replaced-offline-run-*"))) == 1

    # A finished run, written again from its records alone.
    for to in ("tensorboard", "wandb"):
        assert replay.main([str(tmp_path / "run"), "--to", to]) == 0
    assert_same_curves(tensorboard_of(tmp_path / "run")[0], expected)
    curves, again = wandb_of(tmp_path / "run")
    assert_same_curves(curves, expected)
    assert again == ids


def test_tensorboard_that_comes_later_has_the_beginning_too(tmp_path, rows):
    assert train(1, tmp_path / "run", data_path=rows, max_steps=4) == [0]
    more = {"data_path": rows, "max_steps": 6, "from_resume": "1", "allow_change": "schedule"}
    assert train(1, tmp_path / "run", **more, report_to="tensorboard") == [0], log_of(tmp_path / "run")
    curves, _ = tensorboard_of(tmp_path / "run")
    assert_same_curves(curves, curves_of(records_of(tmp_path / "run")))
    assert [step for step, _ in curves["train/loss"]] == [1, 2, 3, 4, 5, 6]


def record(step, kind="train", **values):
    return {"step": step, "time": 1000.0 + step, "kind": kind, **values}


def test_what_was_cut_off_is_gone_even_within_the_step_of_the_cut(tmp_path):
    first = TensorBoardSink(tmp_path / "tensorboard")
    for step in (1, 2, 3):
        first.log(record(step, **{"train/loss": float(step)}))
    first.log(record(2, "eval", **{"eval/loss": 9.0}))
    first.close()
    history = [record(1, **{"train/loss": 1.0}), record(2, **{"train/loss": 2.0})]  # an unfinished step 2
    second = TensorBoardSink(tmp_path / "tensorboard", history)
    second.log(record(2, "eval", **{"eval/loss": 5.0}))
    second.close()
    curves, _ = tensorboard_of(tmp_path)
    assert curves == {"train/loss": [(1, 1.0), (2, 2.0)], "eval/loss": [(2, 5.0)]}


def test_events_are_texts_and_numbers_without_a_room_stay_out():
    stage = record(3, "event", event="stage", stage=1, name="hard")
    assert (scalars(stage), text_of(stage)) == ({}, "stage: 1\n\nname: hard")
    assert text_of(record(3, "event", event="pause")) == "pause"
    train_record = record(3, **{"train/loss": None, "non_finite": ["train/loss"], "train/epoch": 1, "eta_seconds": 4.0})
    assert scalars(train_record) == {"train/epoch": 1.0}
    assert scalars(record(3, "epoch", epoch=1, train_loss=2.5, val_loss=None)) == {
        "epoch/epoch": 1.0, "epoch/train_loss": 2.5,
    }  # fmt: skip


def test_a_function_hears_every_record_and_one_that_fails_is_dropped(tmp_path, caplog):
    heard, calls = [], []

    def broken(record):
        calls.append(record)
        raise RuntimeError("no connection")

    def no_such_sink(_history):
        raise ImportError("not installed")

    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.follow([*sink_makers(Config(), "", [heard.append, FunctionSink(broken)]), no_such_sink])
    log.start(0)
    for step in (1, 2):
        log.write("epoch", step, epoch=step, train_loss=math.nan)
    log.close()
    assert [(r["epoch"], r["train_loss"], r["non_finite"]) for r in heard] == [
        (1, None, ["train_loss"]), (2, None, ["train_loss"]),
    ]  # fmt: skip
    assert len(calls) == 1 and caplog.text.count("no connection") == 1
    assert "a sink cannot start, its metrics go to metrics.jsonl only: not installed" in caplog.text


def train_and_listen(rank, answer, values):
    import train_full_sft
    from training.config import make_config

    heard = []
    train_full_sft.run(make_config(values), callbacks=[heard.append])
    answer([(r["epoch"], r["step"]) for r in heard if r["kind"] == "epoch"])


def test_a_caller_of_the_trainer_hears_of_each_epoch(tmp_path, rows):
    from tests.small_world import TINY, answers_of

    values = {**TINY, "data_path": rows, "save_dir": str(tmp_path / "run"), "cache_dir": str(tmp_path / "cache")}
    first, second = sorted(answers_of(train_and_listen, 2, values))
    assert first == [] and [epoch for epoch, _ in second] == [1, 2]
    assert second == [(r["epoch"], r["step"]) for r in records_of(tmp_path / "run", "epoch")]


def test_a_run_that_writes_is_not_replayed(tmp_path, capsys):
    import os
    import socket
    import time

    state = {"status": "running", "pid": os.getpid(), "host": socket.gethostname(), "updated_at": time.time()}
    (tmp_path / "state.json").write_text(json.dumps(state))
    assert replay.main([str(tmp_path), "--to", "tensorboard"]) == 2
    assert "replay it when it has ended" in capsys.readouterr().err
    assert replay.main([str(tmp_path / "none"), "--to", "tensorboard"]) == 74
