"""A run out of the database into an export, and out of an export into a database.

The ledger is what the rest follows from: orders, executions, commissions, splits, marks, positions
and cash are made of its events by the database (sql/97_rebuild.sql). Loading is the owner's: the
triggers of a run's tables stamp the time and number the events, which have both already, so that
they are switched off for one transaction, which the audit must find nothing wrong with before it
commits. Nobody sees the tables without their triggers: switching them locks the tables.
"""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal
from uuid import UUID

from psycopg import sql

from engine.audit import audit
from engine.db.connect import Connection, snapshot
from engine.errors import BadInput, translated
from engine.export import Export, LedgerEvent, Note
from engine.runs import Run, find_run

__all__ = ["Books", "export_run", "fold", "rebuild_run"]

# What run_rebuild makes of the ledger. Every other table that hangs on a run is in the notes.
_FROM_LEDGER = (
    "event_ledger",
    "execution",
    "execution_commission",
    "mtm_ledger",
    "orders",
    "position",
    "split_applied",
    "engine_state",
)
# A connector's work, which belongs to its account and goes on there.
_NOT_THE_RUNS = ("broker_command",)
# What the database makes of the rows again when it is asked for.
_MADE_AGAIN = ("open_order_sum",)

# What nobody tells the ledger, since it is no history: by table, the columns beside the key.
_BESIDE = {
    "orders": (
        "order_id",
        ("stop_price", "triggered_at", "expire_at", "version", "pending_reconcile",
         "broker_order_id", "perm_id"),
    ),
    "position": ("symbol", ("mark_price", "marked_at")),
    "engine_state": (None, ("last_logical_time", "state", "recorded_at")),
}  # fmt: skip


def export_run(conn: Connection, run: Run) -> Export:
    """Everything about a run, as of one moment."""
    key = [run.user_id, run.run_id]
    with snapshot(conn):
        row = conn.execute(
            """SELECT (to_jsonb(r) - '{cash,books_seq}'::text[])::text FROM strategy_run r
               WHERE user_id = %s AND run_id = %s""",
            key,
        ).fetchone()
        assert row is not None
        events = conn.execute(
            """SELECT seq, logical_time, event_type, subject, payload::text, recorded_at,
                      encode(hash, 'hex')
               FROM event_ledger WHERE user_id = %s AND run_id = %s ORDER BY seq""",
            key,
        ).fetchall()
        notes = [*_accounts(conn, run), *_beside(conn, run), *_whole_rows(conn, run)]
    return Export(run.user_id, run.run_id, row[0], [LedgerEvent(*event) for event in events], notes)


def _accounts(conn: Connection, run: Run) -> list[Note]:
    """The accounts that the run's rows name."""
    rows = conn.execute(
        """SELECT to_jsonb(a)::text FROM broker_account a
           WHERE a.user_id = %(user)s
             AND (a.account IN (SELECT r.account FROM run_route r
                                WHERE r.user_id = %(user)s AND r.run_id = %(run)s)
                  OR a.account IN (SELECT o.account FROM orders o
                                   WHERE o.user_id = %(user)s AND o.run_id = %(run)s))
           ORDER BY a.account""",
        {"user": run.user_id, "run": run.run_id},
    )
    return [Note("broker_account", text) for (text,) in rows]


def _beside(conn: Connection, run: Run) -> list[Note]:
    notes = []
    for table, (key, columns) in _BESIDE.items():
        names = [key, *columns] if key else ["user_id", "run_id", *columns]
        rows = conn.execute(
            sql.SQL(
                """SELECT jsonb_build_object({pairs})::text FROM {table} t
                   WHERE user_id = %s AND run_id = %s ORDER BY {order}"""
            ).format(
                pairs=sql.SQL(", ").join(
                    sql.SQL("{}, {}").format(sql.Literal(name), sql.Identifier(name))
                    for name in names
                ),
                table=sql.Identifier(table),
                order=sql.Identifier(names[0]),
            ),
            [run.user_id, run.run_id],
        )
        notes += [Note(table, text) for (text,) in rows]
    # Marks outside of ticks.
    rows = conn.execute(
        """SELECT (to_jsonb(m) - 'equity')::text FROM mtm_ledger m
           WHERE m.user_id = %s AND m.run_id = %s AND NOT EXISTS (
               SELECT FROM event_ledger l
               WHERE l.user_id = m.user_id AND l.run_id = m.run_id AND l.event_type = 'TICK'
                 AND l.logical_time = m.logical_time AND l.payload ?& '{cash,market_value}')
           ORDER BY m.logical_time""",
        [run.user_id, run.run_id],
    )
    return notes + [Note("mtm_ledger", text) for (text,) in rows]


def _whole_rows(conn: Connection, run: Run) -> list[Note]:
    notes = []
    for table in _tables(conn):
        rows = conn.execute(
            sql.SQL(
                """SELECT to_jsonb(t)::text FROM {} t WHERE user_id = %s AND run_id = %s
                   ORDER BY 1"""
            ).format(sql.Identifier(table)),
            [run.user_id, run.run_id],
        )
        notes += [Note(table, text) for (text,) in rows]
    return notes


def _tables(conn: Connection, *, all_of_them: bool = False) -> list[str]:
    """The tables that hang on a run; without ``all_of_them`` those that the ledger doesn't fill."""
    rows = conn.execute(
        """SELECT DISTINCT t.relname::text
           FROM pg_constraint f JOIN pg_class t ON t.oid = f.conrelid
           WHERE f.contype = 'f' AND t.relnamespace = 'public'::regnamespace
             AND f.confrelid IN ('strategy_run'::regclass, 'orders'::regclass,
                                 'execution'::regclass)
           ORDER BY 1"""
    )
    left_out = () if all_of_them else (*_FROM_LEDGER, *_NOT_THE_RUNS, *_MADE_AGAIN)
    return [name for (name,) in rows if name not in left_out]


def rebuild_run(conn: Connection, export: Export) -> Run:
    """Write an exported run into a database that doesn't have it; the owner's right.

    Raises BadInput where it is there already, and where the audit finds something wrong with what
    the events make, in which case nothing is written.
    """
    with translated(), conn.transaction():
        found = conn.execute(
            "SELECT FROM strategy_run WHERE run_id = %s", [export.run_id]
        ).fetchone()
        if found is not None:
            raise BadInput(
                f"run {export.run_id} is in this database already; rebuild it in an empty one"
            )
        guarded = ["strategy_run", *_tables(conn, all_of_them=True)]
        _switch_triggers(conn, guarded, "DISABLE")
        _load(conn, export)
        _switch_triggers(conn, guarded, "ENABLE")
        run = find_run(conn, export.run_id)
        findings = audit(conn, run)
        if findings:
            first = findings[0]
            raise BadInput(
                f"the events make no sound run: {first.rule} finds that {first.subject} "
                f"{first.finding}; nothing was written"
            )
    return run


def _switch_triggers(conn: Connection, tables: list[str], how: str) -> None:
    for table in tables:
        conn.execute(
            sql.SQL("ALTER TABLE {} {} TRIGGER USER").format(sql.Identifier(table), sql.SQL(how))
        )


def _load(conn: Connection, export: Export) -> None:
    key = [export.user_id, export.run_id]
    conn.execute(
        "INSERT INTO app_user (user_id) VALUES (%s) ON CONFLICT DO NOTHING", [export.user_id]
    )
    for note in export.notes:
        if note.table == "broker_account":
            _insert(conn, note)
    conn.execute(
        """INSERT INTO strategy_run
           SELECT (jsonb_populate_record(NULL::strategy_run, d.terms || jsonb_build_object(
                       'user_id', %s::uuid, 'run_id', %s::uuid, 'books_seq', 0,
                       'cash', d.terms -> 'initial_cash'))).*
           FROM (SELECT %s::jsonb AS terms) d""",
        [*key, export.terms],
    )
    with conn.cursor().copy(
        """COPY event_ledger (user_id, run_id, seq, logical_time, event_type, subject, payload,
                              recorded_at, hash) FROM STDIN"""
    ) as copy:
        for event in export.events:
            copy.write_row(
                [*key, event.seq, event.logical_time, event.event_type, event.subject,
                 event.payload, event.recorded_at, bytes.fromhex(event.hash)]
            )  # fmt: skip
    conn.execute("SELECT run_rebuild(%s, %s)", key)
    for note in export.notes:
        if note.table in _BESIDE:
            _complete(conn, note, export.user_id, export.run_id)
        elif note.table != "broker_account":
            _insert(conn, note)


def _insert(conn: Connection, note: Note) -> None:
    """Insert a whole row, without what the database computes."""
    columns = conn.execute(
        """SELECT attname::text FROM pg_attribute
           WHERE attrelid = to_regclass(%s) AND attnum > 0 AND NOT attisdropped
             AND attgenerated = ''""",
        [note.table],
    ).fetchall()
    if not columns:
        raise BadInput(f"this database has no table {note.table}; migrate it first")
    names = sql.SQL(", ").join(sql.Identifier(name) for (name,) in columns)
    conn.execute(
        sql.SQL(
            """INSERT INTO {table} ({names})
               SELECT {names} FROM jsonb_populate_record(NULL::{table}, %s::jsonb)
               ON CONFLICT DO NOTHING"""
        ).format(table=sql.Identifier(note.table), names=names),
        [note.row],
    )


def _complete(conn: Connection, note: Note, user_id: UUID, run_id: UUID) -> None:
    """Note in a row that the ledger made what the ledger doesn't tell."""
    key, columns = _BESIDE[note.table]
    condition = sql.SQL("t.{0} = n.{0}").format(sql.Identifier(key or "user_id"))
    done = conn.execute(
        sql.SQL(
            """UPDATE {table} t SET {pairs}
               FROM jsonb_populate_record(NULL::{table}, %s::jsonb) n
               WHERE t.user_id = %s AND t.run_id = %s AND {condition}"""
        ).format(
            table=sql.Identifier(note.table),
            pairs=sql.SQL(", ").join(
                sql.SQL("{0} = n.{0}").format(sql.Identifier(column)) for column in columns
            ),
            condition=condition,
        ),
        [note.row, user_id, run_id],
    )
    if key is None and not done.rowcount:
        _insert(conn, note)


@dataclass(frozen=True, slots=True)
class Books:
    """What a run's ledger makes of it up to event ``seq``: a snapshot of the books.

    ``orders`` and ``positions`` are rows as text, which the database reads back.
    """

    seq: int
    cash: Decimal
    orders: tuple[str, ...]
    positions: tuple[str, ...]


def fold(conn: Connection, run: Run, upto_seq: int, snapshot_of: Books | None = None) -> Books:
    """Fold a run's events up to ``upto_seq``, from nothing or from a snapshot of the books.

    Both ways come to the same, which is what makes a snapshot worth keeping.
    """
    known = snapshot_of or Books(0, run.initial_cash, (), ())
    row = conn.execute(
        """SELECT %(cash)s::numeric + coalesce((
                      SELECT sum(event_cash_flow(l.event_type, l.payload)) FROM event_ledger l
                      WHERE l.user_id = %(user)s AND l.run_id = %(run)s
                        AND l.seq > %(after)s AND l.seq <= %(upto)s), 0),
                  ARRAY(SELECT o::text FROM orders_from_ledger(
                      %(user)s, %(run)s, %(orders)s::text[]::orders[], %(after)s, %(upto)s) o),
                  ARRAY(SELECT p::text FROM positions_from_ledger(
                      %(user)s, %(run)s, %(positions)s::text[]::public.position[], %(after)s,
                      %(upto)s) p)""",
        {
            "user": run.user_id,
            "run": run.run_id,
            "cash": known.cash,
            "orders": list(known.orders),
            "positions": list(known.positions),
            "after": known.seq,
            "upto": upto_seq,
        },
    ).fetchone()
    assert row is not None
    return Books(upto_seq, row[0], tuple(row[1]), tuple(row[2]))
