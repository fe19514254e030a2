"""`oms up`: all that one machine needs, in one process."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Annotated

import typer

from cli.database import acting, owner_dsn
from cli.options import Dsn, Json
from cli.output import count, note, print_json, say

if TYPE_CHECKING:
    from engine.schedule import Round

__all__ = ["up"]


def up(
    every: Annotated[
        int,
        typer.Option("--every", metavar="SECONDS", min=1, help="How often to look what is due."),
    ] = 60,
    dsn: Dsn = None,
    as_json: Json = False,
) -> None:
    """Run schedule, worker and connectors in one process, until Ctrl-C.

    It is `oms schedule`, `oms work` and an `oms connect` for each account
    together. Each goes on by itself where it was after a kill. An account that
    another process serves is left to it.

    Example:
      oms up
    """
    from engine import config
    from engine.log import open_log
    from engine.up import serve

    where = owner_dsn(dsn)
    with acting(where):
        pass  # what is wrong with the database is said now
    log = config.log_folder() / "up.jsonl"
    # A round that takes longer than the interval is no news: the next one waits for it.
    logging.getLogger("apscheduler").setLevel(logging.ERROR)
    note(f"Up; looking every {count(every, 'second')}, logging to {log}. Ctrl-C ends it.")
    with open_log(log):
        serve(where, every_seconds=every, report=lambda done: _report(done, as_json=as_json))


def _report(done: Round, *, as_json: bool) -> None:
    if as_json:
        stuck = [{"run_id": run_id, "reason": why} for run_id, why in done.stuck.items()]
        print_json({"ticks": done.ticks, "repeated": done.repeated, "stuck": stuck}, line=True)
    elif done.ticks:
        say(f"{count(done.ticks, 'tick')}.")
