"""A dashboard to test: a real server on a free port, runs made of files, and a trainer without torch that it starts."""

from __future__ import annotations

import json
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx2 as httpx
from websockets.sync.client import ClientConnection, connect

ROOT = Path(__file__).resolve().parent.parent


def stub(processes: int, words: list[str]) -> list[str]:
    """In the place of torchrun: this file, as a trainer that only writes and obeys."""
    return [sys.executable, "-m", "tests.dashboard_world", "train", str(processes), *words]


class Served:
    """A server of a directory of runs and how to ask it."""

    def __init__(self, runs_dir: Path, port: int, token: str):
        self.runs_dir, self.port, self.token = runs_dir, port, token
        self.url = f"http://127.0.0.1:{port}"
        self.page_url = f"{self.url}/#token={token}"
        self.http = httpx.Client(
            base_url=self.url, headers={"Authorization": f"Bearer {token}"}, timeout=20, trust_env=False
        )

    def get(self, path: str, **params: Any) -> Any:
        response = self.http.get(f"/api/v1{path}", params=params)
        assert response.status_code == 200, response.text
        return json.loads(response.text, parse_constant=lambda name: 1 / 0)  # NaN is no JSON

    def post(self, path: str, body: Any = None) -> httpx.Response:
        return self.http.post(f"/api/v1{path}", json={} if body is None else body)

    def connect(self, run: str, since: str | None = None, **options: Any) -> ClientConnection:
        query = "" if since is None else f"?since={since}"
        return connect(
            f"ws://127.0.0.1:{self.port}/ws/runs/{run}{query}", subprotocols=["dashboard.v1", f"bearer.{self.token}"],
            proxy=None, **options,
        )  # fmt: skip

    def messages(self, run: str, until: Callable[[dict], bool], since: str | None = None, seconds: float = 15) -> list:
        """What a client hears up to the message that `until` accepts."""
        heard, deadline = [], time.monotonic() + seconds
        with self.connect(run, since) as client:
            while not heard or not until(heard[-1]):
                text = client.recv(timeout=max(0.1, deadline - time.monotonic()))
                heard.append(json.loads(text, parse_constant=lambda name: 1 / 0))
        return heard

    def status(self, run: str) -> str:
        return self.get(f"/runs/{run}/progress")["status"]

    def wait_for(self, happened: Callable[[], bool], seconds: float = 30) -> None:
        deadline = time.monotonic() + seconds
        while not happened():
            assert time.monotonic() < deadline, [path.read_text() for path in self.runs_dir.glob("*/log.txt")]
            time.sleep(0.05)


@contextmanager
def served(runs_dir: Path, launcher: Callable[[int, list[str]], list[str]] = stub) -> Iterator[Served]:
    """A server in a thread of this process."""
    from scripts.dashboard.security import make_token
    from scripts.dashboard.server import make_server

    runs_dir.mkdir(exist_ok=True)
    token = make_token(runs_dir)
    server, listener = make_server(runs_dir, token, 0, launcher)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    place = Served(runs_dir, listener.getsockname()[1], token)
    try:
        place.wait_for(lambda: server.started)
        yield place
    finally:
        place.http.close()
        server.should_exit = True
        thread.join(10)
        end_children(runs_dir)


class ServerProcess:
    """A server that can be killed and started again on the same port."""

    def __init__(self, runs_dir: Path, launcher: str = "stub"):
        from scripts.dashboard.security import make_token
        from scripts.verify.ranks import free_port

        runs_dir.mkdir(exist_ok=True)
        self.launcher = launcher
        self.place = Served(runs_dir, free_port(), make_token(runs_dir))
        self.start()

    def start(self) -> None:
        words = ["tests.dashboard_world", "serve", str(self.place.runs_dir), str(self.place.port), self.launcher]
        self.process = subprocess.Popen([sys.executable, "-m", *words], cwd=ROOT)

        def answers() -> bool:
            assert self.process.poll() is None
            try:
                return self.place.http.get("/").status_code == 200
            except httpx.HTTPError:
                return False

        self.place.wait_for(answers)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def __enter__(self) -> ServerProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self.place.http.close()
        end_children(self.place.runs_dir)


def end_children(runs_dir: Path) -> None:
    """End what the page has started in this directory, as a whole session each."""
    from scripts.dashboard.runs import launch_of

    for path in runs_dir.glob("*/launch.json"):
        launch = launch_of(path.parent)
        if launch.get("alive"):
            os.killpg(launch["pid"], signal.SIGKILL)
            with suppress(ChildProcessError):  # of another process
                os.waitpid(launch["pid"], 0)


def record(step: int, **values: Any) -> dict[str, Any]:
    numbers = {
        "train/loss": 3.0 * math.exp(-step / 150) + 0.4, "train/learning_rate": 1e-3 / (1 + step / 100),
        "train/grad_norm": 1 + math.sin(step) ** 2, "train/tokens": step * 1000, "train/tokens_per_second": 5000.0,
        "train/seconds_per_step": 0.2, "eta_seconds": 60.0,
    }  # fmt: skip
    return {"step": step, "time": 1.7e9 + step, "kind": "train", **numbers, **values}


def write_records(run_dir: Path, records: list[dict[str, Any]], mode: str = "w") -> None:
    with open(run_dir / "metrics.jsonl", mode, encoding="utf-8") as file:
        file.writelines(json.dumps(each) + "\n" for each in records)


def make_run(runs_dir: Path, name: str, steps: int = 20, status: str = "running", **state: Any) -> Path:
    """A run by its files; it lives as long as this process."""
    run_dir = runs_dir / name
    run_dir.mkdir(parents=True, exist_ok=True)
    write_state(run_dir, status, step=steps, **state)
    write_records(run_dir, [record(step) for step in range(1, steps + 1)])
    (run_dir / "config.yaml").write_text("data_path: demo\nlearning_rate: 0.001\nepochs: 3\ndevice: cpu\n")
    return run_dir


def write_state(run_dir: Path, status: str, **values: Any) -> None:
    now = time.time()
    state = {
        "status": status, "pid": os.getpid(), "host": socket.gethostname(), "updated_at": now, "started_at": now - 60,
        "total_steps": 100, "epoch": 0, "stage": 0,
    }  # fmt: skip
    temporary = run_dir / ".state.tmp"
    temporary.write_text(json.dumps({**state, **values}))
    os.replace(temporary, run_dir / "state.json")


def all_steps(heard: list[dict[str, Any]], key: str = "train/loss") -> list[int]:
    """The steps of a series that a client has after these messages."""
    steps: list[int] = []
    for each in heard:
        if each["type"] == "reset":
            steps = []
        elif each["type"] == "snapshot":
            steps = list(each["series"].get(key, {"step": []})["step"])
        elif each["type"] == "metrics":
            steps += [r["step"] for r in each["records"] if key in r]
    return steps


def train(flags: dict[str, str]) -> None:
    """Write what a trainer writes, a step each 20 ms, and obey its commands."""
    from training.control.requests import ControlFile
    from training.records.metrics import MetricsLog

    run_dir = Path(flags["save_dir"])
    config = run_dir / "config.yaml"
    if not config.exists():
        config.write_text("".join(f"{n}: {v}\n" for n, v in flags.items() if n != "config"))
    flags = {**dict(line.split(": ", 1) for line in config.read_text().splitlines()), **flags}
    total = int(flags.get("max_steps", "60"))
    log, control = MetricsLog(run_dir / "metrics.jsonl"), ControlFile(run_dir / "control.json")
    first = 0
    if flags.get("from_resume") == "1":
        first = int(json.loads((run_dir / "checkpoint.json").read_text())["step"])
    log.start(first)
    paused, step, since, obeyed = False, first, time.time(), None

    def say(status: str, **values: Any) -> None:
        state = {"step": step, "total_steps": total, "started_at": since, "obeyed": obeyed, **values}
        write_state(run_dir, status, **state)

    def save() -> None:
        (run_dir / "checkpoint.json").write_text(json.dumps({"step": step}))
        log.write("event", step, event="checkpoint")

    say("running")
    while step < total:
        command = control.read()
        if command in ("save", "pause"):
            save()
        if command:
            obeyed = {"id": control.last_id, "step": step}
        if command in ("pause", "resume"):
            paused = command == "pause"
            say("paused" if paused else "running")
            log.write("event", step, event=command)
        if command == "stop":
            save()
            say("stopped", exit_reason="a stop command")
            return
        time.sleep(0.02)
        if paused:
            continue
        step += 1
        values = {n: v for n, v in record(step).items() if n not in ("step", "time", "kind")}
        log.write("train", step, **{**values, "train/loss": math.nan if step == 7 else values["train/loss"]})
        if step % 20 == 0:
            log.write("eval", step, **{"eval/loss": values["train/loss"] + 0.1})
            log.write("epoch", step, epoch=step // 20, train_loss=values["train/loss"])
        if flags.get("seed") == "666" and step == 30:
            os.kill(os.getpid(), signal.SIGKILL)
        say("running")
    say("completed", exit_reason="all steps done")


def main(words: list[str]) -> None:
    if words[0] == "train":
        print("the stub trains with", os.environ["OMP_NUM_THREADS"], "threads:", *words[2:], flush=True)
        train(dict(word.removeprefix("--").split("=", 1) for word in words[2:] if word.startswith("--")))
    else:
        from scripts.dashboard.jobs import torchrun
        from scripts.dashboard.security import make_token
        from scripts.dashboard.server import make_server

        runs_dir, port, launcher = Path(words[1]), int(words[2]), stub if words[3] == "stub" else torchrun
        server, listener = make_server(runs_dir, make_token(runs_dir), port, launcher)
        server.run(sockets=[listener])


if __name__ == "__main__":
    main(sys.argv[1:])
