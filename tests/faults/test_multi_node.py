"""Two hosts made of network namespaces: one dies, is unplugged, leaves or joins, and every sample is still trained once."""

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

from tests.small_world import TINY, write_rows

ROOT = Path(__file__).resolve().parent.parent.parent
PORT, EPOCHS, SAMPLES, HOLD = 29400, 6, 24, 20

# The store is on the host whose address sorts last, so that rank 0, which saves and exports, is on the other one.
STORE, OTHER = "10.77.0.2", "10.77.0.1"

# The trainer as it is, but for a diary of the samples of each step, and a place where a host can be met in mid-epoch.
DIARY = """
import json, os, time
import trainer
from training.config import config_from_command_line

original, world = trainer.train_step, int(os.environ["WORLD_SIZE"])

def watched(learner, window, step, *rest):
    if world == 2 and step == int(os.environ.get("HOLD", 0)):
        open("held", "w").close()
        time.sleep(3600)
    if world == 1:
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
            **TINY, "epochs": EPOCHS, "global_batch_size": 2, "save_interval": 3, "group_timeout_seconds": 10,
            "data_path": self.project / "rows.jsonl", "save_dir": self.project / "run",
            "cache_dir": self.project / f"cache-{self.address}",
        }  # fmt: skip
        words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
        script = self.project / "scripts" / "launch_multi_node.sh"
        variables = {
            **os.environ, "VENV": "none", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PET_RDZV_CONF": "last_call_timeout=2,keep_alive_interval=1", "OMP_NUM_THREADS": "1",
            **{name: str(value) for name, value in environment.items()},
        }  # fmt: skip
        with open(self.log, "w") as log:
            return subprocess.Popen(
                ["ip", "netns", "exec", self.name, "bash", script, f"{STORE}:{PORT}", nodes, "1", *words],
                cwd=self.project, env=variables, stdout=log, stderr=log,
            )  # fmt: skip

    def kill(self) -> None:
        for pid in ip("netns", "pids", self.name).split():
            os.kill(int(pid), signal.SIGKILL)

    def remove(self) -> None:
        self.kill()
        ip("netns", "delete", self.name)


@pytest.fixture
def hosts(tmp_path):
    """The host with the store and the other one, joined by a cable, and a project of links whose trainer keeps a diary."""
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
    for line in (project / "diary.jsonl").read_text().splitlines():
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
    records = [json.loads(line) for line in (project / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if r["kind"] == "train"] == list(range(1, max(after) + 1))
    return max(before) - resumed


HOW_A_HOST_GOES = [
    "killed",
    pytest.param("unplugged", marks=pytest.mark.slow),
    pytest.param("asked to leave", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("how", HOW_A_HOST_GOES)
def test_the_host_that_is_left_finishes_alone(hosts, tmp_path, how):
    store, other = hosts
    survivor = store.start("1:2")
    leaver = other.start("1:2", HOLD=HOLD if how != "asked to leave" else 0)
    try:
        wait_for((tmp_path / "held").exists if how != "asked to leave" else lambda: (tmp_path / "diary.jsonl").exists() and HOLD in steps_of(tmp_path, 2), survivor)
        gone = time.monotonic()
        if how == "asked to leave":
            leaver.terminate()
        else:
            if how == "unplugged":
                other.unplug()
            other.kill()
        assert survivor.wait(timeout=120) == 0, store.log.read_text()
        print(f"{how}: finished {time.monotonic() - gone:.1f} s later")
    finally:
        for process in (survivor, leaver):
            process.kill()
            process.wait()
    repeated = check_result(tmp_path, 2, 1, store.log)
    assert repeated == (0 if how == "asked to leave" else (HOLD - 1) % 3)


@pytest.mark.slow
def test_a_host_that_joins_takes_part_from_the_next_step(hosts, tmp_path):
    """Its address sorts first, so it becomes rank 0; torchrun does not tell the processes that they were restarted."""
    store, other = hosts
    first = store.start("1:2", PACE=0.2)
    joiner = None
    try:
        wait_for(lambda: (tmp_path / "diary.jsonl").exists() and 4 in steps_of(tmp_path, 1), first)
        joiner = other.start("1:2")
        asked = time.monotonic()
        wait_for(lambda: steps_of(tmp_path, 2), first)
        print(f"joined {time.monotonic() - asked:.1f} s after its start")
        assert [process.wait(timeout=60) for process in (first, joiner)] == [0, 0], store.log.read_text()
    finally:
        for process in filter(None, (first, joiner)):
            process.kill()
            process.wait()
    assert check_result(tmp_path, 1, 2, other.log) == 0
