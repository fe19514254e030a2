"""When an account trades: hours of its own in its time zone, or its calendar's sessions."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import psycopg
import pytest
from market_cases import PLACE
from schema_cases import acting_as, assert_refused, findings, rows, said

from engine.db.connect import Connection
from engine.errors import BadInput, typed

_TIME = datetime.fromisoformat


def _account(conn: Connection, **columns: str) -> None:
    """Give Dan's account other hours."""
    changes = ", ".join(f"{column} = %s" for column in columns)
    conn.execute(
        f"UPDATE broker_account SET {changes} WHERE account = 'A1'".encode(), [*columns.values()]
    )


def _hours(conn: Connection, at: str) -> tuple[bool, datetime | None]:
    """Whether Dan's account is open, and when it opens next, in UTC."""
    ((is_open, opens_at),) = rows(
        conn, f"SELECT is_open, opens_at FROM account_hours(:'dan', 'A1', '{at}')"
    )
    return is_open, opens_at and opens_at.astimezone(UTC)


@pytest.mark.parametrize(
    ("at", "is_open", "opens_at"),
    [
        ("2024-01-10 09:29:59.999999+00", False, "2024-01-10T09:30:00+00:00"),
        ("2024-01-10 09:30+00", True, "2024-01-11T09:30:00+00:00"),
        ("2024-01-10 15:59:59.999999+00", True, "2024-01-11T09:30:00+00:00"),
        ("2024-01-10 16:00+00", False, "2024-01-11T09:30:00+00:00"),
        ("2024-01-10 23:59+00", False, "2024-01-11T09:30:00+00:00"),
        # Another zone's clock says the same moment.
        ("2024-01-10 11:30+02", True, "2024-01-11T09:30:00+00:00"),
    ],
)
def test_hours_begin_with_their_first_moment_and_end_before_their_last(
    market: Connection, at: str, is_open: bool, opens_at: str
) -> None:
    _account(market, opens_at="09:30", closes_at="16:00")
    assert _hours(market, at) == (is_open, _TIME(opens_at))


@pytest.mark.parametrize(
    ("at", "is_open", "opens_at"),
    [
        ("2024-01-10 17:59+00", False, "2024-01-10T18:00:00+00:00"),
        ("2024-01-10 18:00+00", True, "2024-01-11T18:00:00+00:00"),
        ("2024-01-11 00:00+00", True, "2024-01-11T18:00:00+00:00"),
        ("2024-01-11 16:59+00", True, "2024-01-11T18:00:00+00:00"),
        ("2024-01-11 17:00+00", False, "2024-01-11T18:00:00+00:00"),
    ],
)
def test_hours_may_last_past_midnight(
    market: Connection, at: str, is_open: bool, opens_at: str
) -> None:
    _account(market, opens_at="18:00", closes_at="17:00")
    assert _hours(market, at) == (is_open, _TIME(opens_at))


@pytest.mark.parametrize(
    ("zone", "at", "is_open", "opens_at"),
    [
        ("America/New_York", "2024-01-10 14:29+00", False, "2024-01-10T14:30:00+00:00"),
        ("America/New_York", "2024-01-10 14:30+00", True, "2024-01-11T14:30:00+00:00"),
        # An hour earlier in summer, also across the night in which the clocks change.
        ("America/New_York", "2024-07-10 13:30+00", True, "2024-07-11T13:30:00+00:00"),
        ("America/New_York", "2024-03-09 22:00+00", False, "2024-03-10T13:30:00+00:00"),
        ("America/New_York", "2024-11-02 21:00+00", False, "2024-11-03T14:30:00+00:00"),
        # Its day is another than UTC's.
        ("Pacific/Auckland", "2024-01-10 20:29+00", False, "2024-01-10T20:30:00+00:00"),
        ("Pacific/Auckland", "2024-01-10 20:30+00", True, "2024-01-11T20:30:00+00:00"),
        ("Pacific/Auckland", "2024-01-11 02:59+00", True, "2024-01-11T20:30:00+00:00"),
        ("Pacific/Auckland", "2024-01-11 03:00+00", False, "2024-01-11T20:30:00+00:00"),
    ],
)
def test_hours_are_of_their_time_zone(
    market: Connection, zone: str, at: str, is_open: bool, opens_at: str
) -> None:
    _account(market, opens_at="09:30", closes_at="16:00", time_zone=zone)
    assert _hours(market, at) == (is_open, _TIME(opens_at))


@pytest.mark.parametrize(
    ("at", "is_open", "opens_at"),
    [
        ("2024-01-04 14:29+00", False, "2024-01-04T14:30:00+00:00"),
        ("2024-01-04 14:30+00", True, "2024-01-05T14:30:00+00:00"),
        ("2024-01-05 21:00+00", False, "2024-01-08T14:30:00+00:00"),  # over the weekend
        ("2024-01-08 21:00+00", False, None),  # nothing further is known
    ],
)
def test_without_hours_of_its_own_an_account_keeps_its_calendars_sessions(
    market: Connection, at: str, is_open: bool, opens_at: str | None
) -> None:
    # The sessions of the world are written in the time zone of its connection.
    market.execute("DELETE FROM calendar_session")
    market.execute(
        "INSERT INTO calendar_session (calendar, session_date, open_at, close_at) "
        "SELECT 'XNYS', day, (day || ' 14:30Z')::timestamptz, (day || ' 21:00Z')::timestamptz "
        "FROM unnest('{2024-01-03,2024-01-04,2024-01-05,2024-01-08}'::date[]) AS day"
    )
    _account(market, calendar="XNYS")
    assert _hours(market, at) == (is_open, opens_at and _TIME(opens_at))


def test_a_calendar_of_which_nothing_is_known_closes_nothing(market: Connection) -> None:
    assert _hours(market, "2024-01-06 03:00+00") == (True, None)


def test_hours_of_its_own_win_over_the_calendar(market: Connection) -> None:
    _account(market, calendar="XNYS", opens_at="00:00", closes_at="01:00")
    assert _hours(market, "2024-01-04 00:30+00")[0]
    assert not _hours(market, "2024-01-04 15:00+00")[0]


@pytest.mark.parametrize(
    "change", ["opens_at = '09:00'", "closes_at = '09:00'", "opens_at = '09:00', closes_at = '9:0'"]
)
def test_hours_have_two_ends(market: Connection, change: str) -> None:
    for role in ("oms_owner", "oms_engine"):
        assert_refused(
            market, f"UPDATE broker_account SET {change}", role, "broker_account_hours_whole"
        )


def test_a_time_zone_must_be_one(market: Connection) -> None:
    with pytest.raises(psycopg.DataError) as caught, market.transaction():
        market.execute("UPDATE broker_account SET time_zone = 'Middle/Earth'")
    assert isinstance(typed(caught.value), BadInput)


# --- What becomes of an order ------------------------------------------------------------------

_CLOSED = (
    "UPDATE broker_account SET opens_at = (clock_timestamp() AT TIME ZONE 'UTC')::time + '2 hours',"
    " closes_at = (clock_timestamp() AT TIME ZONE 'UTC')::time + '3 hours'"
)


def _placed(conn: Connection, quantity: int = 1) -> tuple[Any, ...]:
    with acting_as(conn, "oms_engine"):
        conn.execute(
            said(
                f"{PLACE}) VALUES (:'dan', :'deals', :'new_order', 'AAPL', 'BUY', {quantity}, "
                "'LIMIT', 20, :'t1')"
            )
        )
    assert findings(conn) == []
    ((*placed,),) = rows(
        conn,
        "SELECT status, status_reason, reject_source, reject_code FROM orders "
        "WHERE order_id = :'new_order'",
    )
    return tuple(placed)


def _waits(conn: Connection) -> list[tuple[Any, ...]]:
    """Of what was sent, whether it waits for the hours to begin."""
    return rows(
        conn,
        "SELECT c.not_before = (account_hours(c.user_id, c.account, clock_timestamp())).opens_at "
        "FROM broker_command c WHERE c.order_id = :'new_order'",
    )


def test_in_its_hours_an_order_goes_at_once(market: Connection) -> None:
    assert _placed(market) == ("NEW", None, None, None)
    assert _waits(market) == [(None,)]


def test_out_of_hours_an_order_waits_for_them(market: Connection) -> None:
    market.execute(_CLOSED)
    assert _placed(market) == ("PENDING", "OUT_OF_SESSION", None, None)
    assert _waits(market) == [(True,)]


def test_out_of_hours_an_order_is_refused_where_that_is_wanted(market: Connection) -> None:
    market.execute(_CLOSED)
    _account(market, out_of_session="REFUSE")
    status, reason, source, code = _placed(market)
    assert (status, source, code) == ("REJECTED", "COMPLIANCE", "MARKET_CLOSED")
    assert reason.startswith("MARKET_CLOSED: A1 opens at 20")
    assert _waits(market) == []


def test_an_order_does_not_wait_for_what_may_never_come(market: Connection) -> None:
    market.execute("DELETE FROM calendar_session")
    market.execute(
        "INSERT INTO calendar_session (calendar, session_date, open_at, close_at) SELECT 'XNYS', "
        "current_date - 2, now() - interval '49 hours', now() - interval '48 hours'"
    )
    _account(market, calendar="XNYS")
    assert _placed(market)[3] == "MARKET_CLOSED"
    assert _waits(market) == []


@pytest.mark.parametrize("policy", ["QUEUE", "REFUSE"])
def test_what_the_gate_refuses_needs_no_hours(market: Connection, policy: str) -> None:
    market.execute(_CLOSED)
    _account(market, out_of_session=policy)
    assert _placed(market, 9999)[2:] == ("RISK", "INSUFFICIENT_CASH")
    assert _waits(market) == []


def test_what_goes_to_another_account_waits_for_that_ones_hours(market: Connection) -> None:
    market.execute(f"{_CLOSED} WHERE account = 'A2'".encode())
    with acting_as(market, "oms_engine"):
        market.execute(said("UPDATE orders SET account = 'A2' WHERE order_id = :'o_lost'"))
    assert rows(
        market,
        "SELECT not_before > clock_timestamp() FROM broker_command "
        "WHERE order_id = :'o_lost' AND account = 'A2'",
    ) == [(True,)]
