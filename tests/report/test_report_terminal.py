"""The chart in a terminal."""

from __future__ import annotations

from dataclasses import replace
from decimal import Decimal

import pytest
from report_cases import a_history, a_point, a_sip_history, points_of

from engine.report.terminal import equity_chart

ESCAPE = "\x1b"
BRAILLE = range(0x2801, 0x2900)


def braille_in(line: str) -> int:
    return sum(ord(char) in BRAILLE for char in line)


def test_a_plain_chart_has_no_escape_codes() -> None:
    chart = equity_chart(a_sip_history(), colour=False)
    assert ESCAPE not in chart
    assert chart.splitlines()[0] == "demo"


def test_a_coloured_chart_ends_its_colours() -> None:
    chart = equity_chart(a_sip_history())
    assert f"{ESCAPE}[38;5;12m" in chart
    assert all(line.rfind("[0m") >= line.rfind("[38;") for line in chart.splitlines())


@pytest.mark.parametrize(("width", "height"), [(80, 20), (120, 40), (200, 60), (40, 8)])
def test_a_chart_fits_its_place(width: int, height: int) -> None:
    lines = equity_chart(a_sip_history(ticks=500), width, height, colour=False).splitlines()
    assert len(lines) == height
    assert max(map(len, lines[2:])) <= width
    assert max(map(len, lines[2:])) > width - 10


def test_a_place_that_is_too_small_gets_the_smallest_chart() -> None:
    history = a_sip_history()
    assert equity_chart(history, 1, 1) == equity_chart(history, 40, 8)


def test_a_chart_names_its_last_figures() -> None:
    history = a_sip_history()
    last = history.equity[-1]
    legend = equity_chart(history, colour=False).splitlines()[1]
    assert f"Equity ${last.equity:,.2f}" in legend
    assert f"Invested ${last.invested:,.2f}" in legend


def test_a_rising_line_rises() -> None:
    chart = equity_chart(a_history(points_of(*range(100, 200))), 80, 20, colour=False)
    body = [line for line in chart.splitlines()[2:-2] if braille_in(line)]
    at = [min(i for i, char in enumerate(line) if ord(char) in BRAILLE) for line in body]
    assert at == sorted(at, reverse=True)
    assert len(at) > 8


def test_years_are_marked_where_there_are_several() -> None:
    axis = equity_chart(a_sip_history(ticks=3_270), 100, 24, colour=False).splitlines()[-1]
    # 3,270 days from March 2000.
    assert axis.split() == [str(year) for year in range(2001, 2010)]
    narrow = equity_chart(a_sip_history(ticks=3_270), 40, 24, colour=False).splitlines()[-1]
    assert narrow.split() == ["2002", "2004", "2006", "2008"]


def test_days_are_marked_within_a_few_months() -> None:
    axis = equity_chart(a_sip_history(ticks=60), colour=False).splitlines()[-1]
    assert axis.split()[0] == "2000-03-01"


def test_one_mark_is_drawn_with_its_hour() -> None:
    chart = equity_chart(a_history(points_of(100)), colour=False)
    assert sum(map(braille_in, chart.splitlines()[2:])) == 1
    assert "03-01 21:00" in chart


@pytest.mark.parametrize(
    ("equity", "label"),
    [
        (("0.001", "0.004"), "$0.0010"),
        (("100", "240"), "$150"),
        (("-50", "50"), "−$40"),
        (("1000000000", "5000000000"), "$5,000,000,000"),
        (("1", "9"), "$4.00"),
        (("0", "0"), "$0.40"),
        # A few cents on a large sum aren't drawn as a mountain.
        (("100000.00", "100000.02"), "$100,000"),
    ],
)
def test_amounts_beside_a_chart_are_round(equity: tuple[str, str], label: str) -> None:
    points = [
        replace(a_point(day, amount), invested=Decimal(amount)) for day, amount in enumerate(equity)
    ]
    chart = equity_chart(a_history(points), 80, 20, colour=False)
    assert any(label in line for line in chart.splitlines()[2:])


def test_a_run_without_a_mark_gets_a_sentence() -> None:
    assert equity_chart(a_history()) == "demo has no mark yet, so there is nothing to draw."


def test_a_name_can_not_command_the_terminal() -> None:
    for history in (a_history(name="a\x1b[2Jb"), a_history(points_of(1, 2), name="a\x1b[2Jb")):
        assert ESCAPE not in equity_chart(history, colour=False)


def test_charts_do_not_depend_on_what_was_drawn_before() -> None:
    import plotext

    history = a_sip_history()
    before = equity_chart(history)
    plotext.figure.draw(plotext.figure.signal([1, 2, 3]))
    plotext.figure.title("mine")
    assert equity_chart(history) == before
    assert "mine" in plotext.figure.build().string(colorless=True)
    plotext.figure.clear()
