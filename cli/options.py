"""Options and arguments that several commands share, each with its words and its completion."""

from __future__ import annotations

from typing import Annotated

import typer

from cli.completion import complete_run, complete_strategy, complete_symbol

__all__ = [
    "By",
    "Calendar",
    "Dsn",
    "Json",
    "Limit",
    "RunArgument",
    "RunFilter",
    "RunId",
    "RunOption",
    "Strategy",
    "SymbolFilter",
    "UserFilter",
]

_COMMON = "Every command"

Dsn = Annotated[
    str | None,
    typer.Option(
        "--dsn",
        envvar="DB_DSN",
        metavar="URI",
        help="Use this Postgres instead of the embedded one.",
        show_default=False,
        rich_help_panel=_COMMON,
    ),
]
Json = Annotated[
    bool,
    typer.Option(
        "--json",
        help="Print one JSON document instead of text.",
        rich_help_panel=_COMMON,
    ),
]
_RUN_HELP = "The run: its id, the first digits of it (4 or more), or its name."
RunId = Annotated[
    str,
    typer.Option(
        "--run-id", metavar="RUN", help=_RUN_HELP, autocompletion=complete_run, show_default=False
    ),
]
RunFilter = Annotated[
    str | None,
    typer.Option(
        "--run-id",
        metavar="RUN",
        help="Only this run: its id, the first digits of it, or its name.",
        autocompletion=complete_run,
        show_default=False,
    ),
]
RunArgument = Annotated[
    str | None,
    typer.Argument(metavar="RUN", help=_RUN_HELP, autocompletion=complete_run, show_default=False),
]
RunOption = Annotated[
    str | None,
    typer.Option(
        "--run-id",
        metavar="RUN",
        help="The run, as an option like everywhere else.",
        autocompletion=complete_run,
        show_default=False,
    ),
]
UserFilter = Annotated[
    str | None,
    typer.Option("--user", metavar="NAME", help="Only this user's.", show_default=False),
]
SymbolFilter = Annotated[
    str | None,
    typer.Option(
        "--symbol",
        metavar="SYMBOL",
        help="Only this symbol.",
        autocompletion=complete_symbol,
        show_default=False,
    ),
]
By = Annotated[
    str | None,
    typer.Option("--by", metavar="NAME", help="Who does it.", show_default="the login's name"),
]
Limit = Annotated[int, typer.Option("--limit", metavar="N", min=1, help="Rows to show at most.")]
Strategy = Annotated[
    str,
    typer.Option(
        "--strategy",
        metavar="NAME",
        help="sip, rebalance, or your own as package.module:Class.",
        autocompletion=complete_strategy,
    ),
]
Calendar = Annotated[
    str,
    typer.Option(
        "--calendar", metavar="CODE", help="The exchange's calendar, such as XNYS or XNSE."
    ),
]
