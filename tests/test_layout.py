"""The shape of the project: who may import whom, who may touch the process group, and how long the loop may grow."""

import ast
import io
import re
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOUNDATIONS = {"model", "dataset", "trainer_utils"}
OURS = FOUNDATIONS | {"training", "train_full_sft", "scripts", "tests"}
ORDER = ("config", "control", "schedule", "checkpoints", "records", "diagnosis", "run")  # of the rooms of training/
FILES = sorted(p for p in ROOT.rglob("*.py") if not {".venv", "runs", ".cache"} & set(p.relative_to(ROOT).parts))
CORE = [
    p
    for p in FILES
    if p.relative_to(ROOT).parts[0].removesuffix(".py") in FOUNDATIONS | {"training", "train_full_sft"}
    and p.name != "demo.py"
]  # the demo is data, not machinery


# What looks at a run and changes nothing that is trained: it could be taken away.
WATCHING = {
    *(str(path.relative_to(ROOT)) for path in (ROOT / "training" / "diagnosis").glob("*.py")),
    *(f"training/records/{name}.py" for name in ("run_files", "sinks", "system")),
}


def room_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imports_of(tree: ast.AST) -> set[str]:
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module or "")
    return names


def forbidden_edges(path: Path, imported: set[str]) -> set[str]:
    """What a file of ours may not know: all above it, and in training/ what only training/run/ puts together."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    room, found = parts[0], {name.split(".")[0] for name in imported} & OURS - {parts[0]}
    if room == "tests":
        return set()
    if room in FOUNDATIONS:
        return found
    above = {"training": {"train_full_sft", "scripts", "tests"}, "train_full_sft": {"scripts", "tests"}}
    wrong = found & above.get(room, {"tests"})
    if room == "training" and len(parts) > 2:
        wrong |= set() if parts[1] == "run" else found & {"model", "dataset"}
        inside = [name.split(".")[1] for name in imported if name.startswith("training.")]
        wrong |= {f"training.{name}" for name in inside if name in ORDER[ORDER.index(parts[1]) + 1 :]}
    return wrong


def test_arrows_run_down():
    """scripts -> train_full_sft -> training -> model, dataset, trainer_utils, which know nobody."""
    wrong = {
        str(p.relative_to(ROOT)): edges
        for p in FILES
        if (edges := forbidden_edges(p, imports_of(ast.parse(p.read_text()))))
    }
    assert not wrong
    assert forbidden_edges(ROOT / "model" / "x.py", {"dataset.rows"})
    assert forbidden_edges(ROOT / "training" / "records" / "x.py", {"training.diagnosis.rules"})
    assert forbidden_edges(ROOT / "training" / "control" / "x.py", {"model.losses"})
    assert not forbidden_edges(ROOT / "training" / "run" / "x.py", {"model.losses", "training.control.lock"})


def test_only_trainer_utils_touches_the_process_group():
    users = {
        room_of(p) for p in CORE if any(n.startswith("torch.distributed") for n in imports_of(ast.parse(p.read_text())))
    }
    assert users == {"trainer_utils"}


@pytest.mark.parametrize(("name", "limit"), [("train_step", 45), ("train_epoch", 70)])
def test_the_loop_stays_short(name, limit):
    tree = ast.parse((ROOT / "train_full_sft.py").read_text())
    node = next(n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == name)
    assert node.end_lineno - node.lineno + 1 <= limit


def lines_of_code(text: str) -> int:
    """Lines that hold code: neither blank nor comment nor docstring."""
    silent = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    tokens = [t for t in tokenize.generate_tokens(io.StringIO(text).readline) if t.type not in silent]
    code = {line for token in tokens for line in range(token.start[0], token.end[0] + 1)}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            code -= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return len(code)


def test_the_core_stays_small_enough_to_read():
    texts = {str(p.relative_to(ROOT)): p.read_text() for p in CORE}
    lengths = {name: len(text.splitlines()) for name, text in texts.items()}
    # The two files of the top level are one job each, which a reader would have to put together again.
    assert max(lengths.pop(name) for name in ("train_full_sft.py", "trainer_utils.py")) <= 520
    assert max(lengths.values()) <= 450
    written = {name: lines_of_code(text) for name, text in texts.items()}
    watching = sum(written.pop(name) for name in WATCHING)
    assert sum(written.values()) <= 9900, written
    assert watching <= 1600, watching
    assert lines_of_code('"""A\n\nB."""\n# c\n\nx = """\n"""  # d\n') == 2


UNPICKLERS = {"pickle", "_pickle", "cPickle", "pickletools", "marshal", "shelve", "joblib", "dill", "cloudpickle"}
RISKY_CALLS = {
    "torch.load", "torch.jit.load", "torch.package", "numpy.load", "pandas.read_pickle", "eval", "exec", "compile",
    "__import__", "os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput", "yaml.load",
    "yaml.load_all", "yaml.full_load", "yaml.unsafe_load", "yaml.unsafe_load_all", "yaml.Loader", "yaml.FullLoader",
    "yaml.UnsafeLoader", "yaml.CLoader",
}  # fmt: skip
RISKY_SWITCHES = {"shell", "allow_pickle", "trust_remote_code"}  # may be given as False, which says it aloud
COLLECTIVES = re.compile(r"(all_gather|broadcast|gather|scatter|send|recv)_object(_list)?")


def risks_of(text: str) -> list[str]:
    """What in a program could run data as code: `line: name`. Names are told through whatever import renames them."""
    tree, names, found = ast.parse(text), {}, []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.asname: alias.name for alias in node.names if alias.asname}
            full = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            full = [f"{node.module}.{alias.name}" for alias in node.names]
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
        else:
            continue
        found += [(node.lineno, name) for name in full if name.split(".")[0] in UNPICKLERS or name in RISKY_CALLS]

    def dotted(node: ast.AST) -> str:
        if isinstance(node, ast.Attribute):
            return f"{dotted(node.value)}.{node.attr}"
        return names.get(node.id, node.id) if isinstance(node, ast.Name) else ""

    for node in ast.walk(tree):
        if isinstance(node, (ast.Name, ast.Attribute)):
            name = dotted(node)
            if name in RISKY_CALLS or name.split(".")[0] in UNPICKLERS or COLLECTIVES.fullmatch(name.split(".")[-1]):
                found.append((node.lineno, name))
        elif isinstance(node, ast.keyword) and node.arg in {*RISKY_SWITCHES, "weights_only"}:
            harmless = isinstance(node.value, ast.Constant) and node.value.value is False and node.arg != "weights_only"
            found += [] if harmless else [(node.value.lineno, f"{node.arg}=")]
    return [f"{line}: {name}" for line, name in sorted(found)]


def test_nothing_reads_code_as_data():
    found = {
        str(p.relative_to(ROOT)): [risk.split(": ")[1] for risk in risks]
        for p in FILES
        if room_of(p) != "tests" and (risks := risks_of(p.read_text()))
    }
    assert found == {"model/trust.py": ["trust_remote_code="]}  # where a user's word for it becomes an argument


@pytest.mark.parametrize(
    "text",
    [
        "import pickle", "import pickle as p", "from pickle import loads", "import _pickle", "import marshal",
        "import shelve", "import joblib", "import dill", "import cloudpickle", "def f():\n    import pickle",
        "torch.load(x)", "torch.load(x, weights_only=True)", "from torch import load", "import torch as t\nt.load(x)",
        "f = torch.load", "torch.jit.load(x)", "import numpy as np\nnp.load(x)", "numpy.load(x, allow_pickle=False)",
        "np.save(x, y, allow_pickle=True)", "read(x, allow_pickle=flag)", "pandas.read_pickle(x)", "eval(x)", "exec(x)",
        "compile(x, '', 'exec')", "list(map(eval, x))", "__import__(x)", "os.system(x)", "from os import system",
        "os.popen(x)", "pickle.loads(x)",
        "subprocess.run(x, shell=True)", "run(x, shell=flag)", "subprocess.getoutput(x)", "yaml.load(x)",
        "yaml.load(x, Loader=yaml.SafeLoader)", "yaml.unsafe_load(x)", "yaml.full_load(x)", "from yaml import load",
        "class A(yaml.Loader): pass", "dist.broadcast_object_list(x)", "dist.all_gather_object(x, y)",
        "dist.gather_object(x)", "dist.scatter_object_list(x, y)", "dist.send_object_list(x)",
        "from torch.distributed import recv_object_list\nrecv_object_list(x)", "f(trust_remote_code=True)",
        "f(trust_remote_code=flag)",
    ],
)  # fmt: skip
def test_what_could_run_data_is_found(text):
    assert risks_of(text)


def test_what_only_looks_like_it_is_left_alone():
    harmless = """
import json, os, re, subprocess
model.eval()
self.exec(x)
re.compile(x)
json.load(x)
yaml.safe_load(x)
yaml.SafeLoader
load(x, trust_remote_code=False, allow_pickle=False, shell=False)
subprocess.run(["git"], shell=False)
np.save(x, y, allow_pickle=False)
"pickle.loads(x)"  # torch.load(x)
"""
    assert not risks_of(harmless)


def test_every_module_says_what_it_is_for():
    assert not [str(p) for p in FILES if not ast.get_docstring(ast.parse(p.read_text()))]
