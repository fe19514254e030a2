"""A connector is logged on inside the hours of its account, and at no other time."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest
from connector_cases import Desk, Wire, connector, wire
from waits import wait_until

from engine.db.connect import Connection

__all__ = ["wire"]

NEW_YORK = ZoneInfo("America/New_York")


class _Clock:
    """A clock that is set by hand."""

    def __init__(self, at: datetime) -> None:
        self.at = at

    def __call__(self) -> datetime:
        return self.at


@dataclass(frozen=True)
class Hours:
    """Whose account it is, and when it trades on the day that the connector's clock shows."""

    desk: Desk
    open_at: datetime
    close_at: datetime


@pytest.fixture(params=["hours", "calendar"])
def hours(owner_conn: Connection, request: pytest.FixtureRequest) -> Hours:
    """Twelve hours in New York, said in either way; it is now within them, as orders must be."""
    opens = (datetime.now(NEW_YORK) - timedelta(hours=6)).time().replace(second=0, microsecond=0)
    open_at = datetime.combine(date(2024, 1, 2), opens, NEW_YORK).astimezone(UTC)
    close_at = open_at + timedelta(hours=12)
    if request.param == "hours":
        times = {
            "opens_at": f"{opens:%H:%M}",
            "closes_at": f"{close_at.astimezone(NEW_YORK):%H:%M}",
        }
        return Hours(Desk(owner_conn, time_zone=NEW_YORK.key, **times), open_at, close_at)
    for days in range(2):
        day = timedelta(days=days)
        owner_conn.execute(
            """INSERT INTO calendar_session (calendar, session_date, open_at, close_at)
               VALUES ('XNYS', %s, %s, %s)""",
            [date(2024, 1, 2) + day, open_at + day, close_at + day],
        )
    return Hours(Desk(owner_conn, opens_at=None, closes_at=None), open_at, close_at)


@pytest.mark.scenario("OMS-SESSION")
def test_it_logs_on_at_the_open_and_off_at_the_close(dsn: str, hours: Hours, wire: Wire) -> None:
    desk, clock = hours.desk, _Clock(hours.open_at - timedelta(minutes=1))
    wire.clock = clock
    with connector(dsn, desk, wire, clock=clock):
        refs = desk.submits(2)
        wait_until(lambda: desk.lease()[0], "the lease to be taken")
        assert wire.connects == 0
        clock.at = hours.open_at
        desk.wait_until_done()
        assert wire.refs() == refs
        clock.at = hours.close_at
        desk.wait_for("LOGOUT")
        late = desk.submits(1)
        wait_until(lambda: wire.connected == 0, "the connection to end")
        wait_until(lambda: not desk.lease()[1], "the lease to say so")
        assert (wire.refs(), desk.undone()) == (refs, 1)
        clock.at = hours.open_at + timedelta(days=1)
        desk.wait_until_done()
        assert wire.refs() == refs + late
    assert desk.kinds() == ["CONNECTED", "LOGON", "DISCONNECTED", "LOGOUT"] * 2
    assert [each["reason"] for each in desk.events("LOGOUT")] == ["SESSION", "SHUTDOWN"]
    assert desk.events("LOGON")[0] == {"closes_at": hours.close_at.isoformat()}


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
    clock = _Clock(datetime(2024, 1, 2, 14, 30, tzinfo=UTC))
    wire.clock = clock
    with connector(dsn, desk, wire, clock=clock):
        wait_until(lambda: desk.lease()[0], "the lease to be taken")
        assert wire.connects == 0
        owner_conn.execute(
            """INSERT INTO calendar_session (calendar, session_date, open_at, close_at)
               VALUES ('XNYS', '2024-01-02', '2024-01-02 14:30+00', '2024-01-02 21:00+00')"""
        )
        desk.wait_for("CONNECTED")
