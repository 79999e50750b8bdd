"""What the outside asks of a run: signals, a control file, a time limit. All of them set flags that the loop looks at.

The ranks add up their wishes once per step, in the exchange of numbers that a step needs anyway, and all obey at once.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import stat
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

logger = logging.getLogger("train")

PAUSE, RESUME, SAVE, STOP = COMMANDS = ("pause", "resume", "save", "stop")
MAX_BYTES = 4096
ECHO_SECONDS = 0.3  # a launcher and the terminal may both pass the same stop on
PAUSE_SECONDS = 0.5  # between two looks of a paused run
# Why a run stops early, in the order of precedence. Only one of them comes unasked: after the others a launcher that
# restarts what has failed must see no failure. After the last of them the run is complete.
PREEMPTED = "SIGTERM or SIGHUP"
INTERRUPTED, LATE = "Ctrl-C", "--max_hours"
LOST_PEER = "another process of the job is gone, see its message"  # why a run has failed, if not by itself
ALERT, EARLY = "--on_alert stop", "early stopping"
STOP_REASONS = (INTERRUPTED, "a stop command", PREEMPTED, LATE, ALERT, EARLY)


class Stopped(Exception):
    """The run ends early, on all ranks between the same two steps; the text is one of STOP_REASONS."""


class SignalFlags:
    """SIGTERM, SIGHUP and SIGINT ask to stop, SIGUSR1 asks for a checkpoint; a second stop signal ends at once."""

    STOP = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

    def __init__(self) -> None:
        self.stop = 0
        self.save = False
        self._stopped_at = 0.0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> SignalFlags:
        for number in (*self.STOP, signal.SIGUSR1):
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue  # nohup wants it ignored
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, previous in self._previous.items():
            signal.signal(number, previous)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        # A handler runs between any two instructions: it may set a flag and nothing else.
        if number == signal.SIGUSR1:
            self.save = True
        elif not self.stop:
            self.stop, self._stopped_at = number, time.monotonic()
        elif time.monotonic() - self._stopped_at > ECHO_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)


class ControlFile:
    """control.json {"id", "command"}, written by other programs; each id is obeyed once, none of an earlier run."""

    def __init__(self, path: Path):
        self.path = path
        self.last_id: Any = None
        self._stamp: tuple[int, ...] = ()
        self.read()

    def read(self) -> str | None:
        """The command if there is a new one. Whatever else lies there is reported once and ignored."""
        try:
            status = os.stat(self.path, follow_symlinks=False)
            stamp = (status.st_mtime_ns, status.st_ino, status.st_size)
            if stamp == self._stamp:
                return None
            self._stamp = stamp
            if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_BYTES:
                raise ValueError(f"no file of at most {MAX_BYTES} bytes")
            content = json.loads(self.path.read_text(encoding="utf-8"))
            number, command = content["id"], content["command"]
            if command not in COMMANDS:
                raise ValueError(f"unknown command {str(command)[:40]!r}")
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            logger.warning("%s is ignored: %s", self.path, error)
            return None
        if number == self.last_id:
            return None
        self.last_id = number
        return str(command)


class Wishes:
    """What this rank would have the run do; only rank 0 has a control file and a time limit."""

    def __init__(
        self,
        signals: SignalFlags,
        control: ControlFile | None,
        stop_at: float | None = None,
        goal_reached: Callable[[], bool] = lambda: False,
        alarmed: Callable[[], bool] = lambda: False,
    ):
        """`stop_at`: value of time.monotonic() at which the run must have ended; `goal_reached`: or why it may end.

        `alarmed`: whether an alert ends it.
        """
        self.signals, self.control, self.stop_at = signals, control, stop_at
        self.goal_reached, self.alarmed = goal_reached, alarmed
        self._pause = self._save = self._stop = False
        self._looked, self._longest = time.monotonic(), 0.0

    def look(self) -> list[int]:
        """One number for each of STOP_REASONS, then pause and save; the sums over ranks go to `obey`."""
        command = self.control.read() if self.control else None
        asked, self.signals.save = self.signals.save, False
        self._pause = command == PAUSE or (self._pause and command not in (RESUME, STOP))
        self._save |= asked or command == SAVE
        self._stop |= command == STOP
        interrupted = self.signals.stop == signal.SIGINT
        # What has come between two looks so far, a step and perhaps a checkpoint, may come once more.
        now = time.monotonic()
        self._longest = max(self._longest, now - self._looked)
        self._looked = now
        late = self.stop_at is not None and now + self._longest >= self.stop_at
        preempted = bool(self.signals.stop) and not interrupted
        wishes = [interrupted, self._stop, preempted, late, self.alarmed(), self.goal_reached()]
        return [int(wish) for wish in (*wishes, self._pause, self._save)]

    def stop_if_wished(self, sums: list[int]) -> None:
        """Raise Stopped where some rank wishes it."""
        for reason, count in zip(STOP_REASONS, sums[: len(STOP_REASONS)], strict=True):
            if count:
                raise Stopped(reason)

    def obey(
        self,
        sums: list[int],
        sum_ints: Callable[[Sequence[int]], list[int]],
        save: Callable[[], None],
        say: Callable[..., None],
        beat: Callable[[], None],
    ) -> None:
        """Do what the ranks wish together: raise Stopped, save, or wait until a pause ends; `say` each thing done.

        Paused ranks exchange their wishes again and again, so that no time limit of the process group ever passes, and
        what happens meanwhile loses nothing, because a pause begins with a checkpoint.
        """
        paused = False
        while True:
            self.stop_if_wished(sums)
            *_, pause, wants_save = sums
            if begins := bool(pause) and not paused:
                say("pausing")
            if wants_save or begins:
                self._save = False
                save()
            obeyed = self.control.last_id if self.control else None
            if wants_save:
                say("saved", obeyed)
            if bool(pause) != paused:
                paused = bool(pause)
                say("paused" if paused else "running", obeyed)
            if not paused:
                return
            time.sleep(PAUSE_SECONDS)
            beat()
            sums = sum_ints(self.look())
