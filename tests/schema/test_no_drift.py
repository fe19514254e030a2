"""sql/ and migrations/ build the same database: catalog queries of both are compared, not dumps."""

from __future__ import annotations

from collections.abc import Iterator

import psycopg
import pytest

from engine.db import install
from engine.db.connect import Connection, open_connection
from engine.db.embedded import Server

# Each query describes one kind of object of the schema, a row an object, its name first.
CATALOG = {
    "column": """
        SELECT c.relname || '.' || a.attname, format_type(a.atttypid, a.atttypmod), a.attnotnull,
               a.attgenerated, a.attidentity, coalesce(pg_get_expr(d.adbin, d.adrelid), ''),
               coalesce(l.collname, ''), c.relkind
        FROM pg_attribute a
        JOIN pg_class c ON c.oid = a.attrelid
        LEFT JOIN pg_attrdef d ON d.adrelid = a.attrelid AND d.adnum = a.attnum
        LEFT JOIN pg_collation l ON l.oid = a.attcollation AND l.collname <> 'default'
        WHERE c.relnamespace = 'public'::regnamespace AND c.relkind IN ('r', 'v')
          AND a.attnum > 0 AND NOT a.attisdropped""",
    "constraint": """
        SELECT coalesce(c.relname, '') || '.' || o.conname, pg_get_constraintdef(o.oid)
        FROM pg_constraint o LEFT JOIN pg_class c ON c.oid = o.conrelid
        WHERE o.connamespace = 'public'::regnamespace""",
    "index": """
        SELECT indexname, indexdef FROM pg_indexes WHERE schemaname = 'public'""",
    "function": """
        SELECT p.oid::regprocedure::text, pg_get_functiondef(p.oid)
        FROM pg_proc p WHERE p.pronamespace = 'public'::regnamespace AND p.prokind = 'f'""",
    "trigger": """
        SELECT c.relname || '.' || t.tgname, pg_get_triggerdef(t.oid), t.tgenabled
        FROM pg_trigger t JOIN pg_class c ON c.oid = t.tgrelid
        WHERE c.relnamespace = 'public'::regnamespace AND NOT t.tgisinternal""",
    "view": """
        SELECT viewname, definition FROM pg_views WHERE schemaname = 'public'""",
    "option": """
        SELECT relname, coalesce(reloptions::text, ''), relrowsecurity FROM pg_class
        WHERE relnamespace = 'public'::regnamespace AND relkind IN ('r', 'v')""",
    "grant": """
        SELECT c.relname, x.grantee::regrole::text, x.privilege_type, x.is_grantable
        FROM pg_class c
        CROSS JOIN LATERAL aclexplode(coalesce(c.relacl, acldefault('r', c.relowner))) x
        WHERE c.relnamespace = 'public'::regnamespace AND c.relkind IN ('r', 'v')
        UNION ALL
        SELECT c.relname || '.' || a.attname, x.grantee::regrole::text, x.privilege_type,
               x.is_grantable
        FROM pg_class c
        JOIN pg_attribute a ON a.attrelid = c.oid
        CROSS JOIN LATERAL aclexplode(a.attacl) x
        WHERE c.relnamespace = 'public'::regnamespace AND c.relkind IN ('r', 'v')
        UNION ALL
        SELECT p.oid::regprocedure::text, x.grantee::regrole::text, x.privilege_type, x.is_grantable
        FROM pg_proc p
        CROSS JOIN LATERAL aclexplode(coalesce(p.proacl, acldefault('f', p.proowner))) x
        WHERE p.pronamespace = 'public'::regnamespace""",
    "comment": """
        SELECT coalesce(c.relname || coalesce('.' || a.attname, ''), p.oid::regprocedure::text, ''),
               d.description
        FROM pg_description d
        LEFT JOIN pg_class c ON c.oid = d.objoid AND d.classoid = 'pg_class'::regclass
        LEFT JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum = d.objsubid AND d.objsubid > 0
        LEFT JOIN pg_proc p ON p.oid = d.objoid AND d.classoid = 'pg_proc'::regclass
        WHERE 'public'::regnamespace IN (c.relnamespace, p.pronamespace)""",
}
LOOKUPS = ("instrument", "order_status", "order_transition", "run_status", "run_transition")

Row = tuple[object, ...]


def _described(conn: Connection) -> set[Row]:
    """Everything that the schema is, but for what Alembic keeps of itself."""
    found: set[Row] = set()
    for kind, query in CATALOG.items():
        rows = conn.execute(query.encode()).fetchall()
        found |= {(kind, *row) for row in rows if not str(row[0]).startswith("alembic_")}
    for table in LOOKUPS:
        found |= {(table, *row) for row in conn.execute(f"SELECT * FROM {table}").fetchall()}
    return found


@pytest.fixture(scope="module")
def migrated(server: Server, request: pytest.FixtureRequest) -> Iterator[set[Row]]:
    dsn = install.own_database(server.dsn(), "migrated")
    install.migrate(dsn)
    if request.config.option.proven:  # as in the template
        with psycopg.connect(server.dsn("migrated")) as admin:
            admin.execute("ALTER FUNCTION ticks_write OWNER TO oms_owner")
    with open_connection(dsn) as conn:
        yield _described(conn)


def test_the_migrations_build_what_sql_says(conn: Connection, migrated: set[Row]) -> None:
    from_sql = _described(conn)
    assert {row[0] for row in from_sql} >= CATALOG.keys() - {"option"}
    only_sql = sorted(map(str, from_sql - migrated))
    only_migrations = sorted(map(str, migrated - from_sql))
    assert (only_sql, only_migrations) == ([], [])


@pytest.mark.parametrize(
    "change",
    [
        "ALTER TABLE sip_plan DROP CONSTRAINT sip_plan_amount_positive,"
        " ADD CONSTRAINT sip_plan_amount_positive CHECK (amount >= 0)",
        "ALTER TABLE orders ALTER COLUMN order_type DROP DEFAULT",
        "ALTER TABLE execution ALTER COLUMN commission DROP NOT NULL",
        "DROP INDEX orders_open_idx",
        "ALTER FUNCTION execution_apply() SECURITY INVOKER",
        "CREATE OR REPLACE FUNCTION event_ledger_check_end() RETURNS trigger LANGUAGE plpgsql"
        " SET search_path = public, pg_temp AS $$ BEGIN RETURN NULL; END $$",
        "DROP TRIGGER orders_b_pass_gate ON orders",
        "GRANT EXECUTE ON FUNCTION execution_apply() TO PUBLIC",
        "REVOKE UPDATE (status) ON orders FROM oms_engine",
        "COMMENT ON COLUMN orders.quantity IS NULL",
        "COMMENT ON FUNCTION event_hash IS 'something else'",
        "INSERT INTO order_transition VALUES ('CANCELED', 'NEW', 'I say so')",
        "ALTER TABLE event_ledger DISABLE TRIGGER event_ledger_a_append",
        "COMMENT ON TABLE orders IS 'something else'",
        "CREATE OR REPLACE VIEW audit_running AS SELECT user_id, run_id, ''::text AS subject,"
        " ''::text AS finding FROM strategy_run WHERE false",
        "GRANT DELETE ON event_ledger TO oms_engine",
        "DELETE FROM order_transition WHERE from_status = 'NEW' AND to_status = 'FILLED'",
        "ALTER FUNCTION run_last_time(uuid, uuid) RESET search_path",
        "ALTER TABLE orders SET (fillfactor = 90)",
    ],
)
def test_a_difference_is_seen(conn: Connection, migrated: set[Row], change: str) -> None:
    """So that the comparison itself can fail."""
    conn.execute(change.encode())
    assert _described(conn) != migrated


def test_there_is_one_head_and_it_is_what_the_program_expects(server: Server) -> None:
    dsn = install.own_database(server.dsn(), "heads")
    install.migrate(dsn)
    with psycopg.connect(dsn) as conn:
        assert conn.execute("SELECT version_num FROM alembic_version").fetchall() == [
            (install.head(),)
        ]
