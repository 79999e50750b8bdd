"""What `scripts.verify` trains and watches: tiny models and documents, and the programs that torchrun starts for it."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from training.checkpoints.checkpointer import read_trainer_state
from training.checkpoints.store import CheckpointStore
from training.config.command_line import config_from_command_line
from training.schedule.plan import micro_batches_per_step

ENOUGH_SECONDS = 300  # for a job of a check, and for its processes to find each other


def largest(tensor: Any) -> float:
    return tensor.abs().max().item()


def tiny_model(device: Any) -> Any:
    """Float64, with weights so large that attention and positions show in the logits."""
    from model.decoder import DecoderConfig
    from model.loading import build_model

    shape = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    return build_model(DecoderConfig(**shape, initializer_range=0.3), seed=0).double().to(device).train()


def random_document(number: int, length: int) -> Any:
    """A document of `length` tokens of which all are supervised."""
    import numpy as np

    from dataset.rows import Document

    ids = np.random.default_rng(number).integers(3, 97, length)
    return Document(number, ids, np.ones(length, dtype=np.bool_))


def logits_and_gradient(model: Any, rows: list[list[Any]], dtype: Any = None) -> tuple[Any, Any]:
    """Logits (positions, V) of all rows, each a batch of its own, and the gradient of their summed loss, flat."""
    import torch

    from dataset.rows import collate
    from model.losses import sft_objective
    from training.device import to_device

    device = next(model.parameters()).device
    logits: list[Any] = []

    def collect(chunk: Any, positions: slice) -> dict[str, Any]:
        logits.append(chunk.detach())
        return {}

    model.zero_grad()
    for row in rows:
        batch = to_device(collate([row]), device)
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            model(batch, collect)
            sft_objective(model, batch)["ce"].backward()
    return torch.cat(logits), torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


# ---------------------------------------------------------------------------------------------------------------------
# Workers, which torchrun starts


def die_in_save(place: str, *flags: str) -> None:
    """The trainer, whose rank 0 kills itself in its second save: at a shard, at the manifest, or just published."""
    import train_full_sft

    fsync, rename, saves = os.fsync, os.rename, 0

    def die_if(here: bool) -> None:
        if here and saves == 2 and os.environ["RANK"] == "0":
            print(f"killed in a save: {place}", flush=True)
            os.kill(os.getpid(), signal.SIGKILL)

    def deadly_fsync(descriptor: int) -> None:
        nonlocal saves
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        if path.name.startswith("model-") and path.parent.name.startswith(".tmp-step"):
            saves += 1
        die_if(place == "shards")
        die_if(place == "published" and path.name == "checkpoints")
        fsync(descriptor)

    def deadly_rename(source: Any, target: Any, **more: Any) -> None:
        die_if(place == "manifest" and Path(source).name.startswith(".tmp-step"))
        rename(source, target, **more)

    os.fsync, os.rename = deadly_fsync, deadly_rename
    train_full_sft.end_process(train_full_sft.main(config_from_command_line([*flags])))


def witness(seen: str, last_step: str, *flags: str) -> None:
    """The trainer, which writes down step and samples of each micro-batch and is killed when `last_step` is done."""
    import train_full_sft
    from dataset.rows import FILLER
    from model.losses import sft_objective
    from trainer_utils import environment_rank

    rank, _, world_size = environment_rank()
    config = config_from_command_line([*flags])
    steps = CheckpointStore(Path(config.save_dir) / "checkpoints").steps()
    window = read_trainer_state(CheckpointStore(Path(config.save_dir) / "checkpoints").path(steps[-1])) if steps else {}
    (rows,) = window.get("global_batch_size", [config.batch_size * world_size])
    micro_batches, first = micro_batches_per_step(rows, world_size, config.batch_size), steps[-1] if steps else 0
    calls = -1 if world_size > 1 else 0  # the pass that settles the layout of DDP comes before the first step

    def watched(model: Any, batch: Any) -> Any:
        nonlocal calls
        if model.training:
            calls += 1
            step = first + -(-calls // micro_batches)
            if last_step != "0" and step > int(last_step):
                os.kill(os.getpid(), signal.SIGKILL)
            if calls:
                with open(f"{seen}-{rank}", "a", encoding="utf-8") as file:
                    file.write(json.dumps([step, [i for i in batch["sample_ids"] if i != FILLER]]) + "\n")
        return sft_objective(model, batch)

    train_full_sft.run(config, watched)
    train_full_sft.end_process(0)


def split_worker(out: str, device_name: str) -> None:
    """Five float64 updates as one batch in this process, then as all processes share them; writes the differences."""
    import torch

    from dataset.rows import FILLER, collate
    from model.losses import sft_objective
    from train_full_sft import end_process, train_step
    from trainer_utils import (
        Processes,
        RowSampler,
        SkipBatchSampler,
        Strategy,
        close_processes,
        environment_rank,
        local_part,
        parallelize,
        start_processes,
    )  # fmt: skip
    from training.config import Config
    from training.device import choose_device, to_device
    from training.run.learner import Learner
    from training.run.optimizers import make_optimizer
    from training.schedule.train_state import LoopState

    rank, local_rank, world = environment_rank()
    device, num_rows = choose_device(device_name, local_rank), 7
    documents = {n: [random_document(n, 3 + 5 * (n % 3) + n)] for n in range(num_rows)}
    documents[FILLER] = [random_document(0, 2)]
    documents[FILLER][0].supervised[:] = False

    def weights_after(processes: Any, strategy: str, batch_size: int) -> tuple[list[float], dict[str, Any]]:
        model, slots = tiny_model(device), -(-num_rows // (processes.world_size * batch_size)) * batch_size
        filler = to_device(collate([documents[FILLER]]), device)
        parallel = parallelize(model, processes, Strategy(strategy), lambda m: sft_objective(m, filler)["ce"])
        optimizer = make_optimizer(model, Config(learning_rate=0.01, weight_decay=0.1))
        scaler = torch.amp.GradScaler(device.type, enabled=False)
        learner = Learner(
            parallel, optimizer, scaler, sft_objective, processes, torch.float32, 1.0, 0, sft_objective
        )  # fmt: skip
        place = {"rank": processes.rank, "world_size": processes.world_size}
        sampler, norms = RowSampler(num_rows, **place, window_rows=num_rows, slots=slots), []
        supervised = sum(len(collate([row])["targets"]) for n, row in documents.items() if n != FILLER)
        for step in range(1, 6):
            batches = SkipBatchSampler(sampler, batch_size, sampler.begin(step, num_rows, 0))
            window = [collate([documents[n] for n in numbers]) for numbers in batches]
            norms.append(train_step(learner, window, step, 0.01, {}, supervised, LoopState())[0])
        return norms, dict(model.named_parameters())

    reference_norms, reference = weights_after(Processes(0, 0, 1, device), "ddp", num_rows)
    processes, found = start_processes(device, ENOUGH_SECONDS), {}
    for strategy in ("ddp", "fsdp") if world > 1 else ("ddp",):
        norms, weights = weights_after(processes, strategy, 1)
        gaps = [abs(a - b) for a, b in zip(norms, reference_norms, strict=True)]
        for name, tensor in weights.items():
            part, begin = local_part(tensor)
            block = tuple(slice(start, start + size) for start, size in zip(begin, part.shape, strict=True))
            gaps += [largest(part - reference[name].detach()[block])] if part.numel() else []
        micro_batches = -(-num_rows // world)
        found[f"{world} processes ({strategy}) x {micro_batches} micro-batches"] = max(gaps)
    Path(out, str(rank)).write_text(json.dumps(found))
    close_processes(processes)
    end_process(0)


WORKERS: dict[str, Callable[..., None]] = {"die_in_save": die_in_save, "witness": witness, "split": split_worker}

if __name__ == "__main__":
    WORKERS[sys.argv[1]](*sys.argv[2:])
