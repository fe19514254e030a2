"""Runs: made with checked terms, ended with their reason, stopped whatever the strategy does."""

from __future__ import annotations

from collections.abc import Callable
from decimal import Decimal
from typing import Any
from uuid import uuid4

import pytest
from market_days import (
    FRI,
    MON,
    TUE,
    a_run,
    at_price,
    audited,
    buy,
    close_on,
    counts,
    events,
    fresh,
    one,
    order_ids,
    rows,
    snapshot,
    statuses,
)
from scripted import SCRIPTED, Hooks, hooks

from engine.db.connect import ENGINE_ROLE, Connection
from engine.errors import (
    BadInput,
    ConfigurationError,
    IllegalRunMove,
    InvalidValue,
    RunNotRunning,
    UnknownReference,
)
from engine.runs import (
    Run,
    Terms,
    add_user,
    create_run,
    delete_run,
    fail_run,
    find_run,
    lock_run,
    set_status,
    start_run,
)
from engine.stop import stop_run
from engine.strategies.base import Context
from engine.tick import place_orders, run_tick

__all__ = ["audited", "hooks"]


# Made


def test_a_run_is_made_of_its_terms(conn: Connection) -> None:
    user_id, run_id = add_user(conn, "ann"), uuid4()
    terms = Terms(
        "rebalance",
        {"weights": {"aapl": "0.5"}},
        Decimal("123.45"),
        "mine",
        "nyse",
        {"slippage": {"model": "bps", "bps": "5"}},
        "MARGIN",
        "EUR",
        "OPEN",
    )
    run = create_run(conn, user_id, terms, run_id=run_id)
    assert run == find_run(conn, run_id)
    assert (run.user_id, run.run_id, run.name, run.status) == (user_id, run_id, "mine", "CREATED")
    assert (run.strategy, run.broker, run.account_type) == ("rebalance", "paper", "MARGIN")
    assert run.parameters == {"weights": {"AAPL": "0.5"}, "period": "QUARTERLY"}
    # An alias is stored as the calendar's own code.
    assert (run.calendar, run.currency) == ("XNYS", "EUR")
    assert run.paper.slippage.model == "BPS"
    assert run.initial_cash == run.cash == Decimal("123.45")
    assert one(conn, "SELECT tick_at FROM strategy_run") == "OPEN"


def test_one_name_is_one_user(conn: Connection) -> None:
    assert add_user(conn, "ann") == add_user(conn, "ann") != add_user(conn, "ben")
    assert sorted(rows(conn, "SELECT name FROM app_user")) == ["ann", "ben"]
    with pytest.raises(InvalidValue), conn.transaction():
        add_user(conn, "no\nname")


TERMS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "calendar": ({"calendar": "XNYX"}, BadInput, "There is no exchange calendar 'XNYX'; did you"),
    "setting": (
        {"paper": {"slipage": 1}},
        BadInput,
        "paper setting slipage: Extra inputs are not permitted",
    ),
    "model": (
        {"paper": {"commission": {"model": "FREE"}}},
        BadInput,
        "paper setting commission: Input tag 'FREE'",
    ),
    "value of a setting": (
        {"paper": {"slippage": {"model": "BPS", "bps": "-1"}}},
        BadInput,
        "paper setting slippage.BPS.bps: Input should be greater than or equal to 0",
    ),
    "finer prices than the books hold": (
        {"paper": {"price_decimals": 9}},
        BadInput,
        "paper setting price_decimals: the books hold at most 8 decimals",
    ),
    "finer quantities than the books hold": (
        {"paper": {"quantity_decimals": 12}},
        BadInput,
        "paper setting quantity_decimals: the books hold at most 8 decimals",
    ),
    "negative cash": ({"initial_cash": Decimal(-1)}, InvalidValue, "initial_cash_in_range"),
    "cash that is none": ({"initial_cash": Decimal("NaN")}, InvalidValue, "in_range"),
    "huge cash": ({"initial_cash": Decimal("1e18")}, InvalidValue, "initial_cash_in_range"),
    "cash too fine": ({"initial_cash": Decimal("1e-9")}, InvalidValue, "initial_cash_in_range"),
    "account": ({"account_type": "CREDIT"}, InvalidValue, "account_type_known"),
    "currency": ({"currency": "dollars"}, InvalidValue, "currency_format"),
    "moment": ({"tick_at": "NOON"}, InvalidValue, "tick_at_known"),
}


@pytest.mark.parametrize(("terms", "error", "message"), TERMS.values(), ids=TERMS.keys())
def test_terms_that_do_not_fit_make_no_run(
    conn: Connection, terms: dict[str, Any], error: type[Exception], message: str
) -> None:
    user_id = add_user(conn, "ann")
    with pytest.raises(error) as caught, conn.transaction():
        create_run(conn, user_id, Terms(**terms))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert rows(conn, "SELECT 1 FROM strategy_run") == []


def test_a_run_of_nobody_is_not_made(conn: Connection) -> None:
    with pytest.raises(UnknownReference), conn.transaction():
        create_run(conn, uuid4(), Terms())


@pytest.mark.parametrize("call", [find_run, lambda c, r: lock_run(c, uuid4(), r)])
def test_an_unknown_run_is_not_found(
    conn: Connection, call: Callable[[Connection, Any], Run]
) -> None:
    with pytest.raises(BadInput, match="`oms run list` shows the runs"):
        call(conn, uuid4())


@pytest.mark.parametrize("call", [start_run, stop_run, delete_run])
def test_an_unknown_run_is_neither_started_nor_stopped_nor_deleted(
    conn: Connection, call: Callable[[Connection, Any, Any], object]
) -> None:
    run = a_run(conn)
    with pytest.raises(BadInput, match="has no run"):
        call(conn, uuid4(), run.run_id)
    with pytest.raises(BadInput, match="has no run"):
        set_status(conn, run.user_id, uuid4(), "STOPPED")
    assert fresh(conn, run).status == "RUNNING"


# Ended


def test_a_failed_run_says_why(conn: Connection) -> None:
    run = a_run(conn)
    resting = buy("1", order_type="LIMIT", limit_price="1", time_in_force="GTC")
    run_tick(conn, run.user_id, run.run_id, close_on(MON), at_price("9"), intents=[resting])
    ended = fail_run(conn, run.user_id, run.run_id, "the disk is gone", close_on(FRI))
    assert ended.status == fresh(conn, run).status == "ERROR"
    assert one(conn, "SELECT last_error, error_at FROM engine_status") == (
        "the disk is gone",
        close_on(FRI),
    )
    assert events(conn, run)[-3:] == ["RUN_FAILED", "ORDER_CANCELED", "RUN_ERROR"]
    told = one(conn, "SELECT payload FROM event_ledger WHERE event_type = 'RUN_FAILED'")
    assert told == {"error": "the disk is gone"}
    # A run's own time: the wall clock is in engine_status.
    assert rows(conn, "SELECT DISTINCT logical_time FROM event_ledger") == [close_on(MON)]
    with pytest.raises(RunNotRunning):
        fail_run(conn, run.user_id, run.run_id, "again", close_on(FRI))
    assert one(conn, "SELECT last_error FROM engine_status") == "the disk is gone"


def test_a_run_without_a_status_row_can_fail_too(conn: Connection) -> None:
    run = a_run(conn, start=False)
    conn.execute("UPDATE strategy_run SET status = 'RUNNING'")
    fail_run(conn, run.user_id, run.run_id, "x", close_on(MON))
    assert one(conn, "SELECT last_error FROM engine_status") == "x"


@pytest.mark.parametrize("status", ["CREATED", "STOPPED", "ERROR"])
def test_only_a_run_that_does_not_run_is_deleted(conn: Connection, status: str) -> None:
    run = a_run(conn)
    with pytest.raises(BadInput, match="is RUNNING; stop it before it is deleted"):
        delete_run(conn, run.user_id, run.run_id)
    other = a_run(conn, user="ben", start=False)
    if status != "CREATED":
        start_run(conn, other.user_id, other.run_id)
        conn.execute(
            "UPDATE strategy_run SET status = %s WHERE run_id = %s", [status, other.run_id]
        )
    delete_run(conn, other.user_id, other.run_id)
    assert rows(conn, "SELECT run_id FROM strategy_run") == [run.run_id]


def test_a_run_that_is_stopping_is_not_deleted(conn: Connection) -> None:
    run = a_run(conn)
    set_status(conn, run.user_id, run.run_id, "STOPPING")
    with pytest.raises(BadInput, match="is STOPPING"):
        delete_run(conn, run.user_id, run.run_id)
    assert stop_run(conn, run.user_id, run.run_id).status == "STOPPED"


def test_the_engine_may_not_delete_a_run(conn: Connection) -> None:
    run = a_run(conn)
    stop_run(conn, run.user_id, run.run_id)
    with conn.transaction(force_rollback=True):
        conn.execute(f"SET LOCAL ROLE {ENGINE_ROLE}")
        with pytest.raises(ConfigurationError, match="connect as a role that may do this"):
            delete_run(conn, run.user_id, run.run_id)
    assert fresh(conn, run).status == "STOPPED"


# Stopped


def test_the_strategy_is_told_before_its_run_is_stopped(conn: Connection, hooks: Hooks) -> None:
    run = a_run(conn, strategy=SCRIPTED)
    run_tick(conn, run.user_id, run.run_id, close_on(MON), at_price("9"), intents=[buy("2")])
    seen: list[Context] = []
    hooks["on_stop"] = lambda context: seen.append(context)
    stop_run(conn, run.user_id, run.run_id)
    (context,) = seen
    assert context.logical_time == close_on(MON)
    assert context.positions["AAPL"].quantity == 2
    assert context.equity == 10_000
    assert context.prices == {}


@pytest.mark.parametrize("ticked", [True, False])
def test_what_a_strategy_raises_when_it_is_told_stops_nothing(
    conn: Connection, hooks: Hooks, ticked: bool
) -> None:
    run = a_run(conn, strategy=SCRIPTED)
    if ticked:
        run_tick(conn, run.user_id, run.run_id, close_on(MON), at_price("9"))

    def fail(context: Context) -> None:
        raise ZeroDivisionError("no luck")

    hooks["on_stop"] = fail
    assert stop_run(conn, run.user_id, run.run_id).status == "STOPPED"
    assert events(conn, run)[-2:] == ["STRATEGY_FAILED_TO_STOP", "RUN_STOPPED"]
    told = one(
        conn, "SELECT payload FROM event_ledger WHERE event_type = 'STRATEGY_FAILED_TO_STOP'"
    )
    assert told == {"error": "ZeroDivisionError('no luck')"}


def test_a_strategy_that_can_not_be_found_any_more_stops_nothing(conn: Connection) -> None:
    run = a_run(conn)
    conn.execute("UPDATE strategy_run SET strategy = 'gone:Away'")
    assert stop_run(conn, run.user_id, run.run_id).status == "STOPPED"
    assert events(conn, run) == ["STRATEGY_FAILED_TO_STOP", "RUN_STOPPED"]


def test_a_run_whose_ledger_is_ahead_of_its_last_tick_is_stopped(
    conn: Connection, hooks: Hooks
) -> None:
    """Orders were placed after the tick; what the strategy raises is noted after them."""
    run = a_run(conn, strategy=SCRIPTED)
    key = run.user_id, run.run_id
    run_tick(conn, *key, close_on(MON), at_price("9"))
    place_orders(conn, *key, close_on(TUE), {}, [buy("1", time_in_force="GTC")])

    def fail(context: Context) -> None:
        raise ZeroDivisionError(context.logical_time.isoformat())

    hooks["on_stop"] = fail
    stop_run(conn, *key)
    assert statuses(conn, run) == ["CANCELED"]
    times = rows(conn, "SELECT logical_time FROM event_ledger ORDER BY seq")
    assert times == sorted(times)
    told = rows(conn, "SELECT payload ->> 'error' FROM event_ledger WHERE payload ? 'error'")
    assert close_on(TUE).isoformat() in told[0]


def test_a_stop_survives_a_fault_of_the_database_in_what_the_strategy_is_told(
    conn: Connection, hooks: Hooks, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = a_run(conn, strategy=SCRIPTED)
    monkeypatch.setattr("engine.stop.look", lambda *_: conn.execute("SELECT * FROM no_such_table"))
    assert stop_run(conn, run.user_id, run.run_id).status == "STOPPED"
    assert events(conn, run) == ["STRATEGY_FAILED_TO_STOP", "RUN_STOPPED"]


def test_a_run_is_stopped_once(conn: Connection) -> None:
    run = a_run(conn)
    stop_run(conn, run.user_id, run.run_id)
    before = snapshot(conn)
    with pytest.raises(RunNotRunning, match="is STOPPED"):
        stop_run(conn, run.user_id, run.run_id)
    assert snapshot(conn) == before


def test_a_run_that_failed_can_not_be_stopped(conn: Connection) -> None:
    run = a_run(conn)
    fail_run(conn, run.user_id, run.run_id, "a fault", close_on(MON))
    with pytest.raises(IllegalRunMove, match="from ERROR to STOPPED"):
        stop_run(conn, run.user_id, run.run_id)
    assert fresh(conn, run).status == "ERROR"


def test_a_run_that_never_started_is_given_up(conn: Connection, hooks: Hooks) -> None:
    run = a_run(conn, strategy=SCRIPTED, start=False)
    hooks["on_stop"] = lambda context: pytest.fail("it never ran")
    assert stop_run(conn, run.user_id, run.run_id).status == "STOPPED"
    assert counts(conn, run)["event_ledger"] == 0


def test_an_order_from_psql_is_cancelled_by_a_stop_before_any_tick(conn: Connection) -> None:
    run = a_run(conn)
    conn.execute(
        "INSERT INTO paper_order (user_id, run_id, symbol, side, quantity, logical_time)"
        " VALUES (%s, %s, 'AAPL', 'BUY', 1, %s)",
        [run.user_id, run.run_id, close_on(MON)],
    )
    stop_run(conn, run.user_id, run.run_id)
    assert statuses(conn, run) == ["CANCELED"]
    assert len(order_ids(conn, run)) == 1
