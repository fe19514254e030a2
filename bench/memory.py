"""Memory: the peak of a process that replays a long feed, and that it stays where it was."""

from __future__ import annotations

from bench.ground import Ground
from bench.harness import Row, child, result_of
from bench.replays import SPARSE
from bench.sizes import Sizes

__all__ = ["measure"]

PEAK_MB_MUST = 300.0
GROWTH_MUST = 1.2
_MB = 1_000_000


def measure(on: Ground, sizes: Sizes) -> list[Row]:
    """The rows of the peak, and of the peak against that after a tenth of the ticks."""
    dsn = on.database("memory")
    told = result_of(child("workers.fill", dsn, str(sizes.memory_bars), str(SPARSE.every)))
    peak, tenth = told["peak"] / _MB, told["peak_after_a_tenth"] / _MB
    note = f"a replay of {sizes.memory_bars:,} bars, generated one by one"
    return [
        Row("memory peak", peak, "MB", PEAK_MB_MUST, better="less", note=note),
        Row(
            "memory growth",
            peak,
            "MB",
            GROWTH_MUST,
            peer=tenth,
            peer_name="after a tenth",
            better="less",
            note=note,
        ),
    ]
