"""Whatever needs the process group: processes and reductions, DDP, the order of rows over ranks, the checkpoint helper.

The gradient exchange sums in an order that depends on where a parameter lies in DDP's buckets, and DDP lays its buckets
out anew after the first backward pass. A resumed run would therefore differ in the last bit from 3 processes on; one
throwaway backward pass where the model is wrapped settles the layout before the first step of every start.
"""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import hashlib
import json
import logging
import os
import platform
import random
import resource
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DistributedSampler, Sampler

logger = logging.getLogger(__name__)

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # names of <malloc.h>

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
    host_group: Any = None  # gloo beside NCCL, so that agreeing on host numbers never waits for the GPU

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum_ints(self, values: Sequence[int]) -> list[int]:
        """Sum over ranks of whole numbers that live on the host: exact, whatever the order of additions."""
        total = torch.tensor(values, dtype=torch.int64)
        if self.world_size > 1:
            dist.all_reduce(total, group=self.host_group)
        return total.tolist()

    def wait_for_all(self) -> None:
        self.sum_ints([0])

    def from_main(self, value: int) -> int:
        """The number that rank 0 has."""
        return self.sum_ints([value if self.is_main else 0])[0]


def environment_rank() -> tuple[int, int, int]:
    """Global rank, rank on this node and world size as torchrun sets them; (0, 0, 1) without torchrun."""
    return tuple(
        int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1))
    )  # type: ignore[return-value]


def choose_device(wanted: str, local_rank: int = 0) -> torch.device:
    """The device of a process: `wanted` is auto, cpu or cuda. Raises ValueError where there is no such device."""
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "--device cuda: torch finds no CUDA device; use --device cpu, or install a CUDA build of torch"
        )
    if wanted == "cpu" or not torch.cuda.is_available():
        keep_freed_memory()
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise ValueError(
            f"--nproc_per_node: process {local_rank} has no GPU, there are {torch.cuda.device_count()} here"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def start_processes(device: str, timeout_seconds: float) -> Processes:
    """Join the process group that torchrun describes: NCCL on CUDA, gloo on CPU."""
    rank, local_rank, world_size = environment_rank()
    place = choose_device(device, local_rank)
    if world_size == 1:
        return Processes(rank, local_rank, world_size, place)
    timeout, on_cuda = datetime.timedelta(seconds=timeout_seconds), place.type == "cuda"
    dist.init_process_group("nccl" if on_cuda else "gloo", timeout=timeout, device_id=place if on_cuda else None)
    host_group = dist.new_group(backend="gloo", timeout=timeout) if on_cuda else None
    _LIVES_UNTIL_EXIT.extend([dist.group.WORLD, host_group])
    return Processes(rank, local_rank, world_size, place, host_group)


def keep_freed_memory() -> None:
    """Let glibc keep freed memory for the next tensor instead of returning its pages to the system after each use.

    Faulting the same pages in again cost a fifth of a CPU step. Other C libraries have no such switch.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, -1)


def close_processes(processes: Processes) -> None:
    if processes.world_size > 1:
        dist.destroy_process_group()


def end_process(exit_code: int) -> None:
    """Leave at once with everything said and written, skipping the interpreter's teardown."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)


def setup_logging(rank: int) -> None:
    """Plain lines on standard error: everything from rank 0, warnings with their rank from the others."""
    prefix = "" if rank == 0 else f"[rank {rank} on {socket.gethostname()}] "
    logging.basicConfig(level=logging.INFO if rank == 0 else logging.WARNING, format=f"{prefix}%(message)s", force=True)
    for noisy in ("httpx", "urllib3", "filelock", "fsspec"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def derived_seed(*parts: int | str) -> int:
    """A 63-bit seed from its parts; unlike their sum, no two combinations share one."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def seed_everything(*parts: int | str) -> None:
    """Seed python's and torch's generators (all devices) from the parts."""
    seed = derived_seed(*parts)
    random.seed(seed)
    torch.manual_seed(seed)


def to_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """The batch with its tensors on the device; what is no tensor stays on the host."""
    return {k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in batch.items()}


def device_name_of(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory that this process has held: of the GPU, or resident where there is none."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def use_deterministic_kernels() -> None:
    """Only kernels that give the same bits every time; one without such a version raises an error naming itself."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False


# ---------------------------------------------------------------------------------------------------------------------
# 2. Parallel model


def parallelize(model: nn.Module, processes: Processes, zero_loss: Callable[[nn.Module], Tensor]) -> nn.Module:
    """Wrap for gradient exchange; `zero_loss(model)` runs one forward pass that touches every parameter and gives 0."""
    if processes.world_size == 1:
        return model
    wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True)
    _LIVES_UNTIL_EXIT.append(wrapped)
    zero_loss(wrapped).backward()  # the bucket layout settles here, see the module docstring
    wrapped.zero_grad(set_to_none=True)
    return wrapped


def unwrap(model: nn.Module) -> nn.Module:
    return model.module if isinstance(model, DistributedDataParallel) else model


def gradient_sync(model: nn.Module, enabled: bool) -> contextlib.AbstractContextManager:
    """Exchange gradients in the backward pass of this block, or only add them up locally."""
    return contextlib.nullcontext() if enabled or not isinstance(model, DistributedDataParallel) else model.no_sync()


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
        window_rows: int,
        slots: int,
        seed: int = 0,
        shuffle: bool = True,
    ):
        super().__init__(range(num_rows), num_replicas=world_size, rank=rank, shuffle=shuffle, seed=seed)  # type: ignore[arg-type]
        assert world_size * slots >= window_rows, (world_size, slots, window_rows)
        self.num_rows, self.window_rows, self.slots, self.offset = num_rows, window_rows, slots, 0

    def begin(self, epoch: int, num_rows: int, rows_done: int) -> int:
        """Set an epoch, its rows and how many of them are trained; returns how many whole windows that is, to skip.

        Rows trained beyond them (after a change of the rows per step) are left out here.
        """
        self.set_epoch(epoch)
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


def micro_batches_per_step(window_rows: int, world_size: int, batch_size: int) -> int:
    """Micro-batches that each rank needs for a step of `window_rows` global rows."""
    return -(-window_rows // (world_size * batch_size))


# ---------------------------------------------------------------------------------------------------------------------
# 4. Checkpoint helper


class Store(Protocol):
    """What the helper needs of the directory of checkpoints; training/checkpoints.py has it."""

    def newest_verified(self, warn: Callable[[str], None]) -> int | None: ...
    def path(self, step: int) -> Path: ...
    def begin(self, step: int) -> Path: ...
    def publish(self, step: int) -> Path: ...
    def abandon(self, step: int) -> None: ...


MODEL_FILE = "model-00001-of-00001.safetensors"
STATE_FILE = "trainer_state.json"
OPTIMIZER_FILE = "optimizer-00001-of-00001.safetensors"


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name; a tensor of two names (a tied head) stands once, under the first."""
    seen: set[int] = set()
    weights = {}
    for name, tensor in model.state_dict().items():
        if tensor.data_ptr() not in seen or tensor.numel() == 0:
            seen.add(tensor.data_ptr())
            weights[name] = tensor.detach().contiguous()
    return weights


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Optimizer state as `parameter name:state name`, so that it survives another order of parameters."""
    return {
        f"{name}:{key}": value.detach().contiguous()
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def save_checkpoint(
    store: Store,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    trainer_state: dict[str, Any],
    processes: Processes,
) -> None:
    """Write and publish weights, optimizer and trainer state; called on, and raising OSError on, all ranks alike."""
    problem: Exception | None = None
    if processes.is_main:
        try:
            directory = store.begin(step)
            save_file(weights_of(model), directory / MODEL_FILE)
            save_file(optimizer_tensors(model, optimizer), directory / OPTIMIZER_FILE)
            (directory / STATE_FILE).write_text(json.dumps(trainer_state, indent=1, allow_nan=False), encoding="utf-8")
            store.publish(step)
        except Exception as error:  # whatever it is, the other ranks wait to hear of it
            problem = error
            store.abandon(step)
    if processes.from_main(int(problem is not None)):
        raise OSError(f"the checkpoint of step {step} could not be saved, older ones stand: {problem or 'see rank 0'}")


class Checkpointer:
    """Makes the checkpoints of one run, each with the loop's state and the run's constants, and none twice."""

    def __init__(
        self,
        store: Store,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
        state: Any,
        constants: dict[str, Any],
        processes: Processes,
        report: Callable[..., None],
    ):
        """`state` has `step` and `to_dict(sum_ints)`; `report(step, event, **values)` hears of each checkpoint."""
        self.store, self.model, self.optimizer, self.scaler = store, model, optimizer, scaler
        self.state, self.constants, self.processes, self.report = state, constants, processes, report
        self.saved_step = state.step

    def save(self) -> None:
        """Every rank must call it; raises OSError on all of them when it fails."""
        if self.state.step == self.saved_step:
            return
        started, step = time.perf_counter(), self.state.step
        moving = {"loop": self.state.to_dict(self.processes.sum_ints), "scaler": self.scaler.state_dict()}
        trainer_state = {**moving, **self.constants}
        save_checkpoint(self.store, step, self.model, self.optimizer, trainer_state, self.processes)
        self.saved_step = step
        self.report(step, "checkpoint", seconds=time.perf_counter() - started)


def find_checkpoint(wanted: str, store: Store, verify: Callable[[Path], Any], processes: Processes) -> Path | None:
    """The checkpoint to continue from: `wanted` is a path, else the newest good one. Rank 0 verifies it for all."""
    if wanted in ("0", "1"):
        newest = store.newest_verified(warn=logger.warning) if processes.is_main else None
        step = processes.from_main(-1 if newest is None else newest)
        return store.path(step) if step >= 0 else None
    if processes.is_main:
        verify(Path(wanted))
    processes.wait_for_all()  # nobody reads before it is verified
    return Path(wanted)


def _read_tensors(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except SafetensorError as error:  # written so: what was damaged later, the manifest has told
        raise OSError(f"{file} is damaged: {error}") from None


def load_checkpoint(directory: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Put verified weights and optimizer state in place.

    Raises ValueError where names, shapes or dtypes do not fit, OSError for files that are no safetensors.
    """
    weights = _read_tensors(directory / MODEL_FILE)
    expected = {name: (tensor.shape, tensor.dtype) for name, tensor in weights_of(model).items()}
    if expected != (found := {name: (tensor.shape, tensor.dtype) for name, tensor in weights.items()}):
        differing = sorted(name for name in {*expected, *found} if expected.get(name) != found.get(name))
        raise ValueError(f"{directory / MODEL_FILE}: does not fit this model, first difference: {differing[0]}")
    model.load_state_dict(weights, strict=False)
    parameters = dict(model.named_parameters())
    for full_name, value in _read_tensors(directory / OPTIMIZER_FILE).items():
        name, _, key = full_name.rpartition(":")
        if name not in parameters:
            raise ValueError(f"{directory / OPTIMIZER_FILE}: {full_name} does not fit this model")
        optimizer.state[parameters[name]][key] = value.to(parameters[name].device)
