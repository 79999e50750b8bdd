"""Looks after the checkpoints of a run: `python -m scripts.checkpoints list|verify|export|prune runs/full_sft`.

DIR is a run, its checkpoints/ or, except for prune, one checkpoint. `list` says what is there, `verify` hashes it,
`export` makes a Hugging Face directory of a version, like final/, and `prune` deletes what need not be kept.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts.evaluate import positive
from scripts.inspect_data import natural
from training.checkpoints.checkpointer import has_shards, open_shards, read_trainer_state, weights_to_export
from training.checkpoints.manifest import MANIFEST, CheckpointError, UnsafeCheckpointError, read_manifest, verify
from training.checkpoints.store import CheckpointStore
from training.config.config import SHAPE_FLAGS, Config, lora_of
from training.control.exit_codes import exit_code_of
from training.control.lock import lock_run

ASIDE = "aside-"
VERSION = re.compile(r"(aside-(\d+-)?)?step-\d{8,}")
EXPORT_DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Place:
    """What DIR stands for."""

    run: Path  # holds the lock, the ledger and what is exported
    checkpoints: Path
    only: Path | None = None  # DIR is this checkpoint

    def versions(self) -> list[Path]:
        """The published checkpoints, oldest first, and then those that a branching run has set aside."""
        if self.only:
            return [self.only]
        store = CheckpointStore(self.checkpoints)
        return [store.path(step) for step in store.steps()] + self.set_aside()

    def set_aside(self) -> list[Path]:
        return sorted(path for path in self.checkpoints.glob(f"{ASIDE}*") if VERSION.fullmatch(path.name))


def find_place(directory: Path) -> Place:
    """Raises ValueError that says what was looked for."""
    directory = directory.absolute()
    if VERSION.fullmatch(directory.name) and directory.is_dir() or (directory / MANIFEST).is_file():
        return Place(_run_of(directory.parent), directory.parent, directory)
    for place in (Place(directory, directory / "checkpoints"), Place(_run_of(directory), directory)):
        if place.versions():
            return place
    raise ValueError(f"{directory} holds no checkpoint: name a run (runs/x), its checkpoints/ or a step-… in it")


def _run_of(checkpoints: Path) -> Path:
    return checkpoints.parent if checkpoints.name == "checkpoints" else checkpoints


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m scripts.checkpoints", description=__doc__.split(":")[0] + ".")
    commands = parser.add_subparsers(dest="command", required=True, metavar="list|verify|export|prune")

    def command(name: str, text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        added.add_argument("directory", metavar="DIR", type=Path, help="run, its checkpoints/ or one checkpoint")
        return added

    command("list", "show every version: when, how large, by how many ranks, its metrics, why it is kept")
    checking = command("verify", "hash every file against its manifest; exit code 74 if one is damaged")
    exporting = command("export", "write a version as a Hugging Face directory, like final/")
    for each in (checking, exporting):
        each.add_argument("--step", metavar="N", type=natural, help="the version after this step")
    exporting.add_argument("--out", metavar="DIR", type=Path, help="where to (default RUN/export-step-…)")
    exporting.add_argument("--dtype", choices=EXPORT_DTYPES, help="default: --export_dtype of the run")
    exporting.add_argument("--tokenizer", metavar="DIR", help="if that of the run is no longer where it was")
    exporting.add_argument("--from_weight", metavar="DIR", help="the same for the model that the run began with")
    exporting.add_argument("--ema", action="store_true", help="the moving averages of a run with --ema_decay")
    pruning = command("prune", "show what need not be kept, and with --yes delete it")
    pruning.add_argument("--keep_last", metavar="N", type=positive, help="newest ones to keep (default: as the run)")
    pruning.add_argument(
        "--keep_best", metavar="K", type=natural, help="best ones to keep besides (default: as the run)"
    )
    pruning.add_argument("--metric", metavar="NAME", help="what says which are best (default: as the run)")
    pruning.add_argument("--mode", choices=("min", "max"), help="whether small or large values are good")
    pruning.add_argument("--aside", action="store_true", help="also those that were set aside")
    pruning.add_argument("--yes", action="store_true", help="delete")
    return parser.parse_args(argv)


def chosen(place: Place, step: int | None) -> list[Path]:
    """The versions that --step leaves; ValueError where there is none of it."""
    found = [path for path in place.versions() if step is None or path.name == f"step-{step:08d}"]
    if not found:
        raise ValueError(f"--step {step}: not in {place.checkpoints}, which has {names(place.versions())}")
    return found


def names(paths: list[Path]) -> str:
    return ", ".join(path.name for path in paths)


def megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"


def size_of(manifest: dict[str, Any]) -> int:
    return sum(entry["size"] for entry in manifest["files"])


def ranks_of(manifest: dict[str, Any]) -> int:
    """How many processes wrote it: every one has a file of weights, an empty one too."""
    return sum(entry["name"].startswith("model-") for entry in manifest["files"])


def settings_of(place: Place) -> dict[str, Any]:
    """The flags of the run as its newest readable checkpoint holds them; the defaults where none can be read."""
    for path in reversed(place.versions()):
        try:
            settings: dict[str, Any] = read_trainer_state(path)["config"]
            return settings
        except (OSError, ValueError, KeyError):
            continue
    return vars(Config())


def store_as_kept(place: Place, options: argparse.Namespace | None = None) -> CheckpointStore:
    """The store under the retention of the run, or under what the flags say instead."""
    settings, given = settings_of(place), vars(options) if options else {}
    wanted = {
        "keep_last": given.get("keep_last") or settings["keep_last"],
        "keep_best": settings["save_top_k"] if given.get("keep_best") is None else given["keep_best"],
        "metric": given.get("metric") or settings["monitor_metric"],
        "mode": given.get("mode") or settings["monitor_mode"],
    }
    return CheckpointStore(place.checkpoints, **wanted)


def show_list(place: Place) -> int:
    store = store_as_kept(place)
    manifests = store.manifests()
    last, best = list(manifests)[-store.keep_last :], store.best(manifests)
    rows = [("version", "written", "size", "ranks", "kept as", "metrics")]
    for path in place.versions():
        try:
            manifest = read_manifest(path)
        except CheckpointError as error:
            rows.append((path.name, "", "", "", "unreadable", str(error)))
            continue
        step, aside = manifest["step"], path.name.startswith(ASIDE)
        kept = ["set aside"] * aside + ["last"] * (step in last and not aside) + ["best"] * (step in best and not aside)
        written = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime((path / MANIFEST).stat().st_mtime))
        metrics = ", ".join(f"{name} {value:.4f}" for name, value in sorted(manifest["metrics"].items()))
        size, ranks = megabytes(size_of(manifest)), str(ranks_of(manifest))
        rows.append((path.name, written, size, ranks, ", ".join(kept), metrics))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    return 0


def exit_code(error: Exception) -> int:
    """That of the trainer."""
    if isinstance(error, CheckpointError):
        return 77 if isinstance(error, UnsafeCheckpointError) else 74
    return exit_code_of(error)


def check(place: Place, step: int | None) -> int:
    """One line for each version; what was set aside may be damaged, that can be why it was."""
    worst = 0
    for path in chosen(place, step):
        try:
            manifest = verify(path)
            print(f"{path.name}  good, {len(manifest['files'])} files, {megabytes(size_of(manifest))}")
        except (CheckpointError, OSError) as error:
            if path == place.only or not path.name.startswith(ASIDE):
                worst = max(worst, exit_code(error))
            print(f"{path.name}  DAMAGED, {error}")
    return worst


def good_version(place: Place, step: int | None) -> Path:
    """The version that --step or DIR names, else the newest good one. Raises CheckpointError where it is damaged."""
    if step is None and not place.only:
        store = CheckpointStore(place.checkpoints)
        newest = store.newest_verified(warn=lambda line: print(f"warning: {line}", file=sys.stderr))
        if newest is None:
            raise ValueError(f"{place.checkpoints} holds only {names(place.set_aside())}: name one of them as DIR")
        return store.path(newest)
    (path,) = chosen(place, step)
    verify(path)
    return path


def export(place: Place, options: argparse.Namespace) -> int:
    import torch

    from dataset.chat import ChatRenderer
    from dataset.tokenizer import vocabulary_size
    from model.build import NEW, ModelRequest, choose_model, choose_tokenizer, load_tokenizer
    from model.card import model_card
    from model.export import export_model
    from model.generation_config import generation_config
    from trainer_utils import named_weights

    checkpoint = good_version(place, options.step)
    out = options.out or place.run / f"export-{checkpoint.name.removeprefix(ASIDE)}"
    if out.exists():  # what lies there might be anything, and publishing would replace it
        raise ValueError(f"{out} exists already: delete it, or name another directory with --out")
    manifest, state = read_manifest(checkpoint), read_trainer_state(checkpoint)
    settings = {**state["config"], **({"from_weight": options.from_weight} if options.from_weight else {})}
    names = ("from_weight", "param_dtype", "revision", "trust_remote_code")
    wanted = ModelRequest(**{name: settings[name] for name in names if name in settings}, lora=lora_of(settings))
    source = options.tokenizer or choose_tokenizer(settings["tokenizer"], wanted.from_weight)
    tokenizer = load_tokenizer(source, settings["chat_template"], wanted.trust_in(source))
    if wanted.from_weight == NEW:
        wanted.shape = {name: settings.get(name) for name in SHAPE_FLAGS}
    model = choose_model(wanted, vocabulary_size(tokenizer), empty=True)
    if model.adapters:
        model.adapters.check_base(state["base_digest"])
    shards = open_shards(checkpoint, "model")
    expected = {name: tuple(tensor.shape) for name, tensor in named_weights(model).items()}
    for name in sorted({*expected, *shards.shapes}):
        there, here = shards.shapes.get(name), expected.get(name)
        if there != here:
            raise ValueError(
                f"{checkpoint} does not fit the model of {wanted.from_weight}, which must have changed since: "
                f"{name} is {there} there and {here} here"
            )
    ledger = place.run / "data_report.json"
    report = json.loads(ledger.read_text(encoding="utf-8")) if ledger.is_file() else None
    card = model_card(settings, report, manifest["metrics"], manifest["step"]) if report else "# A chat model\n"
    if options.ema and not has_shards(checkpoint, "ema"):
        raise ValueError(f"{checkpoint} holds no moving averages: they come from --ema_decay")
    weights = weights_to_export(checkpoint, averaged=options.ema)
    dtype = getattr(torch, options.dtype or settings["export_dtype"])
    renderer = ChatRenderer(tokenizer)
    generation = generation_config(wanted, tokenizer, renderer.end_ids, renderer.end_texts)
    export_model(out, model, tokenizer, state_dict=weights, dtype=dtype, card=card, generation=generation)
    print(f"the model after step {manifest['step']} is in {out}")
    return 0


def prune(place: Place, options: argparse.Namespace) -> int:
    """Raises ValueError while a trainer has the run: it deletes by rules of its own."""
    if place.only:
        raise ValueError(f"{place.only} is one checkpoint: name the run whose checkpoints are to be pruned")
    with lock_run(place.run):
        store = store_as_kept(place, options)
        measured = {name for manifest in store.manifests().values() for name in manifest["metrics"]}
        if store.keep_best and store.metric not in measured:
            raise ValueError(
                f"--keep_best {store.keep_best}: no checkpoint has the metric {store.metric}, only "
                f"{', '.join(sorted(measured)) or 'none at all'}; --keep_best 0 keeps none for a metric"
            )
        newest = store.newest_verified(warn=lambda line: print(f"warning: {line}", file=sys.stderr))
        retired = [step for step in store.retired() if step != newest]
        paths = [store.path(step) for step in retired] + (place.set_aside() if options.aside else [])
        for path in paths:
            print(f"{'deleting' if options.yes else 'would delete'} {path}")
        left = [path for path in place.versions() if path not in paths]
        if options.yes:
            for path in paths:
                store.delete(path)
    print(f"{'kept' if options.yes or not paths else 'would keep'}: {names(left)}")
    if paths and not options.yes:
        print("nothing was deleted: --yes does it")
    return 0


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    try:
        place = find_place(options.directory)
        if options.command == "list":
            return show_list(place)
        if options.command == "verify":
            return check(place, options.step)
        return export(place, options) if options.command == "export" else prune(place, options)
    except (ValueError, CheckpointError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return exit_code(error)


if __name__ == "__main__":
    sys.exit(main())
