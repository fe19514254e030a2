"""`oms report`: runs as one HTML file."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli.completion import complete_run
from cli.database import reading
from cli.options import Dsn, Json
from cli.output import print_json, say

if TYPE_CHECKING:
    from engine.report.model import RunHistory

__all__ = ["report", "write_report"]


def report(
    run_id: Annotated[
        list[str],
        typer.Option(
            "--run-id",
            metavar="RUN",
            help="The run: its id, the first digits of it, or its name; may be repeated.",
            autocompletion=complete_run,
            show_default=False,
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            metavar="PATH",
            help="Where to write it.",
            show_default="./oms-<name of the run>.html",
        ),
    ] = None,
    dsn: Dsn = None,
    as_json: Json = False,
) -> None:
    """Write a report with pictures, as one HTML file.

    Equity against invested money, drawdown, positions over time, executions of
    plans. The file opens without a network, and can be sent to anyone.

    Examples:
      oms report --run-id demo-sip
      oms report --run-id demo-sip --run-id demo-rebalance --output both.html
    """
    from engine import reads
    from engine.history import read_history

    with reading(dsn) as conn:
        runs = [reads.find_run(conn, named) for named in run_id]
        histories = [read_history(conn, run.user_id, run.run_id) for run in runs]
    path = output or Path(f"oms-{_file_name(histories[0].name)}.html")
    write_report(path, histories)
    if as_json:
        print_json({"path": path.resolve(), "runs": [run.run_id for run in runs]})
    else:
        say(f"The report is in {path}; open it in a browser.")


def write_report(path: Path, histories: Sequence[RunHistory]) -> None:
    """Write the page; what can't be written is told by the name that was asked for."""
    from engine.report import html

    try:
        html.write(path, histories)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def _file_name(name: str) -> str:
    return re.sub(r"[^\w.-]+", "-", name).strip("-.") or "run"
