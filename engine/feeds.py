"""Which prices a run's tick needs, and the stored ones that it gets."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime

from engine.books import open_books
from engine.db.connect import Connection
from engine.market.model import Bar
from engine.market.store import bars_at, bars_between
from engine.reference import Reference
from engine.runs import Run
from engine.tick import strategy_of


def symbols_of(conn: Connection, run: Run, known: frozenset[str] | None = None) -> set[str]:
    """The symbols whose prices a tick of the run needs: what its strategy names, too.

    A strategy that names none, in a run that needs none, gets every known symbol. Raises
    StrategyFailed for a strategy that can't be made. ``known``: what it holds, has ordered and
    plans to buy, if that was just read.
    """
    if known is None:
        known = open_books(conn, run.user_id, run.run_id).symbols
    symbols = known | strategy_of(run).symbols()
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
