"""The connector between a real database and a broker that does what the test says."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from connector_cases import QUICK, Desk, Running, Wire, connector, desk, wire
from waits import wait_until

from engine.brokers.connector import Ended
from engine.brokers.protocol import BrokerUnavailable, MessageKind
from engine.db.connect import Connection
from engine.errors import BadInput, LeaseHeld

__all__ = ["desk", "wire"]


# --- Sending ----------------------------------------------------------------------------------


def test_commands_are_sent_once_in_order_and_said_to_be_sent(
    dsn: str, desk: Desk, wire: Wire
) -> None:
    with connector(dsn, desk, wire):
        refs = desk.submits(30)
        desk.wait_until_done()
        assert wire.refs("SUBMIT") == refs
    assert set(desk.outcomes().values()) == {"SENT"}
    assert desk.rows(
        """SELECT count(*) FROM broker_command
           WHERE user_id = %s AND claimed_at <= done_at AND sent_at <= done_at"""
    ) == [(30,)]


def test_what_waits_since_before_the_start_goes_by_priority_with_cancels_first(
    dsn: str, desk: Desk, wire: Wire
) -> None:
    late, cancelled, urgent = desk.orders(3)
    desk.command("SUBMIT", late)
    desk.command("CANCEL", cancelled)
    desk.command("SUBMIT", urgent, priority=0)
    with connector(dsn, desk, wire):
        desk.wait_until_done()
    assert wire.refs() == [str(urgent), str(cancelled), str(late)]


def test_a_command_waits_for_the_one_before_it_of_the_same_order(
    dsn: str, desk: Desk, wire: Wire
) -> None:
    held, other = desk.orders(2)
    gate = threading.Event()

    async def hold(kind: str, ref: str) -> None:
        if (kind, ref) == ("SUBMIT", str(held)):
            await asyncio.to_thread(gate.wait)

    wire.before = hold
    with connector(dsn, desk, wire):
        desk.command("SUBMIT", held)
        modify = desk.command("MODIFY", held, 2)
        desk.command("SUBMIT", other)
        wait_until(lambda: sum(map(bool, _claims(desk))) == 2, "both submits to be claimed")
        assert desk.outcomes()[modify] is None
        gate.set()
        desk.wait_until_done()
    assert [(kind, ref) for _, kind, ref in wire.sent if ref == str(held)] == [
        ("SUBMIT", str(held)),
        ("MODIFY", str(held)),
    ]


def _claims(desk: Desk) -> list[Any]:
    rows = desk.rows("SELECT claimed_by FROM broker_command WHERE user_id = %s")
    return [claimed_by for (claimed_by,) in rows]


def test_what_is_no_order_is_refused_and_told(dsn: str, desk: Desk, wire: Wire) -> None:
    bad, good = desk.orders(2)
    command = desk.command("SUBMIT", bad, payload={"symbol": "AAPL"})
    with connector(dsn, desk, wire):
        desk.command("SUBMIT", good)
        desk.wait_until_done()
        (told,) = desk.wait_for("SEND_FAILED")
    assert told["command_id"] == str(command)
    assert "lacks" in told["error"]
    assert desk.outcomes()[command] == "REFUSED"
    assert wire.refs() == [str(good)]


def test_what_the_adapter_refuses_is_told_and_the_connection_stays(
    dsn: str, desk: Desk, wire: Wire
) -> None:
    def refuse(kind: str, ref: str) -> None:
        raise BadInput("no such type of order here")

    wire.before = refuse
    with connector(dsn, desk, wire):
        desk.submits(1)
        assert desk.wait_for("SEND_FAILED")[0]["error"] == "no such type of order here"
        desk.wait_until_done()
    assert list(desk.outcomes().values()) == ["REFUSED"]
    assert wire.connects == 1


# --- Hearing ----------------------------------------------------------------------------------


def test_what_the_broker_says_is_stored_in_its_order(dsn: str, desk: Desk, wire: Wire) -> None:
    with connector(dsn, desk, wire):
        for number in range(2_500):
            wire.say(
                MessageKind.EXECUTION,
                "ref",
                execution_id=f"X{number}",
                price="100.25",
                number=number,
            )
        stored = desk.wait_for("EXECUTION", 2_500)
    assert [row["number"] for row in stored] == list(range(2_500))
    assert desk.rows("SELECT max(number) = count(*) FROM broker_event WHERE user_id = %s") == [
        (True,)
    ]
    assert desk.rows(
        """SELECT order_ref, execution_id FROM broker_event
           WHERE user_id = %s AND kind = 'EXECUTION' ORDER BY number LIMIT 1"""
    ) == [("ref", "X0")]


def test_a_message_that_no_row_can_hold_takes_no_other_with_it(
    dsn: str, desk: Desk, wire: Wire
) -> None:
    with connector(dsn, desk, wire):
        wire.say(MessageKind.NOTICE, code="1", message="before")
        wire.say(MessageKind.NOTICE, code="2", message="nul \x00 inside")
        wire.say(MessageKind.EXECUTION, "nul \x00 in the reference", execution_id="X")
        wire.say(MessageKind.NOTICE, code="3", message="after")
        told = desk.wait_for("NOTICE", 4)
    assert [each["code"] for each in told] == ["1", "UNREADABLE", "UNREADABLE", "3"]
    assert "nul" in told[1]["was"]


def test_a_snapshot_comes_in_parts_and_a_what_if_with_its_command(
    dsn: str, desk: Desk, wire: Wire, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.brokers.payloads.SNAPSHOT_ROWS_MAX", 4)
    wire.positions = 10
    with connector(dsn, desk, wire):
        asked = desk.command("SNAPSHOT", priority=1)
        what_if = desk.command("WHAT_IF", priority=0)
        parts = desk.wait_for("SNAPSHOT", 3)
        (answer,) = desk.wait_for("WHAT_IF")
        desk.wait_until_done()
    assert [(part["snapshot_id"], part["part"], part["parts"]) for part in parts] == [
        (str(asked), number, 3) for number in (1, 2, 3)
    ]
    assert [len(part["positions"]) for part in parts] == [4, 4, 2]
    assert parts[0]["cash"] == {"USD": "100.25"}
    assert parts[0]["positions"][1] == {"symbol": "S1", "quantity": "1", "avg_cost": None}
    assert answer == {"command_id": str(what_if), "initial_margin": "3.0", "accepted": True}


def test_how_the_broker_is_doing_stands_in_the_lease(dsn: str, desk: Desk, wire: Wire) -> None:
    wire.clock = lambda: datetime.now(UTC) - timedelta(seconds=40)
    with connector(dsn, desk, wire):
        wait_until(lambda: desk.lease()[1], "the lease to say that it is connected")
        valid, _, heard_at, skew = desk.lease()
        assert valid
        assert datetime.now(UTC) - heard_at < timedelta(seconds=30)
        assert timedelta(seconds=39) < skew < timedelta(seconds=41)
    assert desk.lease()[:2] == (False, False)


def test_a_short_heartbeat_is_kept_though_nothing_is_said(
    dsn: str, owner_conn: Connection, wire: Wire
) -> None:
    desk = Desk(owner_conn, heartbeat_seconds=1)
    # Left alone it would ask, and tell that it was answered, once in ten minutes.
    with connector(dsn, desk, wire, pace=replace(QUICK, lease=600, ping=600)):
        wait_until(lambda: desk.lease()[1], "the lease to say that it is connected")
        before = desk.lease()[2]
        wait_until(lambda: desk.lease()[2] > before, "the broker's next sign of life")


# --- Connections that break -------------------------------------------------------------------


@pytest.mark.parametrize("wrote", [False, True], ids=["before", "after"])
def test_a_command_on_a_connection_that_breaks_is_unknown_and_never_sent_again(
    dsn: str, desk: Desk, wire: Wire, wrote: bool
) -> None:
    def cut(kind: str, ref: str) -> None:
        wire.before = wire.after = None
        raise BrokerUnavailable("the wire was cut")

    if wrote:
        wire.after = cut
    else:
        wire.before = cut
    with connector(dsn, desk, wire):
        (lost,) = desk.submits(1)
        desk.wait_until_done()
        (there,) = desk.submits(1)
        desk.wait_until_done()
        desk.wait_for("CONNECTED", 2)
    assert wire.refs() == ([lost, there] if wrote else [there])
    assert sorted(map(str, desk.outcomes().values())) == ["SENT", "UNKNOWN"]


def test_what_was_claimed_and_certainly_not_written_never_arrived(
    dsn: str, desk: Desk, wire: Wire
) -> None:
    gate = threading.Event()

    async def hold(kind: str, ref: str) -> None:
        await asyncio.to_thread(gate.wait)

    wire.before = hold
    with connector(dsn, desk, wire):
        desk.submits(3)
        wait_until(lambda: all(_claims(desk)), "all to be claimed")
        wire.drop()
        desk.wait_until_done()
        told = desk.wait_for("SEND_FAILED", 2)
        gate.set()
        desk.wait_for("CONNECTED", 2)
    outcomes = list(desk.outcomes().values())
    assert sorted(map(str, outcomes)) == ["NEVER_ARRIVED", "NEVER_ARRIVED", "UNKNOWN"]
    assert len(told) == 2
    assert wire.refs() == []


def test_it_connects_again_later_and_later(dsn: str, desk: Desk, wire: Wire) -> None:
    wire.refuse_connects = 5
    with connector(dsn, desk, wire):
        desk.wait_for("CONNECTED")
        assert wire.connects == 6
        wire.drop()
        desk.wait_for("CONNECTED", 2)
    assert desk.kinds() == [
        "CONNECTED", "LOGON", "DISCONNECTED", "CONNECTED", "DISCONNECTED", "LOGOUT",
    ]  # fmt: skip
    assert desk.events("DISCONNECTED")[0] == {"reason": "the wire was cut"}


def test_the_brokers_own_goodbye_is_not_said_twice(dsn: str, desk: Desk, wire: Wire) -> None:
    with connector(dsn, desk, wire):
        wire.say(MessageKind.DISCONNECTED, reason="nightly restart")
        desk.wait_for("CONNECTED", 2)
        assert desk.events("DISCONNECTED") == [{"reason": "nightly restart"}]


def test_silence_breaks_the_connection(dsn: str, owner_conn: Connection, wire: Wire) -> None:
    desk = Desk(owner_conn, heartbeat_seconds=1)
    with connector(dsn, desk, wire):
        wire.is_silent = True
        assert desk.wait_for("DISCONNECTED") == [{"reason": "nothing was heard for 2 s"}]
        wire.is_silent = False
        desk.wait_for("CONNECTED", 2)


# --- Whose account it is ----------------------------------------------------------------------


def test_a_second_connector_is_told_who_holds_the_account(dsn: str, desk: Desk, wire: Wire) -> None:
    with connector(dsn, desk, wire):
        second = Running(dsn, desk, Wire())
        with pytest.raises(LeaseHeld, match="is held by a test until"):
            second.join()
        assert not desk.events("DISCONNECTED")
    third = Wire()
    with connector(dsn, desk, third):
        assert third.connected == 1


def test_a_stolen_session_ends_the_first_process(dsn: str, desk: Desk, wire: Wire) -> None:
    with connector(dsn, desk, wire) as running:
        wire.say(MessageKind.STOLEN, by="client 7")
        assert running.join() is Ended.CONNECTION_STOLEN
    assert wire.closes == 1
    assert desk.events("STOLEN") == [{"by": "client 7"}]
    assert desk.rows("SELECT code, account FROM alert WHERE user_id = %s") == [
        ("CONNECTION_STOLEN", desk.account)
    ]
    assert not desk.lease()[0]


def test_a_lease_that_another_took_ends_it(dsn: str, desk: Desk, wire: Wire) -> None:
    with connector(dsn, desk, wire) as running:
        desk.rows(
            """UPDATE broker_lease SET holder = gen_random_uuid(), holder_name = 'the other',
               expires_at = clock_timestamp() + interval '1 hour'
               WHERE user_id = %s RETURNING 1"""
        )
        assert running.join() is Ended.CONNECTION_STOLEN
    assert desk.rows("SELECT message LIKE '%%the other%%' FROM alert WHERE user_id = %s") == [
        (True,)
    ]
    assert desk.lease()[0], "the other's lease is left alone"


@pytest.mark.parametrize("later", [False, True], ids=["at once", "later"])
def test_another_account_ends_it(dsn: str, desk: Desk, wire: Wire, later: bool) -> None:
    if not later:
        wire.account = "DU2"
    running = Running(dsn, desk, wire)
    if later:
        desk.wait_for("CONNECTED")
        wire.say(MessageKind.CONNECTED, account=desk.account)
        wire.say(MessageKind.CONNECTED, account="DU2")
    assert running.join() is Ended.ACCOUNT_MISMATCH
    assert "DU2" in desk.events("ACCOUNT_MISMATCH")[0]["message"]
    assert desk.rows("SELECT code FROM alert WHERE user_id = %s") == [("ACCOUNT_MISMATCH",)]
    assert len(desk.events("CONNECTED")) == int(later)


# --- The database goes away -------------------------------------------------------------------


def test_it_goes_on_after_its_database_connections_were_cut(
    dsn: str, desk: Desk, wire: Wire
) -> None:
    with connector(dsn, desk, wire):
        first = desk.submits(1)
        desk.wait_until_done()
        for number in range(3):
            desk.conn.execute(
                """SELECT pg_terminate_backend(pid) FROM pg_stat_activity
                   WHERE datname = current_database() AND usename = current_user
                     AND pid <> pg_backend_pid()"""
            )
            wire.say(MessageKind.NOTICE, code=str(number), message="")
            wait_until(lambda: len(desk.events("NOTICE")) > number, "the notice")  # noqa: B023
        rest = desk.submits(10)
        desk.wait_until_done()
    assert wire.refs() == first + rest
    assert [each["code"] for each in desk.events("NOTICE")] == ["0", "1", "2"]
    assert set(desk.outcomes().values()) == {"SENT"}
