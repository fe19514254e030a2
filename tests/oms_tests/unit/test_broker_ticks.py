"""Ticks of a run whose orders live at a broker: what goes out, what comes back, how it ends."""

from __future__ import annotations

from datetime import timedelta
from decimal import Decimal
from typing import Any
from uuid import UUID, uuid4

import pytest
from broker_cases import NOW, Wire, a_broker_run
from scripted import HOOKS

from engine.db.connect import Connection
from engine.errors import BadInput, StrategyFailed
from engine.market.view import Prices
from engine.orders.by_hand import cancel_all
from engine.orders.model import Fill, OrderType, Side
from engine.replay import replay
from engine.runs import find_run
from engine.stop import settle_stopping, stop_run
from engine.strategies.base import CancelOrder, Context, Intent, ModifyOrder, PlaceOrder
from engine.tick import TickResult, place_orders, run_tick, try_execute_sip

PRICES: Prices = {"AAPL": Decimal(100)}
BUY = PlaceOrder("AAPL", Side.BUY, Decimal(5), OrderType.LIMIT, limit_price=Decimal(99))


@pytest.fixture
def scripted(conn: Connection) -> Any:
    """A broker run whose strategy does what HOOKS say."""
    HOOKS.clear()
    yield Wire(conn, a_broker_run(conn, strategy="scripted:Scripted"))
    HOOKS.clear()


def tick(wire: Wire, minutes: int, *intents: Intent) -> TickResult:
    at = NOW + timedelta(minutes=minutes)
    run = wire.run
    return run_tick(wire.conn, run.user_id, run.run_id, at, PRICES, now=at, intents=intents)


def only_order(wire: Wire) -> UUID:
    rows = wire.conn.execute(
        "SELECT order_id FROM orders WHERE user_id = %s", [wire.run.user_id]
    ).fetchall()
    ((order_id,),) = rows
    found: UUID = order_id
    return found


def at_broker(wire: Wire) -> UUID:
    """An order that a tick has placed and the broker works."""
    assert tick(wire, 0, BUY).executions == 0, "no price of ours fills it"
    order_id = only_order(wire)
    assert wire.kinds(order_id) == ["SUBMIT"]
    wire.sent(order_id)
    wire.status(order_id, "ROUTED", broker_order_id=1, perm_id=11)
    wire.apply()
    return order_id


def test_what_the_broker_fills_between_two_ticks_is_told_at_the_next(scripted: Wire) -> None:
    order_id = at_broker(scripted)
    scripted.fill(order_id, "5", "98.5", "e.01")
    scripted.apply()
    seen: list[Fill] = []

    def note(context: Context, fill: Fill) -> None:
        seen.append(fill)

    HOOKS["on_fill"] = note
    result = tick(scripted, 1)
    assert [(fill.order_id, fill.quantity, fill.price) for fill in seen] == [
        (order_id, Decimal(5), Decimal("98.5"))
    ]
    assert result.cash == Decimal("99507.5")
    tick(scripted, 2)
    assert len(seen) == 1


def test_a_strategy_modifies_and_cancels_what_its_broker_works(scripted: Wire) -> None:
    order_id = at_broker(scripted)
    tick(scripted, 1, ModifyOrder(order_id, limit_price=Decimal("98.75")))
    assert scripted.order(order_id)["status"] == "PENDING_MODIFY"
    scripted.sent(order_id)
    scripted.say("MODIFIED", order_id, quantity="5", limit_price="98.75")
    scripted.apply()
    tick(scripted, 2, CancelOrder(order_id), CancelOrder(order_id))
    assert scripted.order(order_id)["status"] == "PENDING_CANCEL"
    assert scripted.kinds(order_id) == ["SUBMIT", "MODIFY", "CANCEL"]
    assert len(scripted.events("CANCEL_IGNORED")) == 1
    with pytest.raises(BadInput, match="can't be modified"):
        tick(scripted, 3, ModifyOrder(order_id, quantity=Decimal(1)))
    with pytest.raises(BadInput, match="can't be modified"):
        tick(scripted, 3, ModifyOrder(uuid4(), quantity=Decimal(1)))
    with pytest.raises(BadInput, match="no order"):
        tick(scripted, 3, CancelOrder(uuid4()))


def test_orders_placed_outside_of_a_tick_go_out(wire: Wire) -> None:
    run = wire.run
    assert place_orders(wire.conn, run.user_id, run.run_id, NOW, PRICES, [BUY]) == 0
    assert wire.kinds(only_order(wire)) == ["SUBMIT"]


def test_a_plan_is_carried_out_at_the_broker(wire: Wire) -> None:
    key = (wire.run.user_id, wire.run.run_id)
    wire.conn.execute(
        """INSERT INTO sip_plan (user_id, run_id, plan, symbol, amount, start_on)
           VALUES (%s, %s, 'apples', 'AAPL', 500, '2024-01-01')""",
        key,
    )
    assert try_execute_sip(wire.conn, *key, NOW, PRICES, market_open=True) == 1
    assert wire.kinds(only_order(wire)) == ["SUBMIT"]
    assert try_execute_sip(wire.conn, *key, NOW, PRICES, market_open=True) == 0


def test_all_orders_are_cancelled_at_once(wire: Wire) -> None:
    working, waiting = wire.working(limit_price="99"), wire.place(limit_price="98")
    results = cancel_all(wire.conn, wire.run.user_id, wire.run.run_id)
    assert results == {working: "PENDING_CANCEL", waiting: "CANCELED"}
    assert cancel_all(wire.conn, wire.run.user_id, wire.run.run_id) == {}


@pytest.mark.parametrize("failed", [False, True])
def test_a_run_ends_when_its_broker_is_done_with_it(scripted: Wire, failed: bool) -> None:
    order_id = at_broker(scripted)
    key = scripted.run.user_id, scripted.run.run_id
    if failed:

        def fail(context: Context) -> None:
            raise ValueError("on purpose")

        HOOKS["on_tick"] = fail
        with pytest.raises(StrategyFailed):
            tick(scripted, 1)
    else:
        assert stop_run(scripted.conn, *key).status == "STOPPING"
    assert find_run(scripted.conn, key[1]).status == "STOPPING"
    assert settle_stopping(scripted.conn, key[0]) == []
    scripted.sent(order_id)
    scripted.status(order_id, "CANCELED")
    scripted.apply()
    assert settle_stopping(scripted.conn, key[0]) == [key[1]]
    assert find_run(scripted.conn, key[1]).status == ("ERROR" if failed else "STOPPED")


def test_a_run_without_orders_out_there_is_stopped_at_once(wire: Wire) -> None:
    wire.place(limit_price="98")
    assert stop_run(wire.conn, wire.run.user_id, wire.run.run_id).status == "STOPPED"


def test_past_prices_do_not_go_to_a_broker(wire: Wire) -> None:
    with pytest.raises(BadInput, match="paper"):
        replay(wire.conn, wire.run.user_id, wire.run.run_id, [])
