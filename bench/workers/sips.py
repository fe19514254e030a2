"""Drives the schedule until nothing is due: ``DSN NOW PART OF``. Ready, it waits for a line."""

from __future__ import annotations

import json
import sys
import time
from datetime import datetime

from engine.db.connect import ENGINE_ROLE, open_connection
from engine.errors import ConfigurationError
from engine.schedule import Share, drive


def main(dsn: str, now: datetime, share: Share) -> None:
    with open_connection(dsn, role=ENGINE_ROLE) as conn:
        conn.execute("SELECT 1")
        print("ready", flush=True)
        sys.stdin.readline()
        ticks = 0
        while True:
            done = drive(conn, lambda: now, share)
            if done.stuck:
                raise ConfigurationError(f"a run is stuck: {next(iter(done.stuck.values()))}")
            if not done.ticks and not done.repeated:
                break
            ticks += done.ticks
        print(json.dumps({"ticks": ticks, "ended": time.monotonic()}))


if __name__ == "__main__":
    main(
        sys.argv[1],
        datetime.fromisoformat(sys.argv[2]),
        Share(int(sys.argv[3]), int(sys.argv[4])),
    )
