"""`oms demo`: the whole engine at work, on real prices."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli.database import is_embedded, owner_dsn
from cli.options import Dsn, Json
from cli.output import Column, count, money, note, number, print_json, print_table, progress, say
from cli.report import write_report

if TYPE_CHECKING:
    from engine.demo import Demo, DemoRun
    from engine.report.metrics import Summary

__all__ = ["demo"]

_REPORT = Path("oms-demo.html")


def demo(
    report: Annotated[
        Path | None,
        typer.Option(
            "--report",
            metavar="PATH",
            help="Where to write the report; with --json none is written unless asked for.",
            show_default=f"./{_REPORT}",
        ),
    ] = None,
    dsn: Dsn = None,
    as_json: Json = False,
) -> None:
    """Run thirteen years of real prices through two runs.

    Daily prices of AAPL, IBM and MSFT from 2000 to 2013. One run invests 500
    USD a month into each, the other holds 50/30/20 and rebalances every
    quarter. Every session is one tick: orders, executions, positions, cash,
    mark and ledger in one transaction. A report with pictures is written as
    one HTML file. Doing it again adds nothing.

    Examples:
      oms demo
      oms demo --json
    """
    from engine.demo import read_market, run_demo

    clock = _Clock()
    with ThreadPoolExecutor(1) as reader:
        # While a server of our own is set up, which takes as long.
        reading = reader.submit(read_market)
        where = owner_dsn(dsn)
        note("Reading thirteen years of prices ...")
        market = reading.result()
    with progress() as move:
        done = run_demo(
            where, market, lambda name, ticks, total: clock.see(move, name, ticks, total)
        )
    path = report or (None if as_json else _REPORT)
    if path is not None:
        note("Writing the report ...")
        write_report(path, [run.history for run in done.runs])
    if as_json:
        print_json({"runs": [_document(run) for run in done.runs]})
    else:
        _tell(done, clock)
        _tell_next(done, path, embedded=is_embedded(dsn))


@dataclass
class _Clock:
    """How long each run took, as its progress tells."""

    began: dict[str, float] = field(default_factory=dict)
    ended: dict[str, float] = field(default_factory=dict)

    def see(self, move: Callable[[str, int, int], None], name: str, done: int, total: int) -> None:
        now = time.monotonic()
        self.began.setdefault(name, now)
        self.ended[name] = now
        move(name, done, total)

    def rate(self, name: str, ticks: int) -> str:
        """Ticks a second."""
        seconds = self.ended.get(name, 0.0) - self.began.get(name, 0.0)
        return f"{ticks / seconds:,.0f}" if seconds > 0 else "–"


def _document(run: DemoRun) -> dict[str, Any]:
    from engine.report.metrics import summary

    history, figures = run.history, summary(run.history)
    return {
        "name": run.name,
        "run_id": run.run_id,
        "ticks": figures.ticks,
        "sip_executions": len(history.sips),
        "orders": figures.orders,
        "trades": figures.executions,
        "invested": history.initial_cash - figures.cash,
        "cash": figures.cash,
        "market_value": figures.market_value,
        "equity": figures.equity,
        "positions": {
            holding.symbol: {"quantity": holding.quantity, "avg_cost": holding.avg_cost}
            for holding in history.holdings
        },
    }


def _tell(done: Demo, clock: _Clock) -> None:
    from engine.report.metrics import summary

    figures = {run.name: summary(run.history) for run in done.runs}
    facts: list[tuple[str, Callable[[str, Summary], str]]] = [
        ("Invested", lambda _, of: money(of.invested)),
        ("Cash", lambda _, of: money(of.cash)),
        ("Market value", lambda _, of: money(of.market_value)),
        ("Equity", lambda _, of: money(of.equity)),
        ("Money-weighted return", lambda _, of: _percent(of.money_weighted_return, "a year")),
        (
            "Max drawdown",
            lambda _, of: _percent(of.max_drawdown.fraction if of.max_drawdown else None),
        ),
        ("Orders", lambda _, of: f"{of.orders:,}"),
        ("Executions", lambda _, of: f"{of.executions:,}"),
        ("Ticks", lambda _, of: f"{of.ticks:,}"),
    ]
    if not done.repeated:  # what was found in the ledger took no time, and would flatter us
        facts.append(("Ticks per second", lambda name, of: clock.rate(name, of.ticks)))
    columns = [Column("", lambda fact: fact[0])] + [
        Column(run.name, _cell(run.name, figures[run.name]), right=True) for run in done.runs
    ]
    say()
    print_table(columns, facts, empty="")
    say()
    if done.written:
        again = f"; {done.repeated:,} were in the ledger already" if done.repeated else ""
        say(f"{count(done.written, 'tick')} in {done.seconds:.1f} s{again}.")
    else:
        say(f"All {count(done.repeated, 'tick')} are already in the ledger: nothing was added.")


def _cell(name: str, figures: Summary) -> Callable[[Any], str]:
    return lambda fact: str(fact[1](name, figures))


def _percent(fraction: Decimal | None, of_time: str = "") -> str:
    if fraction is None:
        return "–"
    return f"{number(round(fraction * 100, 2))} % {of_time}".rstrip()


def _tell_next(done: Demo, path: Path | None, *, embedded: bool) -> None:
    name = done.runs[0].name
    say(f"The report is in {path}; open it in a browser.")
    say()
    say("Next:", style="bold")
    for command, what in (
        (f"oms equity --run-id {name}", "its equity, as a chart in the terminal"),
        (f"oms run show {name}", "its positions, plans and newest events"),
        (f"oms order list --run-id {name}", "what it bought"),
        ("oms audit", "check that the books hold"),
        ("oms db psql", "look at the tables yourself"),
    ):
        say(f"  {command:<34} {what}")
    if embedded:
        say(f"  {'oms db stop':<34} stop the embedded Postgres; its data stays")
