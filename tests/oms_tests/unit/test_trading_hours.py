"""When an account trades, and how long a connector that can't connect waits."""

from __future__ import annotations

from datetime import UTC, datetime, time, timedelta
from typing import Any, cast

import pytest
from connector_cases import Wire

from engine.brokers.connector import Connector, Pace
from engine.brokers.hours import Span, daily_spans, next_span

NEW_YORK = "America/New_York"


def at(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


def _span(opens: time, closes: time, zone: str, now: datetime) -> tuple[datetime, datetime]:
    span = next_span(daily_spans(opens, closes, zone, now), now)
    assert span is not None
    return span.open_at.astimezone(UTC), span.close_at.astimezone(UTC)


@pytest.mark.parametrize(
    ("now", "opens", "closes"),
    [
        ("2024-03-08 12:00", "2024-03-08 14:30", "2024-03-08 21:00"),
        ("2024-03-08 14:30", "2024-03-08 14:30", "2024-03-08 21:00"),
        ("2024-03-08 20:59", "2024-03-08 14:30", "2024-03-08 21:00"),
        # The clocks change on the tenth: the same wall clock is another moment.
        ("2024-03-10 12:00", "2024-03-10 13:30", "2024-03-10 20:00"),
        ("2024-03-08 21:00", "2024-03-09 14:30", "2024-03-09 21:00"),
    ],
)
def test_hours_are_those_of_the_accounts_wall_clock(now: str, opens: str, closes: str) -> None:
    assert _span(time(9, 30), time(16), NEW_YORK, at(now)) == (at(opens), at(closes))


@pytest.mark.parametrize(
    ("now", "opens"),
    [("2024-01-02 23:30", "2024-01-02 22:00"), ("2024-01-03 05:00", "2024-01-02 22:00"),
     ("2024-01-03 06:00", "2024-01-03 22:00")],
)  # fmt: skip
def test_hours_may_end_the_next_day(now: str, opens: str) -> None:
    assert _span(time(22), time(6), "UTC", at(now))[0] == at(opens)


def test_a_session_ends_before_its_close_and_begins_with_its_open() -> None:
    span = Span(at("2024-01-02 10:00"), at("2024-01-02 11:00"))
    assert span.holds(span.open_at)
    assert not span.holds(span.close_at)
    assert next_span([span], span.close_at) is None


class _Account:
    account = "DU1"
    orders_per_second = messages_per_second = 1


def _retrying(jitter: float) -> Connector:
    return Connector(
        cast(Any, None),
        cast(Any, _Account()),
        cast(Any, Wire),
        jitter=lambda: jitter,
        pace=Pace(retry_first=1, retry_max=10),
    )


def test_retries_come_later_and_later_up_to_a_limit_and_never_together() -> None:
    early, late = _retrying(0.0), _retrying(1.0)
    assert [early._backoff(attempt) for attempt in (0, 1, 2, 3, 4, 99)] == [0.5, 1, 2, 4, 5, 5]
    assert [late._backoff(attempt) for attempt in (0, 1, 2, 3, 4, 99)] == [1, 2, 4, 8, 10, 10]


def test_a_span_of_a_second_is_one() -> None:
    now = at("2024-01-02 00:00")
    spans = daily_spans(time(0), time(0, 0, 1), "UTC", now)
    assert next_span(spans, now) == Span(now, now + timedelta(seconds=1))
