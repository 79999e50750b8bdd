"""Measures the dashboard: `python -m scripts.bench.dashboard chart|clients`.

`chart`: seconds until Chromium shows the first chart of a run with 200,000 records, and until it shows all of them
(needs playwright and chromium). `clients`: what 50 pages cost a trainer, which has core 0 for itself while the server
has core 1; its steps are a fixed piece of work each.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from scripts.dashboard.security import make_token
from scripts.verify.ranks import free_port

CLIENTS, RECORDS, STEPS = 50, 200_000, 1500
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]


def write_state(run_dir: Path, step: int) -> None:
    state = {
        "status": "running", "pid": os.getpid(), "host": socket.gethostname(), "updated_at": time.time(), "step": step,
        "total_steps": RECORDS, "started_at": time.time(),
    }  # fmt: skip
    temporary = run_dir / ".state.tmp"
    temporary.write_text(json.dumps(state))
    os.replace(temporary, run_dir / "state.json")


def record(step: int) -> str:
    names = ("token_accuracy", "learning_rate", "grad_norm", "tokens_per_second", "seconds_per_step", "data_wait_share")
    values = {f"train/{name}": 0.5 + 0.4 * math.sin(step / 50 + place) for place, name in enumerate(names)}
    values |= {"train/loss": 0.4 + 3 * math.exp(-step / 30000), "train/tokens": 1000 * step, "eta_seconds": 10.0}
    return json.dumps({"step": step, "time": 1.7e9 + step, "kind": "train", **values}) + "\n"


def start_server(runs_dir: Path, port: int) -> subprocess.Popen[bytes]:
    words = [sys.executable, "-m", "scripts.dashboard", "--runs_dir", str(runs_dir), "--port", str(port)]
    server = subprocess.Popen(words, stdout=subprocess.DEVNULL)
    while True:
        assert server.poll() is None, "the server has ended"
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return server
        time.sleep(0.05)


def measure_chart(runs_dir: Path) -> dict[str, float]:
    from playwright.sync_api import sync_playwright

    run = runs_dir / "long"
    run.mkdir(parents=True)
    (run / "metrics.jsonl").write_text("".join(map(record, range(1, RECORDS + 1))))
    write_state(run, RECORDS)
    port, token = free_port(), make_token(runs_dir)
    server = start_server(runs_dir, port)
    try:
        with sync_playwright() as playwright:
            path = shutil.which("chromium")
            browser = playwright.chromium.launch(executable_path=path, args=ARGUMENTS)
            page = browser.new_page()
            page.goto(f"http://127.0.0.1:{port}/#token={token}")
            page.get_by_test_id("run").first.wait_for()
            began = time.perf_counter()
            page.goto(f"http://127.0.0.1:{port}/#/run/long")
            found = {}
            for name, ready in (
                ("first_chart_seconds", "window.__dashboard.drawn > 0"),
                ("whole_chart_seconds", "(window.__dashboard.series('train/loss')?.step.length ?? 0) > 1000"),
            ):
                while not page.evaluate(ready):
                    time.sleep(0.02)
                found[name] = time.perf_counter() - began
            browser.close()
            return found
    finally:
        server.terminate()
        server.wait()


def train(run_dir: Path, steps: int) -> list[tuple[float, float]]:
    """Seconds of each step, and of the processor in it, of a trainer that works, writes its record and its state."""
    import numpy as np

    matrix, seconds, said = np.ones((160, 160)), [], 0.0
    with open(run_dir / "metrics.jsonl", "a", buffering=1) as file:
        for step in range(1, steps + 1):
            began, busy = time.perf_counter(), time.thread_time()
            for _ in range(12):
                matrix = matrix @ matrix / 160
            file.write(record(step))
            if time.time() - said > 1:
                said = time.time()
                write_state(run_dir, step)
            seconds.append((time.perf_counter() - began, time.thread_time() - busy))
    return seconds


async def look(port: int, token: str, count: int, until: asyncio.Event) -> None:
    from websockets.asyncio.client import connect
    from websockets.typing import Subprotocol

    async def one() -> None:
        protocols = [Subprotocol("dashboard.v1"), Subprotocol(f"bearer.{token}")]
        async with connect(f"ws://127.0.0.1:{port}/ws/runs/run", subprotocols=protocols, proxy=None) as client:
            async for _ in client:
                pass

    tasks = [asyncio.create_task(one()) for _ in range(count)]
    await until.wait()
    for task in tasks:
        task.cancel()


def measure_clients(runs_dir: Path) -> dict[str, float]:
    """Steps alone and watched in turn, several times, so that a neighbour of this machine hits both alike."""
    import threading

    os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")
    run = runs_dir / "run"
    run.mkdir(parents=True)
    write_state(run, 0)
    token, port = make_token(runs_dir), free_port()
    times: dict[bool, list[tuple[float, float]]] = {False: [], True: []}
    cores = os.sched_getaffinity(0)
    try:
        for turn in range(8):
            watched = turn % 2 == 1
            server = None
            if watched:
                os.sched_setaffinity(0, {1})  # the server and its clients inherit it
                server = start_server(runs_dir, port)
                code = (
                    "import asyncio; from scripts.bench.dashboard import look; "
                    f"asyncio.run(look({port}, {token!r}, {CLIENTS}, asyncio.Event()))"
                )
                pages = subprocess.Popen([sys.executable, "-c", code])
                time.sleep(3)
            os.sched_setaffinity(0, {0})
            (run / "metrics.jsonl").write_text("")
            worker: list[tuple[float, float]] = []
            thread = threading.Thread(target=lambda into=worker: into.extend(train(run, STEPS)))
            thread.start()
            thread.join()
            times[watched] += worker[50:]
            if server is not None:
                pages.kill()
                pages.wait()
                server.send_signal(signal.SIGTERM)
                server.wait()
    finally:
        os.sched_setaffinity(0, cores)
    found = {}
    for name, pairs in (("alone", times[False]), ("watched", times[True])):
        values = [seconds for seconds, _ in pairs]
        found[f"median_processor_{name}_ms"] = 1000 * statistics.median(busy for _, busy in pairs)
        found[f"median_step_{name}_ms"] = 1000 * statistics.median(values)
        found[f"p99_step_{name}_ms"] = 1000 * statistics.quantiles(values, n=100)[98]
    # On a machine that others use too, this one is to be trusted: the pages push its other work to core 0.
    processor = found["median_processor_watched_ms"] / found["median_processor_alone_ms"]
    found["median_processor_change_percent"] = 100 * (processor - 1)
    found["median_change_percent"] = 100 * (found["median_step_watched_ms"] / found["median_step_alone_ms"] - 1)
    found["p99_change_percent"] = 100 * (found["p99_step_watched_ms"] / found["p99_step_alone_ms"] - 1)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m scripts.bench.dashboard", description=__doc__)
    parser.add_argument("what", choices=("chart", "clients"))
    what = parser.parse_args().what
    with tempfile.TemporaryDirectory() as directory:
        runs_dir = Path(directory) / "runs"
        runs_dir.mkdir()
        found = (measure_chart if what == "chart" else measure_clients)(runs_dir)
    print(json.dumps({name: round(value, 3) for name, value in found.items()}, indent=1))


if __name__ == "__main__":
    main()
