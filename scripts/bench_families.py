"""One network in several ways of the same loop: built in and through transformers, plain and compiled, wide and half.

    python -m scripts.bench_families --dtype float32

Random weights are written once as a Llama; every contender trains them on the same batches in a process of its own, one
after the other, round by round. Told are medians of tokens per second over all steps but the first and the last, of
tokens per second of computing (CPU time of all threads, which other work on the machine hardly touches), seconds of the
first step (where kernels are built) and the most memory that a process held.
"""

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

from scripts.bench import SHAPE, measured

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
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_path", default="demo", help="training data, as for the trainer")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--threads", type=int, default=2, help="threads of each contender")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each contender")
    parser.add_argument("--steps", type=int, default=6, help="steps of a turn")
    parser.add_argument("--batch_size", type=int, default=4, help="rows of a micro-batch")
    parser.add_argument("--max_seq_len", type=int, default=512)
    parser.add_argument("--layers", type=int, default=SHAPE["num_hidden_layers"])
    listed = ", ".join(f"{number} = {name}" for number, name in enumerate(CONTENDERS))
    everyone = ",".join(map(str, range(len(CONTENDERS))))
    parser.add_argument("--only", default=everyone, help=f"contenders, the first is what ratios are to: {listed}")
    parser.add_argument("--out", default="bench_families.json")
    parser.add_argument("--contender", help=argparse.SUPPRESS)  # the flags of one run, in a process of its own
    return parser.parse_args(argv)


def contend(flags: dict[str, Any], through_transformers: bool, out: str) -> None:
    """The trainer as it is; what the built-in decoder could compute is left to transformers where that is asked."""
    import model.loading
    import train_full_sft
    from training.config import make_config

    if through_transformers:
        model.loading.is_builtin = lambda config: False
    busy: list[float] = []  # CPU seconds until the end of each step

    def tick(record: dict[str, Any]) -> None:
        if record["kind"] == "train":
            busy.append(time.process_time())

    code = train_full_sft.main(make_config(flags), partial(train_full_sft.run, callbacks=[tick]))
    Path(out).write_text(json.dumps(busy))
    train_full_sft.end_process(code)


def run(options: argparse.Namespace, directory: Path, name: str) -> dict[str, Any]:
    """One turn of a contender, read back from its metrics."""
    more, through_transformers = CONTENDERS[name]
    flags = {
        "from_weight": str(directory / "weights"), "data_path": options.data_path, "device": "cpu",
        "dtype": options.dtype, "max_steps": options.steps, "batch_size": options.batch_size,
        "max_seq_len": options.max_seq_len, "save_dir": str(directory / "run"), "overwrite": 1, "report": 0,
        "log_interval": 1, "save_interval": "99epoch", "eval_interval": "99epoch", "skip_checks": 1, **more,
    }  # fmt: skip
    told = json.dumps([flags, through_transformers, str(directory / "busy.json")])
    peak, _ = measured([sys.executable, "-m", "scripts.bench_families", "--contender", told], options.threads)
    lines = (directory / "run" / "metrics.jsonl").read_text().splitlines()
    steps = [record for record in map(json.loads, lines) if record["kind"] == "train"]
    busy = json.loads((directory / "busy.json").read_text())
    rates = [step["train/tokens_per_second"] for step in steps]
    tokens = [rate * step["train/seconds_per_step"] for rate, step in zip(rates, steps, strict=True)]
    spent = [end - begin for begin, end in zip(busy, busy[1:], strict=False)]
    return {
        "tokens_per_second": rates[1:-1],
        "tokens_per_cpu_second": [count / cpu for count, cpu in zip(tokens[1:], spent, strict=True)][:-1],
        "first_step_seconds": steps[0]["train/seconds_per_step"],
        "losses": [step["train/loss"] for step in steps],
        "peak_bytes": peak,
    }


def main() -> None:
    options = parse()
    if options.contender:
        contend(*json.loads(options.contender))
        return
    from model.choose import OWN_TOKENIZER, load_tokenizer
    from model.decoder import DecoderConfig
    from model.export import export_model
    from model.loading import build_model

    directory = Path(tempfile.mkdtemp(prefix="bench-"))
    names = [list(CONTENDERS)[int(number)] for number in options.only.split(",")]
    turns: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    try:
        shape = {**SHAPE, "num_hidden_layers": options.layers}
        config = DecoderConfig(vocab_size=len(load_tokenizer(str(OWN_TOKENIZER))), **shape)
        network = build_model(config, seed=0)
        export_model(directory / "weights", network, OWN_TOKENIZER)
        for number in range(1, options.rounds + 1):
            for name in names:
                turns[name].append(run(options, directory, name))
                speed = statistics.median(turns[name][-1]["tokens_per_second"])
                print(f"round {number} of {options.rounds}: {name} {speed:,.0f} tokens/s", flush=True)
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    result: dict[str, Any] = {"parameters": sum(network.parameter_counts()), "options": vars(options)}
    for name, runs in turns.items():
        result[name] = {
            **{kind: statistics.median(rate for each in runs for rate in each[kind]) for kind in RATES},
            "first_step_seconds": [each["first_step_seconds"] for each in runs],
            "peak_bytes": max(each["peak_bytes"] for each in runs),
            "losses": runs[0]["losses"],
        }
    Path(options.out).write_text(json.dumps(result, indent=1), encoding="utf-8")
    first = result[names[0]]["tokens_per_cpu_second"]
    print(f"\n{result['parameters'] / 1e6:.1f} million weights, {options.dtype}\n")
    print("| | tokens/s | tokens per CPU second | ratio | first step | peak memory | last loss |\n|" + "---|" * 7)
    for name in names:
        one = result[name]
        print(
            f"| {name} | {one['tokens_per_second']:,.0f} | {one['tokens_per_cpu_second']:,.0f} | "
            f"{one['tokens_per_cpu_second'] / first:.2f} | "
            f"{min(one['first_step_seconds']):.1f} s | {one['peak_bytes'] / 2**20:,.0f} MiB | {one['losses'][-1]:.4f} |"
        )


if __name__ == "__main__":
    main()
