"""What a teacher is worth: `python -m scripts.bench.distillation runs/demo`, where the teacher is the trained demo.

Trains a student of half its width on few conversations of the demo, once alone and once under the teacher, for each
seed: the same rows in the same order, the same steps. Prints the loss on the held-out conversations, the cross entropy
for both, and how many of the answers are exact.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dataset.demo import held_out_conversations, training_conversations
from scripts.bench.measure import print_table, run_child, words_of, write_rows
from scripts.evaluate import positive
from training.records.run_files import read_history

STUDENT = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 192}


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m scripts.bench.distillation", description=__doc__.split(":")[0])
    parser.add_argument("teacher", metavar="RUN", help="the trained demo: bash scripts/quickstart.sh leaves runs/demo")
    parser.add_argument("--samples", type=positive, default=300, metavar="N", help="of the student (default 300)")
    parser.add_argument("--steps", type=positive, default=300, metavar="N", help="of the student (default 300)")
    parser.add_argument("--seeds", type=positive, default=3, metavar="N", help="from 1 to this (default 3)")
    parser.add_argument("--alpha", type=float, default=0.7, metavar="X", help="default 0.7")
    parser.add_argument("--temperature", type=float, default=1.0, metavar="X", help="default 1")
    return parser.parse_args(argv)


def train(module: list[str], save_dir: Path, **flags: Any) -> tuple[float, float]:
    """Held-out loss and share of exact answers at the end of a run. RuntimeError with its output if it fails."""
    run_child([*module, *words_of({**STUDENT, **flags, "save_dir": save_dir})])
    history = read_history(save_dir, "eval")
    return history["eval/loss"][-1], history["eval/exact_match"][-1]


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    taught_by = [
        "-m", "scripts.train_distillation", f"--teacher={options.teacher}", f"--alpha={options.alpha}",
        f"--temperature={options.temperature}",
    ]  # fmt: skip
    gains: list[float] = []
    with tempfile.TemporaryDirectory() as scratch:
        rows, folder = training_conversations(), Path(scratch)
        chosen = rows[:: max(1, len(rows) // options.samples)][: options.samples]
        flags = {
            "data_path": write_rows(folder / "train.jsonl", chosen), "cache_dir": folder / "cache", "max_seq_len": 512,
            "val_data_path": write_rows(folder / "held_out.jsonl", held_out_conversations()), "device": "cpu",
            "batch_size": 2, "max_steps": options.steps, "learning_rate": 4e-3, "warmup_ratio": 0.05,
            "eval_interval": options.steps, "save_interval": options.steps, "eval_samples": 140,
        }  # fmt: skip

        def pairs() -> Iterator[tuple[Any, ...]]:
            for seed in range(1, options.seeds + 1):
                alone, exact_alone = train(["train_full_sft.py"], folder / f"alone-{seed}", **flags, seed=seed)
                taught, exact_taught = train(taught_by, folder / f"taught-{seed}", **flags, seed=seed)
                gains.append(alone - taught)
                yield seed, f"{alone:.4f}", f"{taught:.4f}", f"{exact_alone:.1%}", f"{exact_taught:.1%}"

        print_table(("seed", "alone", "taught", "exact alone", "exact taught"), pairs())
    print(f"median gain {statistics.median(gains):.4f} nats per token")
    return 0


if __name__ == "__main__":
    sys.exit(main())
