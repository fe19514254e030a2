"""Reconciliation through the real processes: what the broker knows, and we did not."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from broker_cases import ACCOUNT
from office import PLANS, Office, an_office
from waits import wait_until

from engine.db.connect import Connection


@pytest.fixture
def office(
    owner_conn: Connection, dsn: str, tmp_path: Path, request: pytest.FixtureRequest
) -> Iterator[Office]:
    plan = PLANS / f"{request.param}.toml" if request.param else None
    with an_office(owner_conn, dsn, tmp_path, {ACCOUNT: plan}) as made:
        yield made


with_plan = pytest.mark.parametrize


@pytest.mark.scenario("CONN-02")
@with_plan("office", ["CONN-02"], indirect=True)
def test_orphan_fill_on_startup_creates_recovered_orderstate(office: Office) -> None:
    office.work()
    office.connect()
    wait_until(
        lambda: (
            office.conn.execute("SELECT FROM orders WHERE status = 'FILLED'").fetchone() is not None
        ),
        "the fill of an order that nobody knew",
    )
    ((order_id, recovered, filled),) = office.conn.execute(
        "SELECT order_id, recovered, filled_quantity FROM orders"
    ).fetchall()
    assert (recovered, filled) == (True, 10)
    assert len(office.wire.events("ORPHAN_FILL")) == 1
    assert "ORPHAN_FILL" in office.wire.alerts()
    (theirs,) = office.exchange.books()["orders"]
    assert theirs["order_ref"] == str(order_id)
    assert office.wire.commands(order_id) == 0
    office.agrees()


@pytest.mark.scenario("FAIL-04")
@with_plan("office", ["FAIL-04"], indirect=True)
def test_reconcile_broker_wins_on_missing_order_marks_canceled(office: Office) -> None:
    office.work()
    office.connect()
    order_id = office.wire.place(limit_price="90")
    office.becomes(order_id, "ROUTED", "CANCELED")
    if office.wire.order(order_id)["status"] == "ROUTED":
        told = office.reconcile("--dry-run")
        assert [(d["class"], d["action"]) for d in told["differences"]] in (
            [("MISSING_AT_BROKER", "CANCELED")],
            [],  # the worker was quicker
        )
        office.reconcile()
    order = office.becomes(order_id, "CANCELED")
    assert order["status_reason"] == "RECONCILE_MISMATCH"
    (event,) = office.wire.events("RECONCILE_MISMATCH")
    assert event[1]["class"] == "MISSING_AT_BROKER"
    assert "RECONCILE_MISMATCH" in office.wire.alerts()
    assert office.wire.kinds(order_id) == ["SUBMIT"]
    office.agrees()


@pytest.mark.scenario("FAIL-06")
@with_plan("office", ["FAIL-06"], indirect=True)
def test_gtc_order_recovered_after_weekend_reconcile(office: Office) -> None:
    """Friday: the broker takes the order, and nobody here lives to hear of it. Monday: restart."""
    office.connect()
    office.is_up()
    order_id = office.wire.place(limit_price="90")
    wait_until(lambda: office.exchange.books()["orders"], "the exchange to have it")
    office.end(ACCOUNT, signal.SIGKILL)
    office.exchange.stop()
    office.conn.execute("UPDATE broker_lease SET expires_at = now()")  # the weekend passes
    office.exchange.start()
    office.work()
    office.connect()
    order = office.becomes(order_id, "ROUTED")
    (theirs,) = office.exchange.books()["orders"]
    assert (theirs["order_ref"], theirs["status"]) == (str(order_id), "ROUTED")
    assert (order["broker_order_id"], order["perm_id"]) == (
        theirs["broker_order_id"],
        theirs["perm_id"],
    )
    assert office.wire.kinds(order_id) == ["SUBMIT"]
    office.agrees()


@pytest.mark.scenario("EDGE-02")
@with_plan("office", ["EDGE-02"], indirect=True)
def test_symbol_change_marks_old_orders_canceled(office: Office) -> None:
    office.work()
    office.connect()
    first = office.wire.place(limit_price="90")
    office.becomes(first, "ROUTED")
    second = office.wire.place(limit_price="91")
    for order_id in (first, second):
        office.becomes(order_id, "CANCELED")
    wait_until(lambda: "CONTRACT_CHANGED" in office.wire.alerts(), "people to be told")
    assert office.wire.events("CONTRACT_CHANGED") != []
    office.agrees()
