"""What people type becomes values, or one sentence."""

from __future__ import annotations

from datetime import UTC, date, datetime
from decimal import Decimal
from typing import Any

import pytest

from cli.arguments import parse_assignments, parse_day, parse_object, parse_until
from engine.errors import BadInput


@pytest.mark.parametrize(
    ("texts", "found"),
    [
        ([], {}),
        (["period=MONTHLY"], {"period": "MONTHLY"}),
        (["n=5", "empty="], {"n": "5", "empty": ""}),
        (["a=b=c"], {"a": "b=c"}),
        (["weights.AAPL=0.6", "weights.BRK.B=0.4"], {"weights": {"AAPL": "0.6", "BRK.B": "0.4"}}),
        (['weights={"AAPL": 0.1}'], {"weights": {"AAPL": Decimal("0.1")}}),
        (["symbols=[1, 2]"], {"symbols": [1, 2]}),
        (['word="text"'], {"word": "text"}),
    ],
)
def test_assignments(texts: list[str], found: dict[str, Any]) -> None:
    assert parse_assignments(texts, "parameter") == found


@pytest.mark.parametrize(
    "texts",
    [
        ["period"],
        ["=5"],
        ["weights.=1"],
        ["a=1", "a=2"],
        ["a=1", "a.b=2"],
        ["a.b=1", "a.b=2"],
        ["a.b=1", "a=2"],
        ["a={"],
        ["a=[NaN]"],
    ],
)
def test_what_is_no_assignment_is_refused(texts: list[str]) -> None:
    with pytest.raises(BadInput):
        parse_assignments(texts, "parameter")


def test_objects() -> None:
    assert parse_object(None, "--paper") == {}
    assert parse_object('{"seed": 7}', "--paper") == {"seed": 7}
    for wrong in ("[1]", "{", "null", '{"a": Infinity}'):
        with pytest.raises(BadInput, match="--paper"):
            parse_object(wrong, "--paper")


def test_days_and_moments() -> None:
    assert parse_day("2024-02-29", "day") == date(2024, 2, 29)
    assert parse_until("2024-01-31", "start", end=False) == datetime(2024, 1, 31, tzinfo=UTC)
    last = datetime(2024, 1, 31, 23, 59, 59, 999999, tzinfo=UTC)
    assert parse_until("2024-01-31", "end", end=True) == last
    moment = datetime(2024, 1, 31, 16, tzinfo=UTC)
    assert parse_until("2024-01-31T21:30:00+05:30", "end", end=True) == moment


@pytest.mark.parametrize("text", ["2023-02-29", "20240131", "today", "2024-1-1"])
def test_what_is_no_day_is_refused(text: str) -> None:
    with pytest.raises(BadInput, match="write it as 2024-01-31"):
        parse_day(text, "day")


@pytest.mark.parametrize("text", ["2024-01-31T16:00:00", "x", "2023-02-29"])
def test_what_is_no_moment_is_refused(text: str) -> None:
    with pytest.raises(BadInput):
        parse_until(text, "start", end=False)
