"""The values of a report, and how amounts are written."""

from __future__ import annotations

from decimal import Decimal

import pytest
from report_cases import a_history, a_point

from engine.report.model import money


@pytest.mark.parametrize(
    ("amount", "currency", "written"),
    [
        ("1234.5", "USD", "$1,234.50"),
        ("-1234567.891", "EUR", "−€1,234,567.89"),
        ("0", "INR", "₹0.00"),
        ("3", "CHF", "CHF\u00a03.00"),
        ("-3", "CHF", "−CHF\u00a03.00"),
        ("7", "", "7.00"),
        ("0.125", "GBP", "£0.12"),
        ("-0.001", "USD", "$0.00"),
        ("123456789012345678901234567890.12", "USD", "$123,456,789,012,345,678,901,234,567,890.12"),
    ],
)
def test_money_is_written_with_its_currency(amount: str, currency: str, written: str) -> None:
    assert money(Decimal(amount), currency) == written


def test_money_takes_decimals() -> None:
    assert money(Decimal("2.5"), "JPY", decimals=0) == "¥2"
    assert money(Decimal("2.5"), "USD", decimals=4) == "$2.5000"


@pytest.mark.parametrize(("amount", "written"), [("2", "+$2.00"), ("-2", "−$2.00"), ("0", "$0.00")])
def test_signed_money_shows_a_gain_as_one(amount: str, written: str) -> None:
    assert money(Decimal(amount), "USD", signed=True) == written


def test_marks_in_order_of_time_are_taken() -> None:
    history = a_history([a_point(0, 1), a_point(0, 2), a_point(1, 3)])
    assert len(history.equity) == 3


def test_marks_out_of_order_are_refused() -> None:
    with pytest.raises(ValueError, match=r"2000-03-01 .* comes after that of 2000-03-02"):
        a_history([a_point(1, 1), a_point(0, 2)])
