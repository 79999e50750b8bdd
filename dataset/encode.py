"""Rows to samples, in as many processes as there are cores: all that is done to a row and needs no other row."""

import contextlib
import itertools
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from dataset.chat import ChatRenderer
from dataset.control_tokens import Sample
from dataset.errors import RowError
from dataset.formats import Fields
from dataset.raw_rows import RawRow, parse_row
from dataset.reader import Conversation, parse_conversation
from dataset.system_prompts import SystemPrompts, system_as_user

BLOCK_ROWS = 128
BLOCKS_AHEAD = 4  # per process
Block = list[tuple[int, RawRow]]
Outcomes = list[tuple[int, list[Sample] | RowError]]
Item, Result = TypeVar("Item"), TypeVar("Result")


@dataclass(frozen=True)
class Tokeniser:
    """Turns blocks of (line, row) into (line, samples or the reason why there are none), in the same order."""

    renderer: ChatRenderer
    layout: str
    fields: Fields
    system_prompts: SystemPrompts | None = None
    system_as: str = "system"

    def __call__(self, block: Block) -> Outcomes:
        parsed = [self._parse(line, raw) for line, raw in block]
        rendered = iter(self.renderer.render_batch([each for each in parsed if isinstance(each, Conversation)]))
        return [
            (line, _with_notes(next(rendered), each.notes) if isinstance(each, Conversation) else each)
            for (line, _), each in zip(block, parsed, strict=True)
        ]

    def _parse(self, line: int, raw: RawRow) -> Conversation | RowError:
        try:
            conversation = parse_conversation(line, parse_row(raw), self.layout, self.fields)
            conversation = self.system_prompts.add_to(conversation) if self.system_prompts else conversation
            return system_as_user(conversation) if self.system_as == "user" else conversation
        except RowError as error:
            return error


def _with_notes(outcome: list[Sample] | RowError, notes: tuple[str, ...]) -> list[Sample] | RowError:
    """The samples of a row, which also know what the reader noted of it."""
    if not notes or isinstance(outcome, RowError):
        return outcome
    return [replace(sample, notes=(*notes, *sample.notes)) for sample in outcome]


def in_blocks(rows: Iterable[tuple[int, RawRow]]) -> Iterator[Block]:
    rows = iter(rows)
    while block := list(itertools.islice(rows, BLOCK_ROWS)):
        yield block


def map_in_order(work: Callable[[Item], Result], items: Iterator[Item], processes: int) -> Iterator[Result]:
    """Yields work(item) for each item in order; at most BLOCKS_AHEAD items per process are under way.

    Raises ChildProcessError when a process dies.
    """
    first = list(itertools.islice(items, 2))
    items = itertools.chain(first, items)
    if processes < 2 or len(first) < 2:
        yield from map(work, items)
        return
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    pool = ProcessPoolExecutor(processes, context, initializer=_start, initargs=(work, os.getpid()))
    under_way: deque[Future[Any]] = deque()
    try:
        for item in items:
            under_way.append(pool.submit(_do, item))
            if len(under_way) == processes * BLOCKS_AHEAD:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()
    except BrokenProcessPool as error:
        raise ChildProcessError(
            "a process that tokenises was killed: by a chat template that does not end, or for lack of memory"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


_work: Callable[[Any], Any]  # of this worker process


def _start(work: Callable[[Any], Any], parent: int) -> None:
    """Prepares a worker: it leaves Ctrl-C to its parent, and ends when that is gone without a word."""
    global _work
    _work = work
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one thread per process; the pool of the parent did not come along
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _do(item: Any) -> Any:
    return _work(item)


def available_cores() -> int:
    """Cores that this process may use."""
    with contextlib.suppress(AttributeError):  # only Linux tells
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
