"""`oms data`: prices, splits and symbols."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli.database import acting, reading
from cli.options import Calendar, Dsn, Json
from cli.output import Column, count, moment, print_json, print_table, say

if TYPE_CHECKING:
    from engine.market.store import Imported

__all__ = ["app"]

app = typer.Typer(
    name="data",
    no_args_is_help=True,
    help="Market data: prices, splits and symbols.\n\nExample: oms data import prices.csv",
)

_COLUMNS = (
    Column("SYMBOL", "symbol"),
    Column("NAME", "name", spare=1),
    Column("CURRENCY", "currency", spare=2),
    Column("BARS", "bars", lambda bars: f"{bars:,}", right=True),
    Column("FIRST (UTC)", "first", moment),
    Column("LAST (UTC)", "last", moment),
    Column("SPLITS", "splits", right=True),
)


@app.command("import")
def import_(
    context: typer.Context,
    bars: Annotated[
        Path | None,
        typer.Argument(metavar="FILE", help="CSV of prices, .gz or not.", show_default=False),
    ] = None,
    splits: Annotated[
        Path | None,
        typer.Option("--splits", metavar="FILE", help="CSV of splits.", show_default=False),
    ] = None,
    calendar: Calendar = "XNYS",
    currency: Annotated[
        str, typer.Option("--currency", metavar="CODE", help="Currency of new symbols.")
    ] = "USD",
    dsn: Dsn = None,
    as_json: Json = False,
) -> None:
    """Import prices and splits from CSV files: all rows or none.

    Prices: symbol,date,open,high,low,close,volume (volume may be left out).
    A date is that session of the calendar; a column timestamp instead, with
    time zones, is the end of each bar.
    Splits: symbol,ex_date,numerator,denominator (2,1 doubles the units).

    A broken line is named by its number. Importing the same rows again adds
    nothing; other figures for a stored bar are refused, since runs have traded
    on it.

    Examples:
      oms data import prices.csv.gz --splits splits.csv
      oms data import nse.csv --calendar XNSE --currency INR
    """
    from engine.errors import translated
    from engine.market.imports import read_bars, read_splits
    from engine.market.store import import_bars, import_splits, negative_symbols

    if bars is None and splits is None:
        raise typer.BadParameter(
            "Name a file of prices, or one of splits with --splits", ctx=context
        )
    done: dict[str, Imported] = {}
    with acting(dsn) as conn:
        negative = negative_symbols(conn)
        prices = read_bars(bars, calendar=calendar, negative_symbols=negative) if bars else []
        actions = read_splits(splits, calendar=calendar) if splits else []
        with translated(), conn.transaction():
            if prices:
                done["bars"] = import_bars(conn, prices, currency=currency.upper())
            if actions:
                done["splits"] = import_splits(conn, actions)
    if as_json:
        print_json(done)
        return
    for what, imported in done.items():
        known = f", {count(imported.symbols_added, 'new symbol')}" if imported.symbols_added else ""
        say(f"Read {imported.read:,} {what}: {imported.added:,} new{known}.")


@app.command()
def fx(
    rates: Annotated[
        Path, typer.Argument(metavar="FILE", help="CSV of rates, .gz or not.", show_default=False)
    ],
    dsn: Dsn = None,
    as_json: Json = False,
) -> None:
    """Import exchange rates from a CSV file: all rows or none.

    currency,quote_currency,at,rate: from the moment at on, which has a time
    zone, one unit of currency costs rate of quote_currency. Commissions in
    another currency than their run's are converted at the rate of their time,
    which may be a week old at most.

    Example:
      oms data fx rates.csv
    """
    from engine.errors import translated
    from engine.market.imports import read_rates
    from engine.market.store import import_rates

    with acting(dsn) as conn, translated():
        done = import_rates(conn, read_rates(rates))
    if as_json:
        print_json({"rates": done})
    else:
        say(f"Read {done.read:,} rates: {done.added:,} new.")


@app.command("list")
def list_(dsn: Dsn = None, as_json: Json = False) -> None:
    """List known symbols and what is stored of each.

    Example:
      oms data list
    """
    from engine.market.store import list_data

    with reading(dsn) as conn:
        stored = list_data(conn)
    if as_json:
        print_json({"symbols": stored})
    else:
        print_table(_COLUMNS, stored, empty="No symbols are known; `oms data import` brings some.")


@app.command()
def add(
    symbol: Annotated[str, typer.Argument(metavar="SYMBOL", show_default=False)],
    name: Annotated[
        str | None,
        typer.Option("--name", metavar="NAME", help="Its name.", show_default=False),
    ] = None,
    currency: Annotated[
        str, typer.Option("--currency", metavar="CODE", help="Currency of its prices.")
    ] = "USD",
    decimals: Annotated[
        int,
        typer.Option(
            "--decimals", metavar="N", min=0, max=8, help="Decimals that quantities are cut to."
        ),
    ] = 6,
    negative: Annotated[
        bool,
        typer.Option(
            "--negative-prices", help="Its price may be zero or below (spreads, futures)."
        ),
    ] = False,
    dsn: Dsn = None,
    as_json: Json = False,
) -> None:
    """Make a symbol known, so that it can be planned and traded.

    An import does so too, with the defaults.

    Example:
      oms data add TCS --currency INR --decimals 0
    """
    from engine.errors import translated
    from engine.market.imports import parse_symbol
    from engine.market.store import add_instrument

    wanted = parse_symbol(symbol)
    with acting(dsn) as conn, translated():
        added = add_instrument(
            conn,
            wanted,
            name,
            currency,
            quantity_decimals=decimals,
            negative_price_allowed=negative,
        )
    if as_json:
        print_json({"symbol": wanted, "added": added})
    else:
        say(f"{wanted} is known{'' if added else ' already'}.")
