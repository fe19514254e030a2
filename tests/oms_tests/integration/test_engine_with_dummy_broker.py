"""Engine, connector and exchange as real processes: what goes well, and what goes wrong."""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path

import pytest
from live import a_house, until

from engine.db.connect import Connection


def test_an_order_goes_to_the_broker_and_its_fill_comes_back(
    dsn: str, owner_conn: Connection, tmp_path: Path
) -> None:
    with a_house(dsn, owner_conn, tmp_path) as house:
        house.connect()
        house.work()
        order_id = house.place(quantity="10")
        house.wait_status(order_id, "FILLED")
        house.wait_settled()
        assert house.wire.position() == 10
        assert house.wire.cash() < Decimal(100_000)
        assert house.exchange.books()["positions"] == {"AAPL": "10"}


@pytest.mark.scenario("CONN-01")
def test_mid_submit_disconnect_keeps_order_new_and_reconciles(
    dsn: str, owner_conn: Connection, tmp_path: Path
) -> None:
    with a_house(dsn, owner_conn, tmp_path, faults="CONN-01") as house:
        house.connect()
        house.work()
        reached = house.place(limit_price="90")
        house.wait_event("SUBMIT_PENDING")
        house.wait_status(reached, "ROUTED")
        assert house.wire.order(reached)["perm_id"] is not None
        lost = house.place(limit_price="91")
        until(lambda: len(house.wire.events("SUBMIT_PENDING")) == 2, "second SUBMIT_PENDING")
        until(
            lambda: ("NEVER_ARRIVED",)
            in owner_conn.execute(
                "SELECT outcome FROM broker_command WHERE order_id = %s", [lost]
            ).fetchall(),
            "the broker's word that it never had it",
        )
        order = house.wire.order(lost)
        assert (order["status"], order["broker_order_id"]) == ("NEW", None)
        house.wait_event("RECONCILE")
        house.wait_settled()
        refs = [each["order_ref"] for each in house.exchange.books()["orders"]]
        assert refs == [str(reached)], "sent once each, whatever became of it"
        assert [house.wire.kinds(each) for each in (reached, lost)] == [["SUBMIT"], ["SUBMIT"]]
