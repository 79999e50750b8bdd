"""report/ of real and of made runs: what it says, that its pictures are there, and that it never harms a run."""

import json
import os
import re
import signal
import time

import numpy as np
import pytest

from scripts.verify.ranks import FORKS, free_port, train_rank
from tests.small_world import log_of, records_of, result_of, train, write_rows
from training.diagnosis.drawing import new_figure, save_figure
from training.diagnosis.plots import PLOTS, Curves, thinned
from training.diagnosis.report import ReportEvery, main, reported, write_report
from training.records.metrics import read_records
from training.text import as_text, cell, one_line

PNG = b"\x89PNG\r\n\x1a\n"


def plots_of(save_dir):
    return {path.stem for path in (save_dir / "report").glob("*.png") if path.read_bytes().startswith(PNG)}


def report_of(save_dir):
    return (save_dir / "report" / "report.md").read_text()


@pytest.fixture(scope="module")
def done(rows, tmp_path_factory):
    save_dir = tmp_path_factory.mktemp("done") / "run"
    flags = {"data_path": str(rows), "val_data_path": str(rows), "report": 1, "eval_samples": 2, "eval_interval": "6"}
    assert train(1, save_dir, max_steps=24, **flags) == [0], log_of(save_dir)
    return save_dir


def test_a_run_ends_with_its_report(done):
    text = report_of(done)
    assert log_of(done).endswith(f"report: {done}/report/report.md\n")
    assert plots_of(done) == set(PLOTS)
    for title in ("Result", "Recommendations", "Alerts", "Convergence", "Learning rate", "Speed and memory", "Epochs",
                  "Checkpoints", "Samples", "Data", "Plots"):  # fmt: skip
        assert f"\n## {title}\n" in text
    best = min(records_of(done, "eval"), key=lambda record: record["eval/loss"])
    assert f"| best eval/loss | {best['eval/loss']:.4f}, step {best['step']}, epoch" in text
    assert "| status | completed |" in text and "| steps | 24 of 24 (100.0 %) |" in text
    assert "| ended by | all steps done |" in text and " of training, " in text
    linked = set(re.findall(r"\]\((\w+)\.png\)", text))
    assert linked == set(PLOTS)
    assert not list((done / "report").glob(".*")), "nothing half written is left"


def test_the_report_is_that_of_the_run_and_changes_none_of_it(done, rows, tmp_path):
    flags = {"data_path": str(rows), "val_data_path": str(rows), "eval_samples": 2, "eval_interval": "6"}
    assert train(1, tmp_path / "run", max_steps=24, **flags) == [0]
    assert not (tmp_path / "run" / "report").exists(), "--report 0"
    assert result_of(tmp_path / "run") == result_of(done)


def test_a_finished_run_that_is_resumed_keeps_its_report(done, rows):
    before = (done / "report" / "report.md").stat().st_mtime_ns
    flags = {"data_path": str(rows), "val_data_path": str(rows), "report": 1, "eval_samples": 2, "eval_interval": "6"}
    assert train(1, done, max_steps=24, from_resume="1", **flags) == [0]
    assert (done / "report" / "report.md").stat().st_mtime_ns == before


def test_a_run_that_fails_has_a_report_of_how_far_it_came(rows, tmp_path):
    flags = {"data_path": str(rows), "learning_rate": 1000.0, "dropout": 0.0, "report": 1, "max_steps": 60}
    assert train(1, tmp_path / "run", **flags) == [70]
    text = report_of(tmp_path / "run")
    assert "| status | failed |" in text and "NonFiniteError" in text
    assert "**divergence**" in text and "--learning\\_rate" in text
    assert "goes on from the last checkpoint" in text and "loss" in plots_of(tmp_path / "run")


def test_a_run_that_never_trained_leaves_the_report_of_another_alone(done, tmp_path):
    before = report_of(done)
    assert train(1, done, data_path=str(tmp_path / "no.jsonl"), report=1, overwrite=1) == [65]
    assert report_of(done) == before


def test_a_preempted_run_is_gone_within_five_seconds_and_has_its_text(tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl")
    save_dir = tmp_path / "run"
    process = FORKS.Process(target=be_alone, args=(free_port(), rows, save_dir))
    process.start()
    deadline = time.monotonic() + 60
    while not (save_dir / "metrics.jsonl").exists() or len(read_records(save_dir / "metrics.jsonl")) < 20:
        assert time.monotonic() < deadline and process.is_alive(), log_of(save_dir)
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGTERM)
    started = time.monotonic()
    process.join(30)
    assert process.exitcode == 75 and time.monotonic() - started < 5.0
    assert "SIGTERM" in report_of(save_dir) and not plots_of(save_dir)


def be_alone(port, rows, save_dir):
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    from tests.small_world import TINY

    more = {"data_path": str(rows), "cache_dir": str(save_dir.parent / "cache"), "report": 1, "save_dir": str(save_dir)}
    train_rank(0, {**TINY, **more, "epochs": 1000, "save_interval": "10000"}, str(save_dir), None)


def test_a_report_is_written_during_a_run_by_another_process(rows, tmp_path):
    assert train(1, tmp_path / "run", data_path=str(rows), max_steps=20, plot_interval="5") == [0]
    assert "dropped" not in log_of(tmp_path / "run")
    follower = ReportEvery(tmp_path / "run", "10")
    for record in records_of(tmp_path / "run"):
        follower.log(record)
    follower.job.wait(60)
    follower.close()
    assert "completed" in report_of(tmp_path / "run")


def test_the_interval_counts_steps_or_epochs(tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr("subprocess.Popen", lambda *args, **how: started.append(now) or Job())
    for interval, expected in (("10", [10, 25, 30, 40]), ("2epoch", [30, 40])):
        started.clear()
        follower = ReportEvery(tmp_path, interval)
        for step in (*range(4, 15), *range(25, 43)):
            now = step
            follower.log({"kind": "train", "step": step})
            if step % 10 == 0:
                follower.log({"kind": "epoch", "step": step, "epoch": step // 10, "complete": True})
        assert started == expected
    started.clear()
    resumed = ReportEvery(tmp_path, "2epoch")
    resumed.log({"kind": "epoch", "step": 15, "epoch": 2, "complete": False})
    assert started == []


class Job:
    def poll(self):
        return 0


def made_run(folder, records, **state):
    folder.mkdir(exist_ok=True)
    said = {"status": "completed", "step": 3, "total_steps": 3, "pid": os.getpid(), "updated_at": time.time()}
    (folder / "state.json").write_text(json.dumps({**said, **state}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps({"time": 1e9, **r}) + "\n" for r in records))
    return folder


HOSTILE = "```\n<script>alert(1)</script>\n| [x](javascript:1) \x1b[2J\n````` ![p](http://evil/p.png)"


def test_text_of_others_stays_text(tmp_path):
    sample = {"kind": "event", "event": "sample", "step": 2, "prompt": HOSTILE, "expected": HOSTILE, "answer": HOSTILE}
    run = made_run(tmp_path / "a|b<i>", [{"kind": "train", "step": 1, "train/loss": 1.0}, sample], exit_reason=HOSTILE)
    (run / "alerts.jsonl").write_text(
        json.dumps({"kind": "train", "step": 1, "level": HOSTILE, "rule": HOSTILE, "advice": HOSTILE, "numbers": {}})
    )
    text = write_report(run).read_text()
    assert "\x1b" not in text
    fence = re.search(r"^(`{6,})text$", text, flags=re.MULTILINE).group(1)
    before, block, after = text.split(fence)
    assert "<script>" in block, "in the block it is shown as it is"
    for outside in (before, after):
        assert not re.search(r"(?<!\\)(<script|\[x\]|!\[p)", outside)
    assert cell("a|b") == "a\\|b" and one_line("a\n b\x1b") == "a b\N{REPLACEMENT CHARACTER}"
    assert list(as_text("x ``` y"))[0] == "````text"


@pytest.mark.parametrize(
    "records",
    [
        [],
        [{"kind": "train", "step": 1, "train/loss": None, "non_finite": ["train/loss"]}],
        [{"kind": "train", "step": 1, "train/loss": 2.0, "train/learning_rate": 0.0, "train/grad_norm": 0.0,
          "train/tokens_per_second": 0.0}],
        [{"kind": "eval", "step": 0, "eval/loss": 2.0}],
        [{"kind": "train", "step": s, "train/loss": 0.0} for s in range(1, 40)],
        [{"kind": "event", "step": 1, "event": "stage", "name": "\u4e2d\u6587"},
         {"kind": "train", "step": 2, "train/loss": 1.0},
         {"kind": "event", "step": 3, "event": "stage", "name": "b"}],
    ],
    ids=["nothing", "not finite", "zeros", "only an evaluation", "all zero", "stages"],
)  # fmt: skip
def test_a_run_with_hardly_anything_in_it_has_a_report(tmp_path, records):
    assert "# run" in write_report(made_run(tmp_path / "run", records)).read_text()


def test_what_is_recommended(tmp_path):
    def said(records, **state):
        return write_report(made_run(tmp_path / "run", records, **state), plots=False).read_text()

    train_records = [{"kind": "train", "step": s, "train/loss": 2.0 - 0.1 * s} for s in range(1, 4)]
    assert "`--val_fraction 0.05`" in said(train_records)
    falling = [{"kind": "eval", "step": s, "eval/loss": 3.0 - s} for s in range(1, 3)]
    assert "more `--epochs`" in said([*train_records, *falling])
    rising = [{"kind": "eval", "step": s, "eval/loss": float(s)} for s in range(1, 3)]
    assert "`--save_top_k 1`" in said([*train_records, *rising])
    assert "--from_resume 1" in said(train_records, status="stopped")


def test_what_cannot_be_written_is_said_and_ends_nothing(tmp_path, caplog):
    run = made_run(tmp_path / "run", [])
    (run / "report").write_text("in the way")
    with reported(run, wanted=True):
        pass
    assert caplog.text.count("the report could not be written") == 1
    with pytest.raises(ValueError, match="mine"), reported(run, wanted=True):
        raise ValueError("mine")


def test_a_folder_that_is_no_run_is_an_error(tmp_path, capsys):
    assert main([str(tmp_path)]) == 74 and "state.json" in capsys.readouterr().err


def test_thinning_keeps_every_spike():
    x, y = np.arange(100_000.0), np.zeros(100_000)
    y[[137, 99_998]] = (50.0, -3.0)
    few_x, few_y = thinned(x, y)
    assert len(few_x) <= 2000 and few_y.max() == 50.0 and few_y.min() == -3.0 and np.all(np.diff(few_x) > 0)


def test_the_best_is_by_the_metric_and_mode_of_the_run():
    records = [{"kind": "eval", "step": s, "eval/exact_match": v} for s, v in ((1, 0.1), (2, 0.9), (3, 0.5))]
    assert Curves(records, "eval/exact_match", "max").best() == (2, 0.9)
    assert Curves(records, "eval/exact_match").best() == (1, 0.1) and Curves(records).best() is None


@pytest.mark.parametrize(("name", "begin"), [("a.png", PNG), ("a", PNG), ("a.svg", b"<?xml")])
def test_a_figure_is_saved_whole_in_the_format_of_its_name(tmp_path, name, begin):
    figure, ((axes,),) = new_figure()
    axes.set_title("\u4e2d\u6587")  # no glyph of the font, and no warning
    save_figure(figure, tmp_path / name)
    assert (tmp_path / name).read_bytes().startswith(begin)
    with pytest.raises(ValueError):
        save_figure(figure, tmp_path / "a.docx")
    assert [path.name for path in tmp_path.iterdir()] == [name]
