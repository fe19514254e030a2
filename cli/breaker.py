"""`oms breaker`: at what trading stops by itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from cli.database import owning, reading
from cli.options import Dsn, Json, UserFilter
from cli.output import Column, number, print_json, print_table, say
from cli.output import as_json as to_json

if TYPE_CHECKING:
    from decimal import Decimal

__all__ = ["app"]

app = typer.Typer(
    name="breaker",
    no_args_is_help=True,
    help="Circuit breakers: at what trading stops by itself.\n\n"
    "Example: oms breaker set DAILY_LOSS --user alice --value 5000",
)

_COLUMNS = (
    Column("KIND", "kind"),
    Column("TRIPS AT", lambda breaker: _threshold(breaker.threshold), right=True),
    Column("UNIT", "unit"),
    Column("WINDOW (S)", "seconds", right=True),
    Column("USER", lambda breaker: breaker.user_id or "by default", spare=1),
    Column("ACCOUNT", "account", spare=1),
    Column("TRIPS WHEN", "why", spare=2),
)


def _threshold(threshold: Decimal | None) -> str:
    return "off" if threshold is None else number(threshold)


@app.command("set")
def set_(
    kind: Annotated[
        str,
        typer.Argument(
            metavar="KIND",
            help="DAILY_LOSS, REJECT_STORM, LATENCY or STALE_PRICE.",
            show_default=False,
        ),
    ],
    user: Annotated[str, typer.Option("--user", metavar="NAME", help="Whose.", show_default=False)],
    account: Annotated[
        str | None,
        typer.Option(
            "--account", metavar="ACCOUNT", help="Only this account's.", show_default=False
        ),
    ] = None,
    value: Annotated[
        str | None,
        typer.Option("--value", metavar="N", help="In the kind's unit.", show_default=False),
    ] = None,
    seconds: Annotated[
        int | None,
        typer.Option("--seconds", metavar="N", help="The window that it looks at."),
    ] = None,
    off: Annotated[bool, typer.Option("--off", help="It never trips.")] = False,
    default: Annotated[bool, typer.Option("--default", help="It trips as by default.")] = False,
    dsn: Dsn = None,
    as_json: Json = False,
) -> None:
    """Set at what a breaker of a user trips, or switch it off.

    It is the right of the tables' owner and holds at once. Silence of a broker
    (HEARTBEAT) is set in its account.

    Examples:
      oms breaker set DAILY_LOSS --user alice --value 5000
      oms breaker set LATENCY --user alice --account DU1 --off
    """
    from engine.accounts import require_account
    from engine.breakers import Setting, set_breaker
    from engine.errors import BadInput
    from engine.market.imports import parse_decimal
    from engine.reads import find_user

    if [value is not None, off, default].count(True) != 1:
        raise BadInput("give one of --value, --off and --default")
    setting = None if default else Setting(parse_decimal(value) if value else None, seconds)
    with owning(dsn) as conn:
        user_id = find_user(conn, user).user_id
        require_account(conn, user_id, account)
        holds = set_breaker(conn, user_id, kind, account, setting)
    if as_json:
        print_json(to_json(holds))
    else:
        what = "is off" if holds.threshold is None else f"trips at {number(holds.threshold)}"
        say(f"{holds.kind} {what}{'' if holds.threshold is None else f' {holds.unit}'}.")


@app.command("list")
def list_(user: UserFilter = None, dsn: Dsn = None, as_json: Json = False) -> None:
    """List at what breakers trip: by default, and where set otherwise.

    Example:
      oms breaker list --user alice
    """
    from engine.breakers import list_breakers
    from engine.reads import find_user

    with reading(dsn) as conn:
        breakers = list_breakers(conn, find_user(conn, user).user_id if user else None)
    if as_json:
        print_json({"breakers": breakers})
    else:
        print_table(_COLUMNS, breakers, empty="There are no breakers.")
