"""The event ledger: what was done already, and adding to it. The database numbers and chains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from decimal import Decimal
from typing import Any, NamedTuple
from uuid import UUID

from psycopg.types.json import Jsonb

from engine.db.connect import Connection


class Event(NamedTuple):
    """An event of a run; ``subject`` is what it is about."""

    event_type: str
    subject: str
    payload: Mapping[str, Any]


class Told(NamedTuple):
    """What a TICK event tells; the money is in the run's currency, to its last digit."""

    orders: int
    executions: int
    cash: Decimal
    market_value: Decimal
    equity: Decimal


# A number inside jsonb would come as a float.
TOLD = """(payload ->> 'orders')::integer, (payload ->> 'executions')::integer,
    (payload ->> 'cash')::numeric, (payload ->> 'market_value')::numeric,
    (payload ->> 'equity')::numeric"""


def append(
    conn: Connection, user_id: UUID, run_id: UUID, logical_time: datetime, events: Sequence[Event]
) -> None:
    """Append events in their order. Raises AlreadyHappened for one that is there already."""
    if not events:
        return
    conn.execute(
        """INSERT INTO event_ledger (user_id, run_id, logical_time, event_type, subject, payload)
           SELECT %s, %s, %s, e.event_type, e.subject, e.payload
           FROM unnest(%s::text[], %s::text[], %s::jsonb[]) WITH ORDINALITY
                AS e (event_type, subject, payload, place)
           ORDER BY e.place""",
        [
            user_id,
            run_id,
            logical_time,
            [e.event_type for e in events],
            [e.subject for e in events],
            [Jsonb(dict(e.payload)) for e in events],
        ],
    )


def ticked(
    conn: Connection, user_id: UUID, run_id: UUID, times: Sequence[datetime]
) -> dict[datetime, Told]:
    """What TICK events say that were committed at these logical times, by time."""
    rows = conn.execute(
        f"""SELECT logical_time, {TOLD} FROM event_ledger
            WHERE user_id = %s AND run_id = %s AND logical_time = ANY(%s)
              AND event_type = 'TICK' AND subject = ''""",
        [user_id, run_id, list(times)],
    ).fetchall()
    return {at: Told(*told) for at, *told in rows}
