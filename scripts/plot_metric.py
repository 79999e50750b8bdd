"""Draws one metric of several runs over the tokens that they have trained, the stages of the first as bands.

python -m scripts.plot_metric runs/plain runs/curriculum --metric eval/loss --out metric.png
"""

import argparse
import json
import sys
from bisect import bisect_right
from pathlib import Path
from typing import Any

from training.diagnosis.drawing import draw_bands, new_figure, save_figure
from training.records.metrics import read_records


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m scripts.plot_metric", description=__doc__.split(",")[0] + ".")
    parser.add_argument("runs", metavar="RUN", type=Path, nargs="+", help="directories of runs")
    parser.add_argument("--metric", metavar="NAME", default="eval/loss", help="default eval/loss")
    parser.add_argument("--out", metavar="FILE", type=Path, default=Path("metric.png"), help="default metric.png")
    return parser.parse_args(argv)


def curve(run: Path, metric: str) -> tuple[list[float], list[float], list[dict[str, Any]], list[float]]:
    """(millions of tokens, values, announced stages, where those begin). ValueError where there is nothing to draw."""
    records = read_records(run / "metrics.jsonl")
    logged = [(r["step"], r["train/tokens"] / 1e6) for r in records if r["kind"] == "train" and "train/tokens" in r]
    steps, tokens = [step for step, _ in logged], [count for _, count in logged]

    def tokens_at(step: int) -> float:
        return tokens[max(0, bisect_right(steps, step) - 1)]

    points = [(r["step"], r[metric]) for r in records if r.get(metric) is not None]
    if not points or not steps:
        names = sorted({name for r in records for name in r if "/" in name})
        raise ValueError(f"{run} has no {metric}, only {', '.join(names)}")
    stages = [r for r in records if r.get("event") == "stage"]
    places = [tokens_at(step) for step, _ in points]
    return places, [value for _, value in points], stages, [tokens_at(r["step"] - 1) for r in stages]


def draw(runs: list[Path], metric: str, path: Path) -> None:
    curves = [curve(run, metric) for run in runs]
    figure, ((axes,),) = new_figure()
    for run, (places, values, _, _) in zip(runs, curves, strict=True):
        axes.plot(places, values, marker="o", markersize=3, linewidth=1.5, label=run.name)
    _, _, stages, begins = curves[0]
    if stages:
        limits = [0.0, *begins[1:], max(places[-1] for places, *_ in curves)]
        draw_bands([axes], [(s["name"], *limits[number : number + 2]) for number, s in enumerate(stages)])
    axes.set(xlabel="million tokens trained", ylabel=metric)
    axes.legend(frameon=False)
    save_figure(figure, path)


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    try:
        draw(options.runs, options.metric, options.out)
    except (ValueError, OSError, json.JSONDecodeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 74 if isinstance(error, OSError) else 2
    print(f"plot: {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
