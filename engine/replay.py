"""Replay: a feed of prices through a run, many ticks a transaction, each tick still its own.

The ticks are the same code as live ones; only what surrounds them is shared: the run's lock, its
books and the lookups are read once a batch. A crash loses at most the batch that was under way,
and the next call goes on where the ledger ends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from itertools import islice
from uuid import UUID

from engine import ledger
from engine.books import read_books
from engine.db.connect import Connection
from engine.errors import BadInput, RuleViolation, StrategyFailed, translated
from engine.market.model import Bar
from engine.market.view import look
from engine.reference import Reference
from engine.runs import lock_run, require_aware, require_running
from engine.tick import Work, run_tick, strategy_of

BATCH_TICKS = 100

Feed = Iterable[tuple[datetime, list[Bar]]]


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
    written = repeated = 0
    for ticks in _batches(feed, batch):
        try:
            new = _tick_batch(conn, user_id, run_id, ticks)
        except (StrategyFailed, BadInput, RuleViolation):
            # The batch is gone. Again one by one: the good ones are committed, and the one that
            # fails does what it would have done live.
            results = [run_tick(conn, user_id, run_id, at, bars) for at, bars in ticks]
            new = sum(not result.repeated for result in results)
        written += new
        repeated += len(ticks) - new
        progress(len(ticks))
    return Replayed(written, repeated)


def _tick_batch(
    conn: Connection, user_id: UUID, run_id: UUID, ticks: list[tuple[datetime, list[Bar]]]
) -> int:
    """Write a batch in one transaction; returns how many of its ticks were new."""
    ticks = [(require_aware(at, "logical_time"), bars) for at, bars in ticks]
    with translated(), conn.transaction():
        run = lock_run(conn, user_id, run_id)
        done = ledger.ticked(conn, user_id, run_id, [at for at, _ in ticks])
        new = [(at, bars) for at, bars in ticks if at not in done]
        if not new:
            return 0
        require_running(run)
        reference = Reference(conn, run.calendar)
        books = read_books(conn, run)
        for at, bars in new:
            # A strategy of its own for every tick, as live: what it wants to keep it remembers.
            view = look(reference, at, bars)
            Work(conn, run, strategy_of(run), reference, books, view).tick((), live=False)
    return len(new)


def _batches(feed: Feed, size: int) -> Iterator[list[tuple[datetime, list[Bar]]]]:
    source = iter(feed)
    while batch := list(islice(source, size)):
        yield batch
