"""`oms tick`: one step of a run."""

from __future__ import annotations

from typing import Annotated

import typer

from cli.database import acting
from cli.options import Dsn, Json, RunId
from cli.output import count, money, note, print_json, say, utc

__all__ = ["tick"]


def tick(
    run_id: RunId,
    at: Annotated[
        str | None,
        typer.Option(
            "--at",
            metavar="TIME",
            help="The planned moment, with its time zone.",
            show_default="now",
        ),
    ] = None,
    price: Annotated[
        list[str] | None,
        typer.Option(
            "--price",
            metavar="SYMBOL=PRICE",
            help="A price at that moment; may be repeated.",
            show_default="the stored prices",
        ),
    ] = None,
    dsn: Dsn = None,
    as_json: Json = False,
) -> None:
    """Tick a run once.

    Its strategy decides, orders are placed and filled, the run is marked: one
    transaction, exactly once. The same moment again writes nothing and tells
    what the first tick did. A run only moves forward. With --at, everything is
    as if it were then. Without --price it gets the stored prices of its session.

    Examples:
      oms tick --run-id 7f3a
      oms tick --run-id 7f3a --at 2024-01-31T21:00:00Z --price AAPL=184.4
    """
    from engine import reads
    from engine.clock import utc_now
    from engine.feeds import prices_at
    from engine.market.imports import parse_prices, parse_time
    from engine.market.store import negative_symbols
    from engine.tick import run_tick

    live = at is None
    logical_time = utc_now() if at is None else parse_time(at, "time")
    with acting(dsn) as conn:
        run = reads.find_run(conn, run_id)
        prices = (
            parse_prices(price, negative_symbols(conn))
            if price
            else prices_at(conn, run, logical_time)
        )
        result = run_tick(
            conn,
            run.user_id,
            run.run_id,
            logical_time,
            prices,
            now=logical_time if live else None,
        )
    if as_json:
        print_json({"run_id": run.run_id, **{name: getattr(result, name) for name in _FIELDS}})
        return
    if not prices and not result.repeated:
        note("There were no prices: give them with --price, or `oms data import` them.")
    say(
        f"Tick at {utc(result.logical_time)}"
        + (" was in the ledger already; nothing was written. It had " if result.repeated else ": ")
        + f"{count(result.orders, 'order')}, {count(result.executions, 'execution')}; "
        f"equity {money(result.equity)} = cash {money(result.cash)} + market value "
        f"{money(result.market_value)} {run.currency}."
    )


_FIELDS = (
    "logical_time",
    "repeated",
    "orders",
    "executions",
    "cash",
    "market_value",
    "equity",
)
