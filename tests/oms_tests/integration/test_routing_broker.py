"""Routing through real processes: two exchanges, of which the first lets nobody in."""

from __future__ import annotations

from pathlib import Path

import pytest
from office import PLANS, an_office
from waits import wait_until

from engine.clock import utc_now
from engine.db.connect import Connection, open_connection
from engine.routing import Rerouted, reroute

FIRST, SECOND = "DU1", "DU2"


@pytest.mark.scenario("ROUTE-01")
def test_ibkr_down_routes_to_secondary_broker(
    owner_conn: Connection, dsn: str, tmp_path: Path
) -> None:
    plans = {FIRST: PLANS / "ROUTE-01.toml", SECOND: None}
    with an_office(owner_conn, dsn, tmp_path, plans) as office:
        office.work()
        office.connect(FIRST)
        office.connect(SECOND)
        office.is_up(SECOND)
        order_id = office.wire.place(limit_price="90")
        assert office.wire.order(order_id)["account"] == FIRST
        # The worker does the same, once the first has been down for long enough.
        with open_connection(dsn, role="oms_engine") as engine:
            moved: list[Rerouted] = []

            def taken_over() -> bool:
                moved.extend(reroute(engine, office.wire.run.user_id, utc_now(), down_seconds=1))
                return bool(office.wire.order(order_id)["account"] == SECOND)

            wait_until(
                taken_over,
                "the second account to take it over",
            )
        order = office.becomes(order_id, "ROUTED")
        assert order["account"] == SECOND
        (theirs,) = office.exchanges[SECOND].books(SECOND)["orders"]
        assert (theirs["order_ref"], theirs["status"]) == (str(order_id), "ROUTED")
        assert office.exchanges[FIRST].books(FIRST)["orders"] == []
        ((_, told),) = office.wire.events("ROUTE_FAILOVER")
        assert (told["from"], told["to"], told["why"]) == (FIRST, SECOND, "ACCOUNT_DOWN")
        assert "ROUTE_FAILOVER" in office.wire.alerts()
        assert owner_conn.execute(
            "SELECT account, outcome FROM broker_command WHERE kind = 'SUBMIT' ORDER BY account"
        ).fetchall() == [(FIRST, "WITHDRAWN"), (SECOND, "SENT")]
        office.agrees(SECOND)
