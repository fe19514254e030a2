"""What another account may take over, and what it may not."""

from __future__ import annotations

import threading
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest
from broker_cases import Wire, a_broker_run
from snapshot_cases import Books
from waits import wait_until_blocked

from engine.db.connect import Connection, open_connection
from engine.routing import Rerouted, reroute

FIRST, SECOND, THIRD = "DU1", "DU2", "DU3"


@pytest.fixture
def routes(conn: Connection) -> Wire:
    return Wire(conn, a_broker_run(conn, accounts=(FIRST, SECOND, THIRD)))


def is_up(wire: Wire, account: str, *, heard_seconds_ago: int = 0, connected: bool = True) -> None:
    wire.conn.execute(
        """INSERT INTO broker_lease (user_id, account, holder, holder_name, taken_at, expires_at,
                                     connected, last_heard_at)
           VALUES (%(user)s, %(account)s, %(holder)s, 'test',
                   clock_timestamp() - make_interval(secs => %(ago)s),
                   clock_timestamp() + interval '1 hour', %(connected)s,
                   clock_timestamp() - make_interval(secs => %(ago)s))""",
        {
            "user": wire.run.user_id,
            "account": account,
            "holder": wire.holder,
            "ago": heard_seconds_ago,
            "connected": connected,
        },
    )


def later(wire: Wire, seconds: int = 31) -> datetime:
    row = wire.conn.execute("SELECT clock_timestamp()").fetchone()
    assert row is not None
    at: datetime = row[0] + timedelta(seconds=seconds)
    return at


def moved(wire: Wire, seconds: int = 31) -> list[Rerouted]:
    return reroute(wire.conn, wire.run.user_id, later(wire, seconds))


def outcomes(wire: Wire, order_id: UUID) -> list[tuple[Any, ...]]:
    return wire.conn.execute(
        """SELECT account, outcome FROM broker_command
           WHERE user_id = %s AND order_id = %s AND kind = 'SUBMIT' ORDER BY created_at""",
        [wire.run.user_id, order_id],
    ).fetchall()


def test_what_waits_for_an_account_that_is_down_goes_elsewhere(routes: Wire) -> None:
    is_up(routes, SECOND)
    order_id = routes.place()
    assert [(each.account, each.next_account) for each in moved(routes)] == [(FIRST, SECOND)]
    assert routes.order(order_id)["account"] == SECOND
    assert outcomes(routes, order_id) == [(FIRST, "WITHDRAWN"), (SECOND, None)]
    ((_, told),) = routes.events("ROUTE_FAILOVER")
    assert told == {"from": FIRST, "to": SECOND, "why": "ACCOUNT_DOWN"}
    assert routes.alerts() == ["ROUTE_FAILOVER"]
    assert moved(routes) == []


def test_it_waits_until_the_account_has_been_down_for_long_enough(routes: Wire) -> None:
    is_up(routes, SECOND)
    routes.place()
    assert moved(routes, 29) == []
    assert len(moved(routes, 31)) == 1


def test_the_first_account_that_is_up_takes_it(routes: Wire) -> None:
    is_up(routes, THIRD)
    order_id = routes.place()
    assert [each.next_account for each in moved(routes)] == [THIRD]
    assert outcomes(routes, order_id) == [(FIRST, "WITHDRAWN"), (THIRD, None)]


def test_nothing_goes_where_nobody_is(routes: Wire) -> None:
    order_id = routes.place()
    assert moved(routes) == []
    assert outcomes(routes, order_id) == [(FIRST, None)]


def test_nothing_leaves_an_account_that_is_up(routes: Wire) -> None:
    is_up(routes, FIRST)
    is_up(routes, SECOND)
    routes.place()
    assert moved(routes) == []


def test_an_account_whose_broker_went_away_is_down(routes: Wire) -> None:
    is_up(routes, FIRST, connected=False)
    is_up(routes, SECOND)
    routes.place()
    assert moved(routes, 29) == []
    assert len(moved(routes, 31)) == 1


@pytest.mark.parametrize("outcome", [None, "SENT", "UNKNOWN"])
def test_what_may_have_arrived_stays(routes: Wire, outcome: str | None) -> None:
    is_up(routes, SECOND)
    order_id = routes.place()
    routes.conn.execute(
        """UPDATE broker_command SET claimed_by = %s, claimed_at = clock_timestamp(),
                  sent_at = CASE WHEN %s::text = 'SENT' THEN clock_timestamp() END,
                  done_at = CASE WHEN %s::text IS NOT NULL THEN clock_timestamp() END,
                  outcome = %s
           WHERE user_id = %s AND order_id = %s""",
        [uuid4(), outcome, outcome, outcome, routes.run.user_id, order_id],
    )
    assert moved(routes, 100_000) == []
    with pytest.raises(psycopg.Error) as refused, routes.conn.transaction():
        routes.conn.execute(
            "UPDATE orders SET account = %s WHERE order_id = %s", [SECOND, order_id]
        )
    assert refused.value.diag.constraint_name == "orders_terms_fixed"


def test_what_never_arrived_goes_elsewhere(routes: Wire) -> None:
    is_up(routes, FIRST)
    is_up(routes, SECOND)
    order_id = routes.place()
    routes.conn.execute(
        """UPDATE broker_command SET claimed_by = %s, claimed_at = clock_timestamp(),
                  done_at = clock_timestamp(), outcome = 'UNKNOWN'
           WHERE user_id = %s AND order_id = %s""",
        [routes.holder, routes.run.user_id, order_id],
    )
    Books(routes).reconcile()
    assert [each.why for each in moved(routes, 0)] == ["NEVER_ARRIVED"]
    assert outcomes(routes, order_id) == [(FIRST, "NEVER_ARRIVED"), (SECOND, None)]
    ((_, told),) = routes.events("ROUTE_FAILOVER")
    assert told["why"] == "NEVER_ARRIVED"


def test_a_connector_that_is_just_taking_it_keeps_it(dsn: str, owner_conn: Connection) -> None:
    wire = Wire(owner_conn, a_broker_run(owner_conn, accounts=(FIRST, SECOND)))
    is_up(wire, SECOND)
    order_id = wire.place()
    at, done = later(wire), []
    with open_connection(dsn) as taking, open_connection(dsn) as routing:
        thread = threading.Thread(
            target=lambda: done.append(reroute(routing, wire.run.user_id, at))
        )
        with taking.transaction():
            taking.execute(
                "UPDATE broker_command SET claimed_by = %s, claimed_at = clock_timestamp() "
                "WHERE order_id = %s",
                [wire.holder, order_id],
            )
            thread.start()
            wait_until_blocked(wire.conn, routing, by=taking)
        thread.join()
    assert done == [[]]
    assert wire.order(order_id)["account"] == FIRST
    assert outcomes(wire, order_id) == [(FIRST, None)]
