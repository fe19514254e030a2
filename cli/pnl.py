"""`oms pnl`: what a run has earned."""

from __future__ import annotations

from cli.database import reading
from cli.options import Dsn, Json, RunId
from cli.output import Column, day, moment, money, number, price, print_json, print_table, say

__all__ = ["pnl"]

_POSITIONS = (
    Column("SYMBOL", "symbol"),
    Column("QUANTITY", "quantity", number, right=True),
    Column("AVG COST", "avg_cost", price, right=True, spare=2),
    Column("MARK", "mark_price", price, right=True, spare=1),
    Column("MARKED (UTC)", "marked_at", moment, spare=3),
    Column("REALISED", "realized_pnl", money, right=True),
    Column("UNREALISED", "unrealized_pnl", money, right=True),
    Column("COMMISSION", "commission", money, right=True),
    Column("TOTAL", "total_pnl", money, right=True),
)
_DAYS = (
    Column("SESSION", "session_date", day),
    Column("REALISED", "realized_pnl", money, right=True),
    Column("COMMISSION", "commission", money, right=True),
    Column("EQUITY", "equity", money, right=True, spare=1),
    Column("TOTAL", "total_pnl", money, right=True),
)
_LOTS = (
    Column("SYMBOL", "symbol"),
    Column("OPENED (UTC)", "opened_at", moment),
    Column("BY", "opened_by", spare=1),
    Column("QUANTITY", "quantity", number, right=True),
    Column("COST", "cost", money, right=True),
)


def pnl(run_id: RunId, dsn: Dsn = None, as_json: Json = False) -> None:
    """Show profit by position, by session and by lot.

    By the run's method, average cost or first in first out, in its currency;
    commissions at the exchange rate of their time. Days go by the broker's
    time. Realised and unrealised are before commission, TOTAL is after it.

    Example:
      oms pnl --run-id demo-sip
    """
    from engine import reads
    from engine.pnl import pnl as reckon

    with reading(dsn) as conn:
        run = reads.find_run(conn, run_id)
        found = reckon(conn, run)
    if as_json:
        print_json({"run_id": run.run_id, "currency": run.currency, "pnl": found})
        return
    print_table(_POSITIONS, found.positions, empty="Nothing has been traded.")
    for title, columns, rows in (("Sessions", _DAYS, found.days), ("Open lots", _LOTS, found.lots)):
        if rows:
            say()
            say(title, style="bold")
            print_table(columns, rows, empty="")
