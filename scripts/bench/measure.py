"""What the benches share: their flags, a run of the trainer with what it took, turns, medians and tables.

A run is a process of its own, which this module is too: `python -m scripts.bench.measure FLAGS` trains with the flags
in that JSON and writes down the CPU time of each step, of all threads, which other work on the machine hardly touches.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from scripts.evaluate import positive
from training.records.metrics import read_records

ROOT = Path(__file__).resolve().parent.parent.parent
# About 30 and 100 million weights.
SMALL = {
    "hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 4,
    "intermediate_size": 1664,
}  # fmt: skip
LARGE = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 2560}
NUMBERS = {
    "rounds": "turns of each variant", "steps": "of each run", "batch_size": "rows of a micro-batch",
    "max_seq_len": "tokens of a row", "threads": "of each run", "processes": "of each run",
    "saves": "checkpoints of each run",
}  # fmt: skip
DATA = ("data_path", "prompt_field", "response_field", "max_seq_len")
CPU_TIMES = "cpu_times.json"


def parser_of(name: str, about: str, **numbers: int) -> argparse.ArgumentParser:
    """Takes the data and these numbers, which are their defaults."""
    parser = argparse.ArgumentParser(prog=f"python -m scripts.{name}", description=about.split(":")[0] + ".")
    parser.add_argument("--data_path", default="demo", help="training data, as for the trainer (default demo)")
    parser.add_argument("--prompt_field")
    parser.add_argument("--response_field")
    for number, default in numbers.items():
        said = f"{NUMBERS[number]} (default {default})"
        parser.add_argument(f"--{number}", type=positive, default=default, metavar="N", help=said)
    return parser


def data_flags(options: argparse.Namespace) -> dict[str, Any]:
    """The trainer's flags for the data that a bench was given; a path holds in any directory."""
    given = {name: getattr(options, name) for name in DATA}
    return given if options.data_path == "demo" else given | {"data_path": Path(options.data_path).resolve()}


def words_of(flags: dict[str, Any]) -> list[str]:
    return [f"--{name}={value}" for name, value in flags.items() if value is not None]


def run_child(words: list[str], threads: int | None = None) -> int:
    """Peak resident bytes of this Python with these words; raises RuntimeError with its output when it fails."""
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    environment |= {"OMP_NUM_THREADS": str(threads)} if threads else {}
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen([sys.executable, *words], cwd=ROOT, env=environment, stdout=log, stderr=log)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if status:
            log.seek(0)
            raise RuntimeError(f"{' '.join(words)} failed:\n{log.read()[-3000:]}")
    return usage.ru_maxrss * 1024


def train(
    threads: int, counted: slice = slice(1, None), *, through_transformers: bool = False, **flags: Any
) -> dict[str, Any]:
    """What a run of the trainer took: lists of what each counted step did, and figures of the whole.

    `through_transformers`: also what the built-in decoder could compute. Raises RuntimeError when the run fails.
    """
    flags |= {"device": "cpu", "report": 0, "overwrite": 1, "log_interval": 1, "eval_interval": "99epoch"}
    values = {name: str(value) for name, value in flags.items() if value is not None}
    peak = run_child(
        ["-m", "scripts.bench.measure", json.dumps(values), *["transformers"] * through_transformers], threads
    )
    records = read_records(Path(flags["save_dir"]) / "metrics.jsonl")
    steps = [record for record in records if record["kind"] == "train"]
    cpu_times = json.loads((Path(flags["save_dir"]) / CPU_TIMES).read_text())
    cpu = [after - before for before, after in itertools.pairwise([0.0, *cpu_times])]
    rates, seconds = ([step[f"train/{name}"] for step in steps] for name in ("tokens_per_second", "seconds_per_step"))
    return {
        "seconds_per_step": seconds[counted],
        "cpu_seconds_per_step": cpu[counted],
        "tokens_per_second": rates[counted],
        "tokens_per_cpu_second": [r * s / c for r, s, c in zip(rates, seconds, cpu, strict=True)][counted],
        "supervised_tokens_per_second": [step["train/supervised_tokens_per_second"] for step in steps][counted],
        "data_wait_share": [step["train/data_wait_share"] for step in steps][counted],
        "losses": [step["train/loss"] for step in steps],
        "first_step_seconds": seconds[0],
        "checkpoint_seconds": [record["seconds"] for record in records if record.get("event") == "checkpoint"],
        "training_peak_bytes": peak_while_training(records),
        "peak_bytes": peak,
    }


def peak_while_training(records: list[dict[str, Any]]) -> int:
    return max(record["memory_usage"] for record in records if record["kind"] == "epoch")


def in_turns(rounds: int, variants: dict[Any, Callable[[], Any]]) -> dict[Any, list[Any]]:
    """What each gave in each round; they take turns, so that other work on the machine hits all alike."""
    found: dict[Any, list[Any]] = {name: [] for name in variants}
    for number in range(1, rounds + 1):
        for name, act in variants.items():
            print(f"round {number} of {rounds}: {name}", file=sys.stderr, flush=True)
            found[name].append(act())
    return found


def median(turns: list[dict[str, Any]], name: str) -> float:
    """The median over all counted steps of all turns, or over all turns where a turn has one value."""
    values = [turn[name] if isinstance(turn[name], list) else [turn[name]] for turn in turns]
    return statistics.median(itertools.chain(*values))


def print_table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """In Markdown; each row as soon as it is there."""
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for row in rows:
        print(f"| {' | '.join(map(str, row))} |", flush=True)


def write_rows(path: Path, rows: Iterable[Any]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def make_base(directory: Path, shape: dict[str, int]) -> int:
    """Write a Llama of this shape with drawn weights; returns how many it has."""
    from model.build import OWN_TOKENIZER, load_tokenizer
    from model.decoder import DecoderConfig
    from model.export import export_model
    from model.loading import build_model

    network = build_model(DecoderConfig(vocab_size=len(load_tokenizer(str(OWN_TOKENIZER))), **shape), seed=0)
    export_model(directory, network, OWN_TOKENIZER)
    return sum(network.parameter_counts())


def be_child(flags: str, *through: str) -> None:
    """Train, and write down the CPU seconds until the end of each step."""
    import model.loading
    import train_full_sft
    from training.config import make_config

    if through:
        model.loading.is_builtin = lambda config: False
    values, times = json.loads(flags), []

    def tick(record: dict[str, Any]) -> None:
        if record["kind"] == "train":
            times.append(time.process_time())

    code = train_full_sft.main(make_config(values), partial(train_full_sft.run, callbacks=[tick]))
    Path(values["save_dir"], CPU_TIMES).write_text(json.dumps(times))
    train_full_sft.end_process(code)


if __name__ == "__main__":
    be_child(*sys.argv[1:])
