"""tests.golden, which compares this tree with another commit: it sees what changes, and a resume changes nothing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.golden import CASES, differences, without_clock

ROOT = Path(__file__).resolve().parent.parent


def test_a_clock_is_no_difference_and_a_bit_is():
    old = {"metrics.jsonl": [{"step": 1, "train/loss": 0.5, "time": 1.0, "train/tokens_per_second": 9.0}], "a": "x"}
    new = {"metrics.jsonl": [{"step": 1, "train/loss": 0.5, "time": 2.0, "train/tokens_per_second": 8.0}], "a": "x"}
    assert differences(without_clock(old), without_clock(new)) == []
    new["metrics.jsonl"][0]["train/loss"] = 0.5000000000000001
    assert differences(without_clock(old), without_clock(new)) == [
        "metrics.jsonl: 0: train/loss: 0.5 is now 0.5000000000000001"
    ]
    assert differences({"a": 1}, {"b": 1}) == ["a: only in the old tree", "b: only in the new tree"]


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_resumed_run_leaves_behind_what_a_whole_one_does(tmp_path, name):
    """From the command line, in a process of its own, as the comparison of two commits does it."""
    (tmp_path / "work").mkdir()
    command = [sys.executable, ROOT / "tests" / "golden.py", "--record", tmp_path / "told.json", "--only", name]
    subprocess.run(command, cwd=tmp_path / "work", env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True)
    told = json.loads((tmp_path / "told.json").read_text())
    whole, resumed = told[name], told[f"{name}, resumed"]
    for traces in (whole, resumed):
        traces["metrics.jsonl"] = [record for record in traces["metrics.jsonl"] if record["kind"] != "event"]
        traces.pop("config.yaml")  # names the directory, and whether it is a resume
    assert differences(whole, resumed) == []
