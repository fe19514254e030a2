"""`oms audit`: do the books hold?"""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from cli.database import reading
from cli.errors import REFUSED
from cli.options import Dsn, Json, RunFilter
from cli.output import Column, count, print_json, print_table, say

if TYPE_CHECKING:
    from engine.audit import Finding, Rule

__all__ = ["audit"]


def audit(run_id: RunFilter = None, dsn: Dsn = None, as_json: Json = False) -> None:
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
