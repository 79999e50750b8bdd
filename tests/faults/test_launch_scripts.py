"""The launch scripts, with small stand-ins for Slurm's programs: what they call, refuse and queue again."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from scripts.verify.ranks import free_port
from tests.small_world import TINY, write_rows

ROOT = Path(__file__).resolve().parent.parent.parent

# Slurm's programs as far as the script uses them; each writes down how it was called.
SLURM = {
    "srun": 'while [ "$1" != bash ]; do shift; done\necho $$ > "$SPOOL/task"\nexec ${INSTEAD:-"$@"}',
    "scontrol": 'if [ "$1" = show ]; then printf "localhost\\nnode-b\\n"; fi',
    "scancel": 'kill -s "${1#--signal=}" "$(cat "$SPOOL/task")"',
}


def words(tmp_path, **flags):
    values = {
        **TINY, "epochs": 20, "data_path": tmp_path / "rows.jsonl", "save_dir": tmp_path / "run",
        "cache_dir": tmp_path / "cache", **flags,
    }  # fmt: skip
    return [word for name, value in values.items() for word in (f"--{name}", str(value))]


@pytest.fixture
def environment(tmp_path):
    """The variables of a Slurm job of one node, the stand-ins first in PATH, and the Python that runs the tests."""
    write_rows(tmp_path / "rows.jsonl")
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, body in SLURM.items():
        (programs / name).write_text(f'#!/bin/bash\necho {name} "$@" >> "$SPOOL/calls"\n{body}\n')
        (programs / name).chmod(0o755)
    return {
        **os.environ, "PATH": f"{programs}:{Path(sys.executable).parent}:{os.environ['PATH']}", "VENV": "none",
        "OMP_NUM_THREADS": "1", "SPOOL": str(tmp_path), "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_JOB_ID": str(free_port()), "SLURM_JOB_NODELIST": "node-[a-b]", "SLURM_NNODES": "1",
        "PROCESSES_PER_NODE": "2",
    }  # fmt: skip


@pytest.fixture
def start(tmp_path):
    """Starts a script; what it prints is in the file `log`, and what still runs of it after the test is ended."""
    started = []

    def start(script, arguments, environment, cwd=ROOT):
        with open(tmp_path / "log", "w") as log:
            process = subprocess.Popen(
                ["bash", script, *arguments], env=environment, cwd=cwd, stdout=log, stderr=log, start_new_session=True
            )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(timeout=60)


@pytest.fixture
def job(start, tmp_path, environment):
    """What sbatch does: a copy of the script runs elsewhere."""
    copy = shutil.copy(ROOT / "scripts" / "launch" / "slurm.sh", tmp_path / "slurm_script")
    return lambda flags=None, **more: start(copy, words(tmp_path, **flags or {}), environment | more, cwd=tmp_path)


def log_of(tmp_path):
    return (tmp_path / "log").read_text()


def calls(tmp_path):
    path = tmp_path / "calls"
    return path.read_text().splitlines() if path.exists() else []


def state(tmp_path):
    return json.loads((tmp_path / "run" / "state.json").read_text())


def wait_until(condition, process, tmp_path):
    deadline = time.monotonic() + 60
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline, log_of(tmp_path)
        time.sleep(0.02)


def checkpoints(tmp_path):
    return sorted(path.name for path in (tmp_path / "run" / "checkpoints").glob("step-*"))


@pytest.mark.slow
def test_a_job_whose_time_is_up_saves_is_queued_again_and_goes_on(tmp_path, job, environment):
    process = job()
    wait_until(lambda: len(checkpoints(tmp_path)) > 2, process, tmp_path)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(timeout=60) == 1
    number = environment["SLURM_JOB_ID"]
    assert calls(tmp_path)[-2:] == [f"scancel --signal=TERM {number}", f"scontrol requeue {number}"], log_of(tmp_path)
    stopped = state(tmp_path)
    assert stopped["status"] == "stopped" and stopped["exit_reason"] == "SIGTERM or SIGHUP"
    newest = checkpoints(tmp_path)[-1]
    assert newest == f"step-{stopped['step']:08d}", "the last step is saved"

    assert job().wait(timeout=120) == 0, log_of(tmp_path)
    assert f"resumed from {tmp_path}/run/checkpoints/{newest}" in log_of(tmp_path)
    assert state(tmp_path)["status"] == "completed"
    assert len([line for line in calls(tmp_path) if "requeue" in line]) == 1


@pytest.mark.parametrize("nodes", ["1", "2"])
def test_one_launcher_per_node_meets_the_others_on_the_first(tmp_path, job, environment, nodes):
    assert job(SLURM_NNODES=nodes, SLURM_CPUS_PER_TASK="12", INSTEAD="true").wait(timeout=60) == 0
    port = 20000 + int(environment["SLURM_JOB_ID"]) % 10000
    assert calls(tmp_path) == [
        "scontrol show hostnames node-[a-b]",
        f"srun --nodes {nodes} --ntasks {nodes} --ntasks-per-node 1 --kill-on-bad-exit=1 --cpus-per-task 12 bash "
        f"scripts/launch/multi_node.sh localhost:{port} {nodes} 2 {' '.join(words(tmp_path))}",
    ]


@pytest.mark.parametrize(
    ("instead", "asked"), [("false", False), ("sleep 60", True)], ids=["a failure", "no step before the time was up"]
)
def test_what_would_never_end_is_not_queued_again(tmp_path, job, instead, asked):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "state.json").write_text('{"status": "stopped", "step": 5}')  # of the start before
    process = job(INSTEAD=instead)
    if asked:
        wait_until((tmp_path / "task").exists, process, tmp_path)
        time.sleep(0.2)  # the stand-in becomes the program
        process.send_signal(signal.SIGUSR1)
    assert process.wait(timeout=60) != 0
    assert [line.split()[0] for line in calls(tmp_path)] == ["scontrol", "srun"] + ["scancel"] * asked


def test_wrong_flags_end_a_job_before_its_nodes_start(tmp_path, job):
    assert job({"epochs": 0}).wait(timeout=60) == 2
    assert "--epochs 0: must be at least 1" in log_of(tmp_path)
    assert job(SLURM_SUBMIT_DIR=str(tmp_path)).wait(timeout=60) == 2
    assert "project's root" in log_of(tmp_path)
    assert not calls(tmp_path)


def test_slurm_reads_its_options_before_the_first_command():
    lines = (ROOT / "scripts" / "launch" / "slurm.sh").read_text().splitlines()
    head = lines[: next(i for i, line in enumerate(lines) if line and not line.startswith("#"))]
    options = [line.removeprefix("#SBATCH ") for line in head if line.startswith("#SBATCH ")]
    assert {"--requeue", "--signal=B:USR1@180", "--ntasks-per-node=1", "--open-mode=append"} <= set(options)
    assert not [line for line in lines[len(head) :] if line.startswith("#SBATCH")]


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ([], "three words"),
        (["host", "2"], "three words"),
        (["host", "0", "1"], "NODES is '0'"),
        (["host", "3:2", "1"], "NODES is '3:2'"),
        (["host:x", "2", "1"], "HOST[:PORT] is 'host:x'"),
        (["--nodes", "2", "1"], "HOST[:PORT] is '--nodes'"),
        (["host", "2", "--epochs"], "PROCESSES_PER_NODE is '--epochs'"),
        (["no-such-host.invalid", "2", "1"], "no way to the host no-such-host.invalid"),
        (["localhost", "2", "1", "--epoch", "3"], "unknown flag --epoch"),
        (["localhost", "2", "1", "--overwrite", "1"], "--overwrite 1 deletes the run that --from_resume"),
    ],
)
def test_several_nodes_are_not_started_with_wrong_words(tmp_path, start, environment, arguments, problem):
    assert start("scripts/launch/multi_node.sh", arguments, environment).wait(timeout=60) == 2
    assert problem in log_of(tmp_path)


def test_a_signal_for_a_checkpoint_does_not_end_the_run(tmp_path, start, environment):
    """To the launcher it says nothing; any of its processes saves for all and goes on."""
    process = start(
        "scripts/launch/single_node.sh", ["2", *words(tmp_path, save_interval="1000", epochs=500)], environment
    )
    metrics = tmp_path / "run" / "metrics.jsonl"
    wait_until(lambda: metrics.exists() and metrics.read_text().count("\n") > 5, process, tmp_path)
    os.kill(process.pid, signal.SIGUSR1)
    workers = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    assert len(workers) == 2 and not checkpoints(tmp_path)
    os.kill(int(workers[1]), signal.SIGUSR1)
    wait_until(lambda: checkpoints(tmp_path), process, tmp_path)
    step = int(checkpoints(tmp_path)[0].removeprefix("step-"))
    wait_until(lambda: f'"step": {step + 3}' in metrics.read_text(), process, tmp_path)
    process.terminate()
    assert process.wait(timeout=60) == 1
    assert state(tmp_path)["status"] == "stopped"
