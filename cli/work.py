"""`oms work`: the engine's side of the boundary to brokers."""

from __future__ import annotations

import signal
import threading
from typing import Annotated

import typer

from cli.database import acting, owner_dsn
from cli.options import Dsn, Json
from cli.output import count, log_to_stderr, note, print_json, say

__all__ = ["work"]


def work(
    part: Annotated[
        str, typer.Option("--part", metavar="PART/OF", help="Which orders to take.")
    ] = "1/1",
    once: Annotated[
        bool, typer.Option("--once", help="Take in what is there now, then end.")
    ] = False,
    dsn: Dsn = None,
    as_json: Json = False,
) -> None:
    """Take in what brokers say, until Ctrl-C.

    Connectors (`oms connect`) put what a broker says into the inbox; this books
    it: executions, moves of orders, commissions, alerts. It also watches what
    time brings about: silent brokers, stale orders, runs that have settled.
    Several may share the work: --part 1/2 and --part 2/2. Any of them may be
    killed at any time; the next one goes on where it was. Told to end, it takes
    in what is there first. The log is on stderr,
    one JSON object a line, and in work.log in OMS_LOG, or in the folder log of
    OMS_HOME.

    Examples:
      oms work
      oms work --part 2/2
    """
    from cli.arguments import parse_part
    from engine import config
    from engine.inbox import Part
    from engine.log import open_log
    from engine.worker import serve, work_through

    taken = Part(*parse_part(part))
    where = owner_dsn(dsn)
    if once:
        with acting(where) as conn:
            words = work_through(conn, taken).words
        _report(words, as_json=as_json)
        return
    with acting(where):
        pass  # what is wrong with the database is said now
    stopped = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopped.set())
    log_to_stderr()
    note("Listening to brokers; Ctrl-C ends it.")
    with open_log(config.log_folder() / "work.log"):
        serve(where, stopped, part=taken, report=lambda words: _report(words, as_json=as_json))


def _report(words: int, *, as_json: bool) -> None:
    if as_json:
        print_json({"events": words}, line=True)
    else:
        say(f"{count(words, 'word')} of brokers taken in.")
