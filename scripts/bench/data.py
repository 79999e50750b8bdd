"""Measures the data path on a file of chat rows: `python -m scripts.bench.data --data_path train.jsonl`.

Reading and checking rows, tokenising them (against a chat template call and a tokenizer call per row, which is how
small trainers do it), starting again on what is prepared, and packing a million samples. Medians of interleaved rounds.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from scripts.evaluate import positive

TOKENISED_ROWS = 20_000  # of --rows at most


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m scripts.bench.data", description=__doc__.split(":")[0] + ".")
    flag = parser.add_argument
    flag("--data_path", metavar="FILE", type=Path, required=True, help="JSONL file of chat rows")
    flag("--prompt_field", metavar="NAME", help="name of the prompt field in rows without messages")
    flag("--response_field", metavar="NAME", help="name of the response field in rows without messages")
    flag("--max_seq_len", metavar="N", type=positive, default=1024, help="tokens of a row (default 1024)")
    flag("--rows", metavar="N", type=positive, default=100_000, help="rows to read and start on (default 100000)")
    flag("--samples", metavar="N", type=positive, default=1_000_000, help="samples to pack (default 1000000)")
    flag("--rounds", metavar="N", type=positive, default=3, help="times that each thing is measured (default 3)")
    return parser.parse_args(argv)


def seconds_of(action: Callable[[], Any]) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def repeated(path: Path, rows: int, into: Path) -> Path:
    """A file of `rows` rows: those of `path` over and over."""
    lines = [line for line in path.read_bytes().splitlines(keepends=True) if line.strip()]
    with into.open("wb") as file:
        for number in range(rows):
            file.write(lines[number % len(lines)].rstrip(b"\n") + b"\n")
    return into


def measure(options: argparse.Namespace, work: Path) -> dict[str, float]:
    import numpy as np

    from dataset.formats import Fields
    from dataset.load import DataRequest, load_rows
    from dataset.packing import plan_rows
    from dataset.prepare import DataOptions, prepare
    from dataset.reader import Conversation, read_conversations
    from model.build import OWN_TOKENIZER, load_tokenizer

    if options.data_path.suffix != ".jsonl":
        raise ValueError(f"--data_path {options.data_path}: a .jsonl file is needed")
    tokenizer, fields = load_tokenizer(str(OWN_TOKENIZER)), Fields(options.prompt_field, options.response_field)
    many = repeated(options.data_path, options.rows, work / "many.jsonl")
    some = repeated(options.data_path, min(options.rows, TOKENISED_ROWS), work / "some.jsonl")
    chats = [row for row in read_conversations(some, fields) if isinstance(row, Conversation)]
    if not chats:
        raise ValueError(f"--data_path {options.data_path}: no row can be trained; name its fields by --prompt_field")
    wanted = DataOptions(options.prompt_field, options.response_field, max_seq_len=options.max_seq_len, overlong="drop")

    def ours() -> None:
        shutil.rmtree(work / "cache", ignore_errors=True)
        prepare(some, tokenizer, wanted, work / "cache", echo=lambda _: None)

    def row_by_row() -> None:
        with some.open(encoding="utf-8") as file:
            for line, chat in zip(file, chats, strict=False):
                json.loads(line)
                text = tokenizer.apply_chat_template(chat.messages, tools=chat.tools, tokenize=False)
                _ = tokenizer(text).input_ids

    def start() -> None:
        request = DataRequest(str(many), cache_dir=str(work / "prepared"), options=wanted)
        rows = load_rows(request, tokenizer, owner=True, echo=lambda _: None).train
        _ = rows[0]

    def read() -> None:
        found = sum(isinstance(row, Conversation) for row in read_conversations(many, fields))
        assert found == options.rows, found

    lengths = np.clip(np.random.default_rng(0).lognormal(5, 1, options.samples).astype(np.int64), 2, 1025)
    start()
    times: dict[str, list[float]] = {}
    for _ in range(options.rounds):
        for name, action in (
            ("read", read), ("ours", ours), ("row by row", row_by_row), ("start", start),
            ("plan", lambda: plan_rows(lengths, 1024)),
        ):  # fmt: skip
            times.setdefault(name, []).append(seconds_of(action))
    store = prepare(some, tokenizer, wanted, work / "cache", echo=lambda _: None)
    middle = {name: median(values) for name, values in times.items()}
    return {
        f"seconds to read and check {options.rows} rows (one process)": middle["read"],
        "rows tokenised per second": len(chats) / middle["ours"],
        "tokens per second": int(store.lengths.sum()) / middle["ours"],
        "times as fast as row by row (median of rounds)": median(
            slow / fast for slow, fast in zip(times["row by row"], times["ours"], strict=True)
        ),
        f"seconds to start on {options.rows} prepared rows": middle["start"],
        f"seconds to pack {options.samples} samples": middle["plan"],
        "efficiency of the packed file": plan_rows(store.lengths, options.max_seq_len).efficiency,
        "peak memory of all this, GiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    with tempfile.TemporaryDirectory() as work:
        try:
            figures = measure(options, Path(work))
        except (ValueError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2 if isinstance(error, ValueError) else 74
        for name, value in figures.items():
            print(f"{name:60} {value:12,.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
