"""The demo: thirteen years of real prices through two runs, on the user's own database.

Everything has a fixed id, so that a second demo finds the first one's ticks in the ledger and
adds nothing; two demos at once share the work.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import date, datetime
from decimal import Decimal
from itertools import groupby
from operator import attrgetter
from typing import NamedTuple
from uuid import UUID, uuid5

from engine import resources
from engine.db.connect import ENGINE_ROLE, Connection, open_connection
from engine.errors import (
    AlreadyHappened,
    IllegalRunMove,
    RunAlreadyRunning,
    RunNotRunning,
    translated,
)
from engine.history import read_history
from engine.market.imports import read_bars, read_splits
from engine.market.model import Bar, Split
from engine.market.store import import_bars, import_splits
from engine.replay import Feed, Replayed, replay
from engine.report.model import RunHistory
from engine.runs import Run, Terms, add_user, create_run, find_run, start_run
from engine.sips import Plan, add_plan
from engine.stop import stop_run

CALENDAR = "XNYS"
SYMBOLS = ("AAPL", "IBM", "MSFT")

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Setup:
    """One of the demo's runs; the user is called as the run."""

    name: str
    terms: Terms
    plans: tuple[Plan, ...] = ()


SETUPS = (
    Setup(
        "demo-sip",
        Terms("sip", initial_cash=Decimal(250_000), name="demo-sip", calendar=CALENDAR),
        tuple(
            Plan(symbol, symbol, Decimal(500), day_of_month=5, start_on=date(2000, 4, 1))
            for symbol in SYMBOLS
        ),
    ),
    Setup(
        "demo-rebalance",
        Terms(
            "rebalance",
            {"weights": {"AAPL": "0.50", "IBM": "0.30", "MSFT": "0.20"}, "period": "QUARTERLY"},
            Decimal(100_000),
            "demo-rebalance",
            CALENDAR,
        ),
    ),
)


@dataclass(frozen=True, slots=True)
class DemoRun:
    """A run of the demo with what it came to."""

    name: str
    user_id: UUID
    run_id: UUID
    history: RunHistory


@dataclass(frozen=True, slots=True)
class Demo:
    """What the demo did: ticks written now, ticks found in the ledger, seconds for both."""

    runs: tuple[DemoRun, ...]
    written: int
    repeated: int
    seconds: float


class Market(NamedTuple):
    """What the demo's prices and splits are."""

    bars: list[Bar]
    splits: list[Split]


def read_market() -> Market:
    """Read the demo's prices; it takes no database, and a second or so."""
    folder = resources.data_dir()
    return Market(
        read_bars(folder / "demo_prices.csv.gz", calendar=CALENDAR),
        read_splits(folder / "demo_splits.csv", calendar=CALENDAR),
    )


def run_demo(dsn: str, market: Market, progress: Progress = lambda name, done, total: None) -> Demo:
    """Import the market, replay it through both runs and read what they came to.

    ``progress`` is told the run's name, the ticks done and the ticks to do. Raises BadInput when
    the database holds other prices of the same symbols and days.
    """
    with open_connection(dsn, role=ENGINE_ROLE) as conn:
        with translated(), conn.transaction():
            import_bars(conn, market.bars)
            import_splits(conn, market.splits)
        feed = list(_by_time(market.bars))
        began = time.monotonic()
        done = [_run_one(conn, setup, feed, progress) for setup in SETUPS]
        seconds = time.monotonic() - began
        runs = tuple(
            DemoRun(
                setup.name, run.user_id, run.run_id, read_history(conn, run.user_id, run.run_id)
            )
            for setup, (run, _) in zip(SETUPS, done, strict=True)
        )
    return Demo(
        runs,
        sum(replayed.written for _, replayed in done),
        sum(replayed.repeated for _, replayed in done),
        seconds,
    )


def _run_one(
    conn: Connection, setup: Setup, feed: Feed, progress: Progress
) -> tuple[Run, Replayed]:
    run = _set_up(conn, setup)
    total = len(list(feed))
    ticks = 0

    def told(batch: int) -> None:
        nonlocal ticks
        ticks += batch
        progress(setup.name, ticks, total)

    progress(setup.name, 0, total)
    replayed = replay(conn, run.user_id, run.run_id, feed, progress=told)
    if find_run(conn, run.run_id).status == "RUNNING":
        with suppress(IllegalRunMove, RunNotRunning):  # another demo has just stopped it
            stop_run(conn, run.user_id, run.run_id)
    return run, replayed


def _set_up(conn: Connection, setup: Setup) -> Run:
    """The setup's user, run and plans, made once however many demos start."""
    user_id = add_user(conn, setup.name)
    run_id = uuid5(user_id, setup.name)
    # It was made before, or another demo is making it.
    with suppress(AlreadyHappened, RunAlreadyRunning), conn.transaction():
        create_run(conn, user_id, setup.terms, run_id=run_id)
        for plan in setup.plans:
            add_plan(conn, user_id, run_id, plan)
        start_run(conn, user_id, run_id)
    return find_run(conn, run_id)


def _by_time(bars: list[Bar]) -> Iterator[tuple[datetime, list[Bar]]]:
    ordered = sorted(bars, key=lambda bar: (bar.end, bar.symbol))
    for at, group in groupby(ordered, key=attrgetter("end")):
        yield at, list(group)
