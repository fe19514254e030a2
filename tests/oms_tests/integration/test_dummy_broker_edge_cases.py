"""Others in our account, and ids that change: engine, connector and exchange as processes."""

from __future__ import annotations

import asyncio
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from exchange import order as an_order
from house import EXCHANGE_CASH, House, a_house
from psycopg.types.json import Jsonb
from waits import wait_until

from engine.brokers.connector import Ended
from engine.clock import utc_now
from engine.db.connect import Connection
from engine.reconcile import compare_now

pytestmark = pytest.mark.slow


def _heard(house: House, kind: str) -> list[Any]:
    """Finding, code and payload of what the broker said of this kind, in order."""
    return [
        row[1:]
        for row in house.rows(
            """SELECT kind, finding, code, payload FROM broker_event
               WHERE user_id = %s ORDER BY number"""
        )
        if row[0] == kind
    ]


@pytest.mark.scenario("CONN-04")
def test_double_connect_same_clientid_shuts_down_first_process(
    dsn: str, owner_conn: Connection, tmp_path: Path
) -> None:
    async def take_the_session() -> None:
        thief = house.exchange.adapter(client_id=7, account=house.wire.account)
        await thief.connect()
        assert await asyncio.to_thread(first.wait) == Ended.CONNECTION_STOLEN
        with house.exchange.control() as control:
            sessions = [each["client_id"] for each in control.sessions()]
        assert sessions == [7], "the first one doesn't take it back"
        await thief.close()

    with a_house(dsn, owner_conn, tmp_path) as house:
        house.staff()
        first = house.programs["connect"]
        before = house.place(limit_price="90")
        house.wait_status(before, "ROUTED")
        asyncio.run(take_the_session())
        house.wait_alert("CONNECTION_STOLEN")
        wait_until(lambda: _heard(house, "STOLEN"), "the broker's word")
        assert first.codes().count("CONNECTION_STOLEN") == 1
        assert first.codes()[-1] == "CONNECTOR_ENDED"
        assert not house.is_connected()
        house.wait_settled()
        # What works goes on working, and what comes now waits for who connects next.
        after = house.place(limit_price="91")
        assert [house.status(each) for each in (before, after)] == ["ROUTED", "NEW"]
        house.connect()
        house.wait_status(after, "ROUTED")
        house.wait_settled()
        refs = [each["order_ref"] for each in house.exchange.books()["orders"]]
        assert refs == [str(before), str(after)]


@pytest.mark.scenario("SEC-01")
def test_foreign_orders_detected_and_ignored(
    dsn: str, owner_conn: Connection, tmp_path: Path
) -> None:
    with a_house(dsn, owner_conn, tmp_path, faults="SEC-01") as house:
        # Who logs on as client 0 hears of what others do in the account.
        house.set_account(settings=Jsonb({"port": house.exchange.port, "client_id": 0}))
        house.staff()
        order_id = house.place(quantity="10")
        house.wait_status(order_id, "FILLED")
        house.wait_alert("FOREIGN_ORDER")
        wait_until(lambda: len(_heard(house, "EXECUTION")) == 2, "execution of the other order")
        house.wait_settled()
        (ours,) = house.rows("SELECT order_id FROM orders WHERE user_id = %s")
        assert ours == (order_id,)
        findings = {row[:2] for row in _heard(house, "EXECUTION")}
        assert findings == {("NEW", None), ("FOREIGN", "FOREIGN_ORDER")}
        booked = house.rows("SELECT quantity, price FROM execution WHERE user_id = %s")
        assert booked == [(10, 100)]
        assert house.wire.position() == 10
        assert house.wire.cash() == Decimal("98999.95")
        assert house.wire.kinds(order_id) == ["SUBMIT"]
        books = house.exchange.books()
        assert books["positions"] == {"AAPL": "20"}
        assert sorted(each["status"] for each in books["orders"]) == ["FILLED", "FILLED"]
        assert "FOREIGN_ORDER" in house.programs["work"].codes()
        _sees_the_difference(house)


def _sees_the_difference(house: House) -> None:
    compared = compare_now(house.wire.conn, house.wire.run.user_id, house.wire.account, utc_now())
    found = {each.kind: each for each in compared.differences}
    positions = found["POSITION_DIFFERS"]
    assert (positions.subject, positions.ours, positions.brokers) == ("AAPL", "10", "20")
    assert Decimal(found["CASH_DIFFERS"].brokers) < EXCHANGE_CASH - 2000
    house.wait_alert("RECONCILE_MISMATCH")
    assert house.wire.position() == 10, "a person decides what becomes of it"


@pytest.mark.scenario("SEC-02")
def test_account_switch_mismatch_triggers_shutdown(
    dsn: str, owner_conn: Connection, tmp_path: Path
) -> None:
    with a_house(dsn, owner_conn, tmp_path, faults="SEC-02") as house:
        house.staff()
        connector = house.programs["connect"]
        order_id = house.place(limit_price="90")
        assert connector.wait() == Ended.ACCOUNT_MISMATCH
        house.wait_alert("ACCOUNT_MISMATCH")
        with house.exchange.control() as control:
            control.manual_order(an_order(quantity="7"), account="DU2")
        assert "ACCOUNT_MISMATCH" in connector.codes()
        (said,) = _heard(house, "ACCOUNT_MISMATCH")
        assert "DU2" in said[2]["message"]
        assert not house.is_connected()
        # Nothing more is sent, and nothing of the other account is booked.
        waits = house.place(limit_price="91")
        house.connect()
        house.wait_status(waits, "ROUTED")
        house.wait_status(order_id, "ROUTED")
        house.wait_settled()
        assert [each["order_ref"] for each in house.exchange.books()["orders"]] == [
            str(order_id),
            str(waits),
        ]
        assert house.exchange.books("DU2")["positions"] == {"AAPL": "7"}
        assert house.wire.position() == 0
        assert house.rows("SELECT count(*) FROM execution WHERE user_id = %s") == [(0,)]


@pytest.mark.scenario("PERMID-MISMATCH")
def test_permid_change_mid_order_retains_correct_tracking(
    dsn: str, owner_conn: Connection, tmp_path: Path
) -> None:
    with a_house(dsn, owner_conn, tmp_path, faults="PERMID-MISMATCH") as house:
        house.staff()
        order_id, other = (house.place(limit_price=price) for price in ("100", "99"))
        perm_ids = []
        with house.exchange.control() as control:
            for filled in (4, 8):
                wait_until(
                    lambda: house.wire.order(order_id)["filled_quantity"] == filled,  # noqa: B023
                    "a fill",
                )
                house.wait_settled()
                perm_ids.append(house.wire.order(order_id)["perm_id"])
                control.set_price("AAPL", "100")
            house.wait_status(order_id, "FILLED")
            house.wait_settled()
            # Cancelled by the id that it has now, and by no other's.
            house.wire.cancel(other)
            house.wait_status(other, "CANCELED")
        house.wait_settled()
        order = house.wire.order(order_id)
        perm_ids.append(order["perm_id"])
        assert len(set(perm_ids)) == 3
        assert (order["filled_quantity"], order["avg_fill_price"]) == (10, 100)
        mapped = owner_conn.execute(
            "SELECT perm_id FROM order_broker_id WHERE order_id = %s ORDER BY since", [order_id]
        ).fetchall()
        assert {perm_id for (perm_id,) in mapped} >= set(perm_ids)
        assert house.rows("SELECT count(*) FROM orders WHERE user_id = %s") == [(2,)]
        assert house.rows("SELECT sum(quantity) FROM execution WHERE user_id = %s") == [(10,)]
        assert house.exchange.books()["positions"] == {"AAPL": "10"}
        assert house.wire.position() == 10
        assert not {"ORPHAN_FILL", "ORPHAN_ORDER", "FOREIGN_ORDER"} & set(house.wire.alerts())
