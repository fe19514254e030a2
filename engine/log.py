"""The structured log: one JSON line a happening, by its stable code.

Everybody tells; a face that stays up opens a file for it. Telling costs the engine a place in a
queue and nothing else: a thread of its own writes, and what it can not write goes to stderr, is
counted, and never comes back to the engine as an error or a wait. The ledger is the record; the
log is for people who look what a process did.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, date, datetime
from decimal import Decimal
from logging.handlers import QueueHandler
from pathlib import Path
from queue import Full, Queue
from typing import Any

__all__ = ["JsonLines", "LogFile", "open_log", "tell"]

LOGGER = "oms"
MAX_BYTES = 10_000_000
BACKUPS = 10
QUEUE_LINES_MAX = 10_000
RETRY_SECONDS = 5.0
CLOSE_SECONDS = 5.0
STDERR = 2
_MODE = 0o640

_logger = logging.getLogger(LOGGER)
_logger.setLevel(logging.INFO)
# Without a file, logging would write warnings to stderr in a form of its own.
_logger.addHandler(logging.NullHandler())


def tell(code: str, /, *, level: int = logging.INFO, **fields: Any) -> None:
    """Log one happening: its code, and what there is to know of it.

    ``level`` is one of logging's. Fields may be of any type; decimals, ids and times are written
    as text. It neither raises nor waits.
    """
    _logger.log(level, "%s", code, extra={"fields": fields})


class JsonLines(logging.Formatter):
    """A record as one line of JSON: ``ts`` in UTC, ``level``, ``event``, and its fields."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            **getattr(record, "fields", {}),
            "ts": datetime.fromtimestamp(record.created, UTC).isoformat(),
            "level": record.levelname,
            "event": record.getMessage(),
        }
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        # In the order in which people read: when, what, and then the rest.
        first = {name: line.pop(name) for name in ("ts", "level", "event")}
        try:
            return json.dumps({**first, **line}, default=_text, ensure_ascii=False)
        except (TypeError, ValueError, RecursionError):  # keys that are no text, circles
            return json.dumps({**first, "fields": repr(line)})


def _text(value: object) -> str:
    if isinstance(value, Decimal):
        return f"{value:f}"
    if isinstance(value, datetime) and value.tzinfo is not None:
        return value.astimezone(UTC).isoformat()
    try:
        return str(value)
    except Exception:  # whatever somebody's __str__ does: the line is worth more than the field
        return object.__repr__(value)


class _Queued(QueueHandler):
    """Puts lines into a bounded queue; what finds no place is counted, not waited for."""

    queue: Queue[logging.LogRecord | None]

    def __init__(self, lines: Queue[logging.LogRecord | None]) -> None:
        super().__init__(lines)
        self.dropped = 0

    def enqueue(self, record: logging.LogRecord) -> None:
        try:
            self.queue.put_nowait(record)
        except Full:
            self.dropped += 1

    def take_dropped(self) -> int:
        """How many lines were lost since the last call."""
        self.acquire()
        try:
            dropped, self.dropped = self.dropped, 0
        finally:
            self.release()
        return dropped

    def handleError(self, record: logging.LogRecord) -> None:
        """Count a line that could not be made; logging would write a traceback to stderr."""
        del record
        self.dropped += 1


class LogFile:
    """A file of lines that rotates by size and by day (UTC), for any number of processes.

    A line is appended by one write, so that those of several processes do not mix. Who rotates
    holds a lock beside the file; who does not get it writes on and rotates later. When the file
    can not be written, lines go to stderr and the file is tried again after
    ``retry_seconds``; the first line afterwards says how many are missing.
    """

    def __init__(
        self,
        path: Path,
        *,
        max_bytes: int = MAX_BYTES,
        backups: int = BACKUPS,
        daily: bool = True,
        retry_seconds: float = RETRY_SECONDS,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self.path = path
        self.missing = 0
        self._max_bytes = max_bytes
        self._backups = backups
        self._daily = daily
        self._retry_seconds = retry_seconds
        self._monotonic = monotonic
        self._try_at = 0.0
        self._fd: int | None = None
        self._day = date.min
        self._torn = False

    def write(self, line: str, day: date) -> None:
        """Write a line that was told on ``day``; to stderr where the file does not take it."""
        if self._monotonic() >= self._try_at:
            try:
                self._open(day)
                if self.missing:
                    self._append(self._gap(line))
                    self.missing = 0
                self._rotate_if_due(len(line), day)
                self._append(line)
            except OSError as error:
                self._try_at = self._monotonic() + self._retry_seconds
                self.close()
                _complain(f"the log {self.path} can not be written: {error.strerror or error}")
            else:
                return
        self.missing += 1
        _complain(line)

    def close(self) -> None:
        """Close the file; the next line opens it again."""
        fd, self._fd = self._fd, None
        if fd is not None:
            with suppress(OSError):
                os.close(fd)

    def _gap(self, line: str) -> str:
        return json.dumps(
            {
                "ts": json.loads(line)["ts"],
                "level": "WARNING",
                "event": "LOG_LINES_MISSING",
                "lines": self.missing,
            }
        )

    def _open(self, day: date) -> None:
        """Open the file, or open it anew where another process has moved it away."""
        if self._fd is not None:
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(self._fd), os.stat(self.path)):
                    return
            self.close()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # Without waiting: a pipe that nobody reads would hold the open for good.
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK
        self._fd = os.open(self.path, flags, _MODE)
        seen = os.fstat(self._fd)
        self._day = datetime.fromtimestamp(seen.st_mtime, UTC).date() if seen.st_size else day
        self._torn = seen.st_size > 0 and not _ends_with_newline(self.path)

    def _append(self, line: str) -> None:
        assert self._fd is not None
        # After a line that a full disk or a crash cut off, a new one begins.
        data = ("\n" * self._torn + line + "\n").encode(errors="backslashreplace")
        self._torn = False
        written = os.write(self._fd, data)
        if written < len(data):
            self._torn = True
            raise OSError(f"only {written} of {len(data)} bytes were taken")

    def _rotate_if_due(self, length: int, day: date) -> None:
        assert self._fd is not None
        size = os.fstat(self._fd).st_size
        too_large = size > 0 and size + length > self._max_bytes
        if too_large or (self._daily and day > self._day):
            # A folder that takes no change is no reason not to write on.
            with suppress(OSError), self._alone() as alone:
                if alone:
                    self._move_away()
            self._open(day)

    def _move_away(self) -> None:
        assert self._fd is not None
        # Another process may have been faster between our look and our lock.
        if not os.path.samestat(os.fstat(self._fd), os.stat(self.path)):
            return
        free = 1
        while free < self._backups and self._backup(free).exists():
            free += 1
        for number in range(free - 1, 0, -1):
            os.replace(self._backup(number), self._backup(number + 1))
        if self._backups:
            os.replace(self.path, self._backup(1))
        else:
            os.unlink(self.path)

    def _backup(self, number: int) -> Path:
        return self.path.with_name(f"{self.path.name}.{number}")

    @contextmanager
    def _alone(self) -> Iterator[bool]:
        """Hold the lock of those who rotate; yields whether it was to be had."""
        lock = self.path.with_name(f"{self.path.name}.lock")
        fd = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, _MODE)
        try:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
            else:
                yield True
        finally:
            os.close(fd)


def _ends_with_newline(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            file.seek(-1, os.SEEK_END)
            return file.read(1) == b"\n"
    except OSError:  # what can not be read, a pipe for instance, has no lines to keep apart
        return True


def _complain(line: str) -> None:
    # Past Python's buffer, whose lock an ending program would wait for.
    with suppress(OSError):  # stderr may be closed, or as full as the disk
        os.write(STDERR, (line + "\n").encode(errors="backslashreplace"))


@contextmanager
def open_log(
    path: Path,
    max_bytes: int = MAX_BYTES,
    backups: int = BACKUPS,
    daily: bool = True,
) -> Iterator[None]:
    """Write what is told in the block to a file, from a thread of its own.

    The file is moved aside before it grows over ``max_bytes`` and, if ``daily``, with the first
    line of a day (UTC); ``backups`` older ones are kept as ``path.1``, ``path.2``, ... At the end
    of the block what is in the queue is written, for CLOSE_SECONDS at most.
    """
    file = LogFile(path, max_bytes=max_bytes, backups=backups, daily=daily)
    lines: Queue[logging.LogRecord | None] = Queue(QUEUE_LINES_MAX)
    handler = _Queued(lines)
    handler.setFormatter(JsonLines())
    writer = threading.Thread(
        target=_write_all, args=(lines, file, handler), name="oms-log", daemon=True
    )
    writer.start()
    _logger.addHandler(handler)
    try:
        yield
    finally:
        _logger.removeHandler(handler)
        with suppress(Full):
            lines.put(None, timeout=CLOSE_SECONDS)
        writer.join(CLOSE_SECONDS)


def _write_all(lines: Queue[logging.LogRecord | None], file: LogFile, handler: _Queued) -> None:
    while (record := lines.get()) is not None:
        file.missing += handler.take_dropped()
        file.write(record.getMessage(), datetime.fromtimestamp(record.created, UTC).date())
    file.close()
