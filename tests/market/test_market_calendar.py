"""Exchange sessions: the library's, and the database's copy of them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from datetime import UTC, date, datetime
from typing import Any

import psycopg
import pytest

from engine.errors import BadInput
from engine.market import calendar
from engine.market.calendar import (
    YEAR_FIRST,
    ensure_sessions,
    known_range,
    require_calendar,
    session_at,
    session_on,
    sessions,
    store_sessions,
)
from engine.market.model import Session


def utc(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


@pytest.mark.parametrize(
    ("code", "name"),
    [
        ("XNYS", "XNYS"),
        ("xnys", "XNYS"),
        (" XNYS ", "XNYS"),
        ("NYSE", "XNYS"),
        ("nasdaq", "XNYS"),
        ("XNSE", "XNSE"),
        ("nse", "XNSE"),
        ("BSE", "XBOM"),
        ("24/7", "24/7"),
        ("US_FUTURES", "us_futures"),
    ],
)
def test_a_calendar_goes_by_one_name(code: str, name: str) -> None:
    assert require_calendar(code) == name


@pytest.mark.parametrize(
    ("code", "hint"),
    [
        ("XNYSE", "did you mean XNYS"),
        ("NYSX", "did you mean XNYS or NYSE"),
        ("?", "use a code such as XNYS or XNSE."),
        ("", "use a code such as XNYS or XNSE."),
        ("é" * 5000, "use a code such as XNYS or XNSE."),
    ],
)
def test_an_unknown_calendar_is_refused_with_near_ones(code: str, hint: str) -> None:
    with pytest.raises(BadInput, match="There is no exchange calendar") as refusal:
        require_calendar(code)
    assert hint in str(refusal.value)
    assert len(str(refusal.value)) < 200


def test_an_alias_is_not_stored_beside_its_calendar() -> None:
    with pytest.raises(BadInput, match="NYSE is stored as XNYS; write XNYS"):
        sessions("NYSE", date(2024, 1, 2), date(2024, 1, 2))


def test_sessions_are_in_utc_and_skip_weekends() -> None:
    assert sessions("XNYS", date(2000, 3, 1), date(2000, 3, 6)) == [
        Session(
            "XNYS", date(2000, 3, day), utc(f"2000-03-0{day}T14:30"), utc(f"2000-03-0{day}T21:00")
        )
        for day in (1, 2, 3, 6)
    ]


def test_the_demo_has_3270_sessions() -> None:
    assert len(sessions("XNYS", date(2000, 3, 1), date(2013, 3, 1))) == 3270


def test_the_exchange_was_closed_after_september_11() -> None:
    days = [session.day for session in sessions("XNYS", date(2001, 9, 10), date(2001, 9, 17))]
    assert days == [date(2001, 9, 10), date(2001, 9, 17)]


@pytest.mark.parametrize(
    ("day", "open_at", "close_at"),
    [
        # Clocks go forward on Sunday 2024-03-10 and back on 2024-11-03.
        (date(2024, 3, 8), "2024-03-08T14:30", "2024-03-08T21:00"),
        (date(2024, 3, 11), "2024-03-11T13:30", "2024-03-11T20:00"),
        (date(2024, 11, 1), "2024-11-01T13:30", "2024-11-01T20:00"),
        (date(2024, 11, 4), "2024-11-04T14:30", "2024-11-04T21:00"),
        # Until 2006 summer time began in April.
        (date(1990, 4, 2), "1990-04-02T13:30", "1990-04-02T20:00"),
        (date(1990, 3, 30), "1990-03-30T14:30", "1990-03-30T21:00"),
        # The day after Thanksgiving ends early.
        (date(2024, 11, 29), "2024-11-29T14:30", "2024-11-29T18:00"),
    ],
)
def test_new_york_follows_daylight_saving_and_early_closes(
    day: date, open_at: str, close_at: str
) -> None:
    assert session_on("XNYS", day) == Session("XNYS", day, utc(open_at), utc(close_at))


@pytest.mark.parametrize(
    "day", [date(2024, 12, 25), date(2024, 7, 4), date(2024, 3, 29), date(2024, 6, 1)]
)
def test_a_closed_day_has_no_session(day: date) -> None:
    assert session_on("XNYS", day) is None


def test_mumbai_is_in_utc_under_both_its_names() -> None:
    # 09:15 to 15:30 at +05:30, without daylight saving; closed on Republic Day, a Friday.
    week = sessions("XNSE", date(2024, 1, 25), date(2024, 1, 29))
    assert week == [
        Session(
            "XNSE", date(2024, 1, day), utc(f"2024-01-{day}T03:45"), utc(f"2024-01-{day}T10:00")
        )
        for day in (25, 29)
    ]
    same = sessions("XBOM", date(2024, 1, 25), date(2024, 1, 29))
    assert [(s.day, s.open_at, s.close_at) for s in same] == [
        (s.day, s.open_at, s.close_at) for s in week
    ]


def test_a_session_that_opens_the_evening_before_keeps_its_day() -> None:
    session = session_on("CMES", date(2024, 1, 3))
    assert session == Session(
        "CMES", date(2024, 1, 3), utc("2024-01-02T23:00"), utc("2024-01-03T23:00")
    )


@pytest.mark.parametrize("code", ["XLON", "XTKS", "XETR", "XHKG", "XASX", "24/7", "XSHG"])
def test_every_known_year_is_stored_as_a_whole(code: str) -> None:
    first, last = known_range(code)
    for year in range(first.year, last.year + 1):
        of_year = sessions(code, date(year, 1, 1), date(year, 12, 31))
        assert len(of_year) >= calendar.SESSIONS_PER_YEAR_MIN + 25
        assert all(session.open_at < session.close_at for session in of_year)


@pytest.mark.parametrize(
    ("moment", "day"),
    [
        ("2024-03-11T13:30:00", None),
        ("2024-03-11T13:30:01", date(2024, 3, 11)),
        ("2024-03-11T20:00:00", date(2024, 3, 11)),
        ("2024-03-11T20:00:01", None),
        ("2024-03-10T18:00:00", None),
        ("1969-12-31T18:00:00", None),
        ("2199-01-01T18:00:00", None),
    ],
)
def test_a_session_holds_the_moments_after_its_open_up_to_its_close(
    moment: str, day: date | None
) -> None:
    session = session_at("XNYS", utc(moment))
    assert (session.day if session else None) == day


def test_the_range_must_not_be_upside_down() -> None:
    with pytest.raises(BadInput, match=r"first day 2024-01-03 is after the last, 2024-01-02; swap"):
        sessions("XNYS", date(2024, 1, 3), date(2024, 1, 2))


def test_the_known_range_is_of_whole_years_and_ends_soon() -> None:
    first, last = known_range("XNYS")
    assert first == date(YEAR_FIRST, 1, 1)
    assert (last.month, last.day) == (12, 31)
    assert sessions("XNYS", first, first) == []
    assert sessions("XNYS", last, last) is not None


@pytest.mark.parametrize("edge", ["before", "after"])
@pytest.mark.parametrize("code", ["XNYS", "XNSE"])
def test_a_day_beyond_what_is_known_is_refused(code: str, edge: str) -> None:
    first, last = known_range(code)
    day = date(first.year - 1, 12, 31) if edge == "before" else date(last.year + 1, 1, 1)
    with pytest.raises(
        BadInput, match=f"is known from {first} to {last} and says nothing about {day}"
    ):
        sessions(code, min(day, last), max(day, first))


def test_a_year_known_in_part_is_not_known() -> None:
    # Shanghai's calendar begins on 1990-12-03.
    assert known_range("XSHG")[0] == date(1991, 1, 1)


class Bounds:
    """The part of a calendar class that says how far it reaches."""

    def __init__(self, high: datetime | None) -> None:
        self.high = high

    def bound_min(self) -> None:
        return None

    def bound_max(self) -> datetime | None:
        return self.high

    def default_end(self) -> datetime:
        return datetime(2027, 11, 21, tzinfo=UTC)


@pytest.mark.parametrize(
    ("high", "last"),
    [
        (None, 2027),
        (datetime(2049, 12, 31, tzinfo=UTC), 2027),
        (datetime(2026, 12, 31, tzinfo=UTC), 2026),
        (datetime(2026, 6, 30, tzinfo=UTC), 2025),
    ],
)
def test_the_last_year_is_the_next_or_where_the_library_ends(
    high: datetime | None, last: int
) -> None:
    assert calendar._whole_years(Bounds(high))[1] == date(last, 12, 31)


def test_a_calendar_that_the_library_cannot_build_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import exchange_calendars

    def fail(*args: str) -> Any:
        raise NotImplementedError("implemented by subclasses")

    monkeypatch.setattr(exchange_calendars, "get_calendar", fail)
    calendar._book.cache_clear()
    with pytest.raises(BadInput, match=r"can't build the calendar XWBO \(NotImplementedError\)"):
        known_range("XWBO")


# In the database


def rows(conn: psycopg.Connection[Any], code: str) -> list[tuple[date, datetime, datetime]]:
    return conn.execute(
        "SELECT session_date, open_at, close_at FROM calendar_session WHERE calendar = %s"
        " ORDER BY session_date",
        (code,),
    ).fetchall()


def test_sessions_are_stored_as_they_are_and_once(conn: psycopg.Connection[Any]) -> None:
    added = store_sessions(conn, "XLON", date(2023, 5, 1), date(2024, 2, 1))
    expected = sessions("XLON", date(2023, 1, 1), date(2024, 12, 31))
    assert added == len(expected)
    assert rows(conn, "XLON") == [(s.day, s.open_at, s.close_at) for s in expected]
    assert store_sessions(conn, "XLON", date(2023, 5, 1), date(2024, 2, 1)) == 0
    assert len(rows(conn, "XLON")) == added


@pytest.mark.parametrize("work", [store_sessions, ensure_sessions])
@pytest.mark.parametrize(
    ("code", "first", "last", "message"),
    [
        ("XLON", date(2024, 1, 2), date(2024, 1, 1), "swap them"),
        ("XLON", date(2025, 1, 2), date(2024, 1, 1), "swap them"),
        ("XLON", date(2024, 1, 2), date(2199, 1, 1), "says nothing about 2199-01-01"),
        ("XLON", date(1900, 1, 2), date(2024, 1, 1), "says nothing about 1900-01-02"),
        ("NOPE", date(2024, 1, 1), date(2024, 1, 2), "There is no exchange calendar 'NOPE'"),
        ("LSE", date(2024, 1, 1), date(2024, 1, 2), "LSE is stored as XLON; write XLON"),
    ],
)
def test_a_wrong_range_or_calendar_stores_nothing(
    conn: psycopg.Connection[Any],
    work: Callable[..., int],
    code: str,
    first: date,
    last: date,
    message: str,
) -> None:
    with pytest.raises(BadInput, match=message):
        work(conn, code, first, last)
    assert rows(conn, code) == []


def test_only_the_years_that_lack_are_added(conn: psycopg.Connection[Any]) -> None:
    of_2023 = ensure_sessions(conn, "XLON", date(2023, 12, 30), date(2023, 12, 31))
    assert of_2023 == len(rows(conn, "XLON")) > 200
    of_2024 = ensure_sessions(conn, "XLON", date(2023, 12, 30), date(2024, 1, 1))
    assert of_2024 == len(rows(conn, "XLON")) - of_2023 > 200


def test_a_few_rows_are_not_a_year(conn: psycopg.Connection[Any]) -> None:
    conn.execute(
        "INSERT INTO calendar_session VALUES ('XLON', '2024-01-02', %s, %s)",
        (utc("2024-01-02T08:00"), utc("2024-01-02T09:00")),
    )
    ensure_sessions(conn, "XLON", date(2024, 1, 2), date(2024, 1, 2))
    stored = rows(conn, "XLON")
    assert len(stored) == len(sessions("XLON", date(2024, 1, 1), date(2024, 12, 31)))
    # What was there stays: the database is where people correct a session.
    assert stored[0][2] == utc("2024-01-02T09:00")


def test_a_covered_range_needs_one_query_and_no_library(
    conn: psycopg.Connection[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    ensure_sessions(conn, "XLON", date(2023, 1, 1), date(2024, 12, 31))
    monkeypatch.setattr(calendar, "_book", None)
    monkeypatch.setitem(sys.modules, "exchange_calendars", None)
    # On a Saturday, and over New Year: days without a session are covered with their year.
    assert ensure_sessions(conn, "XLON", date(2024, 6, 1), date(2024, 6, 1)) == 0
    assert ensure_sessions(conn, "XLON", date(2023, 12, 31), date(2024, 1, 1)) == 0
