"""What the outside asks of a run: signals set a flag, and the loop looks at the flag between two steps."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any


class SignalFlags:
    """SIGTERM and SIGINT ask to stop, SIGUSR1 asks for a checkpoint; a second stop signal ends the process at once."""

    STOP = (signal.SIGTERM, signal.SIGINT)

    def __init__(self) -> None:
        self.stop = 0
        self.save = 0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> SignalFlags:
        for number in (*self.STOP, signal.SIGUSR1):
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, previous in self._previous.items():
            signal.signal(number, previous)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        # A handler runs between any two instructions: it may set a flag and nothing else.
        if number == signal.SIGUSR1:
            self.save = 1
        elif self.stop:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        else:
            self.stop = number
