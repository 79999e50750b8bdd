"""A small world to train in: forty short conversations, a tiny model, and real processes forked from a warm parent."""

from __future__ import annotations

import hashlib
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from scripts.verify.ranks import FORKS, run_ranks, train_rank
from scripts.verify.ranks import resume_from as resume_from

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"  # real data; absent from most clones
TINY = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "max_seq_len": 64,
    "batch_size": 1, "epochs": 2, "learning_rate": 0.01, "dropout": 0.1, "dtype": "float32", "device": "cpu",
    "seed": 7, "log_interval": "1", "save_interval": "1", "keep_last": 99, "report": 0,
}  # fmt: skip


def write_rows(path: Path, count: int = 24, seed: int = 0) -> Path:
    """The conversations of scripts.verify, fewer of them."""
    from scripts.verify.checks import write_rows as write

    return write(path, count, seed)


def export_learnt(directory: Path, conversations: list[list[dict[str, Any]]]) -> None:
    """An exported model of a moment's training that answers these as they do, and other questions somehow."""
    import torch

    from dataset.chat import ChatRenderer
    from dataset.rows import Document, collate
    from model.build import OWN_TOKENIZER, load_tokenizer
    from model.decoder import DecoderConfig
    from model.export import export_model
    from model.loading import build_model
    from model.losses import sft_objective

    renderer = ChatRenderer(load_tokenizer(str(OWN_TOKENIZER)))
    samples = [renderer.render(messages) for messages in conversations]
    batch = collate([[Document(i, sample.ids, sample.supervised) for i, sample in enumerate(samples)]])
    config = DecoderConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96)
    model = build_model(config, seed=0)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(40):
        (sft_objective(model, batch)["ce"] / len(batch["targets"])).backward()
        optimizer.step()
        optimizer.zero_grad()
    export_model(directory, model, OWN_TOKENIZER)


def train(
    world_size: int,
    save_dir: Path,
    *,
    wrap_objective: Callable[..., Any] | None = None,
    timeout_seconds: float = 120,
    **flags: Any,
) -> list[int]:
    """Exit codes of the ranks of a run with these flags; `wrap_objective(objective, rank)` may replace the loss.

    When a rank dies the others are ended, as torchrun would.
    """
    values = {**TINY, "save_dir": str(save_dir), "cache_dir": str(save_dir.parent / "cache"), **flags}
    save_dir.parent.mkdir(parents=True, exist_ok=True)
    return run_ranks(train_rank, world_size, (values, str(save_dir), wrap_objective), timeout_seconds)


def answers_of(target: Callable[..., None], world_size: int, *args: Any) -> list[Any]:
    """What `target(rank, answer, *args)` gave to `answer` in any rank; every rank must end well."""
    queue = FORKS.SimpleQueue()  # small answers: a pipe holds 64 KiB before a writer has to wait for the reader
    assert run_ranks(target, world_size, (queue.put, *args)) == [0] * world_size
    answers = []
    while not queue.empty():
        answers.append(queue.get())
    return answers


class KillAtCall:
    """kill -9 of one rank in its n-th training pass (validation is not counted, DDP's first empty pass is)."""

    def __init__(self, call: int, victim: int = 0):
        self.call, self.victim = call, victim

    def __call__(self, objective: Callable, rank: int) -> Callable:
        calls = 0

        def deadly(model: Any, batch: Any) -> Any:
            nonlocal calls
            calls += model.training
            if rank == self.victim and calls == self.call:
                os.kill(os.getpid(), signal.SIGKILL)
            return objective(model, batch)

        return deadly


def log_of(save_dir: Path, rank: int = 0) -> str:
    return Path(f"{save_dir}.rank{rank}.log").read_text()


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def sign_again(checkpoint: Path) -> None:
    """Make the manifest say what the files of a checkpoint hold now."""
    from training.checkpoints.manifest import digest_of

    manifest = json.loads((checkpoint / "manifest.json").read_text())
    for entry in manifest["files"]:
        file = checkpoint / entry["name"]
        entry.update(size=file.stat().st_size, sha256=sha256(file))
    (checkpoint / "manifest.json").write_text(json.dumps({**manifest, "sha256": digest_of(manifest)}))


def without_events(save_dir: Path) -> dict[str, Any]:
    """`result_of` a run that was stopped or killed: one checkpoint more, or one that was made but not yet recorded."""
    result = result_of(save_dir)
    return {**result, "records": [record for record in result["records"] if record["kind"] != "event"]}


def records_of(save_dir: Path, kind: str | None = None) -> list[dict[str, Any]]:
    """What metrics.jsonl says, or what of it is of one kind."""
    records = map(json.loads, (save_dir / "metrics.jsonl").read_text().splitlines())
    return [record for record in records if kind in (None, record["kind"])]


def result_of(save_dir: Path) -> dict[str, Any]:
    """All that must be equal between two runs: weights, optimizer, position, and every logged number but time."""
    newest = sorted((save_dir / "checkpoints").glob("step-*"))[-1]
    state = json.loads((newest / "trainer_state.json").read_text())
    records = [record for record in records_of(save_dir) if record["kind"] != "system"]
    timing = ("time", "per_second", "seconds", "share", "memory", "eta")
    return {
        "final": sha256(save_dir / "final" / "model.safetensors"),
        "checkpoint": newest.name,
        "tensors": {path.name: sha256(path) for path in sorted(newest.glob("*.safetensors"))},
        "loop": state["loop"],
        "scaler": state["scaler"],
        "records": [{k: v for k, v in r.items() if not any(word in k for word in timing)} for r in records],
    }
