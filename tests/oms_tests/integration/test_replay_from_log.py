"""A run out of one database, through a file, into another: the same to the last row."""

from __future__ import annotations

import json
from collections.abc import Iterator

import psycopg
import pytest
from market_days import a_bar, a_run, assert_sound, close_on
from psycopg import sql
from traded_books import Book, a_life

from engine.db.connect import Connection, open_connection
from engine.db.install import OWNER_ROLE
from engine.errors import BadInput
from engine.export import Export, read_export, write_export
from engine.rebuild import export_run, rebuild_run
from engine.runs import Run, find_run, set_status
from engine.tick import run_tick


@pytest.fixture
def empty(postgresql: psycopg.Connection, postgresql_noproc: object) -> Iterator[Connection]:
    """A second database, with the schema and nothing in it."""
    template = str(postgresql_noproc.template_dbname)  # type: ignore[attr-defined]
    with psycopg.connect(postgresql.info.dsn, autocommit=True) as admin:
        admin.execute(
            sql.SQL("CREATE DATABASE elsewhere TEMPLATE {}").format(sql.Identifier(template))
        )
        dsn = psycopg.conninfo.make_conninfo(
            postgresql.info.dsn, dbname="elsewhere", user=OWNER_ROLE
        )
        try:
            with open_connection(dsn) as conn:
                yield conn
        finally:
            admin.execute("DROP DATABASE elsewhere WITH (FORCE)")


def tables(conn: Connection) -> list[str]:
    """Every table that hangs on a run, and the run's own; the outbox is its account's."""
    return [
        name
        for (name,) in conn.execute(
            """SELECT DISTINCT t.relname::text
               FROM pg_attribute a JOIN pg_class t ON t.oid = a.attrelid
               WHERE a.attname = 'run_id' AND t.relkind = 'r' AND a.attnum > 0
                 AND t.relnamespace = 'public'::regnamespace
                 AND t.relname NOT IN ('broker_command', 'alert')
               ORDER BY 1"""
        )
    ]


def contents(conn: Connection, run: Run) -> dict[str, list[str]]:
    """All rows of a run, every column of them, as text."""
    return {
        table: [
            text
            for (text,) in conn.execute(
                sql.SQL(
                    "SELECT t::text FROM {} t WHERE user_id = %s AND run_id = %s ORDER BY 1"
                ).format(sql.Identifier(table)),
                [run.user_id, run.run_id],
            )
        ]
        for table in tables(conn)
    }


def lines_of(conn: Connection, run: Run) -> list[str]:
    return [line + "\n" for line in write_export(export_run(conn, run))]


@pytest.mark.scenario("REPLAY-01")
@pytest.mark.parametrize("ended", [False, True])
def test_replay_from_log_reconstructs_state_exactly(
    owner_conn: Connection, empty: Connection, ended: bool
) -> None:
    run = a_life(owner_conn)
    if ended:
        set_status(owner_conn, run.user_id, run.run_id, "STOPPED")
    before = contents(owner_conn, run)
    # The run has had some of everything: where a table is empty, nothing would be proven.
    assert {name for name, rows in before.items() if not rows} <= {
        "execution_commission", "run_route", "order_broker_id",
    } | set(before) - set(FILLED)  # fmt: skip
    rebuild_run(empty, read_export(lines_of(owner_conn, run)))
    assert contents(empty, run) == before
    assert_sound(empty)
    assert triggers_off(empty) == 0
    # What was rebuilt goes on where the other one stood, as the other one does.
    if not ended:
        at, bars = close_on("2001-05-14"), [a_bar("2001-05-14", "60 62 58 59")]
        for conn in (owner_conn, empty):
            run_tick(conn, run.user_id, run.run_id, at, bars)
        events = "SELECT event_type, subject, payload FROM event_ledger ORDER BY seq"
        assert owner_conn.execute(events).fetchall() == empty.execute(events).fetchall()


FILLED = (
    "engine_state", "engine_status", "event_ledger", "execution", "mtm_ledger", "orders",
    "position", "risk_limit", "sip_plan", "split_applied", "strategy_run",
)  # fmt: skip


def triggers_off(conn: Connection) -> int:
    row = conn.execute("SELECT count(*) FROM pg_trigger WHERE tgenabled = 'D'").fetchone()
    assert row is not None
    return int(row[0])


def test_a_run_at_a_broker_is_rebuilt_too(owner_conn: Connection, empty: Connection) -> None:
    owner_conn.execute(
        """INSERT INTO fx_rate (currency, quote_currency, at, rate)
           VALUES ('EUR', 'USD', '2024-01-08T00:00Z', 1.1)"""
    )
    book = Book(owner_conn, "FIFO", broker="dummy")
    bought = book.trade("10", "100.50")
    book.commission(bought, "1.00", "EUR", book.at)
    book.bust(book.trade("5", "200"), "5", "200")
    book.trade("-4", "101")
    book.fill(book.order("10", "AAPL"), "4", "99")
    left = book.order("3", "AAPL")
    owner_conn.execute("SELECT order_cancel(%s, %s, %s)", [*book.key, left])
    run = find_run(owner_conn, book.run_id)
    before = contents(owner_conn, run)
    assert before["execution_commission"]
    rebuild_run(empty, read_export(lines_of(owner_conn, run)))
    assert contents(empty, run) == before
    assert_sound(empty)


def test_a_run_with_many_open_orders_is_rebuilt_too(
    owner_conn: Connection, empty: Connection
) -> None:
    """What they come to in sum is no part of an export; the database makes it again."""
    run = a_run(owner_conn, cash="10000")
    place = """INSERT INTO orders (user_id, run_id, symbol, side, quantity, order_type,
                                   limit_price, time_in_force)
               SELECT %s, %s, 'AAPL', 'BUY', 1, 'LIMIT', 10, 'GTC' FROM generate_series(1, %s)
               RETURNING reject_code"""
    key = [run.user_id, run.run_id]
    owner_conn.execute(place, [*key, 600])
    before = contents(owner_conn, run)
    assert len(before.pop("open_order_sum")) == 128
    rebuild_run(empty, read_export(lines_of(owner_conn, run)))
    after = contents(empty, run)
    assert after.pop("open_order_sum") == []
    assert after == before
    for conn in (owner_conn, empty):
        codes = [code for (code,) in conn.execute(place, [*key, 401])]
        assert codes == [None] * 400 + ["INSUFFICIENT_CASH"]
        assert_sound(conn)


def test_an_unused_run_is_rebuilt_too(owner_conn: Connection, empty: Connection) -> None:
    run = a_run(owner_conn, start=False)
    rebuild_run(empty, read_export(lines_of(owner_conn, run)))
    assert contents(empty, run) == contents(owner_conn, run)


def test_a_run_that_is_there_is_not_overwritten(owner_conn: Connection) -> None:
    run = a_run(owner_conn)
    export = export_run(owner_conn, run)
    with pytest.raises(BadInput, match="in this database already"):
        rebuild_run(owner_conn, export)


def changed(lines: list[str], number: int, **fields: object) -> list[str]:
    line = json.loads(lines[number]) | fields
    return [*lines[:number], json.dumps(line, ensure_ascii=False) + "\n", *lines[number + 1 :]]


def test_a_changed_file_is_refused(owner_conn: Connection) -> None:
    run = a_life(owner_conn)
    lines = lines_of(owner_conn, run)
    terms = json.loads(lines[0])["terms"]
    execution = next(i for i, line in enumerate(lines) if '"EXECUTION"' in line)
    payload = json.loads(lines[execution])["payload"]
    note = next(i for i, line in enumerate(lines) if '"sip_plan"' in line)
    for tampered, says in (
        (changed(lines, 0, terms=terms.replace("10000", "99999")), "tells another initial_cash"),
        (changed(lines, 0, terms=terms.replace("life", "other")), "the terms or a note"),
        (changed(lines, note, row=json.loads(lines[note])["row"] + " "), "the terms or a note"),
        (
            changed(lines, execution, payload=payload.replace('"BUY"', '"SELL"')),
            f"line {execution + 1} was changed: event {execution} doesn't follow",
        ),
        (changed(lines, execution, subject="x"), "was changed"),
        (changed(lines, execution, recorded_at="2024-01-01T00:00:00+00:00"), "was changed"),
        (changed(lines, execution, hash="00" * 32), "was changed"),
        (lines[:2] + lines[3:], "line 3 is event 3, where event 2 belongs"),
        (lines[:2] + lines[1:2] + lines[2:], "line 3 is event 1, where event 2 belongs"),
        (lines[:note] + lines[note + 1 :], "counts other lines"),
        ([*lines, lines[-1]], "doesn't belong there"),
        (lines[1:], "line 1 doesn't belong there"),
        (["{}\n", *lines[1:]], "line 1 isn't a line of an export"),
        ([*lines[:3], "nonsense\n", *lines[3:]], "line 4 isn't a line of an export"),
        (changed(lines, 0, format=2), "is of format 2"),
    ):
        with pytest.raises(BadInput, match=says):
            read_export(tampered)
    assert read_export(lines).damage is None


def test_events_that_are_chained_and_false_are_refused(
    owner_conn: Connection, empty: Connection
) -> None:
    """Who can write hashes can chain anything; the books must hold all the same."""
    run = a_life(owner_conn)
    export = export_run(owner_conn, run)
    with owner_conn.transaction(force_rollback=True):
        owner_conn.execute("ALTER TABLE event_ledger DISABLE TRIGGER USER")
        owner_conn.execute(
            """UPDATE event_ledger SET payload = payload || '{"cash": 5}'
               WHERE event_type = 'TICK'"""
        )
        owner_conn.execute(
            """WITH RECURSIVE chained AS (
                   SELECT l.seq, event_hash('', l.user_id, l.run_id, l.seq, l.logical_time,
                       l.event_type, l.subject, l.payload, l.recorded_at) AS hash
                   FROM event_ledger l WHERE l.seq = 1
                   UNION ALL
                   SELECT l.seq, event_hash(c.hash, l.user_id, l.run_id, l.seq, l.logical_time,
                       l.event_type, l.subject, l.payload, l.recorded_at)
                   FROM chained c JOIN event_ledger l ON l.seq = c.seq + 1
               )
               UPDATE event_ledger l SET hash = c.hash FROM chained c WHERE c.seq = l.seq"""
        )
        forged = export_run(owner_conn, run)
    false = Export(run.user_id, run.run_id, export.terms, forged.events, export.notes)
    read = read_export([line + "\n" for line in write_export(false)])
    with pytest.raises(BadInput, match="the events make no sound run: audit_mark finds"):
        rebuild_run(empty, read)
    assert all(not rows for rows in contents(empty, run).values())
    assert triggers_off(empty) == 0
