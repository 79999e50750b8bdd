"""Whatever needs the process group: processes, DDP and FSDP2, the order of rows over ranks, the checkpoint helper.

The gradient exchange sums in an order that depends on where a parameter lies in DDP's buckets, and DDP lays its buckets
out anew after the first backward pass. A resumed run would therefore differ in the last bit from 3 processes on; one
throwaway backward pass where the model is wrapped settles the layout before the first step of every start. FSDP2 needs
none: its layout is fixed where the model is wrapped.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import logging
import os
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DistributedSampler, Sampler

logger = logging.getLogger(__name__)

SLOW_SECONDS = 60.0  # after so many, and again and again, what keeps the others waiting is spoken of

# gloo now and then hangs or aborts when a group is freed (seen in one of twenty runs of three processes), so whatever
# refers to a group lives until the process ends, and the process ends without freeing it: see end_process.
_LIVES_UNTIL_EXIT: list[Any] = []

# ---------------------------------------------------------------------------------------------------------------------
# 1. Processes


@dataclass(frozen=True)
class Processes:
    """This process among the others; one process alone needs no group."""

    rank: int
    local_rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum_ints(self, values: Sequence[int]) -> list[int]:
        """Sum over ranks of whole numbers that live on the host: exact, and no GPU is waited for."""
        total = torch.tensor(values, dtype=torch.int64)
        if self.world_size > 1:
            dist.all_reduce(total)
        return total.tolist()

    def from_main(self, value: int) -> int:
        """The number that rank 0 has."""
        return self.sum_ints([value if self.is_main else 0])[0]

    def least(self, value: int) -> int:
        """The smallest of the ranks' numbers."""
        return min(self.sum_ints([value * (rank == self.rank) for rank in range(self.world_size)]))

    def agree_on(self, what: str, *values: Any) -> None:
        """Raise ValueError on all ranks where one of them has other values than the others."""
        own = derived_seed(repr(values)) >> 32  # small enough to be added up
        if self.any(self.sum_ints([own])[0] != own * self.world_size):
            raise ValueError(f"the processes differ in {what}; here it is: {', '.join(map(str, values))}")

    def any(self, value: bool) -> bool:
        """Whether it is so on some rank."""
        return self.sum_ints([int(value)])[0] > 0


def environment_rank() -> tuple[int, int, int]:
    """Global rank, rank on this node and world size as torchrun sets them; (0, 0, 1) without torchrun."""
    return tuple(
        int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1))
    )  # type: ignore[return-value]


def start_processes(
    place: torch.device, timeout_seconds: float, meet: Callable[[Any, int, int], str] = lambda *_: ""
) -> Processes:
    """Join the process group that torchrun describes: gloo for what lies on the host, NCCL for what lies on a GPU.

    `meet(store, rank, world_size)` waits for all without a time limit and gives a name that no other start has.
    """
    rank, local_rank, world_size = environment_rank()
    if world_size > 1:
        timeout, on_cuda = datetime.timedelta(seconds=timeout_seconds), place.type == "cuda"
        backend = "cpu:gloo,cuda:nccl" if on_cuda else "gloo"
        device = place if on_cuda else None
        dist.init_process_group(backend, timeout=timeout, device_id=device, **_meeting(timeout, meet))
        _LIVES_UNTIL_EXIT.append(dist.group.WORLD)
    return Processes(rank, local_rank, world_size, place)


def _meeting(timeout: datetime.timedelta, meet: Callable[[Any, int, int], str]) -> dict[str, Any]:
    """Where the processes meet: in torchrun's store, which knows of earlier starts, under a name of this one."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return {}
    rank, _, world_size = environment_rank()
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(address, port, world_size, is_master=False, timeout=timeout)
    return {"store": dist.PrefixStore(meet(store, rank, world_size), store), "rank": rank, "world_size": world_size}


def is_lost_peer(error: BaseException) -> bool:
    """Whether an error only says that another process of the job is gone, which has its own message."""
    return isinstance(error, RuntimeError) and any(
        sign in str(error) for sign in ("Connection closed by peer", "Connection reset by peer", "Broken pipe")
    )


def close_processes(processes: Processes) -> None:
    if processes.world_size > 1:
        dist.destroy_process_group()


def derived_seed(*parts: int | str) -> int:
    """A 63-bit seed from its parts; unlike their sum, no two combinations share one."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def seed_everything(*parts: int | str) -> None:
    """Seed python's and torch's generators (all devices) from the parts."""
    seed = derived_seed(*parts)
    random.seed(seed)
    torch.manual_seed(seed)


# ---------------------------------------------------------------------------------------------------------------------
# 2. Parallel model


@dataclass(frozen=True)
class Strategy:
    """How a model is spread over the processes."""

    name: str = "ddp"  # ddp: every process holds all of it; fsdp: its share of every tensor
    shard_size: int | None = None  # fsdp: processes that share one copy, of which there may be several
    cpu_offload: bool = False  # fsdp: weights and optimizer state wait in host memory
    dtype: torch.dtype = torch.float32  # fsdp: in which the layers' weights travel and compute


def parallelize(
    model: nn.Module, processes: Processes, strategy: Strategy, zero_loss: Callable[[nn.Module], Tensor]
) -> nn.Module:
    """Wrap for training on all processes; `zero_loss(model)` is a forward pass through every parameter that gives 0.

    The model file says what is sharded together: `model.shard_units()`, modules in forward order; what remains is a
    unit of its own. With FSDP a model on the meta device comes back with memory for its shards, not yet filled.
    """
    if processes.world_size == 1:
        return model
    if strategy.name == "fsdp":
        return _shard(model, processes, strategy)
    wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True)
    _LIVES_UNTIL_EXIT.append(wrapped)
    zero_loss(wrapped).backward()  # the bucket layout settles here, see the module docstring
    wrapped.zero_grad(set_to_none=True)
    return wrapped


def _shard(model: nn.Module, processes: Processes, strategy: Strategy) -> nn.Module:
    world_size, place = processes.world_size, processes.device
    shard_size = strategy.shard_size or world_size
    if world_size % shard_size:
        raise ValueError(f"--shard_size {shard_size}: {world_size} processes cannot be divided by it")
    hybrid = {"mesh_shape": (world_size // shard_size, shard_size), "mesh_dim_names": ("replicate", "shard")}
    flat = {"mesh_shape": (world_size,), "mesh_dim_names": ("shard",)}
    mesh = init_device_mesh(place.type, **(flat if shard_size == world_size else hybrid))
    if strategy.cpu_offload and place.type == "cpu":
        logger.warning("--cpu_offload: the processes compute on the CPU, where nothing is to be moved")
    offload = CPUOffloadPolicy() if strategy.cpu_offload and place.type == "cuda" else OffloadPolicy()
    # The stream between the layers keeps its precision, as it does under autocast without sharding.
    layers = MixedPrecisionPolicy(strategy.dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    plain = strategy.dtype == torch.float32
    for unit in model.shard_units():
        fully_shard(unit, mesh=mesh, mp_policy=MixedPrecisionPolicy() if plain else layers, offload_policy=offload)
    fully_shard(model, mesh=mesh, offload_policy=offload)
    memory = "cpu" if strategy.cpu_offload else place
    # Buffers are computed where a model is made, so they are never on the meta device.
    model._apply(lambda t: torch.empty_like(t, device=memory) if t.is_meta else t.to(place))
    return model


def unwrap(model: nn.Module) -> nn.Module:
    return model.module if isinstance(model, DistributedDataParallel) else model


def gradient_sync(model: nn.Module, enabled: bool) -> contextlib.AbstractContextManager:
    """Exchange gradients in the backward pass of this block, or only add them up locally."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(enabled)
    return model.no_sync() if isinstance(model, DistributedDataParallel) and not enabled else contextlib.nullcontext()


def reshard(model: nn.Module) -> None:
    """Validation leaves the outermost unit of FSDP whole; the optimizer and whoever saves know its shards."""
    if isinstance(model, FSDPModule):
        model.reshard()


def clip_gradients(model: nn.Module, max_norm: float) -> float:
    """Scale all gradients so that their norm is at most `max_norm`; returns the norm before, the same on every rank."""
    norm = nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    return (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()


def local_part(tensor: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """What this process holds of a tensor, sharing its memory, and where that begins in the whole tensor."""
    if not isinstance(tensor, DTensor):
        return tensor.detach(), (0,) * tensor.dim()
    offsets = [0] * tensor.dim()
    for axis, placement in enumerate(tensor.placements):
        if isinstance(placement, Shard):  # as torch.chunk cuts: all parts but the last ones have this many rows
            rows = -(-tensor.shape[placement.dim] // tensor.device_mesh.size(axis))
            offsets[placement.dim] = min(rows * tensor.device_mesh.get_local_rank(axis), tensor.shape[placement.dim])
    return tensor.detach().to_local(), tuple(offsets)


# ---------------------------------------------------------------------------------------------------------------------
# 3. Order of rows


class RowSampler(DistributedSampler):
    """The rows of one epoch that belong to this rank, as a pure function of (seed, epoch).

    An epoch is cut into windows of `window_rows` global rows, one per step. Rank r takes every world_size-th row of a
    window from the r-th on and is filled up with -1 (a fully masked row) to `slots`, so that every rank has
    the same number of micro-batches and every row is trained exactly once at any world size. `offset` rows at the
    start of the epoch have been trained before under another window size and are left out.
    """

    def __init__(
        self,
        num_rows: int,
        *,
        rank: int,
        world_size: int,
        window_rows: int = 1,
        slots: int = 1,
        seed: int = 0,
        shuffle: bool = True,
    ):
        super().__init__(range(num_rows), num_replicas=world_size, rank=rank, shuffle=shuffle, seed=seed)  # type: ignore[arg-type]
        assert world_size * slots >= window_rows, (world_size, slots, window_rows)
        self.num_rows, self.window_rows, self.slots, self.offset = num_rows, window_rows, slots, 0

    def begin(
        self, epoch: int, num_rows: int, rows_done: int, window_rows: int | None = None, slots: int | None = None
    ) -> int:
        """Set an epoch, its rows and how many of them are trained; returns how many whole windows that is, to skip.

        Rows trained beyond them (after a change of the rows per step) are left out here. The rows of a window and the
        slots may differ from epoch to epoch.
        """
        self.set_epoch(epoch)
        self.window_rows, self.slots = window_rows or self.window_rows, slots or self.slots
        assert self.num_replicas * self.slots >= self.window_rows, (self.slots, self.window_rows)
        windows, self.offset = divmod(rows_done, self.window_rows)
        self.num_rows = num_rows
        return windows

    def order(self) -> list[int]:
        """All rows of the epoch in global order, the same on every rank."""
        if not self.shuffle:
            return list(range(self.num_rows))
        generator = torch.Generator().manual_seed(derived_seed("order", self.seed, self.epoch))
        return torch.randperm(self.num_rows, generator=generator).tolist()

    def __len__(self) -> int:
        return -(-(self.num_rows - self.offset) // self.window_rows) * self.slots

    def __iter__(self) -> Iterator[int]:
        order = self.order()[self.offset :]
        for start in range(0, len(order), self.window_rows):
            mine = order[start : start + self.window_rows][self.rank :: self.num_replicas]
            yield from mine
            yield from [-1] * (self.slots - len(mine))


class SkipBatchSampler(Sampler[list[int]]):
    """Batches of a sampler without the first `skip_batches`: indices are skipped, their data is never read."""

    def __init__(self, sampler: Sampler[int] | Sequence[int], batch_size: int, skip_batches: int = 0):
        self.sampler, self.batch_size, self.skip_batches = sampler, batch_size, skip_batches

    def __len__(self) -> int:
        return max(0, -(-len(self.sampler) // self.batch_size) - self.skip_batches)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[list[int]]:
        batch: list[int] = []
        skipped = 0
        for index in self.sampler:
            batch.append(index)
            if len(batch) == self.batch_size:
                skipped += 1
                if skipped > self.skip_batches:
                    yield batch
                batch = []
        if batch and skipped >= self.skip_batches:
            yield batch


def in_order_batches(num_rows: int, batch_size: int, processes: Processes) -> SkipBatchSampler:
    """This rank's share of all rows in their own order, as for validation."""
    sampler = RowSampler(
        num_rows, rank=processes.rank, world_size=processes.world_size, shuffle=False,
        window_rows=batch_size * processes.world_size, slots=batch_size,
    )  # fmt: skip
    return SkipBatchSampler(sampler, batch_size)


# ---------------------------------------------------------------------------------------------------------------------
# 4. Checkpoint helper


# Values of a block on the host, where it begins in the whole tensor, and the shape of the whole.
Block = tuple[Tensor, tuple[int, ...], tuple[int, ...]]


def named_weights(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name; one of two names (a tied head) stands once, under the first.

    Of a model with adapters what is trained, alone: the rest is where it came from.
    """
    if getattr(model, "adapters", None):
        return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    second_names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    buffers = {name: tensor for name, tensor in model.state_dict().items() if name not in second_names}
    return {**dict(model.named_parameters()), **buffers}


def named_optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Optimizer state as `parameter name:state name`, so that it survives another order of parameters."""
    return {
        f"{name}:{key}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def blocks_to_write(tensors: Mapping[str, Tensor], processes: Processes, copy: bool) -> dict[str, Block]:
    """This rank's share of the writing: its shards, and a fair share of what several ranks hold alike.

    `copy` keeps the values safe from later steps; on a GPU they are copied to the host anyway.
    """
    blocks, loads = {}, [0] * processes.world_size
    for number, (name, tensor) in enumerate(sorted(tensors.items())):  # whatever order they came in
        if isinstance(tensor, DTensor):
            mesh = tensor.device_mesh
            if mesh.ndim == 2 and number % mesh.size(0) != mesh.get_local_rank(0):  # another copy of it writes
                continue
        else:
            writer = loads.index(min(loads))
            loads[writer] += tensor.numel() * tensor.element_size() + 1
            if writer != processes.rank:
                continue
        values, offsets = local_part(tensor)
        values = values.to("cpu", copy=copy) if values.device.type == "cpu" else values.cpu()
        blocks[name] = (values, offsets, tuple(tensor.shape))
    return blocks
