"""Routing through real processes: two exchanges, of which the first lets nobody in."""

from __future__ import annotations

from pathlib import Path

import pytest
from house import a_house
from waits import wait_until

from engine.clock import utc_now
from engine.db.connect import Connection, open_connection
from engine.routing import Rerouted, reroute

FIRST, SECOND = "DU1", "DU2"


@pytest.mark.scenario("ROUTE-01")
def test_ibkr_down_routes_to_secondary_broker(
    owner_conn: Connection, dsn: str, tmp_path: Path
) -> None:
    with a_house(dsn, owner_conn, tmp_path, faults="ROUTE-01", accounts=(FIRST, SECOND)) as house:
        house.work()
        house.start_connector(FIRST)
        house.connect(SECOND)
        order_id = house.wire.place(limit_price="90")
        assert house.wire.order(order_id)["account"] == FIRST
        # The worker does the same, once the first has been down for long enough.
        with open_connection(dsn, role="oms_engine") as engine:
            moved: list[Rerouted] = []

            def taken_over() -> bool:
                moved.extend(reroute(engine, house.wire.run.user_id, utc_now(), down_seconds=1))
                return bool(house.wire.order(order_id)["account"] == SECOND)

            wait_until(
                taken_over,
                "the second account to take it over",
            )
        house.wait_status(order_id, "ROUTED")
        assert house.wire.order(order_id)["account"] == SECOND
        (theirs,) = house.exchanges[SECOND].books(SECOND)["orders"]
        assert (theirs["order_ref"], theirs["status"]) == (str(order_id), "ROUTED")
        assert house.exchanges[FIRST].books(FIRST)["orders"] == []
        ((_, told),) = house.wire.events("ROUTE_FAILOVER")
        assert (told["from"], told["to"], told["why"]) == (FIRST, SECOND, "ACCOUNT_DOWN")
        assert "ROUTE_FAILOVER" in house.wire.alerts()
        assert owner_conn.execute(
            "SELECT account, outcome FROM broker_command WHERE kind = 'SUBMIT' ORDER BY account"
        ).fetchall() == [(FIRST, "WITHDRAWN"), (SECOND, "SENT")]
        house.agrees(SECOND)
