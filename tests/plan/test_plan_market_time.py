"""MT: plans and rebalancing happen at their time, once."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import psycopg
import pytest
from market_days import (
    FRI,
    MON,
    THU,
    TUE,
    WED,
    a_plan,
    a_run,
    at_price,
    audited,
    close_on,
    counts,
    events,
    new_york,
    one,
    open_on,
    rows,
    snapshot,
)

from engine.db.connect import Connection
from engine.runs import Run
from engine.tick import run_tick, try_execute_sip

__all__ = ["audited"]


@pytest.mark.scenario("MT-01")
def test_with_the_market_closed_no_plan_is_executed(conn: Connection) -> None:
    run = a_run(conn)
    a_plan(conn, run)
    before = snapshot(conn)
    placed = try_execute_sip(
        conn, run.user_id, run.run_id, close_on(MON), at_price("100"), market_open=False
    )
    assert placed == 0
    assert {t: n for t, n in snapshot(conn).items() if t != "calendar_session"} == {
        t: n for t, n in before.items() if t != "calendar_session"
    }
    # The same call with the market open does execute it.
    assert try_execute_sip(conn, run.user_id, run.run_id, close_on(MON), at_price("100")) == 1


@pytest.mark.scenario("MT-01")
def test_a_tick_with_the_market_closed_executes_no_plan(conn: Connection) -> None:
    run = a_run(conn)
    a_plan(conn, run)
    result = run_tick(
        conn, run.user_id, run.run_id, close_on(MON), at_price("100"), market_open=False
    )
    assert (result.orders, result.executions) == (0, 0)
    assert (counts(conn, run)["orders"], counts(conn, run)["execution"]) == (0, 0)
    assert events(conn, run) == ["RUN_STARTED", "TICK"]


@pytest.mark.scenario("MT-01")
@pytest.mark.parametrize(
    "at",
    [
        new_york(MON, "09:29"),
        new_york(MON, "16:01"),
        new_york("2001-05-12", "12:00"),
        new_york("2001-05-28", "12:00"),
    ],
    ids=["before the open", "after the close", "Saturday", "holiday"],
)
def test_the_calendar_says_when_the_market_is_closed(conn: Connection, at: Any) -> None:
    run = a_run(conn)
    a_plan(conn, run)
    assert try_execute_sip(conn, run.user_id, run.run_id, at, at_price("100")) == 0
    assert not counts(conn, run)["orders"]


@pytest.mark.scenario("MT-02")
@pytest.mark.parametrize("moment", [open_on, close_on])
def test_a_scheduled_plan_is_executed_once(conn: Connection, moment: Any) -> None:
    run = a_run(conn)
    a_plan(conn, run)
    for day in ("2001-05-04", MON, TUE, WED):
        run_tick(conn, run.user_id, run.run_id, moment(day), at_price("30"))
    assert one(
        conn,
        """SELECT subject, logical_time, payload ->> 'quantity' FROM event_ledger
           WHERE :run AND event_type = 'SIP_EXECUTED'""",
        run,
    ) == ("apples@2001-05", moment(MON), "16.666666")
    assert one(conn, "SELECT quantity, price FROM paper_trade WHERE :run", run) == (
        Decimal("16.666666"),
        30,
    )


@pytest.mark.scenario("MT-02")
def test_a_plan_is_executed_once_whoever_executes_it(conn: Connection) -> None:
    run = a_run(conn)
    a_plan(conn, run)
    key = run.user_id, run.run_id
    assert try_execute_sip(conn, *key, close_on(MON), at_price("100")) == 1
    assert try_execute_sip(conn, *key, close_on(MON), at_price("100")) == 0
    assert run_tick(conn, *key, close_on(MON), at_price("100")).orders == 0
    assert try_execute_sip(conn, *key, close_on(TUE), at_price("100")) == 0
    assert events(conn, run).count("SIP_EXECUTED") == 1
    assert counts(conn, run)["execution"] == 1


@pytest.mark.scenario("MT-02")
def test_the_database_itself_refuses_a_second_execution(conn: Connection) -> None:
    run = a_run(conn)
    a_plan(conn, run)
    try_execute_sip(conn, run.user_id, run.run_id, close_on(MON), at_price("100"))
    with pytest.raises(psycopg.errors.UniqueViolation) as caught, conn.transaction():
        conn.execute(
            "INSERT INTO event_ledger (user_id, run_id, logical_time, event_type, subject)"
            " VALUES (%s, %s, %s, 'SIP_EXECUTED', 'apples@2001-05')",
            [run.user_id, run.run_id, close_on(TUE)],
        )
    assert caught.value.diag.constraint_name == "event_ledger_occasion_once"


def doubled(conn: Connection, run: Run) -> list[Any]:
    """Whatever a run has twice at one logical time, and may not."""
    return [
        found
        for query in (
            "SELECT logical_time FROM mtm_ledger WHERE :run",
            "SELECT logical_time FROM paper_equity_curve WHERE :run",
            "SELECT logical_time FROM event_ledger WHERE :run AND event_type = 'TICK'",
            "SELECT logical_time, event_type, subject FROM event_ledger WHERE :run",
            "SELECT logical_time, symbol, side FROM paper_order WHERE :run",
            "SELECT logical_time, symbol, side FROM paper_trade WHERE :run",
        )
        for found in rows(
            conn, f"SELECT t::text, count(*) FROM ({query}) t GROUP BY t HAVING count(*) > 1", run
        )
    ]


@pytest.mark.scenario("MT-03")
def test_a_logical_time_happens_once(conn: Connection) -> None:
    run = a_run(conn)
    a_plan(conn, run)
    for _ in range(3):
        run_tick(conn, run.user_id, run.run_id, close_on(MON), at_price("100"))
    assert doubled(conn, run) == []
    assert counts(conn, run)["orders"] == counts(conn, run)["execution"] == 1
    assert counts(conn, run)["mtm_ledger"] == 1
    assert events(conn, run).count("TICK") == 1


@pytest.mark.scenario("MT-03")
@pytest.mark.parametrize(
    "insert",
    [
        "INSERT INTO mtm_ledger (user_id, run_id, logical_time) VALUES (%s, %s, %s)",
        "INSERT INTO paper_equity_curve (user_id, run_id, logical_time) VALUES (%s, %s, %s)",
        "INSERT INTO event_ledger (user_id, run_id, logical_time, event_type)"
        " VALUES (%s, %s, %s, 'TICK')",
    ],
)
def test_the_database_itself_refuses_a_second_row_of_a_logical_time(
    conn: Connection, insert: str
) -> None:
    run = a_run(conn)
    run_tick(conn, run.user_id, run.run_id, close_on(MON), at_price("100"))
    with pytest.raises(psycopg.errors.UniqueViolation), conn.transaction():
        conn.execute(insert, [run.user_id, run.run_id, close_on(MON)])
    assert doubled(conn, run) == []


WEIGHTS = {"weights": {"AAPL": "0.5", "IBM": "0.5"}, "period": "MONTHLY"}


@pytest.mark.scenario("MT-04")
def test_a_period_is_rebalanced_once(conn: Connection) -> None:
    run = a_run(conn, strategy="rebalance", parameters=WEIGHTS)
    prices = [("100", "50"), ("120", "50"), ("150", "40"), ("150", "30")]
    for day, (apple, ibm) in zip((MON, TUE, WED, THU), prices, strict=True):
        both = at_price(apple) | at_price(ibm, "IBM")
        run_tick(conn, run.user_id, run.run_id, close_on(day), both)
        run_tick(conn, run.user_id, run.run_id, close_on(day), both)
    assert one(
        conn,
        "SELECT subject, logical_time FROM event_ledger WHERE :run AND event_type = 'REBALANCED'",
        run,
    ) == ("2001-05", close_on(MON))
    assert counts(conn, run)["execution"] == 2
    both = at_price("150") | at_price("30", "IBM")
    run_tick(conn, run.user_id, run.run_id, close_on("2001-06-01"), both)
    subjects = rows(
        conn,
        "SELECT subject FROM event_ledger WHERE :run AND event_type = 'REBALANCED' ORDER BY seq",
        run,
    )
    assert subjects == ["2001-05", "2001-06"]
    # Apples went up and were sold before IBM was bought.
    sides = rows(conn, "SELECT side FROM paper_trade WHERE :run ORDER BY execution_id", run)
    assert sides == ["BUY", "BUY", "SELL", "BUY"]


@pytest.mark.scenario("MT-04")
def test_a_rebalance_that_forgot_that_it_had_been_done_is_refused(conn: Connection) -> None:
    run = a_run(conn, strategy="rebalance", parameters=WEIGHTS)
    both = at_price("100") | at_price("50", "IBM")
    run_tick(conn, run.user_id, run.run_id, close_on(MON), both)
    conn.execute("UPDATE engine_state SET state = '{}'")
    before = snapshot(conn)
    with pytest.raises(Exception, match="2001-05"), conn.transaction():
        run_tick(conn, run.user_id, run.run_id, close_on(FRI), at_price("200") | both)
    after = snapshot(conn)
    for table in ("orders", "execution", "position", "mtm_ledger"):
        assert after[table] == before[table]
    assert events(conn, run).count("REBALANCED") == 1
