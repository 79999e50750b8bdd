"""What the computing of strangers' chat templates may take: seconds and memory.

A template is a program that comes with a model or a data set's author. Jinja's sandbox keeps it from the machine; these
limits keep it from going on for ever.
"""

import contextlib
import os
import resource
import signal
import threading
from collections.abc import Iterator
from types import FrameType

from dataset.errors import UnsafeDataError

SECONDS = 5.0  # of computing that one rendering of a template may take
MEMORY = 1 << 30  # bytes that it may add to what the process has


class _TimeIsUp(BaseException):
    """No Exception: those that a template's filters raise, jinja takes for its own in places."""


@contextlib.contextmanager
def limits() -> Iterator[None]:
    """Raises UnsafeDataError in a block that computes for longer than SECONDS, MemoryError in one that takes too much.

    Only a process's main thread can be told. Python acts on a signal between two of its instructions, which a single
    huge one (comparing lists that hold each other many times over) keeps waiting. The system itself then ends the
    process by SIGVTALRM, once the block has computed for two seconds more.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    over = False

    def stop(_number: int, frame: FrameType | None) -> None:
        # Raised in the lines that end this block, it would leave them undone; the next time comes soon enough.
        ending = frame is not None and frame.f_code.co_filename in (__file__, contextlib.__file__)
        if not (over or ending):
            raise _TimeIsUp

    before, allowed = signal.signal(signal.SIGPROF, stop), resource.getrlimit(resource.RLIMIT_AS)
    _allow_memory(MEMORY, *allowed)
    signal.setitimer(signal.ITIMER_PROF, SECONDS, 0.1)  # again and again: what a destructor raises is lost
    signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS + 2)
    try:
        try:
            yield
        finally:
            over = True
    except _TimeIsUp:
        raise UnsafeDataError(f"the chat template took more than {SECONDS} seconds of computing") from None
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, allowed)
        signal.signal(signal.SIGPROF, before)


def _allow_memory(more: int, soft: int, hard: int) -> None:
    """Limit this process to `more` bytes than it has; only Linux tells how many those are."""
    try:
        descriptor = os.open("/proc/self/statm", os.O_RDONLY)
    except OSError:
        return
    wanted = int(os.read(descriptor, 64).split()[0]) * resource.getpagesize() + more
    os.close(descriptor)
    resource.setrlimit(resource.RLIMIT_AS, (wanted if soft == resource.RLIM_INFINITY else min(soft, wanted), hard))
