"""Fine-tune a language model on chat data: `torchrun --nproc_per_node N train_full_sft.py --data_path FILE`.

The file reads top to bottom: `train_step` is one update, `train_epoch` the only training loop, `validate` measures, and
`run` is the whole job in numbered phases. An objective maps (model, batch) to named sums over supervised tokens; the
loop alone normalises and backpropagates, so a new loss is a new objective and never a new loop.
"""

import os
from pathlib import Path

from training.arguments import config_from_command_line
from training.config import SHAPE_FLAGS, Config
from training.lock import EXIT_INTERRUPTED, exit_on_ctrl_c, lock_or_exit, lock_run

if __name__ == "__main__":  # before torch is imported, so that --help, a wrong flag, a taken directory need no waiting
    CTRL_C = exit_on_ctrl_c()
    CONFIG = config_from_command_line()
    if os.environ.get("RANK", "0") == "0" and not CONFIG.dry_run:
        LOCK = lock_or_exit(Path(CONFIG.save_dir))

import contextlib
import itertools
import logging
import math
import signal
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from dataset.chat import ChatRenderer, show
from dataset.ledger import report_lines
from dataset.load import DataRequest, RunData, batches_of, fetch_windows, load_rows, make_loader, write_rejects
from dataset.prepare import DataOptions
from dataset.questions import Question, questions_of
from dataset.reader import DataError, UnsafeDataError
from dataset.rows import FILLER, PackedRows, collate, longest_row
from dataset.tokenizer import template_day, vocabulary_size
from model.card import model_card
from model.choose import (
    ModelRequest,
    check_positions,
    choose_model,
    choose_tokenizer,
    describe_model,
    fill_model,
    load_tokenizer,
    shape_of,
    sizes_of,
    template_hint,
)
from model.compile import compile_layers
from model.export import export_model
from model.generate import generate
from model.generation_config import check_base, generation_config
from model.losses import make_sft_objective
from model.trust import UnsafeModelError
from trainer_utils import (
    Checkpointer,
    Processes,
    RowSampler,
    SkipBatchSampler,
    Strategy,
    clip_gradients,
    close_processes,
    environment_rank,
    find_checkpoint,
    gradient_sync,
    in_order_batches,
    is_lost_peer,
    load_checkpoint,
    local_part,
    parallelize,
    read_tensors,
    reshard,
    seed_everything,
    start_processes,
    unwrap,
)
from training.checkpoints import (
    CheckpointError,
    CheckpointStore,
    UnsafeCheckpointError,
    has_shards,
    open_shards,
    read_trainer_state,
    verify,
    weights_to_export,
)
from training.control import EARLY, LOST_PEER, PREEMPTED, ControlFile, SignalFlags, Stopped, Wishes
from training.doctor import check_start
from training.ema import Ema
from training.environment import write_descriptions
from training.fit import most_rows, rows_that_fit, settle, wants_fit
from training.identity import identity_of
from training.meeting import meet
from training.observe import duration
from training.optimizers import make_optimizer
from training.plan import Plan, describe_stages, make_plan, micro_batches_per_step, resolve, rows_per_step
from training.policies import Policies
from training.process import (
    choose_device,
    device_name_of,
    end_process,
    is_ours,
    out_of_memory,
    peak_memory_bytes,
    setup_logging,
    to_device,
    use_deterministic_kernels,
)
from training.records import Meter, RunRecords, StateFile
from training.report import reported
from training.sinks import sink_makers
from training.stages import Stage, check_terms, idle_flags, read_stages, weighs
from training.start import Start, begin, decide_start, has_begun, refuse_changes, refuse_to_clear, with_day
from training.state import LoopState, NonFiniteError
from training.sums import Sums, add_to, evaluation_means, token_means
from training.watchdog import EXIT_HANG, FIRST_FACTOR, Watchdog

logger = logging.getLogger("train")

Batch = dict[str, Any]
Objective = Callable[[nn.Module, Batch], dict[str, Tensor]]
Weights = dict[str, float]

REFUSED = dict.fromkeys((UnsafeDataError, UnsafeModelError, UnsafeCheckpointError), 77)  # first: each is one of these
EXIT_CODES = {**REFUSED, DataError: 65, ValueError: 2, CheckpointError: 74, OSError: 74, NonFiniteError: 70}
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
    measure: Objective  # what validation sums; the plain cross entropy, whatever is trained on
    beat: Callable[..., None] = lambda step_done=False: None  # tells the watchdog that this process gets on

    def autocast(self) -> contextlib.AbstractContextManager:
        return torch.autocast(self.processes.device.type, self.dtype, enabled=self.dtype != torch.float32)


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


def loss_of(terms: dict[str, Tensor], weights: Weights) -> Tensor:
    """What is learnt from: the terms that have a gradient, each as often as its weight says or once.

    Raises ValueError for a weight of a term that the objective does not have.
    """
    if unknown := weights.keys() - terms.keys():
        known = [name for name, term in terms.items() if term.requires_grad]
        raise ValueError(f"--loss_weights {', '.join(unknown)}: the terms of this objective are {', '.join(known)}")
    learnt = {name: term for name, term in terms.items() if term.requires_grad}
    weighed = {name: term for name, term in learnt.items() if weights.get(name, 1.0)} or learnt
    return sum(weights.get(name, 1.0) * term for name, term in weighed.items())  # type: ignore[return-value]


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


def judge_norm(
    learner: Learner, norm: float, losses: list[Tensor], window: list[Batch], state: LoopState, records: RunRecords,
    rows: PackedRows,
) -> None:  # fmt: skip
    """Count and report a step whose gradient was not finite; raises NonFiniteError when there are too many."""
    if math.isfinite(norm):
        state.non_finite_in_a_row = 0
        return
    guilty = [batch for batch, loss in zip(window, losses, strict=True) if not loss.isfinite()]
    found = learner.processes.any(bool(guilty))
    if learner.scaler.is_enabled() and not found and learner.scaler.get_scale() >= 1.0:
        state.overflows += 1  # routine in fp16: the losses are fine, the scale was too high and has just been halved
        return
    # Where all losses are finite, the backward pass has overflowed, and nobody can tell for which rank's samples.
    ids = [i for batch in (guilty if found else window) for i in batch["sample_ids"] if i != FILLER]
    samples, rank = [rows.store.where(i) for i in ids], learner.processes.rank
    if samples:
        message = "step %d: gradient norm %s, weights left alone; samples of rank %d: %s"
        logger.warning(message, state.step, norm, rank, ", ".join(samples))
    records.event(state.step, "non_finite_gradient", samples=samples)
    state.count_non_finite()


@torch.no_grad()
def validate(
    learner: Learner, loaders: dict[str, DataLoader], wishes: Wishes, prefix: str = "eval"
) -> dict[str, float]:
    """Means over every supervised token of the held-out data: summed over ranks first, divided once.

    Each source has a loader; where there are several, each has its own means besides those over all. Raises Stopped
    when a stop is wished, on all ranks at the same batch.
    """
    model, sums = unwrap(learner.model), {name: Sums() for name in ("", *loaders)}
    model.eval()
    for source, loader in loaders.items():
        for batch in batches_of(loader):
            wishes.stop_if_wished(learner.processes.sum_ints(wishes.look()))
            batch = to_device(batch, learner.processes.device)
            with learner.autocast():
                terms = learner.measure(model, batch)
            counts = {"supervised": len(batch["targets"]), "tokens": batch["num_tokens"]}
            add_to((sums[""], sums[source]), terms, **counts)
            learner.beat()
    model.train()
    results = evaluation_means(sums[""].total(learner.processes.sum_ints), prefix)
    for source in loaders if len(loaders) > 1 else ():
        results |= evaluation_means(sums[source].total(learner.processes.sum_ints), f"{prefix}/{source}")
    return results


@dataclass
class Evaluation:
    """Validation, of the moving averages too, and answers to held-out questions; every rank must call it."""

    learner: Learner
    loaders: dict[str, DataLoader]  # by source; without any, nothing is evaluated
    questions: list[Question]
    questions_interval: int  # in evaluations
    tokenizer: Any
    ema: Ema | None
    state: LoopState
    records: RunRecords

    @torch.no_grad()
    def names(self, filler: Batch) -> list[str]:
        """The names of what it will give, before anything is trained; `filler` is a batch that counts for nothing."""
        if not self.loaders:
            return []
        model, sources = self.learner.model, list(self.loaders) if len(self.loaders) > 1 else []
        with self.learner.autocast():
            terms = self.learner.measure(unwrap(model), filler)
        reshard(model)
        prefixes = ["eval", *(["eval/ema"] if self.ema else [])]
        prefixes += [f"{prefix}/{source}" for prefix in prefixes for source in sources]
        names = [name for prefix in prefixes for name in evaluation_means(dict.fromkeys(terms, 0), prefix)]
        return [*names, *(["eval/exact_match"] if self.questions else [])]

    def __call__(self, wishes: Wishes) -> dict[str, float]:
        if not self.loaders:
            return {}
        results = validate(self.learner, self.loaders, wishes)
        if self.ema:
            with self.ema.in_place():
                results |= validate(self.learner, self.loaders, wishes, "eval/ema")
        if self.questions and self.state.evaluations % self.questions_interval == 0:
            results |= self.answers()
        self.state.evaluations += 1
        self.records.log_eval(self.state, results)
        return results

    def answers(self) -> dict[str, float]:
        """Answer greedily, each rank its share of the questions; returns the share of exact answers."""
        processes, exact = self.learner.processes, 0
        for question in self.questions[processes.rank :: processes.world_size]:
            room, ends = len(question.expected) + 8, {question.end}
            model = unwrap(self.learner.model)
            (answer,) = generate(model, [question.prompt], max_new_tokens=room, eos_token_ids=ends)
            exact += answer == question.expected
            texts = self.tokenizer.batch_decode([question.prompt, question.expected, answer])
            said = dict(zip(("prompt", "expected", "answer"), texts, strict=True))
            self.records.event(self.state.step, "sample", **said, exact=answer == question.expected)
            self.learner.beat()
        return {"eval/exact_match": processes.sum_ints([exact])[0] / len(self.questions)}


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
    in_half = device.type == "cuda" or config.param_dtype == "bfloat16"
    dtype_name = config.dtype if config.dtype != "auto" else "bfloat16" if in_half else "float32"
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
    records = RunRecords(save_dir, processes.is_main, flops, config, device_name, world_size)
    questions = questions_of(data.held_out, config.eval_samples) if data.held_out and config.eval_samples else []
    every = config.eval_samples_interval
    evaluation = Evaluation(learner, held_out, questions, every, tokenizer, ema, state, records)
    policies.check_metric(evaluation.names(filler))

    logger.info("%d steps, %s on %s", plan.total_steps, dtype_name, device)
    for line in describe_stages(plan, world_size):
        logger.info("%s", line)
    if config.dry_run:
        sample = show(*data.train.store.tokens(0), tokenizer)
        return rehearse(learner, loader, begin_epoch(state.epoch), plan, sample, report_lines(data.report["train"]))

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
        wishes = Wishes(signals, control, stop_at, lambda: policies.stopped, records.alerts.wants_stop)
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


def find_rows(learner: Learner, config: Config, stages: list[Stage], data: RunData) -> int:
    """The rows of a micro-batch for which a forward and a backward pass find memory on every rank."""
    processes, model = learner.processes, unwrap(learner.model)  # nothing is exchanged: each rank tries by itself
    longest = longest_row(max(stage.config.max_seq_len for stage in stages), int(data.train.store.lengths.max()))

    def loss_of_rows(rows: int) -> Tensor:
        with learner.autocast():
            return loss_of(learner.objective(model, to_device(collate([longest] * rows), processes.device)), {})

    most = most_rows(stages, data.train.rows_of(0), processes.world_size)
    return processes.least(rows_that_fit(loss_of_rows, model, most, config, processes.device))


def export_results(config: Config, store: CheckpointStore, last_step: int, export: Callable[..., None]) -> None:
    """Write best/ and final/ from their checkpoints; `export(directory, state_dict, dtype)`."""
    best = store.best(store.manifests())[:1] if config.keep_best else []
    for name, step in (*(("best", step) for step in best), ("final", last_step)):  # the last one says: done
        weights = weights_to_export(store.path(step), averaged=config.export_ema)
        export(Path(config.save_dir) / name, state_dict=weights, dtype=getattr(torch, config.export_dtype))


def load_data(config: Config, stages: list[Stage], tokenizer: Any, **how: Any) -> RunData:
    """The data of a run and its stages; `how` goes to dataset.load.load_rows."""
    requests = [
        (DataRequest(**each.config.data_request, options=DataOptions(**each.config.data_options)), each.epochs)
        for each in stages
    ]
    with template_hint():
        return load_rows(requests[0][0], tokenizer, stages=requests, **how)


def rehearse(
    learner: Learner, loader: DataLoader, micro_batches: int, plan: Plan, sample: str, ledger: Iterable[str]
) -> dict[str, Any]:
    """--dry_run: show a sample and the ledger, and train two steps that nobody keeps to tell what a run will need."""
    logger.info("\nthe first sample, supervised tokens in colour:\n%s\n\n%s", sample, "\n".join(ledger))
    processes, seconds = learner.processes, math.nan
    for step, (window, problem) in enumerate(itertools.islice(fetch_windows(loader, micro_batches), 2), start=1):
        if problem:
            raise problem
        (supervised,) = processes.sum_ints([sum(len(batch["targets"]) for batch in window)])
        started = time.perf_counter()
        train_step(learner, window, step, 0.0, plan.loss_weights(step), supervised, LoopState())
        seconds = time.perf_counter() - started
    logger.info(
        "\n%d epochs, the first of %d steps, %d steps in all (of %d rows, %d micro-batches per rank, in the first "
        "stage), about %.2f s each: %s in all; "
        "peak memory so far %.2f GiB per process. Nothing was saved.",
        plan.epochs, plan.steps_of(0), plan.total_steps, plan.window_rows(0), micro_batches, seconds,
        duration(seconds * plan.total_steps), peak_memory_bytes(processes.device) / 2**30,
    )  # fmt: skip
    close_processes(processes)
    return {"status": "completed", "step": 0}


def exit_code_of(error: Exception) -> int:
    return next((code for kind, code in EXIT_CODES.items() if isinstance(error, kind)), EXIT_BUG)


def main(config: Config, run_it: Callable[[Config], dict[str, Any]] | None = None) -> int:
    """Run and turn what went wrong into one message and an exit code that says what kind of thing it was."""
    try:
        summary = (run_it or run)(config)
    except KeyboardInterrupt:
        logger.error("stopped by Ctrl-C before the first step")
        return EXIT_INTERRUPTED
    except Exception as error:
        if is_lost_peer(error):
            logger.error("stopped: %s", LOST_PEER)
        elif message := out_of_memory(error):
            logger.error("error: %s", message)
        elif isinstance(error, tuple(EXIT_CODES)):
            first_line = (str(error) or type(error).__name__).splitlines()[0]
            # What a library raised under a name that we use for what the user can mend may be a fault of ours.
            logger.error("error: %s", error if environment_rank()[0] == 0 else first_line, exc_info=not is_ours(error))
        else:
            logger.exception("stopped by an error")
        return exit_code_of(error)
    return EXIT_PREEMPTED if summary["status"] == "preempted" else 0


if __name__ == "__main__":
    signal.signal(signal.SIGINT, CTRL_C)
    end_process(main(CONFIG))
