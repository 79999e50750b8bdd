"""Two hosts made of network namespaces: one dies, leaves or joins, and every sample is trained once per epoch."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from tests.small_world import TINY, records_of, write_rows

ROOT = Path(__file__).resolve().parent.parent.parent
PORT, EPOCHS, SAMPLES, SAVE_INTERVAL, HOLD = 29400, 6, 24, 3, 20

# The store is on the host whose address sorts last, so that rank 0, which saves and exports, is on the other one.
STORE, OTHER = "10.77.0.2", "10.77.0.1"

# The trainer as it is, but for a diary of the samples of each step, and a place where a host can be met in mid-epoch.
DIARY = """
import json, os, time
import trainer
from training.config.command_line import config_from_command_line

original, world = trainer.train_step, int(os.environ["WORLD_SIZE"])

def watched(learner, window, step, *rest):
    if world == 2 and step == int(os.environ.get("HOLD", 0)):
        open("held", "w").close()
        time.sleep(3600)
    time.sleep(float(os.environ.get("PACE", 0)))
    result = original(learner, window, step, *rest)
    samples = [sample for batch in window for sample in batch["sample_ids"] if sample >= 0]
    with open("diary.jsonl", "a") as file:
        file.write(json.dumps([world, step, samples]) + "\\n")
    return result

trainer.train_step = watched
if __name__ == "__main__":
    trainer.end_process(trainer.main(config_from_command_line()))
"""


def ip(*words):
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True).stdout


class Host:
    """A network namespace with one address; what runs in it shares nothing but the disk with the other host."""

    def __init__(self, address: str, project: Path):
        self.address, self.project, self.log = address, project, project / f"{address}.log"
        self.started: list[subprocess.Popen] = []
        self.name = f"sft-{os.getpid()}-{address.split('.')[-1]}"
        ip("netns", "add", self.name)

    def up(self) -> None:
        ip("-n", self.name, "address", "add", f"{self.address}/24", "dev", "veth0")
        for link in ("lo", "veth0"):
            ip("-n", self.name, "link", "set", link, "up")

    def unplug(self) -> None:
        ip("-n", self.name, "link", "set", "veth0", "down")

    def start(self, nodes: str, **environment: object) -> subprocess.Popen:
        """The launch script with the tiny model, one process, and short waits for nodes."""
        flags = {
            **TINY, "epochs": EPOCHS, "global_batch_size": 2, "save_interval": SAVE_INTERVAL,
            "group_timeout_seconds": 10, "data_path": self.project / "rows.jsonl",
            "save_dir": self.project / "run", "cache_dir": self.project / f"cache-{self.address}",
        }  # fmt: skip
        words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
        script = self.project / "scripts" / "launch" / "multi_node.sh"
        variables = {
            **os.environ, "VENV": "none", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PET_RDZV_CONF": "last_call_timeout=2,keep_alive_interval=1", "OMP_NUM_THREADS": "1",
            **{name: str(value) for name, value in environment.items()},
        }  # fmt: skip
        with open(self.log, "w") as log:
            process = subprocess.Popen(
                ["ip", "netns", "exec", self.name, "bash", script, f"{STORE}:{PORT}", nodes, "1", *words],
                cwd=self.project, env=variables, stdout=log, stderr=log,
            )  # fmt: skip
        self.started.append(process)
        return process

    def kill(self) -> None:
        """Everything in it at once, torchrun too."""
        for pid in ip("netns", "pids", self.name).split():
            with contextlib.suppress(ProcessLookupError):  # it has just ended
                os.kill(int(pid), signal.SIGKILL)
        for process in self.started:
            process.wait()

    def remove(self) -> None:
        self.kill()
        ip("netns", "delete", self.name)


@pytest.fixture
def hosts(tmp_path):
    """The host with the store and the other one, joined by a cable, and a project whose trainer keeps a diary."""
    if os.geteuid() != 0 or not shutil.which("ip"):
        pytest.skip("network namespaces need root and the program ip")
    made = []
    try:
        try:
            for address in (STORE, OTHER):
                made.append(Host(address, tmp_path))
        except subprocess.CalledProcessError as problem:
            pytest.skip(f"no network namespaces here: {problem.stderr.strip()}")
        ends = [["veth0", "netns", host.name] for host in made]
        ip("link", "add", *ends[0], "type", "veth", "peer", "name", *ends[1])
        for host in made:
            host.up()
        for name in ("scripts", "model", "dataset", "training", "trainer_utils.py", "configs"):
            (tmp_path / name).symlink_to(ROOT / name)
        (tmp_path / "trainer.py").symlink_to(ROOT / "train_full_sft.py")
        (tmp_path / "train_full_sft.py").write_text(DIARY)
        write_rows(tmp_path / "rows.jsonl", SAMPLES)
        yield made
    finally:
        for host in made:
            host.remove()


def wait_for(condition, process: subprocess.Popen, timeout_seconds: float = 60) -> None:
    deadline = time.monotonic() + timeout_seconds
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline, "see the logs of the hosts"
        time.sleep(0.05)


def steps_of(project: Path, world_size: int) -> dict[int, list[int]]:
    """Step -> samples that the processes of a run of this size trained in it."""
    steps: dict[int, list[int]] = {}
    diary = project / "diary.jsonl"
    for line in diary.read_text().splitlines() if diary.exists() else []:
        world, step, samples = json.loads(line)
        if world == world_size:
            steps.setdefault(step, []).extend(samples)
    return steps


def check_result(project: Path, first: int, then: int, log: Path) -> int:
    """Every sample once per epoch over what counts; returns how many steps were done twice."""
    before, after = steps_of(project, first), steps_of(project, then)
    resumed = min(after) - 1
    assert f"resumed from {project}/run/checkpoints/step-{resumed:08d}" in log.read_text()
    counts = [before[step] for step in range(1, resumed + 1)] + list(after.values())
    assert Counter(sample for samples in counts for sample in samples) == Counter(dict.fromkeys(range(SAMPLES), EPOCHS))
    state = json.loads((project / "run" / "state.json").read_text())
    assert (state["status"], state["step"]) == ("completed", max(after)) and max(after) == state["total_steps"]
    assert sorted(after) == list(range(resumed + 1, max(after) + 1))
    assert (project / "run" / "final" / "model.safetensors").exists()
    records = records_of(project / "run")
    assert [r["step"] for r in records if r["kind"] == "train"] == list(range(1, max(after) + 1))
    return max(before) - resumed


@pytest.mark.parametrize("how", ["killed", pytest.param("unplugged", marks=pytest.mark.slow)])
def test_the_host_that_is_left_finishes_alone(hosts, tmp_path, how):
    store, other = hosts
    survivor = store.start("1:2")
    other.start("1:2", HOLD=HOLD)
    wait_for((tmp_path / "held").exists, survivor)
    if how == "unplugged":
        other.unplug()
    other.kill()
    assert survivor.wait(timeout=120) == 0, store.log.read_text()
    assert check_result(tmp_path, 2, 1, store.log) == (HOLD - 1) % SAVE_INTERVAL, "only the steps since the checkpoint"


@pytest.mark.slow
def test_a_host_that_is_asked_to_leave_costs_no_step(hosts, tmp_path):
    store, other = hosts
    stays = store.start("1:2", PACE=0.1)
    leaves = other.start("1:2", PACE=0.1)
    wait_for(lambda: 4 in steps_of(tmp_path, 2), stays)
    leaves.terminate()
    assert stays.wait(timeout=120) == 0, store.log.read_text()
    assert leaves.wait(timeout=10) == 1
    assert check_result(tmp_path, 2, 1, store.log) == 0


@pytest.mark.slow
def test_a_host_that_joins_takes_part_from_the_next_step(hosts, tmp_path):
    """Its address sorts first, so it becomes rank 0; torchrun does not tell the processes that they were restarted."""
    store, other = hosts
    first = store.start("1:2", PACE=0.2)
    wait_for(lambda: 4 in steps_of(tmp_path, 1), first)
    joiner = other.start("1:2")
    assert [process.wait(timeout=120) for process in (first, joiner)] == [0, 0], store.log.read_text()
    assert check_result(tmp_path, 1, 2, other.log) == 0


@pytest.mark.slow
def test_without_the_host_where_they_meet_the_others_end_and_the_same_command_goes_on(hosts, tmp_path):
    store, other = hosts
    store.start("1:2", HOLD=HOLD)
    left = other.start("1:2")
    wait_for((tmp_path / "held").exists, left)
    store.kill()
    assert left.wait(timeout=120) == 1
    assert not ip("netns", "pids", other.name).split(), "no process is left behind"
    assert store.start("1:2").wait(timeout=60) == 0, store.log.read_text()
    assert check_result(tmp_path, 2, 1, store.log) == (HOLD - 1) % SAVE_INTERVAL
