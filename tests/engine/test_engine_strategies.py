"""Strategies: when their hooks are called, what they may see and ask for, and how they fail."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import FrozenInstanceError
from datetime import date, datetime
from decimal import Decimal
from typing import Any

import pytest
from market_days import (
    FRI,
    MON,
    TUE,
    WED,
    a_bar,
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
    order_ids,
    rows,
    sell,
    snapshot,
    statuses,
)
from scripted import FORGETFUL, SCRIPTED, Hooks, Scripted, Unmakeable, hooks

from engine import work as work_module
from engine.db.connect import Connection
from engine.errors import BadInput, StrategyFailed, TimeMovesForward
from engine.orders.model import OrderType, Side, TimeInForce
from engine.replay import replay
from engine.runs import Run, Terms, add_user, create_run
from engine.stop import stop_run
from engine.strategies.base import (
    Announce,
    CancelOrder,
    Context,
    Holding,
    Intent,
    PlaceOrder,
    Remember,
    Strategy,
)
from engine.strategies.registry import find, make
from engine.tick import FILL_ROUNDS_MAX, TickResult, place_orders, run_tick, try_execute_sip

__all__ = ["audited", "hooks"]


def tick(conn: Connection, run: Run, day: str = MON, price: str = "100") -> TickResult:
    return run_tick(conn, run.user_id, run.run_id, close_on(day), [a_bar(day, price)])


# When hooks are called


def test_hooks_are_called_in_their_order_with_the_books_as_they_are(
    conn: Connection, hooks: Hooks
) -> None:
    run = a_run(conn, strategy=SCRIPTED)
    calls: list[str] = []
    resting = buy("1", order_type="LIMIT", limit_price="95", time_in_force="GTC")

    def note(name: str, intents: list[Intent]) -> Callable[..., list[Intent]]:
        def hook(context: Context, *what: Any) -> list[Intent]:
            about = "".join(f" {item.symbol}" for item in what)
            calls.append(f"{name}{about}, holds {sorted(context.positions)}")
            return intents

        return hook

    hooks["on_start"] = note("on_start", [resting])
    hooks["on_bar"] = note("on_bar", [])
    hooks["on_tick"] = note("on_tick", [])
    hooks["on_fill"] = note("on_fill", [])
    bars = [a_bar(MON, "100", "IBM"), a_bar(MON, "100", "AAPL")]
    run_tick(conn, run.user_id, run.run_id, close_on(MON), bars)
    assert calls == [
        "on_start, holds []",
        "on_bar AAPL, holds []",
        "on_bar IBM, holds []",
        "on_tick, holds []",
    ]
    calls.clear()
    hooks["on_tick"] = note("on_tick", [buy("2", "IBM")])
    bars = [a_bar(TUE, "95", "IBM"), a_bar(TUE, "95", "AAPL")]
    run_tick(conn, run.user_id, run.run_id, close_on(TUE), bars)
    assert calls == [
        "on_fill AAPL, holds ['AAPL']",
        "on_bar AAPL, holds ['AAPL']",
        "on_bar IBM, holds ['AAPL']",
        "on_tick, holds ['AAPL']",
        "on_fill IBM, holds ['AAPL', 'IBM']",
    ]
    calls.clear()
    hooks["on_stop"] = note("on_stop", [buy("100")])
    stop_run(conn, run.user_id, run.run_id)
    assert calls == ["on_stop, holds ['AAPL', 'IBM']"]
    assert counts(conn, run)["orders"] == 2


def test_the_context_tells_what_the_run_knows(conn: Connection, hooks: Hooks) -> None:
    run = a_run(conn, strategy=SCRIPTED, cash="1000")
    seen: list[Context] = []
    hooks["on_tick"] = lambda context: seen.append(context)
    rest = buy("2", order_type="LIMIT", limit_price="50", time_in_force="GTC")
    key = run.user_id, run.run_id
    run_tick(conn, *key, close_on(MON), at_price("100"), intents=[buy("3"), rest])
    now = close_on(WED)
    bar = a_bar(TUE, "101 120 80 110")
    run_tick(conn, *key, close_on(TUE), [bar, a_bar(TUE, "7", "IBM")], now=now)
    context = seen[1]
    assert (context.user_id, context.run_id) == key
    assert (context.logical_time, context.now) == (close_on(TUE), now)
    assert context.session is not None
    assert (context.session.day, context.market_open) == (date.fromisoformat(TUE), True)
    assert context.bars["AAPL"] == bar
    assert context.prices == {"AAPL": 110, "IBM": 7}
    assert context.quantity_decimals == {"AAPL": 6, "IBM": 6}
    assert [context.cash, context.available_cash] == [Decimal(700), Decimal(600)]
    assert context.equity == 700 + 3 * 110
    (holding,) = context.positions.values()
    assert holding == Holding("AAPL", Decimal(3), Decimal(100), Decimal(100))
    (order,) = context.open_orders
    assert order.order_type is OrderType.LIMIT
    assert [order.limit_price, order.remaining] == [Decimal(50), Decimal(2)]
    assert context.sips_due == ()
    # A position without a price at this tick counts at its last mark.
    run_tick(conn, *key, close_on(WED), at_price("7", "IBM"))
    assert seen[2].equity == 700 + 3 * 110


def test_the_context_is_read_only(conn: Connection, hooks: Hooks) -> None:
    run = a_run(conn, strategy=SCRIPTED)
    seen: list[Context] = []
    hooks["on_tick"] = lambda context: seen.append(context)
    tick(conn, run)
    context = seen[0]
    for name in ("bars", "prices", "quantity_decimals", "positions", "state"):
        with pytest.raises(TypeError):
            getattr(context, name)["AAPL"] = None
    with pytest.raises(FrozenInstanceError):
        context.cash = Decimal(1)  # type: ignore[misc]


@pytest.mark.parametrize("batch", [1, 10])
def test_a_strategy_that_changes_the_state_it_was_shown_changes_nothing(
    conn: Connection, hooks: Hooks, batch: int
) -> None:
    run = a_run(conn, strategy=SCRIPTED)
    seen: list[Any] = []

    def scribble(context: Context) -> list[Intent]:
        seen.append(dict(context.state))
        if not context.state:
            return [Remember({"list": [1]})]
        context.state["list"].append(2)
        return []

    hooks["on_tick"] = scribble
    feed = [(close_on(day), [a_bar(day, "100")]) for day in (MON, TUE, WED)]
    replay(conn, run.user_id, run.run_id, feed, batch=batch)
    assert seen[0] == {}
    assert one(conn, "SELECT state FROM engine_state WHERE :run", run) == {"list": [1]}


# What strategies may ask for


def exact(prices: dict[str, str]) -> dict[str, Any]:
    return {name: Decimal(price) for name, price in prices.items()}


def test_remembered_state_comes_back_as_the_database_keeps_it(
    conn: Connection, hooks: Hooks
) -> None:
    run = a_run(conn, strategy=SCRIPTED)
    seen: list[Any] = []
    seven: Any = {7: "seven"}

    def count(context: Context) -> list[Intent]:
        seen.append(dict(context.state))
        return [Remember({"n": context.state.get("n", 0) + 1, "pair": (1, 2)} | seven)]

    hooks["on_tick"] = count
    feed = [(close_on(day), [a_bar(day, "100")]) for day in (MON, TUE, WED)]
    replay(conn, run.user_id, run.run_id, feed)
    # In one batch as from one process to the next: keys are text, tuples are lists.
    assert seen == [
        {},
        {"n": 1, "pair": [1, 2], "7": "seven"},
        {"n": 2, "pair": [1, 2], "7": "seven"},
    ]
    assert one(conn, "SELECT state FROM engine_state WHERE :run", run)["n"] == 3


def test_an_announced_event_is_in_the_ledger(conn: Connection, hooks: Hooks) -> None:
    run = a_run(conn, strategy=SCRIPTED)
    hooks["on_tick"] = lambda context: [Announce("SIGNAL", "AAPL", {"level": "7.50"})]
    tick(conn, run)
    tick(conn, run, TUE)
    found = rows(
        conn,
        "SELECT subject, payload FROM event_ledger WHERE :run AND event_type = 'SIGNAL'",
        run,
    )
    assert found == [("AAPL", {"level": "7.50"})] * 2


def test_a_strategy_cancels_an_order(conn: Connection, hooks: Hooks) -> None:
    run = a_run(conn, strategy=SCRIPTED, cash="100")
    hooks["on_start"] = lambda context: [
        buy("1", order_type="LIMIT", limit_price="90", time_in_force="GTC")
    ]
    tick(conn, run)

    def swap(context: Context) -> list[Intent]:
        """Cancel what rests, then buy with the cash that it held back."""
        return [*(CancelOrder(order.order_id) for order in context.open_orders), buy("1")]

    hooks["on_tick"] = swap
    tick(conn, run, TUE)
    assert statuses(conn, run) == ["CANCELED", "FILLED"]
    assert rows(conn, "SELECT status_reason FROM orders WHERE status = 'CANCELED'") == ["STRATEGY"]


def test_orders_are_carried_out_in_the_order_asked_for_sells_pay_for_buys(
    conn: Connection, hooks: Hooks
) -> None:
    run = a_run(conn, strategy=SCRIPTED, cash="100")
    asked: list[list[Intent]] = [
        [buy("1")],
        [sell("1"), buy("2", "IBM")],
        [buy("1"), sell("2", "IBM")],
    ]
    hooks["on_tick"] = lambda context: asked.pop(0)
    for day in (MON, TUE, WED):
        both = at_price("100") | at_price("50", "IBM")
        run_tick(conn, run.user_id, run.run_id, close_on(day), both)
    # On the third day the buy comes first, and there is no cash for it.
    assert statuses(conn, run) == ["FILLED", "FILLED", "FILLED", "REJECTED", "FILLED"]
    assert len(order_ids(conn, run)) == len(set(order_ids(conn, run)))


def test_words_are_taken_in_any_case_and_with_their_aliases(conn: Connection, hooks: Hooks) -> None:
    run = a_run(conn, strategy=SCRIPTED)
    words = [
        ("mkt", "day", {}),
        ("lmt", "gtc", {"limit_price": "1"}),
        ("Stp", "Gtc", {"stop_price": "999"}),
        ("stp_lmt", "gtc", {"stop_price": "999", "limit_price": "999"}),
        ("moc", "day", {}),
        ("loc", "day", {"limit_price": "1"}),
        ("trail", "gtc", {"trail_amount": "1"}),
    ]
    hooks["on_tick"] = lambda context: [
        PlaceOrder(
            " aapl",
            "buy",  # type: ignore[arg-type]
            Decimal("0.1"),
            kind,  # type: ignore[arg-type]
            in_force,  # type: ignore[arg-type]
            **exact(more),
        )
        for kind, in_force, more in words
    ]
    tick(conn, run)
    found = rows(
        conn, "SELECT symbol, order_type, time_in_force, status FROM orders ORDER BY order_id"
    )
    assert found == [
        ("AAPL", "MARKET", "DAY", "FILLED"),
        # A limit is a limit, under whatever name: it doesn't fill at 100.
        ("AAPL", "LIMIT", "GTC", "PENDING"),
        ("AAPL", "STOP", "GTC", "PENDING"),
        ("AAPL", "STOP_LIMIT", "GTC", "PENDING"),
        ("AAPL", "MARKET", "CLS", "FILLED"),
        ("AAPL", "LIMIT", "CLS", "EXPIRED"),
        ("AAPL", "TRAIL", "GTC", "PENDING"),
    ]


@pytest.mark.parametrize(
    ("terms", "message"),
    [
        ({"side": "HOLD"}, "'HOLD' is none of BUY, SELL"),
        ({"side": None}, "None is none of BUY, SELL"),
        ({"order_type": "MAGIC"}, "'MAGIC' is none of MARKET, LIMIT, STOP, STOP_LIMIT, TRAIL"),
        ({"time_in_force": "SOON"}, "'SOON' is none of DAY, GTC, IOC, FOK, GTD, OPG, CLS"),
        ({"quantity": 1.5}, "quantity 1.5 is no Decimal"),
        ({"quantity": True}, "quantity True is no Decimal"),
        ({"quantity": "1"}, "quantity '1' is no Decimal"),
        ({"quantity": Decimal("NaN")}, "quantity NaN is no number below 10^15"),
        ({"quantity": Decimal("-Infinity")}, "quantity -Infinity is no number below 10^15"),
        ({"quantity": Decimal("1e15")}, "quantity 1E+15 is no number below 10^15"),
        ({"quantity": Decimal("0.123456789")}, "quantity 0.123456789 has more than 8 decimals"),
        ({"limit_price": 5.0}, "limit_price 5.0 is no Decimal"),
        ({"stop_price": Decimal("sNaN")}, "stop_price sNaN is no number below 10^15"),
        ({"trail_amount": Decimal("1e-9")}, "trail_amount 1E-9 has more than 8 decimals"),
        ({"trail_percent": Decimal("Infinity")}, "trail_percent Infinity is no number"),
        ({"expire_at": datetime(2001, 5, 8)}, "expire_at 2001-05-08T00:00:00 has no time zone"),  # noqa: DTZ001
    ],
)
def test_an_order_that_can_not_be_is_not_made(terms: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"symbol": "AAPL", "side": Side.BUY, "quantity": Decimal(1)} | terms
    with pytest.raises(ValueError, match=re.escape(message)):
        PlaceOrder(**given)


def test_numbers_of_an_order_are_exact() -> None:
    order = PlaceOrder("AAPL", Side.BUY, 5, limit_price=Decimal("0.12345678"))  # type: ignore[arg-type]
    assert str(order.quantity) == "5"
    assert isinstance(order.quantity, Decimal)
    assert order.limit_price == Decimal("0.12345678")
    assert PlaceOrder("AAPL", Side.BUY, Decimal("1.5000000000")).quantity == Decimal("1.5")
    assert (order.order_type, order.time_in_force) == (OrderType.MARKET, TimeInForce.DAY)


@pytest.mark.parametrize(
    "value",
    [
        {"price": Decimal("1.5")},
        {"nan": float("nan")},
        {"set": {1}},
        {"text": "a\0b"},
        {"text": "\ud800"},
        {("a", "b"): 1},
        [1, 2],
    ],
    ids=lambda value: str(value)[:20].encode("ascii", "replace").decode().replace("\0", ""),
)
def test_what_is_no_json_can_neither_be_remembered_nor_announced(value: Any) -> None:
    with pytest.raises(ValueError, match="the state to remember is no JSON"):
        Remember(value)
    with pytest.raises(ValueError, match="the payload of X is no JSON"):
        Announce("X", "", value)


def test_a_backslash_before_u0000_is_no_nul(conn: Connection, hooks: Hooks) -> None:
    run = a_run(conn, strategy=SCRIPTED)
    hooks["on_tick"] = lambda context: [Remember({"text": "\\u0000"})]
    tick(conn, run)
    assert one(conn, "SELECT state FROM engine_state", None) == {"text": "\\u0000"}


# How strategies fail


def raising(*_: Any) -> None:
    raise ZeroDivisionError("no luck")


def failed(conn: Connection, run: Run, before: dict[str, Any], message: str) -> None:
    """The run is in ERROR with the message in both places, and nothing of the tick is there."""
    assert fresh(conn, run).status == "ERROR"
    error, at = one(conn, "SELECT last_error, error_at FROM engine_status WHERE :run", run)
    assert message in error
    assert at is not None
    told = one(
        conn,
        "SELECT payload ->> 'error' FROM event_ledger WHERE :run AND event_type = 'RUN_FAILED'",
        run,
    )
    assert told == error
    assert events(conn, run)[-1] == "RUN_ERROR"
    after = snapshot(conn)
    for table in ("execution", "position", "mtm_ledger", "engine_state", "split_applied"):
        assert after[table] == before[table], table
    assert "FILLED" not in statuses(conn, run)


@pytest.mark.parametrize("hook", ["on_start", "on_tick", "on_bar", "on_fill"])
def test_a_strategy_that_raises_ends_its_run_in_error(
    conn: Connection, hooks: Hooks, hook: str
) -> None:
    run = a_run(conn, strategy=SCRIPTED)
    before = snapshot(conn)
    hooks["on_tick"] = lambda context: [buy("1")]
    hooks[hook] = raising
    with pytest.raises(StrategyFailed) as caught:
        tick(conn, run)
    message = (
        f"strategy scripted:Scripted failed in {hook} at 2001-05-07T20:00:00+00:00: "
        "ZeroDivisionError('no luck')"
    )
    assert str(caught.value) == message
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    failed(conn, run, before, message)


def test_a_strategy_that_raises_while_it_answers_ends_its_run_in_error(
    conn: Connection, hooks: Hooks
) -> None:
    run = a_run(conn, strategy=SCRIPTED)
    before = snapshot(conn)

    def halfway(context: Context) -> Any:
        yield buy("1")
        raise KeyError("AAPL")

    hooks["on_tick"] = halfway
    with pytest.raises(StrategyFailed, match="on_tick"):
        tick(conn, run)
    failed(conn, run, before, "KeyError('AAPL')")


def test_a_resting_order_that_filled_is_unfilled_when_its_on_fill_raises(
    conn: Connection, hooks: Hooks
) -> None:
    run = a_run(conn, strategy=SCRIPTED)
    hooks["on_start"] = lambda context: [
        buy("1", order_type="LIMIT", limit_price="90", time_in_force="GTC")
    ]
    tick(conn, run)
    before = snapshot(conn)
    hooks["on_fill"] = raising
    with pytest.raises(StrategyFailed):
        tick(conn, run, TUE, "80")
    failed(conn, run, before, "on_fill")
    assert statuses(conn, run) == ["CANCELED"]


ASKED_FOR_TOO_MUCH: dict[str, tuple[Callable[[Context], Any], str]] = {
    "unknown order": (
        lambda c: [CancelOrder(c.run_id)],
        "there is no order",
    ),
    "unknown symbol": (lambda c: [buy("1", "NOPE")], "unknown symbol NOPE"),
    "reserved event": (lambda c: [Announce("TICK")], "TICK is an event that only the engine"),
    "reserved group": (lambda c: [Announce("ORDER_LOST")], "only the engine writes"),
    "bad event name": (lambda c: [Announce("no good")], "event_ledger_event_type_format"),
    "event twice": (lambda c: [Announce("X"), Announce("X")], "already has a X"),
    "order id twice": (
        lambda c: [buy("1", client_order_id="a"), buy("1", client_order_id="a")],
        "orders_client_order_id_once",
    ),
    "no intent": (lambda c: ["buy low"], "'buy low' is no intent"),
    "no list": (lambda c: 7, "on_tick"),
    "no number": (lambda c: [PlaceOrder("AAPL", Side.BUY, 0.5)], "quantity 0.5 is no Decimal"),  # type: ignore[arg-type]
    "no json": (lambda c: [Remember({"price": Decimal(1)})], "no JSON"),
}


@pytest.mark.parametrize(
    ("ask", "message"), ASKED_FOR_TOO_MUCH.values(), ids=ASKED_FOR_TOO_MUCH.keys()
)
def test_a_strategy_that_asks_for_what_can_not_be_ends_its_run_in_error(
    conn: Connection, hooks: Hooks, ask: Callable[[Context], Any], message: str
) -> None:
    run = a_run(conn, strategy=SCRIPTED)
    before = snapshot(conn)
    hooks["on_tick"] = ask
    with pytest.raises(StrategyFailed) as caught:
        tick(conn, run)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    failed(conn, run, before, message)
    assert counts(conn, run)["orders"] == 0


def test_what_a_caller_asks_for_and_can_not_be_is_his_and_not_the_runs_failure(
    conn: Connection,
) -> None:
    run = a_run(conn)
    tick(conn, run)
    before = snapshot(conn)
    impossible: list[Intent] = [
        buy("1", "NOPE"),
        CancelOrder(run.run_id),
        Announce("TICK"),
    ]
    for intent in impossible:
        with pytest.raises(BadInput):
            run_tick(conn, run.user_id, run.run_id, close_on(TUE), at_price("1"), intents=[intent])
    with pytest.raises(BadInput):
        place_orders(
            conn, run.user_id, run.run_id, close_on(TUE), at_price("1"), [buy("1", "NOPE")]
        )
    assert snapshot(conn) == before
    assert fresh(conn, run).status == "RUNNING"


def test_fills_that_lead_to_fills_are_followed(conn: Connection, hooks: Hooks) -> None:
    run = a_run(conn, strategy=SCRIPTED)
    hooks["on_tick"] = lambda context: [buy("1")]
    # The last fill's wish is one that doesn't trade, so that the rounds end.
    left = [[buy("1")]] * (FILL_ROUNDS_MAX - 2) + [[Announce("DONE")]]
    hooks["on_fill"] = lambda context, fill: left.pop(0)
    assert tick(conn, run).executions == FILL_ROUNDS_MAX - 1
    assert "DONE" in events(conn, run)


def test_a_strategy_that_trades_on_its_own_fills_for_ever_ends_in_error(
    conn: Connection, hooks: Hooks
) -> None:
    run = a_run(conn, strategy=SCRIPTED)
    before = snapshot(conn)
    hooks["on_tick"] = hooks["on_fill"] = lambda context, *fill: [buy("1")]
    with pytest.raises(StrategyFailed, match=f"after {FILL_ROUNDS_MAX} rounds"):
        tick(conn, run)
    failed(conn, run, before, "still trades on its own fills")


@pytest.mark.parametrize("before", [0, 1])
def test_a_strategy_that_asks_for_too_many_orders_ends_in_error(
    conn: Connection, hooks: Hooks, monkeypatch: pytest.MonkeyPatch, before: int
) -> None:
    """Also when others had placed some of them at the same time already."""
    monkeypatch.setattr(work_module, "ORDERS_PER_TICK_MAX", 3)
    run = a_run(conn, strategy=SCRIPTED)
    key = run.user_id, run.run_id, close_on(MON), at_price("1")
    place_orders(conn, *key, [buy("1")] * before)
    with conn.transaction(force_rollback=True):
        hooks["on_start"] = lambda context: [buy("1")] * (3 - before)
        assert run_tick(conn, *key).orders == 3 - before
    hooks["on_start"] = lambda context: [buy("1")] * (4 - before)
    with pytest.raises(StrategyFailed, match="more than 3 orders"):
        run_tick(conn, *key)
    assert fresh(conn, run).status == "ERROR"


@pytest.mark.parametrize(
    "call",
    [
        lambda c, r: place_orders(c, r.user_id, r.run_id, close_on(MON), at_price("9"), [buy("1")]),
        lambda c, r: try_execute_sip(c, r.user_id, r.run_id, close_on(MON), at_price("9")),
    ],
    ids=["place_orders", "try_execute_sip"],
)
def test_a_strategy_that_raises_outside_of_a_tick_ends_its_run_too(
    conn: Connection, hooks: Hooks, call: Callable[[Connection, Run], int]
) -> None:
    run = a_run(conn, strategy=SCRIPTED)
    a_plan(conn, run)
    before = snapshot(conn)
    hooks["on_fill"] = raising
    with pytest.raises(StrategyFailed, match="on_fill"):
        call(conn, run)
    failed(conn, run, before, "on_fill")


def test_a_strategy_is_not_asked_about_a_time_that_has_passed(
    conn: Connection, hooks: Hooks
) -> None:
    run = a_run(conn, strategy=SCRIPTED)
    tick(conn, run, TUE)
    before = snapshot(conn)
    hooks["on_tick"] = raising
    with pytest.raises(TimeMovesForward, match="use a later logical_time"):
        tick(conn, run, MON)
    assert snapshot(conn) == before
    assert fresh(conn, run).status == "RUNNING"


def test_a_strategy_that_was_taken_away_ends_its_run_in_error(conn: Connection) -> None:
    run = a_run(conn)
    conn.execute("UPDATE strategy_run SET strategy = 'gone.away:Strategy'")
    before = snapshot(conn)
    with pytest.raises(StrategyFailed, match=r"gone\.away"):
        tick(conn, run)
    failed(conn, run, before, "can't be imported")


def test_a_failing_live_tick_notes_the_wall_clock(conn: Connection, hooks: Hooks) -> None:
    run = a_run(conn, strategy=SCRIPTED)
    hooks["on_tick"] = raising
    now = close_on(FRI)
    with pytest.raises(StrategyFailed):
        run_tick(conn, run.user_id, run.run_id, close_on(MON), at_price("1"), now=now)
    assert one(conn, "SELECT error_at FROM engine_status WHERE :run", run) == now


def test_an_interrupt_takes_the_tick_back_and_leaves_the_run(
    conn: Connection, hooks: Hooks
) -> None:
    run = a_run(conn, strategy=SCRIPTED)
    before = snapshot(conn)

    def interrupt(context: Context) -> None:
        raise KeyboardInterrupt

    hooks["on_tick"] = interrupt
    with pytest.raises(KeyboardInterrupt):
        tick(conn, run)
    assert snapshot(conn) == before


# Names and parameters


def test_a_strategy_of_ones_own_is_found_by_its_name() -> None:
    assert find(SCRIPTED) is Scripted
    assert make(SCRIPTED, {"units": "3"}).parameters.units == 3
    assert make("sip", {}).symbols() == frozenset()
    weights = {"weights": {"aapl": "0.5", "IBM": "0.25"}}
    assert make("rebalance", weights).symbols() == {"AAPL", "IBM"}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "sipp",
            "unknown strategy 'sipp'; choose rebalance or sip, or name your own as "
            "package.module:Class",
        ),
        ("", "unknown strategy ''"),
        ("no.such.module:Class", "strategy 'no.such.module:Class' can't be imported: Module"),
        (":Class", "strategy ':Class' can't be imported"),
        ("scripted:Nothing", "'scripted:Nothing' is no subclass of engine.strategies.base.Str"),
        ("scripted:HOOKS", "'scripted:HOOKS' is no subclass"),
        ("decimal:Decimal", "'decimal:Decimal' is no subclass"),
    ],
)
def test_a_strategy_that_is_none_is_refused(conn: Connection, name: str, message: str) -> None:
    with pytest.raises(BadInput, match=re.escape(message)):
        create_run(conn, add_user(conn, "ann"), Terms(strategy=name))
    assert rows(conn, "SELECT 1 FROM strategy_run") == []


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        (SCRIPTED, {"units": 0}, "units: Input should be greater than 0"),
        (SCRIPTED, {"units": "many"}, "units: Input should be a valid integer"),
        (SCRIPTED, {"unit": 1}, "unit: Extra inputs are not permitted"),
        (SCRIPTED, {"units": -1, "x": 1}, "units: Input should be greater than 0; x: Extra"),
        ("sip", {"amount": 1}, "amount: Extra inputs are not permitted"),
        ("rebalance", {}, "weights: Field required"),
        ("rebalance", {"weights": {}}, "weights: Dictionary should have at least 1 item"),
        ("rebalance", {"weights": {"AAPL": "0"}}, "weights.AAPL: Input should be greater than 0"),
        ("rebalance", {"weights": {"A": "0.6", "B": "0.6"}}, "the weights add up to more than 1"),
        ("rebalance", {"weights": {"A": "0.1", "a": "0.1"}}, "a symbol is named twice"),
        ("rebalance", {"weights": {"A": "1"}, "period": "DAILY"}, "period: Input should be 'MO"),
    ],
)
def test_parameters_that_do_not_fit_are_named(
    conn: Connection, name: str, parameters: dict[str, Any], message: str
) -> None:
    with pytest.raises(BadInput) as caught:
        create_run(conn, add_user(conn, "ann"), Terms(strategy=name, parameters=parameters))
    assert str(caught.value).startswith(f"the parameters of strategy {name!r} don't fit: ")
    assert message in str(caught.value)
    assert rows(conn, "SELECT 1 FROM strategy_run") == []


def test_a_strategy_that_can_not_be_made_is_refused(conn: Connection) -> None:
    name = f"scripted:{Unmakeable.__name__}"
    with pytest.raises(BadInput, match=r"can't be made: RuntimeError..no luck today"):
        create_run(conn, add_user(conn, "ann"), Terms(strategy=name))


def test_parameters_are_stored_with_their_defaults(conn: Connection) -> None:
    run = a_run(conn, strategy=SCRIPTED, parameters={"note": "hello"})
    assert run.parameters == {"units": 1, "note": "hello"}
    assert one(conn, "SELECT parameters FROM strategy_run", None) == run.parameters


def test_a_strategy_without_hooks_does_nothing(conn: Connection) -> None:
    plain = Strategy(None)
    assert plain.symbols() == frozenset()
    run = a_run(conn, strategy="engine.strategies.base:Strategy")
    tick(conn, run, MON)
    place_orders(conn, run.user_id, run.run_id, close_on(MON), at_price("9"), [buy("1")])
    stop_run(conn, run.user_id, run.run_id)
    assert events(conn, run) == [
        "RUN_STARTED",
        "TICK",
        "ORDER_PLACED",
        "EXECUTION",
        "RUN_STOPPED",
    ]


@pytest.mark.parametrize("batch", [1, 2, 10])
def test_a_strategy_keeps_nothing_in_itself(conn: Connection, batch: int) -> None:
    """Neither in its parameters: what it wants to keep it remembers."""
    run = a_run(conn, strategy=FORGETFUL)
    feed = [(close_on(day), [a_bar(day, "100")]) for day in (MON, TUE, WED)]
    replay(conn, run.user_id, run.run_id, feed, batch=batch)
    assert rows(conn, "SELECT quantity FROM execution ORDER BY logical_time") == [1, 1, 1]


def test_what_one_run_does_to_its_parameters_is_nothing_to_another(engine_conn: Connection) -> None:
    """Live, by one connection, one tick after the other."""
    for user in ("ann", "bob"):
        run = a_run(engine_conn, user=user, strategy=FORGETFUL)
        for day in (MON, TUE):
            tick(engine_conn, run, day)
    assert rows(engine_conn, "SELECT quantity FROM execution") == [1, 1, 1, 1]


# Rebalance


PERIODS = [
    ("MONTHLY", ["2001-05", "2001-06", "2001-07", "2001-10", "2002-01"]),
    ("QUARTERLY", ["2001-Q2", "2001-Q3", "2001-Q4", "2002-Q1"]),
    ("YEARLY", ["2001", "2002"]),
]


@pytest.mark.parametrize(("period", "subjects"), PERIODS)
def test_a_portfolio_is_rebalanced_at_the_first_session_of_its_period(
    conn: Connection, period: str, subjects: list[str]
) -> None:
    parameters = {"weights": {"AAPL": "0.5", "IBM": "0.5"}, "period": period}
    run = a_run(conn, strategy="rebalance", parameters=parameters)
    days = [MON, TUE, "2001-06-01", "2001-06-04", "2001-07-02", "2001-10-01", "2002-01-02"]
    for day in days:
        both = at_price("100") | at_price("50", "IBM")
        run_tick(conn, run.user_id, run.run_id, close_on(day), both)
    found = rows(
        conn,
        "SELECT subject FROM event_ledger WHERE event_type = 'REBALANCED' ORDER BY seq",
    )
    assert found == subjects


def test_a_rebalance_waits_for_every_price_and_an_open_market(conn: Connection) -> None:
    parameters = {"weights": {"AAPL": "0.5", "IBM": "0.3"}}
    run = a_run(conn, strategy="rebalance", parameters=parameters)
    key = run.user_id, run.run_id
    both = at_price("30") | at_price("70", "IBM")
    run_tick(conn, *key, close_on(MON), both, market_open=False)
    run_tick(conn, *key, close_on(TUE), at_price("30"))
    assert counts(conn, run)["orders"] == 0
    run_tick(conn, *key, close_on(WED), both)
    # Cut, not rounded: 5000 / 30 and 3000 / 70.
    assert rows(conn, "SELECT symbol, quantity FROM execution ORDER BY symbol") == [
        ("AAPL", Decimal("166.666666")),
        ("IBM", Decimal("42.857142")),
    ]


def test_a_rebalance_sells_before_it_buys_and_leaves_what_fits(conn: Connection) -> None:
    parameters = {"weights": {"AAPL": "0.5", "IBM": "0.3", "MSFT": "0.2"}, "period": "MONTHLY"}
    run = a_run(conn, strategy="rebalance", parameters=parameters)
    key = run.user_id, run.run_id
    flat = at_price("100") | at_price("100", "IBM") | at_price("100", "MSFT")
    run_tick(conn, *key, close_on(MON), flat)
    later = at_price("100") | at_price("50", "IBM") | at_price("175", "MSFT")
    run_tick(conn, *key, close_on("2001-06-01"), later)
    trades = rows(
        conn,
        f"""SELECT side, symbol, quantity FROM execution
            WHERE logical_time = '{close_on("2001-06-01").isoformat()}' ORDER BY execution_id""",
    )
    # Equity is 5000 + 1500 + 3500 = 10000 again, so AAPL stays as it is.
    assert trades == [
        ("SELL", "MSFT", Decimal("8.571429")),
        ("BUY", "IBM", Decimal(30)),
    ]
