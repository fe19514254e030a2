"""`oms replay`: a run ticks through stored prices."""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Annotated

import typer

from cli.arguments import parse_until
from cli.database import acting
from cli.options import Dsn, Json, RunId
from cli.output import count, money, print_json, progress, say, utc

if TYPE_CHECKING:
    from engine.reads import RunRow
    from engine.replay import Replayed

__all__ = ["replay"]

_BEGINNING = datetime(1, 1, 1, tzinfo=UTC)
_INSTANT = timedelta(microseconds=1)


def replay(
    run_id: RunId,
    start: Annotated[
        str | None,
        typer.Option(
            "--from",
            metavar="TIME",
            help="First moment or day (UTC), included.",
            show_default="after the run's last tick",
        ),
    ] = None,
    end: Annotated[
        str | None,
        typer.Option(
            "--to",
            metavar="TIME",
            help="Last moment or day (UTC), included.",
            show_default="now",
        ),
    ] = None,
    dsn: Dsn = None,
    as_json: Json = False,
) -> None:
    """Tick a run through stored prices, in order.

    The same code as a live tick. Ticks that are in the ledger already are
    passed over, so that an interrupted replay goes on where it stopped.

    Example:
      oms replay --run-id 7f3a --from 2000-03-01 --to 2013-03-01
    """
    from engine import reads
    from engine.clock import utc_now
    from engine.errors import BadInput
    from engine.feeds import stored_feed, symbols_of
    from engine.replay import replay as replay_feed

    first = parse_until(start, "start", end=False) if start else None
    upto = parse_until(end, "end", end=True) if end else utc_now()
    if first is not None and first > upto:
        raise BadInput(f"The start {utc(first)} is after the end {utc(upto)}; swap them.")
    with acting(dsn) as conn, progress() as move:
        run = reads.find_run(conn, run_id)
        last = reads.run_row(conn, run).last_logical_time
        after = first - _INSTANT if first else last or _BEGINNING
        total = reads.count_moments(conn, symbols_of(conn, run), after, upto)
        done = 0

        def told(ticks: int) -> None:
            nonlocal done
            done += ticks
            move(run.name or str(run.run_id), done, total)

        began = time.monotonic()
        feed = stored_feed(conn, run, after, upto)
        replayed = replay_feed(conn, run.user_id, run.run_id, feed, progress=told)
        seconds = time.monotonic() - began
        row = reads.run_row(conn, run)
    if as_json:
        print_json(
            {
                "run_id": row.run_id,
                "written": replayed.written,
                "repeated": replayed.repeated,
                "seconds": round(seconds, 3),
                "last_logical_time": row.last_logical_time,
                "cash": row.cash,
                "market_value": row.market_value,
                "equity": row.equity,
            }
        )
    else:
        _tell(row, replayed, seconds)


def _tell(row: RunRow, replayed: Replayed, seconds: float) -> None:
    if not replayed.written and not replayed.repeated:
        say("There are no stored prices of its symbols in that time; `oms data list` shows all.")
        return
    if not replayed.written:
        say(f"All {count(replayed.repeated, 'tick')} were in the ledger already.")
    else:
        again = f" ({replayed.repeated:,} were in the ledger already)" if replayed.repeated else ""
        rate = replayed.written / max(seconds, 1e-9)
        say(f"{count(replayed.written, 'tick')} in {seconds:.1f} s, {rate:,.0f} a second{again}.")
    say(
        f"At {utc(row.last_logical_time)}: equity {money(row.equity)} = cash "
        f"{money(row.cash)} + market value {money(row.market_value)} {row.currency}."
    )
