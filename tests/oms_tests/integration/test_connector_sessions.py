"""A connector is logged on inside the hours of its account, and at no other time."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from connector_cases import Desk, Wire, connector, wire
from waits import wait_until

from engine.db.connect import Connection

__all__ = ["wire"]

OPEN = datetime(2024, 1, 2, 14, 30, tzinfo=UTC)
CLOSE = datetime(2024, 1, 2, 21, 0, tzinfo=UTC)


class _Clock:
    """A clock that is set by hand."""

    def __init__(self, at: datetime) -> None:
        self.at = at

    def __call__(self) -> datetime:
        return self.at


@pytest.fixture(params=["hours", "calendar"])
def desk(owner_conn: Connection, request: pytest.FixtureRequest) -> Desk:
    """An account that trades from 9:30 to 16:00 in New York, said in either way."""
    if request.param == "hours":
        hours = {"opens_at": "09:30", "closes_at": "16:00", "time_zone": "America/New_York"}
        return Desk(owner_conn, **hours)
    owner_conn.execute(
        """INSERT INTO calendar_session (calendar, session_date, open_at, close_at) VALUES
           ('XNYS', '2024-01-02', '2024-01-02 14:30+00', '2024-01-02 21:00+00'),
           ('XNYS', '2024-01-03', '2024-01-03 14:30+00', '2024-01-03 21:00+00')"""
    )
    return Desk(owner_conn, opens_at=None, closes_at=None)


@pytest.mark.scenario("OMS-SESSION")
def test_it_logs_on_at_the_open_and_off_at_the_close(dsn: str, desk: Desk, wire: Wire) -> None:
    clock = _Clock(OPEN - timedelta(minutes=1))
    wire.clock = clock
    with connector(dsn, desk, wire, clock=clock):
        refs = desk.submits(2)
        wait_until(lambda: desk.lease()[0], "the lease to be taken")
        assert wire.connects == 0
        clock.at = OPEN
        desk.wait_until_done()
        assert wire.refs() == refs
        clock.at = CLOSE
        desk.wait_for("LOGOUT")
        late = desk.submits(1)
        wait_until(lambda: wire.connected == 0, "the connection to end")
        wait_until(lambda: not desk.lease()[1], "the lease to say so")
        assert (wire.refs(), desk.undone()) == (refs, 1)
        clock.at = OPEN + timedelta(days=1)
        desk.wait_until_done()
        assert wire.refs() == refs + late
    assert desk.kinds() == ["CONNECTED", "LOGON", "DISCONNECTED", "LOGOUT"] * 2
    assert [each["reason"] for each in desk.events("LOGOUT")] == ["SESSION", "SHUTDOWN"]
    assert desk.events("LOGON")[0] == {"closes_at": CLOSE.isoformat()}


def test_what_may_not_go_yet_waits(dsn: str, owner_conn: Connection, wire: Wire) -> None:
    desk = Desk(owner_conn)
    later, at_once = desk.orders(2)
    with connector(dsn, desk, wire):
        desk.command("SUBMIT", later, not_before=datetime.now(UTC) + timedelta(hours=1))
        desk.command("SUBMIT", at_once)
        wait_until(lambda: desk.undone() == 1, "the other one")
        assert wire.refs() == [str(at_once)]


def test_without_a_stored_session_it_stays_logged_off(
    dsn: str, owner_conn: Connection, wire: Wire
) -> None:
    desk = Desk(owner_conn, opens_at=None, closes_at=None)
    clock = _Clock(OPEN)
    wire.clock = clock
    with connector(dsn, desk, wire, clock=clock):
        wait_until(lambda: desk.lease()[0], "the lease to be taken")
        assert wire.connects == 0
        owner_conn.execute(
            """INSERT INTO calendar_session (calendar, session_date, open_at, close_at)
               VALUES ('XNYS', '2024-01-02', '2024-01-02 14:30+00', '2024-01-02 21:00+00')"""
        )
        desk.wait_for("CONNECTED")
