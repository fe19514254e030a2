"""`oms broker`: the dummy broker, a simulated exchange that misbehaves on purpose."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli.options import Json
from cli.output import Column, print_json, print_table, say

if TYPE_CHECKING:
    from engine.brokers.dummy.faults import Plan

__all__ = ["app"]

app = typer.Typer(
    name="broker",
    no_args_is_help=True,
    help="A simulated exchange to connect to.\n\nExample: oms broker dummy --price AAPL=100",
)

_COLUMNS = (Column("PLAN", "name"), Column("TITLE", "title", wraps=True))


@app.command()
def dummy(
    port: Annotated[
        int, typer.Option("--port", metavar="N", min=0, max=65_535, help="0: any that is free.")
    ] = 0,
    state: Annotated[
        Path | None,
        typer.Option(
            "--state",
            metavar="FOLDER",
            help="Where its books are kept.",
            show_default="dummy-broker in OMS_HOME",
        ),
    ] = None,
    faults: Annotated[
        str | None,
        typer.Option(
            "--faults",
            metavar="PLAN",
            help="What goes wrong: a file, or a name of `oms broker plans`.",
        ),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(
            "--seed", metavar="N", help="Of all that is random.", show_default="the plan's"
        ),
    ] = None,
    price: Annotated[
        list[str] | None,
        typer.Option("--price", metavar="SYMBOL=PRICE", help="A symbol and its first price."),
    ] = None,
    session: Annotated[
        str | None,
        typer.Option(
            "--session",
            metavar="HOURS",
            help="OPEN, CLOSED, or hours in UTC such as 14:30-21:00.",
            show_default="the plan's",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Run the dummy broker until Ctrl-C or SIGTERM.

    It is a small exchange in a process of its own: it keeps its own accounts,
    orders and executions, and a kill loses nothing that it has confirmed. It
    listens on this machine only. A fault plan says what goes wrong and when;
    the same seed, plan and requests give the same run.

    Examples:
      oms broker dummy --port 4001 --price AAPL=100 --price MSFT=400
      oms broker dummy --faults plans/CONN-01.toml --seed 7
    """
    from engine import config
    from engine.brokers.dummy.faults import Plan, find_plan, load_plan, with_changes
    from engine.brokers.dummy.server import HOST, run

    plan = load_plan(find_plan(faults)) if faults else Plan()
    plan = with_changes(plan, prices=_prices(price or ()), session=session)
    folder = state or config.home() / "dummy-broker"

    def listening(got: int) -> None:
        if as_json:
            print_json({"host": HOST, "port": got, "folder": folder}, line=True)
        else:
            say(f"{plan.title}. Listening on {HOST}:{got}; Ctrl-C ends it.")

    chosen = plan.seed if seed is None else seed
    run(folder, plan, port=port, seed=chosen, listening=listening)


@app.command()
def plans(as_json: Json = False) -> None:
    """List the fault plans that travel with the program.

    Example:
      oms broker plans
    """
    from engine.brokers.dummy.faults import list_plans

    rows = [_Row(name, plan) for name, plan in list_plans().items()]
    if as_json:
        print_json({"plans": [{"name": row.name, "title": row.title} for row in rows]})
    else:
        print_table(_COLUMNS, rows, empty="There are no plans.")


class _Row:
    def __init__(self, name: str, plan: Plan) -> None:
        self.name, self.title = name, plan.title


def _prices(given: Sequence[str]) -> dict[str, Any]:
    from cli.arguments import parse_assignments

    return parse_assignments(given, "price")
