"""`oms audit`: do the books hold? And a run's books in a file, to keep and to rebuild from."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli.database import owning, reading
from cli.errors import REFUSED
from cli.options import Dsn, Json, RunFilter, RunId
from cli.output import Column, count, lines, print_json, print_table, say

if TYPE_CHECKING:
    from engine.audit import Finding, Rule
    from engine.export import Export

__all__ = ["app"]

app = typer.Typer(name="audit", invoke_without_command=True)


@app.callback()
def audit(
    context: typer.Context,
    run_id: RunFilter = None,
    dsn: Dsn = None,
    as_json: Json = False,
) -> None:
    """Check every rule of the books; nothing may be found.

    The three queries of the test plan, and every view called audit_*:
    executions against orders, positions and cash, equity against cash and
    market value, the ledger's chain of hashes from the first event to the
    last. Of each rule that is broken the first wrong row is named. Exit code
    1 if there is any.

    Examples:
      oms audit
      oms audit --run-id demo-sip --json
    """
    if context.invoked_subcommand is not None:
        return
    from engine import reads
    from engine.audit import audit as find
    from engine.audit import rules

    with reading(dsn) as conn:
        run = reads.find_run(conn, run_id) if run_id else None
        asked = rules(conn)
        findings = find(conn, run)
    if as_json:
        print_json({"rules": asked, "findings": findings})
    else:
        _print(asked, findings)
    if findings:
        raise typer.Exit(REFUSED)


def _print(asked: list[Rule], findings: list[Finding]) -> None:
    wrong = {finding.rule for finding in findings}
    columns = (
        Column("RULE", "name"),
        Column("HOLDS", lambda rule: "WRONG" if rule.name in wrong else "ok"),
        Column("LOOKS FOR", "looks_for", wraps=True),
    )
    print_table(columns, asked, empty="There are no rules.")
    say()
    if not findings:
        say(f"All {count(len(asked), 'rule')} hold.")
    for finding in findings:
        owner = f"run {finding.run_id}" if finding.run_id else f"user {finding.user_id}"
        owner = "" if finding.run_id is finding.user_id is None else f" of {owner}"
        more = f" (and {finding.rows - 1:,} more)" if finding.rows > 1 else ""
        say(f"{finding.rule}: {finding.subject}{owner} {finding.finding}{more}.")


_File = Annotated[Path, typer.Argument(metavar="FILE", help="An export.", show_default=False)]
_Recover = Annotated[
    bool,
    typer.Option("--recover", help="Of a file that breaks off, take what is whole."),
]


@app.command()
def export(run_id: RunId, dsn: Dsn = None, as_json: Json = False) -> None:
    """Write a run as JSON lines: its terms, every event, its notes.

    Each event comes with its hash, the last line has the digest of all lines:
    `oms audit check` needs no database. The output is JSON either way.

    Example:
      oms audit export --run-id demo-sip > demo-sip.jsonl
    """
    from engine import reads
    from engine.export import write_export
    from engine.rebuild import export_run

    del as_json
    with reading(dsn) as conn:
        found = export_run(conn, reads.find_run(conn, run_id))
    for line in write_export(found):
        lines(line)


@app.command()
def check(file: _File, as_json: Json = False) -> None:
    """Check an export without a database: its chain and its digest.

    Exit code 1 where it breaks off or was changed.

    Example:
      oms audit check demo-sip.jsonl
    """
    found = _read(file)
    if as_json:
        print_json({"run_id": found.run_id, "events": len(found.events), "damage": found.damage})
    else:
        say(f"Run {found.run_id}: {count(len(found.events), 'event')}, each follows from the last.")
        if found.damage:
            say(f"The file is not whole: {found.damage}.")
    if found.damage:
        raise typer.Exit(REFUSED)


@app.command()
def rebuild(file: _File, recover: _Recover = False, dsn: Dsn = None, as_json: Json = False) -> None:
    """Write an exported run into a database that doesn't have it.

    Orders, executions, positions, cash and marks are made anew from the
    events, and audited before anything is committed. Needs the owner's rights.
    Of a file that breaks off, --recover takes the events that are whole; what
    the ledger doesn't tell (plans, limits, how far a stop was drawn) is lost
    then.

    Example:
      oms audit rebuild demo-sip.jsonl --dsn postgresql://owner@host/empty
    """
    from engine.errors import BadInput
    from engine.rebuild import rebuild_run

    found = _read(file)
    if found.damage and not recover:
        raise BadInput(f"{file.name}: {found.damage}; --recover takes what is whole")
    with owning(dsn) as conn:
        run = rebuild_run(conn, found)
    if as_json:
        print_json({"run_id": run.run_id, "events": len(found.events), "damage": found.damage})
    else:
        say(f"Run {run.run_id} is rebuilt from {count(len(found.events), 'event')}.")


def _read(file: Path) -> Export:
    from engine.errors import BadInput
    from engine.export import read_export

    try:
        with closing(file.open(encoding="utf-8", errors="surrogateescape", newline="\n")) as text:
            return read_export(text)
    except OSError as error:
        raise BadInput(f"{file.name} can't be read: {error}") from error
    except BadInput as error:
        raise BadInput(f"{file.name}: {error}") from error
