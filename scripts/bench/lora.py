"""What LoRA saves on this machine: `python -m scripts.bench.lora --data_path train.jsonl …`.

Makes a model of about 100 million parameters and trains all of it, then adapters beside all linear layers, then beside
the projections to queries and values only: each in a process of its own, in turn, again in every round. Prints medians
of a step's time on the clock and in CPU seconds (which others on the machine disturb less), the peak of resident memory
(while it trained, and of the whole run, which writes final/ at its end) and the size of a checkpoint.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from dataset.demo import training_conversations
from scripts.bench.measure import (
    LARGE,
    data_flags,
    in_turns,
    make_base,
    median,
    parser_of,
    print_table,
    train,
    write_rows,
)
from scripts.evaluate import positive


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = parser_of("bench_lora", __doc__, rounds=3, steps=6, batch_size=1, max_seq_len=512, threads=2)
    parser.add_argument("--rank", type=positive, default=8, metavar="N", help="default 8")
    for name, size in LARGE.items():
        parser.add_argument(f"--{name}", type=positive, default=size, metavar="N", help=f"of the model, default {size}")
    return parser.parse_args(argv)


def run(threads: int, save_dir: Path, flags: dict[str, Any]) -> dict[str, Any]:
    found = train(threads, save_dir=save_dir, **flags)
    (checkpoint,) = (save_dir / "checkpoints").glob("step-*")
    return {**found, "checkpoint_bytes": sum(file.stat().st_size for file in checkpoint.iterdir())}


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    few = {"lora_rank": options.rank}
    variants = {
        "all weights": {},
        f"LoRA, rank {options.rank}": few,
        f"LoRA, rank {options.rank}, q_proj,v_proj": {**few, "lora_targets": "q_proj,v_proj"},
    }
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        if options.data_path == "demo":  # without the held-out ones, whose evaluation would be measured too
            options.data_path = write_rows(work / "train.jsonl", training_conversations()[:1000])
        size = make_base(work / "base", {name: getattr(options, name) for name in LARGE})
        flags = {
            **data_flags(options), "batch_size": options.batch_size, "max_steps": options.steps, "overlong": "drop",
            "save_interval": options.steps, "from_weight": work / "base", "cache_dir": work / "cache",
            "dtype": "float32",
        }  # fmt: skip
        runs = {name: partial(run, options.threads, work / "run", flags | more) for name, more in variants.items()}
        found = in_turns(options.rounds, runs)
    print(f"{size:,} weights, steps of {options.batch_size} x {options.max_seq_len} tokens, float32\n")
    print_table(
        ("trained", "s/step", "CPU seconds/step", "peak memory in training", "of the whole run", "a checkpoint"),
        (
            (
                name, f"{median(turns, 'seconds_per_step'):.2f}", f"{median(turns, 'cpu_seconds_per_step'):.2f}",
                *(f"{median(turns, peak) / 1e9:.2f} GB" for peak in ("training_peak_bytes", "peak_bytes")),
                f"{median(turns, 'checkpoint_bytes') / 1e6:,.1f} MB",
            )
            for name, turns in found.items()
        ),
    )  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
