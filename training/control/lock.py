"""Who trains into a directory. Asked before torch is imported, so that a second launch is refused at once."""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import sys
from pathlib import Path
from typing import IO, Any

EXIT_INTERRUPTED = 130


def exit_on_ctrl_c() -> Any:
    """While a program imports what it needs, which takes seconds and whose traceback says nothing.

    Returns the handler to put back for SIGINT after that.
    """
    before = signal.getsignal(signal.SIGINT)
    if before == signal.default_int_handler:
        signal.signal(signal.SIGINT, lambda *_: os._exit(EXIT_INTERRUPTED))
    return before


def lock_run(save_dir: Path) -> IO[str]:
    """Hold the directory for this process until it ends; ValueError naming the process that has it already.

    A POSIX lock: the system gives it up when the process dies, however it dies, and forked workers do not inherit it.
    Whoever holds it may take it again.
    """
    save_dir.mkdir(parents=True, exist_ok=True)
    file = open(save_dir / ".lock", "a+", encoding="utf-8")  # noqa: SIM115 - closing it would give the lock up
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.seek(0)
        holder = file.read().strip()
        file.close()
        raise ValueError(
            f"--save_dir {save_dir} is being trained by {holder}: wait for it, or choose another"
        ) from None
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}")
    file.flush()
    return file


def lock_or_exit(save_dir: Path) -> IO[str]:
    """`lock_run` for the head of a program."""
    try:
        return lock_run(save_dir)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, ValueError) else 74)
