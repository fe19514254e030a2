"""The catalog keeps the rules of the house: shardable by user, exact, named, commented, pinned."""

from __future__ import annotations

import re

import pytest

from engine.db.connect import Connection
from engine.resources import sql_dir

Rows = list[tuple[str, ...]]

# Rows of these belong to a run, so user_id and run_id lead every key of theirs.
RUN_TABLES = {
    "strategy_run",
    "engine_state",
    "engine_status",
    "orders",
    "execution",
    "position",
    "split_applied",
    "mtm_ledger",
    "event_ledger",
    "sip_plan",
}
# Rows of these belong to a user, so user_id leads.
USER_TABLES = {"app_user", "risk_limit"}
LOOKUPS = {
    "instrument",
    "calendar_session",
    "price_bar",
    "corporate_action",
    "run_status",
    "run_transition",
    "order_status",
    "order_transition",
}


def _rows(conn: Connection, query: str) -> Rows:
    return conn.execute(query.encode()).fetchall()


def _keys(conn: Connection) -> Rows:
    """(table, constraint or index, its columns in order) of every unique index and foreign key."""
    return _rows(
        conn,
        """SELECT c.relname, i.indexrelid::regclass::text,
                  (SELECT array_agg(a.attname::text ORDER BY k.place)
                   FROM unnest(i.indkey::int2[]) WITH ORDINALITY k (number, place)
                   JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum = k.number)
           FROM pg_index i JOIN pg_class c ON c.oid = i.indrelid
           WHERE i.indisunique AND c.relnamespace = 'public'::regnamespace
           UNION ALL
           SELECT c.relname, o.conname,
                  (SELECT array_agg(a.attname::text ORDER BY k.place)
                   FROM unnest(o.conkey) WITH ORDINALITY k (number, place)
                   JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum = k.number)
           FROM pg_constraint o JOIN pg_class c ON c.oid = o.conrelid
           WHERE o.contype = 'f' AND c.relnamespace = 'public'::regnamespace
             AND o.confrelid::regclass::text <> ALL (%s)"""
        % ("ARRAY['" + "','".join(sorted(LOOKUPS)) + "']"),
    )


def _functions(conn: Connection) -> list[tuple[str, str, str, str]]:
    """(name, source as written, language, volatility) of every function."""
    return conn.execute(
        """SELECT p.oid::regprocedure::text, pg_get_functiondef(p.oid), l.lanname, p.provolatile
           FROM pg_proc p JOIN pg_language l ON l.oid = p.prolang
           WHERE p.pronamespace = 'public'::regnamespace AND p.prokind = 'f'"""
    ).fetchall()


def test_every_table_is_known_to_this_test(conn: Connection) -> None:
    tables = _rows(conn, "SELECT tablename FROM pg_tables WHERE schemaname = 'public'")
    assert {name for (name,) in tables} == RUN_TABLES | USER_TABLES | LOOKUPS


def test_keys_of_a_run_begin_with_user_and_run(conn: Connection) -> None:
    wrong = [
        (table, key, columns)
        for table, key, columns in _keys(conn)
        if table in RUN_TABLES
        and list(columns[:2]) != ["user_id", "run_id"]
        # A run belongs to a user, who has but one RUNNING.
        and key not in ("strategy_run_belongs_to_user", "strategy_run_one_running_per_user")
    ]
    assert wrong == []


def test_every_key_of_what_a_user_owns_begins_with_the_user(conn: Connection) -> None:
    wrong = [
        (table, key, columns)
        for table, key, columns in _keys(conn)
        if table in RUN_TABLES | USER_TABLES and columns[0] != "user_id"
    ]
    assert wrong == []


def test_lookup_tables_have_no_triggers_and_point_at_no_users_table(conn: Connection) -> None:
    triggers = _rows(
        conn,
        """SELECT tgrelid::regclass::text, tgname FROM pg_trigger
           WHERE NOT tgisinternal AND tgrelid IN
               (SELECT oid FROM pg_class WHERE relnamespace = 'public'::regnamespace)""",
    )
    assert [t for t in triggers if t[0] in LOOKUPS] == []
    pointing = _rows(
        conn,
        """SELECT conrelid::regclass::text, confrelid::regclass::text FROM pg_constraint
           WHERE contype = 'f' AND connamespace = 'public'::regnamespace""",
    )
    assert [p for p in pointing if p[0] in LOOKUPS and p[1] not in LOOKUPS] == []


def test_what_a_statement_in_a_function_touches_it_filters_by_user(conn: Connection) -> None:
    """Every SELECT, UPDATE or DELETE of a table of users names user_id after its table."""
    owned = "|".join(sorted(RUN_TABLES | USER_TABLES))
    for name, source, _, _ in _functions(conn):
        for statement in re.split(r";", source):
            used = re.search(rf"\b(FROM|UPDATE|JOIN)\s+({owned})\b", statement)
            assert not used or "user_id" in statement[used.end() :], f"{name}: {statement}"


def test_nothing_notifies_orders_by_a_sequence_or_locks_by_advice(conn: Connection) -> None:
    for name, source, _, _ in _functions(conn):
        assert not re.search(r"\bNOTIFY\b|pg_notify|nextval|advisory", source, re.I), name
    assert _rows(conn, "SELECT relname FROM pg_class WHERE relkind = 'S'"
                 " AND relnamespace = 'public'::regnamespace") == []  # fmt: skip


def test_every_raise_has_a_code_a_constraint_a_table_and_a_hint(conn: Connection) -> None:
    raises = 0
    for name, source, _, _ in _functions(conn):
        assert "TG_TABLE_NAME" not in source, name
        for statement in re.findall(r"RAISE EXCEPTION.*?;\n", source, re.DOTALL):
            raises += 1
            for part in ("ERRCODE", "CONSTRAINT", "TABLE", "HINT"):
                assert re.search(rf"\b{part} =", statement), f"{name}: {statement}"
    assert raises > 20


def test_our_sqlstates_stay_integrity_errors(conn: Connection) -> None:
    for name, source, _, _ in _functions(conn):
        for code in re.findall(r"ERRCODE = '([^']+)'", source):
            known = ("unique_violation", "foreign_key_violation", "check_violation")
            assert re.fullmatch(r"23T0\d", code) or code in known, f"{name}: {code}"


def test_no_rules_no_merge_no_simple_case(conn: Connection) -> None:
    rules = _rows(
        conn,
        """SELECT rulename FROM pg_rules WHERE schemaname = 'public' AND rulename <> '_RETURN'""",
    )
    assert rules == []
    for name, source, _, _ in _functions(conn):
        assert not re.search(r"\bMERGE\s+INTO\b", source), name
    for file in sorted(sql_dir().glob("*.sql")):
        simple = re.findall(r"\bCASE\s+(?!WHEN\b)\S+", file.read_text(encoding="utf-8"))
        assert simple == [], f"{file.name}: {simple}"


def test_money_is_numeric_time_has_a_zone_text_is_text(conn: Connection) -> None:
    odd = _rows(
        conn,
        """SELECT c.relname, a.attname, format_type(a.atttypid, a.atttypmod)
           FROM pg_attribute a JOIN pg_class c ON c.oid = a.attrelid
           WHERE c.relnamespace = 'public'::regnamespace AND c.relkind IN ('r', 'v')
             AND a.attnum > 0 AND format_type(a.atttypid, a.atttypmod) <> ALL (ARRAY[
                 'uuid', 'text', 'numeric', 'timestamp with time zone', 'date', 'boolean',
                 'integer', 'bigint', 'jsonb', 'bytea'])""",
    )
    assert odd == []


@pytest.mark.parametrize("kind", ["table", "view", "function"])
def test_everything_is_commented(conn: Connection, kind: str) -> None:
    queries = {
        "table": """SELECT relname FROM pg_class WHERE relkind = 'r'
                    AND obj_description(oid, 'pg_class') IS NULL
                    AND relnamespace = 'public'::regnamespace""",
        "view": """SELECT relname FROM pg_class WHERE relkind = 'v'
                   AND obj_description(oid, 'pg_class') IS NULL
                   AND relnamespace = 'public'::regnamespace""",
        "function": """SELECT proname FROM pg_proc
                       WHERE obj_description(oid, 'pg_proc') IS NULL
                       AND pronamespace = 'public'::regnamespace""",
    }
    assert _rows(conn, queries[kind]) == []


def test_constraints_and_indexes_are_named_for_their_table(conn: Connection) -> None:
    names = _rows(
        conn,
        """SELECT c.relname, o.conname FROM pg_constraint o JOIN pg_class c ON c.oid = o.conrelid
           WHERE o.connamespace = 'public'::regnamespace AND o.contype <> 'n'
           UNION ALL
           SELECT tablename, indexname FROM pg_indexes WHERE schemaname = 'public'""",
    )
    assert [(t, n) for t, n in names if not n.startswith(t)] == []
    made_up = [n for _, n in names if re.search(r"_check\d*$|_fkey\d*$|_key\d*$|_not_null$", n)]
    assert made_up == []


def test_no_function_follows_a_callers_search_path(conn: Connection) -> None:
    """Otherwise a temporary table of the same name would stand in for ours."""
    loose = conn.execute(
        """SELECT p.oid::regprocedure::text FROM pg_proc p
           WHERE p.pronamespace = 'public'::regnamespace AND p.prokind = 'f'
             AND NOT coalesce(p.proconfig::text, '') LIKE '%search_path=%pg_temp%'
             AND p.prosqlbody IS NULL"""
    ).fetchall()
    assert loose == []


def test_the_load_order_names_every_file_once() -> None:
    named = (sql_dir() / "order.txt").read_text(encoding="utf-8").split()
    assert sorted(named) == sorted(file.name for file in sql_dir().glob("*.sql"))
