"""`oms account`: accounts at brokers, and how they may be traded."""

from __future__ import annotations

from typing import Annotated

import typer

from cli.arguments import parse_object, parse_time_of_day
from cli.database import acting, reading
from cli.options import Calendar, Dsn, Json, UserFilter
from cli.output import Column, money, print_json, print_table, say

__all__ = ["app"]

app = typer.Typer(
    name="account",
    no_args_is_help=True,
    help="Accounts at brokers: who trades where, how fast, in which hours.\n\n"
    "Example: oms account add DU1 --user alice --broker dummy --cash 100000",
)

_COLUMNS = (
    Column("ACCOUNT", "account"),
    Column("USER", "user_name"),
    Column("BROKER", "broker"),
    Column("CONNECTED", lambda account: "yes" if account.connected else "no"),
    Column("OPENING CASH", "opening_cash", money, right=True, spare=2),
    Column("CURRENCY", "currency", spare=3),
    Column("ORDERS/S", "orders_per_second", right=True, spare=2),
    Column("MESSAGES/S", "messages_per_second", right=True, spare=3),
    Column("OUT OF SESSION", "out_of_session", spare=4),
)


@app.command()
def add(
    account: Annotated[
        str, typer.Argument(help="Its name at the broker.", metavar="NAME", show_default=False)
    ],
    user: Annotated[
        str, typer.Option("--user", metavar="NAME", help="Who owns it.", show_default=False)
    ],
    broker: Annotated[
        str, typer.Option("--broker", metavar="KIND", help="The kind of broker.")
    ] = "dummy",
    cash: Annotated[
        str,
        typer.Option("--cash", metavar="AMOUNT", help="What is there before our first order."),
    ] = "0",
    currency: Annotated[str, typer.Option("--currency", metavar="CODE")] = "USD",
    calendar: Calendar = "XNYS",
    hours: Annotated[
        str | None,
        typer.Option(
            "--hours",
            metavar="FROM-TO",
            help="Hours instead of the calendar's, as 09:00-17:00.",
            show_default=False,
        ),
    ] = None,
    time_zone: Annotated[
        str, typer.Option("--time-zone", metavar="ZONE", help="Of the hours.")
    ] = "UTC",
    out_of_session: Annotated[
        str,
        typer.Option("--out-of-session", metavar="POLICY", help="QUEUE orders, or REFUSE them."),
    ] = "QUEUE",
    orders_per_second: Annotated[
        int, typer.Option("--orders-per-second", metavar="N", help="New orders in any one second.")
    ] = 10,
    messages_per_second: Annotated[
        int, typer.Option("--messages-per-second", metavar="N", help="Messages of any kind.")
    ] = 45,
    settings: Annotated[
        str | None,
        typer.Option(
            "--settings",
            metavar="JSON",
            help="What the broker's adapter needs: host, port, client id.",
            show_default=False,
        ),
    ] = None,
    dsn: Dsn = None,
    as_json: Json = False,
) -> None:
    """Add an account at a broker.

    Examples:
      oms account add DU1 --user alice --broker dummy --cash 100000 \\
        --settings '{"port": 7500}'
      oms account add DU2 --user alice --hours 09:00-17:00 --out-of-session REFUSE
    """
    from engine import reads
    from engine.accounts import AccountTerms, add_account
    from engine.market.imports import parse_decimal

    opens_at, closes_at = (None, None) if hours is None else parse_time_of_day(hours)
    terms = AccountTerms(
        broker=broker.lower(),
        currency=currency.upper(),
        opening_cash=parse_decimal(cash, "cash"),
        calendar=calendar,
        time_zone=time_zone,
        opens_at=opens_at,
        closes_at=closes_at,
        out_of_session=out_of_session.upper(),
        orders_per_second=orders_per_second,
        messages_per_second=messages_per_second,
        settings=parse_object(settings, "--settings"),
    )
    with acting(dsn) as conn:
        add_account(conn, reads.find_user(conn, user).user_id, account, terms)
    if as_json:
        print_json({"user": user, "account": account, "broker": terms.broker})
        return
    say(f"Account {account} of {user} is at {terms.broker}.")
    say(f"Next: oms connect --user {user} --account {account}")


@app.command("list")
def list_(user: UserFilter = None, dsn: Dsn = None, as_json: Json = False) -> None:
    """List accounts, and whether a connector holds them.

    Example:
      oms account list --user alice
    """
    from engine.accounts import list_accounts

    with reading(dsn) as conn:
        accounts = list_accounts(conn, user=user)
    if as_json:
        print_json({"accounts": accounts})
    else:
        print_table(_COLUMNS, accounts, empty="There are no accounts; `oms account add` adds one.")
