"""What checkpoints cost on this machine: `python -m scripts.bench_checkpoints --data_path train.jsonl …`.

Trains a model of about 100 million parameters with two processes: without checkpoints, with checkpoints that training
waits for, and with `--async_save`; then resumes, and compares the memory of ddp and fsdp. The cost of one checkpoint is
how much longer all steps took, divided by the number of checkpoints.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from scripts.evaluate import positive

ROOT = Path(__file__).resolve().parent.parent
SHAPE = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 2560}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m scripts.bench_checkpoints", description=__doc__.split(":")[0])
    parser.add_argument("--data_path", default="demo", help="training data, as for the trainer")
    parser.add_argument("--prompt_field")
    parser.add_argument("--response_field")
    parser.add_argument("--processes", type=positive, default=2, metavar="N", help="default 2")
    parser.add_argument("--steps", type=positive, default=12, metavar="N", help="steps of each run (default 12)")
    parser.add_argument("--saves", type=positive, default=3, metavar="N", help="checkpoints of each run (default 3)")
    parser.add_argument("--max_seq_len", type=positive, default=512, metavar="N")
    return parser.parse_args(argv)


def run(options: argparse.Namespace, save_dir: Path, **flags: Any) -> list[dict[str, Any]]:
    """The records of a run of the trainer; raises RuntimeError with its output when it fails."""
    given = {name: getattr(options, name) for name in ("data_path", "prompt_field", "response_field", "max_seq_len")}
    values = {
        **SHAPE,
        **given,
        "save_dir": save_dir,
        "batch_size": 1,
        "max_steps": options.steps,
        "log_interval": 1,
        "report": 0,
    }
    values |= {"overlong": "drop", "save_interval": 10**9, **flags}
    words = [f"--{name}={value}" for name, value in values.items() if value is not None]
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={options.processes}"]
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // options.processes)))
    done = subprocess.run(
        [sys.executable, *launcher, "train_full_sft.py", *words],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    return [json.loads(line) for line in (save_dir / "metrics.jsonl").read_text().splitlines()]


def seconds_between(records: list[dict[str, Any]], first: int, last: int) -> float:
    """From the log line of one step to that of another."""
    times = {record["step"]: record["time"] for record in records if record["kind"] == "train"}
    return times[last] - times[first]


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    every = max(2, (options.steps - 2) // options.saves)
    last = 1 + every * options.saves  # a step after the last of the counted checkpoints
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        base = seconds_between(run(options, work / "none"), 1, last)
        step = base / (last - 1)
        print(f"a step: {step:.2f} s")
        for name, in_background in (("waiting", 0), ("in the background", 1)):
            records = run(options, work / name, save_interval=every, async_save=in_background, keep_last=2)
            cost = (seconds_between(records, 1, last) - base) / options.saves
            size = sum(path.stat().st_size for path in next((work / name / "checkpoints").iterdir()).iterdir())
            share = cost / (100 * step)
            print(f"a checkpoint of {size / 1e9:.2f} GB, {name}: {cost:.2f} s, {share:.1%} if made every 100 steps")
        resumed, target = work / "resumed", every * options.saves
        shutil.copytree(work / "waiting", resumed)
        shutil.rmtree(resumed / "final")
        for path in (resumed / "checkpoints").iterdir():
            if int(path.name.removeprefix("step-")) > target:
                shutil.rmtree(path)
        started = time.time()
        records = run(options, resumed, from_resume=1)
        after = min(r["time"] for r in records if r["kind"] == "train" and r["step"] > target)
        print(f"a resume: {after - started:.1f} s from the command to the end of the first step, imports included")
        for strategy in ("ddp", "fsdp"):
            records = run(options, work / strategy, strategy=strategy, max_steps=3)
            peak = max(r["memory_usage"] for r in records if r["kind"] == "epoch")
            print(f"{strategy}: peak memory of rank 0 {peak / 1e9:.2f} GB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
