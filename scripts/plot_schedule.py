"""Draws the learning rate and the loss weights of a run before it starts: every step, every stage.

    python -m scripts.plot_schedule --data_path train.jsonl --lr_schedule wsd --warmup_ratio 0.03
    python -m scripts.plot_schedule --config configs/staged.yaml --processes 8 --out schedule.png

All other flags are those of the trainer. What follows the course of the run (--lr_adapt, early stopping) is not in it.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from scripts.evaluate import positive
from training.config.command_line import config_from_command_line
from training.control.exit_codes import exit_code_of
from training.diagnosis.drawing import COLOURS, draw_bands, new_figure, save_figure


def parse(argv: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.plot_schedule", description=__doc__.split(":")[0] + ".", allow_abbrev=False,
        epilog="All other flags are those of the trainer: python train_full_sft.py --help",
    )  # fmt: skip
    parser.add_argument("--out", metavar="FILE", type=Path, default=Path("schedule.png"), help="default schedule.png")
    parser.add_argument("--processes", metavar="N", type=positive, default=1, help="of the run (default 1)")
    return parser.parse_known_args(argv)


def draw(plan: Any, path: Path) -> None:
    """The learning rate above, below it a panel for the weight of each loss term that has one; stages as bands."""
    steps = range(1, plan.total_steps + 1)
    weights = [plan.loss_weights(step) for step in steps]
    terms = sorted({term for each in weights for term in each})
    rows, height = 1 + len(terms), 3.5 + 1.8 * len(terms)
    ratios = {"height_ratios": [2, *[1] * len(terms)]}
    figure, panels = new_figure(rows, size=(9, height), sharex=True, gridspec_kw=ratios)
    axes = panels[:, 0]
    axes[0].plot(steps, [plan.lr(step) for step in steps], color=COLOURS[0], linewidth=1.5)
    axes[0].set(ylabel="learning rate")
    axes[0].set_title(f"{plan.total_steps:,} steps, {plan.epochs:,} epochs", pad=20)
    axes[0].yaxis.set_major_formatter("{x:.3g}")
    for number, term in enumerate(terms, start=1):
        values = [each.get(term, 1.0) for each in weights]
        axes[number].plot(steps, values, color=COLOURS[number % len(COLOURS)], linewidth=1.5)
        axes[number].set(ylabel=f"weight of {term}")
    if len(plan.spans) > 1:
        spans = [span for span in plan.spans if span.steps_before < plan.total_steps]
        ends = [min(span.steps_before + span.length, plan.total_steps) for span in spans]
        names = [(span.stage.name, span.steps_before + 0.5) for span in spans]
        draw_bands(axes, [(*name, end + 0.5) for name, end in zip(names, ends, strict=True)])
    axes[-1].set(xlabel="step", xlim=(0.5, plan.total_steps + 0.5))
    for each in axes:
        each.set_ylim(bottom=0.0, top=1.08 * each.get_ylim()[1])
    save_figure(figure, path)


def plan_of(config: Any, processes: int) -> Any:
    """The plan of the run that these flags would start with so many processes."""
    from model.build import ModelRequest, choose_tokenizer, load_tokenizer
    from training.config.stages import check_terms, read_stages
    from training.run.batch_size import wants_fit
    from training.run.data import load_data
    from training.schedule.plan import make_plan, rows_per_step
    from training.schedule.train_state import LoopState

    if wants_fit(config, stages := read_stages(config)):
        raise ValueError("--batch_size auto: the number is found when a run starts; name one here")
    wanted = ModelRequest(**config.model_request)
    source = choose_tokenizer(config.tokenizer, wanted.from_weight)
    tokenizer = load_tokenizer(source, config.chat_template, wanted.trust_in(source))
    check_terms(stages)
    data = load_data(config, stages, tokenizer, owner=True, echo=lambda line: print(line, file=sys.stderr))
    return make_plan(stages, data.train.rows_of, rows_per_step(stages, processes, ()), LoopState())


def main(argv: list[str] | None = None) -> int:
    options, rest = parse(argv)
    config = config_from_command_line(rest)
    try:
        from training.schedule.plan import describe_stages

        plan = plan_of(config, options.processes)
        draw(plan, options.out)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return exit_code_of(error)
    print("\n".join(describe_stages(plan, options.processes)))
    print(f"schedule: {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
