"""Many orders at once."""

from __future__ import annotations

import pytest
from connector_cases import Desk, Wire, connector

from engine.db.connect import Connection


@pytest.mark.scenario("EDGE-04")
def test_api_rate_limit_queues_and_throttles_without_disconnect(
    dsn: str, owner_conn: Connection
) -> None:
    # The pings of a second are messages too: they count, and are few.
    desk, wire = Desk(owner_conn, orders_per_second=10_000, messages_per_second=200), Wire()
    with connector(dsn, desk, wire):
        refs = desk.submits(250)
        desk.wait_until_done()
        told = desk.wait_for("THROTTLED", 50)
    assert wire.refs("SUBMIT") == refs
    assert (wire.connects, wire.closes) == (1, 1), "nobody was disconnected"
    assert len(desk.events("DISCONNECTED")) == 1, "but by us, at the end"
    at = [when for when, *_ in wire.sent]
    assert max(sum(start <= t < start + 1 for t in at) for start in at[::10]) <= 200
    assert at[-1] - at[0] >= 1
    assert {each["code"] for each in told} == {"RATE_LIMIT"}
    assert 50 <= len(told) <= 75, "those beyond the limit, and what pings cost"
    assert desk.rows(
        "SELECT count(*), count(*) FILTER (WHERE outcome = 'SENT') FROM broker_command "
        "WHERE user_id = %s"
    ) == [(250, 250)]
