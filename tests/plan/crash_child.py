"""A process that ticks a run once; its parent kills it in the middle."""

from __future__ import annotations

import sys
from uuid import UUID

from market_days import at_price, close_on

from engine.db.connect import ENGINE_ROLE, open_connection
from engine.tick import run_tick


def main(dsn: str, user_id: str, run_id: str, day: str) -> None:
    with open_connection(dsn, role=ENGINE_ROLE) as conn:
        prices = at_price("100") | at_price("50", "IBM")
        # In a transaction, so that the steps of the tick are written while it is under way.
        with conn.transaction():
            run_tick(conn, UUID(user_id), UUID(run_id), close_on(day), prices)


if __name__ == "__main__":
    main(*sys.argv[1:])
