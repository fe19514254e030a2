"""An order that the adapter of its broker refused to send is over, and only such a one."""

from __future__ import annotations

from uuid import UUID

import psycopg
import pytest
from broker_cases import NOW, Wire

from engine.unsendable import reject_unsendable
from engine.worker import WATCHES, look_after, work_through

REASON = "the broker has no order type TRAIL"


def ends(wire: Wire, order_id: UUID, outcome: str | None) -> None:
    """The order's SUBMIT is claimed and ends so, as its connector says."""
    ((command,),) = wire.conn.execute(
        """UPDATE broker_command SET claimed_by = %s, claimed_at = clock_timestamp()
           WHERE user_id = %s AND order_id = %s AND kind = 'SUBMIT' RETURNING command_id""",
        [wire.holder, wire.run.user_id, order_id],
    ).fetchall()
    wire.say("SEND_FAILED", order_id, command_id=command, error=REASON)
    if outcome is not None:
        wire.conn.execute(
            """UPDATE broker_command SET outcome = %s, done_at = clock_timestamp()
               WHERE user_id = %s AND command_id = %s""",
            [outcome, wire.run.user_id, command],
        )


def rejected(wire: Wire) -> list[UUID]:
    return reject_unsendable(wire.conn, wire.run.user_id, NOW)


def test_what_the_adapter_refused_is_rejected_once(
    wire: Wire, caplog: pytest.LogCaptureFixture
) -> None:
    order_id, other = wire.place(), wire.place()
    ends(wire, order_id, "REFUSED")
    with caplog.at_level("INFO", "oms"):
        assert rejected(wire) == [order_id]
        assert rejected(wire) == []
    order = wire.order(order_id)
    assert (order["status"], order["reject_source"]) == ("REJECTED", "BROKER")
    assert order["reject_code"] == "SEND_REFUSED"
    assert order["status_reason"] == f"SEND_REFUSED: {REASON}"
    assert caplog.messages == ["SEND_REFUSED"]
    ((_, told),) = wire.events("ORDER_REJECTED")
    assert told["reject_code"] == "SEND_REFUSED"
    assert wire.order(other)["status"] == "NEW"


def test_the_worker_does_it(wire: Wire) -> None:
    order_id = wire.place()
    ends(wire, order_id, "REFUSED")
    assert work_through(wire.conn).of_account, "so that the worker looks at once"
    look_after(wire.conn, NOW, WATCHES)
    assert wire.order(order_id)["status"] == "REJECTED"


@pytest.mark.parametrize("then", ["PENDING", "PENDING_CANCEL"])
def test_it_is_over_whatever_was_asked_meanwhile(wire: Wire, then: str) -> None:
    order_id = wire.place(limit_price="90")
    ends(wire, order_id, None)
    if then == "PENDING":
        wire.conn.execute("UPDATE orders SET status = 'PENDING' WHERE order_id = %s", [order_id])
    else:
        assert wire.cancel(order_id) == then
    wire.conn.execute(
        """UPDATE broker_command SET outcome = 'REFUSED', done_at = clock_timestamp()
           WHERE order_id = %s AND kind = 'SUBMIT'""",
        [order_id],
    )
    assert rejected(wire) == [order_id]
    assert wire.order(order_id)["status"] == "REJECTED"
    left = wire.conn.execute(
        "SELECT outcome FROM broker_command WHERE order_id = %s AND kind <> 'SUBMIT'", [order_id]
    ).fetchall()
    assert {outcome for (outcome,) in left} <= {"WITHDRAWN"}, "nothing of it is asked any more"


@pytest.mark.parametrize("outcome", [None, "NEVER_ARRIVED"])
def test_what_may_still_go_out_is_left_alone(wire: Wire, outcome: str | None) -> None:
    order_id = wire.place()
    ends(wire, order_id, outcome)
    assert rejected(wire) == []
    assert wire.order(order_id)["status"] == "NEW"


def test_what_the_broker_speaks_of_is_at_the_broker(wire: Wire) -> None:
    order_id = wire.place()
    ends(wire, order_id, "REFUSED")
    wire.status(order_id, "ROUTED", broker_order_id=1)
    assert rejected(wire) == []
    wire.apply()
    assert wire.order(order_id)["status"] == "ROUTED"


@pytest.mark.parametrize("code", ["SEND_REFUSED", "PRICE_OFF"])
@pytest.mark.parametrize("outcome", ["UNCLAIMED", "NEVER_ARRIVED", "REFUSED"])
def test_nobody_else_can_reject_in_the_brokers_name(wire: Wire, outcome: str, code: str) -> None:
    order_id = wire.place()
    if outcome != "UNCLAIMED":
        ends(wire, order_id, outcome)
    move = """UPDATE orders SET status = 'REJECTED', reject_source = 'BROKER', reject_code = %s
              WHERE order_id = %s"""
    if (outcome, code) == ("REFUSED", "SEND_REFUSED"):
        wire.conn.execute(move, [code, order_id])
        return
    with pytest.raises(psycopg.errors.IntegrityError) as refused:
        wire.conn.execute(move, [code, order_id])
    assert refused.value.diag.constraint_name == "orders_end_said_by_broker"
