"""Looks whether a run can work here, before it takes its time:   python -m scripts.doctor --config FILE

It takes all flags of the trainer. Under torchrun it counts the processes, and on several nodes it checks that they
share --save_dir and the time. A short form runs at every start of the trainer. Exit codes: 0, 1 where something is
wrong that a run would die of, 2 for a wrong flag.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import time
import uuid
from pathlib import Path
from typing import Any

from training.config import Config
from training.config.command_line import config_from_command_line
from training.diagnosis.machine import ERROR, OK, WARN, Finding, Machine, Sizes, check_clock, examine, look_around

ROWS = 20  # of each data file
NODES_SECONDS = 20.0  # in which the nodes must find each other's files
MARK = ".doctor-{}.json"


def check_devices(config: Config, machine: Machine, local: int) -> list[Finding]:
    """What torch can compute on, against what was asked for, and how processes would talk to each other."""
    import torch
    import torch.distributed as dist

    found, seen = [], torch.cuda.device_count() if torch.cuda.is_available() else 0
    names = ", ".join(torch.cuda.get_device_name(i) for i in range(seen))
    remedy = "install a CUDA build of torch that fits the driver, see README, or --device cpu"
    if config.device == "cuda" and not seen:
        found.append(Finding(ERROR, "devices", "torch finds no CUDA device", remedy))
    elif not seen and machine.gpus:
        words = f"there are {len(machine.gpus)} GPUs and torch {torch.__version__} finds none"
        found.append(Finding(WARN, "devices", words, remedy))
    elif config.device != "cpu" and 0 < seen < local:
        words = f"{local} processes on {seen} GPUs ({names})"
        found.append(Finding(ERROR, "devices", words, f"--nproc_per_node {seen}, or --device cpu"))
    else:
        found.append(Finding(OK, "devices", names if seen and config.device != "cpu" else "the CPU"))
    if not dist.is_available() or not dist.is_gloo_available():
        found.append(Finding(ERROR, "processes", "this torch has no gloo, by which processes agree", remedy))
    elif seen and config.device != "cpu" and not dist.is_nccl_available():
        found.append(Finding(ERROR, "processes", "this torch has no NCCL, by which GPUs exchange gradients", remedy))
    else:
        found.append(Finding(OK, "processes", "gloo and NCCL" if dist.is_nccl_available() else "gloo"))
    return found


def check_data(config: Config) -> list[Finding]:
    """Whether the files are there and their first rows can be trained; all rows are read when a run starts."""
    from dataset.errors import Defect
    from dataset.prepare import DataOptions
    from dataset.raw_rows import OF_THE_FILE
    from dataset.reader import read_conversations
    from dataset.sources import find_sources

    found = []
    options = DataOptions(**config.data_options)
    for flag, value in (("--data_path", config.data_path), ("--val_data_path", config.val_data_path)):
        if value in (None, "demo"):
            found += [Finding(OK, "data", f"{flag} demo: made by the program")] if value else []
            continue
        try:
            for source in find_sources(str(value), flag):
                rows = itertools.islice(read_conversations(source.path, options.fields(), options.data_format), ROWS)
                bad = [row for row in rows if isinstance(row, Defect)]
                words = f"{flag} {source.path}: {bad[0] if bad else 'its first rows are fine'}"
                remedy = "mend the row, or --bad_rows skip; python -m scripts.inspect_data shows samples"
                level = OK if not bad else WARN if config.bad_rows == "skip" else ERROR
                if bad and bad[0].code in OF_THE_FILE:
                    level, remedy = ERROR, f"is {flag} the right path, and the file whole?"
                found.append(Finding(level, "data", words, remedy))
        except (OSError, ValueError) as error:
            found.append(Finding(ERROR, "data", str(error), f"is {flag} the right path?"))
    return found


def check_directory(save_dir: Path, machine: Machine) -> list[Finding]:
    """Whether a run may write there, and what its clock says."""
    probe = save_dir / f".doctor-{uuid.uuid4().hex}"
    try:
        save_dir.mkdir(parents=True, exist_ok=True)
        probe.write_text("may be deleted")
        dated, now = probe.stat().st_mtime, time.time()
        probe.unlink()
    except OSError as error:
        words = f"--save_dir {save_dir} cannot be written to: {error.strerror}"
        return [Finding(ERROR, "directory", words, "another --save_dir, or its owner")]
    clock = [each for each in check_clock(machine, dated - (now - machine.clock)) if each.level != OK]
    return [Finding(OK, "directory", f"{save_dir} can be written to"), *clock]


def meet_nodes(save_dir: Path, node: int, nodes: int, seconds: float = NODES_SECONDS) -> dict[int, float]:
    """On node 0: each other node that sees the same directory, and how far its clock is ahead. Elsewhere: answer.

    Node 0 writes a file that no other start has written, the others answer beside it with what they have read there.
    """
    deadline, nonce = time.monotonic() + seconds, uuid.uuid4().hex

    def write(number: int, **values: Any) -> None:
        draft = save_dir / f"{MARK.format(number)}.{nonce}"
        draft.write_text(json.dumps({**values, "time": time.time()}))
        os.replace(draft, save_dir / MARK.format(number))

    def read(number: int) -> dict[str, Any]:
        try:
            return dict(json.loads((save_dir / MARK.format(number)).read_text()))
        except (OSError, ValueError, TypeError):
            return {}

    answers: dict[int, float] = {}
    save_dir.mkdir(parents=True, exist_ok=True)
    if node == 0:
        write(0, nonce=nonce)
        while len(answers) < nodes - 1 and time.monotonic() < deadline:
            for number in set(range(1, nodes)) - answers.keys():
                answer = read(number)
                if answer.get("nonce") == nonce:
                    answers[number] = answer["time"] - answer["asked_at"]
            time.sleep(0.05)
        for number in range(nodes):
            (save_dir / MARK.format(number)).unlink(missing_ok=True)
        return answers
    answered = None
    while time.monotonic() < deadline:
        asked = read(0)
        if asked and asked.get("nonce") != answered:
            answered = asked.get("nonce")
            write(node, nonce=answered, asked_at=asked.get("time", 0.0))
        elif answered and not asked:
            break  # node 0 has read it
        time.sleep(0.05)
    return {}


def check_nodes(save_dir: Path, nodes: int, answers: dict[int, float]) -> list[Finding]:
    """`answers` of the other nodes, by their number: seconds between the question and the answer, by their clocks."""
    if nodes == 1:
        return []
    if missing := sorted(set(range(1, nodes)) - answers.keys()):
        words = f"{save_dir} of node 0 is not seen by node {', '.join(map(str, missing))}"
        return [Finding(ERROR, "nodes", words, "--save_dir on a disk that all nodes share")]
    if late := {node: gap for node, gap in answers.items() if not -2 <= gap <= NODES_SECONDS + 2}:
        words = ", ".join(f"the clock of node {node} is {gap:+.0f} s off" for node, gap in late.items())
        return [Finding(WARN, "nodes", words, "set the clocks, best by NTP")]
    return [Finding(OK, "nodes", f"{nodes} nodes share {save_dir} and the time")]


def sizes_of_run(config: Config) -> tuple[Sizes | None, list[Finding]]:
    from dataset.tokenizer import vocabulary_size
    from model.build import ModelRequest, choose_tokenizer, load_tokenizer, sizes_of

    try:
        wanted = ModelRequest(**config.model_request)
        if wanted.from_weight != "none" and not Path(wanted.from_weight).is_dir():
            words = f"--from_weight {wanted.from_weight}: its size is known once it is downloaded"
            return None, [Finding(OK, "model", words)]
        source = choose_tokenizer(config.tokenizer, wanted.from_weight)
        tokenizer = load_tokenizer(source, config.chat_template, wanted.trust_in(source))
        sizes = sizes_of(wanted, vocabulary_size(tokenizer))
    except (OSError, ValueError) as error:
        return None, [Finding(ERROR, "model", str(error), "see --from_weight, --tokenizer, --chat_template")]
    if sizes is None:
        words = f"no model of this shape can be made of --from_weight {config.from_weight}"
        return None, [Finding(ERROR, "model", words, "the trainer with --dry_run says why")]
    return Sizes(**sizes), []


def diagnose(config: Config, world_size: int, local: int, node: int, nodes: int) -> list[Finding]:
    """All findings; on node 0 alone."""
    save_dir = Path(config.save_dir)
    made = not save_dir.exists()
    machine = look_around(save_dir)
    sizes, found = sizes_of_run(config)
    found = [*examine(config, machine, sizes, world_size, local), *found]
    found += [*check_devices(config, machine, local), *check_data(config), *check_directory(save_dir, machine)]
    if nodes > 1 and not any(each.topic == "directory" and each.level == ERROR for each in found):
        found += check_nodes(save_dir, nodes, meet_nodes(save_dir, node, nodes))
    if made and save_dir.is_dir() and not any(save_dir.iterdir()):
        save_dir.rmdir()
    return found


def main(argv: list[str] | None = None) -> int:
    if {"-h", "--help"} & set(sys.argv[1:] if argv is None else argv):
        argparse.ArgumentParser(
            prog="python -m scripts.doctor", description=__doc__,
            epilog="All flags are those of the trainer: python train_full_sft.py --help",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        ).print_help()  # fmt: skip
        return 0
    config = config_from_command_line(argv)
    numbers = ("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_WORLD_SIZE", 1), ("GROUP_RANK", 0)
    rank, local_rank, world_size, local, node = (int(os.environ.get(name, value)) for name, value in numbers)
    nodes = int(os.environ.get("GROUP_WORLD_SIZE", 1))
    if rank:
        if local_rank == 0 and nodes > 1:
            meet_nodes(Path(config.save_dir), node, nodes)
        return 0
    found = diagnose(config, world_size, local, node, nodes)
    for each in sorted(found, key=lambda each: (ERROR, WARN, OK).index(each.level)):
        print(
            f"{each.level:<5}  {each.topic}: {each.words}" + (f"\n       -> {each.remedy}" if each.level != OK else "")
        )
    if nodes == 1:
        print("several nodes: start this with torchrun as the trainer, and it checks that they share --save_dir")
    return int(any(each.level == ERROR for each in found))


if __name__ == "__main__":
    sys.exit(main())
