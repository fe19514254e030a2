"""`oms status` and `oms health`: how it stands, and whether it is well."""

from __future__ import annotations

from datetime import datetime
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import typer

from cli.database import acting, reading
from cli.errors import REFUSED
from cli.options import Dsn, Json, UserFilter
from cli.output import Column, moment, print_json, print_table, say

if TYPE_CHECKING:
    from engine.db.connect import Connection
    from engine.reads import UserRow

__all__ = ["health", "status"]


def _session(account: Any) -> str:
    if account.is_open:
        return "open"
    return f"closed until {moment(account.opens_at)}" if account.opens_at else "closed"


def _connection(account: Any) -> str:
    if not account.connected:
        return "no"
    return "late" if account.heartbeat_is_late else "yes"


def _throttle(account: Any) -> str:
    return f"{account.sent_last_second} of {account.orders_per_second}/s"


def _seconds(value: Decimal) -> str:
    return f"{value:.3f}"


_ACCOUNTS = (
    Column("ACCOUNT", "account"),
    Column("SESSION", _session),
    Column("CONNECTED", _connection),
    Column("HEARD (UTC)", "last_heard_at", moment, spare=2),
    Column("QUEUED", "queued", right=True),
    Column("FOR SESSION", "queued_for_session", right=True, spare=3),
    Column("IN FLIGHT", "in_flight", right=True, spare=1),
    Column("SENT", _throttle, right=True),
    Column("THROTTLED", "throttled", right=True),
    Column("INBOX", "inbox_waiting", right=True, spare=1),
    Column("OPEN ORDERS", "open_orders", right=True),
)
_LATENCIES = (
    Column("ACCOUNT", "account"),
    Column("STEP", "step"),
    Column("ORDERS", "orders", right=True),
    Column("P50 S", "p50", _seconds, right=True),
    Column("P95 S", "p95", _seconds, right=True),
    Column("P99 S", "p99", _seconds, right=True),
)
_HALTS = (
    Column("HALT", "name"),
    Column("SCOPE", "scope"),
    Column("STATE", "trading_state"),
    Column("WHY", "reason", wraps=True),
)
_CHECKS = (
    Column("CHECK", "check"),
    Column("OF", "subject"),
    Column("HEALTH", lambda check: check.code or "ok"),
    Column("WHAT", "detail", wraps=True),
)


def status(user: UserFilter = None, dsn: Dsn = None, as_json: Json = False) -> None:
    """Show session, connection, queue, throttle, latencies and halts.

    By account at a broker. Latencies are of the last day: CLAIM is the time
    in our queue, SEND until it is on the wire, RESPONSE and FILL from there to
    the broker's first word and first fill.

    Example:
      oms status
    """
    from engine.health import status as ask

    with reading(dsn) as conn:
        found = {row: ask(conn, row.user_id, _now()) for row in _users(conn, user)}
    if as_json:
        print_json({"users": [{"user_id": u.user_id, "status": s} for u, s in found.items()]})
        return
    shown = [of_user for of_user in found.values() if of_user.accounts or of_user.halts]
    if not shown:
        say("There are no accounts at brokers; paper runs are in `oms run list`.")
    for of_user in shown:
        print_table(_ACCOUNTS, of_user.accounts, empty="No accounts.")
        for columns, rows in ((_LATENCIES, of_user.latencies), (_HALTS, of_user.halts)):
            if rows:
                say()
                print_table(columns, rows, empty="")
        for code, many in of_user.alerts.items():
            say(f"Alert {code}: {many} not acknowledged.")


def health(user: UserFilter = None, dsn: Dsn = None, as_json: Json = False) -> None:
    """Check that positions are right and brokers are heard.

    Positions are compared with the ledger and with what each broker said last;
    what differs is an alert. Exit code 1 if anything is wrong.

    Example:
      oms health --json
    """
    from engine.health import health as ask

    with acting(dsn) as conn:
        found = [ask(conn, row.user_id, _now()) for row in _users(conn, user)]
    checks = [check for of_user in found for check in of_user.checks]
    healthy = all(of_user.healthy for of_user in found)
    if as_json:
        print_json({"healthy": healthy, "checks": checks})
    else:
        print_table(_CHECKS, checks, empty="There is nothing to check yet.")
    if not healthy:
        raise typer.Exit(REFUSED)


def _now() -> datetime:
    from engine.clock import utc_now

    return utc_now()


def _users(conn: Connection, named: str | None) -> list[UserRow]:
    from engine import reads

    return [reads.find_user(conn, named)] if named else reads.list_users(conn)
