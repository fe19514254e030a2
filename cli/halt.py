"""`oms halt`: the kill switch."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from cli.database import acting, reading
from cli.options import By, Dsn, Json, RunFilter, UserFilter
from cli.output import Column, moment, print_json, print_table, say
from cli.output import as_json as to_json

__all__ = ["app"]

app = typer.Typer(
    name="halt",
    invoke_without_command=True,
    help="Stop trading: at once, until somebody lifts it by name.\n\n"
    "New orders are refused and working ones cancelled; --reducing lets pass\n"
    "what only makes a position smaller. A second call changes nothing.\n\n"
    'Example: oms halt --user alice --reason "prices look wrong"',
)

_COLUMNS = (
    Column("NAME", "name"),
    Column("SCOPE", "scope"),
    Column("USER", lambda halt: halt.user_id or "everybody", spare=2),
    Column("STATE", "trading_state"),
    Column("REASON", "reason", spare=1),
    Column("BY", "placed_by", spare=3),
    Column("PLACED (UTC)", "placed_at", moment),
    Column("LIFTED (UTC)", "lifted_at", moment, spare=4),
)
_Everything = Annotated[
    bool, typer.Option("--everything", help="Everybody's trading, on paper and at brokers.")
]


@app.callback()
def halt(
    context: typer.Context,
    user: UserFilter = None,
    run_id: RunFilter = None,
    account: Annotated[
        str | None,
        typer.Option(
            "--account", metavar="ACCOUNT", help="Only this account's.", show_default=False
        ),
    ] = None,
    everything: _Everything = False,
    reason: Annotated[
        str | None,
        typer.Option("--reason", metavar="WORDS", help="Why; it is kept.", show_default=False),
    ] = None,
    reducing: Annotated[
        bool, typer.Option("--reducing", help="Let pass what makes a position smaller.")
    ] = False,
    name: Annotated[
        str | None,
        typer.Option(
            "--name", metavar="NAME", help="By which it is lifted.", show_default="what is halted"
        ),
    ] = None,
    by: By = None,
    dsn: Dsn = None,
    as_json: Json = False,
) -> None:
    if context.invoked_subcommand is not None:
        return
    if not (user or run_id or everything):
        typer.echo(context.get_help())
        raise typer.Exit(2)
    if reason is None:
        raise typer.BadParameter("say why, with --reason", context)
    from engine import safety
    from engine.accounts import require_account
    from engine.config import operator

    who, state = by or operator(), "REDUCING" if reducing else "HALTED"
    with acting(dsn) as conn:
        if everything:
            placed = safety.halt_everything(conn, reason, who, name or "everything", state)
        else:
            user_id, run = _whose(conn, user, run_id)
            require_account(conn, user_id, account)
            order = safety.HaltOrder(reason, who, run, account, name, state)
            placed = safety.place_halt(conn, user_id, order)
    if as_json:
        print_json(to_json(placed))
    else:
        say(f"{placed.trading_state}: {placed.scope}, by the halt {placed.name}.")


def _whose(conn: Any, user: str | None, run_id: str | None) -> tuple[Any, Any]:
    """The user, and the run where one is named."""
    from engine import reads

    if run_id is not None:
        run = reads.find_run(conn, run_id)
        return run.user_id, run.run_id
    assert user is not None
    return reads.find_user(conn, user).user_id, None


@app.command("list")
def list_(
    user: UserFilter = None,
    everything: Annotated[bool, typer.Option("--all", help="Lifted ones, too.")] = False,
    dsn: Dsn = None,
    as_json: Json = False,
) -> None:
    """List what is halted, newest first.

    Example:
      oms halt list
    """
    from engine import reads, safety

    with reading(dsn) as conn:
        whose = reads.find_user(conn, user).user_id if user else None
        halts = safety.list_halts(conn, whose, lifted=everything)
    if as_json:
        print_json({"halts": halts})
    else:
        print_table(_COLUMNS, halts, empty="Nothing is halted.")


@app.command()
def lift(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="The halt's name.", show_default=False)
    ],
    user: UserFilter = None,
    everything: _Everything = False,
    by: By = None,
    dsn: Dsn = None,
    as_json: Json = False,
) -> None:
    """Lift a halt by its name.

    Another halt of the same user, run or account goes on.

    Examples:
      oms halt lift user --user alice
      oms halt lift everything --everything
    """
    from engine import reads, safety
    from engine.config import operator
    from engine.errors import BadInput

    who = by or operator()
    with acting(dsn) as conn:
        if everything:
            lifted = safety.lift_everything(conn, who, name)
        elif user is None:
            raise BadInput("name the halt's user with --user, or --everything")
        else:
            found = safety.lift_halt(conn, reads.find_user(conn, user).user_id, name, who)
            lifted = [] if found is None else [found]
    if not lifted:
        raise BadInput(f"no halt {name} is open; `oms halt list` shows what is halted")
    if as_json:
        print_json({"lifted": lifted})
    else:
        say(f"The halt {name} is lifted.")
