"""Following the files of a run: positions that outlive the server, and one reader for all who look at a run.

A position is where in metrics.jsonl and alerts.jsonl somebody has got to, and a digest of what stands before that
place. A resume of the trainer rewrites metrics.jsonl and cuts it back; as long as the digest fits, the lines before it
are those that were read (each holds its time), whichever file now has the name, and reading goes on. If not, it begins
again. So the server has nothing to remember: it can be killed, and whoever comes back with a position gets what is
missing, once.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import re
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

from scripts.dashboard.history import MAX_POINTS, History
from scripts.dashboard.runs import UnknownRunError, clean, open_inside, parse_record, sample_records, state_of

CHUNK_BYTES = 1 << 20
DIGEST_BYTES = 512
POLL_SECONDS = 0.2
STATE_SECONDS = 0.4
PING_SECONDS = 10.0
QUEUE_MESSAGES = 400  # that may wait for a client; one that falls further behind is dropped and may come back
RECORDS_PER_MESSAGE = 500
IDLE_SECONDS = 30.0  # that a history is kept after the last client has gone
MAX_TAILS = 16
FIRST_LOOK_BYTES = 8 << 20  # a longer file is first shown by a sample of its records


@dataclass(frozen=True)
class Mark:
    """A place in a file, and what stands before it."""

    offset: int = 0
    digest: str = ""

    def __str__(self) -> str:
        return f"{self.offset}-{self.digest}"

    def fits(self, file: IO[bytes]) -> bool:
        return self.offset == 0 or mark_at(file, self.offset) == self


def mark_at(file: IO[bytes], offset: int) -> Mark | None:
    """The mark of a place in a file, None behind its end."""
    if offset == 0:
        return Mark()
    if os.fstat(file.fileno()).st_size < offset:
        return None
    begin = max(0, offset - DIGEST_BYTES)
    before = os.pread(file.fileno(), offset - begin, begin)
    first = os.pread(file.fileno(), min(DIGEST_BYTES, offset), 0)
    return Mark(offset, hashlib.blake2s(first + b"|" + before, digest_size=8).hexdigest())


@dataclass(frozen=True)
class Position:
    """How far somebody has read; a text without meaning to clients, `0` the beginning."""

    metrics: Mark = Mark()
    alerts: Mark = Mark()

    def __str__(self) -> str:
        return f"{self.metrics}.{self.alerts}"


POSITION = re.compile(r"(\d{1,15})-([0-9a-f]{16})?\.(\d{1,15})-([0-9a-f]{16})?", re.ASCII)


def parse_position(text: str) -> Position | None:
    """None for what no server has given out."""
    if text == "0":
        return Position()
    found = POSITION.fullmatch(text)
    if not found:
        return None
    here, said, there, also = found.groups()
    return Position(Mark(int(here), said or ""), Mark(int(there), also or ""))


class LostError(Exception):
    """The file is no longer the one that was being read."""


def read_lines(file: IO[bytes], begin: int, end: int | None = None) -> Iterator[tuple[list[bytes], int]]:
    """The whole lines from `begin` on, in chunks, each with the place behind it."""
    while True:
        room = CHUNK_BYTES if end is None else min(CHUNK_BYTES, end - begin)
        data = os.pread(file.fileno(), room, begin) if room > 0 else b""
        cut = data.rfind(b"\n") + 1
        if not cut and len(data) < CHUNK_BYTES:
            return
        cut = cut or len(data)  # a line without end; its parts are no records
        begin += cut
        yield data[:cut].split(b"\n"), begin


def read_alert(line: bytes) -> dict[str, Any] | None:
    try:
        alert = json.loads(line) if line else None
    except (ValueError, RecursionError):
        return None
    return alert if isinstance(alert, dict) else None


def message(kind: str, position: Position, **values: Any) -> str:
    """The text of a message; no NaN in it, whatever a file held."""
    return json.dumps({"type": kind, **clean(values), "position": str(position)}, allow_nan=False)


def messages_of(run_id: str, records: list[dict[str, Any]], ends: list[Position]) -> Iterator[str]:
    """What is told of new records: an epoch by itself, others together. `ends`: the position behind each record."""
    waiting: list[dict[str, Any]] = []
    for number, (record, end) in enumerate(zip(records, ends, strict=True)):
        if record["kind"] != "epoch":
            waiting.append(record)
        if waiting and ends_message(records, number):
            yield message("metrics", end, records=waiting)
            waiting = []
        if record["kind"] == "epoch":
            metrics = {n: v for n, v in record.items() if n not in ("kind", "time")}
            yield message(
                "epoch_progress", end, task_id=run_id, epoch=record.get("epoch"), metrics=metrics,
                timestamp=record.get("time"),
            )  # fmt: skip


def ends_message(records: list[dict[str, Any]], number: int) -> bool:
    """Whether a message ends behind this record, whose position must then be exact."""
    if number == len(records) - 1 or (number + 1) % RECORDS_PER_MESSAGE == 0:
        return True
    return "epoch" in (records[number]["kind"], records[number + 1]["kind"])


class Reader:
    """Both files of a run, read from a position on."""

    def __init__(self, run_dir: Path, position: Position):
        self.run_dir, self.position = run_dir, position

    def open(self, name: str) -> IO[bytes] | None:
        """The file where it holds what was read of it; None where there is none and nothing was. Raises LostError."""
        mark = self.position.metrics if name == "metrics.jsonl" else self.position.alerts
        try:
            with open_inside(self.run_dir, name) as found:
                file = os.fdopen(os.dup(found.fileno()), "rb")
        except UnknownRunError:
            if mark.offset:
                raise LostError from None
            return None
        if not mark.fits(file):
            file.close()
            raise LostError
        return file

    def metrics(self, until: int | None = None) -> Iterator[tuple[list[dict[str, Any]], list[Position]]]:
        """New records with the position behind each, in chunks."""
        file = self.open("metrics.jsonl")
        if file is None:
            return
        with file:
            yield from self.metrics_of(file, until)

    def metrics_of(self, file: IO[bytes], until: int | None) -> Iterator[tuple[list[dict[str, Any]], list[Position]]]:
        place = self.position.metrics.offset
        for lines, end in read_lines(file, place, until):
            records, places = [], []
            for line in lines:
                place += len(line) + 1
                if record := parse_record(line):
                    records.append(record)
                    places.append(min(place, end))
            place = end
            closing = mark_at(file, end) or self.position.metrics
            ends = []
            for number, where in enumerate(places):
                mark = mark_at(file, where) if ends_message(records, number) else None
                ends.append(replace(self.position, metrics=mark or self.position.metrics))
            self.position = replace(self.position, metrics=closing)
            yield records, ends

    def alerts(self, until: int | None = None) -> Iterator[dict[str, Any]]:
        """New alerts, with `position` behind each."""
        file = self.open("alerts.jsonl")
        if file is None:
            return
        with file:
            place = self.position.alerts.offset
            for lines, end in read_lines(file, place, until):
                for line in lines[:-1]:
                    place += len(line) + 1
                    if alert := read_alert(line):
                        self.position = replace(self.position, alerts=mark_at(file, place) or self.position.alerts)
                        yield alert
                place = end
                self.position = replace(self.position, alerts=mark_at(file, end) or self.position.alerts)


class Client:
    """One who looks at a run: what is still to be sent, bounded."""

    def __init__(self) -> None:
        self.queue: asyncio.Queue[str | None] = asyncio.Queue(QUEUE_MESSAGES)
        self.dropped = False

    def drop(self) -> None:
        self.dropped = True
        with suppress(asyncio.QueueFull):
            self.queue.put_nowait(None)  # or it would wait for a message

    def offer(self, text: str) -> None:
        try:
            self.queue.put_nowait(text)
        except asyncio.QueueFull:
            self.dropped = True


class Tail:
    """The one reader of a run: reads what is new a few times a second, and tells all its clients."""

    def __init__(self, run_dir: Path):
        self.run_dir, self.id = run_dir, run_dir.name
        self.clients: set[Client] = set()
        self.used_at = time.monotonic()
        self.lock = asyncio.Lock()  # held while reading, so that who joins finds position and history in step
        self.ready = False
        self.early: asyncio.Future[str | None] = asyncio.get_running_loop().create_future()
        self.state: dict[str, Any] = {}
        self._begin_again()

    def _begin_again(self) -> None:
        self.reader, self.history = Reader(self.run_dir, Position()), History()
        self._snapshot: tuple[str, str] = ("", "")

    @property
    def position(self) -> Position:
        return self.reader.position

    async def run(self) -> None:
        """Until nobody has looked for a while."""
        looked = pinged = 0.0
        try:
            self.early.set_result(await asyncio.to_thread(self.first_look))
            while self.clients or time.monotonic() - self.used_at < IDLE_SECONDS:
                now = time.monotonic()
                async with self.lock:
                    look = now - looked >= STATE_SECONDS
                    looked = now if look else looked
                    for text in await asyncio.to_thread(self.poll, look):
                        self.tell(text)
                    self.ready = True
                if now - pinged >= PING_SECONDS:
                    pinged = now
                    self.tell(message("ping", self.position))
                await asyncio.sleep(POLL_SECONDS)
        finally:
            self.early.cancel()
            for client in self.clients:
                client.drop()

    def tell(self, text: str) -> None:
        for client in self.clients:
            client.offer(text)

    def poll(self, look: bool) -> list[str]:
        """Read on; returns what is to be told."""
        told: list[str] = []
        try:
            for records, ends in self.reader.metrics():
                self.history.add(records)
                if self.ready:
                    told += messages_of(self.id, records, ends)
            for alert in self.reader.alerts():
                self.history.add_alerts([alert])
                if self.ready:
                    told.append(message("alert", self.position, alert=alert))
        except LostError:
            self._begin_again()
            with suppress(LostError):
                for records, _ in self.reader.metrics():
                    self.history.add(records)
                self.history.add_alerts(list(self.reader.alerts()))
            told = [message("reset", Position()), self.snapshot()]
        if look or not self.state:
            state = state_of(self.run_dir)
            if state != self.state:
                self.state = state
                told.append(self.state_message())
        return told

    def state_message(self) -> str:
        return message("state", self.position, state=self.state)

    def snapshot(self) -> str:
        """The message with all that was said so far, made once for all who come at the same position."""
        if self._snapshot[0] != str(self.position):
            text = message("snapshot", self.position, run=self.id, partial=False, **self.history.snapshot(MAX_POINTS))
            self._snapshot = (str(self.position), text)
        return self._snapshot[1]

    def first_look(self) -> str | None:
        """A sample of a long file, to be shown while the whole of it is read."""
        with suppress(UnknownRunError), open_inside(self.run_dir, "metrics.jsonl") as file:
            if os.fstat(file.fileno()).st_size >= FIRST_LOOK_BYTES:
                history = History()
                history.add(list(sample_records(file, 400)))
                return message("snapshot", Position(), run=self.id, partial=True, **history.snapshot(MAX_POINTS))
        return None

    async def join(self, since: str | None) -> AsyncIterator[str]:
        """All that a client with this position is to be told, without end or until it falls behind."""
        client = Client()
        try:
            if since is None and not self.ready and (early := await asyncio.shield(self.early)):
                yield early
            while not self.ready:
                await asyncio.sleep(0.02)
            async with self.lock:
                wanted = parse_position(since) if since is not None else None
                missed = await asyncio.to_thread(self._missed, wanted) if wanted else None
                self.clients.add(client)
                told = [self.state_message()]
                if missed is None:
                    told += [message("reset", Position())] if since is not None else []
                    told.append(await asyncio.to_thread(self.snapshot))
            for text in told:
                yield text
            while missed and (texts := await asyncio.to_thread(lambda: next(missed, None))):
                for text in texts:
                    yield text
            while not client.dropped:
                waiting = await client.queue.get()
                if waiting is not None:
                    yield waiting
        finally:
            self.clients.discard(client)
            self.used_at = time.monotonic()

    def _missed(self, since: Position) -> Iterator[list[str]] | None:
        """Messages from a position up to that of the tail; None where it does not fit the files. Called in step."""
        reader, until, files = Reader(self.run_dir, since), self.position, []
        try:
            for name, mark in (("metrics.jsonl", until.metrics), ("alerts.jsonl", until.alerts)):
                files.append(reader.open(name))
                if files[-1] is not None and not mark.fits(files[-1]):
                    raise LostError
            if since.metrics.offset > until.metrics.offset or since.alerts.offset > until.alerts.offset:
                raise LostError
        except LostError:
            for file in filter(None, files):
                file.close()
            return None
        metrics, alerts = files
        if alerts is not None:
            alerts.close()
        return self._replay(reader, metrics, until)

    def _replay(self, reader: Reader, metrics: IO[bytes] | None, until: Position) -> Iterator[list[str]]:
        if metrics is not None:
            with metrics:
                for records, ends in reader.metrics_of(metrics, until.metrics.offset):
                    yield list(messages_of(self.id, records, ends))
        with suppress(LostError):  # then a reset is on its way
            for alert in reader.alerts(until.alerts.offset):
                yield [message("alert", reader.position, alert=alert)]


class Tails:
    """The tails of the runs that somebody looks at."""

    def __init__(self) -> None:
        self.tails: dict[str, tuple[Tail, asyncio.Task[None]]] = {}

    def get(self, run_dir: Path) -> Tail:
        name = run_dir.name
        if name not in self.tails:
            idle = sorted((t for t, _ in self.tails.values() if not t.clients), key=lambda tail: tail.used_at)
            for tail in idle[: max(0, len(self.tails) - MAX_TAILS + 1)]:
                self.tails[tail.id][1].cancel()
                del self.tails[tail.id]
            tail = Tail(run_dir)
            task = asyncio.create_task(tail.run())
            task.add_done_callback(self._forget(name, tail))
            self.tails[name] = (tail, task)
        tail, _ = self.tails[name]
        tail.used_at = time.monotonic()
        return tail

    def _forget(self, name: str, tail: Tail) -> Callable[[asyncio.Task[None]], None]:
        def forget(task: asyncio.Task[None]) -> None:
            if self.tails.get(name, (None, None))[0] is tail:
                del self.tails[name]
            if not task.cancelled():
                task.exception()

        return forget

    async def history(self, run_dir: Path) -> tuple[History, Position]:
        """What was said so far, as of now."""
        tail = self.get(run_dir)
        while not tail.ready:
            await asyncio.sleep(0.02)
        async with tail.lock:
            for text in await asyncio.to_thread(tail.poll, False):
                tail.tell(text)
            return tail.history, tail.position


def read_since(run_dir: Path, since: Position, limit: int) -> dict[str, Any] | None:
    """The records behind a position, about `limit` at once, None where it does not fit the files."""
    reader, found, alerts = Reader(run_dir, since), [], []
    try:
        for records, _ in reader.metrics():
            found += records
            if len(found) >= limit:
                break
        else:
            alerts = list(reader.alerts())
    except LostError:
        return None
    more = len(found) >= limit
    return {"records": found, "alerts": alerts, "position": str(reader.position), "more": more, "reset": False}
