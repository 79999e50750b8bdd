"""From the data flags of a run to its packed rows: the one call that the trainer makes."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from dataset.demo import write_demo
from dataset.epoch_rows import DrawnRows, EpochDraw, StagedDraw
from dataset.errors import DataError
from dataset.ledger import report_of
from dataset.packing import plan_rows
from dataset.prepare import DataOptions, prepare
from dataset.rows import PackedRows
from dataset.shuffle import shuffled, split
from dataset.sources import Source, find_sources
from dataset.store import JoinedStore
from dataset.system_prompts import SystemPrompts
from dataset.tokenizer import hash_tokenizer

DEMO = "demo"


@dataclass(frozen=True)
class DataRequest:
    """What a run, or one stage of it, is trained and validated on; the fields are flags of the trainer."""

    data_path: str
    val_data_path: str | None = None
    val_fraction: float = 0.0
    seed: int = 42
    packing: bool = True
    repack: bool = False
    files_per_epoch: int | None = None
    file_fraction: float = 1.0
    max_tokens: int | None = None
    system_prompts: str | None = None
    system_prompt_ratio: float = 0.2
    cache_dir: str = ".cache/tokens"
    tokenize_workers: int | None = None
    options: DataOptions = field(default_factory=DataOptions)


@dataclass(frozen=True)
class RunData:
    """What is trained on and what is held out; the identities change whenever a resume would see other data."""

    train: DrawnRows
    held_out: PackedRows | None
    by_source: dict[str, PackedRows]  # what is held out, as validation reads it
    report: dict[str, Any]
    identity: dict[str, Any]
    held_out_identity: str
    rejects: list[dict[str, Any]]


def load_rows(
    request: DataRequest, tokenizer: PreTrainedTokenizerFast, owner: bool, echo: Callable[[str], None],
    rejects_file: Path | None = None, stages: Sequence[tuple[DataRequest, int]] = (),
) -> RunData:  # fmt: skip
    """Tokenise once (the owner; other processes wait for its files), hold out, and pack.

    `stages`: what each stage of the run is trained on, and its epochs; what is not about training is that of `request`.
    Raises DataError with the defects of all files, after they are written to `rejects_file`, one JSON object per line.
    """
    stages = stages or [(request, 1)]
    passed_over: set[str] = set()
    parts, val_sources = _find_files(request, [each for each, _ in stages], passed_over.add)
    for line in sorted(passed_over) if owner else ():
        echo(line)
    sources = list({source.path: source for part in parts for source in part}.values())
    longest = max(each.options.max_seq_len for each, _ in stages)
    plain = prompted = replace(request.options, max_seq_len=longest)
    if request.system_prompts:
        prompts = SystemPrompts.from_file(request.system_prompts, request.system_prompt_ratio, request.seed)
        prompted = replace(plain, system_prompts=prompts)
    hashes = hash_tokenizer(tokenizer)
    stores, defects, every = [], [], []
    for source, options in [*((each, prompted) for each in sources), *((each, plain) for each in val_sources)]:
        try:
            stores.append(
                prepare(
                    source.path, tokenizer, options, request.cache_dir, owner, echo,
                    processes=request.tokenize_workers, tokenizer_hashes=hashes,
                )
            )  # fmt: skip
        except DataError as error:
            defects, every = defects + error.defects, every + error.every
    if defects:
        place = write_rejects(rejects_file, [asdict(each) for each in every]) if rejects_file else None
        raise DataError(defects, place)

    store, val_store = JoinedStore(stores[: len(sources)]), JoinedStore(stores[len(sources) :])
    samples, held_out = np.arange(store.num_samples), np.arange(val_store.num_samples)
    if request.val_fraction:
        (samples, held_out), val_store = split(store.conversations, request.val_fraction, request.seed), store
    places = {source.path: number for number, source in enumerate(sources)}
    draws, left_out, trained = [], [], []
    for (stage, _), part in zip(stages, parts, strict=True):
        weights = {places[source.path]: source.weight for source in part}
        chosen, dropped = _short_enough(_weigh(store, samples, weights, request.seed), store, stage)
        left_out.append(dropped)
        trained += chosen
        draws.append(
            EpochDraw(
                chosen, store.lengths, stage.options.max_seq_len, request.packing, request.repack,
                stage.files_per_epoch, stage.file_fraction, request.seed,
            )
        )  # fmt: skip
    draw = StagedDraw(draws, [epochs for _, epochs in stages])
    train = DrawnRows(store, draw)
    val, by_source = None, {}
    if len(held_out):
        val = _packed(val_store, held_out, longest, request.packing)
        by_source = _by_source(val_store, held_out, longest, request.packing)
    for role, rows in (("train, first epoch" if draw.varies else "train", train), ("held out", val)):
        if rows:
            size = f"{len(rows.samples)} samples in {len(rows)} rows of {rows.plan.max_seq_len} tokens"
            echo(f"{role}: {size}, {rows.plan.efficiency:.1%} full")
    for (stage, _), dropped in zip(stages, left_out, strict=True):
        if dropped:
            echo(f"{dropped} samples are longer than --max_tokens {stage.max_tokens or stage.options.max_seq_len}")
    both = _also_trained(store, trained, val_store, held_out)
    if len(both) and owner:
        count = f"{len(both)} of {len(held_out)} held-out samples {'is' if len(both) == 1 else 'are'} also trained"
        echo(f"warning: {count}, the first is {val_store.where(int(both[0]))}")
    selection = hashlib.sha256(f"{draw.fingerprint} {train.plan.fingerprint}".encode()).hexdigest()
    report = {"train": report_of(train), "held_out": report_of(val) if val else None}
    if val:
        report["held_out"]["samples_also_trained"] = len(both)
    report["train"]["samples_longer_than_max_tokens"] = left_out[0]
    if len(stages) > 1:
        report["stages"] = [
            {**report_of(PackedRows(store, *draw(first))), "samples_longer_than_max_tokens": dropped}
            for first, dropped in zip(draw.starts, left_out, strict=True)
        ]
    return RunData(
        train,
        val,
        by_source,
        report=report,
        identity={
            "data": f"{store.fingerprint[:16]}/{selection[:16]}",
            "template": f"{stores[0].tokenizer_fingerprint[:16]}/{stores[0].template_fingerprint[:16]}",
        },
        held_out_identity=f"{val_store.fingerprint[:16]}/{val.plan.fingerprint[:16]}" if val else "none",
        rejects=[{"path": each.source, **reject} for each in stores for reject in each.report["rejects"]],
    )


def _find_files(
    request: DataRequest, stages: Sequence[DataRequest], say: Callable[[str], None]
) -> tuple[list[list[Source]], list[Source]]:  # fmt: skip
    """The files that each stage is trained on, and those held out; ValueError for what makes no sense."""
    val_data_path, parts = request.val_data_path, []
    for stage in stages:
        data_path = stage.data_path
        if data_path == DEMO:
            train_path, held_out_path = write_demo(Path(request.cache_dir) / DEMO)
            data_path = str(train_path)
            val_data_path = val_data_path or (None if request.val_fraction else str(held_out_path))
        parts.append(find_sources(data_path, "--data_path", say))
        if stage.files_per_epoch is not None and stage.files_per_epoch > len(parts[-1]):
            raise ValueError(f"--files_per_epoch {stage.files_per_epoch}: --data_path names only {len(parts[-1])}")
    val_sources = find_sources(val_data_path, "--val_data_path", say) if val_data_path is not None else []
    if any(source.weight != 1 for source in val_sources):
        raise ValueError(f"--val_data_path {val_data_path}: every held-out sample counts once, so it takes no weights")
    return parts, val_sources


def _also_trained(
    store: JoinedStore, trained: list[np.ndarray], val_store: JoinedStore, held_out: np.ndarray
) -> np.ndarray:  # fmt: skip
    """The held-out samples whose tokens some trained sample has too."""
    if not len(held_out):
        return held_out
    digests, sought = store.digests[np.concatenate(trained)], val_store.digests[held_out]
    ascending = np.sort(sought)  # the few are sorted and the many looked up: np.isin would sort both
    nearest = ascending[np.searchsorted(ascending, digests).clip(max=len(ascending) - 1)]
    return held_out[np.isin(sought, digests[nearest == digests])]


def _packed(store: JoinedStore, samples: np.ndarray, max_seq_len: int, packing: bool) -> PackedRows:
    return PackedRows(store, plan_rows(store.lengths[samples], max_seq_len, packing), samples)


RESERVED_NAMES = ("ema",)  # under eval/ they mean something else


def _by_source(store: JoinedStore, samples: np.ndarray, max_seq_len: int, packing: bool) -> dict[str, PackedRows]:
    """The samples of each file in rows of their own, under its name; files of one name are told apart by numbers."""
    found: dict[str, PackedRows] = {}
    for number, each in enumerate(store.stores):
        start, end = store.starts[number : number + 2]
        part = samples[(start <= samples) & (samples < end)]
        if len(part):
            name = Path(each.source).name.split(".")[0]
            taken = sum(other.partition("#")[0] == name for other in found) + (name in RESERVED_NAMES)
            found[f"{name}#{taken + 1}" if taken else name] = _packed(store, part, max_seq_len, packing)
    return found


def write_rejects(path: Path, rejects: list[dict[str, Any]]) -> Path:
    """rejects.jsonl: one object {path, line, code, message} for each row that was left out; no file where none was."""
    if not rejects:
        path.unlink(missing_ok=True)
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(reject, ensure_ascii=False) + "\n" for reject in rejects), encoding="utf-8")
    return path


def _short_enough(
    parts: list[np.ndarray], store: JoinedStore, stage: DataRequest
) -> tuple[list[np.ndarray], int]:  # fmt: skip
    """The samples that a stage may train, and how many were left out; ValueError where nobody allowed that."""
    room = stage.options.max_seq_len
    limit = min(stage.max_tokens or room, room) + 1  # stored tokens: the last is only a target
    kept = [part[store.lengths[part] <= limit] for part in parts]
    dropped = sum(map(len, parts)) - sum(map(len, kept))
    beyond = sum(int((store.lengths[part] > room + 1).sum()) for part in parts)
    if beyond and stage.max_tokens is None and stage.options.overlong != "drop":
        raise ValueError(
            f"--max_seq_len {room} of a stage: {beyond} samples are longer; --max_tokens {room} leaves them out of it"
        )
    if not sum(map(len, kept)):
        raise ValueError(f"--max_tokens {stage.max_tokens or room}: no sample is that short")
    return kept, dropped


def _weigh(store: JoinedStore, samples: np.ndarray, weights: dict[int, float], seed: int) -> list[np.ndarray]:
    """Sample numbers of each source with its share: weight 2.5 is every sample twice and half of them once more."""
    chosen = []
    for number, weight in weights.items():
        start, end = store.starts[number : number + 2]
        part = samples[(start <= samples) & (samples < end)]
        more = round((weight % 1) * len(part))
        extra = part[shuffled(len(part), f"weights {seed}")[:more]]
        chosen.append(np.sort(np.concatenate([np.repeat(part, int(weight)), extra])))
        if len(part) and not len(chosen[-1]):
            source = store.stores[number].source
            raise ValueError(f"--data_path {source}:{weight}: with this weight none of its {len(part)} samples is left")
    return chosen
