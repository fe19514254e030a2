"""`oms order`: what was asked for and what became of it."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from cli.database import acting, reading
from cli.options import Dsn, Json, Limit, RunFilter, RunId, SymbolFilter
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
    from decimal import Decimal

    from engine.reads import OrderDetail, OrderRow

__all__ = ["app"]

app = typer.Typer(
    name="order",
    no_args_is_help=True,
    help="Orders: what was asked for and what became of it.\n\n"
    "Example: oms order list --run-id demo-sip",
)


Word = TypeVar("Word", bound=StrEnum)

_Price = Annotated[str | None, typer.Option("--limit-price", metavar="PRICE", show_default=False)]
_StopPrice = Annotated[
    str | None, typer.Option("--stop-price", metavar="PRICE", show_default=False)
]


def _word(kind: type[Word], given: str) -> Word:
    """One of the words that the database stores. Raises BadInput."""
    from engine.errors import BadInput

    try:
        return kind(given)
    except ValueError:
        known = ", ".join(kind)
        raise BadInput(f"{given!r} is none of {known}.") from None


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


OrderArgument = Annotated[
    str,
    typer.Argument(metavar="ORDER", help="Its id, or the first digits of it.", show_default=False),
]


@app.command()
def place(
    run_id: RunId,
    symbol: Annotated[str, typer.Option("--symbol", metavar="SYMBOL", show_default=False)],
    side: Annotated[str, typer.Option("--side", metavar="SIDE", help="BUY or SELL.")] = "BUY",
    quantity: Annotated[str, typer.Option("--quantity", metavar="UNITS")] = "1",
    order_type: Annotated[
        str,
        typer.Option("--type", metavar="TYPE", help="MARKET, LIMIT, STOP, STOP_LIMIT or TRAIL."),
    ] = "MARKET",
    limit_price: _Price = None,
    stop_price: _StopPrice = None,
    time_in_force: Annotated[
        str, typer.Option("--tif", metavar="TIF", help="DAY, GTC, IOC, FOK, OPG or CLS.")
    ] = "DAY",
    dsn: Dsn = None,
    as_json: Json = False,
) -> None:
    """Place an order of your own in a run that trades at a broker.

    Examples:
      oms order place --run-id live --symbol AAPL --side BUY --quantity 10
      oms order place --run-id live --symbol AAPL --side SELL --quantity 5 \\
        --type LIMIT --limit-price 210.50
    """
    from engine import reads
    from engine.market.imports import parse_decimal
    from engine.orders.by_hand import place_order
    from engine.orders.model import OrderType, Side, TimeInForce
    from engine.strategies.base import PlaceOrder

    with acting(dsn) as conn:
        run = reads.find_run(conn, run_id)
        wanted = PlaceOrder(
            symbol,
            _word(Side, side),
            parse_decimal(quantity, "quantity"),
            _word(OrderType, order_type),
            _word(TimeInForce, time_in_force),
            limit_price=parse_decimal(limit_price, "limit price") if limit_price else None,
            stop_price=parse_decimal(stop_price, "stop price") if stop_price else None,
        )
        order_id = place_order(conn, run.user_id, run.run_id, wanted)
        order = reads.find_order(conn, str(order_id), run=run)
    if as_json:
        print_json(order)
    else:
        why = order.status_reason or order.reject_code
        say(f"Order {order.order_id} is {order.status}{f': {why}' if why else ''}.")


@app.command()
def cancel(
    order: OrderArgument, run_id: RunFilter = None, dsn: Dsn = None, as_json: Json = False
) -> None:
    """Cancel an order, at once or by asking its broker.

    Example:
      oms order cancel 00035d01-3ae8
    """
    from engine import reads
    from engine.orders.by_hand import cancel_order

    with acting(dsn) as conn:
        run = reads.find_run(conn, run_id) if run_id else None
        found = reads.find_order(conn, order, run=run)
        result = cancel_order(conn, found.user_id, found.run_id, found.order_id)
    if as_json:
        print_json({"order_id": found.order_id, "result": result})
    else:
        say(f"Order {found.order_id}: {result}.")


@app.command("cancel-all")
def cancel_all(run_id: RunId, dsn: Dsn = None, as_json: Json = False) -> None:
    """Cancel all open orders of a run.

    Example:
      oms order cancel-all --run-id live
    """
    from engine import reads
    from engine.orders import by_hand

    with acting(dsn) as conn:
        run = reads.find_run(conn, run_id)
        results = by_hand.cancel_all(conn, run.user_id, run.run_id)
    if as_json:
        print_json({"orders": [{"order_id": o, "result": r} for o, r in results.items()]})
        return
    for order_id, result in results.items():
        say(f"Order {order_id}: {result}.")
    if not results:
        say("No order is open.")


@app.command()
def modify(
    order: OrderArgument,
    quantity: Annotated[
        str | None,
        typer.Option("--quantity", metavar="UNITS", help="What is filled included."),
    ] = None,
    limit_price: _Price = None,
    stop_price: _StopPrice = None,
    version: Annotated[
        int | None,
        typer.Option("--version", metavar="N", help="Only if it is still at this version."),
    ] = None,
    run_id: RunFilter = None,
    dsn: Dsn = None,
    as_json: Json = False,
) -> None:
    """Ask for another quantity or price; fills and the order's id stay.

    What the gate refuses leaves the order as it was (exit code 1).

    Example:
      oms order modify 00035d01-3ae8 --limit-price 99.50
    """
    from engine import reads
    from engine.errors import BadInput
    from engine.market.imports import parse_decimal
    from engine.orders.by_hand import modify_order
    from engine.orders.write import MODIFIED

    def number_of(text: str | None, what: str) -> Decimal | None:
        return parse_decimal(text, what) if text else None

    with acting(dsn) as conn:
        run = reads.find_run(conn, run_id) if run_id else None
        found = reads.find_order(conn, order, run=run)
        result = modify_order(
            conn,
            found.user_id,
            found.run_id,
            found.order_id,
            version=version,
            quantity=number_of(quantity, "quantity"),
            limit_price=number_of(limit_price, "limit price"),
            stop_price=number_of(stop_price, "stop price"),
        )
    if result not in MODIFIED:
        raise BadInput(f"order {found.order_id} keeps its terms: {result}")
    if as_json:
        print_json({"order_id": found.order_id, "result": result})
    else:
        say(f"Order {found.order_id}: {result}.")


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
