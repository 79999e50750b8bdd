"""Fine-tune a language model on chat data: `torchrun --nproc_per_node N train_full_sft.py --data_path FILE`.

The file reads top to bottom: `train_step` is one update, `train_epoch` the only training loop, `validate` measures, and
`run` is the whole job in numbered phases. An objective maps (model, batch) to named sums over supervised tokens; the
loop alone normalises and backpropagates, so a new loss is a new objective and never a new loop.
"""

from training.config import Config, ConfigError, config_from_command_line

if __name__ == "__main__":  # before torch is imported, so that --help and a wrong flag are answered at once
    CONFIG = config_from_command_line()

import contextlib
import itertools
import logging
import math
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

from dataset.chat import show
from dataset.load import RunData, load_rows, make_loader
from dataset.prepare import DataOptions
from dataset.reader import DataError
from dataset.rows import FILLER, PackedRows, collate
from model.card import model_card
from model.choose import choose_model, choose_tokenizer, load_tokenizer, shape_of
from model.export import export_model
from model.losses import make_sft_objective
from trainer_utils import (
    Processes,
    RowSampler,
    SkipBatchSampler,
    close_processes,
    device_name_of,
    end_process,
    environment_rank,
    find_checkpoint,
    gradient_sync,
    load_checkpoint,
    micro_batches_per_step,
    parallelize,
    peak_memory_bytes,
    save_checkpoint,
    seed_everything,
    setup_logging,
    start_processes,
    to_device,
    unwrap,
    use_deterministic_kernels,
)
from training.checkpoints import (
    CheckpointError,
    CheckpointStore,
    read_trainer_state,
    refuse_changes,
    refuse_existing_run,
    replace_json,
)
from training.control import SignalFlags
from training.environment import describe_environment
from training.metrics import WandbSink
from training.optimizers import make_optimizer
from training.plan import Plan, identity_of, make_plan
from training.records import Meter, RunRecords, duration, peak_flops
from training.state import LoopState
from training.sums import Sums, token_means

logger = logging.getLogger("train")

Batch = dict[str, Any]
Objective = Callable[[nn.Module, Batch], dict[str, Tensor]]

EXIT_CODES = {ConfigError: 2, DataError: 65, CheckpointError: 74, OSError: 74, ValueError: 2}
EXIT_BUG, EXIT_PREEMPTED = 70, 75


@dataclass
class Learner:
    """What learns, and how: the parts that one update touches."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    objective: Objective
    processes: Processes
    dtype: torch.dtype
    grad_clip: float
    seed: int

    def autocast(self) -> contextlib.AbstractContextManager:
        return torch.autocast(self.processes.device.type, self.dtype, enabled=self.dtype != torch.float32)


@dataclass
class Hooks:
    """What the loop calls at the end of a step; both need every rank."""

    save: Callable[[], None]
    evaluate: Callable[[], dict[str, float]]


# ---------------------------------------------------------------------------------------------------------------------
# The loop


def train_step(learner: Learner, window: list[Batch], step: int, lr: float, supervised: int, state: LoopState) -> float:
    """One update from this rank's micro-batches; returns the gradient norm over all ranks, before clipping.

    The gradient is the sum of all token losses of the step over `supervised`, the supervised tokens of all ranks and
    micro-batches. DDP averages over ranks, hence the factor world_size. A norm that is not finite changes nothing.
    """
    processes, optimizer, scaler = learner.processes, learner.optimizer, learner.scaler
    for group in optimizer.param_groups:
        group["lr"] = lr

    for micro, batch in enumerate(window):
        batch = to_device(batch, processes.device)
        seed_everything(learner.seed, step, micro, processes.rank)  # dropout needs no generator state in checkpoints
        with gradient_sync(learner.model, enabled=micro == len(window) - 1):
            with learner.autocast():
                terms = learner.objective(learner.model, batch)
            loss = sum(term for term in terms.values() if term.requires_grad)
            scaler.scale(loss * (processes.world_size / supervised)).backward()
        for sums in (state.since_log, state.since_epoch):
            sums.add(terms, supervised=len(batch["targets"]), tokens=len(batch["input_ids"]))

    scaler.unscale_(optimizer)
    norm = nn.utils.clip_grad_norm_(learner.model.parameters(), learner.grad_clip or math.inf).item()
    if math.isfinite(norm):
        scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return norm


def train_epoch(
    learner: Learner,
    loader: DataLoader,
    micro_batches: int,
    state: LoopState,
    plan: Plan,
    records: RunRecords,
    signals: SignalFlags,
    hooks: Hooks,
) -> str | None:
    """Train what is left of an epoch; returns why the run ends early, or None. Checkpoints exist only between steps."""
    processes, meter = learner.processes, Meter()
    windows = fetch_windows(loader, micro_batches)
    while state.step < plan.total_steps:
        # 1. fetch
        with meter.waiting():
            window, problem = next(windows, (None, None))
        if window is None:
            break

        # 2. agree: the one exchange of plain numbers between the ranks in a step
        supervised = sum(len(batch["targets"]) for batch in window)
        tokens = sum(len(batch["input_ids"]) for batch in window)
        flags = [bool(signals.stop), bool(signals.save), problem is not None]
        supervised, tokens, stop, save, failed = processes.sum_ints([supervised, tokens, *flags])
        if failed:
            raise problem or RuntimeError("another rank could not load its data, see its message")
        if stop:
            hooks.save()
            return "stopped by a signal"

        # 3. update
        lr = plan.lr(state.step + 1)
        norm = train_step(learner, window, state.step + 1, lr, supervised, state)

        # 4. advance
        state.advance(plan.window_rows, plan.num_rows, tokens, supervised)
        meter.count(tokens, supervised)
        judge_norm(learner, norm, window, state, records, loader.dataset)

        # 5. log, validate, save
        ends_epoch, ends_run = state.rows == plan.num_rows, state.step == plan.total_steps
        if plan.due(state.step, plan.log_steps):
            means = token_means(state.since_log.total(processes.sum_ints), "train")
            state.since_log = Sums()
            records.log_step(state, plan, {**means, "train/learning_rate": lr, "train/grad_norm": norm}, meter)
        results = hooks.evaluate() if plan.due(state.step, plan.eval_steps) else {}
        if ends_epoch or ends_run:
            means = token_means(state.since_epoch.total(processes.sum_ints), "train")
            records.log_epoch(
                state, {**means, **results, "train/learning_rate": lr}, meter, peak_memory_bytes(processes.device)
            )
        if ends_epoch:  # also a checkpoint made now points at the start of the next epoch
            state.next_epoch()
        if plan.due(state.step, plan.save_steps) or save:
            signals.save = 0
            hooks.save()
        records.step_done(state, plan)
    return None


def fetch_windows(loader: DataLoader, micro_batches: int) -> Iterator[tuple[list[Batch], Exception | None]]:
    """The micro-batches of one step at a time, or what went wrong: all ranks hear of it before one of them raises."""
    try:
        batches = iter(loader)
        while window := list(itertools.islice(batches, micro_batches)):
            yield window, None
    except Exception as problem:
        yield [], problem


def judge_norm(
    learner: Learner, norm: float, window: list[Batch], state: LoopState, records: RunRecords, rows: PackedRows
) -> None:
    """Count and report a step whose gradient was not finite; raises NonFiniteError when there are too many."""
    if math.isfinite(norm):
        state.non_finite_in_a_row = 0
    elif learner.scaler.is_enabled() and learner.scaler.get_scale() >= 1.0:
        state.overflows += 1  # routine in fp16: the loss scale was too high and has just been halved
    else:
        samples = [rows.store.where(i) for batch in window for i in batch["sample_ids"] if i != FILLER]
        logger.warning(
            "step %d: gradient norm %s, weights left alone; samples of this rank: %s", state.step, norm, samples
        )
        records.event(state.step, "non_finite_gradient", samples=samples)
        state.count_non_finite()


@torch.no_grad()
def validate(learner: Learner, loader: DataLoader) -> dict[str, float]:
    """Means over every supervised token of the held-out data: summed over ranks first, divided once."""
    model, sums = unwrap(learner.model), Sums()
    model.eval()
    for batch in loader:
        batch = to_device(batch, learner.processes.device)
        with learner.autocast():
            terms = learner.objective(model, batch)
        sums.add(terms, supervised=len(batch["targets"]), tokens=len(batch["input_ids"]))
    model.train()
    return token_means(sums.total(learner.processes.sum_ints), "eval")


# ---------------------------------------------------------------------------------------------------------------------
# The job


def run(config: Config, objective: Objective | None = None) -> dict[str, Any]:
    """Train as `config` says and return a summary; `objective` replaces the cross entropy of supervised tokens."""
    save_dir = Path(config.save_dir)
    rank, local_rank, _ = environment_rank()
    setup_logging(rank)

    # 1. Data, before the process group exists: tokenising a large file must not run into the group's timeout
    store = CheckpointStore(save_dir / "checkpoints", config.keep_last)
    if rank == 0:
        refuse_existing_run(save_dir, resumes=config.resumes, overwrite=config.overwrite)
    tokenizer_dir = choose_tokenizer(config.tokenizer, config.from_weight)
    tokenizer = load_tokenizer(tokenizer_dir)
    data = load_data(config, tokenizer, owner=local_rank == 0)

    # 2. Processes
    processes = start_processes(config.device, config.group_timeout_seconds)
    if config.deterministic:
        use_deterministic_kernels()
    auto = "bfloat16" if processes.device.type == "cuda" else "float32"
    dtype = auto if config.dtype == "auto" else config.dtype

    # 3. Model
    model = choose_model(config.from_weight, config.shape, config.dropout, config.seed, len(tokenizer))
    model.to(processes.device)
    body, head = model.parameter_counts()
    objective = objective or make_sft_objective(config.label_smoothing)
    filler = to_device(collate([data.train[FILLER]]), processes.device)
    parallel = parallelize(model.train(), processes, zero_loss=lambda wrapped: objective(wrapped, filler)["ce"])

    # 4. Optimizer
    optimizer = make_optimizer(model, config)
    scaler = torch.amp.GradScaler(processes.device.type, enabled=dtype == "float16")
    learner = Learner(
        parallel, optimizer, scaler, objective, processes, getattr(torch, dtype), config.grad_clip, config.seed
    )

    # 5. Resume
    checkpoint = find_checkpoint(config.from_resume, store, processes) if config.resumes else None
    saved = read_trainer_state(checkpoint) if checkpoint else {}
    rows_at_first_start = config.batch_size * config.accumulation_steps * processes.world_size
    window_rows = config.global_batch_size or saved.get("global_batch_size", rows_at_first_start)
    micro_batches = micro_batches_per_step(window_rows, processes.world_size, config.batch_size)
    state = LoopState.from_dict(saved["loop"], processes.is_main) if checkpoint else LoopState()
    plan = make_plan(config, len(data.train), window_rows, state)
    identity = {**data.identity, **identity_of(config, dtype, window_rows, body + head)}
    if checkpoint:
        changed = refuse_changes(saved["identity"], identity, config.allowed_changes)
        if state.step >= plan.total_steps and (save_dir / "final").exists():
            logger.info("%s is finished, nothing to do (more epochs: --allow_change schedule)", save_dir)
            return {"status": "completed", "step": state.step}
        load_checkpoint(checkpoint, model, optimizer)
        scaler.load_state_dict(saved["scaler"])
        logger.info("resumed from %s%s", checkpoint, f", changed: {', '.join(changed)}" if changed else "")

    # 6. Order of rows
    sampler = RowSampler(
        len(data.train), rank=processes.rank, world_size=processes.world_size, seed=config.seed,
        window_rows=window_rows, slots=micro_batches * config.batch_size,
    )  # fmt: skip
    batches = SkipBatchSampler(sampler, config.batch_size)
    loader = make_loader(data.train, batches, **config.loading)
    held_out = None
    if data.held_out:
        in_order = RowSampler(
            len(data.held_out), rank=processes.rank, world_size=processes.world_size, shuffle=False,
            window_rows=config.batch_size * processes.world_size, slots=config.batch_size,
        )  # fmt: skip
        held_out = make_loader(data.held_out, SkipBatchSampler(in_order, config.batch_size), **config.loading)
    if config.dry_run:
        return rehearse(learner, loader, micro_batches, plan, tokenizer)

    # 7. Records
    records = RunRecords(save_dir, processes.is_main)
    records.flops_per_token = (6.0 * body, 6.0 * head)
    device_name = device_name_of(processes.device)
    records.peak_flops = peak_flops(device_name, processes.world_size)
    resolved = replace(
        config, tokenizer=tokenizer_dir, device=processes.device.type, dtype=dtype, overwrite=False,
        global_batch_size=window_rows, accumulation_steps=micro_batches, **shape_of(model),
    )  # fmt: skip
    wandb_id = saved.get("wandb_id") or uuid.uuid4().hex[:12]
    if processes.is_main:
        save_dir.mkdir(parents=True, exist_ok=True)
        (save_dir / "config.yaml").write_text(resolved.to_yaml(), encoding="utf-8")
        replace_json(save_dir / "data_report.json", data.report)
        replace_json(
            save_dir / "environment.json",
            describe_environment(device_name, processes.world_size, torch.get_num_threads()),
        )
        if config.reports_to_wandb:
            records.metrics.follow(lambda: WandbSink(config.wandb_project, wandb_id, save_dir, asdict(resolved)))
    saved_step = state.step if checkpoint else -1

    def save() -> None:
        nonlocal saved_step
        if state.step == saved_step or state.step == 0:
            return
        started = time.perf_counter()
        trainer_state = {
            "loop": state.to_dict(processes.sum_ints),
            "scaler": scaler.state_dict(),
            "identity": identity,
            "global_batch_size": window_rows,
            "world_size": processes.world_size,
            "wandb_id": wandb_id,
            "config": asdict(resolved),
        }
        save_checkpoint(store, state.step, model, optimizer, trainer_state, processes)
        saved_step = state.step
        records.event(state.step, "checkpoint", seconds=time.perf_counter() - started)

    def evaluate() -> dict[str, float]:
        if held_out is None:
            return {}
        results = validate(learner, held_out)
        records.log_eval(state, results)
        return results

    # 8. Epochs
    reason = None
    with records.running(state, plan), SignalFlags() as signals:
        if config.eval_at_start and state.step == 0:
            evaluate()
        for epoch in range(state.epoch, plan.epochs):
            sampler.set_epoch(epoch)
            # A window is the rows of one step. Whole windows are skipped as batches; rows before the first whole window
            # (after a change of the rows per step) are left out by the sampler.
            whole_windows, sampler.offset = divmod(state.rows, window_rows)
            batches.skip_batches = whole_windows * micro_batches
            reason = train_epoch(learner, loader, micro_batches, state, plan, records, signals, Hooks(save, evaluate))
            if reason:
                break

        # 9. Close
        if reason is None and processes.is_main:
            card = model_card(asdict(resolved), data.report, records.last_eval, state.step)
            export_model(save_dir / "final", model, tokenizer, dtype=getattr(torch, config.export_dtype), card=card)
            logger.info("the model is in %s/final; talk to it: python -m scripts.chat %s", save_dir, save_dir)
        records.close("stopped" if reason else "completed", reason or "all steps done")
    close_processes(processes)
    return {"status": "stopped" if reason else "completed", "step": state.step, **records.last_eval}


def rehearse(
    learner: Learner, loader: DataLoader, micro_batches: int, plan: Plan, tokenizer: PreTrainedTokenizerFast
) -> dict[str, Any]:
    """--dry_run: show a sample with its mask, and train two steps that nobody keeps to tell what a run will need."""
    rows, processes = loader.dataset, learner.processes
    logger.info("\nthe first sample, supervised tokens in colour:\n%s", show(*rows.store.tokens(0), tokenizer))
    seconds = math.nan
    for step, (window, problem) in enumerate(itertools.islice(fetch_windows(loader, micro_batches), 2), start=1):
        if problem:
            raise problem
        (supervised,) = processes.sum_ints([sum(len(batch["targets"]) for batch in window)])
        started = time.perf_counter()
        train_step(learner, window, step, plan.lr(1), supervised, LoopState())
        seconds = time.perf_counter() - started
    logger.info(
        "\n%d epochs x %d steps = %d steps of %d rows (%d micro-batches per rank), about %.2f s each: %s in all; "
        "peak memory so far %.2f GiB per process. Nothing was saved.",
        plan.epochs, plan.steps_per_epoch, plan.total_steps, plan.window_rows, micro_batches, seconds,
        duration(seconds * plan.total_steps), peak_memory_bytes(processes.device) / 2**30,
    )  # fmt: skip
    close_processes(processes)
    return {"status": "completed", "step": 0}


def load_data(config: Config, tokenizer: PreTrainedTokenizerFast, owner: bool) -> RunData:
    options = DataOptions(
        prompt_field=config.prompt_field, response_field=config.response_field, system_field=config.system_field,
        max_seq_len=config.max_seq_len, overlong=config.overlong, bad_rows=config.bad_rows,
    )  # fmt: skip
    return load_rows(
        config.data_path, config.val_data_path, config.val_fraction, config.seed, tokenizer, options,
        Path(config.cache_dir), owner, echo=logger.info,
    )  # fmt: skip


def main(config: Config) -> int:
    """Run and turn what went wrong into one message and an exit code that says what kind of thing it was."""
    try:
        summary = run(config)
    except tuple(EXIT_CODES) as error:
        logger.error("error: %s", error if environment_rank()[0] == 0 else str(error).splitlines()[0])
        return next(code for kind, code in EXIT_CODES.items() if isinstance(error, kind))
    except Exception:
        logger.exception("stopped by an error")
        return EXIT_BUG
    return 0 if summary["status"] == "completed" else EXIT_PREEMPTED


if __name__ == "__main__":
    end_process(main(CONFIG))
