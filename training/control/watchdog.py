"""Ends a process that no longer gets on, with the stacks of its threads, instead of waiting for ever."""

from __future__ import annotations

import faulthandler
import logging
import os
import sys
import threading
import time
from collections.abc import Callable

logger = logging.getLogger("train")

EXIT_HANG = 76
# Before the first step: kernels are built, data is read for the first time, other hosts are still starting.
FIRST_FACTOR = 2.5
SECONDS_FOR_THE_OTHERS = 1.0  # torchrun ends all ranks when the first one goes, and each has stacks to write


class Watchdog:
    """A thread that wants to hear `beat` every `limit_seconds`, before the first step is done 2.5 times as long."""

    def __init__(
        self, limit_seconds: float, on_hang: Callable[[str], None], on_beat: Callable[[], None] = lambda: None
    ):
        """`on_hang(message)` is called just before the process ends with EXIT_HANG, `on_beat()` with each beat."""
        self.limit_seconds, self.on_hang, self.on_beat = limit_seconds, on_hang, on_beat
        self._limit = limit_seconds * FIRST_FACTOR
        self._last_beat = time.monotonic()
        self._closed = threading.Event()

    def __enter__(self) -> Watchdog:
        self.beat()
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()

    def beat(self, step_done: bool = False) -> None:
        """Say that this process got on; from the end of its first step on the shorter limit holds."""
        self._last_beat = time.monotonic()
        if step_done:
            self._limit = self.limit_seconds
        self.on_beat()

    def _watch(self) -> None:
        while not self._closed.wait(min(1.0, self.limit_seconds / 10)):
            silent = time.monotonic() - self._last_beat
            if silent > self._limit:
                message = (
                    f"hang: this process got no further for {silent:.0f} s; the stacks of its threads follow. Another "
                    "rank may be stuck, or the data; if it is only slow, raise --group_timeout_seconds"
                )
                logger.error(message)
                faulthandler.dump_traceback(sys.stderr, all_threads=True)
                # In a thread of its own: the disk may be what hangs.
                threading.Thread(target=self.on_hang, args=[message], daemon=True).start()
                time.sleep(SECONDS_FOR_THE_OTHERS)
                sys.stderr.flush()
                os._exit(EXIT_HANG)
