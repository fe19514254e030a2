"""Replays against other engines' backtests: the same bars, the same strategy.

Ours writes every order, execution, position, mark and ledger event into Postgres; theirs stay in
memory. Each peer runs in a process of its own and tells how long its backtest alone took.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Protocol

from bench.ground import Ground, new_run, temporary_folder
from bench.harness import Row, interleave, seconds_of
from bench.market import feed, is_ordering_bar, sessions_of, write_csv
from bench.sizes import Sizes
from engine.db.connect import ENGINE_ROLE, Connection, open_connection
from engine.errors import ConfigurationError
from engine.limits import NewLimit, add_limit
from engine.market.model import Bar
from engine.replay import replay
from engine.runs import Run

__all__ = [
    "DENSE",
    "SPARSE",
    "Backtest",
    "Peer",
    "measure",
    "measure_limited",
    "replay_seconds",
]

Ticks = Sequence[tuple[datetime, list[Bar]]]


class Peer(Protocol):
    """Another engine; ``seconds`` runs its backtest over the bars of a file."""

    @property
    def name(self) -> str: ...

    def seconds(self, bars: Path, every: int) -> float: ...


@dataclass(frozen=True, slots=True)
class Backtest:
    """A replay to measure: minutes from one order to the next, and what each peer asks of us."""

    name: str
    every: int
    must: Mapping[str, float]
    bars: Callable[[Sizes], int]


DENSE = Backtest(
    "dense replay",
    1,
    MappingProxyType({"nautilus_trader": 3.0, "backtrader": 1.5}),
    lambda sizes: sizes.dense_bars,
)
SPARSE = Backtest(
    "sparse replay",
    390,
    MappingProxyType({"nautilus_trader": 0.3, "backtrader": 2.0}),
    lambda sizes: sizes.sparse_bars,
)


LIMITED_MUST = 0.6
# Far from what the strategy does, so that each order is held against all of them and passes.
LIMITS = (
    NewLimit("MAX_POSITION", Decimal(1_000)),
    NewLimit("MAX_ORDER_NOTIONAL", Decimal(100_000)),
    NewLimit("GROSS_EXPOSURE_MAX", Decimal(10_000_000)),
    NewLimit("OPEN_ORDERS_MAX", Decimal(100)),
)


def measure(what: Backtest, on: Ground, sizes: Sizes, peers: Sequence[Peer]) -> list[Row]:
    """The rows of a replay, one a peer."""
    bars = what.bars(sizes)
    dsn = on.database(what.name.replace(" ", "_"))
    with open_connection(dsn, role=ENGINE_ROLE) as conn, temporary_folder() as folder:
        sessions = sessions_of(conn)
        path = folder / "bars.csv"
        write_csv(path, sessions, bars)
        ticks = list(feed(sessions, bars))
        sides = {"ours": partial(replay_seconds, conn, ticks, what.every)} | {
            peer.name: partial(peer.seconds, path, what.every) for peer in peers
        }
        seconds = interleave(sizes.replay_rounds, sides)
    return [
        Row(
            what.name,
            bars / seconds["ours"],
            "bars/s",
            what.must[peer.name],
            peer=bars / seconds[peer.name],
            peer_name=peer.name,
            note=f"{bars:,} bars, an order every {what.every}; theirs in memory, ours on disk",
        )
        for peer in peers
    ]


def measure_limited(on: Ground, sizes: Sizes) -> list[Row]:
    """The row of a dense replay with limits, against one without."""
    dsn, bars = on.database("limited_replay"), sizes.dense_bars
    with open_connection(dsn, role=ENGINE_ROLE) as conn, open_connection(dsn) as owner:
        ticks = list(feed(sessions_of(conn), bars))

        def limit(run: Run) -> None:
            for each in LIMITS:
                add_limit(owner, run.user_id, each)

        seconds = interleave(
            sizes.replay_rounds,
            {
                "with": partial(replay_seconds, conn, ticks, DENSE.every, limit),
                "without": partial(replay_seconds, conn, ticks, DENSE.every),
            },
        )
    return [
        Row(
            "dense replay with limits",
            bars / seconds["with"],
            "bars/s",
            LIMITED_MUST,
            peer=bars / seconds["without"],
            peer_name="without",
            note=f"{len(LIMITS)} limits, at which each of {bars:,} orders is weighed",
        )
    ]


def replay_seconds(
    conn: Connection,
    ticks: Ticks,
    every: int,
    prepare: Callable[[Run], None] = lambda run: None,
) -> float:
    """Replay ticks through a new run and return how long it took, in seconds.

    ``prepare`` comes before it. Raises ConfigurationError unless each order was filled, once.
    """
    run = new_run(conn, every=every)
    prepare(run)
    seconds = seconds_of(lambda: replay(conn, run.user_id, run.run_id, ticks))
    expected = sum(is_ordering_bar(at, every) for at, _ in ticks)
    row = conn.execute(
        "SELECT count(*) FROM execution WHERE user_id = %s AND run_id = %s",
        [run.user_id, run.run_id],
    ).fetchone()
    if row != (expected,):
        raise ConfigurationError(f"the replay filled {row} orders, not {expected:,}")
    return seconds
