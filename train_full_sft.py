"""Fine-tune a language model on chat data: `torchrun --nproc_per_node N train_full_sft.py --data_path FILE`.

The file reads top to bottom: `train_step` is one update, `train_epoch` the only training loop, `validate` measures, and
`run` is the whole job in numbered phases. An objective maps (model, batch) to named sums over supervised tokens; the
loop alone normalises and backpropagates, so a new loss is a new objective and never a new loop.
"""

import os
from pathlib import Path

from training.config.command_line import config_from_command_line
from training.config.config import SHAPE_FLAGS, Config, compute_dtype
from training.control.lock import exit_on_ctrl_c, lock_or_exit, lock_run

if __name__ == "__main__":  # before torch is imported, so that --help, a wrong flag, a taken directory need no waiting
    CTRL_C = exit_on_ctrl_c()
    CONFIG = config_from_command_line()
    if os.environ.get("RANK", "0") == "0" and not CONFIG.dry_run:
        LOCK = lock_or_exit(Path(CONFIG.save_dir))

import itertools
import logging
import math
import signal
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from dataset.chat import ChatRenderer, show
from dataset.ledger import report_lines
from dataset.load import write_rejects
from dataset.loader import fetch_windows, make_loader
from dataset.questions import questions_of
from dataset.rows import FILLER, collate
from dataset.tokenizer import template_day, vocabulary_size
from model.build import (
    ModelRequest,
    check_positions,
    choose_model,
    choose_tokenizer,
    describe_model,
    fill_model,
    load_tokenizer,
    shape_of,
    sizes_of,
)
from model.card import model_card
from model.compile import compile_layers
from model.export import export_model
from model.generation_config import check_base, generation_config
from model.language_model import Batch, Objective
from model.losses import Weights, loss_of, make_sft_objective
from trainer_utils import (
    RowSampler,
    SkipBatchSampler,
    Strategy,
    clip_gradients,
    close_processes,
    environment_rank,
    gradient_sync,
    in_order_batches,
    is_lost_peer,
    local_part,
    parallelize,
    reshard,
    seed_everything,
    start_processes,
)
from training.checkpoints.checkpointer import (
    Checkpointer,
    find_checkpoint,
    has_shards,
    load_checkpoint,
    open_shards,
    read_tensors,
    read_trainer_state,
)
from training.checkpoints.manifest import verify
from training.checkpoints.store import CheckpointStore
from training.config.stages import check_terms, idle_flags, read_stages, weighs
from training.control.exit_codes import exit_code_of
from training.control.meeting import meet
from training.control.process import end_process, exit_code_after, out_of_memory, setup_logging
from training.control.requests import EARLY, LOST_PEER, PREEMPTED, ControlFile, SignalFlags, Stopped, Wishes
from training.control.watchdog import EXIT_HANG, FIRST_FACTOR, Watchdog
from training.device import choose_device, device_name_of, peak_memory_bytes, to_device, use_deterministic_kernels
from training.diagnosis.alerts import AlertBook
from training.diagnosis.machine import check_start
from training.diagnosis.report import ReportEvery, reported
from training.records.descriptions import write_descriptions
from training.records.run_log import Meter, RunRecords, StateFile
from training.records.sinks import sink_makers
from training.run.batch_size import find_rows, settle, wants_fit
from training.run.data import load_data
from training.run.directory import Start, begin, decide_start, has_begun, refuse_changes, refuse_to_clear, with_day
from training.run.dry_run import rehearse
from training.run.ema import Ema
from training.run.evaluation import Evaluation
from training.run.export import export_results
from training.run.learner import Learner
from training.run.non_finite import judge_norm
from training.run.optimizers import make_optimizer
from training.run.resume import identity_of
from training.schedule.plan import Plan, describe_stages, make_plan, micro_batches_per_step, resolve, rows_per_step
from training.schedule.policies import Policies
from training.schedule.sums import Sums, add_to, token_means
from training.schedule.train_state import LoopState, NonFiniteError
from training.text import duration

logger = logging.getLogger("train")


@dataclass
class Hooks:
    """What the loop calls between two updates; all but the last need every rank."""

    save: Callable[[], None]
    evaluate: Callable[[], dict[str, float]]
    adapt: Callable[[dict[str, float]], None]  # to what an evaluation gave, if there was one
    settle_save: Callable[[], None]  # after one that failed in the background
    save_has_failed: Callable[[], bool]


# ---------------------------------------------------------------------------------------------------------------------
# The loop


def train_step(
    learner: Learner, window: list[Batch], step: int, lr: float, weights: Weights, supervised: int, state: LoopState
) -> tuple[float, list[Tensor]]:
    """One update from this rank's micro-batches; returns the gradient norm over all ranks, before clipping, and losses.

    The gradient is the sum of all token losses of the step over `supervised`, the supervised tokens of all ranks and
    micro-batches. DDP and FSDP average over ranks, hence the factor world_size. If it is not finite, nothing changes.
    """
    processes, optimizer, scaler, losses = learner.processes, learner.optimizer, learner.scaler, []
    for group in optimizer.param_groups:
        group["lr"] = lr

    for micro, batch in enumerate(window):
        batch = to_device(batch, processes.device)
        seed_everything(learner.seed, step, micro, processes.rank)  # dropout needs no generator state in checkpoints
        with gradient_sync(learner.model, enabled=micro == len(window) - 1):
            with learner.autocast():
                terms = learner.objective(learner.model, batch)
            loss = loss_of(terms, weights)
            scaler.scale(loss * (processes.world_size / supervised)).backward()
        losses.append(loss.detach())
        add_to(state.all_sums, terms, supervised=len(batch["targets"]), tokens=batch["num_tokens"])
        learner.beat()

    scaler.unscale_(optimizer)
    norm = clip_gradients(learner.model, learner.grad_clip or math.inf)
    if math.isfinite(norm):
        scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return norm, losses


def train_epoch(
    learner: Learner, loader: DataLoader, micro_batches: int, state: LoopState, plan: Plan, records: RunRecords,
    wishes: Wishes, hooks: Hooks,
) -> None:  # fmt: skip
    """Train what is left of an epoch; raises Stopped between two steps. Checkpoints exist only there."""
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
        tokens = sum(batch["num_tokens"] for batch in window)
        flags = [problem is not None, hooks.save_has_failed()]
        supervised, tokens, failed, save_failed, *sums = processes.sum_ints(
            [supervised, tokens, *flags, *wishes.look()]
        )
        if failed:
            raise problem or RuntimeError("another rank could not load its data, see its message")
        if save_failed:
            hooks.settle_save()
        with meter.paused(idle=True):
            wishes.obey(sums, processes.sum_ints, hooks.save, records.obeyed, learner.beat)

        # 3. update
        step = state.step + 1
        lr, weights = plan.lr(step) * state.lr_factor, plan.loss_weights(step)
        norm, losses = train_step(learner, window, step, lr, weights, supervised, state)

        # 4. advance
        state.advance(plan.window_rows(state.epoch), plan.rows_of(state.epoch), tokens, supervised)
        meter.count(tokens, supervised)
        judge_norm(learner, norm, losses, window, state, records, loader.dataset)

        # 5. log, validate, save
        if plan.due(state, plan.log_interval):
            means = token_means(state.since_log.total(processes.sum_ints), "train")
            state.since_log = Sums()
            means |= {f"train/weight_{name}": weight for name, weight in weights.items()}
            records.log_step(state, plan, {**means, "train/learning_rate": lr, "train/grad_norm": norm}, meter)
        with meter.paused():
            finish_step(learner, state, plan, records, hooks, meter)
            if plan.saves(state):
                hooks.save()
        records.step_done()
        learner.beat(step_done=True)


def finish_step(
    learner: Learner, state: LoopState, plan: Plan, records: RunRecords, hooks: Hooks, meter: Meter
) -> None:
    """What follows an update, and on resume whatever of it a stop has cut off: validation, and the end of an epoch."""
    state.unfinished = True
    results = hooks.evaluate() if plan.due(state, plan.eval_interval) else {}
    hooks.adapt(results)
    ends_epoch = plan.ends_epoch(state)
    if ends_epoch or state.step == plan.total_steps:
        means = token_means(state.since_epoch.total(learner.processes.sum_ints), "train")
        values = {**means, **results, "train/learning_rate": plan.lr(state.step) * state.lr_factor}
        records.log_epoch(state, plan, values, meter, peak_memory_bytes(learner.processes.device))
    if ends_epoch:  # also a checkpoint made now points at the start of the next epoch
        state.next_epoch()
    state.unfinished = False


# ---------------------------------------------------------------------------------------------------------------------
# The job


def run(
    config: Config, objective: Objective | None = None, extra_identity: dict[str, str] | None = None,
    callbacks: Sequence[Any] = (),
) -> dict[str, Any]:  # fmt: skip
    """Train as `config` says and return a summary; `objective` replaces the cross entropy of supervised tokens.

    `extra_identity`: what of it a resume must find unchanged, under names that --allow_change takes. `callbacks`:
    functions of a record, or sinks, that follow metrics.jsonl on rank 0; the one of kind "epoch" comes once per epoch.
    From where the directory is ours, its state.json tells of every error.
    """
    rank, _, _ = environment_rank()
    setup_logging(rank)
    if config.teacher is not None and objective is None:
        raise ValueError("--teacher: a run under a teacher is started by torchrun -m scripts.train_distillation")
    save_dir = Path(config.save_dir)
    lock = lock_run(save_dir) if rank == 0 and not config.dry_run else None  # until this function ends
    start = decide_start(save_dir, config.from_resume, config.overwrite, has_begun(save_dir))
    if start.clears:
        refuse_to_clear(save_dir, {name: getattr(config, name) for name in ("from_weight", "tokenizer", "teacher")})
    if lock:
        StateFile(save_dir / "state.json").say("pending", start.clears)
    with reported(save_dir, wanted=bool(lock) and config.report):
        try:
            return run_job(config, start, objective, extra_identity or {}, callbacks)
        except Exception as error:
            if lock:
                lost = LOST_PEER if is_lost_peer(error) else out_of_memory(error)
                ended = {"exit_reason": lost or f"{type(error).__name__}: {error}", "exit_code": exit_code_of(error)}
                StateFile(save_dir / "state.json").say("failed", start.clears, **ended)
            raise


def run_job(
    config: Config, start: Start, objective: Objective | None, extra_identity: dict[str, str], callbacks: Sequence[Any]
) -> dict[str, Any]:
    """All that `run` does once it is known how the run starts."""
    save_dir, started = Path(config.save_dir), time.monotonic()
    rank, local_rank, world_size = environment_rank()
    keeps_records = rank == 0 and not config.dry_run

    # 1. Data, before the process group exists, whose timeout tokenising would outlast
    wanted = ModelRequest(**config.model_request)
    tokenizer_source = choose_tokenizer(config.tokenizer, wanted.from_weight)
    tokenizer = load_tokenizer(tokenizer_source, config.chat_template, wanted.trust_in(tokenizer_source))
    config = with_day(config, start, partial(template_day, tokenizer), logger.info)
    check_base(wanted, tokenizer)
    stages = read_stages(config)
    if objective is None or config.teacher:
        check_terms(stages)
    for line in idle_flags(stages):
        logger.warning("%s", line)
    if rank == 0 and not config.skip_checks:
        check_start(config, sizes_of(wanted, vocabulary_size(tokenizer)), world_size)
    data = load_data(
        config, stages, tokenizer, owner=local_rank == 0, echo=logger.info,
        rejects_file=save_dir / "rejects.jsonl" if keeps_records else None,
    )  # fmt: skip

    # 2. Processes
    device = choose_device(config.device, local_rank, saves_memory=config.strategy == "fsdp")
    timeout_seconds = FIRST_FACTOR * config.group_timeout_seconds + 60  # the watchdog speaks first
    processes = start_processes(device, timeout_seconds, meet)
    processes.agree_on("how the run starts", start)
    if config.deterministic:
        use_deterministic_kernels()
    dtype_name = compute_dtype(config.dtype, config.param_dtype, on_gpu=device.type == "cuda")
    dtype = getattr(torch, dtype_name)

    # 3. Model
    sharded = config.strategy == "fsdp" and world_size > 1
    model = choose_model(wanted, vocabulary_size(tokenizer), empty=sharded)
    check_positions(model, data.train.store.lengths, config.max_seq_len)
    if config.use_compile:
        compile_layers(model)
    if config.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    measure = objective or make_sft_objective()
    objective = objective or make_sft_objective(
        config.label_smoothing, z=weighs(stages, "z"),
        neftune_alpha=config.neftune_alpha, gradient_penalty=config.gradient_penalty > 0,
    )  # fmt: skip
    filler = to_device(collate([data.train[FILLER]]), device)
    if config.strategy == "fsdp" and not sharded:
        logger.warning("--strategy fsdp: one process alone has nothing to share, the model stays whole")
    strategy = Strategy(config.strategy, config.shard_size, config.cpu_offload, dtype)
    model = (model if sharded else model.to(device)).train()
    parallel = parallelize(model, processes, strategy, lambda wrapped: loss_of(objective(wrapped, filler), {}))

    # 4. Optimizer
    optimizer = make_optimizer(model, config)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    learner = Learner(parallel, optimizer, scaler, objective, processes, dtype, config.grad_clip, config.seed, measure)
    if sharded:
        with learner.autocast():
            fill_model(model, wanted, local_part, dtype)

    # 5. Resume
    store = CheckpointStore(
        save_dir / "checkpoints", config.keep_last, config.keep_best, config.monitor_metric, config.monitor_mode
    )
    checkpoint = find_checkpoint(start.checkpoint, store, verify, processes) if start.resumes else None
    saved = read_trainer_state(checkpoint) if checkpoint else {}
    state = LoopState.from_dict(saved["loop"], processes.is_main) if checkpoint else LoopState()
    # Not where a run branches off another one, or goes back to a version that was set aside.
    in_place = checkpoint is not None and checkpoint.resolve() == store.path(state.step).resolve()
    if wants_fit(config, stages):
        same = saved.get("world_size") == world_size
        rows = saved["config"]["batch_size"] if same else find_rows(learner, config, stages, data)
        config, stages = settle(config, stages, rows)
    window_rows = rows_per_step(stages, world_size, saved.get("global_batch_size", []))
    if state.rows >= data.train.rows_of(state.epoch) and not state.unfinished:  # only where other data was allowed
        state.next_epoch()
    identity = {**data.identity, **identity_of(
        stages, dtype_name, window_rows, describe_model(model), data.held_out_identity
    )}  # fmt: skip
    identity |= {name: f"{identity.get(name, '')} | {said}" for name, said in extra_identity.items()}
    changed = refuse_changes(saved["identity"], identity, config.allowed_changes) if checkpoint else []
    plan = make_plan(stages, data.train.rows_of, window_rows, state, model.term_weights)
    data.report["train"]["steps_per_epoch"] = plan.steps_of(0)
    processes.agree_on("data or flags", identity, config.batch_size, state.step, plan.total_steps, config.save_interval,
                       config.log_interval, config.eval_interval, config.strategy)  # fmt: skip
    policies = Policies(config, state, changed="schedule" in changed)
    if checkpoint:
        finished = state.step >= plan.total_steps or policies.stopped
        if start.continues and in_place and finished and (save_dir / "final").exists():
            logger.info(
                "%s is finished, nothing to do. More epochs: --allow_change schedule; a new run on the result: "
                "--from_weight %s/final with another --save_dir", save_dir, save_dir,
            )  # fmt: skip
            if keeps_records:
                StateFile(save_dir / "state.json").say("completed")
            return {"status": "completed", "step": state.step}
        load_checkpoint(open_shards(checkpoint, "model"), open_shards(checkpoint, "optimizer"), model, optimizer)
        scaler.load_state_dict(saved["scaler"])
        logger.info("resumed from %s%s", checkpoint, f", changed: {', '.join(changed)}" if changed else "")

    ema = None
    if config.ema_decay:
        ema = Ema(model, optimizer, config.ema_decay, local_part, lambda: state.step, partial(reshard, model))
        if checkpoint and has_shards(checkpoint, "ema"):
            read_tensors(open_shards(checkpoint, "ema"), ema.weights)

    # 6. Order of rows
    sampler = RowSampler(len(data.train), rank=rank, world_size=world_size, seed=config.seed)
    batches = SkipBatchSampler(sampler, config.batch_size)
    loader = make_loader(data.train, batches, **config.loading)
    held_out = {
        source: make_loader(rows, in_order_batches(len(rows), config.batch_size, processes), **config.loading)
        for source, rows in data.by_source.items()
    }

    def begin_epoch(epoch: int) -> int:
        """Set the rows of an epoch and where to begin in them; returns the micro-batches of its steps."""
        span, size = plan.span_of(epoch), plan.span_of(epoch).stage.config.batch_size
        micro_batches = micro_batches_per_step(span.window_rows, world_size, size)
        data.train.set_epoch(epoch)
        skip = sampler.begin(epoch, len(data.train), state.rows, span.window_rows, micro_batches * size)
        batches.batch_size, batches.skip_batches = size, skip * micro_batches
        return micro_batches

    body, head = model.parameter_counts()
    per_weight = 4.0 if wanted.lora else 6.0  # frozen ones have no gradient to compute
    device_name = device_name_of(device)
    flops = (per_weight * body, per_weight * head)
    alerts = AlertBook(save_dir / "alerts.jsonl", config.grad_clip, stops=config.on_alert == "stop")
    sinks = [ReportEvery(save_dir, config.plot_interval)] if processes.is_main and config.plot_interval else []
    records = RunRecords(save_dir, processes.is_main, flops, device_name, world_size, alerts, sinks)
    questions = questions_of(data.held_out, config.eval_samples) if data.held_out and config.eval_samples else []
    every = config.eval_samples_interval
    evaluation = Evaluation(learner, held_out, questions, every, tokenizer, ema, state, records)
    policies.check_metric(evaluation.names(filler))

    logger.info("%d steps, %s on %s", plan.total_steps, dtype_name, device)
    for line in describe_stages(plan, world_size):
        logger.info("%s", line)
    if config.dry_run:
        sample = show(*data.train.store.tokens(0), tokenizer)
        return rehearse(
            learner, loader, begin_epoch(state.epoch), plan, sample, report_lines(data.report["train"]), train_step
        )

    # 7. Records
    resolved = resolve(
        config, stages, window_rows, world_size, tokenizer=tokenizer_source, device=device.type, dtype=dtype_name,
        overwrite=False, from_resume="0", allow_change="", **shape_of(model, SHAPE_FLAGS),
    )  # fmt: skip
    constants = {
        "identity": identity,
        "base_digest": model.adapters and model.adapters.digest,
        "global_batch_size": window_rows,
        "world_size": world_size,
        "wandb_id": saved["wandb_id"] if checkpoint and start.continues else uuid.uuid4().hex[:12],
        "config": asdict(resolved),
    }
    if processes.is_main:
        begin(save_dir, start.clears)
        store.set_aside_from(state.step + (state.step == 0 or in_place), warn=logger.warning)
        write_rejects(save_dir / "rejects.jsonl", data.rejects)
        write_descriptions(save_dir, resolved, data.report, device_name, world_size, torch.get_num_threads())
    records.metrics.follow(sink_makers(resolved, constants["wandb_id"], callbacks))
    on_hang = partial(records.status, "failed", exit_code=EXIT_HANG)
    watchdog = Watchdog(config.group_timeout_seconds, on_hang, on_beat=records.alive)
    learner.beat = watchdog.beat
    checkpointer = Checkpointer(
        store, model, optimizer, scaler, state, constants, processes, records.event, config.async_save, watchdog.beat,
        more={"ema": ema.weights} if ema else {}, is_saved=in_place or state.step == 0,
    )  # fmt: skip

    def save(last: bool = False) -> None:
        records.metrics.sync()  # or a power cut could take lines that come before the checkpoint
        checkpointer.save(records.metrics_of(state.step), last)

    def adapt(results: dict[str, float]) -> None:
        policies.observe(results, plan, processes.sum_ints, records.event)

    # 8. Epochs
    reason = None
    with records.running(state, plan), SignalFlags() as signals:
        control = ControlFile(save_dir / "control.json") if processes.is_main else None
        stop_at = config.max_hours and started + 3600 * config.max_hours
        wishes = Wishes(signals, control, stop_at, lambda: policies.stopped, alerts.wants_stop)
        evaluate = partial(evaluation, wishes)
        hooks = Hooks(save, evaluate, adapt, checkpointer.finish, checkpointer.has_failed)
        with watchdog:
            try:
                if config.eval_at_start and state.step == 0:
                    evaluate()
                if state.unfinished:
                    finish_step(learner, state, plan, records, hooks, Meter())
                    if processes.is_main:
                        store.add_metrics(state.step, records.metrics_of(state.step))
                for epoch in itertools.count(state.epoch):
                    if state.step >= plan.total_steps:
                        break
                    micro_batches = begin_epoch(epoch)
                    records.begin_epoch(state, plan)
                    train_epoch(learner, loader, micro_batches, state, plan, records, wishes, hooks)
            except Stopped as stop:
                reason = str(stop) if str(stop) != EARLY else None
                if reason:
                    records.stopping(reason)
            except NonFiniteError:
                checkpointer.finish()  # raised on all ranks alike, and what is on its way is good
                raise
            save(last=True)  # also the one that failed in the last step would be the result

        # 9. Close
        if reason:
            logger.warning("%s: stopped after step %d; go on with --from_resume 1", reason, state.step)
        elif processes.is_main:
            card = model_card(asdict(resolved), data.report, records.last_eval, state.step)
            renderer = ChatRenderer(tokenizer)
            generation = generation_config(wanted, tokenizer, renderer.end_ids, renderer.end_texts)
            export = partial(export_model, model=model, tokenizer=tokenizer, card=card, generation=generation)
            export_results(config, store, state.step, export)
            logger.info("the model is in %s/final; talk to it: python -m scripts.chat %s", save_dir, save_dir)
        if policies.best:
            logger.info(
                "best %s %.4f after step %d (epoch %d), %s in all", config.monitor_metric, policies.best["value"],
                policies.best["step"], policies.best["epoch"], duration(records.seconds()),
            )  # fmt: skip
        done = "early stopping" if policies.stopped else "all steps done"
        records.close("stopped" if reason else "completed", reason or done)
    close_processes(processes)
    status = "completed" if not reason else "preempted" if reason == PREEMPTED else "stopped"
    return {"status": status, "step": state.step, **records.last_eval}


def main(config: Config, run_it: Callable[[Config], dict[str, Any]] | None = None) -> int:
    """Run, and turn what went wrong into one message and an exit code that says what kind of thing it was."""
    return exit_code_after(lambda: (run_it or run)(config))


if __name__ == "__main__":
    signal.signal(signal.SIGINT, CTRL_C)
    end_process(main(CONFIG))
