"""What one process says, and how it ends: log lines, one message for an error, exit codes."""

from __future__ import annotations

import logging
import os
import re
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from trainer_utils import environment_rank, is_lost_peer
from training.control.exit_codes import EXIT_PREEMPTED, exit_code_of
from training.control.lock import EXIT_INTERRUPTED
from training.control.requests import LOST_PEER

logger = logging.getLogger("train")
ROOT = Path(__file__).resolve().parent.parent.parent


def out_of_memory(error: BaseException) -> str | None:
    """What to do where an error says that there is no memory left, in a line; None for any other error."""
    words = str(error)
    on_cpu = isinstance(error, MemoryError) or isinstance(error, RuntimeError) and "can't allocate memory" in words
    if not (on_cpu or isinstance(error, torch.OutOfMemoryError)):
        return None
    asked = re.search(r"[Tt]ried to allocate ([\d.]+ \w+)", words)
    return (
        f"out of memory on the {'host' if on_cpu else 'GPU'}{f', which was asked for {asked[1]}' if asked else ''}: "
        "lower --batch_size (--global_batch_size keeps the rows of a step), set --gradient_checkpointing 1, lower "
        "--max_seq_len, share the model out with --strategy fsdp, or compute in --dtype bfloat16"
    )


def exit_code_after(run: Callable[[], dict[str, Any]]) -> int:
    """Run, and turn what went wrong into one message and an exit code that says what kind of thing it was."""
    try:
        summary = run()
    except KeyboardInterrupt:
        logger.error("stopped by Ctrl-C before the first step")
        return EXIT_INTERRUPTED
    except Exception as error:
        if is_lost_peer(error):
            logger.error("stopped: %s", LOST_PEER)
        elif message := out_of_memory(error):
            logger.error("error: %s", message)
        elif hasattr(error, "exit_code") or isinstance(error, (ValueError, OSError)):
            first_line = (str(error) or type(error).__name__).splitlines()[0]
            # What a library raised under a name that we use for what the user can mend may be a fault of ours.
            logger.error("error: %s", error if environment_rank()[0] == 0 else first_line, exc_info=not is_ours(error))
        else:
            logger.exception("stopped by an error")
        return exit_code_of(error)
    return EXIT_PREEMPTED if summary["status"] == "preempted" else 0


def is_ours(error: BaseException) -> bool:
    """Whether an error was raised by a line of this project, and not by one of a library that it calls."""
    lines = list(traceback.walk_tb(error.__traceback__))
    raised_in = Path(lines[-1][0].f_code.co_filename) if lines else Path()
    return raised_in.is_relative_to(ROOT) and "site-packages" not in raised_in.parts


def end_process(exit_code: int) -> None:
    """Leave at once with everything said and written, skipping the interpreter's teardown."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)


def setup_logging(rank: int) -> None:
    """Plain lines on standard error: everything from rank 0, warnings with their rank from the others."""
    prefix = "" if rank == 0 else f"[rank {rank} on {socket.gethostname()}] "
    logging.basicConfig(level=logging.INFO if rank == 0 else logging.WARNING, format=f"{prefix}%(message)s", force=True)
    for noisy in ("httpx", "urllib3", "filelock", "fsspec"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
