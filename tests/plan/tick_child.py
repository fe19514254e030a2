"""A process that ticks runs through the sessions of a time, as fast as it can.

It waits for LOCK before it begins, so that several begin together, goes on to the next run when
one is stopped, and prints how many ticks it wrote and how many it found written.
"""

from __future__ import annotations

import json
import sys
from datetime import date
from uuid import UUID

from market_days import at_price
from scripted import LOCK

from engine.db.connect import ENGINE_ROLE, open_connection
from engine.errors import RunNotRunning
from engine.tick import run_tick


def main(dsn: str, first: str, last: str, *runs: str) -> None:
    done = {"written": 0, "repeated": 0, "stopped": 0}
    with open_connection(dsn, role=ENGINE_ROLE) as conn:
        sessions = conn.execute(
            """SELECT close_at FROM calendar_session
               WHERE calendar = 'XNYS' AND session_date BETWEEN %s AND %s ORDER BY 1""",
            [date.fromisoformat(first), date.fromisoformat(last)],
        ).fetchall()
        conn.execute("SELECT pg_advisory_lock_shared(%s)", [LOCK])
        for run in runs:
            user_id, run_id = map(UUID, run.split("/"))
            try:
                for number, (at,) in enumerate(sessions):
                    prices = at_price(str(50 + number % 7)) | at_price(str(90 - number % 5), "IBM")
                    result = run_tick(conn, user_id, run_id, at, prices)
                    done["repeated" if result.repeated else "written"] += 1
            except RunNotRunning:
                done["stopped"] += 1
    print(json.dumps(done))


if __name__ == "__main__":
    main(*sys.argv[1:])
