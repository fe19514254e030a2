"""Reconciliation through the real processes: what the broker knows, and we did not."""

from __future__ import annotations

from pathlib import Path

import pytest
from house import a_house
from waits import wait_until

from engine.db.connect import Connection

pytestmark = pytest.mark.slow


@pytest.mark.scenario("CONN-02")
def test_orphan_fill_on_startup_creates_recovered_orderstate(
    dsn: str, owner_conn: Connection, tmp_path: Path
) -> None:
    with a_house(dsn, owner_conn, tmp_path, faults="CONN-02") as house:
        house.staff()
        wait_until(
            lambda: house.rows("SELECT 1 FROM orders WHERE user_id = %s AND status = 'FILLED'"),
            "the fill of an order that nobody knew",
        )
        ((order_id, recovered, filled),) = house.rows(
            "SELECT order_id, recovered, filled_quantity FROM orders WHERE user_id = %s"
        )
        assert (recovered, filled) == (True, 10)
        assert len(house.wire.events("ORPHAN_FILL")) == 1
        assert "ORPHAN_FILL" in house.wire.alerts()
        assert house.sent_refs() == [str(order_id)]
        assert house.wire.commands(order_id) == 0
        house.agrees()


@pytest.mark.scenario("FAIL-04")
def test_reconcile_broker_wins_on_missing_order_marks_canceled(
    dsn: str, owner_conn: Connection, tmp_path: Path
) -> None:
    with a_house(dsn, owner_conn, tmp_path, faults="FAIL-04") as house:
        house.staff()
        order_id = house.place(limit_price="90")
        if house.wait_status(order_id, "ROUTED", "CANCELED") == "ROUTED":
            told = house.reconcile("--dry-run")
            assert [(d["class"], d["action"]) for d in told["differences"]] in (
                [("MISSING_AT_BROKER", "CANCELED")],
                [],  # the worker was quicker
            )
            house.reconcile()
        house.wait_status(order_id, "CANCELED")
        assert house.wire.order(order_id)["status_reason"] == "RECONCILE_MISMATCH"
        (event,) = house.wire.events("RECONCILE_MISMATCH")
        assert event[1]["class"] == "MISSING_AT_BROKER"
        assert "RECONCILE_MISMATCH" in house.wire.alerts()
        assert house.wire.kinds(order_id) == ["SUBMIT"]
        house.agrees()


@pytest.mark.scenario("FAIL-06")
def test_gtc_order_recovered_after_weekend_reconcile(
    dsn: str, owner_conn: Connection, tmp_path: Path
) -> None:
    """Friday: the broker takes the order, and nobody here lives to hear of it. Monday: restart."""
    with a_house(dsn, owner_conn, tmp_path, faults="FAIL-06") as house:
        friday = house.connect()
        order_id = house.place(limit_price="90")
        wait_until(house.sent_refs, "the exchange to have it")
        friday.kill()
        house.exchange.stop()
        house.end_lease()  # the weekend passes
        house.exchange.start()
        house.staff()
        house.wait_status(order_id, "ROUTED")
        order = house.wire.order(order_id)
        (theirs,) = house.exchange.books()["orders"]
        assert (theirs["order_ref"], theirs["status"]) == (str(order_id), "ROUTED")
        assert (order["broker_order_id"], order["perm_id"]) == (
            theirs["broker_order_id"],
            theirs["perm_id"],
        )
        assert house.wire.kinds(order_id) == ["SUBMIT"]
        house.agrees()


@pytest.mark.scenario("EDGE-02")
def test_symbol_change_marks_old_orders_canceled(
    dsn: str, owner_conn: Connection, tmp_path: Path
) -> None:
    with a_house(dsn, owner_conn, tmp_path, faults="EDGE-02") as house:
        house.staff()
        first = house.place(limit_price="90")
        house.wait_status(first, "ROUTED")
        second = house.place(limit_price="91")
        for order_id in (first, second):
            house.wait_status(order_id, "CANCELED")
        house.wait_alert("CONTRACT_CHANGED")
        assert house.wire.events("CONTRACT_CHANGED") != []
        house.agrees()
