"""Space: what a tick with one fill takes on disk, table by table and index by index."""

from __future__ import annotations

from dataclasses import dataclass

from bench.ground import Ground, new_run
from bench.harness import Row
from bench.market import feed, sessions_of
from bench.replays import DENSE
from bench.sizes import Sizes
from engine.db.connect import ENGINE_ROLE, open_connection
from engine.replay import replay

__all__ = ["Relation", "measure"]


@dataclass(frozen=True, slots=True)
class Relation:
    """A table (with what it has out of line) or an index; ``idx_scan`` is ``None`` for a table."""

    name: str
    kind: str
    bytes_per_tick: float
    idx_scan: int | None


def measure(on: Ground, sizes: Sizes) -> tuple[list[Row], list[Relation]]:
    """The row of the space, and what it is made of, the largest first."""
    dsn = on.database("space")
    ticks = sizes.space_ticks
    before = _sizes(dsn)
    with open_connection(dsn, role=ENGINE_ROLE) as conn:
        run = new_run(conn, every=DENSE.every)
        replay(conn, run.user_id, run.run_id, feed(sessions_of(conn), ticks))
    relations = [
        Relation(name, kind, (size - before[name][1]) / ticks, scans)
        for name, (kind, size, scans) in _sizes(dsn).items()
    ]
    relations = sorted(
        (relation for relation in relations if relation.bytes_per_tick > 0),
        key=lambda relation: -relation.bytes_per_tick,
    )
    total = sum(relation.bytes_per_tick for relation in relations)
    note = f"after a replay of {ticks:,} ticks, all tables and indexes"
    return [Row("space", total, "bytes/tick", None, better="less", note=note)], relations


def _sizes(dsn: str) -> dict[str, tuple[str, int, int | None]]:
    """Kind, bytes on disk and scans of every table and index of ours, by name.

    On a connection of its own: one that has ended has told all of its scans.
    """
    with open_connection(dsn) as owner:
        rows = owner.execute(
            """SELECT c.relname, CASE c.relkind WHEN 'r' THEN 'table' ELSE 'index' END,
                      CASE c.relkind WHEN 'r' THEN pg_table_size(c.oid)
                                     ELSE pg_relation_size(c.oid) END,
                      s.idx_scan
               FROM pg_class c
               LEFT JOIN pg_stat_user_indexes s ON s.indexrelid = c.oid
               WHERE c.relnamespace = 'public'::regnamespace AND c.relkind IN ('r', 'i')"""
        ).fetchall()
    return {name: (kind, size, scans) for name, kind, size, scans in rows}
