"""The rules of the schema's own making, asked of the catalog and of the text of sql/.

DESIGN.md (7) says why: they keep the schema fit for being sharded by user_id, readable and exact.
"""

from __future__ import annotations

import re
from decimal import Decimal, localcontext
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from schema_cases import ACCOUNT_TABLES, BROKER_TABLES, LOOKUPS, RUN_TABLES

from engine import resources
from engine.db.connect import Connection

SOURCES = {
    name: (resources.sql_dir() / name).read_text(encoding="utf-8")
    for name in (resources.sql_dir() / "order.txt").read_text(encoding="utf-8").split()
}
ALL_SQL = "\n".join(SOURCES.values())
OWNED_BY_USERS = {*RUN_TABLES, *BROKER_TABLES, *ACCOUNT_TABLES, "app_user"}
# What belongs to a user, or to an account of a user's, whichever the run.
OF_NO_RUN = {*ACCOUNT_TABLES, "app_user", "risk_limit"}

# A table's name without the quotes that "position" gets as a word of SQL.
_KEYS = """
    SELECT trim('"' FROM c.conrelid::regclass::text), c.conname, c.contype,
           ARRAY(SELECT a.attname::text FROM unnest(c.conkey) WITH ORDINALITY k (num, place)
                 JOIN pg_attribute a ON a.attrelid = c.conrelid AND a.attnum = k.num
                 ORDER BY k.place)
    FROM pg_constraint c
    WHERE c.connamespace = 'public'::regnamespace AND c.contype IN ('p', 'u', 'x', 'f')"""
_INDEXES = """
    SELECT trim('"' FROM i.indrelid::regclass::text), c.relname::text, i.indisunique,
           ARRAY(SELECT a.attname::text FROM unnest(i.indkey) WITH ORDINALITY k (num, place)
                 JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = k.num
                 ORDER BY k.place)
    FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid
    WHERE c.relnamespace = 'public'::regnamespace"""


def _rows(conn: Connection, query: str) -> list[tuple[Any, ...]]:
    return conn.execute(query.encode()).fetchall()


def _bodies(conn: Connection) -> dict[str, str]:
    """The bodies of our functions, by name."""
    return {
        name: body
        for name, body in _rows(
            conn,
            """SELECT proname, coalesce(pg_get_function_sqlbody(oid), prosrc) FROM pg_proc
               WHERE pronamespace = 'public'::regnamespace""",
        )
    }


# --- Rule 1: user_id first --------------------------------------------------------------------


def test_every_table_is_a_users_or_a_lookup_table(conn: Connection) -> None:
    tables = {
        name
        for (name,) in _rows(conn, "SELECT tablename FROM pg_tables WHERE schemaname = 'public'")
    }
    assert tables == {*OWNED_BY_USERS, *LOOKUPS}


def test_user_and_run_come_first_in_every_key_of_a_run(conn: Connection) -> None:
    for table, name, kind, columns in _rows(conn, _KEYS):
        if table not in OWNED_BY_USERS or kind == "f":
            continue
        assert columns[0] == "user_id", name
        # A user's limits need not be a run's; everything else that is in a run says so.
        if table not in OF_NO_RUN:
            assert columns[:2] == ["user_id", "run_id"], name
        elif table.startswith("broker_"):
            assert columns[:2] == ["user_id", "account"], name


def test_user_comes_first_in_every_index(conn: Connection) -> None:
    for table, name, unique, columns in _rows(conn, _INDEXES):
        if table in OWNED_BY_USERS:
            assert columns[0] == "user_id", name
            # A broker knows our orders by their own ids, whatever the run.
            if unique and name not in (
                "strategy_run_one_running_per_user",
                "orders_id_once_at_brokers",
            ):
                assert table in OF_NO_RUN or columns[1] == "run_id", name


def test_foreign_keys_between_users_rows_carry_the_user(conn: Connection) -> None:
    pointed = _rows(
        conn,
        """SELECT trim('"' FROM conrelid::regclass::text), conname,
                  trim('"' FROM confrelid::regclass::text),
                  (SELECT attname FROM pg_attribute
                   WHERE attrelid = conrelid AND attnum = conkey[1])::text
           FROM pg_constraint WHERE connamespace = 'public'::regnamespace AND contype = 'f'""",
    )
    for table, name, target, first in pointed:
        if target in OWNED_BY_USERS:
            assert (table in OWNED_BY_USERS, first) == (True, "user_id"), name


# --- Rule 2: lookup tables --------------------------------------------------------------------


def test_lookup_tables_have_no_triggers_and_point_at_nobodys_rows(conn: Connection) -> None:
    triggered = _rows(
        conn,
        """SELECT DISTINCT trim('"' FROM tgrelid::regclass::text) FROM pg_trigger
           WHERE NOT tgisinternal""",
    )
    assert {table for (table,) in triggered}.isdisjoint(LOOKUPS)
    targets = _rows(
        conn,
        """SELECT trim('"' FROM conrelid::regclass::text),
                  trim('"' FROM confrelid::regclass::text)
           FROM pg_constraint
           WHERE contype = 'f' AND connamespace = 'public'::regnamespace""",
    )
    for table, target in targets:
        assert table not in LOOKUPS or target in LOOKUPS


# --- Rule 3: every statement in a function names the user -------------------------------------


def test_every_statement_of_a_function_keeps_to_one_user(conn: Connection) -> None:
    """A simple reading: whatever names a user's table also names user_id."""
    names = "|".join(sorted(OWNED_BY_USERS | {"new_rows", "old_rows"}, key=len, reverse=True))
    table = re.compile(rf"\b(?:FROM|JOIN|UPDATE|INTO)\s+({names})\b")
    checked = 0
    for name, body in _bodies(conn).items():
        if name == "our_relations":
            continue
        for statement in body.split(";"):
            if table.search(statement):
                checked += 1
                # A whole row that was checked before, or a row of the statement's own.
                assert "user_id" in statement or "FROM new_rows" in statement, (name, statement)
    assert checked > 40


# --- Rule 5, 6, 7: what functions may say ------------------------------------------------------


def test_no_function_notifies_locks_or_orders_by_sequence(conn: Connection) -> None:
    for name, body in _bodies(conn).items():
        for word in ("NOTIFY", "pg_notify", "advisory", "nextval", "LISTEN"):
            assert word.lower() not in body.lower(), (name, word)
    assert (
        _rows(
            conn,
            "SELECT relname FROM pg_class WHERE relkind = 'S' "
            "AND relnamespace = 'public'::regnamespace",
        )
        == []
    )


def test_every_refusal_says_which_rule_and_what_to_do(conn: Connection) -> None:
    raised = 0
    for name, body in _bodies(conn).items():
        for statement in re.findall(r"RAISE EXCEPTION.*?;\n", body, flags=re.DOTALL):
            raised += 1
            for part in ("ERRCODE = ", "CONSTRAINT = ", "TABLE = ", "HINT = "):
                assert part in statement, (name, part)
        assert "RAISE;" not in body or name == "grant_roles"
    assert raised == ALL_SQL.count("RAISE EXCEPTION")
    assert raised > 20


def test_triggers_are_told_their_tables_name(conn: Connection) -> None:
    """A shard's table has another name; TG_TABLE_NAME would tell people that one."""
    for name, body in _bodies(conn).items():
        for word in ("TG_TABLE_NAME", "TG_RELNAME", "pg_trigger_depth"):
            assert word not in body, (name, word)
    assert "pg_trigger_depth" not in ALL_SQL


def test_there_are_no_rules_no_merge_and_no_simple_case(conn: Connection) -> None:
    assert (
        _rows(
            conn,
            """SELECT r.rulename FROM pg_rewrite r JOIN pg_class c ON c.oid = r.ev_class
           WHERE c.relnamespace = 'public'::regnamespace AND r.rulename <> '_RETURN'""",
        )
        == []
    )
    assert not re.search(r"\bMERGE\s+INTO\b", ALL_SQL)
    code = re.sub(r"--.*|'(?:[^']|'')*'", "", ALL_SQL)
    assert re.findall(r"\bCASE\s+(?!WHEN\b)\S+", code) == []


# --- Types ------------------------------------------------------------------------------------


def test_money_is_exact_and_time_knows_its_zone(conn: Connection) -> None:
    used = _rows(
        conn,
        """SELECT DISTINCT format_type(a.atttypid, a.atttypmod) FROM pg_attribute a
           JOIN pg_class c ON c.oid = a.attrelid
           WHERE c.relnamespace = 'public'::regnamespace AND c.relkind IN ('r', 'v')
             AND a.attnum > 0 AND NOT a.attisdropped
             AND a.atttypid NOT IN ('time'::regtype, 'interval'::regtype)""",
    )
    assert {kind for (kind,) in used} == {
        "bigint", "boolean", "bytea", "date", "integer", "jsonb", "numeric", "text",
        "timestamp with time zone", "uuid",
    }  # fmt: skip


def test_times_of_day_and_spans_are_only_where_they_are_meant(conn: Connection) -> None:
    """Hours of an account are of its own time zone; a span is none of money."""
    used = _rows(
        conn,
        """SELECT c.relname || '.' || a.attname, a.atttypid::regtype::text FROM pg_attribute a
           JOIN pg_class c ON c.oid = a.attrelid
           WHERE c.relnamespace = 'public'::regnamespace AND c.relkind IN ('r', 'v')
             AND a.atttypid IN ('time'::regtype, 'interval'::regtype)""",
    )
    assert dict(used) == {
        "broker_account.opens_at": "time without time zone",
        "broker_account.closes_at": "time without time zone",
        "broker_lease.clock_skew": "interval",
    }


def test_functions_compute_with_nothing_inexact() -> None:
    code = re.sub(r"--.*|'(?:[^']|'')*'", "", ALL_SQL)
    inexact = r"\b(float\d?|double|real|money|varchar|char|timestamp without)\b"
    assert not re.search(inexact, code)


def test_every_numeric_has_a_bound_or_is_made_of_bounded_ones(conn: Connection) -> None:
    """NaN, infinity and endless digits get into no column."""
    columns = _rows(
        conn,
        """SELECT c.relname, a.attname,
                  EXISTS (SELECT FROM pg_constraint o WHERE o.conrelid = c.oid
                          AND o.contype = 'c' AND a.attnum = ANY (o.conkey))
           FROM pg_attribute a JOIN pg_class c ON c.oid = a.attrelid
           WHERE c.relnamespace = 'public'::regnamespace AND c.relkind = 'r' AND a.attnum > 0
             AND a.atttypid = 'numeric'::regtype AND a.attgenerated = ''""",
    )
    unbounded = {f"{table}.{column}" for table, column, bounded in columns if not bounded}
    # Sums and products that only the database writes, of what is bounded.
    assert unbounded == {
        "mtm_ledger.cash",
        "mtm_ledger.market_value",
        "orders.filled_notional",
        "position.cost_basis",
        "position.realized_pnl",
        "split_applied.quantity_after",
        "split_applied.quantity_before",
    }


_QUANTITY = st.decimals(0, 10**12, places=8, allow_nan=False).filter(lambda d: d > 0)
_PRICE = st.decimals(0, 10**6, places=8, allow_nan=False).filter(lambda d: d > 0)


@settings(max_examples=60)
@given(fills=st.lists(st.tuples(_QUANTITY, _PRICE), min_size=1, max_size=5))
def test_cash_is_exact_to_the_last_digit(conn: Connection, fills: list[tuple[Any, Any]]) -> None:
    """Eight decimals of a quantity times eight of a price fit, and no sum is rounded.

    Every example rolls back what it wrote.
    """
    with localcontext() as context:
        context.prec = 80
        spent = sum((q * p for q, p in fills), Decimal(0))
        bought = sum((q for q, _ in fills), Decimal(0))
        user, run, order = (f"99000000-0000-0000-0000-00000000000{n}" for n in (1, 2, 3))
        with conn.transaction(force_rollback=True):
            conn.execute("INSERT INTO app_user (user_id) VALUES (%s)", [user])
            conn.execute(
                "INSERT INTO strategy_run (user_id, run_id, status, account_type) "
                "VALUES (%s, %s, 'RUNNING', 'MARGIN')",
                [user, run],
            )
            conn.execute(
                "INSERT INTO orders (user_id, run_id, order_id, symbol, side, quantity) "
                "VALUES (%s, %s, %s, 'X', 'BUY', %s)",
                [user, run, order, bought],
            )
            for q, p in fills:
                conn.execute(
                    "INSERT INTO execution (user_id, run_id, order_id, quantity, price) "
                    "VALUES (%s, %s, %s, %s, %s)",
                    [user, run, order, q, p],
                )
            row = conn.execute(
                """SELECT r.cash, o.filled_quantity, o.filled_notional, p.quantity, p.cost_basis
                   FROM strategy_run r
                   JOIN orders o ON o.user_id = r.user_id AND o.run_id = r.run_id
                   JOIN position p ON p.user_id = r.user_id AND p.run_id = r.run_id
                   WHERE r.user_id = %s AND r.run_id = %s""",
                [user, run],
            ).fetchone()
        assert row == (-spent, bought, spent, bought, spent)


# --- Names, comments, text --------------------------------------------------------------------


def test_everything_is_explained(conn: Connection) -> None:
    silent = _rows(
        conn,
        """SELECT 'relation', relname FROM pg_class
           WHERE relnamespace = 'public'::regnamespace AND relkind IN ('r', 'v')
             AND obj_description(oid, 'pg_class') IS NULL
           UNION ALL
           SELECT 'function', proname FROM pg_proc
           WHERE pronamespace = 'public'::regnamespace
             AND obj_description(oid, 'pg_proc') IS NULL""",
    )
    assert silent == []


def test_constraints_and_indexes_are_named_for_what_must_hold(conn: Connection) -> None:
    named = _rows(
        conn,
        """SELECT trim('"' FROM conrelid::regclass::text), conname FROM pg_constraint
           WHERE connamespace = 'public'::regnamespace AND contype IN ('c', 'f', 'u', 'x', 'p')
           UNION
           SELECT trim('"' FROM indrelid::regclass::text), c.relname FROM pg_index i
           JOIN pg_class c ON c.oid = i.indexrelid
           WHERE c.relnamespace = 'public'::regnamespace""",
    )
    for table, name in named:
        assert name.startswith(f"{table}_"), name
        # What Postgres makes up where nobody chose a name.
        assert not re.search(r"_(check|fkey|key|excl)\d*$", name), name
    assert max(len(name) for _, name in named) < 60


def test_triggers_and_functions_are_named_for_their_table(conn: Connection) -> None:
    for table, trigger in _rows(
        conn,
        """SELECT trim('"' FROM tgrelid::regclass::text), tgname FROM pg_trigger
           WHERE NOT tgisinternal""",
    ):
        # The letter is the order in which Postgres fires them.
        assert re.fullmatch(rf"{table}_[abcmz]_[a-z_]+", trigger), trigger


def test_every_search_path_is_pinned(conn: Connection) -> None:
    """Or the function is one expression whose names were looked up when it was made."""
    loose = _rows(
        conn,
        """SELECT proname FROM pg_proc
           WHERE pronamespace = 'public'::regnamespace AND prosqlbody IS NULL AND prokind = 'f'
             AND NOT coalesce('search_path=public, pg_temp' = ANY (proconfig), false)""",
    )
    assert loose == []


def test_few_functions_have_the_owners_rights(conn: Connection) -> None:
    """What triggers call, by what the engine writes ticks and halts trading, and a connector's."""
    assert _rows(
        conn,
        """SELECT proname, prorettype::regtype::text FROM pg_proc
           WHERE pronamespace = 'public'::regnamespace AND prosecdef ORDER BY proname""",
    ) == [
        ("books_follow", "bigint"),
        ("broker_command_move_order", "trigger"),
        ("commands_claim", "broker_command"),
        ("commands_done", "void"),
        ("commands_throttled", "record"),
        ("connector_alert", "void"),
        ("event_ledger_prove", "trigger"),
        ("execution_apply", "trigger"),
        ("execution_commission_apply", "trigger"),
        ("executions_unheard", "bigint"),
        ("halt_enforce", "integer"),
        ("halt_lift", "trading_halt"),
        ("halt_place", "trading_halt"),
        ("lease_release", "void"),
        ("lease_renew", "timestamp with time zone"),
        ("lease_take", "timestamp with time zone"),
        ("ledger_analyze", "void"),
        ("open_orders_sum", "numeric"),
        ("orders_forget_sums", "trigger"),
        ("orders_send", "trigger"),
        ("orders_send_move", "trigger"),
        ("orders_send_rerouted", "trigger"),
        ("orders_send_terms", "trigger"),
        ("reconcile_analyze", "void"),
        ("run_equity_peak", "numeric"),
        ("split_applied_apply", "trigger"),
        ("system_halt_lift", "system_halt"),
        ("system_halt_place", "system_halt"),
        ("ticks_write", "integer"),
    ]


# One loop over what is told that every proof is a part of, or every number that follows.
LONG = {"books_follow", "ticks_write"}


def test_functions_stay_short(conn: Connection) -> None:
    long = {
        name: len(body.strip().splitlines())
        for name, body in _bodies(conn).items()
        if len(body.strip().splitlines()) > 70
    }
    assert long.keys() == LONG


@pytest.mark.parametrize("name", SOURCES)
def test_a_file_reads_well(name: str) -> None:
    text = SOURCES[name]
    assert text.startswith("-- ")
    assert text.endswith("\n")
    assert [line for line in text.splitlines() if len(line) > 100 or line != line.rstrip()] == []
    assert "\t" not in text


def test_every_file_is_in_the_order() -> None:
    files = {path.name for path in resources.sql_dir().glob("*.sql")}
    assert files == SOURCES.keys()
