"""Replays bars through a new run: ``DSN TICKS EVERY``; tells the run and its peak memory.

The peaks are of this process, in bytes: after a tenth of the ticks, and at the end.
"""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path

from bench.ground import new_run
from bench.market import feed, sessions_of
from engine.db.connect import ENGINE_ROLE, open_connection
from engine.replay import replay

_STATUS = Path("/proc/self/status")


def peak_bytes() -> int:
    """The most memory that this program has had resident, in bytes."""
    if _STATUS.exists():
        # Not getrusage: what it tells begins with the peak of the process that started this one.
        peak = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(peak.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main(dsn: str, ticks: int, every: int) -> None:
    done = 0
    tenth: int | None = None

    def told(batch: int) -> None:
        nonlocal done, tenth
        done += batch
        if tenth is None and done * 10 >= ticks:
            tenth = peak_bytes()

    with open_connection(dsn, role=ENGINE_ROLE) as conn:
        run = new_run(conn, every=every)
        bars = feed(sessions_of(conn), ticks)
        replayed = replay(conn, run.user_id, run.run_id, bars, progress=told)
    print(
        json.dumps(
            {
                "run_id": str(run.run_id),
                "ticks": replayed.written,
                "peak_after_a_tenth": tenth,
                "peak": peak_bytes(),
            }
        )
    )


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
