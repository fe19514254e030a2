"""Which prices a run's tick needs, and the stored ones that it gets."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime

from engine.db.connect import Connection
from engine.market.model import Bar
from engine.market.store import bars_at, bars_between
from engine.reference import Reference
from engine.runs import Run
from engine.tick import strategy_of


def symbols_of(conn: Connection, run: Run) -> set[str]:
    """Symbols that the run holds, has ordered, plans to buy or whose strategy names them.

    A strategy that names none, in a run that holds none, gets every known symbol.
    """
    key = [run.user_id, run.run_id]
    rows = conn.execute(
        """SELECT symbol FROM position WHERE user_id = %s AND run_id = %s AND quantity <> 0
           UNION SELECT symbol FROM orders
           WHERE user_id = %s AND run_id = %s
             AND status NOT IN ('FILLED', 'CANCELED', 'REJECTED', 'EXPIRED')
           UNION SELECT symbol FROM sip_plan
           WHERE user_id = %s AND run_id = %s AND status = 'ACTIVE'""",
        key * 3,
    ).fetchall()
    symbols = {symbol for (symbol,) in rows} | strategy_of(run).symbols()
    if symbols or run.strategy == "sip":
        return symbols
    return {symbol for (symbol,) in conn.execute("SELECT symbol FROM instrument").fetchall()}


def prices_at(conn: Connection, run: Run, at: datetime) -> list[Bar]:
    """The stored bars that are fresh at ``at``: of the session that is open or was last open."""
    session = Reference(conn, run.calendar).session_at(at)
    if session is None:
        return []
    bars = bars_at(conn, symbols_of(conn, run), at)
    return [bar for bar in bars.values() if bar.end >= session.open_at]


def stored_feed(
    conn: Connection, run: Run, after: datetime, upto: datetime
) -> Iterator[tuple[datetime, list[Bar]]]:
    """The stored bars after one moment and up to another, by the time at which they end."""
    return bars_between(conn, symbols_of(conn, run), after, upto)
