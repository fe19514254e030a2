"""`oms user`: people and services that own runs."""

from __future__ import annotations

from typing import Annotated

import typer

from cli.database import acting, reading
from cli.options import Dsn, Json
from cli.output import Column, moment, print_json, print_table, say

__all__ = ["app"]

app = typer.Typer(
    name="user",
    no_args_is_help=True,
    help="People and services that own runs.\n\nExample: oms user add alice",
)

_COLUMNS = (
    Column("USER", "user_id"),
    Column("NAME", "name"),
    Column("KIND", "kind", spare=2),
    Column("RUNS", "runs", right=True),
    Column("RUNNING", "running_run_id"),
    Column("SINCE (UTC)", "created_at", moment, spare=1),
)


@app.command()
def add(
    name: Annotated[str, typer.Argument(help="What commands call the user.", show_default=False)],
    dsn: Dsn = None,
    as_json: Json = False,
) -> None:
    """Add a user.

    A name is one user: adding it again finds the same one. The id follows from
    the name, on every database.

    Example:
      oms user add alice
    """
    from engine import reads
    from engine.runs import add_user

    with acting(dsn) as conn:
        known = {user.user_id for user in reads.list_users(conn)}
        user_id = add_user(conn, name)
    created = user_id not in known
    if as_json:
        print_json({"user_id": user_id, "name": name, "created": created})
    else:
        say(f"User {name} has the id {user_id}{'' if created else '; they were there already'}.")


@app.command("list")
def list_(dsn: Dsn = None, as_json: Json = False) -> None:
    """List users, how many runs they have and which one is RUNNING.

    Example:
      oms user list
    """
    from engine import reads

    with reading(dsn) as conn:
        users = reads.list_users(conn)
    if as_json:
        print_json({"users": users})
    else:
        print_table(_COLUMNS, users, empty="There are no users yet; `oms user add NAME` adds one.")
