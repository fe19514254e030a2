"""A queue in which what is urgent overtakes; what is equally urgent keeps its order."""

from __future__ import annotations

import asyncio
from itertools import count
from typing import Generic, TypeVar

T = TypeVar("T")


class PriorityQueue(Generic[T]):
    """P0 before P1 before P2; inside a priority cancels first, then first come, first served."""

    def __init__(self) -> None:
        self._queue: asyncio.PriorityQueue[tuple[int, bool, int, T]] = asyncio.PriorityQueue()
        self._numbers = count()  # so that two items are never compared themselves

    def __len__(self) -> int:
        return self._queue.qsize()

    def put(self, item: T, priority: int, *, first: bool = False) -> None:
        """Add an item; ``first`` puts it before others of its priority that aren't."""
        self._queue.put_nowait((priority, not first, next(self._numbers), item))

    async def get(self) -> T:
        """Wait for the most urgent item and take it."""
        return (await self._queue.get())[-1]

    def drain(self) -> list[T]:
        """Take all that there is, the most urgent first."""
        return [self._queue.get_nowait()[-1] for _ in range(self._queue.qsize())]
