"""Growth: what a live tick costs in a database full of history, against an empty one.

All of the history is written by the engine's own replay, so that the audit can look at it.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from uuid import UUID

from bench.ground import Ground, new_run
from bench.harness import Row, child, interleave, result_of
from bench.live import LiveRun, going_on
from bench.replays import DENSE, SPARSE
from bench.sizes import Sizes
from engine.db.connect import ENGINE_ROLE, Connection, open_connection
from engine.runs import find_run

__all__ = ["histories", "measure"]

MUST = 1.25
WRITERS = 2
# A dense tick is told by three events: the order, its execution and the tick.
EVENTS_A_DENSE_TICK = 3
# No other run is longer than a tenth of the one that is measured.
_OTHERS_SHARE = 10
_MS = 1_000


def measure(on: Ground, sizes: Sizes) -> list[Row]:
    """The row of growth: the worse of a new run and the longest one, in the grown database."""
    empty, grown = on.database("empty"), on.database("grown")
    longest = _fill(grown, sizes)
    _settle(on, empty, grown)
    with ExitStack() as stack:
        small, big = (
            stack.enter_context(open_connection(dsn, role=ENGINE_ROLE)) for dsn in (empty, grown)
        )
        events = _events(big)
        sides = {
            "empty": LiveRun(small, new_run(small)),
            "a new run": LiveRun(big, new_run(big)),
            "the longest run": going_on(big, find_run(big, longest), every=SPARSE.every),
        }
        ticks = sizes.growth_ticks
        for side in sides.values():
            side.seconds_per_tick(ticks // 4)  # warms what a connection keeps
        seconds = interleave(
            sizes.growth_rounds,
            {name: partial(side.seconds_per_tick, ticks) for name, side in sides.items()},
        )
    base = seconds.pop("empty")
    worse = max(seconds, key=lambda name: seconds[name])
    return [
        Row(
            "growth",
            seconds[worse] * _MS,
            "ms/tick",
            MUST,
            peer=base * _MS,
            peer_name="empty database",
            better="less",
            note=f"{events:,} events, {sizes.growth_run_ticks:,} ticks in one run; worse: {worse}",
        )
    ]


def histories(sizes: Sizes) -> Iterator[tuple[int, int]]:
    """Ticks and minutes between orders of each run to write; the longest one is the first."""
    yield sizes.growth_run_ticks, SPARSE.every
    left = sizes.growth_events - sizes.growth_run_ticks
    ticks_max = max(1, sizes.growth_run_ticks // _OTHERS_SHARE)
    while left > 0:
        ticks = min(ticks_max, -(-left // EVENTS_A_DENSE_TICK))
        yield ticks, DENSE.every
        left -= ticks * EVENTS_A_DENSE_TICK


def _fill(dsn: str, sizes: Sizes) -> UUID:
    """Write the histories, some at a time; returns the longest run."""

    def write(history: tuple[int, int]) -> UUID:
        return UUID(result_of(child("workers.fill", dsn, *map(str, history)))["run_id"])

    with ThreadPoolExecutor(WRITERS) as writers:
        return next(iter(list(writers.map(write, histories(sizes)))))


def _settle(on: Ground, *dsns: str) -> None:
    """Do what autovacuum and the checkpointer would have done by the next day."""
    for dsn in dsns:
        with open_connection(dsn) as owner:
            owner.execute("VACUUM (ANALYZE)")
    with open_connection(on.server.dsn()) as admin:
        admin.execute("CHECKPOINT")


def _events(conn: Connection) -> int:
    row = conn.execute("SELECT count(*) FROM event_ledger").fetchone()
    assert row is not None
    return int(row[0])
