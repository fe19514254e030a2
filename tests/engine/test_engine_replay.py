"""Replay: many ticks a transaction, and still the same ticks as live ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import date, datetime, timedelta
from decimal import Decimal
from typing import Any

import pytest
from market_days import (
    FRI,
    MON,
    THU,
    TUE,
    WED,
    a_bar,
    a_plan,
    a_run,
    audited,
    buy,
    close_on,
    counts,
    events,
    fresh,
    one,
    rows,
    run_tables,
    sell,
)
from psycopg import sql
from scripted import SCRIPTED, Hooks, hooks

from engine.db.connect import Connection
from engine.errors import BadInput, RunNotRunning, StrategyFailed, TimeMovesForward
from engine.market.model import Bar, Split
from engine.market.store import import_splits
from engine.market.view import look
from engine.replay import Replayed, replay
from engine.runs import Run
from engine.stop import stop_run
from engine.strategies.base import Context, Intent, Remember
from engine.tick import run_tick

__all__ = ["audited", "hooks"]

WEEK = (MON, TUE, WED, THU, FRI)
Feed = list[tuple[datetime, list[Bar]]]


def a_feed(*days: str) -> Feed:
    return [(close_on(day), [a_bar(day, "100 110 90 105")]) for day in days or WEEK]


def ticked(conn: Connection, run: Run) -> list[datetime]:
    return rows(conn, "SELECT logical_time FROM mtm_ledger WHERE :run ORDER BY logical_time", run)


@pytest.mark.parametrize("batch", [1, 2, 5, 100])
def test_a_feed_is_ticked_in_batches_and_reported(conn: Connection, batch: int) -> None:
    run = a_run(conn)
    told: list[int] = []
    done = replay(conn, run.user_id, run.run_id, a_feed(), batch=batch, progress=told.append)
    assert done == Replayed(written=5, repeated=0)
    assert sum(told) == 5
    assert max(told) <= batch
    assert ticked(conn, run) == [close_on(day) for day in WEEK]


def test_an_empty_feed_is_no_tick(conn: Connection) -> None:
    run = a_run(conn)
    assert replay(conn, run.user_id, run.run_id, []) == Replayed(0, 0)


def test_a_replay_passes_over_what_is_there_and_goes_on(conn: Connection) -> None:
    run = a_run(conn)
    key = run.user_id, run.run_id
    assert replay(conn, *key, a_feed(MON, TUE)) == Replayed(2, 0)
    assert replay(conn, *key, a_feed(), batch=2) == Replayed(3, 2)
    assert replay(conn, *key, a_feed()) == Replayed(0, 5)
    assert events(conn, run).count("TICK") == 5
    stop_run(conn, *key)
    # What is there can still be asked for; what isn't can no longer be written.
    assert replay(conn, *key, a_feed()) == Replayed(0, 5)
    with pytest.raises(RunNotRunning, match="STOPPED"):
        replay(conn, *key, a_feed("2001-05-14"))


def test_a_time_that_the_feed_gives_twice_is_ticked_once(conn: Connection) -> None:
    run = a_run(conn)
    done = replay(conn, run.user_id, run.run_id, a_feed(MON, TUE, TUE, WED))
    assert done == Replayed(written=3, repeated=1)
    assert len(ticked(conn, run)) == 3


@pytest.mark.parametrize("batch", [1, 2, 100])
@pytest.mark.parametrize("hook", ["on_tick", "on_bar", "on_fill"])
def test_a_strategy_that_raises_in_a_batch_keeps_the_ticks_before(
    conn: Connection, hooks: Hooks, batch: int, hook: str
) -> None:
    run = a_run(conn, strategy=SCRIPTED)

    def fail_on_thursday(context: Context, *_: Any) -> None:
        if context.logical_time == close_on(THU):
            raise ZeroDivisionError("no luck")

    hooks["on_tick"] = lambda context: [buy("1")]
    if hook == "on_tick":

        def both(context: Context) -> list[Intent]:
            fail_on_thursday(context)
            return [buy("1")]

        hooks["on_tick"] = both
    else:
        hooks[hook] = fail_on_thursday
    with pytest.raises(StrategyFailed, match=r"2001-05-10.*no luck"):
        replay(conn, run.user_id, run.run_id, a_feed(), batch=batch)
    assert fresh(conn, run).status == "ERROR"
    assert ticked(conn, run) == [close_on(day) for day in WEEK[:3]]
    assert counts(conn, run)["execution"] == 3
    assert events(conn, run)[-3:] == ["TICK", "RUN_FAILED", "RUN_ERROR"]
    assert "no luck" in one(conn, "SELECT last_error FROM engine_status")


BAD: dict[str, tuple[Feed, type[Exception], str]] = {
    "a price that is none": (
        [(close_on(THU), [a_bar(THU, "NaN")])],
        BadInput,
        "NaN is no price for AAPL",
    ),
    "an unknown symbol": ([(close_on(THU), [a_bar(THU, "1", "NOPE")])], BadInput, "NOPE"),
    "a time that has passed": (a_feed("2001-05-04"), TimeMovesForward, "later logical_time"),
    "a naive time": (
        [(close_on(THU).replace(tzinfo=None), [])],
        BadInput,
        "2001-05-10T20:00:00 has no time zone",
    ),
}


@pytest.mark.parametrize("batch", [1, 100])
@pytest.mark.parametrize(("feed", "error", "message"), BAD.values(), ids=BAD.keys())
def test_bad_input_in_a_batch_keeps_the_ticks_before_and_the_run(
    conn: Connection, feed: Feed, error: type[Exception], message: str, batch: int
) -> None:
    run = a_run(conn)
    with pytest.raises(error, match=message):
        replay(conn, run.user_id, run.run_id, [*a_feed(MON, TUE), *feed], batch=batch)
    assert ticked(conn, run) == [close_on(MON), close_on(TUE)]
    assert fresh(conn, run).status == "RUNNING"
    assert replay(conn, run.user_id, run.run_id, a_feed()) == Replayed(3, 2)


def test_a_feed_that_raises_keeps_the_batches_before(conn: Connection) -> None:
    run = a_run(conn)

    def broken() -> Iterator[tuple[datetime, list[Bar]]]:
        yield from a_feed(MON, TUE, WED)
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        replay(conn, run.user_id, run.run_id, broken(), batch=2)
    assert ticked(conn, run) == [close_on(MON), close_on(TUE)]


def test_a_strategy_that_fails_only_once_goes_on(conn: Connection, hooks: Hooks) -> None:
    """What is not the same twice may pass at the second attempt; then nothing has failed."""
    run = a_run(conn, strategy=SCRIPTED)
    failures = [ZeroDivisionError("once")]

    def fail_once(context: Context) -> None:
        if context.logical_time == close_on(WED) and failures:
            raise failures.pop()

    hooks["on_tick"] = fail_once
    assert replay(conn, run.user_id, run.run_id, a_feed()) == Replayed(5, 0)
    assert fresh(conn, run).status == "RUNNING"


def test_the_batch_is_one_transaction(conn: Connection, monkeypatch: pytest.MonkeyPatch) -> None:
    """A crash in it leaves none of its ticks, and those of the batches before."""
    run = a_run(conn)
    looks = iter(range(10))

    def crash_at_the_fourth(*args: Any) -> Any:
        if next(looks) == 3:
            raise MemoryError
        return look(*args)

    monkeypatch.setattr("engine.replay.look", crash_at_the_fourth)
    with pytest.raises(MemoryError):
        replay(conn, run.user_id, run.run_id, a_feed(), batch=2)
    assert ticked(conn, run) == [close_on(MON), close_on(TUE)]


# Live and replayed: the same code, and the same rows


def wanted(context: Context) -> list[Intent]:
    """Orders that rest, fill in part, trail and end, and a state that grows.

    Every third tick fills several at once, and lets one rest besides.
    """
    number = context.state.get("n", 0)
    if number % 3 == 2:
        rests = sell("0.5", order_type="LIMIT", limit_price=context.prices["AAPL"] * 2)
        return [Remember({"n": number + 1}), buy("1"), buy("0.5", "IBM"), buy("0.25"), rests]
    return [
        Remember({"n": number + 1}),
        buy("3.5", time_in_force="GTC"),
        buy("1000"),
        buy("1", order_type="LIMIT", limit_price=context.prices["AAPL"] - 2),
        sell("0.5", order_type="TRAIL", trail_amount="4", time_in_force="GTC"),
        buy("0.25", "IBM", time_in_force="OPG"),
    ]


def moves(first: str = "2001-05-01", number: int = 25) -> Feed:
    feed: Feed = []
    day = date.fromisoformat(first)
    while len(feed) < number:
        text = day.isoformat()
        if day.weekday() < 5 and text != "2001-05-28":
            low = 90 + (len(feed) * 7) % 13
            prices = f"{low + 4} {low + 9} {low} {low + 3}"
            bars = [a_bar(text, prices, symbol, volume="30") for symbol in ("AAPL", "IBM")]
            feed.append((close_on(text), bars))
        day += timedelta(days=1)
    return feed


def live(conn: Connection, run: Run, feed: Feed) -> None:
    for at, bars in feed:
        run_tick(conn, run.user_id, run.run_id, at, bars, now=at + timedelta(minutes=3))


def in_batches(conn: Connection, run: Run, feed: Feed) -> None:
    replay(conn, run.user_id, run.run_id, feed, batch=7)


def in_two_halves(conn: Connection, run: Run, feed: Feed) -> None:
    """Live at first, replayed over it afterwards."""
    live(conn, run, feed[:11])
    replay(conn, run.user_id, run.run_id, feed)


# When a row was written, and the chain that it is part of.
WRITTEN_AT = "{recorded_at, created_at, hash}"


def kept(conn: Connection, run: Run, way: Callable[[Connection, Run, Feed], None]) -> None:
    """Walk the feed in one way, keep what it made of each table as ``way_table``, and go back."""
    with conn.transaction(force_rollback=True):
        way(conn, run, moves())
        made = {
            table: rows(
                conn,
                f"SELECT (to_jsonb(t) - '{WRITTEN_AT}'::text[])::text FROM {table} t",
            )
            for table in compared(conn)
        }
    for table, found in made.items():
        name = sql.Identifier(f"{way.__name__}_{table}")
        conn.execute(sql.SQL("CREATE TEMPORARY TABLE {} (t jsonb) ON COMMIT DROP").format(name))
        conn.execute(
            sql.SQL("INSERT INTO {} SELECT unnest(%s::text[])::jsonb").format(name), [found]
        )


def compared(conn: Connection) -> list[str]:
    """All that a run writes but its heartbeat."""
    return [table for table in [*run_tables(conn), "strategy_run"] if table != "engine_status"]


@pytest.mark.parametrize("other", [in_batches, in_two_halves])
def test_live_and_replayed_ticks_write_the_same_rows(
    conn: Connection, hooks: Hooks, other: Callable[[Connection, Run, Feed], None]
) -> None:
    import_splits(conn, [Split("AAPL", date(2001, 5, 16), Decimal(2), Decimal(1))])
    hooks["on_tick"] = wanted
    paper = {"max_volume_share": "0.1", "slippage": {"model": "UNIFORM_BPS", "max_bps": "30"}}
    run = a_run(conn, strategy=SCRIPTED, paper=paper)
    a_plan(conn, run)
    for way in (live, other):
        kept(conn, run, way)
    for table in compared(conn):
        for one_way, back in (("live", other.__name__), (other.__name__, "live")):
            only_here = conn.execute(
                sql.SQL("SELECT t FROM {} EXCEPT SELECT t FROM {}").format(
                    sql.Identifier(f"{one_way}_{table}"), sql.Identifier(f"{back}_{table}")
                )
            ).fetchall()
            assert only_here == [], f"{table} of {one_way}"
    assert one(conn, "SELECT count(*) FROM live_execution") > 30
    assert one(conn, "SELECT count(*) FROM live_split_applied") == 1
    found = set(rows(conn, "SELECT DISTINCT t ->> 'status' FROM live_orders"))
    assert found >= {"FILLED", "EXPIRED", "PARTIALLY_FILLED", "REJECTED"}


def test_a_live_tick_tells_that_it_lives_and_a_replayed_one_does_not(conn: Connection) -> None:
    run = a_run(conn)
    in_batches(conn, run, a_feed(MON))
    assert one(conn, "SELECT lag_seconds FROM engine_status") is None
    now = close_on(TUE) + timedelta(seconds=90)
    run_tick(conn, run.user_id, run.run_id, close_on(TUE), [], now=now)
    assert one(conn, "SELECT heartbeat_at, lag_seconds FROM engine_status") == (now, 90)
