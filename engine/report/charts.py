"""The pictures of a run, drawn with matplotlib: SVG for the report, one PNG for elsewhere.

The same history gives the same bytes: no date, fixed ids, the fonts that matplotlib brings.
matplotlib and numpy are imported inside functions, since they take longer to load than most
commands take to run.
"""

from __future__ import annotations

import io
import re
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from operator import attrgetter
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from engine.report.model import (
    MINUS,
    EquityPoint,
    PositionPoint,
    RunHistory,
    SipMark,
    currency_prefix,
    money,
)

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import Formatter, Locator
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]
    Indices = NDArray[np.intp]
    # Days and the values that stand from them on.
    _Column = tuple[Floats, Floats]

__all__ = ["BUCKETS_MAX", "FONTS", "PALETTE", "Chart", "png", "svgs", "thin"]

# Okabe and Ito's colours, which people with any colour vision can tell apart, and four greys.
PALETTE: Mapping[str, str] = MappingProxyType(
    {
        "paper": "#ffffff",
        "ink": "#1f2933",
        "muted": "#5b6670",
        "grid": "#e3e7eb",
        "blue": "#0072b2",
        "orange": "#e69f00",
        "green": "#009e73",
        "sky": "#56b4e9",
        "purple": "#cc79a7",
        "vermillion": "#d55e00",
        "grey": "#9aa0a6",
    }
)
SYMBOL_COLOURS = ("blue", "orange", "green", "sky", "purple", "vermillion")
FONTS = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"

# A chart is 1,000 pixels wide on a screen: two buckets a pixel would already be invisible.
BUCKETS_MAX = 400
SIP_PANELS_MAX = 6
SIP_MARKS_MAX = 300
SYMBOL_CHARS_MAX = 12
LEGEND_CHARS_MAX = 120
NAME_CHARS_MAX = 60

WIDTH_IN = 10.0
PNG_DPI = 160
PNG_HEIGHT_IN = 8.95
_LEFT, _RIGHT = 0.095, 0.975
_TITLE_PAD_PT = 25
_TICKS_IN = 0.28
_SIP_TITLE_IN, _SIP_PANEL_IN, _SIP_AXES_IN = 0.32, 1.3, 0.98
_SECONDS_A_DAY = 86_400.0
_HALF_A_DAY = 0.5
_UNITS = ((1e12, "T"), (1e9, "B"), (1e6, "M"))
_AREA_ALPHA = 0.85
_DRAWDOWN_SHOWN_MIN = 0.01
_SHARE_SHOWN_MIN = 1e-6
_LEGEND_SAMPLE_CHARS = 6
_DRAWING = threading.Lock()

_TAG = re.compile(r"<[^>]+>")
_PATH = re.compile(r'\bd="[^"]*"')
_LONG_NUMBER = re.compile(r"-?\d+\.\d{3,}")
_FONT = re.compile(r"font-family: [^;\"]*")
_ID = re.compile(r'(\bid="|url\(#|href="#)([^")]+)')

# A drawn thing and the words for it in the legend.
_Entry = tuple[Any, str]


@dataclass(frozen=True, slots=True)
class Chart:
    """One picture: ``key`` names its kind, ``title`` says in words what it shows."""

    key: str
    title: str
    svg: str


class _Style(NamedTuple):
    """What all charts of a history share."""

    currency: str
    buckets: int
    first: float
    last: float


@dataclass(frozen=True, slots=True)
class _Equity:
    """Marks as columns; ``days`` count from 1970, ``drawdown`` is zero or below.

    ``cash`` is the last: what was cash before is the gap between market value and equity.
    """

    days: Floats
    market_value: Floats
    equity: Floats
    invested: Floats
    drawdown: Floats
    cash: float


@dataclass(frozen=True, slots=True)
class _Holdings:
    """Market value on a common grid of days: a row a symbol, and one for all others if any."""

    days: Floats
    symbols: tuple[str, ...]
    others: int
    values: Floats

    def colours(self) -> list[str]:
        names = SYMBOL_COLOURS[: len(self.symbols)]
        return [PALETTE[name] for name in ((*names, "grey") if self.others else names)]

    def labels(self) -> list[str]:
        names = [_plain(symbol, SYMBOL_CHARS_MAX) for symbol in self.symbols]
        return [*names, f"{self.others} more"] if self.others else names


def svgs(
    history: RunHistory, *, buckets: int = BUCKETS_MAX, id_prefix: str = ""
) -> tuple[Chart, ...]:
    """The charts of a run as stand-alone SVG; none before the first mark.

    ``buckets`` bounds the detail: a longer series keeps each bucket's lowest, highest and last
    values. ``id_prefix`` keeps the ids of several charts on one page apart.
    """
    if not history.equity:
        return ()
    charts = []
    with _drawing():
        style = _style(history, buckets)
        for key, title, figure in _figures(history, style):
            svg = _svg(figure, f"{id_prefix}{key}-")
            charts.append(Chart(key, title, svg))
    return tuple(charts)


def png(history: RunHistory, *, dpi: int = PNG_DPI) -> bytes:
    """Equity, drawdown and positions of a run in one picture, 10 by 9 inches at ``dpi``.

    Raises ``ValueError`` for a run without a mark: there is nothing to draw.
    """
    if not history.equity:
        raise ValueError(f"run {history.name} has no mark yet, so there is nothing to draw")
    with _drawing():
        style = _style(history, BUCKETS_MAX)
        figure = _combined(history, style)
        target = io.BytesIO()
        figure.savefig(target, format="png", dpi=dpi, metadata={"Software": None})
    return target.getvalue()


def thin(days: Floats, columns: Sequence[Floats], buckets: int) -> Indices:
    """Indices that keep the look of ``columns`` when drawn over ``days``, in order.

    Time is cut into equal buckets; each keeps its first and last index and those of every
    column's lowest and highest value. A series that is short enough is kept whole.
    """
    import numpy as np

    if len(days) <= buckets * 2 or days[0] == days[-1]:
        return np.arange(len(days), dtype=np.intp)
    edges = np.searchsorted(days, np.linspace(days[0], days[-1], buckets + 1)[1:-1])
    starts = np.unique(np.concatenate(([0], edges)))
    ends = np.append(starts[1:], len(days))
    kept: set[int] = set()
    for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
        kept.update((start, end - 1))
        for column in columns:
            part = column[start:end]
            kept.update((start + int(part.argmin()), start + int(part.argmax())))
    return np.array(sorted(kept), dtype=np.intp)


# --- Values to columns ------------------------------------------------------------------------


def _style(history: RunHistory, buckets: int) -> _Style:
    first, last = _day(history.equity[0].at), _day(history.equity[-1].at)
    return _Style(_plain(history.currency, SYMBOL_CHARS_MAX), buckets, first, last)


def _day(at: datetime) -> float:
    return at.timestamp() / _SECONDS_A_DAY


def _days(points: Sequence[Any]) -> Floats:
    import numpy as np

    return np.fromiter((point.at.timestamp() for point in points), np.float64) / _SECONDS_A_DAY


def _floats(points: Sequence[Any], name: str) -> Floats:
    import numpy as np

    return np.fromiter(map(float, map(attrgetter(name), points)), np.float64, len(points))


def _equity(points: Sequence[EquityPoint], buckets: int) -> _Equity:
    """The marks that are drawn; drawdown is measured on all of them."""
    import numpy as np

    days, equity = _days(points), _floats(points, "equity")
    value = _floats(points, "market_value")
    peak = np.maximum.accumulate(equity)
    # A peak that isn't above zero has no fraction to lose.
    drawdown = np.where(peak > 0, equity / np.where(peak > 0, peak, 1.0) - 1.0, 0.0)
    keep = thin(days, (equity, value, drawdown), buckets)
    return _Equity(
        days=days[keep],
        market_value=value[keep],
        equity=equity[keep],
        invested=_floats([points[index] for index in keep.tolist()], "invested"),
        drawdown=drawdown[keep],
        cash=float(points[-1].cash),
    )


def _by_size(columns: Mapping[str, _Column]) -> list[str]:
    """The symbols, the largest position of all time first: their order in every chart."""
    import numpy as np

    size = {symbol: float(np.abs(values).max()) for symbol, (_, values) in columns.items()}
    return sorted(columns, key=lambda symbol: (-size[symbol], symbol))


def _holdings(points: Sequence[PositionPoint], style: _Style) -> _Holdings | None:
    """The positions on one grid; the symbols beyond the palette are summed up as others."""
    import numpy as np

    by_symbol: dict[str, list[PositionPoint]] = {}
    for point in points:
        by_symbol.setdefault(point.symbol, []).append(point)
    if not by_symbol:
        return None
    columns = {symbol: _column(held) for symbol, held in by_symbol.items()}
    grid = _grid(list(columns.values()), style)
    ranked = _by_size(columns)
    shown, rest = ranked[: len(SYMBOL_COLOURS)], ranked[len(SYMBOL_COLOURS) :]
    rows = [_held(*columns[symbol], grid) for symbol in shown]
    if rest:
        others = np.zeros(len(grid))
        for symbol in rest:
            others += _held(*columns[symbol], grid)
        rows.append(others)
    return _Holdings(grid, tuple(shown), len(rest), np.vstack(rows))


def _column(points: Sequence[PositionPoint]) -> _Column:
    return _days(points), _floats(points, "market_value")


def _grid(columns: Sequence[_Column], style: _Style) -> Floats:
    """The moments worth drawing: those at which the sum of all columns is extreme, and the end."""
    import numpy as np

    days = np.concatenate([days for days, _ in columns])
    changes = np.concatenate([np.diff(values, prepend=0.0) for _, values in columns])
    order = np.argsort(days, kind="stable")
    days, total = days[order], np.cumsum(changes[order])
    # Symbols marked at one moment change together: the sum stands after the last of them.
    last = np.append(days[1:] != days[:-1], True)
    days, total = days[last], total[last]
    grid: Floats = days[thin(days, [total], style.buckets)]
    return np.append(grid, max(style.last, grid[-1]))


def _held(days: Floats, values: Floats, grid: Floats) -> Floats:
    """The value that stands at each moment of the grid; zero before the first."""
    import numpy as np

    at = np.searchsorted(days, grid, side="right") - 1
    held: Floats = np.where(at >= 0, values[np.maximum(at, 0)], 0.0)
    return held


# --- Drawing ----------------------------------------------------------------------------------


def _figures(history: RunHistory, style: _Style) -> Iterator[tuple[str, str, Figure]]:
    series = _equity(history.equity, style.buckets)
    figure, axes = _panel(3.9, top_in=0.62)
    yield "equity", _draw_equity(axes, series, history.sips, style), figure
    figure, axes = _panel(2.1, top_in=0.4)
    yield "drawdown", _draw_drawdown(axes, series, style), figure
    holdings = _holdings(history.positions, style)
    if holdings is not None:
        figure, axes = _panel(3.1, top_in=0.62)
        yield "positions", _draw_positions(axes, holdings, style), figure
    if history.sips:
        yield _sip_figure(history, holdings.symbols if holdings else (), style)


def _draw_equity(axes: Axes, series: _Equity, sips: Sequence[SipMark], style: _Style) -> str:
    days, equity, value, invested = series.days, series.equity, series.market_value, series.invested
    value_area = axes.fill_between(days, 0, value, color=PALETTE["sky"], alpha=0.45, lw=0)
    cash_area = axes.fill_between(days, value, equity, color=PALETTE["grey"], alpha=0.38, lw=0)
    dot = "o" if len(days) == 1 else ""
    (line,) = axes.plot(days, equity, color=PALETTE["blue"], lw=1.6, marker=dot)
    (paid,) = axes.plot(days, invested, color=PALETTE["ink"], lw=1.3, ls=(0, (4, 2)), marker=dot)
    last = (float(equity[-1]), float(value[-1]), series.cash, float(invested[-1]))
    ends = _ends(last, style.currency)
    names = ("Equity", "Market value", "Cash", "Invested")
    entries: list[_Entry] = [
        (artist, f"{name} {end}")
        for artist, name, end in zip((line, value_area, cash_area, paid), names, ends, strict=True)
    ]
    lowest = min(0.0, *(float(column.min()) for column in (equity, value, invested)))
    highest = max(0.0, *(float(column.max()) for column in (equity, value, invested)))
    room = ((highest - lowest) or 1.0) * 0.06
    axes.set_ylim(lowest - room if lowest < 0 or sips else 0.0, highest + room)
    if sips:
        entries.append((_rug(axes, sips), f"SIP executions {len(sips):,}"))
    title = f"Equity against invested money{_in(style.currency)}"
    _finish(axes, title, entries, style)
    _money_axis(axes, style.currency)
    return title


def _rug(axes: Axes, sips: Sequence[SipMark]) -> Any:
    """A short tick along the bottom for every moment at which a SIP was executed."""
    import numpy as np

    at = np.unique(_sip_days(sips))
    marks = at[thin(at, (), BUCKETS_MAX)]
    (ticks,) = axes.plot(
        marks,
        np.full(len(marks), 0.024),
        transform=axes.get_xaxis_transform(),
        ls="",
        marker="|",
        ms=5.5,
        mew=0.8,
        color=PALETTE["vermillion"],
    )
    return ticks


def _draw_drawdown(axes: Axes, series: _Equity, style: _Style) -> str:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    days, depth = series.days, series.drawdown
    colour = PALETTE["vermillion"]
    axes.fill_between(days, 0, depth, color=colour, alpha=0.28, lw=0)
    axes.plot(days, depth, color=colour, lw=1.1)
    title = "Drawdown: equity below its highest so far"
    worst = int(depth.argmin())
    if depth[worst] < 0:
        axes.plot(days[worst], depth[worst], "o", ms=4, color=colour)
        title = f"{title}, at worst {_percent(float(depth[worst]))} on {_date(float(days[worst]))}"
    lowest = min(float(depth[worst]), -_DRAWDOWN_SHOWN_MIN)
    axes.set_ylim(lowest * 1.16, 0.0)
    axes.yaxis.set_major_locator(MaxNLocator(4))
    decimals = 0 if lowest < -4 * _DRAWDOWN_SHOWN_MIN else 1
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _percent(value, decimals)))
    _finish(axes, title, [], style)
    return title


def _draw_positions(axes: Axes, holdings: _Holdings | None, style: _Style) -> str:
    import numpy as np

    title = f"Positions: market value by symbol{_in(style.currency)}"
    entries: list[_Entry] = []
    if holdings is not None:
        colours = holdings.colours()
        days = holdings.days
        if days[0] == days[-1]:
            # One moment has no width: draw a bar.
            days = days + np.linspace(-_HALF_A_DAY / 2, _HALF_A_DAY / 2, len(days))
        # What is held short is stacked downwards, so that it doesn't hide what is held long.
        for part in (np.maximum(holdings.values, 0.0), np.minimum(holdings.values, 0.0)):
            if part.any():
                _stack(axes, days, part, colours)
        words = _position_words(holdings, style.currency)
        entries = [(_patch(colour), text) for colour, text in zip(colours, words, strict=True)]
    _finish(axes, title, entries, style)
    _money_axis(axes, style.currency)
    if holdings is None or not holdings.values.any():
        axes.set_ylim(0.0, 1.0)
    elif not (holdings.values < 0).any():
        axes.set_ylim(bottom=0.0)
    return title


def _position_words(holdings: _Holdings, currency: str) -> list[str]:
    """The symbols with their last values, or without where there is no room for these."""
    names = holdings.labels()
    ends = _ends(holdings.values[:, -1].tolist(), currency)
    words = [f"{name} {end}" for name, end in zip(names, ends, strict=True)]
    if sum(len(text) + _LEGEND_SAMPLE_CHARS for text in words) <= LEGEND_CHARS_MAX:
        return words
    room = LEGEND_CHARS_MAX // len(names) - _LEGEND_SAMPLE_CHARS
    return [_plain(name, room) for name in names]


def _stack(axes: Axes, days: Floats, values: Floats, colours: Sequence[str]) -> None:
    import numpy as np

    edges = np.vstack((np.zeros(values.shape[1]), np.cumsum(values, axis=0)))
    for lower, upper, colour in zip(edges, edges[1:], colours, strict=False):
        if (upper != lower).any():
            axes.fill_between(days, lower, upper, color=colour, alpha=_AREA_ALPHA, lw=0)


def _patch(colour: str) -> Any:
    from matplotlib.patches import Patch

    return Patch(facecolor=colour, alpha=_AREA_ALPHA, linewidth=0)


def _sip_figure(
    history: RunHistory, ranked: Sequence[str], style: _Style
) -> tuple[str, str, Figure]:
    """One panel a symbol: the price over time, a dot for each purchase."""
    by_symbol: dict[str, list[SipMark]] = {}
    for mark in history.sips:
        by_symbol.setdefault(mark.symbol, []).append(mark)
    known = [symbol for symbol in ranked if symbol in by_symbol]
    shown = [*known, *sorted(by_symbol.keys() - set(known))][:SIP_PANELS_MAX]
    title = f"SIP executions: price paid at each purchase, as traded{_in(style.currency)}"
    if len(shown) < len(by_symbol):
        title = f"{title}, {len(shown)} of {len(by_symbol)} symbols"
    figure = _figure(_SIP_TITLE_IN + len(shown) * _SIP_PANEL_IN + _TICKS_IN)
    top = 1 - 0.25 / figure.get_figheight()
    figure.text(_LEFT, top, title, **_title_font())
    prices = _prices(history.positions, set(shown))
    for row, symbol in enumerate(shown, start=1):
        panel = _place(figure, _SIP_TITLE_IN + row * _SIP_PANEL_IN - _SIP_AXES_IN, _SIP_AXES_IN)
        # A symbol has one colour in all charts of its run.
        colour = PALETTE[SYMBOL_COLOURS[ranked.index(symbol)] if symbol in known else "grey"]
        _draw_sips(panel, by_symbol[symbol], prices.get(symbol), colour, style)
        panel.tick_params(labelbottom=row == len(shown))
    return "sips", title, figure


def _draw_sips(
    axes: Axes,
    marks: Sequence[SipMark],
    price: _Column | None,
    colour: str,
    style: _Style,
) -> None:
    from matplotlib.ticker import MaxNLocator

    if price is not None:
        days, quoted = price
        keep = thin(days, (quoted,), style.buckets // 2)
        axes.plot(days[keep], quoted[keep], color=PALETTE["muted"], lw=0.8, alpha=0.7)
    at = _sip_days(marks)
    paid = _floats(marks, "price")
    some = thin(at, (), SIP_MARKS_MAX // 2)
    axes.plot(at[some], paid[some], ls="", marker="o", ms=3, color=colour)
    axes.set_ylim(bottom=min(0.0, float(paid.min())))
    total = sum((mark.amount for mark in marks), Decimal(0))
    symbol = _plain(marks[0].symbol, SYMBOL_CHARS_MAX)
    count = f"{len(marks):,} {'purchase' if len(marks) == 1 else 'purchases'}"
    axes.set_title(
        f"{symbol}: {count}, {money(total, style.currency)}",
        loc="left",
        fontsize=9,
        color=PALETTE["ink"],
        pad=4,
    )
    _frame(axes, style)
    _money_axis(axes, style.currency)
    axes.yaxis.set_major_locator(MaxNLocator(3))


def _prices(positions: Sequence[PositionPoint], symbols: set[str]) -> dict[str, _Column]:
    """Price a unit over time, by symbol, as the marks of its position imply it."""
    held: dict[str, list[PositionPoint]] = {}
    for point in positions:
        if point.symbol in symbols and point.quantity:
            held.setdefault(point.symbol, []).append(point)
    prices = {}
    for symbol, points in held.items():
        days, values = _column(points)
        prices[symbol] = (days, values / _floats(points, "quantity"))
    return prices


def _sip_days(sips: Sequence[SipMark]) -> Floats:
    import numpy as np

    return np.sort(_days(sips))


def _combined(history: RunHistory, style: _Style) -> Figure:
    figure = _figure(PNG_HEIGHT_IN, paper=True)
    name = _plain(history.name, NAME_CHARS_MAX)
    first, last = (f"{point.at:%Y-%m-%d}" for point in (history.equity[0], history.equity[-1]))
    words = f"{history.ticks:,} ticks from {first} to {last}, {history.executions:,} executions"
    top = 1 - 0.32 / PNG_HEIGHT_IN
    figure.text(_LEFT, top, name, fontsize=15, fontweight="bold", color=PALETTE["ink"])
    figure.text(_RIGHT, top, words, fontsize=9.5, ha="right", color=PALETTE["muted"])
    series = _equity(history.equity, style.buckets)
    _draw_equity(_place(figure, 1.05, 2.75), series, history.sips, style)
    _draw_drawdown(_place(figure, 4.55, 1.15), series, style)
    _draw_positions(_place(figure, 6.7, 1.95), _holdings(history.positions, style), style)
    return figure


# --- The look ---------------------------------------------------------------------------------


def _figure(height_in: float, *, paper: bool = False) -> Figure:
    from matplotlib.figure import Figure

    face = PALETTE["paper"] if paper else "none"
    return Figure(figsize=(WIDTH_IN, height_in), facecolor=face)


def _panel(height_in: float, *, top_in: float) -> tuple[Figure, Axes]:
    figure = _figure(height_in)
    return figure, _place(figure, top_in, height_in - top_in - _TICKS_IN)


def _place(figure: Figure, top_in: float, height_in: float) -> Axes:
    """Axes ``height_in`` inches high, their upper edge ``top_in`` inches below the figure's."""
    whole = figure.get_figheight()
    bottom = 1 - (top_in + height_in) / whole
    return figure.add_axes((_LEFT, bottom, _RIGHT - _LEFT, height_in / whole))


def _title_font() -> dict[str, Any]:
    return {"fontsize": 11.5, "fontweight": "bold", "color": PALETTE["ink"]}


def _finish(axes: Axes, title: str, entries: Sequence[_Entry], style: _Style) -> None:
    pad = _TITLE_PAD_PT if entries else 8
    axes.set_title(title, loc="left", pad=pad, **_title_font())
    if entries:
        handles, labels = zip(*entries, strict=True)
        axes.legend(
            handles,
            labels,
            loc="lower left",
            bbox_to_anchor=(0.0, 1.0),
            ncols=len(entries),
            frameon=False,
            borderaxespad=0.3,
            borderpad=0.0,
            handlelength=1.5,
            handletextpad=0.5,
            columnspacing=1.6,
            fontsize=9,
            labelcolor=PALETTE["ink"],
        )
    _frame(axes, style)


def _frame(axes: Axes, style: _Style) -> None:
    """A thin grid, no box, time along the bottom."""
    axes.set_facecolor("none")
    for side in ("top", "left", "right"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(PALETTE["grey"])
    axes.spines["bottom"].set_linewidth(0.7)
    axes.set_axisbelow(True)
    axes.grid(axis="y", color=PALETTE["grid"], linewidth=0.7)
    axes.tick_params(length=0, labelsize=9, labelcolor=PALETTE["muted"], pad=5)
    pad = _HALF_A_DAY if style.first == style.last else 0.0
    axes.set_xlim(style.first - pad, style.last + pad)
    locator, formatter = _dates()
    axes.xaxis.set_major_locator(locator)
    axes.xaxis.set_major_formatter(formatter)


def _dates() -> tuple[Locator, Formatter]:
    """As many dates as fit, each of them complete: a lone "10:00" doesn't say of which day."""
    from matplotlib import dates

    few = dict.fromkeys(range(dates.MONTHLY, dates.MICROSECONDLY + 1), 7)
    maxticks = few | {dates.YEARLY: 14}
    month, day, minute, second = "%b %Y", "%d %b %Y", "%d %b %H:%M", "%H:%M:%S"
    # Untyped in matplotlib, hence through a name that isn't checked.
    untyped: Any = dates
    locator = untyped.AutoDateLocator(tz=UTC, minticks=3, maxticks=maxticks)
    formatter = untyped.ConciseDateFormatter(
        locator,
        tz=UTC,
        formats=["%Y", month, day, minute, minute, f"{second}.%f"],
        zero_formats=["", month, day, minute, minute, second],
        show_offset=False,
    )
    return locator, formatter


def _money_axis(axes: Axes, currency: str) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value, currency)))


def _short(value: float, currency: str) -> str:
    """An amount as briefly as an axis needs it: ``$250,000``, ``$12.5M``, ``$2.50``."""
    sign = MINUS if value < 0 else ""
    size = abs(value)
    unit, letter = next((pair for pair in _UNITS if size >= 10 * pair[0]), (1.0, ""))
    if letter:
        text = f"{size / unit:,.1f}".removesuffix(".0") + letter
    elif size >= 100 or size == int(size):
        text = f"{size:,.0f}"
    elif size >= 1:
        text = f"{size:.2f}"
    else:
        text = f"{size:.6f}".rstrip("0").rstrip(".")
    return f"{sign}{_axis_prefix(currency)}{text}"


def _ends(values: Sequence[float], currency: str) -> list[str]:
    """Amounts side by side: what is a millionth of the largest counts as nothing."""
    least = max(map(abs, values)) * _SHARE_SHOWN_MIN
    return [_short(value if abs(value) > least else 0.0, currency) for value in values]


def _axis_prefix(currency: str) -> str:
    # A sign fits on every tick; a code stands in the title, once.
    prefix = currency_prefix(currency)
    return prefix if len(prefix) == 1 else ""


def _in(currency: str) -> str:
    return f", {currency}" if currency else ""


def _percent(value: float, decimals: int = 1) -> str:
    text = f"{abs(value) * 100:.{decimals}f} %"
    return f"{MINUS}{text}" if value < 0 else text


def _date(day: float) -> str:
    return f"{datetime.fromtimestamp(day * _SECONDS_A_DAY, UTC):%Y-%m-%d}"


def _plain(text: str, chars_max: int) -> str:
    """A name fit for a picture: one line, printable, not longer than its place."""
    line = "".join(char if char.isprintable() else " " for char in text)
    # matplotlib hides what begins with an underscore from its legends.
    line = line.replace("_", "\u2017", 1) if line.startswith("_") else line
    return line if len(line) <= chars_max else f"{line[: chars_max - 1]}…"


@contextmanager
def _drawing() -> Iterator[None]:
    """Draw with our settings, whatever the user's matplotlibrc says, and leave none behind."""
    import matplotlib

    settings: dict[Any, Any] = {
        "font.family": "DejaVu Sans",
        "text.parse_math": False,
        "svg.fonttype": "none",
        "svg.hashsalt": "oms",
        "path.simplify": True,
    }
    # matplotlib keeps its settings, and Python its warning filters, in one place a process.
    with _DRAWING, matplotlib.rc_context(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from", category=UserWarning)
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(settings)
        yield


def _svg(figure: Figure, id_prefix: str) -> str:
    target = io.StringIO()
    empty = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(target, format="svg", metadata=empty)
    text = target.getvalue()
    text = text[text.index("<svg") :]
    return _TAG.sub(lambda tag: _tidy(tag[0], id_prefix), text)


def _tidy(tag: str, id_prefix: str) -> str:
    """Shorten coordinates to a hundredth of a point, name our fonts, keep ids apart."""
    tag = _PATH.sub(lambda path: _LONG_NUMBER.sub(_two_decimals, path[0]), tag)
    tag = _FONT.sub(f"font-family: {FONTS}", tag)
    return _ID.sub(lambda found: f"{found[1]}{id_prefix}{found[2]}", tag)


def _two_decimals(found: re.Match[str]) -> str:
    return f"{float(found[0]):.2f}"
