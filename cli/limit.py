"""`oms limit`: what orders must keep to."""

from __future__ import annotations

from typing import Annotated

import typer

from cli.arguments import parse_day
from cli.database import owning, reading
from cli.options import Dsn, Json, RunFilter, SymbolFilter, UserFilter
from cli.output import Column, day, number, print_json, print_table, say
from cli.output import as_json as to_json

__all__ = ["app"]

app = typer.Typer(
    name="limit",
    no_args_is_help=True,
    help="Limits that every order must keep to.\n\n"
    "Example: oms limit add MAX_POSITION --user alice --value 1000",
)

_COLUMNS = (
    Column("LIMIT", lambda limit: str(limit.limit_id)[:8]),
    Column("KIND", "kind"),
    Column("VALUE", "limit_value", number, right=True),
    Column("UNIT", "unit"),
    Column("SYMBOL", "symbol"),
    Column("RUN", lambda limit: str(limit.run_id)[:8] if limit.run_id else "", spare=2),
    Column("ACCOUNT", "account", spare=3),
    Column("SECONDS", "seconds", number, right=True, spare=4),
    Column("FROM", "valid_from", day, spare=4),
    Column("TO", "valid_to", day, spare=4),
    Column("USER", "user_id", spare=1),
)


@app.command()
def add(
    kind: Annotated[
        str,
        typer.Argument(
            metavar="KIND",
            help="MAX_POSITION, ORDER_RATE_MAX, DAILY_LOSS_MAX, ...; the table limit_kind has all.",
            show_default=False,
        ),
    ],
    user: UserFilter = None,
    run_id: RunFilter = None,
    account: Annotated[
        str | None,
        typer.Option(
            "--account", metavar="ACCOUNT", help="Only orders for it.", show_default=False
        ),
    ] = None,
    symbol: SymbolFilter = None,
    value: Annotated[
        str | None,
        typer.Option("--value", metavar="N", help="In the kind's unit.", show_default=False),
    ] = None,
    seconds: Annotated[
        str | None,
        typer.Option(
            "--seconds", metavar="N", help="ORDER_RATE_MAX: the window.", show_default="1"
        ),
    ] = None,
    start: Annotated[
        str | None,
        typer.Option(
            "--from", metavar="DATE", help="RESTRICTED_SYMBOL: first day.", show_default=False
        ),
    ] = None,
    end: Annotated[
        str | None,
        typer.Option("--until", metavar="DATE", help="Its last day.", show_default=False),
    ] = None,
    dsn: Dsn = None,
    as_json: Json = False,
) -> None:
    """Add a limit for a user or a run.

    It is the right of the tables' owner and holds from the next order on.

    Examples:
      oms limit add MAX_POSITION --user alice --symbol AAPL --value 100
      oms limit add RESTRICTED_SYMBOL --user alice --symbol IBM --from 2024-01-01
    """
    from engine import reads
    from engine.accounts import require_account
    from engine.errors import BadInput
    from engine.limits import NewLimit, add_limit
    from engine.market.imports import parse_decimal

    if user is None and run_id is None:
        raise BadInput("name a user with --user, or a run with --run-id")
    with owning(dsn) as conn:
        run = reads.find_run(conn, run_id) if run_id else None
        user_id = run.user_id if run else reads.find_user(conn, str(user)).user_id
        require_account(conn, user_id, account)
        new = NewLimit(
            kind,
            parse_decimal(value) if value else None,
            run.run_id if run else None,
            account,
            symbol,
            parse_decimal(seconds) if seconds else None,
            parse_day(start, "--from") if start else None,
            parse_day(end, "--until") if end else None,
        )
        limit = add_limit(conn, user_id, new)
    if as_json:
        print_json(to_json(limit))
    else:
        say(f"The limit {str(limit.limit_id)[:8]}, {limit.kind}, holds from the next order on.")


@app.command("list")
def list_(user: UserFilter = None, dsn: Dsn = None, as_json: Json = False) -> None:
    """List limits, in the order in which a refusal names them.

    Example:
      oms limit list --user alice
    """
    from engine import reads
    from engine.limits import list_limits

    with reading(dsn) as conn:
        limits = list_limits(conn, reads.find_user(conn, user).user_id if user else None)
    if as_json:
        print_json({"limits": limits})
    else:
        print_table(_COLUMNS, limits, empty="There are no limits.")


@app.command()
def remove(
    limit: Annotated[
        str,
        typer.Argument(
            metavar="LIMIT", help="Its id, or the first digits of it.", show_default=False
        ),
    ],
    dsn: Dsn = None,
    as_json: Json = False,
) -> None:
    """Remove a limit; orders from now on need not keep to it.

    Example:
      oms limit remove 7f3a
    """
    from engine.limits import remove_limit

    with owning(dsn) as conn:
        removed = remove_limit(conn, limit)
    if as_json:
        print_json({"limit_id": removed.limit_id, "removed": True})
    else:
        say(f"The limit {str(removed.limit_id)[:8]}, {removed.kind}, is removed.")
