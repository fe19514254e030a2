"""A run's equity as a chart of characters, for people in a terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any, NamedTuple

from engine.report.charts import thin
from engine.report.model import EquityPoint, RunHistory, money

__all__ = ["equity_chart"]

WIDTH_MIN_CHARS = 40
HEIGHT_MIN_LINES = 8
DOTS_A_CHAR = 2
CHARS_A_DATE = 16
CHARS_A_YEAR = 8
LINES_A_TICK = 4

# Below this share of the highest amount, an axis may as well begin at zero.
_FROM_ZERO = 0.4
# An axis shows at least this share of the highest amount: cents aren't worth a mountain.
_RANGE_MIN = 0.01
_HALF_A_DAY_S = 43_200.0
_DAY_S = 86_400.0
_YEAR_S = 365.25 * _DAY_S
_RESET = "\x1b[0m"


class _Line(NamedTuple):
    """How a line looks: by colour (of the terminal's 256), and by shape where there is none."""

    name: str
    marker: str
    colour: int


_EQUITY = _Line("Equity", "braille", 12)
_INVESTED = _Line("Invested", "·", 11)
_SAMPLES = {"braille": "⣀⠤⠒", "·": "···"}


def equity_chart(
    history: RunHistory, width: int = 80, height: int = 20, *, colour: bool = True
) -> str:
    """Equity and invested money over time, ``width`` characters by ``height`` lines.

    Without ``colour`` the text holds no escape codes. Too small a terminal gets the smallest
    chart that can be read. A run without a mark gets a sentence.
    """
    name = _plain(history.name)
    if not history.equity:
        return f"{name} has no mark yet, so there is nothing to draw."
    width, height = max(width, WIDTH_MIN_CHARS), max(height, HEIGHT_MIN_LINES)
    points = _thinned(history.equity, width * DOTS_A_CHAR)
    columns = {
        _INVESTED: [point.invested for point in points],
        _EQUITY: [point.equity for point in points],
    }
    ends = [
        _legend(line, f"{line.name} {money(columns[line][-1], history.currency)}", colour)
        for line in (_EQUITY, _INVESTED)
    ]
    figure = _figure(width, height - 2)
    seconds = [point.at.timestamp() for point in points]
    for line, amounts in columns.items():
        _draw(figure, line, seconds, [float(amount) for amount in amounts])
    _time_axis(figure, seconds, width)
    _money_axis(figure, [*columns[_EQUITY], *columns[_INVESTED]], history.currency, height)
    drawn: str = figure.build().string(colorless=not colour)
    body = (line.rstrip() for line in drawn.splitlines())
    return "\n".join((name, "   ".join(ends), *body))


def _legend(line: _Line, text: str, colour: bool) -> str:
    words = f"{_SAMPLES[line.marker]} {text}"
    return f"\x1b[38;5;{line.colour}m{words}{_RESET}" if colour else words


def _figure(width: int, height: int) -> Any:
    import plotext

    # A figure of our own: the module's is shared by all who draw, and no larger than the screen.
    terminal = type(plotext.terminal)().limit(width=False, height=False)
    figure = type(plotext.figure)(terminal)
    figure.plot_size(width, height).theme("simple")
    return figure.axes(False, axis="x", side="upper").axes(False, axis="y", side="right")


def _draw(figure: Any, line: _Line, seconds: Sequence[float], amounts: Sequence[float]) -> None:
    import plotext

    shape = plotext.marker(line.marker, pixel=plotext.pixel(foreground=line.colour))
    figure.draw(figure.signal(list(seconds), list(amounts), marker=shape).lines(True))


def _time_axis(figure: Any, seconds: Sequence[float], width: int) -> None:
    first, last = seconds[0], seconds[-1]
    if first == last:
        first, last = first - _HALF_A_DAY_S, last + _HALF_A_DAY_S
    years = (last - first) / _YEAR_S
    if years >= 3:
        step = math.ceil(years / (width // CHARS_A_YEAR))
        dates = _new_years(first, last, step)
        form = "%Y"
    else:
        dates = _spread(first, last, width // CHARS_A_DATE)
        form = "%Y-%m-%d" if last - first > 3 * _DAY_S else "%m-%d %H:%M"
    labels = [f"{datetime.fromtimestamp(at, UTC):{form}}" for at in dates]
    figure.ruler("x", "lower").lim(first, last).ticks(dates, labels=labels)


def _new_years(first: float, last: float, step: int) -> list[float]:
    start, end = (datetime.fromtimestamp(at, UTC).year for at in (first, last))
    years = range(start, end + 1, step)
    starts = [datetime(year, 1, 1, tzinfo=UTC).timestamp() for year in years]
    return [at for at in starts if first <= at <= last]


def _money_axis(figure: Any, amounts: Sequence[Decimal], currency: str, height: int) -> None:
    low, high = float(min(amounts)), float(max(amounts))
    if 0 < low < high * _FROM_ZERO:
        low = 0.0
    least = max(abs(low), abs(high)) * _RANGE_MIN or 1.0
    if high - low < least:
        low, high = low - least / 2, high + least / 2
    ticks, decimals = _round_ticks(low, high, max(2, height // LINES_A_TICK))
    labels = [money(Decimal(tick), currency, decimals=decimals) for tick in ticks]
    low, high = min(low, ticks[0]), max(high, ticks[-1])
    figure.ruler("y", "left").lim(low, high).ticks(ticks, labels=labels)


def _round_ticks(low: float, high: float, count: int) -> tuple[list[float], int]:
    """At most ``count`` + 2 amounts in steps of 1, 2, 2.5 or 5, and the decimals they need."""
    power = 10.0 ** math.floor(math.log10((high - low) / count))
    step = next(power * nice for nice in (1, 2, 2.5, 5, 10) if power * nice * count >= high - low)
    first = math.floor(low / step)
    last = math.ceil(high / step)
    decimals = 0 if step >= 10 else max(2, 1 - math.floor(math.log10(step)))
    return [number * step for number in range(first, last + 1)], decimals


def _spread(low: float, high: float, count: int) -> list[float]:
    return [low + (high - low) * step / (count - 1) for step in range(count)]


def _thinned(points: Sequence[EquityPoint], buckets: int) -> list[EquityPoint]:
    import numpy as np

    count = len(points)
    seconds = np.fromiter((point.at.timestamp() for point in points), np.float64, count)
    equity = np.fromiter((float(point.equity) for point in points), np.float64, count)
    return [points[index] for index in thin(seconds, (equity,), buckets)]


def _plain(text: str) -> str:
    """A name without control characters: a terminal would obey them."""
    return "".join(char if char.isprintable() else " " for char in text)
