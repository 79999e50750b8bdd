"""The real torchrun with the trainer under it, as a user starts it, for tests that send signals and kill."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tests.small_world import TINY

ROOT = Path(__file__).resolve().parent.parent.parent


class Launched:
    """A job of `world_size` processes; used as a context it is gone afterwards, whatever happens."""

    def __init__(self, world_size: int, save_dir: Path, *, torchrun: tuple[str, ...] = (), **flags: Any):
        self.save_dir, self.log_path = save_dir, save_dir.with_suffix(".log")
        values = {**TINY, "save_dir": save_dir, "cache_dir": save_dir.parent / "cache", **flags}
        words = [f"--{name}={int(value) if isinstance(value, bool) else value}" for name, value in values.items()]
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world_size}", *torchrun]
        command = [sys.executable, *(launcher if world_size else []), "train_full_sft.py", *words]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false"}
        with open(self.log_path, "ab") as log:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True
            )

    def __enter__(self) -> Launched:
        return self

    def __exit__(self, *_: object) -> None:
        for pid in [*self.everybody(), self.process.pid]:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self.process.wait()

    @property
    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def everybody(self) -> list[int]:
        """Processes of the job besides the launcher: ranks, data workers, whatever names its directory."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and int(entry.name) not in (os.getpid(), self.process.pid):
                try:
                    words = (entry / "cmdline").read_bytes().split(b"\0")
                    zombie = (entry / "stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
                except OSError:
                    continue
                if f"--save_dir={self.save_dir}".encode() in words and not zombie:
                    found.append(int(entry.name))
        return found

    def ranks(self) -> dict[int, int]:
        """Process id of each rank; data workers, which are forked from a rank, are its children."""
        found: dict[int, int] = {}
        for pid in sorted(self.everybody()):
            try:
                environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
                parent = int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
            except OSError:
                continue
            numbers = [int(e.removeprefix(b"RANK=")) for e in environment if e.startswith(b"RANK=")]
            if numbers and parent == self.process.pid:
                found[numbers[0]] = pid
        return found

    def state(self) -> dict[str, Any]:
        try:
            return json.loads((self.save_dir / "state.json").read_text())
        except FileNotFoundError:
            return {}

    def records(self, kind: str) -> list[dict[str, Any]]:
        path = self.save_dir / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        whole = [json.loads(line) for line in lines if line.endswith("\n")]
        return [record for record in whole if record["kind"] == kind]

    def wait_for(self, happened: Any, seconds: float = 90) -> None:
        """Wait until `happened()`; a job that ends before is shown with its log."""
        deadline = time.monotonic() + seconds
        while not happened():
            assert self.process.poll() is None, self.log
            assert time.monotonic() < deadline, self.log
            time.sleep(0.02)

    def wait_for_step(self, step: int) -> None:
        self.wait_for(lambda: any(record["step"] >= step for record in self.records("train")))

    def exit_code(self, seconds: float) -> int:
        """Of the launcher, which must end in time and leave nobody behind."""
        try:
            code = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still there after {seconds} s\n{self.log}") from None
        deadline = time.monotonic() + 6  # a data worker looks every 5 s whether its parent is there
        while self.everybody():
            assert time.monotonic() < deadline, f"left behind: {self.everybody()}"
            time.sleep(0.05)
        return code
