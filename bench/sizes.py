"""How much of everything is measured: in full, or in a few minutes."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["FULL", "QUICK", "Sizes"]


@dataclass(frozen=True, slots=True)
class Sizes:
    """Seconds, rounds and rows of each measurement; each side of it gets the same."""

    live_rounds: int
    live_seconds: int
    profile_ticks: int
    replay_rounds: int
    dense_bars: int
    sparse_bars: int
    sip_runs: int
    broker_fills: int
    broker_open_orders: tuple[int, ...]
    broker_seconds: int
    growth_events: int
    growth_run_ticks: int
    growth_rounds: int
    growth_ticks: int
    space_ticks: int
    start_rounds: int
    memory_bars: int


FULL = Sizes(
    live_rounds=5,
    live_seconds=3,
    profile_ticks=1_000,
    replay_rounds=3,
    dense_bars=20_000,
    sparse_bars=100_000,
    sip_runs=10_000,
    broker_fills=20_000,
    broker_open_orders=(10_000, 100_000),
    broker_seconds=10,
    growth_events=10_000_000,
    growth_run_ticks=1_000_000,
    growth_rounds=7,
    growth_ticks=500,
    space_ticks=20_000,
    start_rounds=3,
    memory_bars=1_000_000,
)
QUICK = Sizes(
    live_rounds=3,
    live_seconds=2,
    profile_ticks=400,
    replay_rounds=2,
    dense_bars=6_000,
    sparse_bars=20_000,
    sip_runs=2_000,
    broker_fills=4_000,
    broker_open_orders=(2_000,),
    broker_seconds=3,
    growth_events=200_000,
    growth_run_ticks=50_000,
    growth_rounds=5,
    growth_ticks=200,
    space_ticks=4_000,
    start_rounds=2,
    memory_bars=100_000,
)
