"""Replay while others write, fail and are killed: the same books as ticks one by one."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Callable
from datetime import date, datetime, timedelta
from decimal import Decimal
from typing import Any, NamedTuple
from uuid import UUID

import pytest
from market_days import (
    a_plan,
    audited,
    buy,
    events,
    fresh,
    one,
    rows,
    run_tables,
    sell,
    snapshot,
    statuses,
)
from scripted import SCRIPTED, Hooks, hooks
from test_engine_at_once import written
from test_engine_replay import moves, wanted
from waits import wait_until, wait_until_someone_is_blocked

from engine import journal
from engine.audit import audit
from engine.db.connect import ENGINE_ROLE, Connection, open_connection
from engine.errors import StrategyFailed
from engine.market.calendar import ensure_sessions
from engine.market.model import Bar, Split
from engine.market.store import import_splits
from engine.orders.model import Fill
from engine.replay import Replayed, replay
from engine.runs import Run, Terms, add_user, create_run, delete_run, start_run
from engine.sips import pause_plan
from engine.stop import stop_run
from engine.strategies.base import CancelOrder, Context, Intent, Remember
from engine.tick import log_mtm, place_orders, run_tick

__all__ = ["audited", "hooks"]

Feed = list[tuple[datetime, list[Bar]]]
Way = Callable[[Connection, Run, Feed], None]
RUN_ID = UUID(int=42)
DAYS = 12


def the_run(conn: Connection, **terms: Any) -> Run:
    """A RUNNING run that has the ids of the one before it, which is deleted."""
    user_id = add_user(conn, "ann")
    if one(conn, "SELECT count(*) FROM strategy_run"):
        if one(conn, "SELECT status FROM strategy_run") == "RUNNING":
            stop_run(conn, user_id, RUN_ID)
        delete_run(conn, user_id, RUN_ID)
    made = create_run(conn, user_id, Terms(initial_cash=Decimal(10_000), **terms), run_id=RUN_ID)
    return start_run(conn, user_id, made.run_id)


def live(conn: Connection, run: Run, feed: Feed) -> None:
    for at, bars in feed:
        run_tick(conn, run.user_id, run.run_id, at, bars)


def in_batches(size: int) -> Way:
    def way(conn: Connection, run: Run, feed: Feed) -> None:
        assert replay(conn, run.user_id, run.run_id, feed, batch=size) == Replayed(len(feed), 0)

    return way


def made_by(conn: Connection) -> dict[str, list[str]]:
    """What the run wrote, but for its heartbeat and the moment of its making."""
    made = written(conn)
    return {table: made[table] for table in run_tables(conn) if table != "engine_status"}


def assert_equal(found: dict[str, list[str]], expected: dict[str, list[str]]) -> None:
    assert found.keys() == expected.keys()
    for table, theirs in expected.items():
        assert found[table] == theirs, table


def everything(context: Context) -> list[Intent]:
    """What rests, ends, is refused and trails, and now and then a cancel."""
    oldest = [CancelOrder(order.order_id) for order in context.open_orders[:1]]
    return [*(oldest if context.state.get("n", 0) % 3 == 2 else []), *wanted(context)]


@pytest.mark.parametrize("size", [1, 3, 500])
def test_a_feed_of_everything_makes_the_same_rows_in_every_batch(
    owner_conn: Connection, hooks: Hooks, size: int
) -> None:
    import_splits(owner_conn, [Split("AAPL", date(2001, 5, 16), Decimal(2), Decimal(1))])
    hooks["on_tick"] = everything
    made = []
    for way in (live, in_batches(size)):
        run = the_run(owner_conn, strategy=SCRIPTED, paper={"max_volume_share": "0.1"})
        way(owner_conn, run, moves(number=20))
        made.append(made_by(owner_conn))
    assert_equal(made[1], made[0])
    assert set(statuses(owner_conn, run)) >= {"FILLED", "EXPIRED", "REJECTED", "CANCELED"}
    assert events(owner_conn, run).count("SPLIT_APPLIED") == 1


def in_a_transaction(conn: Connection, run: Run, feed: Feed) -> None:
    """Each tick in one of the caller's."""
    for at, bars in feed:
        with conn.transaction():
            run_tick(conn, run.user_id, run.run_id, at, bars)


LIMITS = [
    *(("MAX_ORDER_QUANTITY", 4), ("MAX_POSITION", 9), ("MAX_ORDER_NOTIONAL", 350)),
    *(("GROSS_EXPOSURE_MAX", 1_500), ("CONCENTRATION_MAX", 12), ("OPEN_ORDERS_MAX", 3)),
    *(("ORDER_RATE_MAX", 5), ("DUPLICATE_INTENT", 86_400), ("DAILY_LOSS_MAX", 20)),
    *(("DRAWDOWN_MAX", 1), ("PRICE_COLLAR", 4), ("WASH_TRADE", None)),
]


def by_lot(seed: int) -> tuple[Hooks, dict[str, Any], list[tuple[str, int | None]]]:
    """What a strategy does, its run's terms and its user's limits."""
    lot = random.Random(seed)
    paper = {
        **({"max_volume_share": "0.2"} if lot.random() < 0.3 else {}),
        **({"commission": {"model": "PERCENT", "percent": "0.1"}} if lot.random() < 0.5 else {}),
    }
    terms = {"paper": paper, "account_type": lot.choice(["CASH", "MARGIN"])}
    limits = lot.sample(LIMITS, lot.choice([0, 1, 2]))
    rests, remembers = lot.random() * 0.3, lot.random() < 0.3

    def order(draw: random.Random, context: Context, symbol: str) -> Intent:
        side, price = draw.choice([buy, buy, sell]), context.prices[symbol]
        terms: dict[str, Any] = {"time_in_force": draw.choice(["DAY", "GTC"])}
        if draw.random() < rests:
            kind = draw.choice(["LIMIT", "STOP", "TRAIL"])
            name = {"LIMIT": "limit_price", "STOP": "stop_price", "TRAIL": "trail_amount"}[kind]
            value = draw.randint(1, 6) if kind == "TRAIL" else price + draw.randint(-6, 6)
            terms |= {"order_type": kind, name: value}
        return side(draw.choice(["0.5", "1", "2", "3", "5"]), symbol, **terms)

    def on_tick(context: Context) -> list[Intent]:
        draw = random.Random(f"{seed} {context.logical_time}")
        wanted = [
            order(draw, context, draw.choice(["AAPL", "IBM"]))
            for _ in range(draw.choice([0, 0, 1, 1, 2, 3]))
        ]
        if context.open_orders and draw.random() < 0.2:
            wanted.insert(0, CancelOrder(context.open_orders[0].order_id))
        if remembers and draw.random() < 0.5:
            wanted.append(Remember({"n": context.state.get("n", 0) + 1}))
        return wanted

    def on_fill(context: Context, fill: Fill) -> list[Intent]:
        draw = random.Random(f"{seed} {fill.execution_id} {context.logical_time}")
        return [sell("0.5", fill.symbol)] if fill.quantity == 5 and draw.random() < 0.5 else []

    hooks: Hooks = {"on_tick": on_tick}
    return hooks | ({"on_fill": on_fill} if lot.random() < 0.3 else {}), terms, limits


FIRST_SEED = int(os.environ.get("OMS_FEED_SEED", "1"))
SEEDS = range(FIRST_SEED, FIRST_SEED + int(os.environ.get("OMS_FEED_RUNS", "12")))


@pytest.mark.parametrize("seed", SEEDS)
def test_whatever_a_strategy_does_each_way_makes_the_same_rows(
    owner_conn: Connection, hooks: Hooks, seed: int
) -> None:
    """Live, in the caller's transactions, and replayed in batches of every size."""
    drawn, terms, limits = by_lot(seed)
    hooks |= drawn
    for kind, value in limits:
        owner_conn.execute(
            "INSERT INTO risk_limit (user_id, kind, limit_value, seconds) VALUES (%s, %s, %s, %s)",
            [
                add_user(owner_conn, "ann"),
                kind,
                value,
                86_400 if kind == "ORDER_RATE_MAX" else None,
            ],
        )
    made = []
    for way in (live, in_a_transaction, in_batches(1), in_batches(3), in_batches(500)):
        run = the_run(owner_conn, strategy=SCRIPTED, **terms)
        way(owner_conn, run, moves(number=30))
        made.append(made_by(owner_conn))
        assert_equal(made[-1], made[0])


@pytest.mark.parametrize("size", [1, 3, 500])
def test_plans_make_the_same_rows_in_every_batch(owner_conn: Connection, size: int) -> None:
    ensure_sessions(owner_conn, "XNYS", date(2001, 1, 1), date(2001, 12, 31))
    import_splits(owner_conn, [Split("AAPL", date(2001, 6, 12), Decimal(2), Decimal(1))])
    made = []
    for way in (live, in_batches(size)):
        run = the_run(owner_conn)
        for day, policy in ((1, "RUN_EACH"), (8, "RUN_ONCE"), (31, "SKIP")):
            a_plan(owner_conn, run, plan=policy, day_of_month=day, missed_policy=policy)
        # 500 a month each: the last occasions find no cash.
        a_plan(owner_conn, run, plan="large", amount=Decimal(4_000), day_of_month=15)
        way(owner_conn, run, moves(number=60))
        made.append(made_by(owner_conn))
    assert_equal(made[1], made[0])
    told = events(owner_conn, run)
    assert told.count("SPLIT_APPLIED") == 1
    assert {"SIP_EXECUTED", "SIP_REJECTED"} <= set(told)


@pytest.mark.parametrize("size", [1, 3, 500])
def test_a_feed_that_is_in_the_ledger_adds_nothing(
    owner_conn: Connection, hooks: Hooks, size: int
) -> None:
    hooks["on_tick"] = everything
    run = the_run(owner_conn, strategy=SCRIPTED)
    feed = moves(number=DAYS)
    in_batches(5)(owner_conn, run, feed)
    before = snapshot(owner_conn)
    done = replay(owner_conn, run.user_id, run.run_id, feed, batch=size)
    assert done == Replayed(0, DAYS)
    assert snapshot(owner_conn) == before


class Meddling(NamedTuple):
    """What somebody else does once the first six ticks are in the ledger."""

    work: Callable[[Connection, Run, datetime], Any]
    strategy: str = SCRIPTED


def rests(conn: Connection, run: Run, at: datetime) -> None:
    order = buy("3", order_type="LIMIT", limit_price="95", time_in_force="GTC")
    place_orders(conn, run.user_id, run.run_id, at, {}, [order])


def buys(conn: Connection, run: Run, at: datetime) -> None:
    place_orders(conn, run.user_id, run.run_id, at, {"AAPL": Decimal(95)}, [buy("3")])


def forbids(conn: Connection, run: Run, at: datetime) -> None:
    conn.execute(
        """INSERT INTO risk_limit (limit_id, user_id, kind, symbol)
           VALUES (%s, %s, 'FORBIDDEN_SYMBOL', 'AAPL')""",
        [RUN_ID, run.user_id],
    )


MEDDLING: dict[str, Meddling] = {
    "places an order that rests": Meddling(rests),
    "buys": Meddling(buys),
    "marks": Meddling(
        lambda conn, run, at: log_mtm(conn, run.user_id, run.run_id, at, {"AAPL": Decimal("101.5")})
    ),
    "ticks": Meddling(
        lambda conn, run, at: run_tick(
            conn, run.user_id, run.run_id, at, {"AAPL": Decimal("96.5")}, intents=[buy("2")]
        )
    ),
    "forbids the symbol": Meddling(forbids),
    "pauses a plan": Meddling(
        lambda conn, run, at: pause_plan(conn, run.user_id, run.run_id, "apples"), "sip"
    ),
}


def grows(context: Context) -> list[Intent]:
    number = context.state.get("n", 0) + 1
    return [buy(str(number), "IBM"), buy("1"), Remember({"n": number})]


@pytest.mark.parametrize("size", [1, 2, 3, 6])
@pytest.mark.parametrize("meddling", MEDDLING.values(), ids=MEDDLING.keys())
def test_a_batch_in_flight_that_is_refused_is_done_again(
    dsn: str,
    owner_conn: Connection,
    hooks: Hooks,
    monkeypatch: pytest.MonkeyPatch,
    meddling: Meddling,
    size: int,
) -> None:
    """The batch after the sixth tick has been worked out, and the next one is under way."""
    hooks["on_tick"] = grows
    feed = moves("2001-05-01", DAYS)
    ensure_sessions(owner_conn, "XNYS", date(2001, 5, 1), date(2001, 5, 31))
    between = feed[5][0] + timedelta(hours=1)

    def begin() -> Run:
        owner_conn.execute("DELETE FROM risk_limit")
        run = the_run(owner_conn, strategy=meddling.strategy)
        a_plan(owner_conn, run, day_of_month=8, start_on=date(2001, 5, 1))
        a_plan(owner_conn, run, plan="other", symbol="IBM", day_of_month=11)
        return run

    run = begin()
    live(owner_conn, run, feed[:6])
    meddling.work(owner_conn, run, between)
    live(owner_conn, run, feed[6:])
    expected = made_by(owner_conn)

    run = begin()
    calls: list[int] = []
    with open_connection(dsn) as other:
        write = journal.write

        def after_the_sixth_tick(*what: Any) -> int:
            calls.append(1)
            if len(calls) == 6 // size + 1:
                meddling.work(other, run, between)
            return write(*what)

        monkeypatch.setattr(journal, "write", after_the_sixth_tick)
        done = replay(owner_conn, run.user_id, run.run_id, feed, batch=size)
    assert done == Replayed(DAYS, 0)
    assert_equal(made_by(owner_conn), expected)


@pytest.mark.parametrize("size", [1, 3, 500])
def test_a_tick_that_trades_and_then_needs_steps_is_written_once(
    owner_conn: Connection, hooks: Hooks, size: int
) -> None:
    """What it told before it was found to need them is told again, not twice."""

    def now_and_then(context: Context) -> list[Intent]:
        number = context.state.get("n", 0)
        more = [sell("999")] if number % 4 == 3 else []
        return [buy("1"), Remember({"n": number + 1}), *more]

    hooks["on_tick"] = now_and_then
    made = []
    for way in (live, in_batches(size)):
        run = the_run(owner_conn, strategy=SCRIPTED)
        way(owner_conn, run, moves(number=DAYS))
        made.append(made_by(owner_conn))
    assert_equal(made[1], made[0])
    assert statuses(owner_conn, run).count("FILLED") == DAYS
    assert statuses(owner_conn, run).count("REJECTED") == DAYS // 4


@pytest.mark.parametrize("size", [1, 3, 500])
@pytest.mark.parametrize("hook", ["on_tick", "on_fill"])
def test_a_strategy_that_fails_in_a_batch_leaves_the_ticks_before_it(
    owner_conn: Connection, hooks: Hooks, size: int, hook: str
) -> None:
    feed = moves(number=DAYS)

    def fail_at_the_eighth(context: Context, *_: Any) -> list[Intent]:
        if context.logical_time == feed[7][0]:
            raise ZeroDivisionError("no luck")
        return grows(context) if hook == "on_tick" else []

    hooks.update({"on_tick": grows} | {hook: fail_at_the_eighth})
    made = []
    for way in (live, in_batches(size)):
        run = the_run(owner_conn, strategy=SCRIPTED)
        with pytest.raises(StrategyFailed, match="no luck"):
            way(owner_conn, run, feed)
        assert fresh(owner_conn, run).status == "ERROR"
        made.append(made_by(owner_conn))
    assert_equal(made[1], made[0])
    assert events(owner_conn, run).count("TICK") == 7
    assert events(owner_conn, run)[-2:] == ["RUN_FAILED", "RUN_ERROR"]


def test_a_run_that_is_stopped_while_a_batch_flies_keeps_whole_ticks(
    dsn: str, owner_conn: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = the_run(owner_conn)
    calls: list[int] = []
    with open_connection(dsn) as other:
        write = journal.write

        def stop_at_the_third(*what: Any) -> int:
            calls.append(1)
            if len(calls) == 3:
                stop_run(other, run.user_id, run.run_id)
            return write(*what)

        monkeypatch.setattr(journal, "write", stop_at_the_third)
        with pytest.raises(Exception, match="is STOPPED"):
            replay(owner_conn, run.user_id, run.run_id, moves(number=DAYS), batch=2)
    assert events(owner_conn, run) == ["RUN_STARTED", *["TICK"] * 4, "RUN_STOPPED"]


# Killed

LONG = 120


def replay_long(dsn: str, user_id: str, run_id: str) -> None:
    """What the process does that is killed: many small batches."""
    with open_connection(dsn, role=ENGINE_ROLE) as conn:
        replay(conn, UUID(user_id), UUID(run_id), moves(number=LONG), batch=2)


@pytest.fixture
def killed(dsn: str, owner_conn: Connection) -> tuple[Run, int]:
    """A run whose replaying process was killed while it wrote, and its ticks at that moment."""
    ensure_sessions(owner_conn, "XNYS", date(2001, 1, 1), date(2001, 12, 31))
    run = the_run(owner_conn)
    for day in range(1, 29, 3):
        a_plan(owner_conn, run, plan=f"day {day}", day_of_month=day, amount=Decimal(day))
    program = f"from test_engine_feeds import replay_long; replay_long(*{_arguments(dsn, run)!r})"
    ticks = "SELECT count(*) FROM mtm_ledger"
    with open_connection(dsn) as holder:
        child = subprocess.Popen(
            [sys.executable, "-c", program],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        )
        try:
            wait_until(lambda: one(owner_conn, ticks) >= 20, "some ticks")
            with holder.transaction():
                holder.execute("SELECT FROM engine_state FOR UPDATE")
                wait_until_someone_is_blocked(owner_conn, by=holder)
                (writing,) = rows(
                    owner_conn,
                    f"""SELECT pid FROM pg_stat_activity
                        WHERE {holder.info.backend_pid} = ANY (pg_blocking_pids(pid))""",
                )
                before = one(owner_conn, ticks)
                child.kill()
                child.wait(60)
        finally:
            child.kill()
            child.wait(60)
    wait_until(
        lambda: not rows(owner_conn, f"SELECT FROM pg_stat_activity WHERE pid = {writing}"),
        "the server to be done with the dead child",
    )
    return run, before


def _arguments(dsn: str, run: Run) -> tuple[str, str, str]:
    return dsn, str(run.user_id), str(run.run_id)


def test_a_replay_that_was_killed_goes_on_where_the_ledger_ends(
    owner_conn: Connection, killed: tuple[Run, int]
) -> None:
    run, before = killed
    there = events(owner_conn, run).count("TICK")
    # The statement that the server was busy with is there whole, two ticks, or not at all.
    assert there in (before, before + 2)
    assert 20 <= there < LONG
    feed = moves(number=LONG)
    done = replay(owner_conn, run.user_id, run.run_id, feed, batch=2)
    assert done == Replayed(LONG - there, there)
    ticked = rows(owner_conn, "SELECT logical_time FROM mtm_ledger ORDER BY 1")
    assert ticked == [at for at, _ in feed]
    assert events(owner_conn, run).count("TICK") == LONG
    executed = rows(
        owner_conn, "SELECT subject FROM event_ledger WHERE event_type = 'SIP_EXECUTED'"
    )
    assert len(executed) == len(set(executed)) > 30
    assert audit(owner_conn) == []
