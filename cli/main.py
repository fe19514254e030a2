"""The `oms` command: a face of the engine, without logic of its own.

One file a noun. Nothing heavy is imported before a command runs, so that help and completion
answer at once; a test holds it to that.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from cli import (
    account,
    alert,
    audit,
    bench,
    breaker,
    broker,
    connect,
    data,
    db,
    demo,
    equity,
    errors,
    flatten,
    halt,
    limit,
    order,
    pnl,
    position,
    reconcile,
    replay,
    report,
    schedule,
    sip,
    status,
    tick,
    up,
    user,
    work,
)
from cli import run as runs

__all__ = ["app", "main", "run"]

_HELP = """An order management system and trading engine on Postgres.

Start with `oms demo`: thirteen years of real prices through two runs. No
server is needed: an embedded Postgres starts at the first command. DB_DSN,
or --dsn on any command, names another one.

A run is one strategy with its own money and books. It moves in ticks: one
at every close of its exchange (`oms schedule`), through stored prices
(`oms replay`), or by hand (`oms tick`). A tick happens exactly once.

Every command has --json, and --help with an example.
Exit codes: 0 done, 1 a finding or a refusal, 2 could not run. An error is
one line on stderr; with --json it is {"error": {"type": ..., "message": ...}}.

Example, from nothing to a first purchase:
  oms data import prices.csv
  oms user add alice
  oms run start --user alice --strategy sip --cash 10000 --name first
  oms sip add --run-id first --symbol AAPL --amount 500 --from 2024-01-01
  oms replay --run-id first
  oms run show first
"""

app = typer.Typer(
    name="oms",
    help=_HELP,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

_START, _RUNS, _SAFETY, _LOOK, _SET_UP = "Start here", "Runs", "Safety", "Look", "Set up"
_BROKERS = "Brokers"
app.command("demo", rich_help_panel=_START)(demo.demo)
app.command("tick", rich_help_panel=_RUNS)(tick.tick)
app.command("replay", rich_help_panel=_RUNS)(replay.replay)
app.command("schedule", rich_help_panel=_RUNS)(schedule.schedule)
app.command("up", rich_help_panel=_BROKERS)(up.up)
app.command("work", rich_help_panel=_BROKERS)(work.work)
app.command("connect", rich_help_panel=_BROKERS)(connect.connect)
app.command("reconcile", rich_help_panel=_BROKERS)(reconcile.reconcile)
app.command("equity", rich_help_panel=_LOOK)(equity.equity)
app.command("status", rich_help_panel=_LOOK)(status.status)
app.command("health", rich_help_panel=_LOOK)(status.health)
app.command("pnl", rich_help_panel=_LOOK)(pnl.pnl)
app.command("report", rich_help_panel=_LOOK)(report.report)
app.command("bench", rich_help_panel=_LOOK)(bench.bench)
app.command("flatten", rich_help_panel=_SAFETY)(flatten.flatten)
app.add_typer(halt.app, rich_help_panel=_SAFETY)
app.add_typer(limit.app, rich_help_panel=_SAFETY)
app.add_typer(breaker.app, rich_help_panel=_SAFETY)
app.add_typer(alert.app, rich_help_panel=_SAFETY)
app.add_typer(runs.app, rich_help_panel=_RUNS)
app.add_typer(sip.app, rich_help_panel=_RUNS)
app.add_typer(audit.app, rich_help_panel=_LOOK)
app.add_typer(order.app, rich_help_panel=_LOOK)
app.add_typer(position.app, rich_help_panel=_LOOK)
app.add_typer(account.app, rich_help_panel=_BROKERS)
app.add_typer(user.app, rich_help_panel=_SET_UP)
app.add_typer(data.app, rich_help_panel=_SET_UP)
app.add_typer(broker.app, rich_help_panel=_BROKERS)
app.add_typer(db.app, rich_help_panel=_SET_UP)


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"oms {version('oms')}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version.", is_eager=True, callback=_print_version
        ),
    ] = False,
) -> None:
    # The help of `oms` itself stands above: a docstring here would take its place.
    del version


def main(arguments: Sequence[str]) -> int:
    """Run a command line and return its exit code; whatever goes wrong is told in one line."""
    wants_json = "--json" in arguments
    try:
        # Typer turns Ctrl-C into the code of an interrupted program by itself.
        code = app(args=list(arguments), prog_name="oms", standalone_mode=False)
    except Exception as error:
        if errors.wants_traceback():
            raise
        return errors.tell(errors.explain(error), as_json=wants_json)
    if code == errors.INTERRUPTED:
        return errors.tell(errors.INTERRUPTION, as_json=wants_json)
    return code if isinstance(code, int) else errors.DONE


def run() -> None:
    """The console script."""
    # A strategy of one's own may lie in the current folder. Last, so that nothing there can take
    # the place of an installed module.
    sys.path.append("")
    sys.exit(main(sys.argv[1:]))
