"""A run in a file: JSON lines that anybody can check without a database.

The first line is the run's terms, then comes every event with its hash, then what the ledger does
not tell because it is no history: plans, limits, where a stop was drawn to, an order's ids at its
broker. The last line counts the others and has their digest. A file that breaks off is read as far
as it is whole; one that was changed is refused.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any, NoReturn
from uuid import UUID

from engine.errors import BadInput

__all__ = ["Export", "LedgerEvent", "Note", "chain_hash", "read_export", "write_export"]

FORMAT = 1
# Terms that RUN_STARTED tells as strategy_run has them.
_TOLD_TERMS = ("strategy", "initial_cash", "broker", "account_type", "calendar", "currency")
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class LedgerEvent:
    """A row of event_ledger; ``payload`` is the text of its jsonb, to the last zero."""

    seq: int
    logical_time: datetime
    event_type: str
    subject: str
    payload: str
    recorded_at: datetime
    hash: str


@dataclass(frozen=True, slots=True)
class Note:
    """What a table holds beside the ledger: ``row`` is the text of a jsonb."""

    table: str
    row: str


@dataclass(frozen=True, slots=True)
class Export:
    """What a file held. ``damage`` says where it breaks off; ``None``: it is whole."""

    user_id: UUID
    run_id: UUID
    terms: str
    events: Sequence[LedgerEvent]
    notes: Sequence[Note]
    damage: str | None = None


def chain_hash(previous: str, user_id: UUID, run_id: UUID, event: LedgerEvent) -> str:
    """The hash that an event must have after the one before it: event_hash of the schema."""
    text = (
        f'["{user_id}", "{run_id}", {event.seq}, {_epoch(event.logical_time)}, '
        f"{json.dumps(event.event_type, ensure_ascii=False)}, "
        f"{json.dumps(event.subject, ensure_ascii=False)}, {event.payload}, "
        f"{_epoch(event.recorded_at)}]"
    )
    return hashlib.sha256(bytes.fromhex(previous) + text.encode()).hexdigest()


def _epoch(moment: datetime) -> str:
    """Seconds since 1970 as Postgres prints them: six decimals."""
    micros = (moment - _EPOCH) // timedelta(microseconds=1)
    seconds, rest = divmod(abs(micros), 1_000_000)
    return f"{'-' if micros < 0 else ''}{seconds}.{rest:06}"


def write_export(export: Export) -> Iterator[str]:
    """The lines of a file, without their ends."""
    digest = hashlib.sha256()
    for line in _body(export):
        text = json.dumps(line, ensure_ascii=False)
        digest.update(text.encode() + b"\n")
        yield text
    yield json.dumps(
        {
            "line": "end",
            "events": len(export.events),
            "notes": len(export.notes),
            "sha256": digest.hexdigest(),
        }
    )


def _body(export: Export) -> Iterator[dict[str, Any]]:
    yield {
        "line": "run",
        "format": FORMAT,
        "user_id": str(export.user_id),
        "run_id": str(export.run_id),
        "terms": export.terms,
    }
    for event in export.events:
        yield {
            "line": "event",
            "seq": event.seq,
            "logical_time": event.logical_time.astimezone(UTC).isoformat(),
            "event_type": event.event_type,
            "subject": event.subject,
            "payload": event.payload,
            "recorded_at": event.recorded_at.astimezone(UTC).isoformat(),
            "hash": event.hash,
        }
    for note in export.notes:
        yield {"line": "note", "table": note.table, "row": note.row}


class _Reader:
    """Reads lines, knows which one it is at, and checks each against those before it."""

    def __init__(self) -> None:
        self.number = 0
        self.user_id = self.run_id = UUID(int=0)
        self.terms: str | None = None
        self.events: list[LedgerEvent] = []
        self.notes: list[Note] = []
        self.ended = False
        self._digest = hashlib.sha256()

    def take(self, text: str) -> None:
        """Take one whole line."""
        self.number += 1
        try:
            line = json.loads(text)
            kind = line["line"]
            if self.ended or (kind == "run") != (self.number == 1):
                self.refuse("doesn't belong there")
            getattr(self, f"_take_{kind}")(line)
        except (ValueError, KeyError, TypeError, AttributeError):
            self.refuse("isn't a line of an export")
        self._digest.update(text.encode() + b"\n")

    def refuse(self, what: str) -> NoReturn:
        raise BadInput(f"line {self.number} {what}; export the run again")

    def _take_run(self, line: dict[str, Any]) -> None:
        if line["format"] != FORMAT:
            self.refuse(f"is of format {line['format']}, not {FORMAT}")
        self.user_id, self.run_id = UUID(line["user_id"]), UUID(line["run_id"])
        self.terms = str(line["terms"])

    def _take_event(self, line: dict[str, Any]) -> None:
        event = LedgerEvent(
            int(line["seq"]),
            datetime.fromisoformat(line["logical_time"]),
            str(line["event_type"]),
            str(line["subject"]),
            str(line["payload"]),
            datetime.fromisoformat(line["recorded_at"]),
            str(line["hash"]),
        )
        previous = self.events[-1].hash if self.events else ""
        if event.seq != len(self.events) + 1:
            self.refuse(f"is event {event.seq}, where event {len(self.events) + 1} belongs")
        if event.hash != chain_hash(previous, self.user_id, self.run_id, event):
            self.refuse(f"was changed: event {event.seq} doesn't follow from the one before it")
        if event.event_type == "RUN_STARTED":
            self._check_terms(json.loads(event.payload))
        self.events.append(event)

    def _check_terms(self, told: dict[str, Any]) -> None:
        """The first event tells the run's terms, and its hash vouches for them."""
        terms = json.loads(self.terms or "{}", parse_float=str, parse_int=str)
        for name, value in told.items():
            if name == "initial_cash":
                value, terms[name] = Decimal(value), Decimal(terms[name])
            if name in _TOLD_TERMS and terms[name] != value:
                self.refuse(f"tells another {name} than the first line")

    def _take_note(self, line: dict[str, Any]) -> None:
        self.notes.append(Note(str(line["table"]), str(line["row"])))

    def _take_end(self, line: dict[str, Any]) -> None:
        if (line["events"], line["notes"]) != (len(self.events), len(self.notes)):
            self.refuse("counts other lines than there are")
        if line["sha256"] != self._digest.hexdigest():
            self.refuse("has the digest of other lines: the terms or a note were changed")
        self.ended = True


def read_export(lines: Iterable[str]) -> Export:
    """Read the lines of a file, with their ends, and check all of it offline.

    What a crash cut off in the middle of a line, or before the last one, is told in ``damage``; the
    export is what was whole before it. Raises BadInput, naming the line, for whatever was changed,
    and where not even the terms are whole.
    """
    reader, damage = _Reader(), None
    for text in lines:
        if not text.endswith("\n"):
            damage = f"line {reader.number + 1} breaks off"
            break
        reader.take(text[:-1])
    if damage is None and not reader.ended:
        damage = f"it ends after line {reader.number}, before its last one"
    if reader.terms is None:
        raise BadInput("the file is empty or breaks off in its first line; export the run again")
    return Export(reader.user_id, reader.run_id, reader.terms, reader.events, reader.notes, damage)
