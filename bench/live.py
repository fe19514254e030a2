"""Live ticks against pgbench: one run, one order filled, all rows, a commit each."""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Iterator
from datetime import datetime
from decimal import Decimal
from itertools import chain, islice
from pathlib import Path

from psycopg import sql

from bench.ground import Ground, new_run
from bench.harness import Row, interleave
from bench.market import SYMBOL, feed, is_ordering_bar, sessions_of
from bench.sizes import Sizes
from engine.db.connect import ENGINE_ROLE, Connection, open_connection
from engine.errors import ConfigurationError
from engine.market.model import Bar
from engine.orders.model import Side
from engine.runs import Run
from engine.strategies.base import PlaceOrder
from engine.tick import run_tick

__all__ = ["LiveRun", "Pgbench", "going_on", "measure", "tps_of"]

MUST = 0.8
SECONDS_SLACK = 60.0
TICKS_PER_SECOND_MAX = 2_000
WARM_UP_TICKS = 20
_ONE = Decimal(1)


class LiveRun:
    """A run that is ticked live, a minute at a time, buying one and selling it.

    ``after`` is the tick that it goes on from. The minutes at which its own strategy orders, one
    in ``every``, are left out, so that each tick fills one order.
    """

    def __init__(
        self, conn: Connection, run: Run, *, after: datetime | None = None, every: int | None = None
    ) -> None:
        self._conn = conn
        self._run = run
        self._prices: Iterator[tuple[datetime, list[Bar]]] = (
            tick
            for tick in _feed_after(conn, after)
            if every is None or not is_ordering_bar(tick[0], every)
        )
        self._side = Side.BUY

    def tick(self) -> None:
        """One tick with one order that fills, committed."""
        at, (bar,) = next(self._prices)
        result = run_tick(
            self._conn,
            self._run.user_id,
            self._run.run_id,
            at,
            {SYMBOL: bar.close},
            intents=[PlaceOrder(SYMBOL, self._side, _ONE)],
        )
        if result.executions != 1:
            raise ConfigurationError(f"the tick at {at.isoformat()} filled {result.executions}")
        self._side = Side.SELL if self._side is Side.BUY else Side.BUY

    def seconds_per_tick(self, ticks: int) -> float:
        """How long one of so many ticks takes, in seconds."""
        self._prepare(ticks)
        began = time.perf_counter()
        for _ in range(ticks):
            self.tick()
        return (time.perf_counter() - began) / ticks

    def ticks_per_second(self, seconds: int) -> float:
        """How many ticks a second, measured for so long."""
        self._prepare(seconds * TICKS_PER_SECOND_MAX)
        began = time.perf_counter()
        ticks = 0
        while time.perf_counter() - began < seconds:
            self.tick()
            ticks += 1
        return ticks / (time.perf_counter() - began)

    def _prepare(self, ticks: int) -> None:
        """Have the prices of so many ticks at hand: to make them up is no part of a tick."""
        self._prices = chain(list(islice(self._prices, ticks)), self._prices)


def _feed_after(conn: Connection, after: datetime | None) -> Iterator[tuple[datetime, list[Bar]]]:
    """All minutes that are stored, or those after a moment."""
    sessions = sessions_of(conn)
    if after is None:
        return feed(sessions)
    left = [session for session in sessions if session.close_at > after]
    return (tick for tick in feed(left) if tick[0] > after)


def going_on(conn: Connection, run: Run, *, every: int | None = None) -> LiveRun:
    """A run that has ticked, from its last tick on."""
    row = conn.execute(
        "SELECT last_logical_time FROM engine_state WHERE user_id = %s AND run_id = %s",
        [run.user_id, run.run_id],
    ).fetchone()
    assert row is not None
    return LiveRun(conn, run, after=row[0], every=every)


def measure(on: Ground, sizes: Sizes) -> list[Row]:
    """The row of the live tick."""
    pgbench = Pgbench(on)
    with open_connection(on.database("live"), role=ENGINE_ROLE) as conn:
        ours = LiveRun(conn, new_run(conn))
        for _ in range(WARM_UP_TICKS):
            ours.tick()
        figures = interleave(
            sizes.live_rounds,
            {
                "ours": lambda: ours.ticks_per_second(sizes.live_seconds),
                "pgbench": lambda: pgbench.ticks_per_second(sizes.live_seconds),
            },
        )
    return [
        Row(
            "live tick",
            figures["ours"],
            "ticks/s",
            MUST,
            peer=figures["pgbench"],
            peer_name="pgbench TPC-B",
            note="one connection, one order filled and committed; TPC-B prepared, scale 1",
        )
    ]


class Pgbench:
    """pgbench's TPC-B at scale 1, prepared, on a database of its own of the same server."""

    def __init__(self, on: Ground, name: str = "pgbench") -> None:
        self._program = on.programs / "pgbench"
        with open_connection(on.server.dsn()) as admin:
            admin.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
        self._dsn = on.server.dsn(name)
        _said(self._program, ["-i", "-s", "1", "-q", self._dsn], SECONDS_SLACK)

    def ticks_per_second(self, seconds: int) -> float:
        """Its transactions a second, measured for so long."""
        arguments = ["-n", "-M", "prepared", "-c", "1", "-T", str(seconds), self._dsn]
        return tps_of(_said(self._program, arguments, seconds + SECONDS_SLACK))


def tps_of(said: str) -> float:
    """The transactions a second that pgbench tells, the connection's making left out."""
    found = re.search(r"^tps = ([\d.]+)", said, re.MULTILINE)
    if found is None:
        raise ConfigurationError("pgbench tells no transactions a second")
    return float(found[1])


def _said(program: Path, arguments: list[str], seconds_max: float) -> str:
    done = subprocess.run(
        [program, *arguments], capture_output=True, text=True, timeout=seconds_max, check=False
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise ConfigurationError(f"pgbench failed: {last}")
    return done.stdout
