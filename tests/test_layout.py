"""The shape of the project: who may import whom, who may touch the process group, and how long the loop may grow."""

import ast
import io
import re
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LEAVES = {"model", "dataset", "training", "trainer_utils"}
OURS = LEAVES | {"train_full_sft", "scripts", "tests"}
FILES = sorted(p for p in ROOT.rglob("*.py") if not {".venv", "runs", ".cache"} & set(p.relative_to(ROOT).parts))
CORE = [
    p
    for p in FILES
    if p.relative_to(ROOT).parts[0].removesuffix(".py") in LEAVES | {"train_full_sft"} and p.name != "demo.py"
]  # the demo is data, not machinery


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


def forbidden_edges(room: str, imported: set[str]) -> set[str]:
    """Rooms of ours among `imported` that a file of `room` may not know."""
    rooms = {name.split(".")[0] for name in imported} & OURS - {room}
    if room == "tests":
        return set()
    allowed = LEAVES if room == "train_full_sft" else LEAVES | {"train_full_sft"} if room == "scripts" else set()
    return rooms - allowed


def test_leaves_do_not_know_each_other():
    wrong = {
        str(p): edges for p in FILES if (edges := forbidden_edges(room_of(p), imports_of(ast.parse(p.read_text()))))
    }
    assert not wrong
    assert forbidden_edges("model", {"dataset.rows"}) and forbidden_edges("training", {"trainer_utils"})


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
    assert sum(written.values()) <= 5500, written
    assert lines_of_code('"""A\n\nB."""\n# c\n\nx = """\n"""  # d\n') == 2


RISKY = re.compile(
    r"\bimport pickle\b|\bpickle\.|torch\.load\(|(?<![\w.])eval\(|(?<![\w.])exec\(|yaml\.load\(|yaml\.unsafe|shell=True"
    r"|allow_pickle|_object_list\(|(gather|scatter|broadcast)_object|weights_only"
)


def test_nothing_reads_code_as_data():
    hits = [
        f"{p}:{i}"
        for p in FILES
        if room_of(p) != "tests"
        for i, line in enumerate(p.read_text().splitlines(), 1)
        if RISKY.search(line)
    ]
    assert not hits
    assert RISKY.search("torch.load(path)") and RISKY.search("dist.broadcast_object_list(x)")


def test_every_module_says_what_it_is_for():
    assert not [str(p) for p in FILES if not ast.get_docstring(ast.parse(p.read_text()))]
