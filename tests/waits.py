"""Waiting for what Postgres says has happened; never for a time."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from engine.db.connect import Connection

# How long anything may take until a test gives up on it: it costs only who fails.
SECONDS_MAX = 90.0
POLL_SECONDS = 0.01

Got = TypeVar("Got")


def wait_until(look: Callable[[], Got], what: str) -> Got:
    """Look until there is something, and return it; the pause only spares the processor."""
    ends_at = time.monotonic() + SECONDS_MAX
    while not (found := look()):
        assert time.monotonic() < ends_at, f"waited {SECONDS_MAX:g} s for {what}: {found!r}"
        time.sleep(POLL_SECONDS)
    return found


def wait_until_blocked(watch: Connection, waiting: Connection, *, by: Connection) -> None:
    """Wait until one connection waits for a lock of another."""
    ids = [by.info.backend_pid, waiting.info.backend_pid]
    wait_until(
        lambda: watch.execute("SELECT %s = ANY(pg_blocking_pids(%s))", ids).fetchone() == (True,),
        "one connection to wait for the other",
    )


def wait_until_someone_is_blocked(watch: Connection, *, by: Connection) -> None:
    """Wait until any connection waits for a lock of ``by``."""
    wait_until(
        lambda: (
            watch.execute(
                "SELECT count(*) FROM pg_stat_activity WHERE %s = ANY(pg_blocking_pids(pid))",
                [by.info.backend_pid],
            ).fetchone()
            != (0,)
        ),
        "a connection to wait",
    )
