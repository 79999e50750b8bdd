"""Whether this machine can do what a run asks of it: each check takes facts and returns findings, and asks nobody.

`look_around` gathers the facts without the network and without touching a GPU through torch, since data is tokenised in
forked processes later. The trainer asks `check_start` before anything else; scripts/doctor.py asks for more.
"""

from __future__ import annotations

import logging
import os
import re
import resource
import shutil
import sys
import sysconfig
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil

from training.config.config import Config, compute_dtype
from training.records.system import Gpus

logger = logging.getLogger("train")

OK, WARN, ERROR = "ok", "warn", "error"
GIB, MIB = 2**30, 2**20
LEAST_PYTHON, LEAST_TORCH = (3, 11), (2, 11)
NEEDED = ("torch", "transformers", "tokenizers", "safetensors", "datasets", "numpy", "jinja2", "PyYAML", "psutil")
# Numbers per weight that an optimizer remembers.
OPTIMIZER_NUMBERS = {"adamw": 2, "adam": 2, "sgd": 1, "muon": 1, "adafactor": 0}
MOST_ROWS = 64  # that --batch_size auto tries: more make no step faster
PROCESS_BYTES = 400 * MIB  # Python, torch and what both load
MAX_LOGITS = 2**26  # numbers of the vocabulary projection that exist at once, see model/losses.py


@dataclass(frozen=True)
class Finding:
    level: str
    topic: str
    words: str
    remedy: str = ""


@dataclass(frozen=True)
class Gpu:
    name: str
    total_bytes: int
    free_bytes: int


@dataclass(frozen=True)
class Machine:
    """What this host has; `packages` holds (installed or None, pinned)."""

    python: tuple[int, int]
    packages: Mapping[str, tuple[str | None, str]]
    cores: int
    threads: int | None  # OMP_NUM_THREADS; without it every process takes all cores
    ram_bytes: int
    ram_free_bytes: int
    disk_free_bytes: int
    shm_free_bytes: int | None
    open_files: int
    gpus: tuple[Gpu, ...]
    clock: float  # Unix seconds
    compiler_lacks: tuple[str, ...] = ()  # what torch.compile would need besides


@dataclass(frozen=True)
class Sizes:
    """Of a model: what its memory follows from."""

    parameters: int
    hidden_size: int
    num_hidden_layers: int
    intermediate_size: int
    vocab_size: int
    trained: int | None = None  # of the parameters; all, where nothing is frozen

    @property
    def learnt(self) -> int:
        return self.parameters if self.trained is None else self.trained


@dataclass(frozen=True)
class Need:
    """Bytes of one process: what it holds for certain, and what it takes roughly in the middle of a step."""

    certain: int
    roughly: int


def gib(size: float) -> str:
    return f"{size / GIB:.1f} GiB" if size >= GIB else f"{size / MIB:.0f} MiB"


def state_bytes(config: Config, parameters: int) -> int:
    """Of a checkpoint: weights and the optimizer's state in their type, a moving average in float32."""
    kept = 1 + OPTIMIZER_NUMBERS[config.optimizer] + config.amsgrad
    return parameters * (trained_bytes(config) * kept + 4 * (config.ema_decay is not None))


def trained_bytes(config: Config) -> int:
    """Of a number that is trained: adapters are float32."""
    return 4 if config.lora_rank else weight_bytes(config)


def weight_bytes(config: Config) -> int:
    return 2 if config.param_dtype == "bfloat16" else 4


def memory_need(config: Config, sizes: Sizes, world_size: int, on_gpu: bool) -> Need:
    """What a process needs in the memory that it computes in."""
    shared = config.strategy == "fsdp" and world_size > 1
    parts = (config.shard_size or world_size) if shared else 1
    # Besides the trained weights: their gradients, and the frozen ones.
    frozen = weight_bytes(config) * (sizes.parameters - sizes.learnt)
    certain = (state_bytes(config, sizes.learnt) + trained_bytes(config) * sizes.learnt + frozen) // parts
    if config.cpu_offload and on_gpu:
        certain = 0
    half = compute_dtype(config.dtype, config.param_dtype, on_gpu) != "float32"
    number = 2 if half else 4
    tokens = max(1, config.batch_size) * config.max_seq_len
    # What a layer keeps for its backward pass: about eight times its input, and four times the inside of its MLP.
    of_layer = tokens * number * (8 * sizes.hidden_size + 4 * sizes.intermediate_size)
    of_input = tokens * 4 * sizes.hidden_size
    layers = sizes.num_hidden_layers
    activations = of_layer + layers * of_input if config.gradient_checkpointing else layers * of_layer
    logits = 3 * 4 * min(tokens * sizes.vocab_size, MAX_LOGITS)
    casts = 2 * sizes.parameters // parts if half and weight_bytes(config) > 2 else 0
    gradients = trained_bytes(config) * sizes.learnt // parts  # not yet there when a step holds most activations
    peak = max(certain, certain - gradients + activations + logits)
    return Need(certain, peak + casts + PROCESS_BYTES)


# ---------------------------------------------------------------------------------------------------------------------
# Checks


def check_python(machine: Machine) -> list[Finding]:
    words = "Python {}.{}".format(*machine.python)
    if machine.python < LEAST_PYTHON:
        return [
            Finding(ERROR, "python", words, "Python 3.11 or newer is needed: PYTHON=python3.12 bash scripts/test.sh")
        ]
    return [Finding(OK, "python", words)]


def numbers_of(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text.split("+")[0])[:2])


def check_packages(machine: Machine) -> list[Finding]:
    install = "pip install -r requirements.txt, or any script of scripts/*.sh, which makes an environment"
    found, others = [], []
    for name, (installed, pinned) in machine.packages.items():
        if installed is None and name in NEEDED:
            found.append(Finding(ERROR, "packages", f"{name} is missing", install))
        elif name == "torch" and installed is not None and numbers_of(installed) < LEAST_TORCH:
            found.append(Finding(ERROR, "packages", f"torch {installed} is too old, 2.11 is the oldest", install))
        elif installed is None or installed.split("+")[0] != pinned:
            others.append(f"{name} {installed or 'is missing'} (pinned {pinned})")
    if others:
        found.append(Finding(WARN, "packages", f"not as tested: {', '.join(others)}", install))
    return found or [Finding(OK, "packages", f"all {len(machine.packages)} as in requirements.txt")]


def check_memory(config: Config, machine: Machine, sizes: Sizes, world_size: int, local: int) -> list[Finding]:
    """`local`: the processes on this host, each on a GPU of its own, or all in its memory."""
    on_gpu = config.device != "cpu" and bool(machine.gpus)
    if on_gpu:
        mine = machine.gpus[: max(1, local)]
        total, free, place = min(g.total_bytes for g in mine), min(g.free_bytes for g in mine), "a GPU"
        share = 1
    else:
        total, free, place, share = machine.ram_bytes, machine.ram_free_bytes, "this host", local
    need = memory_need(config, sizes, world_size, on_gpu)
    certain, roughly = need.certain * share, need.roughly * share
    words = f"{sizes.parameters / 1e6:,.1f} million weights take about {gib(roughly)} of {gib(free)} free on {place}"
    remedy = smaller(config)
    if certain > total:
        words = f"weights, gradients and optimizer take {gib(certain)}, {place} has {gib(total)}"
        return [Finding(ERROR, "memory", words, remedy)]
    return [Finding(WARN, "memory", words, remedy) if roughly > free else Finding(OK, "memory", words)]


def smaller(config: Config) -> str:
    """The flags that make a run take less memory, those first that change no number."""
    ways = [
        "--gradient_checkpointing" if not config.gradient_checkpointing else "",
        f"--batch_size below {config.batch_size} (--global_batch_size keeps the rows of a step)"
        if config.batch_size > 1
        else "",
        "--strategy fsdp on several devices" if config.strategy != "fsdp" else "more processes, --cpu_offload",
        f"--max_seq_len below {config.max_seq_len}",
        "--dtype bfloat16" if config.dtype in ("auto", "float32") and config.param_dtype == "float32" else "",
        "--param_dtype bfloat16" if config.dtype == "bfloat16" and config.param_dtype == "float32" else "",
        "a smaller model",
    ]
    return "try " + ", ".join(way for way in ways if way)


def check_disk(config: Config, machine: Machine, sizes: Sizes) -> list[Finding]:
    one = state_bytes(config, sizes.learnt)
    count = config.keep_last + config.keep_best + 1  # a new one is whole before an old one goes
    need, free = one * count + 4 * sizes.parameters, machine.disk_free_bytes
    words = (
        f"{count} checkpoints of {gib(one)} and the result take {gib(need)} of {gib(free)} free in {config.save_dir}"
    )
    if free >= need:
        return [Finding(OK, "disk", words)]
    return [Finding(ERROR if free < one else WARN, "disk", words, "free some, --keep_last 2, or another --save_dir")]


def check_shared_memory(config: Config, machine: Machine, local: int) -> list[Finding]:
    """/dev/shm, through which data workers hand over batches, and files that a process may open."""
    found = []
    batches = config.num_workers * config.prefetch_factor * local
    need = batches * ((config.batch_size or MOST_ROWS) * config.max_seq_len * 32 + MIB)
    free = machine.shm_free_bytes
    if free is not None and config.num_workers:
        words = f"/dev/shm has {gib(free)} free, batches on their way take up to {gib(need)}"
        remedy = "docker run --shm-size=2g, or --num_workers 0, which costs little here"
        found.append(
            Finding(WARN, "shared memory", words, remedy) if free < need else Finding(OK, "shared memory", words)
        )
    if machine.open_files < 1024:
        words = f"a process may open {machine.open_files} files"
        found.append(Finding(WARN, "limits", words, "ulimit -n 4096"))
    return found


def check_threads(config: Config, machine: Machine, local: int) -> list[Finding]:
    each = machine.threads or machine.cores
    words = f"{local} process{'es' if local > 1 else ''} of {each} threads on {machine.cores} cores"
    good = max(1, machine.cores // local)
    remedy = f"OMP_NUM_THREADS={good}; scripts/launch/single_node.sh sets it"
    on_cpu = config.device == "cpu" or not machine.gpus
    if each * local > machine.cores and local > 1:
        return [Finding(WARN, "threads", f"{words}: they get in each other's way", remedy)]
    if on_cpu and each * local * 2 <= machine.cores:
        return [Finding(WARN, "threads", f"{words}: the others have nothing to do", remedy)]
    return [Finding(OK, "threads", words)]


def check_compiler(config: Config, machine: Machine) -> list[Finding]:
    if not config.use_compile:
        return []
    if machine.compiler_lacks:
        words = f"--use_compile 1 builds its kernels here, which lacks {', '.join(machine.compiler_lacks)}"
        return [Finding(ERROR, "compiler", words, "apt-get install g++ python3-dev (CXX names another compiler)")]
    return [Finding(OK, "compiler", "all that --use_compile 1 needs")]


def check_clock(machine: Machine, disk_clock: float | None = None) -> list[Finding]:
    """The clock of this host, against the one that dates its files (another host's, where the disk is shared)."""
    remedy = "set the clock, best by NTP: records and states carry its time"
    if machine.clock < 1.7e9:  # before this program was written
        return [Finding(WARN, "clock", f"it is {time.ctime(machine.clock)} here", remedy)]
    if disk_clock is not None and abs(disk_clock - machine.clock) > 5:
        words = f"files are dated {disk_clock - machine.clock:+.0f} s from the clock of this host"
        return [Finding(WARN, "clock", words, remedy)]
    return [Finding(OK, "clock", time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(machine.clock)))]


# ---------------------------------------------------------------------------------------------------------------------
# Facts


def look_around(save_dir: Path) -> Machine:
    """The facts of this host; takes some hundredths of a second."""
    place = save_dir.absolute()
    while not place.exists():
        place = place.parent
    memory = psutil.virtual_memory()
    threads = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]
    return Machine(
        python=sys.version_info[:2],
        packages=pinned_packages(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        threads=int(threads) if threads.isdecimal() and int(threads) else None,
        ram_bytes=memory.total,
        ram_free_bytes=memory.available,
        disk_free_bytes=shutil.disk_usage(place).free,
        shm_free_bytes=shutil.disk_usage("/dev/shm").free if Path("/dev/shm").is_dir() else None,
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        gpus=tuple(Gpu(*known) for known in Gpus(64).memory()),
        clock=time.time(),
        compiler_lacks=compiler_lacks(),
    )


def compiler_lacks() -> tuple[str, ...]:
    """What torch.compile calls for and does not find, by the names that it goes by."""
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    headers = Path(sysconfig.get_path("include"), "Python.h")
    lacks = [compiler] if shutil.which(compiler) is None else []
    return (*lacks, *([str(headers)] if not headers.is_file() else []))


def pinned_packages() -> dict[str, tuple[str | None, str]]:
    """Of every package that requirements.txt pins: the version that is installed, and the pinned one."""
    file = Path(__file__).resolve().parent.parent.parent / "requirements.txt"
    pins = re.findall(r"^([\w.-]+)==(\S+)", file.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {name: (installed_version(name), pinned) for name, pinned in pins}


def installed_version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def examine(config: Config, machine: Machine, sizes: Sizes | None, world_size: int, local: int) -> list[Finding]:
    """All checks that need nothing but facts; without `sizes` none of memory and disk."""
    found = [*check_python(machine), *check_packages(machine), *check_threads(config, machine, local)]
    found += check_compiler(config, machine)
    if sizes is not None:
        found += [*check_memory(config, machine, sizes, world_size, local), *check_disk(config, machine, sizes)]
    return [*found, *check_shared_memory(config, machine, local), *check_clock(machine)]


def check_start(config: Config, sizes: Mapping[str, int] | None, world_size: int) -> None:
    """Warn of what may go wrong before a run takes its time; ValueError for what certainly does.

    A full disk is no such thing: there may be room until a checkpoint is made, and one that finds none is tried again.
    """
    local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    found = examine(config, look_around(Path(config.save_dir)), Sizes(**sizes) if sizes else None, world_size, local)
    for each in found:
        if each.level == ERROR and each.topic != "disk":
            raise ValueError(f"{each.topic}: {each.words}; {each.remedy}. --skip_checks 1 starts all the same")
        if each.level != OK:
            logger.warning("%s: %s; %s", each.topic, each.words, each.remedy)
