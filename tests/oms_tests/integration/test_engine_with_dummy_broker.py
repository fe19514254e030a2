"""Engine, connector and exchange as real processes: what goes well, and what goes wrong."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from house import House, a_house
from waits import wait_until

from engine.clock import utc_now
from engine.db.connect import Connection
from engine.flatten import Scope, flatten

pytestmark = pytest.mark.slow


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
        wait_until(lambda: len(house.wire.events("SUBMIT_PENDING")) == 2, "second SUBMIT_PENDING")
        wait_until(
            lambda: (
                ("NEVER_ARRIVED",)
                in owner_conn.execute(
                    "SELECT outcome FROM broker_command WHERE order_id = %s", [lost]
                ).fetchall()
            ),
            "the broker's word that it never had it",
        )
        order = house.wire.order(lost)
        assert (order["status"], order["broker_order_id"]) == ("NEW", None)
        house.wait_event("RECONCILE")
        house.wait_settled()
        refs = [each["order_ref"] for each in house.exchange.books()["orders"]]
        assert refs == [str(reached)], "sent once each, whatever became of it"
        assert [house.wire.kinds(each) for each in (reached, lost)] == [["SUBMIT"], ["SUBMIT"]]


@pytest.mark.scenario("CONN-03")
def test_stale_working_order_triggers_openorders_reconcile(
    dsn: str, owner_conn: Connection, tmp_path: Path
) -> None:
    with a_house(dsn, owner_conn, tmp_path, faults="CONN-03") as house:
        house.staff()
        order_id = house.place(limit_price="90")
        house.wait_status(order_id, "ROUTED")
        with house.exchange.control() as control:
            control.set_price("AAPL", "89")
        assert house.exchange.books()["positions"] == {"AAPL": "10"}
        assert house.wire.events("STATUS_STALE") == []
        with house.exchange.paused():
            house.set_account(stale_seconds=1)
            house.wait_event("STATUS_STALE")
            order = house.wire.order(order_id)
            assert (order["status"], order["pending_reconcile"]) == ("ROUTED", True)
            # Asked in a transaction after the one that marked it.
            wait_until(lambda: ("STALE", None) in _questions(house), "the broker to be asked")
        house.wait_status(order_id, "FILLED")
        house.wait_settled()
        wait_until(
            lambda: not house.wire.order(order_id)["pending_reconcile"], "end of the question"
        )
        assert house.wire.position() == 10
        assert house.wire.kinds(order_id) == ["SUBMIT"], "it is asked about, not sent again"
        assert [each["order_ref"] for each in house.exchange.books()["orders"]] == [str(order_id)]
        assert house.programs["work"].codes().count("STATUS_STALE") == 1


def _questions(house: House) -> list[tuple[Any, ...]]:
    """Why the broker was asked, and what became of it."""
    return house.rows(
        """SELECT payload ->> 'why', outcome FROM broker_command
           WHERE user_id = %s AND kind = 'SNAPSHOT'"""
    )


@pytest.mark.scenario("HEART-01")
def test_heartbeat_failure_blocks_new_submissions_and_alerts(
    dsn: str, owner_conn: Connection, tmp_path: Path
) -> None:
    with a_house(dsn, owner_conn, tmp_path, faults="HEART-01") as house:
        house.set_account(heartbeat_seconds=4)
        house.staff()
        before = house.place(limit_price="90")
        wait_until(lambda: house.exchange.books()["orders"], "order at the exchange")
        # Whoever connects anew isn't answered either.
        with house.exchange.paused():
            house.wait_alert("HEARTBEAT_LOST")
            assert Decimal(house.wait_event("HEARTBEAT_LOST")["value"]) > 4
            assert _halts(house) == [("HEARTBEAT-DU1", "ACCOUNT", True)]
            refused = house.place(limit_price="91")
            order = house.wire.order(refused)
            assert (order["status"], order["reject_code"]) == ("REJECTED", "HALTED")
            assert house.wire.kinds(refused) == []
            assert house.wire.kinds(before) == ["SUBMIT"], "what works isn't cancelled for silence"
        wait_until(
            lambda: _halts(house) == [("HEARTBEAT-DU1", "ACCOUNT", False)], "end of the halt"
        )
        after = house.place()
        house.wait_status(after, "FILLED")
        house.wait_status(before, "ROUTED")
        house.wait_settled()
        refs = [each["order_ref"] for each in house.exchange.books()["orders"]]
        assert refs == [str(before), str(after)]
        assert "HEARTBEAT_LOST" in house.programs["work"].codes()


def _halts(house: House) -> list[tuple[Any, ...]]:
    """Every halt, with whether it is open."""
    return house.rows(
        "SELECT name, scope, lifted_at IS NULL FROM trading_halt WHERE user_id = %s ORDER BY name"
    )


def _flatten(house: House) -> None:
    asked = flatten(
        house.wire.conn, house.wire.run.user_id, Scope(), "leaving the market", "ann", utc_now()
    )
    assert not asked.repeated


def _flattened(house: House) -> tuple[str, Any]:
    """Status and summary of the one flatten, when it is finished."""

    def finished() -> list[tuple[Any, ...]]:
        return house.rows(
            """SELECT status, summary FROM flatten_request
               WHERE user_id = %s AND finished_at IS NOT NULL"""
        )

    ((status, summary),) = wait_until(finished, "end of the flatten")
    return status, summary


def _flatten_orders(house: House) -> list[tuple[Any, ...]]:
    return house.rows(
        """SELECT symbol, side, quantity, status, reject_source, reject_code FROM orders
           WHERE user_id = %s AND purpose = 'FLATTEN' ORDER BY symbol"""
    )


def _exposed(summary: Any) -> dict[str, Decimal]:
    return {each["symbol"]: Decimal(each["quantity"]) for each in summary["exposed"]}


@pytest.mark.scenario("FAIL-01")
def test_flatten_all_rejected_in_frozen_market_logs_and_alerts(
    dsn: str, owner_conn: Connection, tmp_path: Path
) -> None:
    with a_house(dsn, owner_conn, tmp_path, faults="FAIL-01") as house:
        house.staff()
        house.wait_status(house.place(quantity="10"), "FILLED")
        with house.exchange.control() as control:
            control.freeze(False)
            house.wait_status(house.place(symbol="MSFT", quantity="5"), "FILLED")
            control.freeze()
        _flatten(house)
        status, summary = _flattened(house)
        assert (status, summary["orders"], summary["filled"]) == ("PARTIAL", 2, 0)
        assert {each["status"] for each in summary["failed"]} == {"REJECTED"}
        assert _exposed(summary) == {"AAPL": 10, "MSFT": 5}
        orders = _flatten_orders(house)
        assert [order[:5] for order in orders] == [
            ("AAPL", "SELL", 10, "REJECTED", "BROKER"),
            ("MSFT", "SELL", 5, "REJECTED", "BROKER"),
        ]
        assert house.wait_event("FLATTEN_SUMMARY")["exposed"] == summary["exposed"]
        assert len(house.wire.events("FLATTEN_RECURSION")) == 2, "none led to another flatten"
        assert house.wire.events("FLATTEN_PARTIAL") == []
        assert house.wire.alerts().count("FLATTEN_SUMMARY") == 1
        ((words,),) = house.rows(
            "SELECT message FROM alert WHERE user_id = %s AND code = 'FLATTEN_SUMMARY'"
        )
        assert "10 AAPL" in words
        assert "5 MSFT" in words
        house.wait_settled()
        assert house.exchange.books()["positions"] == {"AAPL": "10", "MSFT": "5"}
        assert (house.wire.position(), house.wire.position("MSFT")) == (10, 5)
        assert "FLATTEN_SUMMARY" in house.programs["work"].codes()


@pytest.mark.scenario("FAIL-02")
def test_partial_flatten_rejection_reports_unclosed_positions(
    dsn: str, owner_conn: Connection, tmp_path: Path
) -> None:
    with a_house(dsn, owner_conn, tmp_path, faults="FAIL-02") as house:
        house.staff()
        working = house.place(limit_price="50")
        for symbol, quantity in (("AAPL", "10"), ("MSFT", "5")):
            house.wait_status(house.place(symbol=symbol, quantity=quantity), "FILLED")
        house.wait_status(working, "ROUTED")
        _flatten(house)
        status, summary = _flattened(house)
        assert (status, summary["orders"], summary["filled"]) == ("PARTIAL", 2, 1)
        assert _exposed(summary) == {"MSFT": 5}
        assert _flatten_orders(house) == [
            ("AAPL", "SELL", 10, "FILLED", None, None),
            ("MSFT", "SELL", 5, "REJECTED", "BROKER", "MARGIN"),
        ]
        assert house.status(working) == "CANCELED", "what works goes first"
        assert house.wait_event("FLATTEN_PARTIAL")["failed"] == summary["failed"]
        assert house.wire.alerts().count("FLATTEN_PARTIAL") == 1
        assert not {"FLATTEN_SUMMARY", "FLATTEN_POST_MARKET"} & set(house.wire.alerts())
        house.wait_settled()
        books = house.exchange.books()
        assert books["positions"] == {"MSFT": "5"}
        assert (house.wire.position(), house.wire.position("MSFT")) == (0, 5)
        sent = [each for each in books["orders"] if each["side"] == "SELL"]
        assert len(sent) == 2, "nothing is tried again by itself"
        assert "FLATTEN_PARTIAL" in house.programs["work"].codes()


@pytest.mark.scenario("FAIL-08")
def test_post_eod_flatten_fill_marked_post_market_and_alerted(
    dsn: str, owner_conn: Connection, tmp_path: Path
) -> None:
    with a_house(dsn, owner_conn, tmp_path, faults="FAIL-08") as house:
        house.staff()
        house.wait_status(house.place(quantity="10"), "FILLED")
        _flatten(house)
        ((order_id,),) = house.rows(
            "SELECT order_id FROM orders WHERE user_id = %s AND purpose = 'FLATTEN'"
        )
        house.wait_status(order_id, "ROUTED")
        assert "FLATTEN_POST_MARKET" not in house.wire.alerts()
        opens = datetime.now(UTC) + timedelta(hours=1)
        house.set_account(opens_at=opens.time(), closes_at=(opens + timedelta(hours=1)).time())
        with house.exchange.control() as control:
            control.close_session()
        house.wait_status(order_id, "FILLED")
        house.wait_alert("FLATTEN_POST_MARKET")
        told = house.wait_event("FLATTEN_POST_MARKET")
        ((execution_id, event_at),) = owner_conn.execute(
            "SELECT execution_id, event_at FROM execution WHERE order_id = %s", [order_id]
        ).fetchall()
        assert (told["symbol"], told["event_at"]) == ("AAPL", event_at.isoformat())
        assert house.rows(
            "SELECT subject FROM alert WHERE user_id = %s AND code = 'FLATTEN_POST_MARKET'"
        ) == [(f"{order_id}/{execution_id}",)]
        status, summary = _flattened(house)
        assert (status, _exposed(summary)) == ("DONE", {})
        house.wait_settled()
        assert house.wire.position() == 0
        assert house.exchange.books()["positions"] == {}
        assert "FLATTEN_POST_MARKET" in house.programs["work"].codes()
