"""The small OMS, feature by feature, and the kill switch: all of it through real processes."""

from __future__ import annotations

import json
from datetime import timedelta
from decimal import Decimal
from itertools import pairwise
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from house import EXCHANGE_CASH, House, a_house
from waits import wait_until

from engine.brokers.sessions import prepare
from engine.clock import utc_now
from engine.db.connect import Connection

pytestmark = pytest.mark.slow

# From when a session is stored until it opens, and how long it is: on a busy machine, too, there is
# time for what is to happen before and in it.
BEFORE_OPEN = timedelta(seconds=8)
SESSION = timedelta(seconds=10)


def _close_for_now(house: House) -> None:
    """Leave the calendar without a session until the day after tomorrow."""
    today = utc_now().date()
    prepare(house.wire.conn, house.wire.run.user_id, house.wire.account, today)
    house.wire.conn.execute(
        "DELETE FROM calendar_session WHERE calendar = '24/7' AND session_date BETWEEN %s AND %s",
        [today - timedelta(days=1), today + timedelta(days=1)],
    )


def _open_soon(house: House) -> Any:
    """Store a short session; returns when it opens."""
    opens = utc_now() + BEFORE_OPEN
    house.wire.conn.execute(
        """INSERT INTO calendar_session (calendar, session_date, open_at, close_at)
           VALUES ('24/7', %s, %s, %s)""",
        [opens.date(), opens, opens + SESSION],
    )
    return opens


def _holds_lease(house: House) -> bool:
    return house.rows(
        "SELECT count(*) FROM broker_lease WHERE user_id = %s AND expires_at > now()"
    ) == [(1,)]


def _terms_at_exchange(house: House) -> dict[str, Decimal]:
    return {
        each["order_ref"]: Decimal(each["limit_price"]) for each in house.exchange.books()["orders"]
    }


@pytest.mark.scenario("OMS-SESSION")
@pytest.mark.scenario("OMS-QUEUE")
def test_orders_wait_for_the_session_and_can_be_changed_meanwhile(
    dsn: str, owner_conn: Connection, tmp_path: Path
) -> None:
    with a_house(dsn, owner_conn, tmp_path) as house:
        _close_for_now(house)
        house.work()
        house.start("connect", "connect", "--user", "ann", "--account", "DU1")
        wait_until(lambda: _holds_lease(house), "connector that waits for the session")
        house.set_account(out_of_session="REFUSE")
        refused = house.wire.order(house.place(limit_price="90"))
        assert (refused["status"], refused["reject_source"], refused["reject_code"]) == (
            "REJECTED", "COMPLIANCE", "MARKET_CLOSED",
        )  # fmt: skip
        house.set_account(out_of_session="QUEUE")
        opens = _open_soon(house)
        kept, changed, taken_back = (house.place(limit_price=price) for price in ("90", "91", "92"))
        assert {house.status(each) for each in (kept, changed, taken_back)} == {"PENDING"}
        house.wire.modify(changed, limit_price="80")
        house.wire.cancel(taken_back)
        assert house.status(taken_back) == "CANCELED"
        assert (house.heard("LOGON"), house.sent_refs()) == ([], [])
        house.wait_status(kept, "ROUTED")
        house.wait_status(changed, "ROUTED")
        ((logged_on, sent),) = house.rows(
            """SELECT (SELECT min(received_at) FROM broker_event
                       WHERE user_id = u.user_id AND kind = 'LOGON'),
                      (SELECT min(sent_at) FROM broker_command WHERE user_id = u.user_id)
               FROM app_user u WHERE user_id = %s"""
        )
        assert opens <= logged_on <= sent
        assert _terms_at_exchange(house) == {str(kept): 90, str(changed): 80}
        wait_until(lambda: house.heard("LOGOUT"), "close")
        assert house.heard("LOGOUT") == [{"reason": "SESSION"}]
        wait_until(lambda: not house.is_connected(), "end of the connection")
        assert utc_now() >= opens + SESSION
        late = house.place(limit_price="93")
        assert (house.status(late), house.wire.order(late)["status_reason"]) == (
            "PENDING",
            "OUT_OF_SESSION",
        )
        assert str(late) not in house.sent_refs()
        assert [house.wire.kinds(each) for each in (kept, changed)] == [["SUBMIT"]] * 2


@pytest.mark.scenario("OMS-QUEUE")
@pytest.mark.scenario("OMS-THROTTLE")
def test_a_queue_survives_a_restart_and_what_waits_in_it_can_be_changed(
    dsn: str, owner_conn: Connection, tmp_path: Path
) -> None:
    with a_house(dsn, owner_conn, tmp_path) as house:
        house.set_account(orders_per_second=1)
        house.staff()
        orders = [house.place(limit_price=f"{90 + number}") for number in range(8)]
        house.wait_status(orders[0], "ROUTED")
        assert [house.programs[name].stop() for name in ("connect", "work")] == [0, 0]
        *kept, taken_back, changed = orders
        before = house.sent_refs()
        assert before == [str(each) for each in orders[: len(before)]]
        assert len(before) < len(kept), "it was stopped with a queue"
        assert {house.status(each) for each in (taken_back, changed)} <= {"NEW", "PENDING"}
        house.wire.cancel(taken_back)
        house.wire.modify(changed, limit_price="70", quantity="3")
        house.staff()
        house.wait_status(changed, "ROUTED")
        house.wait_settled()
        assert house.sent_refs() == [str(each) for each in (*kept, changed)]
        assert _terms_at_exchange(house)[str(changed)] == 70
        assert house.exchange.books()["orders"][-1]["quantity"] == "3"
        assert house.status(taken_back) == "CANCELED"
        sent = house.rows(
            """SELECT sent_at FROM broker_command
               WHERE user_id = %s AND kind = 'SUBMIT' AND sent_at IS NOT NULL ORDER BY sent_at"""
        )
        gaps = [later[0] - earlier[0] for earlier, later in pairwise(sent)]
        assert len(sent) == len(kept) + 1
        assert min(gaps) >= timedelta(seconds=1)


@pytest.mark.scenario("OMS-LATENCY")
@pytest.mark.scenario("OMS-STATUS")
def test_status_shows_session_queue_throttle_and_how_long_the_broker_took(
    dsn: str, owner_conn: Connection, tmp_path: Path
) -> None:
    with a_house(dsn, owner_conn, tmp_path) as house:
        house.staff()
        filled = [house.place(quantity="1") for _ in range(4)]
        for each in filled:
            house.wait_status(each, "FILLED")
        rests = house.place(limit_price="50")
        house.wait_status(rests, "ROUTED")
        house.wait_settled()
        code, printed = house.oms("status", "--user", "ann", "--json")
        assert code == 0
        (of_user,) = json.loads(printed)["users"]
        (account,) = of_user["status"]["accounts"]
        assert (account["account"], account["is_open"], account["connected"]) == ("DU1", True, True)
        assert (account["queued"], account["in_flight"], account["inbox_waiting"]) == (0, 0, 0)
        assert account["open_orders"] == 1
        latencies = {each["step"]: each for each in of_user["status"]["latencies"]}
        assert {step: each["orders"] for step, each in latencies.items()} == {
            "CLAIM": 5, "SEND": 5, "RESPONSE": 5, "FILL": 4,
        }  # fmt: skip
        for each in latencies.values():
            assert Decimal(0) <= Decimal(each["p50"]) <= Decimal(each["p95"])
            assert Decimal(each["p95"]) <= Decimal(each["p99"]) < 30
        assert "DU1" in house.oms("status")[1]
        assert house.oms("health")[0] == 0
        # What waits while nobody serves the account is the queue.
        assert house.programs["connect"].stop() == 0
        house.place(limit_price="51")
        ((of_user,),) = [json.loads(house.oms("status", "--json")[1])["users"]]
        (account,) = of_user["status"]["accounts"]
        assert (account["connected"], account["queued"]) == (False, 1)


def _start_with_a_queue(house: House) -> list[UUID]:
    """Start connector and worker, which have some seconds of orders to send."""
    house.set_account(orders_per_second=5)
    orders = [house.place(quantity="1") for _ in range(25)]
    house.work()
    house.connect()
    return orders


def _outcomes(house: House) -> dict[UUID, tuple[str, str | None]]:
    """Where every order stands, and what became of its submit."""
    return {
        order_id: (status, outcome)
        for order_id, status, outcome in house.rows(
            """SELECT o.order_id, o.status, c.outcome FROM orders o
               JOIN broker_command c ON c.user_id = o.user_id AND c.order_id = o.order_id
               WHERE o.user_id = %s AND c.kind = 'SUBMIT'"""
        )
    }


def _is_known(house: House) -> bool:
    """Whether it is known of every order what became of it."""
    return all(
        (status, outcome) == ("NEW", "NEVER_ARRIVED") or status == "FILLED"
        for status, outcome in _outcomes(house).values()
    )


def _books_agree(house: House) -> None:
    books = house.exchange.books()
    assert house.wire.position() == Decimal(books["positions"].get("AAPL", 0))
    assert house.wire.cash() - 100_000 == Decimal(books["cash"]["USD"]) - EXCHANGE_CASH


@pytest.mark.scenario("OMS-PERSISTENCE")
def test_killed_processes_go_on_where_they_were(
    dsn: str, owner_conn: Connection, tmp_path: Path
) -> None:
    with a_house(dsn, owner_conn, tmp_path) as house:
        orders = _start_with_a_queue(house)
        wait_until(lambda: len(house.heard("EXECUTION")) > 3, "some fills")
        house.programs["connect"].kill()
        house.programs["work"].kill()
        assert not _is_known(house), "they were killed in the middle of it"
        orders += [house.place(quantity="1") for _ in range(3)]
        house.end_lease()
        house.staff()
        wait_until(lambda: _is_known(house), "knowledge of every order")
        house.wait_settled()
        _books_agree(house)
        refs = house.sent_refs()
        assert len(refs) == len(set(refs)), "none is sent twice"
        filled = {str(key) for key, (status, _) in _outcomes(house).items() if status == "FILLED"}
        assert set(refs) == filled
        assert set(map(str, orders[-3:])) <= filled
        told = {report["execution_id"] for report in house.exchange.books()["executions"]}
        assert {each["execution_id"] for each in house.heard("EXECUTION")} == told
        assert house.rows("SELECT count(*) FROM execution WHERE user_id = %s") == [(len(told),)]


@pytest.mark.scenario("OMS-SHUTDOWN")
@pytest.mark.parametrize("signal_name", ["SIGINT", "SIGTERM"])
def test_a_signal_ends_connector_and_worker_cleanly(
    dsn: str, owner_conn: Connection, tmp_path: Path, signal_name: str
) -> None:
    with a_house(dsn, owner_conn, tmp_path) as house:
        orders = _start_with_a_queue(house)
        wait_until(lambda: len(house.heard("EXECUTION")) > 3, "some fills")
        connector, worker = house.programs["connect"], house.programs["work"]
        end = {"SIGINT": lambda each: each.interrupt(), "SIGTERM": lambda each: each.stop()}
        assert [end[signal_name](each) for each in (connector, worker)] == [0, 0]
        assert "Stopped; everything is stored" in connector.said()
        assert "Traceback" not in connector.said() + worker.said()
        # Nothing lost, nothing half-sent: what is claimed was sent, and the exchange has it.
        assert house.rows(
            """SELECT count(*) FROM broker_command
               WHERE user_id = %s AND claimed_by IS NOT NULL AND outcome <> 'SENT'"""
        ) == [(0,)]
        sent = house.rows(
            """SELECT order_id::text FROM broker_command
               WHERE user_id = %s AND kind = 'SUBMIT' AND claimed_by IS NOT NULL"""
        )
        refs = house.sent_refs()
        assert sorted(refs) == sorted(ref for (ref,) in sent)
        assert 3 < len(refs) < len(orders)
        told = {each["execution_id"] for each in house.heard("EXECUTION")}
        assert told == {each["execution_id"] for each in house.exchange.books()["executions"]}
        assert house.heard("DISCONNECTED") == [{"reason": "logged off"}]
        assert house.heard("LOGOUT") == [{"reason": "SHUTDOWN"}]
        assert not _holds_lease(house)
        assert house.oms("work", "--once")[0] == 0
        _books_agree(house)


def test_a_halt_cancels_and_refuses_until_it_is_lifted_by_name(
    dsn: str, owner_conn: Connection, tmp_path: Path
) -> None:
    with a_house(dsn, owner_conn, tmp_path) as house:
        house.staff()
        working = [house.place(limit_price=price) for price in ("90", "91")]
        for each in working:
            house.wait_status(each, "ROUTED")
        assert house.oms("halt", "--user", "ann", "--reason", "prices look wrong")[0] == 0
        for each in working:
            house.wait_status(each, "CANCELED")
        assert {each["status"] for each in house.exchange.books()["orders"]} == {"CANCELED"}
        _is_refused(house)
        # After a restart of everything it still holds.
        house.programs["work"].kill()
        assert house.programs["connect"].stop() == 0
        house.exchange.kill()
        house.exchange.start()
        house.staff()
        _is_refused(house)
        code, words = house.oms("halt", "lift", "another", "--user", "ann")
        assert (code, "no halt another is open" in words) == (1, True)
        _is_refused(house)
        assert house.sent_refs() == [str(each) for each in working]
        assert house.oms("halt", "lift", "user", "--user", "ann")[0] == 0
        house.wait_status(house.place(), "FILLED")
        house.wait_settled()
        assert house.exchange.books()["positions"] == {"AAPL": "10"}


def _is_refused(house: House) -> None:
    order_id = house.place(limit_price="90")
    order = house.wire.order(order_id)
    assert (order["status"], order["reject_code"]) == ("REJECTED", "HALTED")
    assert house.wire.kinds(order_id) == []


def test_up_does_it_all_in_one_process(
    dsn: str, owner_conn: Connection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMS_LOG", str(tmp_path / "log"))
    with a_house(dsn, owner_conn, tmp_path) as house:
        up = house.start("up", "up", "--every", "1")
        wait_until(house.is_connected, "connection")
        first = house.place(quantity="10")
        house.wait_status(first, "FILLED")
        rests = house.place(limit_price="90")
        house.wait_status(rests, "ROUTED")
        house.wait_settled()
        assert up.stop() == 0
        assert (
            house.rows("SELECT kind FROM broker_event WHERE user_id = %s AND applied_at IS NULL")
            == []
        ), "the connector's last words are taken in"
        assert "Traceback" not in up.said()
        assert house.heard("LOGOUT") == [{"reason": "SHUTDOWN"}]
        assert not _holds_lease(house)
        assert house.rows(
            "SELECT count(*) FROM broker_command WHERE user_id = %s AND done_at IS NULL"
        ) == [(0,)]
        up = house.start("up", "up", "--every", "1")
        wait_until(house.is_connected, "connection")
        second = house.place(quantity="5")
        house.wait_status(second, "FILLED")
        up.kill()
        # What happens meanwhile is known afterwards.
        with house.exchange.control() as control:
            control.set_price("AAPL", "89")
        house.end_lease()
        third = house.place(quantity="1")
        house.start("up", "up", "--every", "1")
        for order_id in (rests, third):
            house.wait_status(order_id, "FILLED")
        house.wait_settled()
        assert house.sent_refs() == [str(each) for each in (first, rests, second, third)]
        assert house.wire.position() == 26
        _books_agree(house)
        assert "CONNECTED" in (tmp_path / "log" / "up.jsonl").read_text(encoding="utf-8")
