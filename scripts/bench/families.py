"""One network in several ways of the same loop: built in and through transformers, plain and compiled, wide and half.

    python -m scripts.bench.families --dtype float32

Random weights are written once as a Llama; every contender trains them on the same batches in a process of its own, one
after the other, round by round. Told are medians of tokens per second over all steps but the first and the last, of
tokens per CPU second (of all threads, which other work on the machine hardly touches), seconds of the first step (where
kernels are built) and the most memory that a process held.
"""

import argparse
import json
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from scripts.bench.measure import SMALL, data_flags, in_turns, make_base, median, parser_of, print_table, train
from scripts.evaluate import positive

# Flags besides those that all have, and whether transformers computes the model.
CONTENDERS: dict[str, tuple[dict[str, Any], bool]] = {
    "built-in": ({}, False),
    "transformers": ({}, True),
    "built-in, compiled": ({"use_compile": 1}, False),
    "transformers, compiled": ({"use_compile": 1}, True),
    "built-in, bfloat16 weights": ({"param_dtype": "bfloat16", "dtype": "auto"}, False),
    "built-in, checkpointing": ({"gradient_checkpointing": 1}, False),
}
RATES = ("tokens_per_second", "tokens_per_cpu_second")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = parser_of("bench_families", __doc__, rounds=3, steps=6, batch_size=4, max_seq_len=512, threads=2)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--layers", type=positive, default=SMALL["num_hidden_layers"])
    listed = ", ".join(f"{number} = {name}" for number, name in enumerate(CONTENDERS))
    everyone = ",".join(map(str, range(len(CONTENDERS))))
    parser.add_argument("--only", default=everyone, help=f"contenders, the first is what ratios are to: {listed}")
    parser.add_argument("--out", default="bench_families.json")
    return parser.parse_args(argv)


def main() -> None:
    options = parse()
    names = [list(CONTENDERS)[int(number)] for number in options.only.split(",")]
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        size = make_base(work / "base", {**SMALL, "num_hidden_layers": options.layers})
        flags = {
            **data_flags(options), "from_weight": work / "base", "dtype": options.dtype, "max_steps": options.steps,
            "batch_size": options.batch_size, "save_dir": work / "run", "save_interval": "99epoch", "skip_checks": 1,
        }  # fmt: skip
        variants = {}
        for name in names:
            more, through = CONTENDERS[name]
            variants[name] = partial(train, options.threads, slice(1, -1), through_transformers=through, **flags | more)
        turns = in_turns(options.rounds, variants)
    result: dict[str, Any] = {"parameters": size, "options": vars(options)}
    for name, runs in turns.items():
        result[name] = {
            **{kind: median(runs, kind) for kind in RATES},
            "first_step_seconds": [each["first_step_seconds"] for each in runs],
            "peak_bytes": max(each["peak_bytes"] for each in runs),
            "losses": runs[0]["losses"],
        }
    Path(options.out).write_text(json.dumps(result, indent=1), encoding="utf-8")
    print(f"\n{size / 1e6:.1f} million weights, {options.dtype}\n")
    print_table(
        ("", "tokens/s", "tokens per CPU second", "ratio", "first step", "peak memory", "last loss"),
        (
            (
                name, f"{one['tokens_per_second']:,.0f}", f"{one['tokens_per_cpu_second']:,.0f}",
                f"{one['tokens_per_cpu_second'] / result[names[0]]['tokens_per_cpu_second']:.2f}",
                f"{min(one['first_step_seconds']):.1f} s", f"{one['peak_bytes'] / 2**20:,.0f} MiB",
                f"{one['losses'][-1]:.4f}",
            )
            for name, one in ((name, result[name]) for name in names)
        ),
    )  # fmt: skip


if __name__ == "__main__":
    main()
