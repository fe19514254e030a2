"""A queue in which what is urgent overtakes; what is equally urgent keeps its order."""

from __future__ import annotations

import asyncio
from itertools import count
from typing import Generic, TypeVar

T = TypeVar("T")


class PriorityQueue(Generic[T]):
    """P0 before P1 before P2; inside a priority first come, first served.

    Only an item that asks to be ``first`` overtakes others of its own priority: a cancel does.
    """

    def __init__(self) -> None:
        self._queue: asyncio.PriorityQueue[tuple[int, bool, int, T]] = asyncio.PriorityQueue()
        self._numbers = count()  # so that two items are never compared themselves

    def __len__(self) -> int:
        return self._queue.qsize()

    def put(self, item: T, priority: int, *, first: bool = False) -> None:
        """Add an item."""
        self._queue.put_nowait((priority, not first, next(self._numbers), item))

    async def get(self) -> T:
        """Wait for the most urgent item and take it; ``done`` says that it was dealt with."""
        return (await self._queue.get())[-1]

    def done(self) -> None:
        """What was taken has been dealt with."""
        self._queue.task_done()

    async def dealt_with(self) -> None:
        """Wait until everything was taken and dealt with."""
        await self._queue.join()

    def drain(self) -> list[T]:
        """Take all that there is, the most urgent first, as dealt with."""
        items = [self._queue.get_nowait()[-1] for _ in range(len(self))]
        for _ in items:
            self.done()
        return items
