"""The pictures of a run: that they show it, always the same, whatever it is called."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from decimal import Decimal
from pathlib import Path
from xml.etree import ElementTree as ET

import matplotlib
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from report_cases import DAY, START, a_history, a_point, a_sip_history, points_of

from engine.report.charts import PALETTE, Chart, png, svgs, thin
from engine.report.model import EquityPoint, PositionPoint, RunHistory, SipMark

SVG = "{http://www.w3.org/2000/svg}"
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
ODD_NAMES = ("<script>", "_hidden", "$x^2$", "印度", "a\nb\x07", "-->", "#0072b2", "x" * 80)


def texts(chart: Chart) -> list[str]:
    return [element.text or "" for element in ET.fromstring(chart.svg).iter(f"{SVG}text")]


def by_key(history: RunHistory) -> dict[str, Chart]:
    return {chart.key: chart for chart in svgs(history)}


def a_position(day: int, symbol: str, value: int, quantity: int = 1) -> PositionPoint:
    return PositionPoint(START + DAY * day, symbol, Decimal(quantity), Decimal(value))


# --- What is drawn --------------------------------------------------------------------------


def test_a_sip_run_has_four_charts() -> None:
    charts = by_key(a_sip_history())
    assert list(charts) == ["equity", "drawdown", "positions", "sips"]


def test_a_run_without_sips_or_positions_has_the_other_charts() -> None:
    charts = by_key(a_history(points_of(100, 120, 90)))
    assert list(charts) == ["equity", "drawdown"]
    assert not any("SIP" in text for text in texts(charts["equity"]))


def test_a_run_without_a_mark_has_no_chart() -> None:
    history = replace(a_sip_history(), equity=())
    assert svgs(history) == ()
    with pytest.raises(ValueError, match="run demo has no mark yet"):
        png(history)


def test_a_run_of_one_mark_is_drawn() -> None:
    history = a_sip_history(ticks=1)
    assert list(by_key(history)) == ["equity", "drawdown", "positions", "sips"]
    assert png(history).startswith(PNG_SIGNATURE)


def test_the_equity_chart_names_its_last_figures() -> None:
    history = a_sip_history()
    last = history.equity[-1]
    drawn = texts(by_key(history)["equity"])
    for name, amount in (
        ("Equity", last.equity),
        ("Market value", last.market_value),
        ("Cash", last.cash),
        ("Invested", last.invested),
    ):
        assert f"{name} ${amount:,.0f}" in drawn
    assert f"SIP executions {len(history.sips)}" in drawn
    assert "Equity against invested money, USD" in drawn


def test_the_drawdown_chart_names_the_worst() -> None:
    chart = by_key(a_history(points_of(100, 120, 60, 130)))["drawdown"]
    assert chart.title.endswith("at worst −50.0 % on 2000-03-03")
    assert chart.title in texts(chart)


@pytest.mark.parametrize("equity", [(100, 110), (-5, -9), (0, 0)])
def test_a_run_that_never_fell_has_no_worst(equity: tuple[int, int]) -> None:
    chart = by_key(a_history(points_of(*equity)))["drawdown"]
    assert "worst" not in chart.title


def test_a_currency_without_a_sign_stands_in_the_title_alone() -> None:
    chart = by_key(a_sip_history(currency="CHF"))["equity"]
    assert chart.title == "Equity against invested money, CHF"
    assert not any("CHF" in text for text in texts(chart) if text != chart.title)


@pytest.mark.parametrize(
    ("factor", "tick"),
    [("1e9", "T"), ("1e6", "B"), ("1e3", "M"), ("1e-5", "$2.40"), ("1e-8", "$0.0024")],
)
def test_amounts_on_axes_are_short(factor: str, tick: str) -> None:
    points = [
        EquityPoint(point.at, Decimal(0), *[point.equity * Decimal(factor)] * 3)
        for point in points_of(240_000, 250_000, 247_000)
    ]
    assert any(text.endswith(tick) for text in texts(by_key(a_history(points))["equity"]))


def test_symbols_are_ranked_by_size_and_keep_their_colour() -> None:
    history = replace(
        a_history(points_of(100, 100)),
        positions=[a_position(0, "SMALL", 10), a_position(0, "LARGE", 90)],
        sips=[SipMark(START, symbol, Decimal(10), Decimal(10)) for symbol in ("SMALL", "LARGE")],
    )
    charts = by_key(history)
    drawn = texts(charts["positions"])
    assert drawn.index("LARGE $90") < drawn.index("SMALL $10")
    panels = [text for text in texts(charts["sips"]) if "1 purchase," in text]
    assert panels == ["LARGE: 1 purchase, $10.00", "SMALL: 1 purchase, $10.00"]
    fills = re.findall(r"fill: (#\w+); stroke: #\w+\"", charts["sips"].svg)
    assert fills == [PALETTE["blue"], PALETTE["orange"]]


def test_symbols_beyond_the_palette_are_summed_up() -> None:
    positions = [a_position(0, f"S{number}", 100 - number) for number in range(9)]
    drawn = texts(by_key(a_history(points_of(1, 1), positions=positions))["positions"])
    assert "3 more $279" in drawn
    assert "S5 $95" in drawn
    assert not any(text.startswith("S6") for text in drawn)


def test_long_symbols_leave_no_room_for_amounts() -> None:
    positions = [a_position(0, f"SYMBOL-{number}-LONG", 90 - number) for number in range(7)]
    drawn = texts(by_key(a_history(points_of(1, 1), positions=positions))["positions"])
    assert [text for text in drawn if text.startswith("SYMBOL")] == [
        f"SYMBOL-{number}-L…" for number in range(6)
    ]
    assert "1 more" in drawn


def test_a_remainder_of_cash_counts_as_nothing() -> None:
    history = a_history([a_point(0, 100_000, cash="0.0006"), a_point(1, 100_000, cash="0.0006")])
    assert "Cash $0" in texts(by_key(history)["equity"])


def test_more_sip_symbols_than_panels_are_counted_in_the_title() -> None:
    chart = by_key(a_sip_history(ticks=3, symbols=[f"S{number}" for number in range(8)]))["sips"]
    assert chart.title.endswith("6 of 8 symbols")


def test_a_sip_of_a_symbol_without_a_position_is_drawn() -> None:
    sips = [SipMark(START, "GONE", Decimal(10), Decimal(5))]
    charts = by_key(a_history(points_of(1, 1), sips=sips))
    assert "GONE: 1 purchase, $10.00" in texts(charts["sips"])


def heights(svg: str, colour: str) -> tuple[float, float]:
    """The uppermost and lowest point, in points from above, of the area filled with a colour."""
    root = ET.fromstring(svg)
    shapes = {path.get("id"): path.get("d", "") for path in root.iter(f"{SVG}path")}
    for use in root.iter(f"{SVG}use"):
        style = use.get("style", "")
        if f"fill: {colour}" in style and "fill-opacity" in style:
            shape = shapes[use.get("{http://www.w3.org/1999/xlink}href", "")[1:]]
            ys = [float(pair.split()[1]) for pair in re.findall(r"[ML] (\S+ \S+)", shape)]
            base = float(use.get("y", "0"))
            return base + min(ys), base + max(ys)
    raise AssertionError(f"no area of {colour}")


def test_a_short_position_is_stacked_downwards() -> None:
    positions = [
        *(a_position(day, "LONG", 100) for day in (0, 1)),
        *(a_position(day, "SHORT", -50, -1) for day in (0, 1)),
    ]
    svg = by_key(a_history(points_of(50, 50), positions=positions))["positions"].svg
    long_top, long_bottom = heights(svg, PALETTE["blue"])
    short_top, short_bottom = heights(svg, PALETTE["orange"])
    assert long_bottom == pytest.approx(short_top, abs=0.02)
    assert long_bottom - long_top == pytest.approx(2 * (short_bottom - short_top), abs=0.05)


def test_a_closed_position_counts_as_nothing() -> None:
    positions = [a_position(0, "AAPL", 100), a_position(1, "AAPL", 0, 0)]
    chart = by_key(a_history(points_of(100, 100, 100), positions=positions))["positions"]
    assert "AAPL $0" in texts(chart)


def test_only_closed_positions_are_drawn_as_nothing() -> None:
    chart = by_key(a_history(points_of(1, 1), positions=[a_position(0, "AAPL", 0, 0)]))
    assert "AAPL $0" in texts(chart["positions"])


def test_a_picture_of_a_run_without_positions_is_drawn() -> None:
    assert png(a_history(points_of(100, 90, 95)), dpi=40).startswith(PNG_SIGNATURE)


def test_marks_of_one_day_show_their_hours() -> None:
    points = [
        replace(point, at=START + timedelta(minutes=10 * number))
        for number, point in enumerate(points_of(*range(100, 120)))
    ]
    drawn = texts(by_key(a_history(points))["drawdown"])
    assert any(re.fullmatch(r"01 Mar 2\d:\d0", text) for text in drawn)


# --- Names ----------------------------------------------------------------------------------


def test_odd_names_are_drawn_as_text() -> None:
    charts = by_key(a_sip_history(ticks=30, symbols=ODD_NAMES[:6], name=ODD_NAMES[0]))
    drawn = texts(charts["positions"])
    for name in ("<script>", "\u2017hidden", "$x^2$", "印度", "a b ", "-->"):
        assert any(re.fullmatch(re.escape(name) + r"( \$[\d,]+)?", text) for text in drawn), name
    assert all("<script>" not in chart.svg for chart in charts.values())


def test_a_long_name_is_cut() -> None:
    drawn = texts(by_key(a_sip_history(ticks=2, symbols=["x" * 80]))["positions"])
    assert any(text.startswith("x" * 11 + "… ") for text in drawn)


@pytest.mark.parametrize("name", ODD_NAMES)
def test_a_picture_takes_any_name(name: str) -> None:
    history = a_history(points_of(1, 2), name=name, currency=name)
    assert png(history, dpi=30).startswith(PNG_SIGNATURE)


# --- Sameness and neighbours ----------------------------------------------------------------


def test_the_same_history_gives_the_same_bytes() -> None:
    history = a_sip_history()
    assert svgs(history) == svgs(replace(history))
    assert png(history, dpi=40) == png(replace(history), dpi=40)


def test_a_user_s_own_style_changes_nothing_and_stays() -> None:
    history = a_sip_history(ticks=5)
    before = svgs(history)
    with matplotlib.rc_context({"font.size": 30, "axes.grid": False, "text.color": "red"}):
        assert svgs(history) == before
        assert matplotlib.rcParams["font.size"] == 30


def test_charts_drawn_by_several_threads_are_the_same() -> None:
    history = a_sip_history(ticks=5)
    expected = svgs(history)
    drawn: list[tuple[Chart, ...]] = []
    threads = [threading.Thread(target=lambda: drawn.append(svgs(history))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert drawn == [expected] * 3


def test_no_chart_holds_a_date_or_an_address() -> None:
    for chart in svgs(a_sip_history()):
        namespaces = re.findall(r'xmlns(?::xlink)?="[^"]*"', chart.svg)
        assert len(namespaces) == 2
        assert chart.svg.count("http") == len(namespaces)
        assert "metadata" not in chart.svg


def test_ids_take_the_prefix_and_every_reference_has_its_target() -> None:
    for chart in svgs(a_sip_history(), id_prefix="run-7-"):
        ids = re.findall(r'\bid="([^"]*)"', chart.svg)
        used = re.findall(r'(?:url\(|href=")#([^")]*)', chart.svg)
        assert len(ids) == len(set(ids))
        assert all(name.startswith(f"run-7-{chart.key}-") for name in ids)
        assert set(used) <= set(ids)


def test_neither_import_nor_drawing_loads_more_than_it_needs() -> None:
    program = """
import sys
import engine.report.charts, engine.report.html, engine.report.terminal
early = {"matplotlib", "numpy", "plotext"} & set(sys.modules)
sys.path.insert(0, sys.argv[1])
import report_cases
engine.report.charts.png(report_cases.a_sip_history(ticks=2), dpi=20)
print(early, "matplotlib.pyplot" in sys.modules)
"""
    here = Path(__file__).parent
    found = subprocess.run(
        [sys.executable, "-c", program, str(here)],
        cwd=here.parents[1],
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.strip() == "set() False"


# --- Size -----------------------------------------------------------------------------------


def columns_of(values: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    return np.arange(len(values), dtype=np.float64), np.array(values, dtype=np.float64)


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=200), st.integers(2, 20))
def test_thinning_keeps_ends_and_extremes(values: list[float], buckets: int) -> None:
    days, column = columns_of(values)
    kept = thin(days, [column], buckets)
    assert list(kept) == sorted(set(kept.tolist()))
    assert (kept[0], kept[-1]) == (0, len(values) - 1)
    assert column[kept].min() == column.min()
    assert column[kept].max() == column.max()
    assert len(kept) <= buckets * 4


def test_a_short_series_is_kept_whole() -> None:
    days, column = columns_of(range(20))
    assert list(thin(days, [column], 10)) == list(range(20))


def test_moments_that_are_all_one_are_kept_whole() -> None:
    days = np.zeros(50)
    assert len(thin(days, [np.arange(50.0)], 4)) == 50


def test_detail_follows_time_rather_than_the_number_of_marks() -> None:
    # Ten thousand marks on the first day, then one a day: the years keep their detail.
    days = np.concatenate((np.linspace(0, 1, 10_000), np.arange(2.0, 1002.0)))
    kept = thin(days, [np.sin(days)], 100)
    assert (days[kept] > 1).sum() > 150


def test_a_long_run_stays_small_and_keeps_its_worst_day() -> None:
    values = [1_000 + number % 97 for number in range(40_000)]
    values[23_456] = 10
    points = [a_point(number / 24, value) for number, value in enumerate(values)]
    charts = by_key(a_history(points))
    assert "−99.1 %" in charts["drawdown"].title
    assert sum(len(chart.svg) for chart in charts.values()) < 500_000


def test_many_sips_are_drawn_as_many_as_can_be_told_apart() -> None:
    points = points_of(*[100] * 3_000)
    sips = [SipMark(point.at, "AAPL", Decimal(1), Decimal(5)) for point in points]
    charts = by_key(a_history(points, sips=sips))
    assert charts["sips"].svg.count("<use") < 400
    assert charts["equity"].svg.count("<use") < 1_000
    assert "AAPL: 3,000 purchases, $3,000.00" in texts(charts["sips"])
