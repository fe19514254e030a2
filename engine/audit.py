"""The audit: questions to the database whose answer must be that nothing is wrong.

Three of them are the test plan's, word for word; the rest are the views called ``audit_*``, found
by their name, so that a new one is asked from the day on which it is made.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any
from uuid import UUID

from psycopg import sql
from psycopg.rows import class_row, dict_row

from engine.db.connect import Connection, snapshot
from engine.runs import Run

__all__ = ["SEED_QUERIES", "Finding", "Rule", "audit", "rules"]

# From the test plan, unchanged: people keep them, and run them in psql.
SEED_QUERIES: Mapping[str, str] = MappingProxyType(
    {
        "plan_orphan": (
            "SELECT COUNT(*) FROM engine_state es LEFT JOIN strategy_run sr "
            "ON sr.user_id=es.user_id AND sr.run_id=es.run_id WHERE sr.run_id IS NULL;"
        ),
        "plan_dedupe": (
            "SELECT user_id, run_id, logical_time, COUNT(*) FROM mtm_ledger "
            "GROUP BY user_id, run_id, logical_time HAVING COUNT(*) > 1;"
        ),
        "plan_lifecycle": (
            "SELECT user_id, COUNT(*) FROM strategy_run WHERE status='RUNNING' "
            "GROUP BY user_id HAVING COUNT(*) > 1;"
        ),
    }
)
_SEED_WORDS: Mapping[str, str] = MappingProxyType(
    {
        "plan_orphan": "Rows of engine_state that belong to no run.",
        "plan_dedupe": "Runs marked more than once at one logical time.",
        "plan_lifecycle": "Users with more than one RUNNING run.",
    }
)


@dataclass(frozen=True, slots=True)
class Rule:
    """One question; ``looks_for`` says what would be wrong."""

    name: str
    looks_for: str


@dataclass(frozen=True, slots=True)
class Finding:
    """The first row that breaks a rule: whose it is, which it is and what is wrong with it.

    ``rows`` is how many rows break the rule. ``user_id`` and ``run_id`` are ``None`` where the
    rule doesn't tell.
    """

    rule: str
    user_id: UUID | None
    run_id: UUID | None
    subject: str
    finding: str
    rows: int


def rules(conn: Connection) -> list[Rule]:
    """All rules that ``audit`` asks about, in its order."""
    with conn.cursor(row_factory=class_row(Rule)) as cursor:
        views = cursor.execute(
            """SELECT c.relname AS name, coalesce(obj_description(c.oid), '') AS looks_for
               FROM pg_class c
               WHERE c.relnamespace = 'public'::regnamespace AND c.relkind = 'v'
                 AND c.relname LIKE 'audit\\_%'
               ORDER BY c.relname"""
        ).fetchall()
    return [*(Rule(name, _SEED_WORDS[name]) for name in SEED_QUERIES), *views]


def audit(conn: Connection, run: Run | None = None) -> list[Finding]:
    """What is wrong: for every rule that is broken, its first row. Empty is right.

    All of it is seen at one moment, so that a tick that commits meanwhile confuses nothing. With
    ``run``, only that run is looked at, and its user where a rule is about users.
    """
    with snapshot(conn):
        findings = []
        for rule in rules(conn):
            ask = _SEEDS.get(rule.name, _ask_view)
            found = ask(conn, rule.name, run)
            if found is not None:
                findings.append(found)
        return findings


def _ask_view(conn: Connection, name: str, run: Run | None) -> Finding | None:
    # By length first, so that "event_ledger 2" comes before "event_ledger 10".
    query = sql.SQL(
        """SELECT {rule} AS rule, user_id, run_id, subject, finding, count(*) OVER () AS rows
           FROM {view}
           WHERE %(user)s::uuid IS NULL
              OR user_id = %(user)s AND (run_id = %(run)s OR run_id IS NULL)
           ORDER BY user_id, run_id, length(subject), subject, finding LIMIT 1"""
    ).format(rule=sql.Literal(name), view=sql.Identifier("public", name))
    with conn.cursor(row_factory=class_row(Finding)) as cursor:
        return cursor.execute(
            query, {"user": run and run.user_id, "run": run and run.run_id}
        ).fetchone()


def _seed_rows(conn: Connection, name: str) -> list[dict[str, Any]]:
    with conn.cursor(row_factory=dict_row) as cursor:
        return cursor.execute(SEED_QUERIES[name].encode()).fetchall()


def _ask_orphan(conn: Connection, name: str, run: Run | None) -> Finding | None:
    (row,) = _seed_rows(conn, name)
    if row["count"] == 0:
        return None
    return Finding(name, None, None, "engine_state", "belongs to no run", row["count"])


def _ask_dedupe(conn: Connection, name: str, run: Run | None) -> Finding | None:
    rows = [
        row
        for row in _seed_rows(conn, name)
        if run is None or (row["user_id"], row["run_id"]) == (run.user_id, run.run_id)
    ]
    if not rows:
        return None
    first = min(rows, key=lambda row: (row["user_id"], row["run_id"], row["logical_time"]))
    return Finding(
        name,
        first["user_id"],
        first["run_id"],
        f"mtm_ledger {first['logical_time'].isoformat()}",
        f"marked {first['count']} times",
        len(rows),
    )


def _ask_lifecycle(conn: Connection, name: str, run: Run | None) -> Finding | None:
    rows = [row for row in _seed_rows(conn, name) if run is None or row["user_id"] == run.user_id]
    if not rows:
        return None
    first = min(rows, key=lambda row: row["user_id"])
    finding = f"{first['count']} runs are RUNNING"
    return Finding(name, first["user_id"], None, "strategy_run", finding, len(rows))


_Ask = Callable[[Connection, str, Run | None], Finding | None]
_SEEDS: Mapping[str, _Ask] = MappingProxyType(
    {
        "plan_orphan": _ask_orphan,
        "plan_dedupe": _ask_dedupe,
        "plan_lifecycle": _ask_lifecycle,
    }
)
