"""Which prices a run's tick needs, and the stored ones that it gets."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import NamedTuple
from uuid import UUID

from engine.db.connect import Connection
from engine.market.model import Bar
from engine.market.store import bars_at, bars_between
from engine.reference import Reference
from engine.runs import RUN_COLUMNS, Run, run_of
from engine.tick import strategy_of

_NEEDED = f"""
    SELECT {", ".join(f"r.{column}" for column in RUN_COLUMNS)},
           ARRAY(SELECT p.symbol FROM position p
                 WHERE p.user_id = r.user_id AND p.run_id = r.run_id AND p.quantity <> 0
                 UNION SELECT o.symbol FROM orders o
                 WHERE o.user_id = r.user_id AND o.run_id = r.run_id
                   AND o.status NOT IN ('FILLED', 'CANCELED', 'REJECTED', 'EXPIRED')
                 UNION SELECT s.symbol FROM sip_plan s
                 WHERE s.user_id = r.user_id AND s.run_id = r.run_id AND s.status = 'ACTIVE')
    FROM unnest(%s::uuid[], %s::uuid[]) AS k (user_id, run_id)
    JOIN strategy_run r ON r.user_id = k.user_id AND r.run_id = k.run_id"""


class Needed(NamedTuple):
    """A run, and the symbols that it holds, has ordered or plans to buy."""

    run: Run
    symbols: frozenset[str]


def needed_by(conn: Connection, keys: Sequence[tuple[UUID, UUID]]) -> dict[UUID, Needed]:
    """What ticks of runs need, by run; ``keys`` are users and their runs, unknown ones left out."""
    rows = conn.execute(_NEEDED, [[u for u, _ in keys], [r for _, r in keys]], prepare=True)
    found = (Needed(run_of(tuple(columns)), frozenset(symbols)) for *columns, symbols in rows)
    return {needed.run.run_id: needed for needed in found}


def symbols_of(conn: Connection, run: Run, needed: Needed | None = None) -> set[str]:
    """The symbols whose prices a tick of the run needs: what its strategy names, too.

    A strategy that names none, in a run that needs none, gets every known symbol. Raises
    StrategyFailed for a strategy that can't be made.
    """
    if needed is None:
        needed = needed_by(conn, [(run.user_id, run.run_id)])[run.run_id]
    symbols = needed.symbols | strategy_of(run).symbols()
    if symbols or run.strategy == "sip":
        return set(symbols)
    return {symbol for (symbol,) in conn.execute("SELECT symbol FROM instrument").fetchall()}


class StoredPrices:
    """The stored bars that are fresh at a moment: of the session that is open or was last open.

    What was looked up once is kept: many runs tick at the same moments.
    """

    def __init__(self, conn: Connection) -> None:
        self._conn = conn
        self._references: dict[str, Reference] = {}
        self._bars: dict[tuple[str, datetime], dict[str, Bar | None]] = {}

    def at(self, calendar: str, at: datetime, symbols: set[str]) -> list[Bar]:
        """The fresh bars of ``symbols``, by a calendar; none for a symbol that has none."""
        if calendar not in self._references:
            self._references[calendar] = Reference(self._conn, calendar)
        session = self._references[calendar].session_at(at)
        if session is None:
            return []
        known = self._bars.setdefault((calendar, at), {})
        missing = symbols - known.keys()
        if missing:
            found = bars_at(self._conn, missing, at)
            known.update((symbol, found.get(symbol)) for symbol in missing)
        bars = (known[symbol] for symbol in sorted(symbols))
        return [bar for bar in bars if bar is not None and bar.end >= session.open_at]


def prices_at(conn: Connection, run: Run, at: datetime) -> list[Bar]:
    """The stored bars that are fresh at ``at``, of the symbols that the run needs."""
    return StoredPrices(conn).at(run.calendar, at, symbols_of(conn, run))


def stored_feed(
    conn: Connection, run: Run, after: datetime, upto: datetime
) -> Iterator[tuple[datetime, list[Bar]]]:
    """The stored bars after one moment and up to another, by the time at which they end."""
    return bars_between(conn, symbols_of(conn, run), after, upto)
