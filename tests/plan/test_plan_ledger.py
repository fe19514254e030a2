"""LG and MU: the books add up to the last digit, and no run sees another's."""

from __future__ import annotations

from decimal import Decimal
from uuid import UUID

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
    buy,
    close_on,
    counts,
    events,
    fresh,
    one,
    rows,
    run_tables,
    sell,
    snapshot,
)

from engine.db.connect import Connection
from engine.orders.model import Side
from engine.runs import Run, Terms, create_run, start_run
from engine.stop import stop_run
from engine.tick import log_mtm, place_orders, run_tick, try_execute_sip

__all__ = ["audited"]

COSTS = {
    "slippage": {"model": "BPS", "bps": "7.3"},
    "commission": {"model": "PERCENT", "percent": "0.137", "minimum": "0.01"},
}
# Prices and quantities whose products have all the decimals that the books can hold.
WEEK = [
    (MON, "16.12345679", [buy("1.234567"), buy("3.3")]),
    (TUE, "17.00000001", [sell("2.000001"), buy("0.000001")]),
    (WED, "15.98765432", [buy("7.654321"), sell("10.188887")]),
    (THU, "18.33333333", [buy("5.555555")]),
    (FRI, "12.10000009", [sell("1.111111"), sell("100")]),
]


def a_week(conn: Connection, run: Run) -> None:
    for day, price, orders in WEEK:
        run_tick(conn, run.user_id, run.run_id, close_on(day), at_price(price), intents=orders)


@pytest.mark.scenario("LG-01")
def test_orders_trades_and_positions_follow_from_each_other(conn: Connection) -> None:
    run = a_run(conn, paper=COSTS)
    a_week(conn, run)
    trades = rows(
        conn,
        """SELECT order_id, symbol, side, quantity, price, commission
           FROM paper_trade WHERE :run ORDER BY logical_time, execution_id""",
        run,
    )
    orders = rows(
        conn,
        """SELECT order_id, symbol, side, quantity, filled_quantity, avg_fill_price, status
           FROM paper_order WHERE :run""",
        run,
    )
    assert len(trades) >= 8
    # Each order and its trades: the sums, recomputed here.
    for order_id, symbol, side, quantity, filled, average, status in orders:
        own = [t for t in trades if t[0] == order_id]
        assert filled == sum(t[3] for t in own)
        assert all((t[1], t[2]) == (symbol, side) for t in own)
        if status == "FILLED":
            assert filled == quantity
            assert average == round(sum(t[3] * t[4] for t in own) / filled, 10)
        else:
            assert (status, own, average) == ("REJECTED", [], None)
    # The position and the cash: the sums of all trades.
    held = sum((t[3] if t[2] == Side.BUY else -t[3] for t in trades), Decimal(0))
    assert one(conn, "SELECT quantity FROM paper_position WHERE :run", run) == held > 0
    paid = sum(
        ((t[3] * t[4] if t[2] == Side.BUY else -t[3] * t[4]) + t[5] for t in trades), Decimal(0)
    )
    assert fresh(conn, run).cash == run.initial_cash - paid


@pytest.mark.scenario("LG-01")
@pytest.mark.parametrize(
    ("insert", "constraint"),
    [
        (
            "INSERT INTO paper_trade (user_id, run_id, order_id, quantity, price)"
            " VALUES (%s, %s, gen_random_uuid(), 1, 1)",
            "execution_belongs_to_order",
        ),
        (
            "INSERT INTO paper_order (user_id, run_id, symbol, side, quantity)"
            " VALUES (%s, gen_random_uuid(), 'AAPL', 'BUY', %s::text::numeric)",
            "orders_belongs_to_run",
        ),
        (
            "INSERT INTO paper_position (user_id, run_id, symbol, quantity, mark_price, marked_at)"
            " VALUES (%s, %s, 'AAPL', 1, 1, now())",
            "position_from_executions",
        ),
    ],
)
def test_no_link_of_the_chain_stands_alone(conn: Connection, insert: str, constraint: str) -> None:
    run = a_run(conn)
    before = snapshot(conn)
    other: UUID | str = "1" if "numeric" in insert else run.run_id
    with pytest.raises(psycopg.IntegrityError) as caught, conn.transaction():
        conn.execute(insert, [run.user_id, other])
    assert caught.value.diag.constraint_name == constraint
    assert snapshot(conn) == before


@pytest.mark.scenario("LG-02")
def test_equity_is_cash_and_market_value_to_the_last_digit(conn: Connection) -> None:
    run = a_run(conn, paper=COSTS)
    a_week(conn, run)
    marks = rows(
        conn,
        """SELECT logical_time, cash, market_value, equity FROM mtm_ledger
           WHERE :run ORDER BY logical_time""",
        run,
    )
    assert [mark[0] for mark in marks] == [close_on(day) for day, *_ in WEEK]
    held = Decimal(0)
    cash = run.initial_cash
    for (day, price, _), (_, said_cash, value, equity) in zip(WEEK, marks, strict=True):
        for side, quantity, at, commission in conn.execute(
            "SELECT side, quantity, price, commission FROM execution WHERE logical_time = %s",
            [close_on(day)],
        ):
            sign = 1 if side == "BUY" else -1
            held += sign * quantity
            cash -= sign * quantity * at + commission
        # Decimal compares exactly: no tolerance.
        assert said_cash == cash
        assert value == held * Decimal(price)
        assert equity == cash + held * Decimal(price)
    # Some of them need more digits than a float has.
    assert any(len(mark[3].normalize().as_tuple().digits) > 17 for mark in marks)


@pytest.mark.scenario("LG-02")
def test_what_a_tick_tells_is_what_it_stored_to_the_last_digit(conn: Connection) -> None:
    run = a_run(conn, paper=COSTS)
    for day, price, orders in WEEK:
        key = run.user_id, run.run_id, close_on(day), at_price(price)
        told = [run_tick(conn, *key, intents=orders) for _ in range(2)]
        stored = one(
            conn,
            "SELECT cash, market_value, equity FROM mtm_ledger"
            f" WHERE :run AND logical_time = '{close_on(day).isoformat()}'",
            run,
        )
        for result in told:
            assert (result.cash, result.market_value, result.equity) == stored


@pytest.mark.scenario("LG-02")
@pytest.mark.parametrize("table", ["mtm_ledger", "paper_equity_curve"])
@pytest.mark.parametrize("columns", ["cash", "market_value"])
def test_a_mark_that_the_books_do_not_make_is_refused(
    conn: Connection, table: str, columns: str
) -> None:
    run = a_run(conn)
    place_orders(conn, run.user_id, run.run_id, close_on(MON), at_price("100"), [buy("1")])
    right = {"cash": 9_900, "market_value": 100}
    before = snapshot(conn)
    with pytest.raises(psycopg.IntegrityError) as caught, conn.transaction():
        conn.execute(
            f"INSERT INTO {table} (user_id, run_id, logical_time, {columns})"
            " VALUES (%s, %s, %s, %s + 0.00000001)",
            [run.user_id, run.run_id, close_on(MON), right[columns]],
        )
    assert caught.value.diag.constraint_name == "mtm_ledger_equals_books"
    assert snapshot(conn) == before
    conn.execute(
        f"INSERT INTO {table} (user_id, run_id, logical_time, {columns}) VALUES (%s, %s, %s, %s)",
        [run.user_id, run.run_id, close_on(MON), right[columns]],
    )


@pytest.mark.scenario("LG-02")
def test_equity_can_not_be_written(conn: Connection) -> None:
    run = a_run(conn)
    with pytest.raises(psycopg.errors.GeneratedAlways), conn.transaction():
        conn.execute(
            "INSERT INTO mtm_ledger (user_id, run_id, logical_time, equity) VALUES (%s, %s, %s, 1)",
            [run.user_id, run.run_id, close_on(MON)],
        )
    assert rows(conn, "SELECT 1 FROM mtm_ledger") == []


def rows_of(conn: Connection, run: Run) -> dict[str, list[str]]:
    """All that a run has, table by table, as text."""
    return {
        table: sorted(rows(conn, f"SELECT t::text FROM {table} t WHERE :run", run))
        for table in run_tables(conn)
    }


@pytest.mark.scenario("MU-01")
def test_two_users_run_side_by_side_without_touching_each_other(conn: Connection) -> None:
    ann, ben = a_run(conn, cash="1000"), a_run(conn, user="ben", cash="5000")
    a_plan(conn, ann, amount=Decimal(300))
    a_plan(conn, ben, symbol="IBM")
    both = at_price("100") | at_price("50", "IBM")
    run_tick(conn, ann.user_id, ann.run_id, close_on(MON), both)
    before = rows_of(conn, ann)
    run_tick(conn, ben.user_id, ben.run_id, close_on(MON), both)
    place_orders(conn, ben.user_id, ben.run_id, close_on(TUE), both, [buy("1")])
    try_execute_sip(conn, ben.user_id, ben.run_id, close_on(TUE), both)
    log_mtm(conn, ben.user_id, ben.run_id, close_on(TUE), both)
    stop_run(conn, ben.user_id, ben.run_id)
    assert rows_of(conn, ann) == before
    assert fresh(conn, ann).status == "RUNNING"
    assert [fresh(conn, run).cash for run in (ann, ben)] == [Decimal(700), Decimal(4400)]
    assert rows(conn, "SELECT symbol FROM paper_position WHERE :run", ann) == ["AAPL"]
    assert sorted(rows(conn, "SELECT symbol FROM paper_position WHERE :run", ben)) == [
        "AAPL",
        "IBM",
    ]
    for run in (ann, ben):
        for table in run_tables(conn):
            column = f"SELECT DISTINCT user_id FROM {table} WHERE run_id = '{run.run_id}'"
            assert rows(conn, column) in ([run.user_id], []), table


@pytest.mark.scenario("MU-01")
def test_one_user_can_not_use_the_run_of_another(conn: Connection) -> None:
    ann, ben = a_run(conn), a_run(conn, user="ben")
    before = snapshot(conn)
    with pytest.raises(Exception, match="has no run"):
        run_tick(conn, ann.user_id, ben.run_id, close_on(MON), at_price("100"))
    assert snapshot(conn) == before


@pytest.mark.scenario("MU-02")
def test_two_runs_of_one_user_in_turn_keep_their_own_books(conn: Connection) -> None:
    first = a_run(conn)
    run_tick(conn, first.user_id, first.run_id, close_on(TUE), at_price("100"), intents=[buy("2")])
    stop_run(conn, first.user_id, first.run_id)
    before = rows_of(conn, first)
    second = create_run(conn, first.user_id, Terms(initial_cash=Decimal(500)))
    start_run(conn, second.user_id, second.run_id)
    # Its time is its own: it may begin before the first one ended.
    run_tick(
        conn, second.user_id, second.run_id, close_on(MON), at_price("100"), intents=[buy("1")]
    )
    assert rows_of(conn, first) == before
    assert counts(conn, first)["orders"] == counts(conn, second)["orders"] == 1
    assert [fresh(conn, run).cash for run in (first, second)] == [Decimal(9_800), Decimal(400)]
    assert events(conn, second) == ["RUN_STARTED", "ORDER_PLACED", "EXECUTION", "TICK"]
    assert rows(conn, "SELECT seq FROM event_ledger WHERE :run ORDER BY 1", second) == [1, 2, 3, 4]
    with pytest.raises(psycopg.IntegrityError), conn.transaction():
        conn.execute(
            "UPDATE orders SET run_id = %s WHERE run_id = %s", [second.run_id, first.run_id]
        )
    with pytest.raises(psycopg.IntegrityError), conn.transaction():
        conn.execute(
            "UPDATE orders SET run_id = %s WHERE run_id = %s", [first.run_id, second.run_id]
        )
