"""Does this tree compute what another commit did? `python -m tests.golden --against COMMIT`, `--only NAME`.

Every case of CASES is trained twice by both, without a break and resumed from the middle, and by the one until the
middle and the other to the end. What the runs leave behind is compared: the bytes of final/, records and states without
what a clock or a machine says, config.yaml, --help.
The old tree comes from git history. Both lie and train in directories of the same name, so paths in files are equal.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import re
import runpy
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TREE = Path(os.environ.get("GOLDEN_TREE", ROOT))
FORK = multiprocessing.get_context("fork")
SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
SHAPE = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "max_seq_len": 64,
    "batch_size": 1, "accumulation_steps": 2, "epochs": 2, "learning_rate": 0.01, "dropout": 0.1, "device": "cpu",
    "seed": 7, "log_interval": "1", "save_interval": "1", "keep_last": 99, "report": 0, "dtype": "float32",
}  # fmt: skip
STAGES = """
- {name: first, mini_epochs: 1, learning_rate: 0.01, lr_schedule: wsd}
- {name: second, mini_epochs: 2, learning_rate: 0.002, lr_schedule: cosine, loss_weights: {ce: 1, z: 0.02}}
"""
HALF_SEEN = {"val_fraction": 0.2, "eval_interval": "4"}
FEATURES: dict[str, dict[str, Any]] = {
    "plain": HALF_SEEN,
    "float16": {"dtype": "float16"},
    "ema": {"ema_decay": 0.9, "lr_schedule": "wsd", "save_top_k": 1, **HALF_SEEN},
    "stages": {"stages": "stages.yaml", **HALF_SEEN},
    "lora": {"from_weight": "base", "lora_rank": 4},
    "distillation": {"teacher": "base"},
}
CASES = {
    f"{name} {strategy} {size}": ({**SHAPE, **flags, "strategy": strategy}, size)
    for name, flags in FEATURES.items()
    for size, strategy in ((1, "ddp"), (2, "ddp"), (2, "fsdp"))
}
OF_A_CLOCK = re.compile(r"second|time|memory|wait|pid|host|started|updated|utilization|wandb_id|created|version")


def write_material(place: Path) -> None:
    """What the cases read, the same for every tree: rows and a table of stages."""
    words = ["river", "seven", "wie", "geht", "光", "count", "spell", "and", "then", "left", "3.14", "ok!"]
    rows = []
    for number in range(48):
        text = " ".join(words[(number * 7 + place * 5) % len(words)] for place in range(2 + number % 9))
        turns = [{"role": "user", "content": text}, {"role": "assistant", "content": text[::-1]}]
        rows.append(json.dumps({"messages": turns}, ensure_ascii=False) + "\n")
    (place / "rows.jsonl").write_text("".join(rows), encoding="utf-8")
    (place / "stages.yaml").write_text(STAGES, encoding="utf-8")


def train(words: list[str], world_size: int) -> None:
    """What torchrun does with a command line, in forks of this process, which has imported the trainer already.

    It calls nothing of the tree: the same lines have to drive trees whose modules have other names.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = [FORK.Process(target=be_rank, args=(rank, world_size, port, words)) for rank in range(world_size)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(180)
    codes = [rank.exitcode for rank in ranks]
    if codes != [0] * world_size:
        for rank in ranks:
            rank.kill()
        raise SystemExit(f"{' '.join(words)}: exit codes {codes}\n{Path('golden.log').read_text()}")


def be_rank(rank: int, world_size: int, port: int, words: list[str]) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_WORLD_SIZE=str(world_size)
    )
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), TOKENIZERS_PARALLELISM="false")
    log = os.open("golden.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.argv = words
    try:
        if words[0] == "train_full_sft.py":
            runpy.run_path(str(TREE / "train_full_sft.py"), run_name="__main__")
        else:
            runpy.run_module(words[0], run_name="__main__")
    except SystemExit as end:
        os._exit(end.code if isinstance(end.code, int) else 0 if end.code is None else 1)
    except BaseException:
        import traceback

        traceback.print_exc()
        os._exit(70)
    os._exit(0)


def record(out: Path, only: str, begun: Path) -> None:
    """Train all cases with the tree in sys.path[0], in the current directory; write what came of them.

    The first tree leaves its runs in `begun` as they are in their middle, the second goes on with them too.
    """
    is_first = not begun.is_dir()
    write_material(Path())
    told: dict[str, Any] = {}
    for word in ("train_full_sft.py", "scripts/train_distillation.py"):
        module = word.removesuffix(".py").replace("/", ".")
        shown = subprocess.run([sys.executable, "-m", module, "--help"], cwd=TREE, capture_output=True, text=True)
        told[f"{word} --help"] = {"text": shown.stdout}
    plain = words_of("runs/base", SHAPE)
    train(plain, 1)
    shutil.copytree("runs/base/final", "base")
    for name, (flags, size) in CASES.items():
        if only not in name:
            continue
        run = Path("runs", name.replace(" ", "-"))
        words = words_of(run, flags)
        train(words, size)
        told[name] = traces_of(run)
        for left in ("final", "best"):
            shutil.rmtree(run / left, ignore_errors=True)
        checkpoints = sorted((run / "checkpoints").glob("step-*"))
        for later in checkpoints[len(checkpoints) // 2 :]:
            shutil.rmtree(later)
        if is_first:
            shutil.copytree(run, begun / run.name)
        train([*words, "--from_resume=1"], size)
        told[f"{name}, resumed"] = traces_of(run)
        if not is_first:
            shutil.rmtree(run)
            shutil.copytree(begun / run.name, run)
            train([*words, "--from_resume=1"], size)
        told[f"{name}, begun by the old tree"] = traces_of(run)
    out.write_text(json.dumps(told, indent=1, sort_keys=True))


def words_of(run: Path | str, flags: dict[str, Any]) -> list[str]:
    said = {"data_path": "rows.jsonl", "cache_dir": "cache", "save_dir": str(run), **flags}
    program = "scripts.train_distillation" if "teacher" in flags else "train_full_sft.py"
    if "from_weight" in flags:
        said = {name: value for name, value in said.items() if name not in SIZES}
    return [program, *(f"--{name}={value}" for name, value in said.items())]


def traces_of(run: Path) -> dict[str, Any]:
    """Each file of a run: a digest of its bytes, or its content without what a clock or a machine says."""
    traces: dict[str, Any] = {}
    for path in sorted(run.rglob("*")):
        name = str(path.relative_to(run))
        if path.is_dir() or name in ("environment.json", ".lock", ".job", "alerts.jsonl") or "manifest.json" in name:
            continue
        if name == "metrics.jsonl":
            records = [json.loads(line) for line in path.read_text().splitlines()]
            traces[name] = [without_clock(record) for record in records if record["kind"] != "system"]
        elif path.suffix in (".yaml", ".md"):
            traces[name] = path.read_text().splitlines()
        elif path.suffix == ".json" and not name.startswith("final"):
            traces[name] = without_clock(json.loads(path.read_text()))
        else:
            traces[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return traces


def without_clock(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: without_clock(inner) for name, inner in value.items() if not OF_A_CLOCK.search(name)}
    return [without_clock(inner) for inner in value] if isinstance(value, list) else value


def differences(old: Any, new: Any, place: str = "") -> list[str]:
    """Where two records part, one line each."""
    if isinstance(old, dict) and isinstance(new, dict):
        found = []
        for name in sorted({*old, *new}):
            if name not in old or name not in new:
                found.append(f"{place}{name}: only in the {'new' if name in new else 'old'} tree")
            else:
                found += differences(old[name], new[name], f"{place}{name}: ")
        return found
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return [
            line for at, pair in enumerate(zip(old, new, strict=True)) for line in differences(*pair, f"{place}{at}: ")
        ]
    return [] if old == new else [f"{place}{str(old)[:80]} is now {str(new)[:80]}"]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.golden", description=__doc__.split("?")[0] + ".")
    parser.add_argument("--against", metavar="COMMIT", default="HEAD", help="the old tree (default HEAD)")
    parser.add_argument("--only", metavar="TEXT", default="", help="cases whose name has this text")
    parser.add_argument("--record", metavar="FILE", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.record:
        record(Path(options.record), options.only, Path(options.record).with_name("begun"))
        return 0
    with tempfile.TemporaryDirectory(prefix="golden-") as scratch:
        tree, work, told = Path(scratch, "tree"), Path(scratch, "work"), {}
        for name in ("old", "new"):
            shutil.rmtree(tree, ignore_errors=True)
            shutil.rmtree(work, ignore_errors=True)
            tree.mkdir()
            work.mkdir()
            if name == "old":
                archive = subprocess.run(["git", "archive", options.against], cwd=ROOT, check=True, capture_output=True)
                subprocess.run(["tar", "-x", "-C", tree], input=archive.stdout, check=True)
            else:
                listed = subprocess.run(
                    ["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, check=True, capture_output=True
                )
                for file in filter(None, listed.stdout.decode().split("\0")):
                    if (ROOT / file).is_file():
                        (tree / file).parent.mkdir(parents=True, exist_ok=True)
                        shutil.copyfile(ROOT / file, tree / file)
            out = Path(scratch, f"{name}.json")
            environment = {**os.environ, "GOLDEN_TREE": str(tree), "OMP_NUM_THREADS": "1"}
            command = [sys.executable, Path(__file__).resolve(), "--record", out, "--only", options.only]
            subprocess.run(command, cwd=work, env=environment, check=True)
            told[name] = json.loads(out.read_text())
    found = differences(told["old"], told["new"])
    print("\n".join(found) if found else f"{len(told['old'])} records: the same")
    return int(bool(found))


if __name__ == "__main__":
    if "--record" in sys.argv:
        sys.path[0] = str(TREE)
        import torch

        import train_full_sft  # noqa: F401
        import trainer_utils  # noqa: F401

        torch.set_num_threads(1)
    sys.exit(main())
