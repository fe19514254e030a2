"""The prices that everybody is measured on: one-minute bars of an invented symbol, always the same.

They follow the sessions of the exchange, as real ones do. Nothing is held but the bar at hand.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from itertools import count, islice
from pathlib import Path
from random import Random

from engine.db.connect import Connection
from engine.market.calendar import store_sessions
from engine.market.model import Bar, Session
from engine.market.store import add_instrument

__all__ = [
    "CALENDAR",
    "SYMBOL",
    "feed",
    "is_ordering_bar",
    "open_market",
    "sessions_of",
    "write_csv",
]

CALENDAR = "XNYS"
SYMBOL = "SPY"
# About 98,000 minutes of trading a year: enough for a million bars and some days after them.
FIRST_DAY, LAST_DAY = date(2010, 1, 1), date(2021, 12, 31)
# A tick also looks at the sessions some days before and after its own.
STORED_FROM, STORED_UPTO = date(2009, 1, 1), date(2022, 12, 31)
MINUTE = timedelta(minutes=1)
VOLUME_UNITS = Decimal(10_000)
PRICE_CENTS, RANGE_CENTS = 10_000, 5_000
SEED = 1


def open_market(conn: Connection) -> None:
    """Make the symbol and the exchange's sessions known, so that no measurement pays for it."""
    add_instrument(conn, SYMBOL)
    store_sessions(conn, CALENDAR, STORED_FROM, STORED_UPTO)


def sessions_of(conn: Connection) -> list[Session]:
    """The stored sessions, oldest first."""
    rows = conn.execute(
        """SELECT calendar, session_date, open_at, close_at FROM calendar_session
           WHERE calendar = %s AND session_date BETWEEN %s AND %s ORDER BY session_date""",
        [CALENDAR, FIRST_DAY, LAST_DAY],
    ).fetchall()
    return [Session(*row) for row in rows]


def feed(
    sessions: Sequence[Session], bars: int | None = None
) -> Iterator[tuple[datetime, list[Bar]]]:
    """The first ``bars`` minutes of the sessions (default: all), as a replay takes them."""
    return ((bar.end, [bar]) for bar in islice(_bars(sessions), bars))


def _bars(sessions: Sequence[Session]) -> Iterator[Bar]:
    steps = Random(SEED)
    close = PRICE_CENTS
    for session in sessions:
        for minute in count():
            start = session.open_at + minute * MINUTE
            if start >= session.close_at:
                break
            opened, close = close, _next(close, steps)
            yield Bar(
                SYMBOL,
                start,
                start + MINUTE,
                _dollars(opened),
                _dollars(max(opened, close) + 1),
                _dollars(min(opened, close) - 1),
                _dollars(close),
                VOLUME_UNITS,
            )


def _next(cents: int, steps: Random) -> int:
    """A step up or down, drawn back to where it began so that the money lasts for any length."""
    away = (cents - PRICE_CENTS) / RANGE_CENTS
    return cents + round(steps.gauss(-5 * away, 5))


def _dollars(cents: int) -> Decimal:
    return Decimal(cents).scaleb(-2)


def is_ordering_bar(end: datetime, every: int) -> bool:
    """Whether the strategy orders at the bar that ends at ``end``: one in ``every`` minutes.

    By the minute since 1970, so that no side has to keep a count.
    """
    return int(end.timestamp()) // 60 % every == 0


def write_csv(path: Path, sessions: Sequence[Session], bars: int) -> None:
    """Write the bars for the peers, each with its end in seconds since 1970."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["end", "open", "high", "low", "close", "volume"])
        for end, (bar,) in feed(sessions, bars):
            seconds = int(end.astimezone(UTC).timestamp())
            writer.writerow([seconds, bar.open, bar.high, bar.low, bar.close, bar.volume])
