"""The program that checks the promises on a machine calls a kept promise kept and a broken one broken."""

import os
import re
import subprocess
import sys
import tempfile

import pytest

from scripts.verify.checks import CHECKS, main
from tests.faults.mutants import MUTANTS, ROOT, copy_tree


def verify(tree, *words):
    """Exit code and lines of the table."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": tempfile.gettempdir()}
    command = [sys.executable, "-m", "scripts.verify", "--device", "cpu", *words]
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, timeout=280)
    return done.returncode, done.stdout.splitlines()


def with_bug(tree, name):
    (mutant,) = [mutant for mutant in MUTANTS if mutant.name == name]
    mutant.apply(copy_tree(tree))
    return tree


def test_kept_promises_are_reported_with_what_was_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    code, lines = verify(ROOT, "--only", "packing", "--only", "split")
    assert code == 0, lines
    assert re.match(r"checks: 2 kept; \d+ seconds", lines[-1])
    rows = lines[2:-1]
    assert len(rows) == 5 and all(row.endswith("kept") for row in rows), rows
    assert float(rows[0].split()[-4]) <= 1e-12, "the measured difference of packed logits"
    left = [path.name for path in tmp_path.iterdir() if not path.name.startswith("torchinductor_")]  # torch's own cache
    assert not left


@pytest.mark.parametrize(
    ("bug", "check", "promise"),
    [
        pytest.param(
            "packed documents go on counting positions", "packing", "packed == alone: logits", marks=pytest.mark.slow
        ),
        ("attention goes across documents", "packing", "positions that another document changes"),
        pytest.param("the mean of means is trained", "split", "update of 2 processes (ddp)", marks=pytest.mark.slow),
        pytest.param("one row too few counts as trained", "world_size", "samples missing", marks=pytest.mark.slow),
        pytest.param("optimizer state not restored", "resume_ddp", "resumed == uninterrupted", marks=pytest.mark.slow),
    ],
)
def test_a_broken_promise_is_reported_and_ends_with_an_error(tmp_path, bug, check, promise):
    code, lines = verify(with_bug(tmp_path / "tree", bug), "--only", check)
    assert code == 1
    assert [line for line in lines if line.startswith(promise) or promise in line][0].endswith("BROKEN"), lines
    assert "1 BROKEN" in lines[-1]


def test_what_a_machine_cannot_run_is_no_success(capsys):
    assert main(["--device", "cpu", "--processes", "1", "--only", "world_size", "--only", "resume_fsdp"]) == 1
    said = capsys.readouterr().out
    assert said.count("not run: needs two processes") == 2 and "checks: 2 not run" in said


@pytest.mark.slow
def test_every_promise_is_checked():
    """Two minutes on two cores."""
    code, lines = verify(ROOT)
    assert code == 0 and lines[-1].startswith(f"checks: {len(CHECKS)} kept"), lines
