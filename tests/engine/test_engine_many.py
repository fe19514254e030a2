"""Several runs ticked together: read together and sent together, each for itself all the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any

import psycopg
import pytest
from market_days import (
    MON,
    a_plan,
    a_run,
    assert_sound,
    at_price,
    audited,
    buy,
    close_on,
    events,
    one,
    open_on,
    rows,
    snapshot,
    statuses,
)
from scripted import SCRIPTED, Hooks, hooks

from engine import journal
from engine.books import open_many
from engine.db.connect import ENGINE_ROLE, Connection, open_connection
from engine.errors import DatabaseUnavailable, Retryable, StrategyFailed
from engine.runs import Run
from engine.strategies.base import Intent, Remember
from engine.tick import Planned, TickResult, place_orders, run_tick, run_ticks

__all__ = ["audited", "hooks"]

CLOSE = close_on(MON)
PRICES = at_price("100")


@pytest.fixture
def no_steps(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From the call on, a tick that isn't written at once fails its test."""

    def fail(*_: Any) -> None:
        raise AssertionError("this tick was done in steps")

    return lambda: monkeypatch.setattr(Planned, "in_steps", fail)


def runs_of(conn: Connection, users: str, **terms: Any) -> list[Run]:
    return [a_run(conn, user=user, **terms) for user in users.split()]


def tick_all(
    conn: Connection,
    runs: Sequence[Run],
    intents: Sequence[Intent] = (),
    *,
    at: datetime = CLOSE,
    meanwhile: Callable[[], Any] = lambda: None,
) -> list[TickResult | Exception]:
    opened = open_many(conn, [(run.user_id, run.run_id, at) for run in runs])
    meanwhile()
    ticks = [
        (
            Planned(run.user_id, run.run_id, at, PRICES, at, intents=intents),
            opened[run.run_id],
        )
        for run in runs
    ]
    return run_ticks(conn, ticks)


def executions(results: Sequence[TickResult | Exception]) -> list[int | Exception]:
    return [each.executions if isinstance(each, TickResult) else each for each in results]


def test_each_run_is_ticked_in_a_transaction_of_its_own(
    engine_conn: Connection, owner_conn: Connection, no_steps: Callable[[], None]
) -> None:
    runs = runs_of(owner_conn, "ann ben cem")
    run_tick(engine_conn, runs[0].user_id, runs[0].run_id, open_on(MON), PRICES)
    no_steps()
    assert executions(tick_all(engine_conn, runs, [buy("1")])) == [1, 1, 1]
    transactions = "SELECT DISTINCT xmin::text FROM event_ledger WHERE event_type = 'EXECUTION'"
    assert len(rows(owner_conn, transactions)) == 3
    had = snapshot(owner_conn)
    again = tick_all(engine_conn, runs, [buy("1")])
    assert [each.repeated for each in again if isinstance(each, TickResult)] == [True] * 3
    assert snapshot(owner_conn) == had


def test_nothing_to_tick_is_no_tick(engine_conn: Connection) -> None:
    assert tick_all(engine_conn, []) == []


def test_no_run_waits_for_what_becomes_of_another(
    engine_conn: Connection, owner_conn: Connection, hooks: Hooks
) -> None:
    runs = runs_of(owner_conn, "ann ben cem dot", strategy=SCRIPTED)
    ann, ben, cem, _ = runs
    owner_conn.execute(
        "INSERT INTO risk_limit (user_id, kind, symbol) VALUES (%s, 'FORBIDDEN_SYMBOL', 'AAPL')",
        [ann.user_id],
    )

    def on_tick(context: Any) -> list[Intent]:
        if context.user_id == ben.user_id:
            raise ValueError("no")
        rests = {"order_type": "LIMIT", "limit_price": "90", "time_in_force": "GTC"}
        return [buy("1", **(rests if context.user_id == cem.user_id else {}))]

    hooks["on_tick"] = on_tick
    refused, failed, rests, fills = tick_all(engine_conn, runs)
    assert executions([refused, rests, fills]) == [0, 0, 1]
    assert isinstance(failed, StrategyFailed)
    assert [statuses(owner_conn, run) for run in runs] == [
        *(["REJECTED"], [], ["PENDING"], ["FILLED"]),
    ]
    assert [events(owner_conn, run).count("TICK") for run in runs] == [1, 0, 1, 1]
    assert one(owner_conn, f"SELECT status FROM strategy_run WHERE run_id = '{ben.run_id}'") == (
        "ERROR"
    )


def test_a_run_that_moved_since_it_was_read_is_read_again(
    engine_conn: Connection, owner_conn: Connection
) -> None:
    runs = runs_of(owner_conn, "ann ben")
    ben = runs[1]

    def ben_buys() -> None:
        place_orders(owner_conn, ben.user_id, ben.run_id, CLOSE, PRICES, [buy("2")])

    results = tick_all(engine_conn, runs, [buy("1")], meanwhile=ben_buys)
    assert [each.cash for each in results if isinstance(each, TickResult)] == [9_900, 9_700]


def test_a_plan_that_was_paused_since_it_was_read_is_left_alone(
    engine_conn: Connection, owner_conn: Connection
) -> None:
    runs = runs_of(owner_conn, "ann ben")
    for run in runs:
        a_plan(owner_conn, run)
    pause = "UPDATE sip_plan SET status = 'PAUSED' WHERE user_id = %s"
    results = tick_all(
        engine_conn, runs, meanwhile=lambda: owner_conn.execute(pause, [runs[0].user_id])
    )
    assert executions(results) == [0, 1]


def test_a_state_is_read_just_before_it_is_used(
    engine_conn: Connection, owner_conn: Connection, hooks: Hooks
) -> None:
    runs = runs_of(owner_conn, "ann ben", strategy=SCRIPTED)
    hooks["on_tick"] = lambda context: [Remember({"n": context.state.get("n", 0) + 1})]
    tick_all(engine_conn, runs, at=open_on(MON))
    put_right = "UPDATE engine_state SET state = '{\"n\": 7}' WHERE user_id = %s"
    tick_all(engine_conn, runs, meanwhile=lambda: owner_conn.execute(put_right, [runs[1].user_id]))
    assert sorted(rows(owner_conn, "SELECT state ->> 'n' FROM engine_state")) == ["2", "8"]


def test_what_the_server_was_made_to_forget_is_prepared_again(
    engine_conn: Connection, owner_conn: Connection, no_steps: Callable[[], None]
) -> None:
    """As psycopg does after each transaction that is rolled back."""
    runs = runs_of(owner_conn, "ann ben")
    ann = runs[0]
    run_tick(engine_conn, ann.user_id, ann.run_id, open_on(MON), PRICES)
    no_steps()
    engine_conn.execute("DEALLOCATE ALL", prepare=False)
    assert executions(tick_all(engine_conn, runs, [buy("1")])) == [1, 1]
    engine_conn.execute("DEALLOCATE ALL", prepare=False)
    later = open_on("2001-05-08")
    result = run_tick(engine_conn, ann.user_id, ann.run_id, later, PRICES, intents=[buy("1")])
    assert result.executions == 1


def test_a_connection_that_is_lost_is_told_and_nothing_is_there(
    dsn: str, owner_conn: Connection
) -> None:
    runs = runs_of(owner_conn, "ann ben")
    with open_connection(dsn, role=ENGINE_ROLE) as conn:
        run_tick(conn, runs[0].user_id, runs[0].run_id, open_on(MON), PRICES)

        def end() -> None:
            owner_conn.execute("SELECT pg_terminate_backend(%s, 5000)", [conn.info.backend_pid])

        with pytest.raises(DatabaseUnavailable):
            tick_all(conn, runs, [buy("1")], meanwhile=end)
    assert one(owner_conn, "SELECT count(*) FROM execution") == 0
    assert_sound(owner_conn)


def test_a_run_that_somebody_holds_is_tried_again_and_then_told(
    engine_conn: Connection, owner_conn: Connection, dsn: str
) -> None:
    held, free = runs_of(owner_conn, "ann ben")
    engine_conn.execute("SET lock_timeout = '20ms'")
    with open_connection(dsn) as other, other.transaction():
        other.execute("SELECT FROM strategy_run WHERE run_id = %s FOR UPDATE", [held.run_id])
        stuck, done = tick_all(engine_conn, [held, free], [buy("1")])
    assert isinstance(stuck, Retryable)
    assert executions([done]) == [1]


def test_what_can_not_be_prepared_is_raised(engine_conn: Connection) -> None:
    engine_conn.execute("SET search_path = pg_catalog")
    with pytest.raises(psycopg.errors.UndefinedFunction):
        journal.write_each(engine_conn, [journal.Taken([None] * 27, 1, [])])
