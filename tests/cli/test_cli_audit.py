"""`oms audit`: finds what is wrong, names it, and says nothing of what is right."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from cli_cases import bought, oms, process, started

from engine import reads
from engine.audit import SEED_QUERIES, Finding, audit, rules
from engine.db.connect import Connection, open_connection


@contextmanager
def _unguarded(dsn: str, table: str) -> Iterator[Connection]:
    """The owner with the table's triggers off, as nobody should be."""
    with open_connection(dsn) as owner, owner.transaction():
        owner.execute(f"ALTER TABLE {table} DISABLE TRIGGER USER".encode())
        yield owner
        owner.execute(f"ALTER TABLE {table} ENABLE TRIGGER USER".encode())


def _found(dsn: str) -> dict[str, dict[str, Any]]:
    done = oms(dsn, "audit", "--json")
    assert done.code == 1
    return {finding["rule"]: finding for finding in done.json["findings"]}


def test_sound_books_hold(dsn: str) -> None:
    bought(dsn)

    told = oms(dsn, "audit")
    document = oms(dsn, "audit", "--json").json

    assert told.code == 0
    assert told.out.endswith(f"All {len(document['rules'])} rules hold.\n")
    assert "audit_chain" in told.out
    assert document["findings"] == []
    assert [rule["name"] for rule in document["rules"]][:3] == list(SEED_QUERIES)
    assert all(rule["looks_for"] for rule in document["rules"])


def test_a_wrong_cash_is_found_and_named(dsn: str) -> None:
    run_id = bought(dsn)
    with _unguarded(dsn, "strategy_run") as owner:
        owner.execute("UPDATE strategy_run SET cash = cash + 1")

    told = process("audit", env={"DB_DSN": dsn})

    assert told.code == 1
    assert told.err == ""
    assert f"audit_cash: cash of run {run_id} is 9501" in told.out
    assert "WRONG" in told.out


def test_the_first_of_several_wrong_rows_is_named(dsn: str) -> None:
    run_id = bought(dsn)
    with _unguarded(dsn, "event_ledger") as owner:
        owner.execute("UPDATE event_ledger SET hash = sha256('') WHERE seq IN (2, 4)")

    chain = _found(dsn)["audit_chain"]

    assert chain["run_id"] == run_id
    assert chain["subject"] == "event_ledger 2"
    assert chain["rows"] == 4, "each of the two, and what follows from it"
    assert "event_ledger 2" in oms(dsn, "audit").out
    assert "(and 3 more)" in oms(dsn, "audit").out


def test_the_test_plans_own_queries_find_what_they_ask_for(dsn: str) -> None:
    run_id = bought(dsn)
    other = started(dsn, "bob")
    with open_connection(dsn) as owner:
        owner.execute("ALTER TABLE mtm_ledger DROP CONSTRAINT mtm_ledger_one_per_logical_time")
        owner.execute("DROP INDEX strategy_run_one_running_per_user")
    with _unguarded(dsn, "mtm_ledger") as owner:
        columns = "user_id, run_id, logical_time, cash, market_value, recorded_at"
        owner.execute(
            f"INSERT INTO mtm_ledger ({columns}) SELECT {columns} FROM mtm_ledger".encode()
        )
    with _unguarded(dsn, "strategy_run") as owner:
        owner.execute(
            """INSERT INTO strategy_run (user_id, status, initial_cash, cash)
               SELECT user_id, 'RUNNING', 0, 0 FROM strategy_run WHERE run_id = %s""",
            [run_id],
        )
    with open_connection(dsn) as owner, owner.transaction():
        owner.execute("ALTER TABLE engine_state DROP CONSTRAINT engine_state_belongs_to_run")
        owner.execute("ALTER TABLE engine_state DISABLE TRIGGER USER")
        owner.execute(
            """INSERT INTO engine_state (user_id, run_id)
               SELECT user_id, gen_random_uuid() FROM app_user"""
        )

    found = _found(dsn)
    with open_connection(dsn) as conn:
        here = {finding.rule for finding in audit(conn, reads.find_run(conn, run_id))}
        elsewhere = {finding.rule for finding in audit(conn, reads.find_run(conn, other))}

    assert found["plan_dedupe"]["run_id"] == run_id
    assert found["plan_dedupe"]["finding"] == "marked 2 times"
    assert found["plan_lifecycle"]["finding"] == "2 runs are RUNNING"
    assert found["plan_orphan"]["rows"] == 2
    assert {"plan_dedupe", "plan_lifecycle", "plan_orphan", "audit_running"} <= here
    assert elsewhere == {"plan_orphan"}


def test_one_run_is_looked_at_alone(dsn: str) -> None:
    bought(dsn)
    started(dsn, "bob", "--name", "other")
    with _unguarded(dsn, "strategy_run") as owner:
        owner.execute("UPDATE strategy_run SET cash = cash + 1 WHERE name = 'first'")

    assert oms(dsn, "audit", "--run-id", "first").code == 1
    assert oms(dsn, "audit", "--run-id", "other").code == 0


def test_a_new_view_is_asked_from_its_first_day(dsn: str) -> None:
    bought(dsn)
    with open_connection(dsn) as owner:
        owner.execute(
            """CREATE VIEW audit_names AS
               SELECT NULL::uuid AS user_id, NULL::uuid AS run_id, 'name' AS subject,
                      'is odd' AS finding"""
        )
        owner.execute("GRANT SELECT ON audit_names TO oms_auditor")

    told = oms(dsn, "audit")

    assert told.code == 1
    assert told.out.endswith("audit_names: name is odd.\n")


def test_an_audit_fits_into_a_transaction_that_is_under_way(conn: Connection) -> None:
    assert audit(conn) == []
    assert len(rules(conn)) > 3


@pytest.mark.parametrize("field", ["rule", "user_id", "run_id", "subject", "finding", "rows"])
def test_a_finding_says_who_and_what(field: str) -> None:
    assert field in Finding.__slots__
