"""`oms alert`: what a person must know of."""

from __future__ import annotations

from typing import Annotated

import typer

from cli.database import acting, reading
from cli.options import By, Dsn, Json, Limit, UserFilter
from cli.output import Column, moment, print_json, print_table, say

__all__ = ["app"]

app = typer.Typer(
    name="alert",
    no_args_is_help=True,
    help="What a person must know of, until acknowledged.\n\nExample: oms alert list",
)

_COLUMNS = (
    Column("ALERT", lambda alert: str(alert.alert_id)[:8]),
    Column("RAISED (UTC)", "raised_at", moment),
    Column("CODE", "code"),
    Column("ACCOUNT", "account", spare=2),
    Column("MESSAGE", "message", spare=1),
    Column("ACKNOWLEDGED BY", "acknowledged_by", spare=3),
)


@app.command("list")
def list_(
    user: UserFilter = None,
    everything: Annotated[bool, typer.Option("--all", help="Acknowledged ones, too.")] = False,
    limit: Limit = 50,
    dsn: Dsn = None,
    as_json: Json = False,
) -> None:
    """List alerts that nobody has acknowledged, newest first.

    Example:
      oms alert list
    """
    from engine import reads
    from engine.alerts import list_alerts

    with reading(dsn) as conn:
        whose = reads.find_user(conn, user).user_id if user else None
        alerts = list_alerts(conn, whose, acknowledged=everything, limit=limit)
    if as_json:
        print_json({"alerts": alerts})
    else:
        print_table(_COLUMNS, alerts, empty="Nothing is waiting for anybody.")


@app.command()
def ack(
    alert: Annotated[
        str,
        typer.Argument(
            metavar="ALERT",
            help="Its id, the first digits of it, or the code of several.",
            show_default=False,
        ),
    ],
    by: By = None,
    dsn: Dsn = None,
    as_json: Json = False,
) -> None:
    """Acknowledge an alert, or all of a code.

    The next finding of the same is raised anew.

    Example:
      oms alert ack HEARTBEAT_LOST
    """
    from engine.alerts import acknowledge
    from engine.clock import utc_now
    from engine.config import operator

    with acting(dsn) as conn:
        done = acknowledge(conn, alert, by or operator(), utc_now())
    if as_json:
        print_json({"acknowledged": [known.alert_id for known in done]})
    else:
        say(f"Acknowledged: {', '.join(str(known.alert_id)[:8] for known in done)}.")
