"""`oms flatten`: close every position."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from cli.database import acting
from cli.options import By, Dsn, Json, RunFilter, UserFilter
from cli.output import as_json as to_json
from cli.output import print_facts, print_json, utc

__all__ = ["flatten"]


def flatten(
    context: typer.Context,
    reason: Annotated[
        str,
        typer.Option("--reason", metavar="WORDS", help="Why; it is kept.", show_default=False),
    ],
    user: UserFilter = None,
    run_id: RunFilter = None,
    account: Annotated[
        str | None,
        typer.Option(
            "--account", metavar="ACCOUNT", help="Only this account's.", show_default=False
        ),
    ] = None,
    by: By = None,
    dsn: Dsn = None,
    as_json: Json = False,
) -> None:
    """Close every position of a user, a run or an account.

    What works is cancelled, then one order a position goes ahead of all else.
    The engine (`oms work`) takes it to its end; asked again while it runs,
    this shows how far it is. To keep a strategy from trading on, halt first.

    Example:
      oms flatten --user alice --reason "leaving the market"
    """
    if not (user or run_id):
        raise typer.BadParameter("name a user with --user, or a run with --run-id", context)
    from engine import reads
    from engine.accounts import require_account
    from engine.clock import utc_now
    from engine.config import operator
    from engine.flatten import Scope
    from engine.flatten import flatten as close_all

    with acting(dsn) as conn:
        run = reads.find_run(conn, run_id) if run_id else None
        user_id = run.user_id if run else reads.find_user(conn, str(user)).user_id
        require_account(conn, user_id, account)
        scope = Scope(run.run_id if run else None, account)
        asked = close_all(conn, user_id, scope, reason, by or operator(), utc_now())
    if as_json:
        print_json(to_json(asked))
    else:
        _print(asked)


def _print(asked: Any) -> None:
    summary = asked.summary or {}
    exposed = ", ".join(f"{row['quantity']} {row['symbol']}" for row in summary.get("exposed", ()))
    print_facts(
        {
            "Flatten": str(asked.flatten_id),
            "Scope": asked.scope,
            "Status": asked.status,
            "Asked": utc(asked.asked_at),
            "By": asked.asked_by,
            "Reason": asked.reason,
            "Runs already": "yes; no second one was begun" if asked.repeated else None,
            "Still exposed": exposed or None,
        }
    )
