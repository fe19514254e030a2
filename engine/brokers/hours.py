"""When an account trades: the sessions of its exchange, or hours of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, time, timedelta
from zoneinfo import ZoneInfo


@dataclass(frozen=True, slots=True)
class Span:
    """A session: from its open, up to but without its close."""

    open_at: datetime
    close_at: datetime

    def holds(self, moment: datetime) -> bool:
        """Whether ``moment`` is in it."""
        return self.open_at <= moment < self.close_at


def next_span(spans: Sequence[Span], now: datetime) -> Span | None:
    """The session that ``now`` is in, else the next one of those known."""
    return min(
        (span for span in spans if span.close_at > now), key=lambda s: s.open_at, default=None
    )


def daily_spans(opens_at: time, closes_at: time, time_zone: str, now: datetime) -> list[Span]:
    """The hours of the days around ``now``; a close before the open is the next day's.

    Both are wall clock times of the zone, so that a session keeps them when the clocks change.
    """
    zone = ZoneInfo(time_zone)
    today = now.astimezone(zone).date()
    overnight = timedelta(days=int(closes_at <= opens_at))
    return [
        Span(
            datetime.combine(day, opens_at, zone),
            datetime.combine(day + overnight, closes_at, zone),
        )
        for day in (today + timedelta(days=offset) for offset in (-1, 0, 1))
    ]
