"""Whoever computes it: any split of the same rows over ranks and micro-batches gives the same update."""

import pytest
import torch

from tests.small_world import answers_of

# Supervised tokens per row: uneven, and row 1 has none, so that with two ranks one of them has nothing to train.
COUNTS = [7, 0, 1, 3, 12, 2]


def batches_of(rows: list[int], batch_size: int) -> list[dict]:
    """Micro-batches of numbered rows (-1: a filler); row r is one document of 16 tokens, the last COUNTS[r] count."""
    import numpy as np

    from dataset.rows import Document, collate

    def document(row: int) -> list[Document]:
        if row < 0:
            return [Document(-1, np.zeros(2, dtype=np.int64), np.zeros(2, dtype=np.bool_))]
        ids = np.random.default_rng(row).integers(3, 50, 16)
        supervised = np.zeros(16, dtype=np.bool_)
        supervised[16 - COUNTS[row] :] = True
        return [Document(row, ids, supervised)]

    return [collate([document(r) for r in rows[i : i + batch_size]]) for i in range(0, len(rows), batch_size)]


def mean_of_means(model, batch):
    """The common mistake, scaled so that the loop's division leaves the mean of micro-batch means."""
    from model.losses import sft_objective

    terms = sft_objective(model, batch)
    return {"ce": terms["ce"] / max(len(batch["targets"]), 1) * sum(COUNTS) / len(COUNTS)}


EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8}


def learner_of(processes, objective=None, shape=(), **strategy):
    """A float64 model with its optimizer, spread over the processes."""
    from model.decoder import DecoderConfig
    from model.loading import build_model
    from model.losses import sft_objective
    from trainer_utils import Strategy, parallelize
    from training.config import Config
    from training.run.learner import Learner
    from training.run.optimizers import make_optimizer

    objective = objective or sft_objective
    config = DecoderConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        **dict(shape),
    )  # fmt: skip
    model = build_model(config, seed=0).double().train()
    (filler,) = batches_of([-1], 1)
    parallel = parallelize(model, processes, Strategy(**strategy), lambda m: sum(sft_objective(m, filler).values()))
    optimizer = make_optimizer(model, Config(learning_rate=0.01, weight_decay=0.1))
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    return Learner(parallel, optimizer, scaler, objective, processes, torch.float32, 1.0, 0, objective)


def weights_after(rank, answer, split, wrong, shape, strategy):
    """Five float64 AdamW steps over the rows of COUNTS; `split` = (rows of each rank, rows per micro-batch)."""
    from torch.distributed.tensor import DTensor

    from train_full_sft import train_step
    from trainer_utils import close_processes, start_processes, unwrap
    from training.schedule.train_state import LoopState

    processes = start_processes(torch.device("cpu"), 30)
    learner = learner_of(processes, mean_of_means if wrong else None, shape, **strategy)
    rows, batch_size = split
    norms = [
        train_step(learner, batches_of(rows[rank], batch_size), step, 0.01, {}, sum(COUNTS), LoopState())[0]
        for step in range(1, 6)
    ]
    named = unwrap(learner.model).named_parameters()
    whole = {n: p.full_tensor() if isinstance(p, DTensor) else p for n, p in named}
    if rank == 0:
        answer((norms, {name: p.detach().numpy() for name, p in whole.items()}))
    close_processes(processes)


def outcome(rows: list[list[int]], batch_size: int, wrong: bool = False, shape: dict | None = None, **strategy):
    ((norms, weights),) = answers_of(weights_after, len(rows), (rows, batch_size), wrong, shape or {}, strategy)
    return norms, {name: torch.from_numpy(array) for name, array in weights.items()}


def largest_difference(a, b) -> float:
    return max(
        *(abs(x - y) for x, y in zip(a[0], b[0], strict=True)), *((a[1][n] - b[1][n]).abs().max().item() for n in a[1])
    )


SPLITS = {
    "1 rank, 6 micro-batches": ([[0, 1, 2, 3, 4, 5]], 1),
    "1 rank, 2 micro-batches": ([[0, 1, 2, 3, 4, 5]], 3),
    "2 ranks, 3 micro-batches": ([[0, 2, 4], [1, 3, 5]], 1),
    "2 ranks, one has no supervised token": ([[0, 2, 3, 4, 5], [1, -1, -1, -1, -1]], 5),
    "3 ranks, an uneven share filled with masked rows": ([[0, 3], [1, 4], [2, 5]], 2),
    "4 ranks, fillers": ([[0, 4], [1, 5], [2, -1], [3, -1]], 1),
}


@pytest.fixture(scope="module")
def reference():
    return outcome([[0, 1, 2, 3, 4, 5]], 6)


@pytest.mark.parametrize("name", SPLITS)
def test_any_split_gives_the_same_update(reference, name):
    assert largest_difference(outcome(*SPLITS[name]), reference) <= 1e-12


@pytest.mark.parametrize("name", [name for name in SPLITS if name[0] != "1"])
def test_sharding_gives_the_same_update(reference, name):
    assert largest_difference(outcome(*SPLITS[name], name="fsdp"), reference) <= 1e-12


def test_hybrid_sharding_gives_the_same_update(reference):
    assert largest_difference(outcome(*SPLITS["4 ranks, fillers"], name="fsdp", shard_size=2), reference) <= 1e-12


@pytest.fixture(scope="module")
def reference_of_experts():
    return outcome([[0, 1, 2, 3, 4, 5]], 6, shape=EXPERTS)


@pytest.mark.parametrize("name", SPLITS)
def test_any_split_gives_the_same_update_of_experts(reference_of_experts, name):
    """With the terms of the balance, each at its full weight."""
    assert largest_difference(outcome(*SPLITS[name], shape=EXPERTS), reference_of_experts) <= 1e-12


@pytest.mark.parametrize("name", [name for name in SPLITS if name[0] in "23"])
def test_sharding_gives_the_same_update_of_experts(reference_of_experts, name):
    assert largest_difference(outcome(*SPLITS[name], shape=EXPERTS, name="fsdp"), reference_of_experts) <= 1e-12


def test_the_mean_of_means_would_be_seen(reference):
    """Negative control."""
    assert largest_difference(outcome([[0, 2, 4], [1, 3, 5]], 1, wrong=True), reference) > 1e-4


def count_exchanges(rank, answer):
    """How often DDP reduces gradients in one step of three micro-batches."""
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

    from trainer_utils import Strategy, close_processes, gradient_sync, parallelize, start_processes

    processes, calls = start_processes(torch.device("cpu"), 30), []
    model = parallelize(torch.nn.Linear(2, 1), processes, Strategy(), lambda m: m(torch.zeros(1, 2)).sum() * 0)

    def counted(state, bucket):
        calls.append(bucket.index())
        return allreduce_hook(state, bucket)

    model.register_comm_hook(None, counted)
    for micro in range(3):
        with gradient_sync(model, enabled=micro == 2):
            model(torch.ones(1, 2) * (rank + 1)).sum().backward()
    answer((rank, calls, model.module.weight.grad.tolist()))
    close_processes(processes)


def test_gradients_are_exchanged_once_per_step():
    results = sorted(answers_of(count_exchanges, 2))
    # three micro-batches of ones on rank 0 and of twos on rank 1, averaged
    assert results == [(0, [0], [[4.5, 4.5]]), (1, [0], [[4.5, 4.5]])]


def count_exchanges_of_a_step(rank, answer):
    """How often DDP reduces gradients in a step of three micro-batches as the loop does it."""
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

    from train_full_sft import train_step
    from trainer_utils import close_processes, start_processes
    from training.schedule.train_state import LoopState

    processes, calls = start_processes(torch.device("cpu"), 30), []
    learner = learner_of(processes)

    def counted(state, bucket):
        calls.append(bucket.index())
        return allreduce_hook(state, bucket)

    learner.model.register_comm_hook(None, counted)
    train_step(learner, batches_of([0, 2, 4], 1), 1, 0.01, {}, 20, LoopState())
    answer(calls)
    close_processes(processes)


def test_a_step_exchanges_gradients_once():
    assert answers_of(count_exchanges_of_a_step, 2) == [[0], [0]]


def test_dropout_draws_anew_for_every_rank_step_and_micro_batch():
    from model.losses import sft_objective
    from train_full_sft import train_step
    from trainer_utils import Processes
    from training.schedule.train_state import LoopState

    draws = []

    def drawing(model, batch):
        draws.append(torch.rand(4).tolist())
        return sft_objective(model, batch)

    for _ in range(2):
        for rank in range(3):
            learner = learner_of(Processes(rank, rank, 1, torch.device("cpu")), drawing)
            for step in range(1, 4):
                train_step(learner, batches_of([0, 2], 1), step, 0.01, {}, 8, LoopState())
    again = draws[len(draws) // 2 :]
    assert draws[: len(again)] == again, "no generator state is needed to go on"
    assert len({tuple(draw) for draw in again}) == len(again) == 3 * 3 * 2
