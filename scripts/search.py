"""Searches hyper-parameters with Optuna: each trial is a run of the trainer in processes of its own.

    python -m scripts.search --space configs/spaces/learning_rate.yaml --trials 12 --data_path train.jsonl \\
        --val_fraction 0.1

The space is a YAML file: a flag and what it may be, `learning_rate: {low: 1.0e-5, high: 1.0e-3, log: true}`,
`batch_size: {low: 4, high: 32, step: 4}` or `lr_schedule: {choices: [cosine, wsd]}`. All other flags are those of the
trainer and hold for every trial. Trials are kept in `study.db` (SQLite): the same command goes on where it was stopped.
A trial whose evaluations fall behind the median of the others is ended early.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from scripts.evaluate import positive
from scripts.verify.checks import kill
from training.config.command_line import parse_config
from training.config.config import ALTERNATIVES, Config, field_types, make_config, overlay, unknown_flag
from training.config.flags import ConfigError
from training.config.yaml_files import parse_yaml
from training.diagnosis.drawing import GREY, new_figure, save_figure
from training.records.metrics import read_records

ROOT = Path(__file__).resolve().parent.parent
KINDS = ({"low", "high"}, {"choices"})
MORE = {"log", "step"}
OWN_FLAGS = ("save_dir", "overwrite", "from_resume", "save_interval")
MAX_FAILURES = 3
LOOK_SECONDS, SECONDS_TO_STOP = 0.2, 40
PR_SET_PDEATHSIG = 1  # of prctl


def parse(argv: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.search", description=__doc__.split(":")[0] + ".", allow_abbrev=False,
        epilog="All other flags are those of the trainer: python train_full_sft.py --help",
    )  # fmt: skip
    number = {"metavar": "N", "type": positive}
    parser.add_argument("--space", metavar="FILE", required=True, help="YAML file of flags and what they may be")
    parser.add_argument("--trials", **number, default=20, help="in all, earlier ones too (default 20)")
    parser.add_argument("--study_dir", metavar="DIR", type=Path, default="runs/search", help="default runs/search")
    parser.add_argument("--processes", **number, default=1, help="of each trial (default 1)")
    parser.add_argument("--warmup_trials", **number, default=4, help="before any is ended early (default 4)")
    return parser.parse_known_args(argv)


def read_space(path: str) -> dict[str, dict[str, Any]]:
    """Flag -> what it may be. Raises ConfigError with every problem."""
    try:
        space = parse_yaml(Path(path).read_text(encoding="utf-8"), f"--space {path}")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError([f"--space {path}: cannot be read: {error}"]) from None
    if not isinstance(space, dict) or not space:
        raise ConfigError([f"--space {path}: expected 'flag: {{low: …, high: …}}' lines"])
    problems = []
    for name, choice in space.items():
        if name in OWN_FLAGS:
            problems.append(f"--space {path}: {name} is set by the search itself")
        elif name not in field_types():
            problems.append(f"--space {path}: {unknown_flag(str(name))}")
        elif not isinstance(choice, dict) or not any(kind <= choice.keys() <= kind | MORE for kind in KINDS):
            problems.append(f"--space {path}: {name} needs low and high (and log or step), or choices")
        elif "choices" in choice and not (isinstance(choice["choices"], list) and choice["choices"]):
            problems.append(f"--space {path}: {name}: choices must be a list")
        elif "low" in choice and not all(
            isinstance(choice[key], (int, float)) and not isinstance(choice[key], bool) for key in ("low", "high")
        ):
            problems.append(f"--space {path}: {name}: low and high must be numbers (1e-5 needs a dot in YAML: 1.0e-5)")
        elif "low" in choice and field_types()[name][0] not in (int, float):
            problems.append(f"--space {path}: {name} is no number: give it choices")
        elif "low" in choice and choice["low"] > choice["high"]:
            problems.append(f"--space {path}: {name}: low is above high")
        elif {"log", "step"} <= choice.keys() or not isinstance(choice.get("log", False), bool):
            problems.append(f"--space {path}: {name}: log is true or false, and goes without step")
        elif "step" in choice and not (type(choice["step"]) in (int, float) and choice["step"] > 0):
            problems.append(f"--space {path}: {name}: step must be a number greater than 0")
        elif choice.get("log") and choice["low"] <= 0:
            problems.append(f"--space {path}: {name}: with log, low must be greater than 0")
    if problems:
        raise ConfigError(problems)
    return space


def check_values(space: dict[str, dict[str, Any]], config: Config, words: list[str]) -> None:
    """Raises ConfigError for what no trial could be started with, and ValueError for what a search sets itself."""
    given = given_flags(config)
    on_the_line = {word.partition("=")[0].removeprefix("--") for word in words}
    if own := [name for name in OWN_FLAGS if name in on_the_line]:  # in a file they do no harm
        raise ValueError(f"--{own[0]}: a search sets this itself; the same command goes on where it was stopped")
    problems = [
        f"--space: {name} and --{other}, which is given, say the same in two ways: choose one"
        for name in space for pair in ALTERNATIVES if name in pair for other in pair if other in given and other != name
    ]  # fmt: skip
    for name, choice in space.items():
        for value in choice.get("choices", [choice.get("low"), choice.get("high")]):
            try:
                make_config(overlay(given, {name: value}))
            except ConfigError as error:
                problems += [f"--space: {problem}" for problem in error.problems]
    if problems:
        raise ConfigError(problems)


def given_flags(config: Config) -> dict[str, Any]:
    """The flags that every trial has; a table of stages by its full name."""
    given = config.given
    if "stages" in given and not given["stages"].lstrip().startswith("["):
        given["stages"] = str(Path(given["stages"]).resolve())
    return given


def suggest(trial: Any, space: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """A value for each flag, drawn by the study's sampler."""
    values = {}
    for name, choice in space.items():
        more = {key: choice[key] for key in MORE & choice.keys()}
        if "choices" in choice:
            values[name] = trial.suggest_categorical(name, choice["choices"])
        elif field_types()[name][0] is int:
            values[name] = trial.suggest_int(name, choice["low"], choice["high"], **more)
        else:
            values[name] = trial.suggest_float(name, choice["low"], choice["high"], **more)
    return values


def end_with_parent() -> None:
    """In a new process: have the system end it when the search dies, however it dies. Only Linux can."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


@contextlib.contextmanager
def running(words: list[str], processes: int, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """The trainer in a process group of its own, of which nothing outlives the block."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = [sys.executable, *(launcher if processes > 1 else ()), *words]
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
    with open(log, "wb") as file:
        job = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=file, stderr=file, start_new_session=True,
            preexec_fn=end_with_parent,
        )  # fmt: skip
    try:
        yield job
    finally:
        if job.poll() is None:
            job.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                job.wait(SECONDS_TO_STOP)
        kill(job)


def evaluations(run: Path, metric: str) -> dict[int, float]:
    """Step -> value of the metric, of what the run has written so far."""
    with contextlib.suppress(OSError):
        records = read_records(run / "metrics.jsonl")
        return {r["step"]: r[metric] for r in records if r["kind"] == "eval" and r.get(metric) is not None}
    return {}


class Search:
    def __init__(self, options: argparse.Namespace, config: Config, space: dict[str, dict[str, Any]]):
        self.options, self.config, self.space, self.failures = options, config, space, 0

    def train(self, trial: Any) -> float:
        """The best value that a run with the suggested flags reached. Raises TrialPruned, or RuntimeError."""
        import optuna

        run = (self.options.study_dir / f"trial-{trial.number:04d}").resolve()
        values = suggest(trial, self.space)
        own = {"save_dir": str(run), "overwrite": True, "save_interval": str(10**9), "report": False}
        settings = run.with_suffix(".yaml")
        settings.write_text(yaml.safe_dump({**overlay(given_flags(self.config), values), **own}, allow_unicode=True))
        program = ["-m", "scripts.train_distillation"] if self.config.teacher else ["train_full_sft.py"]
        words = [*program, f"--config={settings}"]
        print(f"trial {trial.number}: " + ", ".join(f"{name} {values[name]}" for name in self.space), flush=True)
        told: set[int] = set()
        with running(words, self.options.processes, run.with_suffix(".log")) as job:
            ended = False
            while not ended:
                ended = job.poll() is not None
                for step, value in sorted(evaluations(run, self.config.monitor_metric).items()):
                    if step not in told:
                        told.add(step)
                        trial.report(value, step)
                        if not ended and trial.should_prune():
                            print(f"trial {trial.number}: ended early after step {step}, {value:.4f}", flush=True)
                            raise optuna.TrialPruned
                time.sleep(0 if ended else LOOK_SECONDS)
        found = evaluations(run, self.config.monitor_metric).values()
        if not (job.returncode or found):
            raise RuntimeError(
                f"no evaluation gave --monitor_metric {self.config.monitor_metric}, see {run}/metrics.jsonl"
            )
        if job.returncode:
            lines = run.with_suffix(".log").read_text(encoding="utf-8", errors="replace").splitlines()
            said = next((line for line in lines if line.startswith("error:")), (lines or ["nothing was said"])[-1])
            raise RuntimeError(f"exit code {job.returncode}: {said} (all of it: {run.with_suffix('.log')})")
        best = min(found) if self.config.monitor_mode == "min" else max(found)
        print(f"trial {trial.number}: {self.config.monitor_metric} {best:.4f}", flush=True)
        return best

    def run(self) -> Any:
        """The study, once it has as many trials as wished. RuntimeError where nothing but failures comes."""
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.options.study_dir.mkdir(parents=True, exist_ok=True)
        study = optuna.create_study(
            study_name="search", storage=f"sqlite:///{(self.options.study_dir / 'study.db').resolve()}",
            direction="minimize" if self.config.monitor_mode == "min" else "maximize", load_if_exists=True,
            sampler=optuna.samplers.TPESampler(seed=self.config.seed),
            pruner=optuna.pruners.MedianPruner(n_startup_trials=self.options.warmup_trials),
        )  # fmt: skip
        self._check_same(study)
        state = optuna.trial.TrialState
        for cut in study.get_trials(deepcopy=False, states=(state.RUNNING,)):  # of a search that was killed
            study.tell(cut.number, state=state.FAIL)
            study.enqueue_trial(cut.params)
            print(f"trial {cut.number} was cut off, its values are tried again", flush=True)
        while len(study.get_trials(deepcopy=False, states=(state.COMPLETE, state.PRUNED))) < self.options.trials:
            trial = study.ask()
            try:
                study.tell(trial, self.train(trial))
                self.failures = 0
            except optuna.TrialPruned:
                study.tell(trial, state=state.PRUNED)
            except RuntimeError as error:
                study.tell(trial, state=state.FAIL)
                self.failures += 1
                print(f"trial {trial.number} failed: {error}", file=sys.stderr, flush=True)
                if self.failures >= MAX_FAILURES:
                    raise RuntimeError(f"{self.failures} trials in a row have failed") from None
        return study

    def _check_same(self, study: Any) -> None:
        """Trials can be compared only where all flags but those of the space are the same. Raises ValueError."""
        own = {*self.space, *OWN_FLAGS}
        flags = {name: value for name, value in asdict(self.config).items() if name not in own}
        same = json.dumps([self.space, flags, self.options.processes], sort_keys=True)
        if study.trials and study.user_attrs.get("search", same) != same:
            raise ValueError(f"--study_dir {self.options.study_dir} holds a search with other flags or another space")
        study.set_user_attr("search", same)


def write_results(study: Any, space: dict[str, dict[str, Any]], metric: str, study_dir: Path) -> None:
    """results.md, a table from the best trial to the worst, and results.png."""
    sign = 1 if study.direction.name == "MINIMIZE" else -1
    trials = [trial for trial in study.trials if trial.state.name in ("COMPLETE", "PRUNED")]
    done = sorted((t for t in trials if t.state.name == "COMPLETE"), key=lambda trial: sign * trial.value)
    lines = [f"| trial | {metric} | " + " | ".join(space) + " |", "|---" * (2 + len(space)) + "|"]
    for trial in (*done, *(t for t in trials if t.state.name == "PRUNED")):
        value = f"{trial.value:.4f}" if trial.state.name == "COMPLETE" else "ended early"
        chosen = (trial.params[name] for name in space)
        cells = (f"{each:.4g}" if isinstance(each, float) else str(each) for each in chosen)
        lines.append(f"| {trial.number} | {value} | " + " | ".join(cells) + " |")
    (study_dir / "results.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))
    draw(done, space, metric, study_dir / "results.png")
    print(f"table and plot: {study_dir}/results.md, {study_dir}/results.png")


def draw(done: list[Any], space: dict[str, dict[str, Any]], metric: str, path: Path) -> None:
    """The metric over each searched flag, a panel for each."""
    figure, panels = new_figure(1, len(space), size=(4 * len(space), 3.5), sharey=True)
    for axes, (name, choice) in zip(panels[0], space.items(), strict=True):
        values = [str(trial.params[name]) if "choices" in choice else trial.params[name] for trial in done]
        axes.scatter(values, [trial.value for trial in done], c=[t.number for t in done], cmap="viridis", s=28)
        axes.set(xlabel=name)
        if choice.get("log"):
            axes.set_xscale("log")
    panels[0][0].set(ylabel=metric)
    figure.suptitle("darker is earlier", fontsize=9, color=GREY)
    save_figure(figure, path)


def main(argv: list[str] | None = None) -> int:
    options, words = parse(argv)
    for number in (signal.SIGTERM, signal.SIGHUP):  # so that the trial is ended too
        signal.signal(number, lambda *_: sys.exit(143))
    try:
        config, _ = parse_config(words)
        space = read_space(options.space)
        check_values(space, config, words)
        if not (config.val_data_path or config.val_fraction or config.data_path == "demo"):
            raise ValueError("a search needs held-out data: --val_data_path or --val_fraction")
        study = Search(options, config, space).run()
    except (ValueError, RuntimeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 70 if isinstance(error, RuntimeError) else 74
    write_results(study, space, config.monitor_metric, options.study_dir)
    return 0


if __name__ == "__main__":
    sys.exit(main())
