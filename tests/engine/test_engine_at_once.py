"""A tick that is worked out without a lock and written at once: the same rows, or done again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from datetime import date, datetime, timedelta
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from market_days import (
    MON,
    TUE,
    WED,
    a_bar,
    a_plan,
    a_run,
    assert_sound,
    at_price,
    audited,
    buy,
    close_on,
    counts,
    events,
    fresh,
    new_york,
    one,
    open_on,
    order_ids,
    rows,
    sell,
    snapshot,
    statuses,
    tables,
)
from scripted import SCRIPTED, Hooks, hooks
from waits import wait_until, wait_until_blocked, wait_until_someone_is_blocked

from engine import journal
from engine import replay as replays
from engine.db.connect import ENGINE_ROLE, Connection, open_connection
from engine.errors import (
    AlreadyHappened,
    DatabaseUnavailable,
    RuleViolation,
    RunNotRunning,
    TimeMovesForward,
)
from engine.market.calendar import ensure_sessions
from engine.market.model import Bar, Split
from engine.market.store import import_splits
from engine.market.view import Prices
from engine.quantities import EXACT
from engine.replay import replay
from engine.runs import Run, fail_run
from engine.sips import pause_plan
from engine.stop import stop_run
from engine.strategies.base import Announce, Context, Intent, Remember
from engine.tick import TickResult, log_mtm, place_orders, run_tick

__all__ = ["audited", "hooks"]

TICKER = Path(__file__).parents[1] / "plan" / "tick_child.py"
BOTH = at_price("100") | at_price("50", "IBM")


def on_monday(time: str) -> datetime:
    return new_york(MON, time)


@dataclass
class Two:
    """Two connections as the engine, and the owner's, which looks on."""

    one: Connection
    two: Connection
    owner: Connection


@pytest.fixture
def two(dsn: str) -> Iterator[Two]:
    with (
        open_connection(dsn, role=ENGINE_ROLE) as first,
        open_connection(dsn, role=ENGINE_ROLE) as second,
        open_connection(dsn) as owner,
    ):
        yield Two(first, second, owner)


@pytest.fixture
def no_steps(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From the call on, a tick that isn't written at once fails its test."""

    def fail(*_: Any) -> None:
        raise AssertionError("this tick was done in steps")

    return lambda: monkeypatch.setattr("engine.tick.Planned.in_steps", fail)


# The same rows


class Tick(NamedTuple):
    at: datetime
    prices: Prices
    intents: Sequence[Intent] = ()
    now: datetime | None = None

    def run(self, conn: Connection, run: Run) -> TickResult:
        key = run.user_id, run.run_id
        return run_tick(conn, *key, self.at, self.prices, intents=self.intents, now=self.now)


def written(conn: Connection) -> dict[str, list[str]]:
    """Every row of every table, but for when it was written and the chain made of it.

    Numbers are compared by their value: 1.0 is 1.
    """
    left_out = "{recorded_at, created_at, hash}"
    return {
        table: sorted(
            json.dumps(json.loads(row, parse_float=plain, parse_int=plain))
            for row in rows(
                conn,
                f"SELECT (to_jsonb(t) - '{left_out}'::text[])::text FROM {table} t",
            )
        )
        for table in tables(conn)
    }


def plain(number: str) -> str:
    return f"<{Decimal(number).normalize(EXACT):f}>"


def older(symbol: str, price: str, at: datetime) -> Bar:
    return Bar.of_price(symbol, Decimal(price), at)


CLOSE = close_on(MON)
# What a text may hold that an array's literal, or a document's, must not take for its own.
AWKWARD = "NULL, \"quoted\" {braces} \\back\\ 'single' \n\t%s é"

STORIES: dict[str, list[Tick]] = {
    "an order that fills": [Tick(CLOSE, BOTH, [buy("1")])],
    "a live one": [Tick(CLOSE, BOTH, [buy("1")], CLOSE + timedelta(seconds=90))],
    "a tick and nothing else": [Tick(CLOSE, {})],
    "a limit that is met": [Tick(CLOSE, BOTH, [buy("1", order_type="LIMIT", limit_price="101")])],
    "several orders of two symbols": [
        Tick(on_monday("10:00"), BOTH, [buy("3"), buy("2.5", "IBM")]),
        Tick(on_monday("11:00"), BOTH, [sell("3"), buy("4", "IBM"), sell("6.5", "IBM"), buy("1")]),
        Tick(close_on(TUE), at_price("90"), [sell("1")]),
    ],
    "bars with a volume": [
        Tick(
            CLOSE, [a_bar(MON, volume="30"), a_bar(MON, symbol="IBM")], [buy("3"), buy("1", "IBM")]
        )
    ],
    "bars of two kinds, each order with a key": [
        Tick(
            CLOSE,
            [a_bar(MON), older("IBM", "50", CLOSE)],
            [
                buy("1", client_order_id="first"),
                buy("1", "IBM", client_order_id="second"),
                buy("2", client_order_id="third"),
            ],
        )
    ],
    "prices older than the tick": [
        Tick(on_monday("10:00"), BOTH, [buy("1"), buy("1", "IBM")]),
        Tick(
            on_monday("12:00"),
            [older("AAPL", "120", on_monday("11:00")), older("IBM", "55", on_monday("12:00"))],
            [buy("1", "IBM")],
        ),
        # Older than the mark that is there.
        Tick(on_monday("13:00"), [older("AAPL", "80", on_monday("10:30"))]),
    ],
    "what a strategy says and keeps": [
        Tick(
            CLOSE,
            BOTH,
            [
                Announce("NOTED", AWKWARD, {"why": AWKWARD, "n": 1.5}),
                buy("1", client_order_id=AWKWARD),
                Remember({"seen": [1, AWKWARD], "nothing": None}),
                Announce("NOTED"),
            ],
        ),
        Tick(close_on(TUE), BOTH, [Remember({})]),
    ],
    "numbers written in another way": [
        Tick(CLOSE, at_price("1E+2"), [buy("1E+1"), buy("0.50"), sell("1.000")])
    ],
}


@pytest.mark.parametrize("strategy", ["sip", SCRIPTED])
@pytest.mark.parametrize("ticks", STORIES.values(), ids=STORIES.keys())
def test_at_once_and_in_steps_write_the_same_rows(
    dsn: str, owner_conn: Connection, no_steps: Callable[[], None], ticks: list[Tick], strategy: str
) -> None:
    """With plans, or with a strategy of its own; the steps are taken back before."""
    ensure_sessions(owner_conn, "XNYS", date(2001, 5, 1), date(2001, 5, 31))
    run = a_run(owner_conn, strategy=strategy)
    a_plan(owner_conn, run)
    a_plan(owner_conn, run, plan="more", symbol="IBM", amount=Decimal("77.77"))
    assert_the_same(owner_conn, run, ticks, no_steps)


def test_the_first_tick_of_a_database_executes_what_is_due(engine_conn: Connection) -> None:
    """It stores the sessions of its calendar; what is due depends on them."""
    run = a_run(engine_conn)
    a_plan(engine_conn, run)
    assert Tick(close_on(MON), BOTH).run(engine_conn, run).executions == 1


LONG_AND_SHORT = [
    Tick(on_monday("10:00"), BOTH, [sell("2"), buy("1000", "IBM")]),
    Tick(on_monday("11:00"), at_price("110"), [buy("0.7")]),
    Tick(on_monday("12:00"), at_price("120"), [buy("3"), sell("5"), buy("0.3333")]),
    Tick(close_on(TUE), at_price("3.3333") | at_price("1", "IBM"), [buy("2.9667")]),
]


def test_a_short_account_writes_the_same_rows_at_once(
    dsn: str, owner_conn: Connection, no_steps: Callable[[], None]
) -> None:
    paper = {"commission": {"model": "PERCENT", "percent": "0.1"}}
    run = a_run(owner_conn, account_type="MARGIN", paper=paper)
    assert_the_same(owner_conn, run, LONG_AND_SHORT, no_steps)
    assert rows(owner_conn, "SELECT symbol, quantity FROM position ORDER BY 1") == [
        ("AAPL", 0),
        ("IBM", 1000),
    ]


def test_orders_that_fills_lead_to_write_the_same_rows_at_once(
    dsn: str, owner_conn: Connection, hooks: Hooks, no_steps: Callable[[], None]
) -> None:
    hooks["on_start"] = lambda context: [Remember({"fills": 0})]
    hooks["on_tick"] = lambda context: [buy("1")]

    def hedge(context: Context, fill: Any) -> list[Intent]:
        again = [] if fill.symbol == "IBM" else [buy("2", "IBM")]
        return [*again, Remember({"fills": context.state["fills"] + 1})]

    hooks["on_fill"] = hedge
    run = a_run(owner_conn, strategy=SCRIPTED)
    ticks = [Tick(on_monday("10:00"), BOTH), Tick(on_monday("11:00"), BOTH)]
    assert_the_same(owner_conn, run, ticks, no_steps)
    assert one(owner_conn, "SELECT state FROM engine_state") == {"fills": 4}


def assert_the_same(
    conn: Connection, run: Run, ticks: list[Tick], no_steps: Callable[[], None]
) -> None:
    with conn.transaction(force_rollback=True):
        results = [tick.run(conn, run) for tick in ticks]
        in_steps = written(conn)
    no_steps()
    assert [tick.run(conn, run) for tick in ticks] == results
    at_once = written(conn)
    for table, found in in_steps.items():
        assert at_once[table] == found, table


def test_orders_are_weighed_alike_at_once_and_in_steps(owner_conn: Connection) -> None:
    """All of one side before the first of them is filled: a limit far above the price counts."""
    run = a_run(owner_conn)
    far = buy("1", order_type="LIMIT", limit_price="9000")
    tick = Tick(CLOSE, BOTH, [far, buy("20"), buy("10")])
    with owner_conn.transaction(force_rollback=True):
        in_steps = tick.run(owner_conn, run), written(owner_conn)
    assert (tick.run(owner_conn, run), written(owner_conn)) == in_steps
    assert statuses(owner_conn, run) == ["FILLED", "REJECTED", "FILLED"]


@pytest.mark.parametrize("way", ["at once", "in steps", "replayed"])
@pytest.mark.parametrize(
    ("kind", "symbol", "value", "became"),
    [
        ("FORBIDDEN_SYMBOL", "IBM", None, "FILLED REJECTED FILLED"),
        # It looks back, so that the first is in the table when the second is refused.
        ("ORDER_RATE_MAX", None, 1, "FILLED REJECTED REJECTED"),
    ],
)
def test_one_that_the_gate_refuses_leaves_the_others_of_its_side(
    dsn: str,
    owner_conn: Connection,
    hooks: Hooks,
    way: str,
    kind: str,
    symbol: str | None,
    value: int | None,
    became: str,
) -> None:
    """Whoever tells them tells them alike: all placed, and then what became of them."""
    run = a_run(owner_conn, strategy=SCRIPTED)
    owner_conn.execute(
        """INSERT INTO risk_limit (user_id, kind, symbol, limit_value, seconds)
           VALUES (%s, %s, %s, %s, %s)""",
        [run.user_id, kind, symbol, value, 600 if value else None],
    )
    hooks["on_tick"] = lambda context: [buy("2"), buy("1", "IBM"), buy("3")]
    bars = [Bar.of_price(symbol, price, CLOSE) for symbol, price in BOTH.items()]
    if way == "replayed":
        replay(owner_conn, run.user_id, run.run_id, [(CLOSE, bars)])
    else:
        with owner_conn.transaction() if way == "in steps" else nullcontext():
            Tick(CLOSE, bars).run(owner_conn, run)
    assert statuses(owner_conn, run) == became.split()
    told = rows(owner_conn, "SELECT event_type FROM event_ledger ORDER BY seq")
    placed = [
        "ORDER_REJECTED" if status == "REJECTED" else "ORDER_PLACED" for status in became.split()
    ]
    assert told[1:] == [*placed, *["EXECUTION"] * became.count("FILLED"), "TICK"]


def test_ticks_between_refusals_are_written_together(
    owner_conn: Connection, hooks: Hooks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A refusal costs its own tick some steps, and not those of the batch that it is in."""
    run = a_run(owner_conn, strategy=SCRIPTED)
    owner_conn.execute(
        "INSERT INTO risk_limit (user_id, kind, limit_value) VALUES (%s, 'MAX_ORDER_QUANTITY', 2)",
        [run.user_id],
    )
    refused = {on_monday("11:17"), on_monday("12:40")}
    hooks["on_tick"] = lambda context: [buy("3" if context.logical_time in refused else "0.01")]
    times = [on_monday("10:00") + timedelta(minutes=minute) for minute in range(300)]
    steps: list[datetime] = []
    in_steps = replays._tick_in_steps

    def counted(conn: Connection, *what: Any) -> None:
        steps.append(what[2])
        in_steps(conn, *what)

    monkeypatch.setattr(replays, "_tick_in_steps", counted)
    feed = [(at, [Bar.of_price("AAPL", Decimal(100), at)]) for at in times]
    assert replay(owner_conn, run.user_id, run.run_id, feed).written == len(times)
    assert steps == sorted(refused)
    assert statuses(owner_conn, run).count("REJECTED") == 2
    assert one(owner_conn, "SELECT quantity FROM position") == Decimal("2.98")


# What was kept is not trusted


class Meddling(NamedTuple):
    """What somebody else does between two ticks of ours, and what must come of ours."""

    work: Callable[[Two, Run], Any]
    cash: str = "9850"
    equity: str = "9990"
    statuses: str = "FILLED FILLED"
    prices: Mapping[str, Decimal] = at_price("90") | at_price("50", "IBM")
    code: str | None = None
    repeated: bool = False
    error: type[RuleViolation] | None = None


def places(time: str, prices: Mapping[str, Decimal], **terms: Any) -> Callable[[Two, Run], Any]:
    order = buy(terms.pop("quantity", "1"), **terms)
    return lambda two, run: place_orders(
        two.two, run.user_id, run.run_id, on_monday(time), prices, [order]
    )


def ticks(time: str, price: str, *intents: Intent) -> Callable[[Two, Run], Any]:
    return lambda two, run: run_tick(
        two.two, run.user_id, run.run_id, on_monday(time), at_price(price), intents=intents
    )


def limits(kind: str, symbol: str, value: int | None = None) -> Callable[[Two, Run], Any]:
    return lambda two, run: two.owner.execute(
        "INSERT INTO risk_limit (user_id, kind, symbol, limit_value) VALUES (%s, %s, %s, %s)",
        [run.user_id, kind, symbol, value],
    )


MEDDLING: dict[str, Meddling] = {
    "does nothing": Meddling(lambda two, run: None),
    "places an order that rests": Meddling(
        places("10:30", {}, order_type="LIMIT", limit_price="95", time_in_force="GTC"),
        cash="9760",
        statuses="FILLED FILLED FILLED",
    ),
    "buys": Meddling(
        places("10:30", at_price("95"), quantity="2"),
        cash="9660",
        equity="9980",
        statuses="FILLED FILLED FILLED",
    ),
    "buys at the moment of our tick": Meddling(
        places("11:00", at_price("95"), quantity="2"),
        cash="9660",
        equity="9980",
        statuses="FILLED FILLED FILLED",
    ),
    "takes all the cash": Meddling(
        places("10:30", at_price("90"), quantity="110"),
        cash="0",
        equity="9990",
        statuses="FILLED FILLED REJECTED",
        code="INSUFFICIENT_CASH",
    ),
    "marks": Meddling(
        lambda two, run: log_mtm(
            two.two, run.user_id, run.run_id, on_monday("10:30"), at_price("120")
        ),
        equity="10020",
        prices=at_price("50", "IBM"),
    ),
    "marks at the moment of our tick": Meddling(
        lambda two, run: log_mtm(
            two.two, run.user_id, run.run_id, on_monday("11:00"), at_price("120")
        ),
        error=AlreadyHappened,
    ),
    "ticks": Meddling(
        ticks("10:30", "95", buy("2")), cash="9660", equity="9980", statuses="FILLED FILLED FILLED"
    ),
    "writes this very tick": Meddling(
        ticks("11:00", "80", buy("1")),
        cash="9820",
        equity="9980",
        repeated=True,
    ),
    "ticks later": Meddling(ticks("11:30", "95"), error=TimeMovesForward),
    "stops the run": Meddling(
        lambda two, run: stop_run(two.two, run.user_id, run.run_id), error=RunNotRunning
    ),
    "ends the run in an error": Meddling(
        lambda two, run: fail_run(two.two, run.user_id, run.run_id, "no", on_monday("10:30")),
        error=RunNotRunning,
    ),
    "pauses the plan that is due": Meddling(
        lambda two, run: pause_plan(two.two, run.user_id, run.run_id, "later"),
        prices=BOTH | at_price("10", "MSFT") | at_price("90"),
    ),
    "forbids the symbol": Meddling(
        limits("FORBIDDEN_SYMBOL", "IBM"),
        cash="9900",
        statuses="FILLED REJECTED",
        code="FORBIDDEN_SYMBOL",
    ),
    "limits the order": Meddling(
        limits("MAX_ORDER_NOTIONAL", "IBM", 49),
        cash="9900",
        statuses="FILLED REJECTED",
        code="MAX_ORDER_NOTIONAL",
    ),
}

# When somebody else comes, and whether our second tick begins with what the first one left.
WHEN = ["between", "between, live", "before the write", "before the write, read anew"]


@pytest.mark.parametrize("when", WHEN)
@pytest.mark.parametrize("meddling", MEDDLING.values(), ids=MEDDLING.keys())
def test_a_tick_is_right_whatever_somebody_else_does(
    two: Two, monkeypatch: pytest.MonkeyPatch, meddling: Meddling, when: str
) -> None:
    run = a_run(two.owner)
    a_plan(two.owner, run, plan="later", symbol="MSFT")
    first = Tick(on_monday("10:00"), at_price("100"), [buy("1")])
    first.run(two.two if "anew" in when else two.one, run)
    now = on_monday("11:01") if "live" in when else None
    second = Tick(on_monday("11:00"), meddling.prices, [buy("1", "IBM")], now)
    work = partial(meddling.work, two, run)
    if when.startswith("between"):
        work()
    else:
        before_the_write(monkeypatch, work)
    if meddling.error is not None:
        with pytest.raises(meddling.error):
            second.run(two.one, run)
        assert statuses(two.owner, run) == ["FILLED"]
        told = events(two.owner, run)
        assert told.count("TICK") == (2 if meddling.error is TimeMovesForward else 1)
        return
    result = second.run(two.one, run)
    assert result.repeated == meddling.repeated
    assert (result.cash, result.equity) == (Decimal(meddling.cash), Decimal(meddling.equity))
    assert fresh(two.owner, run).cash == Decimal(meddling.cash)
    assert " ".join(statuses(two.owner, run)) == meddling.statuses
    codes = rows(two.owner, "SELECT reject_code FROM orders WHERE status = 'REJECTED'")
    assert codes == ([meddling.code] if meddling.code else [])
    told = events(two.owner, run)
    assert told.count("ORDER_REJECTED") == len(codes)
    assert told.count("EXECUTION") == meddling.statuses.count("FILLED")
    had = snapshot(two.owner)
    again = second.run(two.one, run)
    assert (again.repeated, again.cash, again.equity) == (True, result.cash, result.equity)
    assert snapshot(two.owner) == had


def before_the_write(monkeypatch: pytest.MonkeyPatch, work: Callable[[], Any]) -> None:
    """Do ``work`` once, when a tick has been worked out and is about to be written."""
    write, waiting = journal.write, [work]

    def after_work(*what: Any) -> int:
        while waiting:
            waiting.pop()()
        return write(*what)

    monkeypatch.setattr(journal, "write", after_work)


@pytest.mark.parametrize("when", WHEN[2:])
def test_a_plan_paused_before_the_write_is_left_alone_and_its_month_stays_open(
    two: Two, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    run = a_run(two.owner)
    a_plan(two.owner, run, plan="later", symbol="MSFT")
    Tick(on_monday("10:00"), BOTH).run(two.two if "anew" in when else two.one, run)
    key = run.user_id, run.run_id
    before_the_write(monkeypatch, lambda: pause_plan(two.two, *key, "later"))
    prices = BOTH | at_price("10", "MSFT")
    assert Tick(on_monday("11:00"), prices).run(two.one, run).orders == 0
    two.owner.execute("UPDATE sip_plan SET status = 'ACTIVE'")
    results = [Tick(on_monday(at), prices).run(two.one, run) for at in ("12:00", "13:00")]
    assert [result.orders for result in results] == [1, 0]
    assert events(two.owner, run).count("SIP_EXECUTED") == 1


def test_a_plan_that_somebody_adds_is_executed_at_the_next_tick(two: Two) -> None:
    run = a_run(two.owner)
    Tick(on_monday("10:00"), BOTH).run(two.one, run)
    a_plan(two.two, run)
    assert Tick(on_monday("11:00"), BOTH).run(two.one, run).executions == 1


@pytest.mark.parametrize("last", ["close", "open"])
def test_a_split_announced_between_two_ticks_is_applied_in_the_next_session(
    two: Two, last: str
) -> None:
    """Also when the tick before has looked for splits and found none."""
    run = a_run(two.owner)
    Tick(close_on(MON), BOTH, [buy("2")]).run(two.one, run)
    Tick(open_on(TUE), BOTH).run(two.one, run)
    if last == "close":
        Tick(close_on(TUE), BOTH).run(two.one, run)
    import_splits(two.owner, [Split("AAPL", date.fromisoformat(WED), Decimal(2), Decimal(1))])
    result = Tick(close_on(WED), at_price("55"), [buy("1")]).run(two.one, run)
    assert result.equity == 9_800 + 4 * 55
    assert one(two.owner, "SELECT quantity FROM position") == 5
    assert events(two.owner, run).count("SPLIT_APPLIED") == 1


def test_a_strategy_sees_the_state_that_another_process_left(two: Two, hooks: Hooks) -> None:
    run = a_run(two.owner, strategy=SCRIPTED)
    seen: list[int] = []

    def count(context: Context) -> list[Intent]:
        number = context.state.get("n", 0) + 1
        seen.append(number)
        return [Remember({"n": number})]

    hooks["on_tick"] = count
    for time, conn in (("10:00", two.one), ("10:30", two.two), ("11:00", two.one)):
        Tick(on_monday(time), {}).run(conn, run)
    # What was worked out on the first one's books was in vain.
    assert seen[-1] == 3
    assert one(two.owner, "SELECT state FROM engine_state") == {"n": 3}


def test_one_connection_may_tick_several_runs_in_turn(
    two: Two, no_steps: Callable[[], None]
) -> None:
    runs = [a_run(two.owner, user=user) for user in ("ann", "ben")]
    no_steps()
    for hour in range(10, 14):
        for run in runs:
            Tick(on_monday(f"{hour}:00"), BOTH, [buy("1")]).run(two.one, run)
    assert [fresh(two.owner, run).cash for run in runs] == [9_600, 9_600]


# The gate decides


class Refused(NamedTuple):
    order: Intent
    code: str
    limit: tuple[str, str | None, int | None] | None = None


REFUSED: list[Refused] = [
    Refused(buy("1000"), "INSUFFICIENT_CASH"),
    Refused(sell("5"), "INSUFFICIENT_POSITION"),
    Refused(sell("1", "IBM"), "INSUFFICIENT_POSITION"),
    Refused(buy("0"), "QUANTITY_NOT_POSITIVE"),
    Refused(sell("-1"), "QUANTITY_NOT_POSITIVE"),
    Refused(buy("1", limit_price="120"), "LIMIT_PRICE_NOT_ALLOWED"),
    Refused(buy("1", order_type="LIMIT"), "LIMIT_PRICE_MISSING"),
    Refused(buy("1", stop_price="120"), "STOP_PRICE_NOT_ALLOWED"),
    Refused(buy("1", order_type="STOP"), "STOP_PRICE_MISSING"),
    Refused(buy("1", order_type="STOP_LIMIT", stop_price="90"), "LIMIT_PRICE_MISSING"),
    Refused(buy("1", order_type="TRAIL"), "TRAIL_NEEDS_AMOUNT_OR_PERCENT"),
    Refused(buy("1", order_type="TRAIL", trail_amount="-1"), "TRAIL_OUT_OF_RANGE"),
    Refused(buy("1", trail_amount="1"), "TRAIL_NOT_ALLOWED"),
    Refused(buy("1", order_type="LIMIT", limit_price="-1"), "PRICE_NOT_POSITIVE"),
    Refused(
        buy("1", order_type="STOP", stop_price="90", time_in_force="OPG"),
        "ORDER_TYPE_NOT_ALLOWED_IN_AUCTION",
    ),
    Refused(buy("1", time_in_force="GTD"), "EXPIRE_AT_MISSING"),
    Refused(buy("3"), "MAX_ORDER_QUANTITY", ("MAX_ORDER_QUANTITY", None, 2)),
    Refused(buy("3"), "MAX_ORDER_NOTIONAL", ("MAX_ORDER_NOTIONAL", None, 299)),
    Refused(buy("2"), "MAX_POSITION", ("MAX_POSITION", "AAPL", 2)),
    Refused(buy("1", "IBM"), "FORBIDDEN_SYMBOL", ("FORBIDDEN_SYMBOL", "IBM", None)),
    Refused(buy("1", "IBM"), "SYMBOL_NOT_ALLOWED", ("ALLOWED_SYMBOL", "AAPL", None)),
]


@pytest.mark.parametrize(
    "refused", REFUSED, ids=[f"{number} {each.code}" for number, each in enumerate(REFUSED)]
)
def test_an_order_that_the_gate_refuses_is_stored_once_and_the_rest_goes_on(
    two: Two, hooks: Hooks, refused: Refused
) -> None:
    run = a_run(two.owner, strategy=SCRIPTED)
    if refused.limit is not None:
        limits(*refused.limit)(two, run)  # type: ignore[arg-type]
    rest: list[Intent] = [Announce("NOTED", "after it"), buy("0.5"), Remember({"n": 1})]
    hooks["on_tick"] = lambda context: [buy("1"), refused.order, *rest]
    tick = Tick(on_monday("10:00"), BOTH)
    with two.owner.transaction(force_rollback=True):
        in_steps = tick.run(two.owner, run), written(two.owner)
    result = tick.run(two.one, run)
    assert (result, written(two.owner)) == in_steps
    assert (result.orders, result.executions) == (3, 2)
    assert statuses(two.owner, run) == ["FILLED", "REJECTED", "FILLED"]
    (bad,) = rows(
        two.owner, "SELECT order_id::text, reject_code FROM orders WHERE status = 'REJECTED'"
    )
    assert bad == (str(order_ids(two.owner, run)[1]), refused.code)
    rejected = rows(
        two.owner,
        """SELECT subject, payload ->> 'reject_code' FROM event_ledger
           WHERE event_type = 'ORDER_REJECTED'""",
    )
    assert rejected == [bad]
    assert events(two.owner, run).count("NOTED") == 1
    assert one(two.owner, "SELECT state FROM engine_state") == {"n": 1}


# Crashes inside the one statement


@dataclass
class Call:
    """A call in a thread of its own, with what came of it."""

    work: Callable[[], Any]
    error: Exception | None = None
    thread: threading.Thread = field(init=False)

    def __post_init__(self) -> None:
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _run(self) -> None:
        try:
            self.work()
        except Exception as error:
            self.error = error

    def failure(self) -> Exception | None:
        self.thread.join(timeout=60)
        assert not self.thread.is_alive()
        return self.error


def about_to_buy(conn: Connection) -> Run:
    """A run that has ticked once and will buy by plan at its next tick."""
    run = a_run(conn)
    a_plan(conn, run, day_of_month=8)
    Tick(close_on(MON), BOTH).run(conn, run)
    return run


def lock_state(conn: Connection, run: Run) -> None:
    """Lock what ``ticks_write`` writes last, when the rest has been written."""
    conn.execute("SELECT FROM engine_state WHERE run_id = %s FOR UPDATE", [run.run_id])


@pytest.mark.parametrize("now", [None, close_on(TUE)], ids=["replayed", "live"])
@pytest.mark.parametrize("kept", [True, False], ids=["on kept books", "read anew"])
def test_a_backend_that_is_terminated_inside_the_write_leaves_nothing(
    dsn: str, two: Two, now: datetime | None, kept: bool
) -> None:
    run = about_to_buy(two.one if kept else two.owner)
    before = snapshot(two.owner)
    tick = Tick(close_on(TUE), BOTH, now=now)
    with two.two.transaction(force_rollback=True):
        two.two.execute("RESET ROLE")
        lock_state(two.two, run)
        call = Call(lambda: tick.run(two.one, run))
        wait_until_blocked(two.owner, two.one, by=two.two)
        two.owner.execute("SELECT pg_terminate_backend(%s)", [two.one.info.backend_pid])
        assert isinstance(call.failure(), DatabaseUnavailable)
        assert snapshot(two.owner) == before
    with open_connection(dsn, role=ENGINE_ROLE) as again:
        assert [tick.run(again, run).repeated for _ in range(2)] == [False, True]
    assert statuses(two.owner, run) == ["FILLED"]
    assert events(two.owner, run).count("TICK") == 2


def test_a_process_killed_while_it_writes_has_written_all_or_nothing(dsn: str, two: Two) -> None:
    run = about_to_buy(two.owner)
    before = counts(two.owner, run)
    command = [sys.executable, str(TICKER), dsn, TUE, TUE, f"{run.user_id}/{run.run_id}"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    with two.two.transaction(force_rollback=True):
        two.two.execute("RESET ROLE")
        lock_state(two.two, run)
        child = subprocess.Popen(command, env=environment)
        try:
            wait_until_someone_is_blocked(two.owner, by=two.two)
            (writing,) = rows(
                two.owner,
                f"""SELECT pid FROM pg_stat_activity
                    WHERE {two.two.info.backend_pid} = ANY (pg_blocking_pids(pid))""",
            )
        finally:
            child.kill()
            child.wait(60)
        assert counts(two.owner, run) == before
    wait_until(
        lambda: not rows(two.owner, f"SELECT FROM pg_stat_activity WHERE pid = {writing}"),
        "the server to be done with the dead child",
    )
    had = counts(two.owner, run)
    whole = {"orders": 1, "execution": 1, "mtm_ledger": 1, "position": 1, "event_ledger": 4}
    there = had["mtm_ledger"] - before["mtm_ledger"]
    assert there in (0, 1)
    assert {table: had[table] - before[table] for table in whole} == {
        table: number * there for table, number in whole.items()
    }
    assert_sound(two.owner)
    tick = Tick(close_on(TUE), BOTH)
    assert [tick.run(two.one, run).repeated for _ in range(2)] == [there == 1, True]
    assert statuses(two.owner, run) == ["FILLED"]
    assert events(two.owner, run).count("SIP_EXECUTED") == 1


def test_a_session_is_what_the_calendar_says_whatever_was_kept(two: Two) -> None:
    """The books that a tick leaves serve the rest of its session, not the next one."""
    run = a_run(two.owner)
    Tick(close_on(MON), BOTH, [buy("1")]).run(two.one, run)
    Tick(open_on(TUE) - timedelta(minutes=5), at_price("101")).run(two.one, run)
    split = Split("AAPL", date.fromisoformat(TUE), Decimal(3), Decimal(1))
    import_splits(two.owner, [split])
    Tick(open_on(TUE), at_price("34")).run(two.one, run)
    assert one(two.owner, "SELECT quantity FROM position") == 3
