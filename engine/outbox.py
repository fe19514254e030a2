"""The outbox: triggers fill it with the orders; whoever committed some wakes the connectors."""

from __future__ import annotations

from engine.db.connect import Connection

# Notified beside the work, never from a trigger: a hint, the table is the truth.
COMMANDS, EVENTS = "oms_command", "oms_event"


def wake(conn: Connection) -> None:
    """Tell connectors that there may be commands for them; at commit, if one is under way."""
    conn.execute(f"NOTIFY {COMMANDS}")
