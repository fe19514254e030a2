"""`oms reconcile`: our books against all that a broker knows, now."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli.database import acting
from cli.errors import REFUSED
from cli.options import Dsn, Json
from cli.output import Column, count, print_json, print_table, say, utc

if TYPE_CHECKING:
    from engine.differences import Difference
    from engine.reconcile import Reconciliation

__all__ = ["reconcile"]

# What only a person can settle.
_OPEN = ("ALERTED", "HELD")


def _told(value: Any) -> str:
    """What one side says, in short: a number as it is, an order by where it stands."""
    if isinstance(value, dict):
        told = [value.get("status"), value.get("quantity"), value.get("symbol")]
        return " ".join(str(word) for word in told if word) or json.dumps(value, default=str)
    return "" if value is None else str(value)


_COLUMNS = (
    Column("CLASS", "kind"),
    Column("SUBJECT", "subject"),
    Column("OURS", lambda difference: _told(difference.ours), spare=1),
    Column("BROKER'S", lambda difference: _told(difference.brokers), spare=1),
    Column("LEDGER'S", lambda difference: _told(difference.derived), spare=2),
    Column("DONE", "action"),
    Column("WHY", "reason", spare=3),
)


def reconcile(
    account: Annotated[
        str, typer.Option("--account", metavar="NAME", help="The account.", show_default=False)
    ],
    user: Annotated[
        str, typer.Option("--user", metavar="NAME", help="Whose it is.", show_default=False)
    ],
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Compare only; change and store nothing.")
    ] = False,
    wait: Annotated[
        float,
        typer.Option("--wait", metavar="SECONDS", min=0, help="How long the broker has to answer."),
    ] = 60.0,
    dsn: Dsn = None,
    as_json: Json = False,
) -> None:
    """Compare our books with all that a broker knows of an account.

    The broker is asked for its open orders, executions, positions and cash.
    What was lost on the way is put right, and said; what nobody can know is
    left to you (exit code 1). It happens by itself after every connection and
    every few minutes. `oms connect` and `oms work` must be running.

    Examples:
      oms reconcile --account DU123 --user alice
      oms reconcile --account DU123 --user alice --dry-run
    """
    from engine.accounts import require_account
    from engine.clock import utc_now
    from engine.reads import find_user
    from engine.reconcile import compare_now

    with acting(dsn) as conn:
        user_id = find_user(conn, user).user_id
        require_account(conn, user_id, account)
        done = compare_now(conn, user_id, account, utc_now(), dry_run=dry_run, wait_seconds=wait)
    if as_json:
        print_json(_document(done))
    else:
        _report(done)
    if any(difference.action in _OPEN for difference in done.differences):
        raise typer.Exit(REFUSED)


def _document(done: Reconciliation) -> dict[str, Any]:
    return {
        "account": done.account,
        "snapshot_id": done.snapshot_id,
        "taken_at": done.taken_at,
        "dry_run": done.dry_run,
        "open_orders": done.open_orders,
        "undecided": done.undecided,
        "differences": [_row(difference) for difference in done.differences],
    }


def _row(difference: Difference) -> dict[str, Any]:
    names = ("subject", "ours", "brokers", "derived", "action", "reason")
    return {"class": difference.kind} | {name: getattr(difference, name) for name in names}


def _report(done: Reconciliation) -> None:
    print_table(_COLUMNS, done.differences, empty="Nothing differs.")
    say(f"{count(done.open_orders, 'order')} at the broker at {utc(done.taken_at)}.")
    if done.undecided:
        say(f"{count(done.undecided, 'order')} can't be judged yet; they are looked at again.")
    if done.dry_run:
        say("This was a dry run: nothing was changed.")
