"""Keeps the promises of this project to account on your machine: `python -m scripts.verify`, two minutes on two cores.

Each check trains or computes with the code of this directory on the devices that are here, kills it where that is the
promise, and measures how far the outcome is from what was promised. Runs go through the real torchrun, and everything
they write lies in a temporary directory. The exit code is 0 if every promise that could be checked here is kept.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from scripts.evaluate import positive
from scripts.verify.workers import ENOUGH_SECONDS, largest, logits_and_gradient, random_document, tiny_model
from training.checkpoints.checkpointer import open_shards, read_trainer_state
from training.checkpoints.store import CheckpointStore
from training.config.config import SHAPE_FLAGS
from training.records.metrics import read_records

ROOT = Path(__file__).resolve().parent.parent.parent
SAVE_INTERVAL = 4
FLAGS = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "max_seq_len": 64,
    "batch_size": 1, "epochs": 5, "learning_rate": 0.01, "dropout": 0.1, "seed": 7, "log_interval": 1,
    "save_interval": SAVE_INTERVAL, "keep_last": 3, "group_timeout_seconds": 60,
}  # fmt: skip
TIMING = ("time", "per_second", "seconds", "share", "memory", "eta")  # parts of the names of what no two runs share
PLACES = ("shards", "manifest", "published")  # in a save: where the kill comes


class NotRun(Exception):
    """The check cannot be made on this machine; the text says why."""


@dataclass(frozen=True)
class Finding:
    """What was measured against what was promised; kept where it is not larger."""

    promise: str
    measured: float
    limit: float

    @property
    def kept(self) -> bool:
        return self.measured <= self.limit  # false for NaN


# ---------------------------------------------------------------------------------------------------------------------
# Runs


class Bench:
    """The machine and the place where the checks train."""

    def __init__(self, device: str, processes: int, work: Path):
        self.device, self.processes, self.work = device, processes, work
        self.rows = write_rows(work / "rows.jsonl")
        self.whole = cache(self.whole)  # type: ignore[method-assign] - several checks compare with it

    def need_two(self) -> None:
        if self.processes < 2:
            others = " (--device cpu checks it without)" if self.device == "cuda" else ""
            raise NotRun(f"needs two {'GPUs' if self.device == 'cuda' else 'processes'}{others}")

    def start(self, run: Path, processes: int, worker: tuple[str, ...] = (), **flags: Any) -> subprocess.Popen[bytes]:
        """torchrun with the trainer, or with a worker that wraps it; all that is said goes to run.log."""
        values = {**FLAGS, "data_path": self.rows, "val_data_path": self.rows, "cache_dir": self.work / "cache"}
        values |= {
            "device": self.device,
            "deterministic": int(self.device == "cuda"),
            "save_dir": run,
            "report": 0,
            **flags,
        }
        program = ["-m", "scripts.verify.workers", *worker] if worker else ["train_full_sft.py"]
        return self.torchrun(run.with_suffix(".log"), processes, program + [f"--{n}={v}" for n, v in values.items()])

    def torchrun(self, log: Path, processes: int, program: list[str]) -> subprocess.Popen[bytes]:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        environment = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", **os.environ}
        environment["TMPDIR"] = str(self.work)  # torchrun leaves its directories of logs behind
        with open(log, "ab") as file:
            return subprocess.Popen([*launcher, *program], cwd=ROOT, env=environment, stdout=file, stderr=file)

    def train(self, run: Path, processes: int, **flags: Any) -> Path:
        """A run that must end well."""
        finish(self.start(run, processes, **flags), run.with_suffix(".log"))
        return run

    def whole(self, strategy: str) -> Path:
        """A run that nothing disturbs."""
        say(f"{strategy}, {self.processes} processes: the run that nothing disturbs")
        return self.train(self.work / f"whole-{strategy}", self.processes, strategy=strategy)


def write_rows(path: Path, count: int = 36, seed: int = 0) -> Path:
    """Conversations whose answers differ much in length, so that a mean of means would show."""
    words = ["red", "green", "blue", "one", "two", "three", "sun", "moon", "star", "tree", "river", "stone"]
    numbers = random.Random(seed)
    with open(path, "w", encoding="utf-8") as file:
        for i in range(count):
            answer = " ".join(numbers.choices(words, k=numbers.choice((1, 2, 3, 12, 20))))
            messages = [{"role": "user", "content": f"Say {i}"}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"messages": messages}) + "\n")
    return path


def say(line: str) -> None:
    print(f"  {line}", file=sys.stderr, flush=True)


def finish(process: subprocess.Popen[bytes], log: Path, dies: bool = False) -> None:
    """Wait for a job; RuntimeError with its last lines where it does not end as it should."""
    with ended(process):
        code = process.wait(timeout=ENOUGH_SECONDS)
    if (code != 0) != dies:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
        said = [line for line in lines if "error" in line.lower()][:3] or lines[-10:]
        raise RuntimeError(f"a job ended with exit code {code}:\n" + "\n".join(said))


@contextlib.contextmanager
def ended(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Whatever happens, nothing of the job outlives the block."""
    try:
        yield
    finally:
        kill(process)


def kill(process: subprocess.Popen[bytes]) -> None:
    """kill -9 of torchrun and of every rank, which torchrun puts into sessions of their own."""
    for pid in (process.pid, *descendants(process.pid)) if process.poll() is None else ():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()


def descendants(pid: int) -> list[int]:
    children: dict[int, list[int]] = {}
    for file in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            words = file.read_text().rsplit(")", 1)[1].split()
            children.setdefault(int(words[1]), []).append(int(file.parent.name))
    found = [pid]
    for each in found:
        found += children.get(each, [])
    return found[1:]


def difference(run: Path, other: Path) -> float:
    """The largest difference between two runs in exported weights, weights, optimizer state and logged numbers."""
    from safetensors.torch import load_file

    largest = [0.0]
    ends = [CheckpointStore(each / "checkpoints") for each in (run, other)]
    last = [store.path(store.steps()[-1]) for store in ends]
    pairs = [tuple(load_file(each / "final" / "model.safetensors") for each in (run, other))]
    pairs += [tuple(open_shards(each, kind).tensors() for each in last) for kind in ("model", "optimizer")]
    for a, b in pairs:
        if a.keys() != b.keys():
            return math.inf
        largest += [(a[name].double() - b[name].double()).abs().max().item() for name in a]
    states = [{k: v for k, v in read_trainer_state(each).items() if k in ("loop", "scaler")} for each in last]
    logs = [list(_comparable(read_records(each / "metrics.jsonl"))) for each in (run, other)]
    return max(largest) if states[0] == states[1] and logs[0] == logs[1] else max(*largest, math.inf)


def _comparable(records: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Without times, and without events: the kill may come between a checkpoint and the record of it."""
    for record in records:
        if record["kind"] not in ("event", "system"):
            yield {name: value for name, value in record.items() if not any(word in name for word in TIMING)}


# ---------------------------------------------------------------------------------------------------------------------
# Promises


def resume_ddp(bench: Bench) -> list[Finding]:
    """A run that is killed with -9 in the middle and resumed ends with the bits of the run that was not."""
    return _resume(bench, "ddp")


def resume_fsdp(bench: Bench) -> list[Finding]:
    """The same where every process holds a share of the model only."""
    bench.need_two()
    return _resume(bench, "fsdp")


def _resume(bench: Bench, strategy: str) -> list[Finding]:
    whole, cut = bench.whole(strategy), bench.work / f"cut-{strategy}"
    process, store = bench.start(cut, bench.processes, strategy=strategy), CheckpointStore(cut / "checkpoints")
    say(f"{strategy}, {bench.processes} processes: a run to be killed")
    with ended(process):
        deadline = time.monotonic() + ENOUGH_SECONDS
        while len(store.steps()) < 2 and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
    if not store.steps() or (cut / "final").exists():
        raise RuntimeError("the run ended before it could be killed: " + cut.with_suffix(".log").read_text()[-500:])
    say(f"killed after step {store.steps()[-1]} of {_steps(whole)}, going on")
    bench.train(cut, bench.processes, strategy=strategy, from_resume=1)
    return [Finding(f"resumed == uninterrupted ({strategy}, {bench.processes} processes)", difference(whole, cut), 0)]


def _steps(run: Path) -> int:
    return CheckpointStore(run / "checkpoints").steps()[-1]


def world_size(bench: Bench) -> list[Finding]:
    """Where the number of processes changes in the middle of an epoch, every sample is still trained once per epoch."""
    bench.need_two()
    run, seen, fewer = bench.work / "elastic", bench.work / "seen", bench.processes - 1
    seen.mkdir()
    for part, (processes, last_step) in enumerate(((bench.processes, 5), (fewer, 9), (bench.processes, 0))):
        say(f"world size {processes}, {f'killed after step {last_step}' if last_step else 'to the end'}")
        worker = ("witness", str(seen / str(part)), str(last_step))
        flags = {"epochs": 2, "save_interval": 1, "keep_last": 99, "from_resume": 1}
        finish(bench.start(run, processes, worker, **flags), run.with_suffix(".log"), dies=last_step > 0)
    report = json.loads((run / "data_report.json").read_text(encoding="utf-8"))["train"]
    counts: Counter[tuple[int, int]] = Counter()
    for file in seen.iterdir():
        for line in file.read_text().splitlines():
            step, samples = json.loads(line)
            counts.update(((step - 1) // report["steps_per_epoch"], sample) for sample in samples)
    wanted = {(epoch, sample) for epoch in range(2) for sample in range(report["samples"])}
    wrong = sum(counts[key] != 1 for key in wanted | counts.keys())
    name = f"{bench.processes}, {fewer}, {bench.processes} processes: samples missing or repeated, of {len(wanted)}"
    return [Finding(name, wrong, 0)]


def split(bench: Bench) -> list[Finding]:
    """However rows are split over processes and micro-batches, the update is that of one batch (float64)."""
    say(f"{bench.processes} processes x micro-batches against one batch")
    log, out = bench.work / "split.log", bench.work / "split"
    out.mkdir()
    program = ["-m", "scripts.verify.workers", "split", str(out), bench.device]
    finish(bench.torchrun(log, bench.processes, program), log)
    found: dict[str, float] = {}
    for file in out.iterdir():
        for name, value in json.loads(file.read_text()).items():
            found[name] = max(found.get(name, 0.0), value)
    return [Finding(f"update of {name} == update of one batch", value, 1e-12) for name, value in found.items()]


def packing(bench: Bench) -> list[Finding]:
    """Packed documents have the logits and gradients that they have alone (float64), and none influences another."""
    import torch

    say("documents packed and alone")
    device, lengths, findings = torch.device(bench.device), [9, 2, 24, 5, 13], []
    model, documents = tiny_model(device), [random_document(n, length) for n, length in enumerate(lengths)]
    packed, gradient = logits_and_gradient(model, [documents])
    alone, sum_of_gradients = logits_and_gradient(model, [[document] for document in documents])
    findings.append(Finding("packed == alone: logits", largest(packed - alone), 1e-12))
    findings.append(Finding("packed == alone: gradient", largest(gradient - sum_of_gradients), 1e-12))
    for dtype in (torch.float64, *[torch.bfloat16] * (device.type == "cuda")):
        model = model.to(torch.float64 if dtype == torch.float64 else torch.float32)
        before, _ = logits_and_gradient(model, [documents], dtype)
        touched = 0
        for n, length in enumerate(lengths):
            others = [random_document(n + 100, length) if n == m else document for m, document in enumerate(documents)]
            changed = (logits_and_gradient(model, [others], dtype)[0] != before).any(dim=-1)
            start = sum(lengths[:n]) - n  # a document of L tokens has L - 1 positions
            own = changed[start : start + length - 1].sum()
            touched += int(changed.sum() - own) if own else len(changed)
        findings.append(Finding(f"positions that another document changes ({str(dtype)[6:]})", touched, 0))
    return findings


def export(bench: Bench) -> list[Finding]:
    """final/ holds the trained weights to the bit, and transformers computes their logits with it."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    run = bench.whole("ddp")
    say("final/ against the last checkpoint")
    shards = open_shards(CheckpointStore(run / "checkpoints").path(_steps(run)), "model").tensors()
    trained = trained_model(run, shards)
    theirs, info = AutoModelForCausalLM.from_pretrained(run / "final", output_loading_info=True, dtype=torch.float32)
    unknown = sum(len(names) for names in info.values())
    weights = theirs.state_dict()
    lost = [largest(weights[name] - tensor) for name, tensor in shards.items()]
    documents = [random_document(n, length) for n, length in enumerate((40, 7, 25))]
    ours, _ = logits_and_gradient(trained, [documents], torch.float32)
    with torch.no_grad():
        ids = [torch.from_numpy(document.ids[:-1])[None] for document in documents]
        logits = torch.cat([theirs(input_ids=each).logits[0] for each in ids])
    return [
        Finding("weights of final/ == weights trained", max(lost) + unknown, 0),
        Finding("logits by transformers == logits trained (float32)", largest(logits - ours), 1e-4),
    ]


def save(bench: Bench) -> list[Finding]:
    """A save may be killed with -9 at any point: what is found there is whole, and the run goes on from it."""
    whole, run = bench.whole("ddp"), bench.work / "deadly"
    store, damaged, lost = CheckpointStore(run / "checkpoints"), [], 0
    for place in PLACES:
        saved = _steps(run) if store.steps() else 0
        flags = {"from_resume": 1}
        finish(bench.start(run, bench.processes, ("die_in_save", place), **flags), run.with_suffix(".log"), dies=True)
        if f"killed in a save: {place}" not in run.with_suffix(".log").read_text(errors="replace"):
            raise RuntimeError(f"the run ended before it was killed: {run.with_suffix('.log').read_text()[-500:]}")
        newest = store.newest_verified(warn=damaged.append) or 0
        say(f"killed in a save ({place}), goes on from step {newest}")
        # it made one save and died in the next one
        lost = max(lost, saved + 2 * SAVE_INTERVAL - newest)
    bench.train(run, bench.processes, from_resume=1)
    return [
        Finding(f"checkpoints damaged by kill -9 in {len(PLACES)} places of a save", len(damaged), 0),
        Finding("steps lost by it", lost, SAVE_INTERVAL),
        Finding("resumed after it == uninterrupted", difference(whole, run), 0),
    ]


def trained_model(run: Path, weights: dict[str, Any]) -> Any:
    """The decoder of a run with the weights of a checkpoint."""
    from model.build import ModelRequest, choose_model

    settings = read_trainer_state(CheckpointStore(run / "checkpoints").path(_steps(run)))["config"]
    vocab_size = weights["model.embed_tokens.weight"].shape[0]
    model = choose_model(ModelRequest(shape={name: settings.get(name) for name in SHAPE_FLAGS}), vocab_size)
    model.load_state_dict({**model.state_dict(), **weights, "lm_head.weight": weights["model.embed_tokens.weight"]})
    return model


CHECKS: dict[str, Callable[[Bench], list[Finding]]] = {
    "packing": packing, "split": split, "resume_ddp": resume_ddp, "resume_fsdp": resume_fsdp, "world_size": world_size,
    "export": export, "save": save,
}  # fmt: skip

# ---------------------------------------------------------------------------------------------------------------------
# The table


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.verify", description="Checks the promises of this project on this machine."
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto = CUDA if there is one")
    parser.add_argument("--processes", metavar="N", type=positive, help="default: two, on GPUs at most one for each")
    parser.add_argument("--only", choices=CHECKS, action="append", help="only this check; may be given several times")
    return parser.parse_args(argv)


def choose_machine(options: argparse.Namespace) -> tuple[str, int]:
    """Device and processes; ValueError for what is not here."""
    from training.device import choose_device

    processes = options.processes or 2
    device = choose_device(options.device, (options.processes or 1) - 1).type
    if device == "cuda" and not options.processes:
        import torch

        processes = min(processes, torch.cuda.device_count())
    return device, processes


def run_check(check: Callable[[Bench], list[Finding]], bench: Bench) -> tuple[list[Finding], str, str]:
    """Findings, verdict and, where there are no findings, the reason."""
    try:
        findings = check(bench)
    except NotRun as reason:
        return [], "not run", str(reason)
    except Exception as error:  # a job that fails keeps no promise
        return [], "BROKEN", f"{type(error).__name__}: {error}"
    return findings, "kept" if all(finding.kept for finding in findings) else "BROKEN", ""


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    try:
        device, processes = choose_machine(options)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    verdicts, started = Counter[str](), time.monotonic()
    print(f"{device}, at most {processes} processes\n{'promise':64} {'measured':>9} {'limit':>7} {'seconds':>7}")
    with tempfile.TemporaryDirectory(prefix="verify-") as work:
        bench = Bench(device, processes, Path(work))
        for name in options.only or CHECKS:
            began = time.monotonic()
            findings, verdict, reason = run_check(CHECKS[name], bench)
            verdicts[verdict] += 1
            seconds = f"{time.monotonic() - began:.1f}"
            for finding in findings:
                kept = "kept" if finding.kept else "BROKEN"
                print(f"{finding.promise:64} {finding.measured:9.2g} {finding.limit:7.1g} {seconds:>7}  {kept}")
                seconds = ""
            if not findings:
                print(f"{name:64} {'':9} {'':7} {seconds:>7}  {verdict}: {reason}")
            sys.stdout.flush()
    counts = ", ".join(f"{count} {verdict}" for verdict, count in sorted(verdicts.items(), reverse=True))
    print(f"checks: {counts}; {time.monotonic() - started:.0f} seconds")
    return 0 if verdicts["kept"] and not verdicts["BROKEN"] else 1


if __name__ == "__main__":
    sys.exit(main())
