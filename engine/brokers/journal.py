"""A connector's side of outbox and inbox: what it holds of the one, and what it owes the other.

What is to be written waits here in order, goes in batches, and is kept until it is committed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from engine.brokers.payloads import as_payload
from engine.brokers.store import Batch, Command, Done, Heard, Store
from engine.clock import Clock
from engine.errors import (
    AlreadyHappened,
    BadInput,
    DatabaseUnavailable,
    InvalidValue,
    Retryable,
)
from engine.log import tell

# What waits to be written at most; beyond it the broker is read no faster than we write.
WAITING_MAX = 50_000
BATCH_ROWS_MAX = 1_000
RETRY_SECONDS = 0.25
# What the database may be short of for a while; what was to be done is tried again.
AWAY = (DatabaseUnavailable, Retryable)


@dataclass(frozen=True, slots=True)
class _Mark:
    """Everything before it is committed when it is reached."""

    reached: asyncio.Event


class Journal:
    """The rows of one connector: commands that it took, and all that it has to say."""

    def __init__(self, store: Store, clock: Clock) -> None:
        self._store = store
        self._clock = clock
        self._queue: asyncio.Queue[Heard | Done | _Mark] = asyncio.Queue(WAITING_MAX)
        # Commands that are claimed, and of whose end the database doesn't know yet.
        self._in_hand: set[UUID] = set()
        self._claim_unsure = False
        self.heard_at: datetime | None = None
        self.skew: timedelta | None = None

    # --- The outbox -------------------------------------------------------------------------

    async def claim(self, at_most: int, orders_at_most: int) -> list[Command]:
        """Take the next commands; also what was taken in a transaction that was never answered."""
        taken = await self.unanswered()
        self._claim_unsure = True
        taken += await self._store.claim(at_most, orders_at_most)
        self._claim_unsure = False
        self._in_hand.update(command.command_id for command in taken)
        return taken

    async def unanswered(self) -> list[Command]:
        """What may have been claimed though nobody heard so; none of it was written."""
        if not self._claim_unsure:
            return []
        claimed = await self._store.claimed()
        return [command for command in claimed if command.command_id not in self._in_hand]

    async def failed(self, command: Command, outcome: str, why: str) -> None:
        """Say of a command that it was certainly not sent."""
        command_id = str(command.command_id)
        tell("SEND_FAILED", command_id=command_id, order_id=command.order_ref, error=why)
        said = {"command_id": command_id, "error": why}
        await self.say("SEND_FAILED", said, order_ref=command.order_ref)
        await self.put(Done(command.command_id, outcome))

    # --- The inbox --------------------------------------------------------------------------

    def heard(self, broker_time: datetime | None = None) -> None:
        """The broker was heard now; ``broker_time`` is what its own clock shows."""
        self.heard_at = self._clock()
        if broker_time is not None:
            self.skew = self.heard_at - broker_time

    async def say(
        self,
        kind: str,
        payload: Mapping[str, Any],
        *,
        priority: int = 2,
        order_ref: str | None = None,
    ) -> None:
        """Write a row of our own, at the broker's time as far as we know it."""
        now = self._clock()
        at = now - (self.skew or timedelta())
        await self.put(Heard(kind, at, now, as_payload(payload), priority, order_ref))

    async def put(self, *items: Heard | Done) -> None:
        """Have items written, in this order; waits where too many do already."""
        for item in items:
            await self._queue.put(item)

    async def unheard(self, rows: Sequence[Heard]) -> list[Heard]:
        """Those of executions, busts and commissions that the inbox does not have."""
        await self.settled()
        return [rows[place] for place in await self._store.unheard(rows)]

    async def settled(self) -> None:
        """Wait until all that was put before is committed."""
        mark = _Mark(asyncio.Event())
        await self._queue.put(mark)
        await mark.reached.wait()

    # --- Writing ----------------------------------------------------------------------------

    async def write(self) -> None:
        """Write whatever comes, for ever."""
        while True:
            items = [await self._queue.get()]
            while len(items) < BATCH_ROWS_MAX and not self._queue.empty():
                items.append(self._queue.get_nowait())
            done = [item for item in items if isinstance(item, Done)]
            await self._commit(Batch([item for item in items if isinstance(item, Heard)], done))
            self._in_hand.difference_update(each.command_id for each in done)
            for item in items:
                if isinstance(item, _Mark):
                    item.reached.set()

    async def _commit(self, batch: Batch) -> None:
        while batch.heard or batch.done:
            try:
                await self._store.write(batch)
                return
            except (*AWAY, AlreadyHappened) as error:
                tell("DATABASE_AWAY", error=str(error), waiting=self._queue.qsize())
                await asyncio.sleep(RETRY_SECONDS)
            except (BadInput, InvalidValue) as error:
                if not batch.heard:
                    raise
                await self._commit_each(batch, error)
                return

    async def _commit_each(self, batch: Batch, error: Exception) -> None:
        """A row can't be stored: it must not take the others with it."""
        if len(batch.heard) == 1:
            await self._commit(Batch([_readable(batch.heard[0], error)], batch.done))
            return
        for heard in batch.heard:
            await self._commit(Batch([heard]))
        await self._commit(Batch([], batch.done))


def _readable(was: Heard, error: Exception) -> Heard:
    """In place of a row that the database can't hold, what it was, as plain text."""
    told = {"code": "UNREADABLE", "message": ascii(str(error))[:500], "was": ascii(was)[:2_000]}
    return Heard("NOTICE", was.received_at, was.received_at, told)
