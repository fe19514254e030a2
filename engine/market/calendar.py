"""Exchange calendars: when each session opens and closes, in UTC.

The dates come from exchange_calendars and are copied into the table ``calendar_session``, where
every rule about sessions is decided. The library is slow to import (it brings pandas), so it is
imported inside functions, and only when the database doesn't hold the years that are asked for.

Limits: whole calendar years are stored, and a stored year is never corrected, so a holiday that an
exchange adds later doesn't reach sessions that are already stored. A lunch break isn't a close.
"""

from __future__ import annotations

import difflib
import warnings
from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from datetime import UTC, date, datetime
from functools import lru_cache
from typing import Any

from psycopg import Connection
from psycopg.rows import tuple_row

from engine.errors import BadInput
from engine.market.model import Session

__all__ = [
    "SESSIONS_PER_YEAR_MIN",
    "YEAR_FIRST",
    "ensure_sessions",
    "known_range",
    "require_calendar",
    "session_at",
    "session_on",
    "sessions",
    "store_sessions",
]

# Before this year the library's holidays are too incomplete: XNYS is open on New Year's Day 1969.
YEAR_FIRST = 1970

# A year that has this many sessions in the database is whole, because years are written whole, in
# one statement. No calendar has fewer than 230 in a year; a few rows put in by hand aren't a year.
SESSIONS_PER_YEAR_MIN = 200

# The library tells a calendar's bounds by one that it has built, and builds a month in no time.
_MONTH_KNOWN_TO_ALL = ("2024-01-02", "2024-01-31")

# The library has one calendar for both Indian exchanges, which share their hours and holidays; it
# takes its dates from the NSE and calls it by the BSE's code.
_BACKED_BY = {"XNSE": "XBOM"}
_OWN_ALIASES = {"NSE": "XNSE"}


@dataclass(frozen=True, slots=True)
class _Book:
    """All known sessions of one calendar, with the keys they are looked up by."""

    first: date
    last: date
    sessions: tuple[Session, ...]
    days: tuple[date, ...]
    closes: tuple[datetime, ...]


def require_calendar(code: str) -> str:
    """Return the name under which ``code``, in any case or an alias such as NYSE, is stored.

    Raises BadInput for an unknown code, with the nearest known ones.
    """
    known = _known_codes()
    wanted = code.strip().upper()
    if wanted in known:
        return known[wanted]
    near = difflib.get_close_matches(wanted, known, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else "use a code such as XNYS or XNSE."
    raise BadInput(f"There is no exchange calendar {code[:40]!r}; {hint}")


def known_range(calendar: str) -> tuple[date, date]:
    """Return the first and the last day about which the library can say whether it's a session.

    The last is the end of a year, at most the next one: exchanges publish no further ahead.
    """
    book = _book(calendar)
    return book.first, book.last


def sessions(calendar: str, first: date, last: date) -> list[Session]:
    """Return the sessions from ``first`` to ``last``, both included, in order.

    Raises BadInput when the range is upside down or reaches beyond what is known.
    """
    book = _book(calendar)
    _check_range(calendar, book, first, last)
    return list(book.sessions[bisect_left(book.days, first) : bisect_right(book.days, last)])


def session_on(calendar: str, day: date) -> Session | None:
    """Return the session of ``day``, or None when the exchange is closed all day.

    Raises BadInput when the day is outside what is known.
    """
    return next(iter(sessions(calendar, day, day)), None)


def session_at(calendar: str, moment: datetime) -> Session | None:
    """Return the session that ``moment`` is in, after its open and up to its close.

    The open itself belongs to no session here, because a bar can't end when trading begins.
    """
    book = _book(calendar)
    place = bisect_left(book.closes, moment)
    if place == len(book.closes) or book.sessions[place].open_at >= moment:
        return None
    return book.sessions[place]


def store_sessions(conn: Connection[Any], calendar: str, first: date, last: date) -> int:
    """Make ``calendar_session`` hold every session of the years from ``first`` to ``last``.

    Safe to repeat and to race: what is there stays as it is. Returns the number of rows added.
    Raises BadInput as ``sessions`` does.
    """
    _check_range(calendar, _book(calendar), first, last)
    book = sessions(calendar, date(first.year, 1, 1), date(last.year, 12, 31))
    with conn.cursor() as cursor:
        cursor.execute(
            """
            INSERT INTO calendar_session (calendar, session_date, open_at, close_at)
            SELECT %s, s.day, s.open_at, s.close_at
            FROM unnest(%s::date[], %s::timestamptz[], %s::timestamptz[])
                AS s (day, open_at, close_at)
            ON CONFLICT DO NOTHING
            """,
            (
                calendar,
                [session.day for session in book],
                [session.open_at for session in book],
                [session.close_at for session in book],
            ),
        )
        return cursor.rowcount


def ensure_sessions(conn: Connection[Any], calendar: str, first: date, last: date) -> int:
    """Store what ``calendar_session`` lacks of the years from ``first`` to ``last``.

    One query and no calendar library when nothing is lacking. Returns the number of rows added.
    Raises BadInput as ``sessions`` does.
    """
    with conn.cursor(row_factory=tuple_row) as cursor:
        cursor.execute(
            """
            SELECT year FROM generate_series(%s::int, %s::int) AS year
            WHERE (
                SELECT count(*) FROM calendar_session
                WHERE calendar = %s
                    AND session_date BETWEEN make_date(year, 1, 1) AND make_date(year, 12, 31)
            ) < %s
            ORDER BY year
            """,
            (first.year, last.year, calendar, SESSIONS_PER_YEAR_MIN),
        )
        lacking = [year for (year,) in cursor]
    if first <= last and not lacking:
        return 0
    return store_sessions(conn, calendar, first, last)


def _check_range(calendar: str, book: _Book, first: date, last: date) -> None:
    if first > last:
        raise BadInput(f"The first day {first} is after the last, {last}; swap them.")
    outside = first if first < book.first else last
    if not book.first <= outside <= book.last:
        raise BadInput(
            f"The calendar {calendar} is known from {book.first} to {book.last} and says nothing "
            f"about {outside}; choose days in that range."
        )


@lru_cache(maxsize=1)
def _known_codes() -> dict[str, str]:
    """Every code and alias in upper case, and the name it is stored under."""
    import exchange_calendars

    names = exchange_calendars.get_calendar_names(include_aliases=True)
    known = {name.upper(): exchange_calendars.resolve_alias(name) for name in names}
    return known | {own: own for own in _BACKED_BY} | _OWN_ALIASES


@lru_cache(maxsize=8)
def _book(calendar: str) -> _Book:
    """Build all that is known of a calendar at once: it costs the same as a single year of it."""
    name = require_calendar(calendar)
    if name != calendar:
        # Stored under two names, one calendar could disagree with itself.
        raise BadInput(f"The calendar {calendar} is stored as {name}; write {name}.")
    first, last, schedule = _schedule(_BACKED_BY.get(name, name))
    book = tuple(
        Session(name, day.date(), _utc(open_at), _utc(close_at))
        for day, open_at, close_at in zip(
            schedule.index, schedule["open"], schedule["close"], strict=True
        )
    )
    days = tuple(session.day for session in book)
    return _Book(first, last, book, days, tuple(session.close_at for session in book))


def _schedule(name: str) -> tuple[date, date, Any]:
    """Return the known range and the library's table of opens and closes over it."""
    import exchange_calendars

    # The library warns about pandas's future, which is not ours to act on.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            factory: Any = type(exchange_calendars.get_calendar(name, *_MONTH_KNOWN_TO_ALL))
            first, last = _whole_years(factory)
            return first, last, factory(start=first, end=last).schedule
        except Exception as error:
            # Some calendars can't be built with some versions of pandas, in several ways.
            raise BadInput(
                f"The installed exchange_calendars can't build the calendar {name} "
                f"({type(error).__name__}); choose another, or install pandas below version 3."
            ) from error


def _whole_years(factory: Any) -> tuple[date, date]:
    """Return the first day of the first and the last day of the last year known as a whole."""
    low, high = factory.bound_min(), factory.bound_max()
    # Where holidays follow rules the library would go on for ever; its own default, a year from
    # today, is as far as an exchange can be taken at its word.
    year_last = factory.default_end().year
    year_first = YEAR_FIRST
    if low is not None:
        year_first = max(year_first, low.year + (low.date() > date(low.year, 1, 1)))
    if high is not None:
        year_last = min(year_last, high.year - (high.date() < date(high.year, 12, 31)))
    return date(year_first, 1, 1), date(year_last, 12, 31)


def _utc(moment: Any) -> datetime:
    """A pandas timestamp as a plain one."""
    converted: datetime = moment.to_pydatetime().astimezone(UTC)
    return converted
