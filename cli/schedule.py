"""`oms schedule`: the clock that ticks every RUNNING run when its exchange says so."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli.arguments import parse_part
from cli.database import acting, owner_dsn
from cli.errors import REFUSED
from cli.options import Dsn, Json
from cli.output import count, log_to_stderr, note, print_json, say, utc

if TYPE_CHECKING:
    from engine.schedule import Round, Share

__all__ = ["schedule"]


def schedule(
    every: Annotated[
        int, typer.Option("--every", metavar="SECONDS", min=1, help="How often to look.")
    ] = 60,
    once: Annotated[bool, typer.Option("--once", help="One round, then end.")] = False,
    share: Annotated[
        str, typer.Option("--share", metavar="PART/OF", help="Which users to serve first.")
    ] = "1/1",
    dsn: Dsn = None,
    as_json: Json = False,
) -> None:
    """Tick whatever is due, until Ctrl-C.

    What is due comes from the database: the closes (or opens) of each RUNNING
    run's calendar since its last tick. Any number of schedulers may run at
    once, be killed and be started again: every planned moment is ticked once.
    A run whose prices haven't come yet waits for them, and holds up no other.

    Several that share the work are told so: --share 1/2 and --share 2/2 each
    serve half of the users first, and then what the other has left undone.

    SIGTERM ends it too; the round under way is finished. With --json each round
    is one document on one line. With --once, exit code 1 means that a run could
    not go on. The log is on stderr, one JSON object a line, and in schedule.log
    in OMS_LOG, or in the folder log of OMS_HOME.

    Examples:
      oms schedule
      oms schedule --once --json
      oms schedule --share 1/2
    """
    from engine.schedule import Share

    taken = Share(*parse_part(share))
    if once:
        _one_round(dsn, taken, as_json=as_json)
    else:
        _serve(dsn, every, taken, as_json=as_json)


def _one_round(dsn: str | None, share: Share, *, as_json: bool) -> None:
    from engine.schedule import drive

    with acting(dsn) as conn:
        done = drive(conn, share=share)
    _report(done, as_json=as_json, quiet=False)
    if done.stuck:
        raise typer.Exit(REFUSED)


def _serve(dsn: str | None, every: int, share: Share, *, as_json: bool) -> None:
    from engine import config
    from engine.log import open_log
    from engine.schedule import serve

    log_to_stderr()
    # A round that takes longer than the interval is no news: the next one waits for it.
    logging.getLogger("apscheduler").setLevel(logging.ERROR)
    where = owner_dsn(dsn)
    with acting(where):
        pass  # what is wrong with the database is said now, not at the first round
    note(f"Looking every {count(every, 'second')}; Ctrl-C ends it.")
    with open_log(config.log_folder() / "schedule.log"):
        serve(
            where,
            every_seconds=every,
            share=share,
            report=lambda done: _report(done, as_json=as_json, quiet=True),
        )


def _report(done: Round, *, as_json: bool, quiet: bool) -> None:
    if as_json:
        print_json(_document(done), line=quiet)
        return
    if done.ticks or not (quiet or done.stuck):
        say(f"{_now()}: {count(done.ticks, 'tick')}.")
    for run_id, reason in done.stuck.items():
        say(f"{_now()}: run {run_id} {reason}.")


def _document(done: Round) -> dict[str, Any]:
    stuck = [{"run_id": run_id, "reason": reason} for run_id, reason in done.stuck.items()]
    return {"ticks": done.ticks, "repeated": done.repeated, "stuck": stuck}


def _now() -> str:
    from engine.clock import utc_now

    return f"{utc(utc_now().replace(microsecond=0))}"
