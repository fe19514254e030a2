"""OR and RK: what becomes of an order, whoever places it: a tick, a call or somebody in psql."""

from __future__ import annotations

from collections.abc import Callable
from decimal import Decimal
from typing import Any

import pytest
from market_days import (
    MON,
    TUE,
    WED,
    a_bar,
    a_run,
    at_price,
    audited,
    buy,
    close_on,
    events,
    fresh,
    one,
    rows,
    sell,
    snapshot,
    statuses,
)

from engine.db.connect import Connection
from engine.runs import Run
from engine.strategies.base import PlaceOrder
from engine.tick import place_orders, run_tick

__all__ = ["audited"]

Place = Callable[[Connection, Run, PlaceOrder], None]


def by_tick(conn: Connection, run: Run, order: PlaceOrder) -> None:
    run_tick(conn, run.user_id, run.run_id, close_on(MON), at_price("100"), intents=[order])


def by_call(conn: Connection, run: Run, order: PlaceOrder) -> None:
    place_orders(conn, run.user_id, run.run_id, close_on(MON), at_price("100"), [order])


def by_sql(conn: Connection, run: Run, order: PlaceOrder) -> None:
    """Inserted by somebody in psql while the run stands at its first tick."""
    run_tick(conn, run.user_id, run.run_id, close_on(MON), at_price("100"))
    conn.execute(
        """INSERT INTO paper_order (user_id, run_id, symbol, side, quantity, order_type,
                                    limit_price, reference_price)
           VALUES (%s, %s, %s, %s, %s, %s, %s, 100)""",
        [
            run.user_id,
            run.run_id,
            order.symbol,
            str(order.side),
            order.quantity,
            str(order.order_type),
            order.limit_price,
        ],
    )


EVERYONE = pytest.mark.parametrize("place", [by_tick, by_call, by_sql])


@pytest.mark.scenario("OR-01")
def test_a_market_buy_on_a_tick_is_filled_and_everything_follows(conn: Connection) -> None:
    run = a_run(conn)
    result = run_tick(
        conn, run.user_id, run.run_id, close_on(MON), at_price("100"), intents=[buy("2.5")]
    )
    assert (result.orders, result.executions) == (1, 1)
    assert one(
        conn, "SELECT status, filled_quantity, avg_fill_price FROM paper_order WHERE :run", run
    ) == ("FILLED", Decimal("2.5"), 100)
    assert one(conn, "SELECT side, quantity, price FROM paper_trade WHERE :run", run) == (
        "BUY",
        Decimal("2.5"),
        100,
    )
    assert one(conn, "SELECT symbol, quantity, avg_cost FROM paper_position WHERE :run", run) == (
        "AAPL",
        Decimal("2.5"),
        100,
    )
    assert one(
        conn, "SELECT logical_time, cash, equity FROM paper_equity_curve WHERE :run", run
    ) == (close_on(MON), 9750, 10000)
    assert fresh(conn, run).cash == 9750
    assert events(conn, run) == ["RUN_STARTED", "ORDER_PLACED", "EXECUTION", "TICK"]


@pytest.mark.scenario("OR-01")
def test_a_market_order_from_psql_is_filled_at_the_next_tick(conn: Connection) -> None:
    run = a_run(conn)
    by_sql(conn, run, buy("1"))
    assert statuses(conn, run) == ["NEW"]
    run_tick(conn, run.user_id, run.run_id, close_on(TUE), [a_bar(TUE, "101 103 99 102")])
    assert statuses(conn, run) == ["FILLED"]
    # It rested over night, so it gets the open.
    assert one(conn, "SELECT price FROM paper_trade WHERE :run", run) == 101


def is_rejected(conn: Connection, run: Run, source: str, code: str) -> None:
    """The only order is REJECTED with its reason, and nothing was traded or moved."""
    assert one(
        conn, "SELECT status, reject_source, reject_code FROM paper_order WHERE :run", run
    ) == ("REJECTED", source, code)
    assert rows(conn, "SELECT 1 FROM paper_trade WHERE :run", run) == []
    assert rows(conn, "SELECT 1 FROM paper_position WHERE :run", run) == []
    assert fresh(conn, run).cash == run.cash
    assert one(
        conn,
        """SELECT payload ->> 'reject_code' FROM event_ledger
           WHERE :run AND event_type = 'ORDER_REJECTED'""",
        run,
    ) == code  # fmt: skip


@pytest.mark.scenario("OR-02")
@pytest.mark.scenario("OR-10")
@EVERYONE
def test_an_order_of_nothing_is_rejected(conn: Connection, place: Place) -> None:
    run = a_run(conn)
    place(conn, run, buy("0"))
    is_rejected(conn, run, "VALIDATION", "QUANTITY_NOT_POSITIVE")


@pytest.mark.scenario("OR-03")
@pytest.mark.scenario("OR-11")
@EVERYONE
@pytest.mark.parametrize("order", [buy("-5"), sell("-5")], ids=["buy", "sell"])
def test_an_order_of_less_than_nothing_is_rejected(
    conn: Connection, place: Place, order: PlaceOrder
) -> None:
    run = a_run(conn)
    place(conn, run, order)
    is_rejected(conn, run, "VALIDATION", "QUANTITY_NOT_POSITIVE")


@pytest.mark.scenario("OR-04")
@pytest.mark.scenario("OR-12")
@pytest.mark.scenario("RK-01")
@EVERYONE
@pytest.mark.parametrize("kind", ["MARKET", "LIMIT"])
def test_an_order_that_costs_more_than_the_cash_is_rejected(
    conn: Connection, place: Place, kind: str
) -> None:
    run = a_run(conn, cash="999.99")
    terms: dict[str, Any] = {"order_type": "LIMIT", "limit_price": "100"} if kind == "LIMIT" else {}
    place(conn, run, buy("10", **terms))
    is_rejected(conn, run, "RISK", "INSUFFICIENT_CASH")
    reason = one(conn, "SELECT status_reason FROM paper_order WHERE :run", run)
    assert reason == "INSUFFICIENT_CASH: has 999.99, needs 1000"


@pytest.mark.scenario("OR-04")
@pytest.mark.scenario("RK-01")
def test_an_order_that_costs_exactly_the_cash_is_filled(conn: Connection) -> None:
    run = a_run(conn, cash="1000")
    by_tick(conn, run, buy("10"))
    assert statuses(conn, run) == ["FILLED"]
    assert fresh(conn, run).cash == 0


@pytest.mark.scenario("OR-05")
def test_a_limit_buy_below_the_price_waits_until_the_price_comes(conn: Connection) -> None:
    run = a_run(conn)
    by_tick(conn, run, buy("1", order_type="LIMIT", time_in_force="GTC", limit_price="95"))
    assert statuses(conn, run) == ["PENDING"]
    assert rows(conn, "SELECT 1 FROM paper_trade WHERE :run", run) == []
    run_tick(conn, run.user_id, run.run_id, close_on(TUE), [a_bar(TUE, "100 103 96 102")])
    assert statuses(conn, run) == ["PENDING"]
    assert rows(conn, "SELECT 1 FROM paper_trade WHERE :run", run) == []
    run_tick(conn, run.user_id, run.run_id, close_on(WED), [a_bar(WED, "100 103 94 102")])
    assert statuses(conn, run) == ["FILLED"]
    assert one(conn, "SELECT price, logical_time FROM paper_trade WHERE :run", run) == (
        95,
        close_on(WED),
    )
    assert events(conn, run) == [
        "RUN_STARTED",
        "ORDER_PLACED",
        "ORDER_PENDING",
        "TICK",
        "TICK",
        "EXECUTION",
        "TICK",
    ]


def limit(conn: Connection, run: Run, kind: str, *, everywhere: bool = False, **more: Any) -> None:
    """A limit of the run, or of all the user's runs."""
    given = {"user_id": run.user_id, "run_id": None if everywhere else run.run_id, "kind": kind}
    given |= more
    conn.execute(
        f"INSERT INTO risk_limit ({', '.join(given)}) VALUES ({', '.join(['%s'] * len(given))})",
        [*given.values()],
    )


@pytest.mark.scenario("RK-02")
@EVERYONE
@pytest.mark.parametrize("everywhere", [False, True], ids=["of the run", "of the user"])
@pytest.mark.parametrize("symbol", ["AAPL", None])
def test_an_order_beyond_the_maximum_position_is_rejected(
    conn: Connection, place: Place, everywhere: bool, symbol: str | None
) -> None:
    run = a_run(conn)
    limit(conn, run, "MAX_POSITION", everywhere=everywhere, symbol=symbol, limit_value=10)
    place(conn, run, buy("10.000001"))
    is_rejected(conn, run, "RISK", "MAX_POSITION")
    reason = one(conn, "SELECT status_reason FROM paper_order WHERE :run", run)
    assert reason == "MAX_POSITION: limit 10, would be 10.000001"


@pytest.mark.scenario("RK-02")
def test_the_maximum_position_counts_what_is_held_and_what_is_ordered(conn: Connection) -> None:
    run = a_run(conn)
    limit(conn, run, "MAX_POSITION", symbol="AAPL", limit_value=10)
    resting = buy("4", order_type="LIMIT", limit_price="50", time_in_force="GTC")
    run_tick(
        conn,
        run.user_id,
        run.run_id,
        close_on(MON),
        at_price("100") | at_price("100", "IBM"),
        intents=[buy("4"), resting, buy("2"), buy("0.01"), buy("11", "IBM"), sell("5"), buy("1")],
    )
    # 4 held and 4 ordered leave 2; a sale makes room only once it is filled, and IBM has no limit.
    assert statuses(conn, run) == [
        "FILLED", "PENDING", "FILLED", "REJECTED", "FILLED", "FILLED", "FILLED",
    ]  # fmt: skip


@pytest.mark.scenario("RK-03")
@EVERYONE
@pytest.mark.parametrize("everywhere", [False, True], ids=["of the run", "of the user"])
def test_an_order_of_a_forbidden_symbol_is_rejected(
    conn: Connection, place: Place, everywhere: bool
) -> None:
    run = a_run(conn)
    limit(conn, run, "FORBIDDEN_SYMBOL", everywhere=everywhere, symbol="AAPL")
    place(conn, run, buy("1"))
    is_rejected(conn, run, "RISK", "FORBIDDEN_SYMBOL")


@pytest.mark.scenario("RK-03")
@EVERYONE
def test_an_order_of_a_symbol_that_is_not_allowed_is_rejected(
    conn: Connection, place: Place
) -> None:
    run = a_run(conn)
    limit(conn, run, "ALLOWED_SYMBOL", symbol="IBM")
    limit(conn, run, "ALLOWED_SYMBOL", symbol="MSFT")
    place(conn, run, buy("1"))
    is_rejected(conn, run, "RISK", "SYMBOL_NOT_ALLOWED")


@pytest.mark.scenario("RK-03")
def test_the_limits_of_one_run_bind_no_other(conn: Connection) -> None:
    run, other = a_run(conn), a_run(conn, user="ben")
    for kind in ("FORBIDDEN_SYMBOL", "MAX_POSITION"):
        more = {"symbol": "AAPL"} if kind == "FORBIDDEN_SYMBOL" else {"limit_value": 0}
        limit(conn, other, kind, **more)
    by_tick(conn, run, buy("1"))
    assert statuses(conn, run) == ["FILLED"]


@pytest.mark.scenario("RK-02")
@EVERYONE
@pytest.mark.parametrize(
    ("kind", "value", "passes", "fails"),
    [("MAX_ORDER_QUANTITY", "3", "3", "3.01"), ("MAX_ORDER_NOTIONAL", "300", "3", "3.01")],
)
def test_the_limits_of_one_order_hold_on_each_side(
    conn: Connection, place: Place, kind: str, value: str, passes: str, fails: str
) -> None:
    run = a_run(conn)
    limit(conn, run, kind, limit_value=Decimal(value))
    with conn.transaction(force_rollback=True):
        place(conn, run, buy(passes))
        assert statuses(conn, run) in (["FILLED"], ["NEW"])
    place(conn, run, buy(fails))
    is_rejected(conn, run, "RISK", kind)


@pytest.mark.scenario("RK-01")
def test_resting_buys_hold_their_cash_back(conn: Connection) -> None:
    run = a_run(conn, cash="1000")
    resting = buy("8", order_type="LIMIT", limit_price="90", time_in_force="GTC")
    run_tick(
        conn,
        run.user_id,
        run.run_id,
        close_on(MON),
        at_price("100"),
        intents=[resting, buy("2.81"), buy("2.8")],
    )
    assert statuses(conn, run) == ["PENDING", "REJECTED", "FILLED"]
    reasons = rows(conn, "SELECT status_reason FROM orders WHERE status = 'REJECTED'")
    assert reasons == ["INSUFFICIENT_CASH: has 280, needs 281"]


@pytest.mark.scenario("OR-04")
def test_a_rejected_order_leaves_the_rest_of_its_tick_alone(conn: Connection) -> None:
    run = a_run(conn)
    before = snapshot(conn)["position"]
    by_tick(conn, run, sell("1"))
    is_rejected(conn, run, "RISK", "INSUFFICIENT_POSITION")
    assert snapshot(conn)["position"] == before
    assert one(conn, "SELECT equity FROM paper_equity_curve WHERE :run", run) == 10000
