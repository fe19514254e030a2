"""The report of runs as one HTML file that opens anywhere, without a network.

It holds no address at all, and a content security policy that would refuse to fetch one. All
text that isn't ours is escaped. The same histories give the same file, byte by byte.
"""

from __future__ import annotations

import json
import os
import re
import threading
from collections.abc import Mapping, Sequence
from datetime import datetime
from decimal import Decimal
from html import escape
from pathlib import Path
from types import MappingProxyType
from typing import Any

from engine.report.charts import BUCKETS_MAX, FONTS, PALETTE, svgs
from engine.report.metrics import Drawdown, Summary, summary
from engine.report.model import MINUS, Holding, RunHistory, money

__all__ = ["render", "write"]

# Detail of all charts of a page together, and of one chart at least: the page stays small.
BUCKETS_OF_A_PAGE_MAX = 1_000
BUCKETS_MIN = 60
QUANTITY_DECIMALS_MAX = 8
PRICE_DECIMALS = 4
NONE = "–"

# Text is smaller than a line is long, so it needs the darker shades of its colours.
_LIGHT: Mapping[str, str] = MappingProxyType({**PALETTE, "profit": "#007a59", "loss": "#b84f00"})
# What each of them becomes on a dark page.
_DARK: Mapping[str, str] = MappingProxyType(
    {
        "paper": "#14181d",
        "ink": "#e6e9ed",
        "muted": "#9aa5b1",
        "grid": "#2c333b",
        "blue": "#4aa8e0",
        "orange": "#e8ab2e",
        "green": "#2bb98f",
        "sky": "#8fd0f5",
        "purple": "#d893b9",
        "vermillion": "#ef7d3c",
        "grey": "#7b838c",
        "profit": "#2bb98f",
        "loss": "#ef7d3c",
    }
)


def render(histories: Sequence[RunHistory]) -> str:
    """The whole page: a table of the runs, then each run's charts and holdings."""
    figures = [summary(history) for history in histories]
    buckets = BUCKETS_OF_A_PAGE_MAX // max(len(histories), 1)
    buckets = max(BUCKETS_MIN, min(BUCKETS_MAX, buckets))
    runs = [
        _run(number, history, of_run, buckets)
        for number, (history, of_run) in enumerate(zip(histories, figures, strict=True), start=1)
    ]
    title = "Run report" if len(histories) != 1 else f"Run report: {histories[0].name}"
    return _PAGE.format(
        title=escape(title),
        style=_STYLE,
        period=escape(_period(histories)),
        overview=_overview(histories, figures),
        runs="\n".join(runs),
        data=_data(histories, figures),
    )


def write(path: Path, histories: Sequence[RunHistory]) -> None:
    """Write the page to ``path``, whole or not at all; its folder is made if missing."""
    page = render(histories)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    try:
        temporary.write_text(page, encoding="utf-8", newline="\n")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


# --- The parts of the page --------------------------------------------------------------------


def _period(histories: Sequence[RunHistory]) -> str:
    runs = (
        "no run" if not histories else "1 run" if len(histories) == 1 else f"{len(histories)} runs"
    )
    starts = [history.first_at for history in histories if history.first_at]
    ends = [history.last_at for history in histories if history.last_at]
    if not starts or not ends:
        return runs
    return f"{runs}, {_date(min(starts))} to {_date(max(ends))}"


def _overview(histories: Sequence[RunHistory], figures: Sequence[Summary]) -> str:
    head = (
        "Run", "Invested", "Cash", "Market value", "Equity", "Money-weighted return",
        "Max drawdown", "Orders", "Executions", "Ticks",
    )  # fmt: skip
    rows = []
    for number, (history, of_run) in enumerate(zip(histories, figures, strict=True), start=1):
        name = f'<a href="#run-{number}">{escape(history.name)}</a>'
        amounts = (of_run.invested, of_run.cash, of_run.market_value, of_run.equity)
        rows.append(
            _row(
                name,
                *(escape(money(amount, history.currency)) for amount in amounts),
                _rate(of_run.money_weighted_return),
                _fall(of_run.max_drawdown),
                *(f"{count:,}" for count in (of_run.orders, of_run.executions, of_run.ticks)),
            )
        )
    return _table(head, rows, "The runs at their last mark")


def _run(number: int, history: RunHistory, figures: Summary, buckets: int) -> str:
    charts = svgs(history, buckets=buckets, id_prefix=f"run-{number}-")
    pictures = "\n".join(
        f'<figure role="img" aria-label="{escape(chart.title)}">{_inline(chart.svg)}</figure>'
        for chart in charts
    )
    return _RUN.format(
        number=number,
        name=escape(history.name),
        facts=_facts(history),
        tiles=_tiles(history, figures),
        charts=pictures or '<p class="nothing">No mark yet, so there is nothing to draw.</p>',
        holdings=_holdings(history),
    )


def _facts(history: RunHistory) -> str:
    facts = [
        ("Strategy", history.strategy),
        ("User", history.user_id),
        ("Run", history.run_id),
        ("Calendar", history.calendar),
    ]
    if history.first_at and history.last_at:
        facts.append(("Logical time", f"{_date(history.first_at)} to {_date(history.last_at)}"))
    return "".join(f"<div><dt>{label}</dt><dd>{escape(value)}</dd></div>" for label, value in facts)


def _tiles(history: RunHistory, figures: Summary) -> str:
    currency = history.currency
    gain = escape(money(figures.gain, currency, signed=True))
    tiles = [
        (
            "Equity",
            escape(money(figures.equity, currency)),
            f"{gain} on {escape(money(history.initial_cash, currency))}",
        ),
        (
            "Invested",
            escape(money(figures.invested, currency)),
            f"now worth {escape(money(figures.market_value, currency))}",
        ),
        (
            "Money-weighted return",
            _rate(figures.money_weighted_return),
            "a year, on the money invested",
        ),
        ("Max drawdown", _fall(figures.max_drawdown), _fall_dates(figures.max_drawdown)),
    ]
    return "".join(
        f'<div><dt>{label}</dt><dd>{value}</dd><dd class="note">{note}</dd></div>'
        for label, value, note in tiles
    )


def _holdings(history: RunHistory) -> str:
    if not history.holdings:
        return '<p class="nothing">No position is held.</p>'
    head = (
        "Symbol", "Quantity", "Average cost", "Price", "Market value", "Unrealized", "Realized",
    )  # fmt: skip
    rows = [_holding(holding, history.currency) for holding in history.holdings]
    totals = (
        sum((holding.market_value for holding in history.holdings), Decimal(0)),
        sum((holding.unrealized_pnl for holding in history.holdings), Decimal(0)),
        sum((holding.realized_pnl for holding in history.holdings), Decimal(0)),
    )
    foot = _row(
        "All",
        *[""] * 3,
        escape(money(totals[0], history.currency)),
        *(_profit(total, history.currency) for total in totals[1:]),
    )
    return _table(head, rows, "Positions at the last mark", foot)


def _holding(holding: Holding, currency: str) -> str:
    return _row(
        escape(holding.symbol),
        _quantity(holding.quantity),
        escape(money(holding.avg_cost, currency, decimals=PRICE_DECIMALS)),
        escape(money(holding.mark_price, currency, decimals=PRICE_DECIMALS)),
        escape(money(holding.market_value, currency)),
        _profit(holding.unrealized_pnl, currency),
        _profit(holding.realized_pnl, currency),
    )


def _table(head: Sequence[str], rows: Sequence[str], caption: str, foot: str = "") -> str:
    cells = "".join(f'<th scope="col">{label}</th>' for label in head)
    body = "\n".join(rows)
    tail = f"<tfoot>{foot}</tfoot>" if foot else ""
    return (
        f'<div class="wide"><table><caption>{caption}</caption><thead><tr>{cells}</tr></thead>\n'
        f"<tbody>{body}</tbody>{tail}</table></div>"
    )


def _row(name: str, *cells: str) -> str:
    rest = "".join(f"<td>{cell}</td>" for cell in cells)
    return f'<tr><th scope="row">{name}</th>{rest}</tr>'


# --- Figures in words -------------------------------------------------------------------------


def _date(at: datetime) -> str:
    return f"{at:%Y-%m-%d}"


def _percent(value: Decimal) -> str:
    text = f"{abs(value) * 100:,.2f} %"
    return f"{MINUS}{text}" if value < 0 else text


def _rate(rate: Decimal | None) -> str:
    return NONE if rate is None else _percent(rate)


def _fall(drawdown: Drawdown | None) -> str:
    return NONE if drawdown is None else _percent(-drawdown.fraction)


def _fall_dates(drawdown: Drawdown | None) -> str:
    if drawdown is None or not drawdown.fraction:
        return "of equity"
    return f"of equity, {_date(drawdown.peak_at)} to {_date(drawdown.trough_at)}"


def _profit(amount: Decimal, currency: str) -> str:
    kind = "loss" if amount < 0 else "profit" if amount > 0 else "even"
    return f'<span class="{kind}">{escape(money(amount, currency, signed=True))}</span>'


def _quantity(quantity: Decimal) -> str:
    text = money(quantity, decimals=QUANTITY_DECIMALS_MAX)
    return text.rstrip("0").rstrip(".")


# --- Data, pictures, style --------------------------------------------------------------------


def _data(histories: Sequence[RunHistory], figures: Sequence[Summary]) -> str:
    runs = [_figures(*pair) for pair in zip(histories, figures, strict=True)]
    text = json.dumps({"runs": runs}, ensure_ascii=True, indent=1)
    # Inside a script element only these could end it, or begin a comment or an entity.
    for char in "<>&":
        text = text.replace(char, f"\\u{ord(char):04x}")
    return text


def _figures(history: RunHistory, figures: Summary) -> dict[str, Any]:
    fall = figures.max_drawdown
    rate = figures.money_weighted_return
    return {
        "name": history.name,
        "run_id": history.run_id,
        "user_id": history.user_id,
        "strategy": history.strategy,
        "calendar": history.calendar,
        "currency": history.currency,
        "first_at": history.first_at.isoformat() if history.first_at else None,
        "last_at": history.last_at.isoformat() if history.last_at else None,
        "ticks": figures.ticks,
        "orders": figures.orders,
        "executions": figures.executions,
        "sip_executions": len(history.sips),
        "initial_cash": _plain(history.initial_cash),
        "invested": _plain(figures.invested),
        "cash": _plain(figures.cash),
        "market_value": _plain(figures.market_value),
        "equity": _plain(figures.equity),
        "gain": _plain(figures.gain),
        "money_weighted_return": None if rate is None else _plain(rate),
        "max_drawdown": None
        if fall is None
        else {
            "fraction": _plain(fall.fraction),
            "peak_at": fall.peak_at.isoformat(),
            "trough_at": fall.trough_at.isoformat(),
        },
    }


def _plain(value: Decimal) -> str:
    return f"{value:f}"


def _inline(svg: str) -> str:
    """A stand-alone SVG as part of the page: it takes the page's fonts and its theme's colours."""
    svg = _OPENING.sub(r"<svg \1>", _OWN_STYLE.sub("", svg, count=1), count=1)
    return _TAG.sub(lambda tag: _themed(tag[0]), svg)


def _themed(tag: str) -> str:
    # In tags alone: a symbol may be called like a colour.
    tag = tag.replace(f"font-family: {FONTS}; ", "")
    return _COLOUR.sub(lambda found: f"var(--{_NAMES[found[0]]})", tag)


_NAMES = {colour: name for name, colour in PALETTE.items()}
_COLOUR = re.compile("|".join(map(re.escape, _NAMES)))
_TAG = re.compile(r"<[^>]+>")
_OWN_STYLE = re.compile(r"<style.*?</style>", re.DOTALL)
_OPENING = re.compile(r'<svg[^>]*(viewBox="[^"]*")[^>]*>')


def _variables(colours: Mapping[str, str]) -> str:
    return " ".join(f"--{name}: {colour};" for name, colour in colours.items())


_STYLE = f"""
:root {{ color-scheme: light dark; {_variables(_LIGHT)} }}
@media (prefers-color-scheme: dark) {{ :root {{ {_variables(_DARK)} }} }}
""" + """
* { box-sizing: border-box; stroke-linejoin: round; stroke-linecap: butt; }
body { margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 72rem; background: var(--paper);
  color: var(--ink); font: 15px/1.5 FONTS; }
h1 { margin: 0; font-size: 1.7rem; letter-spacing: -0.01em; }
h2 { margin: 0; font-size: 1.35rem; letter-spacing: -0.01em; overflow-wrap: anywhere; }
header p, .note, .facts { color: var(--muted); }
header p { margin: 0.1rem 0 1.5rem; }
section { margin-top: 3rem; padding-top: 2rem; border-top: 1px solid var(--grid); }
a { color: var(--blue); text-decoration: none; }
a:hover { text-decoration: underline; }
dl { margin: 0; display: flex; flex-wrap: wrap; }
dd { margin: 0; overflow-wrap: anywhere; }
.facts { gap: 0.1rem 1.5rem; margin: 0.3rem 0 1.5rem; font-size: 0.85rem; }
.facts div { display: flex; gap: 0.4rem; }
.facts dt::after { content: ":"; }
.tiles { gap: 0.75rem; margin-bottom: 1.75rem; }
.tiles div { flex: 1 1 13rem; padding: 0.8rem 1rem; border: 1px solid var(--grid);
  border-radius: 8px; }
.tiles dt { font-size: 0.85rem; color: var(--muted); }
.tiles dd { font-size: 1.35rem; font-weight: 600; font-variant-numeric: tabular-nums; }
.tiles .note { font-size: 0.85rem; font-weight: 400; }
.wide, figure { overflow-x: auto; }
figure { margin: 0 0 1.75rem; }
figure svg { display: block; width: 100%; min-width: 40rem; height: auto; }
table { width: 100%; border-collapse: collapse; font-size: 0.84rem;
  font-variant-numeric: tabular-nums; }
caption { padding-bottom: 0.4rem; text-align: left; font-size: 1rem; font-weight: 700; }
th, td { padding: 0.45rem 0.4rem; border-bottom: 1px solid var(--grid); text-align: right;
  white-space: nowrap; }
th { font-weight: 600; }
thead th { color: var(--muted); font-size: 0.78rem; vertical-align: bottom; white-space: normal; }
th:first-child, td:first-child { padding-left: 0; text-align: left; }
th:last-child, td:last-child { padding-right: 0; }
tfoot th, tfoot td { border-bottom: 0; font-weight: 600; }
.profit { color: var(--profit); }
.loss { color: var(--loss); }
.nothing { color: var(--muted); }
@media print { body { max-width: none; padding: 0; } figure, tr { break-inside: avoid; } }
""".replace("FONTS", FONTS)

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<header>
<h1>Run report</h1>
<p>{period}</p>
</header>
<main>
{overview}
{runs}
</main>
<script type="application/json" id="figures">
{data}
</script>
</body>
</html>
"""

_RUN = """<section id="run-{number}">
<h2>{name}</h2>
<dl class="facts">{facts}</dl>
<dl class="tiles">{tiles}</dl>
{charts}
{holdings}
</section>"""
