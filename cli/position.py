"""`oms position`: what runs hold."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from cli.database import reading
from cli.options import Dsn, Json, RunFilter
from cli.output import Column, moment, money, number, price, print_json, print_table

if TYPE_CHECKING:
    from engine.reads import PositionRow

__all__ = ["app"]

app = typer.Typer(
    name="position",
    no_args_is_help=True,
    help="Positions: what runs hold.\n\nExample: oms position list --run-id demo-sip",
)


def _run(position: PositionRow) -> str:
    return position.run_name or str(position.run_id)[:8]


_COLUMNS = (
    Column("RUN", _run),
    Column("SYMBOL", "symbol"),
    Column("QUANTITY", "quantity", number, right=True),
    Column("AVG COST", "avg_cost", price, right=True),
    Column("MARK", "mark_price", price, right=True, spare=1),
    Column("MARKED (UTC)", "marked_at", moment, spare=2),
    Column("MARKET VALUE", "market_value", money, right=True),
    Column("UNREALISED", "unrealized_pnl", money, right=True),
    Column("REALISED", "realized_pnl", money, right=True, spare=3),
)


@app.callback()
def group() -> None:
    """Keep `list` a word of its own, although it is the only one."""


@app.command("list")
def list_(
    run_id: RunFilter = None,
    closed: Annotated[
        bool, typer.Option("--closed", help="Also those that are no longer held.")
    ] = False,
    dsn: Dsn = None,
    as_json: Json = False,
) -> None:
    """List positions at average cost and last mark.

    Profits are before commission; a mark is the last price that the run saw.

    Example:
      oms position list --run-id demo-sip
    """
    from engine import reads

    with reading(dsn) as conn:
        run = reads.find_run(conn, run_id) if run_id else None
        positions = reads.list_positions(conn, run=run, closed=closed)
    if as_json:
        print_json({"positions": positions})
    else:
        print_table(_COLUMNS, positions, empty="Nothing is held.")
