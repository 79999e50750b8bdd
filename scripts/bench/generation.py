"""Tokens per second of batched answers and of one after another: `python -m scripts.bench.generation runs/demo`.

The same prompts, those of the held-out demo, are answered greedily in batches of each size; the sizes take turns, and
the median of the rounds counts. That all sizes give the same answers is checked.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import statistics
import sys
import time
from functools import partial
from pathlib import Path

from scripts.bench.measure import in_turns, print_table
from scripts.evaluate import answer_all, positive, spread
from training.control.exit_codes import exit_code_of


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m scripts.bench.generation", description=__doc__.split(":")[0] + ".")
    flag = parser.add_argument
    flag("directory", metavar="DIR", type=Path, help="exported model (runs/x/final) or run (runs/x)")
    flag("--batch_sizes", metavar="N", type=positive, nargs="+", default=[1, 8, 32], help="default 1 8 32")
    flag("--prompts", metavar="N", type=positive, default=64, help="spread evenly over the demo (default 64)")
    flag("--max_new_tokens", metavar="N", type=positive, default=128, help="longest answer in tokens (default 128)")
    flag("--rounds", metavar="N", type=positive, default=5, help="default 5")
    flag("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto = CUDA where there is one (default)")
    return parser.parse_args(argv)


def measure(options: argparse.Namespace) -> tuple[dict[int, float], int]:
    """Tokens per second of each batch size, and the number of tokens of all answers."""
    from dataset.chat import ChatRenderer
    from dataset.demo import held_out_conversations
    from model.build import exported_directory, load_tokenizer
    from model.loading import load_model
    from training.device import choose_device

    directory = exported_directory(options.directory)
    model = load_model(directory).to(choose_device(options.device)).eval()
    tokenizer = load_tokenizer(str(directory))
    renderer = ChatRenderer(tokenizer)
    rows = spread(held_out_conversations(), options.prompts)
    prompts = [renderer.prompt_ids(row["messages"][:-1]) for row in rows]
    expected = None

    def seconds_in(size: int) -> float:
        nonlocal expected
        started = time.perf_counter()
        with contextlib.redirect_stderr(io.StringIO()):  # it tells how far it is
            answers = answer_all(model, prompts, options.max_new_tokens, size, renderer.end_ids)
        seconds = time.perf_counter() - started
        expected = expected or answers
        if answers != expected:
            raise RuntimeError(f"answers in batches of {size} differ from those of {options.batch_sizes[0]}")
        return seconds

    found = in_turns(options.rounds + 1, {size: partial(seconds_in, size) for size in options.batch_sizes})
    count = sum(len(ids) for ids, _ in expected)
    return {size: count / statistics.median(times[1:]) for size, times in found.items()}, count


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    try:
        speeds, count = measure(options)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return exit_code_of(error)
    print(f"{options.prompts} prompts, {count} tokens of answers, the same in all sizes; {options.rounds} rounds\n")
    first = speeds[options.batch_sizes[0]]
    rows = ((size, f"{speed:,.0f}", f"{speed / first:.1f}") for size, speed in speeds.items())
    print_table(("batch size", "tokens/s", "ratio"), rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
