"""`oms order`: what was asked for and what became of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from cli.database import reading
from cli.options import Dsn, Json, Limit, RunFilter, SymbolFilter
from cli.output import (
    Column,
    moment,
    money,
    note,
    number,
    price,
    print_facts,
    print_json,
    print_table,
    say,
    utc,
)
from cli.output import as_json as to_json

if TYPE_CHECKING:
    from engine.reads import OrderDetail, OrderRow

__all__ = ["app"]

app = typer.Typer(
    name="order",
    no_args_is_help=True,
    help="Orders: what was asked for and what became of it.\n\n"
    "Example: oms order list --run-id demo-sip",
)


def _run(order: OrderRow) -> str:
    return order.run_name or str(order.run_id)[:8]


def _terms(order: OrderRow) -> str:
    return f"{order.order_type} {order.time_in_force}"


_COLUMNS = (
    Column("ORDER", "order_id"),
    Column("RUN", _run, spare=2),
    Column("PLACED (UTC)", "logical_time", moment),
    Column("SIDE", "side"),
    Column("SYMBOL", "symbol"),
    Column("QUANTITY", "quantity", number, right=True),
    Column("TERMS", _terms, spare=4),
    Column("STATUS", "status"),
    Column("AVG PRICE", "avg_fill_price", price, right=True, spare=1),
    Column("WHY", lambda order: order.reject_code or order.status_reason or "", spare=3),
)
_EXECUTIONS = (
    Column("TIME (UTC)", "logical_time", moment),
    Column("QUANTITY", "quantity", number, right=True),
    Column("PRICE", "price", price, right=True),
    Column("COMMISSION", "commission", money, right=True),
    Column("EXECUTION", "execution_id", spare=1),
)
_EVENTS = (
    Column("#", "seq", right=True),
    Column("TIME (UTC)", "logical_time", moment),
    Column("EVENT", "event_type"),
)


@app.command("list")
def list_(
    run_id: RunFilter = None,
    status: Annotated[
        str | None,
        typer.Option(
            "--status",
            metavar="STATUS",
            help="Only NEW, PENDING, FILLED, REJECTED, CANCELED, EXPIRED, ...",
            show_default=False,
        ),
    ] = None,
    symbol: SymbolFilter = None,
    limit: Limit = 50,
    dsn: Dsn = None,
    as_json: Json = False,
) -> None:
    """List orders, newest first.

    Examples:
      oms order list --run-id demo-sip --symbol AAPL
      oms order list --status rejected --json
    """
    from engine import reads

    with reading(dsn) as conn:
        run = reads.find_run(conn, run_id) if run_id else None
        orders = reads.list_orders(conn, run=run, status=status, symbol=symbol, limit=limit)
    if as_json:
        print_json({"orders": orders})
        return
    print_table(_COLUMNS, orders, empty="There are no such orders.")
    if len(orders) == limit:
        note(f"These are the newest {limit}; --limit shows more.")


@app.command()
def show(
    order: Annotated[
        str,
        typer.Argument(
            metavar="ORDER", help="Its id, or the first digits of it.", show_default=False
        ),
    ],
    run_id: RunFilter = None,
    dsn: Dsn = None,
    as_json: Json = False,
) -> None:
    """Show an order with its executions and its events.

    Example:
      oms order show 00035d01-3ae8
    """
    from engine import reads

    with reading(dsn) as conn:
        run = reads.find_run(conn, run_id) if run_id else None
        detail = reads.order_detail(conn, reads.find_order(conn, order, run=run))
    if as_json:
        lists = {"executions": detail.executions, "events": detail.events}
        print_json(to_json(detail.order) | lists)
    else:
        _print_detail(detail)


def _print_detail(detail: OrderDetail) -> None:
    order = detail.order
    print_facts(
        {
            "Order": str(order.order_id),
            "Run": f"{order.run_name or ''} {order.run_id}".strip(),
            "Asked for": f"{order.side} {number(order.quantity)} {order.symbol}",
            "Terms": _terms(order),
            "Limit price": None if order.limit_price is None else price(order.limit_price),
            "Stop price": None if order.stop_price is None else price(order.stop_price),
            "Trail": _trail(order),
            "Placed": utc(order.logical_time),
            "Expires": utc(order.expire_at),
            "Status": order.status,
            "Since": utc(order.status_at),
            "Refused by": order.reject_source and f"{order.reject_source}: {order.reject_code}",
            "Why": order.status_reason,
            "Filled": _filled(order),
            "Commission": money(order.commission) if order.commission else None,
            "Client id": order.client_order_id,
        }
    )
    for title, columns, rows in (
        ("Executions", _EXECUTIONS, detail.executions),
        ("Events", _EVENTS, detail.events),
    ):
        if rows:
            say()
            say(title, style="bold")
            print_table(columns, rows, empty="")


def _filled(order: OrderRow) -> str | None:
    if not order.filled_quantity:
        return None
    return f"{number(order.filled_quantity)} at {price(order.avg_fill_price)} on average"


def _trail(order: OrderRow) -> str | None:
    if order.trail_percent is not None:
        return f"{number(order.trail_percent)} %"
    return None if order.trail_amount is None else number(order.trail_amount)
