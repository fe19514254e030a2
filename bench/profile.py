"""What a live tick is made of: the client, each function of the database, and the floor.

The floor are the very same rows, written by one call of a function that works out and checks
nothing, in copies of the database whose tables have lost their triggers: nothing that knows what it
writes could ever be faster than that.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import islice
from types import MappingProxyType
from typing import Any

from psycopg import sql

from bench.ground import Ground, new_run
from bench.harness import Row, interleave
from bench.live import LiveRun, Pgbench, going_on
from bench.sizes import Sizes
from engine.db.connect import ENGINE_ROLE, Connection, open_connection
from engine.runs import Run

__all__ = ["FLOORS", "TABLES", "Cost", "Floor", "measure", "record"]

# Enough events for the planner's statistics, and an even number: what was bought is sold.
WARM_UP_TICKS = 400
WRITER = "ticks_write"
_US = 1_000_000
_DATABASE = "profile"
_OF_RUN = "t.user_id = %(user)s AND t.run_id = %(run)s"
_OF_TICK = f"""{_OF_RUN} AND t.logical_time = (
    SELECT s.last_logical_time FROM engine_state s
    WHERE s.user_id = %(user)s AND s.run_id = %(run)s)"""

# What a tick writes into, and the key by which rows that are there already are changed.
TABLES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "orders": (),
        "execution": (),
        "mtm_ledger": (),
        "event_ledger": (),
        "position": ("user_id", "run_id", "symbol"),
        "strategy_run": ("user_id", "run_id"),
        "engine_state": ("user_id", "run_id"),
    }
)

_LESS_PROOFS = "ALTER TABLE {table} DISABLE TRIGGER USER"
_LESS_KEYS = "ALTER TABLE {table} DISABLE TRIGGER ALL"
_LESS_CHECKS = """DO $$ DECLARE c name; BEGIN
    FOR c IN SELECT conname FROM pg_constraint
             WHERE conrelid = '{table}'::regclass AND contype = 'c' LOOP
        EXECUTE format('ALTER TABLE {table} DROP CONSTRAINT %I', c);
    END LOOP; END $$"""

# What is done to each table at each floor, the lowest floor last.
FLOORS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "floor: no trigger": (_LESS_PROOFS,),
        "floor: nor foreign key": (_LESS_PROOFS, _LESS_KEYS),
        "floor: nor CHECK": (_LESS_PROOFS, _LESS_KEYS, _LESS_CHECKS),
    }
)


@dataclass(frozen=True, slots=True)
class Cost:
    """What a part of a tick takes, in microseconds of one tick, with and without what it calls.

    ``calls`` are those of one tick; ``None`` for what is no function of the database.
    """

    name: str
    calls: float | None
    total_us: float
    self_us: float


def measure(on: Ground, sizes: Sizes) -> tuple[list[Row], list[Cost]]:
    """The rows of a tick and of its floors against pgbench, and what a tick is made of."""
    dsn, ticks, rounds = on.database(_DATABASE), sizes.profile_ticks, sizes.live_rounds
    with open_connection(dsn, role=ENGINE_ROLE) as conn:
        run = new_run(conn)
        LiveRun(conn, run).seconds_per_tick(WARM_UP_TICKS)
    copies = [on.copy(_DATABASE, f"floor_{number}") for number in range(len(FLOORS))]
    written = record(on, run, ticks * rounds)
    costs = _costs(on, run, ticks)
    with ExitStack() as stack:
        live = going_on(stack.enter_context(open_connection(dsn, role=ENGINE_ROLE)), run)
        pgbench = Pgbench(on, "pgbench_beside")
        sides = {"profiled tick": lambda: 1 / live.seconds_per_tick(ticks)}
        for copy, (name, changes) in zip(copies, FLOORS.items(), strict=True):
            floor = Floor(stack.enter_context(open_connection(copy)), changes, written)
            sides[name] = partial(floor.ticks_per_second, ticks)
        sides["pgbench"] = lambda: pgbench.ticks_per_second(sizes.live_seconds)
        figures = interleave(rounds, sides)
    tps = figures.pop("pgbench")
    rows = [
        Row(name, figure, "ticks/s", None, peer=tps, peer_name="pgbench TPC-B", note=_note(name))
        for name, figure in figures.items()
    ]
    return rows, costs


def _note(name: str) -> str:
    return "the same rows written, nothing checked" if name in FLOORS else "as the engine writes it"


def record(on: Ground, run: Run, ticks: int) -> list[list[str]]:
    """Tick the run so often; returns the rows that each tick left, as one text a table.

    Of what a tick adds they are the new ones, of what it changes all of the run's.
    """
    wanted = sql.SQL(", ").join(
        sql.SQL("(SELECT array_agg(t ORDER BY t)::text FROM {} t WHERE {})").format(
            sql.Identifier(table), sql.SQL(_OF_RUN if key else _OF_TICK)
        )
        for table, key in TABLES.items()
    )
    names = {"user": run.user_id, "run": run.run_id}
    dsn = on.owner_dsn(_DATABASE)
    with open_connection(dsn, role=ENGINE_ROLE) as conn, open_connection(dsn) as owner:
        live = going_on(conn, run)
        return [
            _after_tick(live, owner, sql.SQL("SELECT {}").format(wanted), names)
            for _ in range(ticks)
        ]


def _after_tick(
    live: LiveRun, owner: Connection, query: sql.Composed, names: Mapping[str, Any]
) -> list[str]:
    live.tick()
    row = owner.execute(query, names, prepare=True).fetchone()
    assert row is not None
    return list(row)


class Floor:
    """A copy of the database in which nothing is checked, and the ticks to write into it."""

    def __init__(
        self, owner: Connection, changes: Sequence[str], ticks: Sequence[Sequence[str]]
    ) -> None:
        """``owner`` must be a superuser: foreign keys are triggers of the system's."""
        self._conn = owner
        self._ticks = iter(ticks)
        owner.execute(_writer(owner))
        for table in TABLES:
            for change in changes:
                owner.execute(change.format(table=table))

    def ticks_per_second(self, ticks: int) -> float:
        """How many ticks a second, measured over so many, a commit each."""
        parameters = ", ".join(f"%s::public.{table}[]" for table in TABLES)
        statement = f"SELECT floor_write({parameters})"
        began = time.perf_counter()
        for tick in islice(self._ticks, ticks):
            self._conn.execute(statement, tick, prepare=True)
        return ticks / (time.perf_counter() - began)


def _writer(owner: Connection) -> str:
    """The function that writes a tick's rows, made from the tables as they are."""
    statements = [_statement(table, key, _columns(owner, table)) for table, key in TABLES.items()]
    parameters = ", ".join(f"new_{table} public.{table}[]" for table in TABLES)
    body = "\n".join(statements)
    return (
        f"CREATE FUNCTION floor_write({parameters}) RETURNS void LANGUAGE plpgsql "
        f"SET plan_cache_mode = force_generic_plan AS $$ BEGIN\n{body}\nEND $$"
    )


def _statement(table: str, key: Sequence[str], columns: Sequence[str]) -> str:
    values = ", ".join(f"n.{column}" for column in columns)
    if not key:
        names = ", ".join(columns)
        return f"INSERT INTO {table} ({names}) SELECT {values} FROM unnest(new_{table}) n;"
    changes = ", ".join(f"{column} = n.{column}" for column in columns if column not in key)
    same = " AND ".join(f"t.{column} = n.{column}" for column in key)
    return f"UPDATE {table} t SET {changes} FROM unnest(new_{table}) n WHERE {same};"


def _columns(owner: Connection, table: str) -> list[str]:
    """The columns of a table that aren't computed by Postgres."""
    rows = owner.execute(
        """SELECT attname FROM pg_attribute
           WHERE attrelid = %s::regclass AND attnum > 0 AND NOT attisdropped
             AND attgenerated = '' ORDER BY attnum""",
        [table],
    ).fetchall()
    return [name for (name,) in rows]


def _costs(on: Ground, run: Run, ticks: int) -> list[Cost]:
    """What a tick is made of, over so many; being looked at makes it slower."""
    with open_connection(on.server.dsn(_DATABASE)) as admin:
        admin.execute(f"ALTER DATABASE {_DATABASE} SET track_functions = 'all'")
        with open_connection(on.owner_dsn(_DATABASE), role=ENGINE_ROLE) as conn:
            live = going_on(conn, run)
            live.tick()  # plans
            _flush(conn)
            before = _tracked(admin)
            began, worked = time.perf_counter(), time.process_time()
            for _ in range(ticks):
                live.tick()
            took, worked = time.perf_counter() - began, time.process_time() - worked
            _flush(conn)
            after = _tracked(admin)
        admin.execute(f"ALTER DATABASE {_DATABASE} RESET track_functions")
    functions = [
        Cost(name, *((now - then) / ticks for now, then in zip(found, was, strict=True)))
        for name, found in after.items()
        if found != (was := before.get(name, (0.0, 0.0, 0.0)))
    ]
    functions.sort(key=lambda cost: -cost.self_us)
    tick_us, client_us = took / ticks * _US, worked / ticks * _US
    inside_us = next(cost.total_us for cost in functions if cost.name == WRITER)
    between_us = tick_us - client_us - inside_us
    return [
        Cost("a tick, looked at", None, tick_us, tick_us),
        Cost("client: Python, psycopg", None, client_us, client_us),
        Cost("round trip, parameters, commit", None, between_us, between_us),
        *functions,
    ]


def _flush(conn: Connection) -> None:
    """Let a connection tell now what it has counted."""
    conn.execute("SELECT pg_stat_force_next_flush()")


def _tracked(admin: Connection) -> dict[str, tuple[float, float, float]]:
    """Calls, and microseconds with and without what was called, of our functions by name."""
    rows = admin.execute(
        """SELECT funcname, sum(calls)::float, sum(total_time) * 1000, sum(self_time) * 1000
           FROM pg_stat_user_functions WHERE schemaname = 'public' GROUP BY funcname"""
    ).fetchall()
    return {name: (calls, total, own) for name, calls, total, own in rows}
