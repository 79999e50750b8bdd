"""What LoRA saves on this machine: `python -m scripts.bench_lora --data_path train.jsonl …`.

Makes a model of about 100 million parameters and trains all of it, then adapters beside all linear layers, then beside
the projections to queries and values only: each in a process of its own, in turn, again in every round. Prints medians
of a step's time on the clock and on all cores together (which others on the machine disturb less), the peak of resident
memory (while it trained, and of the whole run, which writes final/ at its end) and the size of a checkpoint.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from dataset.demo import training_conversations
from scripts.bench import measured
from scripts.evaluate import positive
from training.config import make_config

SHAPE = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 2560}

CLOCK = "clock.json"


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m scripts.bench_lora", description=__doc__.split(":")[0] + ".")
    parser.add_argument("--data_path", help="training data, as for the trainer (default: some of the demo)")
    parser.add_argument("--prompt_field")
    parser.add_argument("--response_field")
    parser.add_argument("--rank", type=positive, default=8, metavar="N", help="default 8")
    parser.add_argument("--rounds", type=positive, default=3, metavar="N", help="default 3")
    parser.add_argument("--steps", type=positive, default=6, metavar="N", help="of each run (default 6)")
    parser.add_argument("--batch_size", type=positive, default=1, metavar="N", help="rows of a step (default 1)")
    parser.add_argument("--max_seq_len", type=positive, default=512, metavar="N", help="tokens of a row (default 512)")
    parser.add_argument("--threads", type=positive, default=2, metavar="N", help="default 2")
    parser.add_argument("--flags", help=argparse.SUPPRESS)  # of the run that a child is
    for name, size in SHAPE.items():
        parser.add_argument(f"--{name}", type=positive, default=size, metavar="N", help=f"of the model, default {size}")
    return parser.parse_args(argv)


def make_base(directory: Path, shape: dict[str, int]) -> int:
    """Write a model with drawn weights; returns how many it has."""
    from model.choose import OWN_TOKENIZER, ModelRequest, choose_model, load_tokenizer
    from model.export import export_model

    model = choose_model(ModelRequest(shape=shape), len(load_tokenizer(str(OWN_TOKENIZER))))
    export_model(directory, model, OWN_TOKENIZER)
    return sum(parameter.numel() for parameter in model.parameters())


def train(options: argparse.Namespace, base: Path, run: Path, **flags: Any) -> dict[str, float]:
    """The figures of a run of the trainer; raises RuntimeError with its output when it fails."""
    given = {name: getattr(options, name) for name in ("data_path", "prompt_field", "response_field", "max_seq_len")}
    flags |= {**given, "batch_size": options.batch_size, "max_steps": options.steps, "save_interval": options.steps}
    flags |= {"from_weight": base, "save_dir": run, "cache_dir": base.parent / "cache", "device": "cpu", "report": 0}
    flags |= {"dtype": "float32", "overlong": "drop", "log_interval": 1, "eval_interval": "99epoch"}
    values = json.dumps({name: str(value) for name, value in flags.items() if value is not None})
    peak, _ = measured([sys.executable, "-m", "scripts.bench_lora", "--flags", values], options.threads)
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [record["train/seconds_per_step"] for record in records if record["kind"] == "train"][1:]
    clock = json.loads((run / CLOCK).read_text(encoding="utf-8"))
    (checkpoint,) = (run / "checkpoints").glob("step-*")
    return {
        "seconds": statistics.median(steps),
        "core_seconds": statistics.median(after - before for before, after in itertools.pairwise(clock)),
        "training": max(record["memory_usage"] for record in records if record["kind"] == "epoch"),
        "peak": peak,
        "checkpoint": sum(file.stat().st_size for file in checkpoint.iterdir()),
    }


def be_child(values: dict[str, str]) -> None:
    """Train, and write down the seconds that all cores have worked when each step was logged."""
    from train_full_sft import run

    clock: list[float] = []

    def note(record: dict[str, Any]) -> None:
        if record["kind"] == "train":
            clock.append(time.process_time())

    run(make_config(values), callbacks=[note])
    (Path(values["save_dir"]) / CLOCK).write_text(json.dumps(clock), encoding="utf-8")


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    if options.flags:
        be_child(json.loads(options.flags))
        return 0
    variants: dict[str, dict[str, Any]] = {
        "all weights": {},
        f"LoRA, rank {options.rank}": {"lora_rank": options.rank},
        f"LoRA, rank {options.rank}, q_proj,v_proj": {"lora_rank": options.rank, "lora_targets": "q_proj,v_proj"},
    }
    found: dict[str, list[dict[str, float]]] = {name: [] for name in variants}
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        if options.data_path is None:  # without the held-out ones, whose evaluation would be measured too
            options.data_path = work / "train.jsonl"
            lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in training_conversations()[:1000])
            options.data_path.write_text("".join(lines), encoding="utf-8")
        size = make_base(work / "base", {name: getattr(options, name) for name in SHAPE})
        for number in range(options.rounds):
            for name, flags in variants.items():
                found[name].append(train(options, work / "base", work / f"{number} {name}", **flags))
    print(f"{size:,} weights, steps of {options.batch_size} x {options.max_seq_len} tokens, float32\n")
    columns = ("trained", "s/step", "core seconds", "peak memory in training", "of the whole run", "a checkpoint")
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for name, results in found.items():
        middle = {key: statistics.median(result[key] for result in results) for key in results[0]}
        sizes = [f"{middle[key] / 1e9:.2f} GB" for key in ("training", "peak")]
        times = f"{middle['seconds']:.2f} | {middle['core_seconds']:.2f}"
        print(f"| {name} | {times} | {' | '.join(sizes)} | {middle['checkpoint'] / 1e6:,.1f} MB |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
