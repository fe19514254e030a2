"""P0 before P1 before P2, first come first served inside, also under load."""

from __future__ import annotations

import asyncio
import random

from hypothesis import given
from hypothesis import strategies as st

from engine.brokers.priority import PriorityQueue


async def _taken(queue: PriorityQueue[str], count: int) -> list[str]:
    return [await queue.get() for _ in range(count)]


def test_priorities_are_strict_and_fifo_inside() -> None:
    async def run() -> list[str]:
        queue: PriorityQueue[str] = PriorityQueue()
        for name, priority in [("a2", 2), ("b0", 0), ("c1", 1), ("d2", 2), ("e0", 0), ("f1", 1)]:
            queue.put(name, priority)
        return await _taken(queue, 6)

    assert asyncio.run(run()) == ["b0", "e0", "c1", "f1", "a2", "d2"]


def test_cancels_go_first_inside_their_priority_and_not_before_a_higher_one() -> None:
    async def run() -> list[str]:
        queue: PriorityQueue[str] = PriorityQueue()
        queue.put("order", 2)
        queue.put("cancel", 2, first=True)
        queue.put("urgent", 1)
        return await _taken(queue, 3)

    assert asyncio.run(run()) == ["urgent", "cancel", "order"]


def test_whoever_waits_gets_the_most_urgent_of_what_came_at_once() -> None:
    async def run() -> str:
        queue: PriorityQueue[str] = PriorityQueue()
        waiting = asyncio.create_task(queue.get())
        await asyncio.sleep(0)
        queue.put("late", 2)
        queue.put("urgent", 0)
        return await waiting

    assert asyncio.run(run()) == "urgent"


def test_items_that_can_not_be_compared_are_no_trouble() -> None:
    items: list[object] = [{}, object(), None]

    async def run() -> list[object]:
        queue: PriorityQueue[object] = PriorityQueue()
        for item in items:
            queue.put(item, 2)
        return [await queue.get() for _ in items]

    assert asyncio.run(run()) == items


@given(st.lists(st.tuples(st.integers(0, 2), st.booleans()), max_size=60))
def test_it_sorts_as_a_stable_sort_does(given_: list[tuple[int, bool]]) -> None:
    async def run() -> list[tuple[int, bool, int]]:
        queue: PriorityQueue[tuple[int, bool, int]] = PriorityQueue()
        for number, (priority, first) in enumerate(given_):
            queue.put((priority, first, number), priority, first=first)
        return queue.drain()

    items = [(priority, first, number) for number, (priority, first) in enumerate(given_)]
    assert asyncio.run(run()) == sorted(items, key=lambda item: (item[0], not item[1]))


def test_under_load_nothing_urgent_waits_behind_what_is_not() -> None:
    """Ten writers, one reader: whatever is taken, nothing more urgent was there."""

    async def run() -> int:
        queue: PriorityQueue[int] = PriorityQueue()
        there = [0, 0, 0]
        choose = random.Random(7)

        async def write() -> None:
            for _ in range(200):
                priority = choose.randrange(3)
                there[priority] += 1
                queue.put(priority, priority)
                await asyncio.sleep(0)

        async def read() -> int:
            count = 0
            while count < 2_000:
                priority = await queue.get()
                assert sum(there[:priority]) == 0
                there[priority] -= 1
                queue.done()
                count += 1
            return count

        reading = asyncio.create_task(read())
        await asyncio.gather(*(write() for _ in range(10)))
        await queue.dealt_with()
        return await reading

    assert asyncio.run(run()) == 2_000
