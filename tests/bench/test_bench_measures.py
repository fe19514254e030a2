"""The measurements themselves, at a size that says nothing but that they work."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import timedelta
from itertools import pairwise
from pathlib import Path

import pytest

from bench import growth, live, memory, profile, replays, sips, space
from bench.ground import Ground, ground
from bench.growth import histories
from bench.market import FIRST_DAY, feed, is_ordering_bar, write_csv
from bench.sizes import FULL, QUICK, Sizes
from engine.db.connect import open_connection
from engine.market.calendar import sessions

TINY = replace(
    QUICK,
    live_rounds=1,
    live_seconds=1,
    profile_ticks=10,
    replay_rounds=1,
    dense_bars=300,
    sparse_bars=300,
    sip_runs=20,
    growth_events=600,
    growth_run_ticks=200,
    growth_rounds=1,
    growth_ticks=8,
    space_ticks=100,
    memory_bars=200,
)
TWO_DAYS = sessions("XNYS", FIRST_DAY, FIRST_DAY + timedelta(days=4))


@dataclass(frozen=True)
class FakedPeer:
    """A peer that says it has taken so many seconds."""

    name: str
    answer: float

    def seconds(self, bars: Path, every: int) -> float:
        assert len(bars.read_text(encoding="utf-8").splitlines()) == TINY.dense_bars + 1
        assert every in (replays.DENSE.every, replays.SPARSE.every)
        return self.answer


@pytest.mark.slow
def test_each_measurement_works_and_leaves_books_that_hold() -> None:
    peers = [FakedPeer("nautilus_trader", 0.5), FakedPeer("backtrader", 0.25)]
    with ground() as on:
        folder = on.server.folder
        settings = on.settings()
        (tick,) = live.measure(on, TINY)
        against_one, against_other = replays.measure(replays.DENSE, on, TINY, peers)
        (limited,) = replays.measure_limited(on, TINY)
        floors, costs = profile.measure(on, TINY)
        assert_floors_are_the_same_rows(on)
        (day,) = sips.measure(on, TINY)
        (grown,) = growth.measure(on, TINY)
        (taken,), relations = space.measure(on, TINY)
        peak, flat = memory.measure(on, TINY)
        findings = on.audited()

    assert not folder.exists()
    assert set(settings.values()) == {"on"}
    assert tick.ours > 0
    assert tick.peer is not None
    assert tick.peer > 0
    assert [floor.name for floor in floors] == ["profiled tick", *profile.FLOORS]
    assert all(floor.ours > 0 for floor in floors)
    called = {cost.name: cost for cost in costs}
    assert called["ticks_write"].calls == called["ticks_append"].calls == 1
    assert "books_follow" not in called
    assert all(0 <= cost.self_us <= cost.total_us for cost in costs)
    assert (against_one.peer, against_other.peer) == (600.0, 1_200.0)
    assert against_one.ours == against_other.ours > 0
    assert limited.peer_name == "without"
    assert day.ours > 0
    assert grown.peer_name == "empty database"
    assert taken.ours == pytest.approx(sum(relation.bytes_per_tick for relation in relations))
    assert {"event_ledger", "orders_pkey"} <= {relation.name for relation in relations}
    assert 10 < peak.ours < 1_000
    assert flat.ratio is not None
    assert flat.ratio >= 1
    assert len(findings) == 9
    assert not any(findings.values())


def assert_floors_are_the_same_rows(on: Ground) -> None:
    """What a floor has written is what the engine had written, row by row."""
    ticks = profile.WARM_UP_TICKS + TINY.profile_ticks * TINY.live_rounds
    with open_connection(on.owner_dsn("profile")) as engine:
        for number in range(len(profile.FLOORS)):
            with open_connection(on.server.dsn(f"floor_{number}")) as floor:
                for table, count in {"event_ledger": 3 * ticks + 1, "orders": ticks}.items():
                    query = f"SELECT t::text FROM {table} t"
                    written = {row for (row,) in floor.execute(query)}
                    assert len(written) == count
                    assert written <= {row for (row,) in engine.execute(query)}
                # What is changed in place stands where the newest mark says.
                cash, marked = floor.execute(
                    """SELECT (SELECT cash FROM strategy_run),
                              (SELECT cash FROM mtm_ledger ORDER BY logical_time DESC LIMIT 1)"""
                ).fetchone() or (None, None)
                assert cash == marked


def test_the_bars_are_always_the_same_and_follow_the_sessions() -> None:
    bars = [bar for _, (bar,) in feed(TWO_DAYS)]
    assert bars == [bar for _, (bar,) in feed(TWO_DAYS)]
    assert len(bars) == 2 * 390
    assert bars[0].start == TWO_DAYS[0].open_at
    assert bars[389].end == TWO_DAYS[0].close_at
    assert all(a.end <= b.start and a.close == b.open for a, b in pairwise(bars))
    assert all(bar.low <= min(bar.open, bar.close) for bar in bars)


def test_each_session_has_one_bar_of_the_sparse_strategy() -> None:
    ordering = [at for at, _ in feed(TWO_DAYS) if is_ordering_bar(at, replays.SPARSE.every)]
    assert [at.date() for at in ordering] == [session.day for session in TWO_DAYS]


def test_the_peers_get_the_same_bars(tmp_path: Path) -> None:
    path = tmp_path / "bars.csv"
    write_csv(path, TWO_DAYS, 2)
    (at, (bar,)), *_ = feed(TWO_DAYS)
    head, first, *rest = path.read_text(encoding="utf-8").splitlines()
    assert head == "end,open,high,low,close,volume"
    assert first == f"{int(at.timestamp())},{bar.open},{bar.high},{bar.low},{bar.close},10000"
    assert len(rest) == 1


@pytest.mark.parametrize("sizes", [FULL, QUICK, TINY])
def test_the_histories_are_as_long_as_growth_asks(sizes: Sizes) -> None:
    (longest, sparse), *others = histories(sizes)
    assert (longest, sparse) == (sizes.growth_run_ticks, replays.SPARSE.every)
    events = longest + sum(3 * ticks for ticks, _ in others)
    assert sizes.growth_events <= events < sizes.growth_events + 3
    assert all(ticks <= longest / 10 for ticks, _ in others)
