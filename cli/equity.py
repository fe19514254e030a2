"""`oms equity`: a run's equity as a chart in the terminal."""

from __future__ import annotations

import shutil
from typing import Annotated

import typer

from cli.database import reading
from cli.options import Dsn, Json, RunId
from cli.output import lines, print_json, uses_colour

__all__ = ["equity"]

_PIPE_SIZE = (100, 30)  # characters, lines; where there is no terminal to ask
_HEIGHT_LINES = 20


def equity(
    run_id: RunId,
    height: Annotated[
        int, typer.Option("--height", metavar="LINES", min=8, help="Height of the chart.")
    ] = _HEIGHT_LINES,
    dsn: Dsn = None,
    as_json: Json = False,
) -> None:
    """Draw a run's equity in the terminal.

    Equity against the money that was put into positions, over time. With
    --json, every mark.

    Example:
      oms equity --run-id demo-sip
    """
    from engine import reads
    from engine.history import read_history
    from engine.report.terminal import equity_chart

    with reading(dsn) as conn:
        run = reads.find_run(conn, run_id)
        history = read_history(conn, run.user_id, run.run_id)
    if as_json:
        print_json({"run_id": run.run_id, "currency": run.currency, "equity": history.equity})
        return
    width = shutil.get_terminal_size(_PIPE_SIZE).columns
    lines(equity_chart(history, width, height, colour=uses_colour()))
