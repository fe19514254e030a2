"""Replay: a feed of prices through a run, many ticks a transaction, each tick still its own.

The ticks are the same code as live ones; only what surrounds them is shared: the books and the
lookups are read once, and what a batch of ticks told is written in one statement while the next
batch is worked out. A crash loses at most the batches under way, and the next call goes on where
the ledger ends.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from itertools import islice
from uuid import UUID

from psycopg.pq import TransactionStatus

from engine import journal as journals
from engine import ledger
from engine.agenda import Agenda
from engine.books import read_books
from engine.db.connect import Connection
from engine.errors import BadInput, Retryable, RuleViolation, StrategyFailed, translated
from engine.journal import Taken
from engine.market.model import Bar
from engine.market.view import look
from engine.reference import Reference
from engine.runs import PAPER, Run, find_run, lock_run, require_aware, require_running
from engine.tick import run_tick
from engine.work import Desk, Mode, NeedsSteps, Work, strategies_of, strategy_of

BATCH_TICKS = 2_000
FIRST_BATCH_TICKS = 125

# How soon the thread that writes gets its turn. It needs a few short ones for each batch, and by
# default each waits 5 ms for the thread that works out the next one: as long as the batch itself.
SWITCH_SECONDS = 0.0002

Ticks = list[tuple[datetime, list[Bar]]]
Feed = Iterable[tuple[datetime, list[Bar]]]

# What happens again when the ticks are written step by step, and is told apart there.
_IN_STEPS = (NeedsSteps, Retryable, RuleViolation, BadInput, StrategyFailed)


@dataclass(frozen=True, slots=True)
class Replayed:
    """How many ticks a replay wrote, and how many it found in the ledger."""

    written: int
    repeated: int


def replay(
    conn: Connection,
    user_id: UUID,
    run_id: UUID,
    feed: Feed,
    *,
    batch: int = BATCH_TICKS,
    progress: Callable[[int], None] = lambda ticks: None,
) -> Replayed:
    """Tick a run at every logical time of ``feed``, in order; what is there already is passed over.

    ``progress`` is called after every batch with the number of ticks it held. Raises what
    ``run_tick`` raises; ticks before the one that failed stay.
    """
    _require_paper(conn, user_id, run_id)
    seen = written = 0
    with _Lane(conn, user_id, run_id) as lane:
        for ticks in _batches(feed, batch):
            written += lane.run(ticks)
            seen += len(ticks)
            progress(len(ticks))
        written += lane.land()
    return Replayed(written, seen - written)


def _require_paper(conn: Connection, user_id: UUID, run_id: UUID) -> None:
    """Raise BadInput for a run whose orders would go to a broker."""
    with conn.transaction():
        row = conn.execute(
            "SELECT broker FROM strategy_run WHERE user_id = %s AND run_id = %s", [user_id, run_id]
        ).fetchone()
    if row is not None and row[0] != PAPER:
        raise BadInput(f"run {run_id} trades at a broker; past prices go through paper runs")


class _Lane:
    """Works out a batch while the one before it is being written.

    What was worked out on books that turn out to be others, and what needs steps, is done again in
    steps, with the run locked.
    """

    def __init__(self, conn: Connection, user_id: UUID, run_id: UUID) -> None:
        self._conn = conn
        self._key = user_id, run_id
        # Within a caller's transaction there is nothing to overlap with.
        self._alone = conn.autocommit and conn.info.transaction_status == TransactionStatus.IDLE
        self._at_once: _AtOnce | None = None
        self._flying: tuple[Ticks, Taken, Future[int]] | None = None
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="oms-replay")

    def __enter__(self) -> _Lane:
        self._interval = sys.getswitchinterval()
        sys.setswitchinterval(SWITCH_SECONDS)
        return self

    def __exit__(self, *_: object) -> None:
        self._writer.shutdown(wait=True)
        sys.setswitchinterval(self._interval)

    def run(self, ticks: Ticks) -> int:
        """Take up a batch; returns how many new ticks are now written or were before it."""
        worked_out = self._work_out(ticks) if self._alone else 0
        taken = self._at_once.take() if self._at_once and worked_out else None
        written = self.land()
        if self._at_once is None or taken is None:
            worked_out = 0
        else:
            future = self._writer.submit(journals.write, self._conn, taken)
            self._flying = ticks[:worked_out], taken, future
        if worked_out < len(ticks):
            written += self.land()
            self._at_once = None
            written += self._locked(ticks[worked_out:])
        return written

    def land(self) -> int:
        """Wait for the batch that is being written; returns how many ticks were written."""
        if self._flying is None:
            return 0
        ticks, taken, future = self._flying
        self._flying = None
        try:
            with translated():
                done = taken.whole_ticks(future.result())
        except (Retryable, RuleViolation, BadInput):
            done = 0
        if done < len(ticks):
            self._at_once = None
            done += self._locked(ticks[done:])
        return done

    def _work_out(self, ticks: Ticks) -> int:
        """How many of these ticks, from the first on, can be written at once; they are told."""
        try:
            with translated():
                if self._at_once is None:
                    run = find_run(self._conn, self._key[1])
                    if run.user_id != self._key[0] or run.status != "RUNNING":
                        return 0
                    self._at_once = _AtOnce(self._conn, run, Reference(self._conn, run.calendar))
                return self._at_once.tick_all(ticks)
        except _IN_STEPS:
            return 0

    def _locked(self, ticks: Ticks) -> int:
        try:
            return _tick_batch(self._conn, *self._key, ticks)
        except (StrategyFailed, BadInput, RuleViolation):
            # The batch is gone. Again one by one: the good ones are committed, and the one that
            # fails does what it would have done live.
            results = [run_tick(self._conn, *self._key, at, bars) for at, bars in ticks]
            return sum(not result.repeated for result in results)


class _AtOnce:
    """A run as it was read, and what its ticks have told since."""

    def __init__(self, conn: Connection, run: Run, reference: Reference) -> None:
        books, agenda = read_books(conn, run), Agenda(conn, run, ahead=True)
        self._desk = Desk(conn, run, books, reference, Mode.AT_ONCE, agenda=agenda)
        self._strategy = strategies_of(run)

    def tick_all(self, ticks: Ticks) -> int:
        """Work out ticks; returns how many it could, from the first on."""
        done = 0
        with suppress(*_IN_STEPS), translated():
            for at, bars in ticks:
                self._tick(at, bars)
                done += 1
        return done

    def _tick(self, at: datetime, bars: list[Bar]) -> None:
        """Work out a tick. Raises NeedsSteps, and what a tick raises; it has told nothing then."""
        desk, at = self._desk, require_aware(at, "logical_time")
        if desk.books.last_tick is not None and at <= desk.books.last_tick:
            raise NeedsSteps
        before, state = desk.journal.place(), (desk.books.state, desk.books.remembered)
        try:
            # A strategy of its own for every tick, as live: what it wants to keep it remembers.
            Work(desk, self._strategy(), look(desk.reference, at, bars)).tick()
        except BaseException:
            desk.journal.back_to(before)
            desk.books.state, desk.books.remembered = state
            raise

    def take(self) -> Taken:
        """What writes the ticks that were worked out."""
        return self._desk.take()


def _tick_batch(conn: Connection, user_id: UUID, run_id: UUID, ticks: Ticks) -> int:
    """Write a batch in one transaction, with the run locked; returns how many ticks were new.

    What needs no step is written at once, and the tick at which that ends in steps. Where it ends
    often, few are worked out ahead.
    """
    ticks = [(require_aware(at, "logical_time"), bars) for at, bars in ticks]
    with translated(), conn.transaction():
        run = lock_run(conn, user_id, run_id)
        there = ledger.ticked(conn, user_id, run_id, [at for at, _ in ticks])
        new = [(at, bars) for at, bars in ticks if at not in there]
        if new:
            require_running(run)
        reference = Reference(conn, run.calendar)
        done, ahead = 0, 1
        while done < len(new):
            part = new[done : done + ahead]
            written = _write_at_once(conn, run, reference, part)
            if written < len(part):
                _tick_in_steps(conn, run, reference, *part[written])
                written, ahead = written + 1, 1
            done += written
            ahead *= 2
    return len(new)


def _write_at_once(conn: Connection, run: Run, reference: Reference, ticks: Ticks) -> int:
    """Write the ticks that need no step, from the first on; returns how many they are."""
    at_once = _AtOnce(conn, run, reference)
    if not at_once.tick_all(ticks):
        return 0
    taken = at_once.take()
    return taken.whole_ticks(journals.write(conn, taken))


def _tick_in_steps(
    conn: Connection, run: Run, reference: Reference, at: datetime, bars: list[Bar]
) -> None:
    desk = Desk(conn, run, read_books(conn, run), reference)
    Work(desk, strategy_of(run), look(reference, at, bars)).tick()
    desk.write_out()


def _batches(feed: Feed, size: int) -> Iterator[Ticks]:
    """Batches of ``size``; the first ones are smaller, so that the writing begins soon."""
    source, now = iter(feed), min(size, FIRST_BATCH_TICKS)
    while batch := list(islice(source, now)):
        yield batch
        now = min(size, 2 * now)
