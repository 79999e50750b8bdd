"""Shows what a run would train on: samples with their loss mask, lengths and the ledger, before anything is trained.

    python -m scripts.inspect_data --data_path train.jsonl --samples 3
    python -m scripts.inspect_data --config run.yaml --html samples.html --histogram lengths.png

All data flags of the trainer mean here what they mean there, so that what is shown is what will be trained.
"""

import argparse
import html
import sys
from pathlib import Path
from typing import Any

from scripts.evaluate import spread
from training.config.command_line import config_from_command_line
from training.control.exit_codes import exit_code_of
from training.diagnosis.drawing import BLUE, RED, YELLOW, new_figure, save_figure

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1"><title>{title}</title>
<style>
:root {{ color-scheme: light dark; }}
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }}
h2 {{ font-size: 1rem; margin: 2rem 0 .4rem; }}
pre {{ white-space: pre-wrap; overflow-wrap: anywhere; padding: .8rem; border: 1px solid #8886; border-radius: 6px; }}
mark {{ background: #3fb95055; color: inherit; border-radius: 2px; }}
small {{ color: #888; }}
</style></head><body><h1>{title}</h1><p>Supervised tokens are <mark>marked</mark>.</p>
{body}
</body></html>
"""


def natural(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0")
    return int(text)


def parse(argv: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.inspect_data", description=__doc__.split(":")[0] + ".", allow_abbrev=False,
        epilog="All other flags are those of the trainer: python train_full_sft.py --help",
    )  # fmt: skip
    parser.add_argument(
        "--samples", metavar="N", type=natural, default=5, help="samples to show, spread evenly (default 5)"
    )
    parser.add_argument("--line", metavar="N", type=int, help="show the samples of this line of the file instead")
    parser.add_argument("--ids", action="store_true", help="also list every token: id, + where it is trained, text")
    parser.add_argument(
        "--html", metavar="FILE", type=Path, help="write the samples as a page instead of to the screen"
    )
    parser.add_argument("--histogram", metavar="FILE", type=Path, help="write a histogram of the sample lengths (PNG)")
    return parser.parse_known_args(argv)


def chosen_samples(rows: Any, count: int, line: int | None, rejects: list[dict[str, Any]]) -> list[int]:
    """Sample numbers to show; ValueError that says what became of the line where it gave no sample."""
    if line is None:
        return spread(sorted(set(rows.samples.tolist())), count)
    found = [sample for sample in range(rows.store.num_samples) if rows.store.line(sample) == line]
    if not found:
        reasons = [f"{each['path']}: {each['code']} {each['message']}" for each in rejects if each["line"] == line]
        raise ValueError(f"--line {line}: no sample was made from it; {'; '.join(reasons) or 'there is no such line'}")
    return found


def token_lines(ids: Any, supervised: Any, tokenizer: Any) -> str:
    pairs = zip(ids.tolist(), supervised.tolist(), strict=True)
    return "\n".join(f"{token:>7} {'+' if trained else ' '} {tokenizer.decode([token])!r}" for token, trained in pairs)


def page(rows: Any, samples: list[int], tokenizer: Any, with_ids: bool) -> str:
    """The samples as one page without scripts; their text is escaped."""
    from dataset.chat import texts_of

    parts = []
    for sample in samples:
        ids, supervised = rows.store.tokens(sample)
        stretches = texts_of(ids, supervised, tokenizer)
        body = "".join(f"<mark>{html.escape(t)}</mark>" if trained else html.escape(t) for t, trained in stretches)
        counts = f"{len(ids)} tokens, {int(supervised[1:].sum())} supervised"
        parts.append(f"<h2>{html.escape(rows.store.where(sample))} <small>{counts}</small></h2>\n<pre>{body}</pre>")
        if with_ids:
            listed = html.escape(token_lines(ids, supervised, tokenizer))
            parts.append(f"<details><summary>tokens</summary><pre>{listed}</pre></details>")
    return PAGE.format(title="Training samples", body="\n".join(parts))


def draw_lengths(rows: Any, max_seq_len: int, path: Path) -> None:
    """Histogram of the tokens per sample, with the median and the length of a row."""
    import numpy as np

    lengths = rows.store.lengths[rows.samples]
    figure, ((axes,),) = new_figure(size=(8, 4.5))
    axes.hist(lengths, bins=np.linspace(0, lengths.max() + 1, 61), color=BLUE)
    axes.axvline(np.median(lengths), color=YELLOW, label=f"median {int(np.median(lengths))}")
    if max_seq_len <= 1.5 * lengths.max():
        axes.axvline(max_seq_len, color=RED, linestyle="--", label=f"row {max_seq_len}")
    axes.set(xlabel="tokens of a sample", ylabel="samples", title=f"{len(lengths):,} samples, {lengths.sum():,} tokens")
    axes.legend(frameon=False)
    save_figure(figure, path)


def inspect(options: argparse.Namespace, config: Any) -> None:
    from dataset.chat import show
    from dataset.ledger import report_lines
    from model.build import ModelRequest, choose_tokenizer, load_tokenizer
    from training.config.stages import read_stages
    from training.run.data import load_data

    wanted = ModelRequest(**config.model_request)
    source = choose_tokenizer(config.tokenizer, wanted.from_weight)
    tokenizer = load_tokenizer(source, config.chat_template, wanted.trust_in(source))
    data = load_data(config, read_stages(config), tokenizer, owner=True, echo=lambda line: print(line, file=sys.stderr))
    rows = data.train
    samples = chosen_samples(rows, options.samples, options.line, data.rejects)
    if options.html:
        options.html.write_text(page(rows, samples, tokenizer, options.ids), encoding="utf-8")
        print(f"samples: {options.html}")
    else:
        for sample in samples:
            ids, supervised = rows.store.tokens(sample)
            print(f"--- {rows.store.where(sample)}: {len(ids)} tokens, {int(supervised[1:].sum())} supervised")
            print(show(ids, supervised, tokenizer))
            if options.ids:
                print(token_lines(ids, supervised, tokenizer))
    if options.histogram:
        draw_lengths(rows, config.max_seq_len, options.histogram)
        print(f"lengths: {options.histogram}")
    print("\n".join(report_lines(data.report["train"])))


def main(argv: list[str] | None = None) -> int:
    options, rest = parse(argv)
    config = config_from_command_line(rest)
    try:
        inspect(options, config)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return exit_code_of(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
