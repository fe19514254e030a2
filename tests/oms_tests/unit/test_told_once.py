"""What comes twice, or is heard twice, is told once and stops nobody."""

from __future__ import annotations

from datetime import timedelta
from uuid import uuid4

from broker_cases import Wire

SKEW = timedelta(seconds=-45)


def test_a_connection_with_a_skewed_clock_is_told_and_ends_nothing(wire: Wire) -> None:
    """Its payload names the account, as the log line does."""
    number = wire.say("CONNECTED", lag=-SKEW, account="DU1", level="high")
    assert wire.apply().codes == ["TIME_SKEW"]
    assert wire.finding(number) == ("NEW", "TIME_SKEW")


def test_a_commission_that_waits_for_its_execution_tells_of_the_clock_once(wire: Wire) -> None:
    order_id = wire.working()
    wire.say("COMMISSION", order_id, lag=SKEW, execution_id="1.01", amount="1", currency="USD")
    number = wire.fill(order_id, "10", "100", "1.01", lag=SKEW)
    wire.apply()
    assert wire.finding(number)[0] == "NEW"
    assert wire.order(order_id)["status"] == "FILLED"
    assert wire.cash() == 100_000 - 1000 - 1
    assert len(wire.events("TIME_SKEW")) == 2


def test_every_further_cancel_of_what_is_over_is_ignored(wire: Wire) -> None:
    order_id = wire.working()
    wire.fill(order_id, "10", "100", "1.01")
    wire.apply()
    assert [wire.cancel(order_id) for _ in range(3)] == ["CANCEL_IGNORED"] * 3
    assert len(wire.events("CANCEL_IGNORED")) == 1


def test_an_order_taken_up_for_a_fill_has_the_terms_of_the_snapshot_that_came_with_it(
    wire: Wire,
) -> None:
    order_id = uuid4()
    terms = {
        "order_ref": str(order_id),
        "symbol": "AAPL",
        "side": "BUY",
        "quantity": "25",
        "order_type": "LIMIT",
        "limit_price": "101",
        "time_in_force": "GTC",
        "status": "ROUTED",
        "filled": "10",
        "ours": True,
    }
    wire.fill(order_id, "10", "100", "1.01", symbol="AAPL", side="BUY")
    wire.say(
        "SNAPSHOT",
        snapshot_id=str(uuid4()),
        part=1,
        parts=1,
        taken_at=wire.now.isoformat(),
        open_orders=[terms],
        cash={},
    )
    wire.apply()
    order = wire.order(order_id)
    assert (order["status"], order["quantity"], order["filled_quantity"]) == (
        "PARTIALLY_FILLED",
        25,
        10,
    )
    assert (order["order_type"], order["limit_price"]) == ("LIMIT", 101)
