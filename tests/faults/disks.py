"""What may be on a disk after the power went: a log of system calls is replayed on a disk that keeps no promise.

Only fsync is a promise: that of a file for its bytes, that of a directory for the names in it. Of other bytes nothing,
half, all, or zeros in their place may be there, and of the names that were made, renamed and deleted since, any.
"""

from __future__ import annotations

import ast
import hashlib
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.faults.strace import Call

Tree = dict[str, Any]  # name -> bytes of a file, or Tree
TEXT = r'"((?:[^"\\]|\\.)*)"'
LOSSES = ("all", "none", "half", "zeros")  # what is there of bytes that were not forced to the disk


@dataclass
class File:
    content: bytes = b""
    sure: bytes = b""

    def after(self, loss: str) -> bytes:
        if self.sure == self.content or loss == "all":
            return self.content
        if loss == "none":
            return self.sure
        half = self.content[: (len(self.sure) + len(self.content)) // 2]
        return half if loss == "half" else self.sure + bytes(len(self.content) - len(self.sure))


@dataclass
class Directory:
    names: dict[str, File | Directory] = field(default_factory=dict)
    sure: dict[str, File | Directory] = field(default_factory=dict)
    pending: list[tuple[str, str, Any]] = field(default_factory=list)  # since its last fsync

    def change(self, kind: str, name: str, value: Any = None) -> None:
        self.pending.append((kind, name, value))
        _apply(self.names, kind, name, value)

    def settle(self) -> None:
        self.sure, self.pending = dict(self.names), []


def _apply(names: dict[str, Any], kind: str, name: str, value: Any) -> None:
    if kind == "make":
        names[name] = value
    elif kind == "remove":
        names.pop(name, None)
    elif name in names:  # renamed; its own making may be lost
        names[value] = names.pop(name)


class Disk:
    """A disk on which a directory is replayed."""

    def __init__(self, root: Path):
        """What lies there already is safe."""
        self.root, self.top = root, _read(root)
        self.reported = 0

    def replay(self, call: Call) -> bool:
        """Do what a call has done; whether the disk has changed by it."""
        if call.result.startswith(("-1", "?")) and "exited" not in call.result:
            return False
        words = [ast.literal_eval(f'b"{text}"') for text in re.findall(TEXT, call.arguments)]
        open_path = re.match(r"\d+<([^>]*)>", call.arguments)
        if call.name.startswith("write") and open_path and open_path[1].startswith(("socket", "pipe")):
            self.reported += 1  # the saver tells its parent of a step
            return False
        paths = [Path(open_path[1]) / word.decode() if call.name.endswith("at") and open_path else Path(word.decode())
                 for word in words] if not call.name.startswith("write") else []  # fmt: skip
        if call.name in ("write", "fsync") and open_path:
            paths = [Path(open_path[1])]
        if not paths or not all(path.is_relative_to(self.root) for path in paths):
            return False
        if call.name == "fsync":
            node = self._find(paths[0])
            if isinstance(node, Directory):
                node.settle()
            else:
                node.sure = node.content
        elif call.name == "write":
            file = self._find(paths[0])
            file.content += words[0][: int(call.result)]
        elif call.name == "openat":
            if "O_CREAT" not in call.arguments:
                return False
            assert "O_EXCL" in call.arguments or "O_TRUNC" in call.arguments, call
            assert paths[0].name not in self._find(paths[0].parent).names, f"{call}: writes over an older file"
            self._find(paths[0].parent).change("make", paths[0].name, File())
        elif call.name == "mkdir":
            self._find(paths[0].parent).change("make", paths[0].name, Directory())
        elif call.name == "rename":
            assert paths[0].parent == paths[1].parent, call
            self._find(paths[0].parent).change("rename", paths[0].name, paths[1].name)
        elif call.name in ("unlink", "unlinkat", "rmdir"):
            self._find(paths[0].parent).change("remove", paths[0].name)
        else:
            raise AssertionError(f"{call}: not known here")
        return True

    def possible(self, rng: random.Random, draws: int) -> Iterator[Tree]:
        """Disks that may be found now: names lost or kept up to each moment since they were sure, and some drawn."""
        directories = list(_directories(self.top, set()))
        most = max(len(directory.pending) for directory in directories)
        for loss in LOSSES:
            for kept in range(most + 1):
                chosen = {id(d): d.pending[: max(0, len(d.pending) - most + kept)] for d in directories}
                yield _tree(self.top, chosen, lambda file, loss=loss: file.after(loss))
            yield _tree(self.top, {}, lambda file, loss=loss: file.after(loss))
        for _ in range(draws):
            chosen = {id(d): [change for change in d.pending if rng.random() < 0.5] for d in directories}
            yield _tree(self.top, chosen, lambda file: file.after(rng.choice(LOSSES)))

    def _find(self, path: Path) -> Any:
        node: Any = self.top
        for name in path.relative_to(self.root).parts:
            node = node.names[name]
        return node


def _read(path: Path) -> Directory:
    names = {p.name: _read(p) if p.is_dir() else File(p.read_bytes(), p.read_bytes()) for p in path.iterdir()}
    return Directory(dict(names), dict(names))


def _directories(node: Directory, seen: set[int]) -> Iterator[Directory]:
    """All that can still be met, by a name that is there or by one that may be there again."""
    if id(node) not in seen:
        seen.add(id(node))
        yield node
        lost = [value for kind, _, value in node.pending if kind == "make"]
        for child in [*node.names.values(), *node.sure.values(), *lost]:
            if isinstance(child, Directory):
                yield from _directories(child, seen)


def _tree(node: Directory, chosen: dict[int, list], content_of: Any) -> Tree:
    names = dict(node.sure)
    for change in chosen.get(id(node), []):
        _apply(names, *change)
    return {
        name: _tree(child, chosen, content_of) if isinstance(child, Directory) else content_of(child)
        for name, child in sorted(names.items())
    }


def signature(tree: Tree) -> str:
    """Equal for equal disks."""
    digest = hashlib.sha256()
    for name, child in tree.items():
        digest.update(f"{name}:{signature(child) if isinstance(child, dict) else len(child)}/".encode())
        digest.update(b"" if isinstance(child, dict) else child)
    return digest.hexdigest()


def write_tree(tree: Tree, path: Path) -> None:
    path.mkdir()
    for name, child in tree.items():
        if isinstance(child, dict):
            write_tree(child, path / name)
        else:
            (path / name).write_bytes(child)
