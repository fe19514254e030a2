"""`oms bench`: what the engine must reach, measured side by side with what others reach."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bench import MEASUREMENTS
from cli.errors import REFUSED
from cli.options import Json
from cli.output import Column, note, print_error, print_json, print_table, say

if TYPE_CHECKING:
    from bench.harness import Row
    from bench.profile import Cost
    from bench.run import Benchmark
    from bench.space import Relation

__all__ = ["bench"]


def bench(
    only: Annotated[
        list[str] | None,
        typer.Option(
            "--only",
            metavar="NAME",
            help=f"Measure only this, repeatable: {', '.join(MEASUREMENTS)}.",
            show_default=False,
        ),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Smaller sizes: minutes instead of an hour.")
    ] = False,
    tolerance: Annotated[
        float,
        typer.Option(
            "--tolerance",
            metavar="SHARE",
            min=0.01,
            max=1.0,
            help="Fail below this share of what must be reached; below 1, only on comparisons.",
        ),
    ] = 1.0,
    peers: Annotated[
        Path | None,
        typer.Option(
            "--peers",
            metavar="FOLDER",
            help="Environment of the other engines; made and filled if need be.",
            show_default="in your cache folder",
        ),
    ] = None,
    picture: Annotated[
        Path | None,
        typer.Option(
            "--picture", metavar="PATH", help="Write the bars as a PNG too.", show_default=False
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure the engine side by side with others.

    On a durable Postgres of its own, which is gone afterwards: live ticks
    against pgbench, replays against nautilus_trader and backtrader, a day of
    SIPs, growth, space, start and memory. The other engines are installed
    into an environment of their own. Exit code 1 if a figure misses what it
    must reach, or if the books that were written don't pass the audit.

    Examples:
      oms bench --quick
      oms bench --only live --only sip --json
      oms bench --quick --tolerance 0.5
    """
    unknown = sorted(set(only or ()) - set(MEASUREMENTS))
    if unknown:
        raise typer.BadParameter(
            f"There is no measurement {', '.join(unknown)}; choose of {', '.join(MEASUREMENTS)}."
        )
    from bench.report import document, save_picture
    from bench.run import run
    from bench.sizes import FULL, QUICK

    done = run(QUICK if quick else FULL, only=only or (), peers=peers, tell=note)
    if picture is not None:
        save_picture(picture, done.rows, tolerance)
    if as_json:
        print_json(document(done.rows, tolerance))
    else:
        _tell(done, tolerance)
    _tell_audit(done, as_json=as_json)
    if not done.passes(tolerance):
        raise typer.Exit(REFUSED)


def _tell(done: Benchmark, tolerance: float) -> None:
    from bench.report import bars, figure, title

    columns = (
        Column("MEASURED", title),
        Column("OURS", lambda row: figure(row.ours), right=True),
        Column("PEER", lambda row: figure(row.peer), right=True),
        Column("UNIT", "unit"),
        Column("BETTER", "better"),
        Column("RATIO", lambda row: figure(row.ratio), right=True),
        Column("MUST", _must, right=True),
        Column("MEETS", lambda row: "ok" if row.meets(tolerance) else "WRONG"),
        Column("WHAT", "note", spare=1),
    )
    print_table(columns, done.rows, empty="Nothing was measured.")
    say()
    for line, meets in bars(done.rows, tolerance):
        say(line, style="green" if meets else "red")
    if done.costs:
        say()
        _tell_costs(done.costs)
    if done.relations:
        say()
        _tell_space(done.relations)
    say()
    say(f"Server: {', '.join(f'{name} {value}' for name, value in done.settings.items())}.")


def _tell_costs(costs: Sequence[Cost]) -> None:
    columns = (
        Column("PART OF A LIVE TICK", "name"),
        Column("CALLS", lambda c: "–" if c.calls is None else f"{c.calls:.2f}", right=True),
        Column("TOTAL µs", lambda c: f"{c.total_us:,.1f}", right=True),
        Column("SELF µs", lambda c: f"{c.self_us:,.1f}", right=True),
    )
    print_table(columns, costs, empty="Nothing was looked at.")


def _tell_space(relations: Sequence[Relation]) -> None:
    columns = (
        Column("RELATION", "name"),
        Column("KIND", "kind"),
        Column("BYTES/TICK", lambda relation: f"{relation.bytes_per_tick:,.1f}", right=True),
        Column("IDX_SCAN", "idx_scan", right=True),
    )
    print_table(columns, relations, empty="Nothing was written.")


def _must(row: Row) -> str:
    from bench.report import figure

    if row.must is None:
        return "–"
    of_what = "x" if row.peer is not None else f" {row.unit}"
    return f"{'>=' if row.better == 'more' else '<='} {figure(row.must)}{of_what}"


def _tell_audit(done: Benchmark, *, as_json: bool) -> None:
    if done.holds and not as_json:
        say(f"Audit: nothing found in {', '.join(done.findings)}.")
    for name, findings in done.findings.items():
        for finding in findings:
            print_error(f"audit of {name}: {finding.rule}: {finding.subject} {finding.finding}.")
