"""What checkpoints cost on this machine: `python -m scripts.bench.checkpoints --data_path train.jsonl …`.

Trains a model of about 100 million parameters with two processes: without checkpoints, with checkpoints that training
waits for, and with `--async_save`; then resumes, and compares the memory of ddp and fsdp. The cost of one checkpoint is
how much longer all steps took, divided by the number of checkpoints.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from scripts.bench.measure import LARGE, data_flags, parser_of, peak_while_training, run_child, words_of
from training.records.metrics import read_records


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    return parser_of("bench_checkpoints", __doc__, processes=2, steps=12, saves=3, max_seq_len=512).parse_args(argv)


def run(options: argparse.Namespace, save_dir: Path, **flags: Any) -> list[dict[str, Any]]:
    """The records of a run of the trainer; raises RuntimeError with its output when it fails."""
    values = {
        **LARGE, **data_flags(options), "save_dir": save_dir, "batch_size": 1, "max_steps": options.steps,
        "log_interval": 1, "report": 0, "overlong": "drop", "save_interval": 10**9, **flags,
    }  # fmt: skip
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={options.processes}"]
    threads = int(os.environ.get("OMP_NUM_THREADS", max(1, (os.cpu_count() or 1) // options.processes)))
    run_child([*launcher, "train_full_sft.py", *words_of(values)], threads)
    return read_records(save_dir / "metrics.jsonl")


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
            print(f"{strategy}: peak memory of rank 0 {peak_while_training(records) / 1e9:.2f} GB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
