"""Ticks at once at the edges: runs that aren't there, times between seconds, empty positions."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime, timedelta
from decimal import Decimal
from uuid import uuid4

import psycopg
import pytest
from market_days import MON, TUE, a_bar, a_run, at_price, audited, buy, close_on, rows, statuses
from psycopg.types.json import Jsonb
from scripted import SCRIPTED, Hooks, hooks

from engine.db.connect import ENGINE_ROLE, Connection, open_connection
from engine.errors import BadInput, RunNotRunning
from engine.quantities import quotient
from engine.replay import replay
from engine.tick import run_tick

__all__ = ["audited", "hooks"]


@pytest.fixture
def engine(dsn: str) -> Iterator[Connection]:
    with open_connection(dsn, role=ENGINE_ROLE) as conn:
        yield conn


def test_a_run_that_is_not_there_is_bad_input(engine: Connection) -> None:
    with pytest.raises(BadInput, match="has no run"):
        run_tick(engine, uuid4(), uuid4(), close_on(MON), {})
    with pytest.raises(BadInput, match="has no run"):
        replay(engine, uuid4(), uuid4(), [(close_on(MON), [])])


def test_a_run_that_was_not_started_is_not_replayed(engine: Connection) -> None:
    run = a_run(engine, start=False)
    with pytest.raises(RunNotRunning):
        replay(engine, run.user_id, run.run_id, [(close_on(MON), [a_bar(MON)])])


@pytest.mark.parametrize("micros", [1, 500_000, 123_450])
def test_a_moment_between_seconds_is_told_as_the_database_tells_it(
    engine: Connection, owner_conn: Connection, micros: int
) -> None:
    """At once: the database compares the payloads, and anything else would be done in steps."""
    run = a_run(engine)
    at: datetime = close_on(MON) - timedelta(hours=1) + timedelta(microseconds=micros)
    run_tick(engine, run.user_id, run.run_id, at, at_price("100"), intents=[buy("1")])
    assert statuses(owner_conn, run) == ["FILLED"]
    told = rows(
        owner_conn,
        """SELECT l.payload = execution_event_payload(e) FROM event_ledger l
           JOIN execution e ON e.run_id = l.run_id WHERE l.event_type = 'EXECUTION'""",
    )
    assert told == [True]


def test_a_position_that_never_was_has_no_mark(engine: Connection, owner_conn: Connection) -> None:
    run = a_run(engine)
    owner_conn.execute(
        "INSERT INTO position (user_id, run_id, symbol) VALUES (%s, %s, 'AAPL')",
        [run.user_id, run.run_id],
    )
    result = run_tick(
        engine, run.user_id, run.run_id, close_on(MON), at_price("100"), intents=[buy("1")]
    )
    assert (result.executions, result.market_value) == (1, Decimal(100))


def test_nothing_divided_is_nothing() -> None:
    assert quotient(Decimal(0), Decimal(7), 10) == 0


def test_a_connection_that_does_not_commit_by_itself_still_commits_its_ticks(
    dsn: str, owner_conn: Connection
) -> None:
    """As psycopg connects unless it is told otherwise."""
    run = a_run(owner_conn)
    with psycopg.connect(dsn) as conn:
        run_tick(conn, run.user_id, run.run_id, close_on(MON), at_price("100"))
        replay(conn, run.user_id, run.run_id, [(close_on(TUE), [a_bar(TUE)])])
        ticks = "SELECT count(*) FROM event_ledger WHERE event_type = 'TICK'"
        assert rows(owner_conn, ticks) == [2]


def test_a_state_that_was_put_right_by_hand_is_seen_and_stays(
    engine: Connection, owner_conn: Connection, hooks: Hooks
) -> None:
    run = a_run(engine, strategy=SCRIPTED)
    seen = []
    hooks["on_tick"] = lambda context: seen.append(dict(context.state))
    for minute, note in enumerate([None, "by hand", None]):
        if note:
            owner_conn.execute("UPDATE engine_state SET state = %s", [Jsonb({"note": note})])
        at = close_on(MON) - timedelta(minutes=10 - minute)
        run_tick(engine, run.user_id, run.run_id, at, at_price("100"))
        engine.execute("SELECT 1")
    assert rows(owner_conn, "SELECT state FROM engine_state") == [{"note": "by hand"}]
    later = [(close_on(TUE), [a_bar(TUE)])]
    replay(engine, run.user_id, run.run_id, later)
    assert seen[-1] == {"note": "by hand"}
    assert rows(owner_conn, "SELECT state FROM engine_state") == [{"note": "by hand"}]


def test_bars_that_can_be_read_but_once_are_enough_for_a_tick_in_steps(
    engine: Connection, owner_conn: Connection
) -> None:
    run = a_run(engine)
    resting = buy("1", order_type="LIMIT", limit_price="1")
    bars = (bar for bar in [a_bar(MON)])
    run_tick(engine, run.user_id, run.run_id, close_on(MON), bars, intents=[resting, buy("1")])
    assert statuses(owner_conn, run) == ["PENDING", "FILLED"]
