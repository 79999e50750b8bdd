"""The monitor beside runs that live, have ended, have crashed or are none, on a terminal and off one."""

import json
import os
import pty
import re
import signal
import subprocess
import sys
import threading
import time

import pytest

from scripts.monitor import BLOCKS, Lines, Tail, View, arrow, bar, main, sparkline
from tests.small_world import log_of, train
from training.diagnosis.report import ROOT
from training.disk import replace_json

ESCAPES = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")


def records(count=30):
    for step in range(1, count + 1):
        yield {"kind": "train", "step": step, "time": 1e9 + step, "train/loss": 5.0 / step, "train/grad_norm": 1.0,
               "train/learning_rate": 1e-3, "train/tokens_per_second": 1234.0, "train/seconds_per_step": 2.0,
               "train/epoch": step / 30, "eta_seconds": 60.0}  # fmt: skip
        if step % 10 == 0:
            yield {"kind": "eval", "step": step, "time": 1e9 + step, "eval/loss": 1.0 / step}


ALERT = {"kind": "train", "step": 9, "level": "error", "rule": "divergence", "advice": "lower --learning_rate \x1b[2J"}


def say(run, **state):
    said = {"status": "running", "step": 30, "total_steps": 60, "pid": os.getpid(), "updated_at": time.time()}
    replace_json(run / "state.json", {**said, **state})  # whole, whoever reads it meanwhile


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records()))
    (folder / "alerts.jsonl").write_text(json.dumps(ALERT) + "\n")
    say(folder)
    return folder


def test_the_screen_says_it_all(run):
    lines = [ESCAPES.sub("", line) for line in View(run).screen(100)]
    text = "\n".join(lines)
    for part in ("running", "50.0 %", "step 30/60", "epoch 1.00", "eta 1m00s", "loss 0.1667 ↓", "lr 1.00e-03 →",
                 "norm 1.00", "1,234 tokens/s", "eval/loss 0.03333 ↓", "error: divergence at step 9"):  # fmt: skip
        assert part in text, part
    assert re.search(rf"training  [{BLOCKS}]{{30}} 5 to 0.167", text)
    assert "\x1b" not in "".join(ESCAPES.sub("", line) for line in lines), "nothing of an alert steers the terminal"
    assert all(len(line) <= 100 for line in lines)
    assert all(len(ESCAPES.sub("", line)) <= 40 for line in View(run).screen(40))


def test_lines_tell_what_is_new_and_each_alert_once(run, capsys):
    view, lines = View(run), Lines(interval=0.0)
    lines.show(view, "")
    lines.show(view, "")
    out = capsys.readouterr().out
    assert out.count("divergence") == 1 and out.count("step 30/60  loss 0.1667") == 1 and "\x1b" not in out
    say(run, step=31)
    view.look()
    lines.show(view, "")
    assert "step 31/60" in capsys.readouterr().out


@pytest.mark.parametrize("status", ["completed", "stopped", "failed", "crashed"])
def test_it_ends_with_a_run_that_has_ended(run, capsys, status):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    state = {"status": "running", "pid": gone.pid} if status == "crashed" else {"status": status}
    say(run, **state, host=os.uname().nodename)
    assert main([str(run), "--mode", "monitor"]) == 0
    assert f"{status}  step 30/60" in capsys.readouterr().out
    assert not (run / "report").exists()


def test_it_follows_a_run_until_it_ends(run, capsys):
    timer = threading.Timer(0.5, lambda: say(run, status="completed", step=60))
    timer.start()
    assert main([str(run), "--mode", "all", "--interval", "0.1"]) == 0
    timer.join()
    out = capsys.readouterr().out
    assert "running  step 30/60" in out and "completed  step 60/60" in out and f"report: {run}/report/report.md" in out
    assert (run / "report" / "loss.png").exists()
    assert "status | completed" in (run / "report" / "report.md").read_text()


def test_plot_draws_and_report_writes_once(run, capsys):
    assert main([str(run), "--mode", "plot"]) == 0
    assert (run / "report" / "loss.png").exists() and not (run / "report" / "report.md").exists()
    assert main([str(run), "--mode", "report"]) == 0
    assert (run / "report" / "report.md").exists()
    out = capsys.readouterr().out
    assert out.startswith("plots: ") and "report: " in out


def test_plot_with_an_interval_goes_on_until_the_run_ends(run, capsys):
    timer = threading.Timer(0.3, lambda: say(run, status="stopped"))
    timer.start()
    assert main([str(run), "--mode", "plot", "--interval", "0.1"]) == 0
    timer.join()
    assert capsys.readouterr().out.count("plots: ") >= 2


def test_a_run_that_has_logged_nothing_yet(tmp_path, capsys):
    say(tmp_path, status="failed", step=0, exit_reason="DataError: no rows")
    for mode in ("monitor", "plot", "report", "all"):
        assert main([str(tmp_path), "--mode", mode]) == 0, mode
    assert "failed  step 0/60  DataError: no rows" in capsys.readouterr().out


def test_what_is_no_run_is_said(tmp_path, run, capsys):
    assert main([str(tmp_path / "nowhere")]) == 2
    assert "nowhere is no run" in capsys.readouterr().err
    assert main([str(tmp_path)]) == 2
    assert "there are runs in it: run" in capsys.readouterr().err
    (run / "state.json").write_text("[]")
    assert main([str(run)]) == 2
    with pytest.raises(SystemExit):
        main([str(run), "--interval", "0"])


def test_a_damaged_state_is_shown_without_its_values(run, capsys):
    say(run, status="completed", step="12", total_steps="x", exit_reason=[1])
    for mode in ("all", "monitor", "plot", "report"):
        assert main([str(run), "--mode", mode]) == 0
    assert "completed  step 0/0  loss" in capsys.readouterr().out
    assert any("step 0/0" in line for line in View(run).screen(80))


def test_the_tail_follows_growth_cuts_and_exchange(tmp_path):
    path = tmp_path / "metrics.jsonl"
    tail = Tail(path)
    tail.read()
    path.write_text('{"kind": "train", "step": 1, "a": 1}\n{"kind": "train", "st')
    tail.read()
    assert [record["step"] for record in tail.records] == [1]
    with open(path, "a") as file:
        file.write('ep": 2, "a": null}\nnonsense\n[]\n')
    tail.read()
    tail.read()
    assert [record["step"] for record in tail.records] == [1, 2] and tail.values("a") == [1]
    other = tmp_path / "other"
    other.write_text('{"kind": "train", "step": 1, "a": 5}\n' * 9)
    os.replace(other, path)  # as a resume cuts it back
    tail.read()
    assert tail.values("a") == [5] * 9


def test_small_pictures():
    assert sparkline([0.0, 1.0, 2.0, 3.0], 4) == "▁▃▆█" and sparkline([]) == "" and sparkline([2.0] * 3) == "▁▁▁"
    assert len(sparkline([float(i) for i in range(1000)], 60)) == 60
    assert (arrow([1.0, 2.0]), arrow([2.0, 1.0]), arrow([1.0, 1.001]), arrow([1.0]), arrow([])) == (
        "↑",
        "↓",
        "→",
        "→",
        "→",
    )
    assert bar(0.5, 10) == "█████░░░░░" and bar(2.0, 3) == "███"


def monitor(*words, **how):
    return subprocess.Popen([sys.executable, "-m", "scripts.monitor", *words], cwd=ROOT, **how)


def test_on_a_terminal_it_redraws_and_ctrl_c_leaves_quietly(run):
    ours, theirs = pty.openpty()
    job = monitor(str(run), "--mode", "monitor", stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True)
    os.close(theirs)
    seen = b""
    while seen.count(b"\x1b[H") < 2:
        seen += os.read(ours, 65536)
    assert "█" in seen.decode(errors="ignore")
    os.killpg(job.pid, signal.SIGINT)
    while True:
        try:
            more = os.read(ours, 65536)
        except OSError:  # the other side is closed
            break
        if not more:
            break
        seen += more
    assert job.wait(10) == 0 and b"Traceback" not in seen
    os.close(ours)


def test_it_watches_a_real_run_and_starts_without_torch(rows, tmp_path):
    code = "import sys, scripts.monitor; assert not {'torch', 'matplotlib'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
    assert train(1, tmp_path / "run", data_path=str(rows), max_steps=12) == [0], log_of(tmp_path / "run")
    job = monitor(str(tmp_path / "run"), stdout=subprocess.PIPE, text=True)
    out, _ = job.communicate(timeout=60)
    assert job.returncode == 0 and "completed  step 12/12  loss" in out and "report: " in out
