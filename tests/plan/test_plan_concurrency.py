"""CC: ticks, stops and writes by hand at once; each race is made to happen, not hoped for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import Any
from uuid import UUID

import psycopg
import pytest
from market_days import (
    MON,
    TUE,
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
    one,
    order_ids,
    rows,
    statuses,
    waiting_for_advisory_locks,
)
from scripted import LOCK, SCRIPTED, Hooks, hooks
from waits import wait_until, wait_until_blocked

from engine.db.connect import ENGINE_ROLE, Connection, open_connection
from engine.errors import IllegalRunMove, RunNotRunning, StrategyFailed
from engine.market.calendar import ensure_sessions
from engine.runs import Run, fail_run
from engine.stop import stop_run
from engine.tick import TickResult, place_orders, run_tick

__all__ = ["audited", "hooks"]

TICKER = Path(__file__).parent / "tick_child.py"
RESTING = buy("1", order_type="LIMIT", time_in_force="GTC", limit_price="10")


@dataclass
class Two:
    """Two connections as the engine, and one to look at them."""

    one: Connection
    two: Connection
    watch: Connection

    def wait(self) -> None:
        """Until the second waits for the first."""
        wait_until_blocked(self.watch, self.two, by=self.one)


@pytest.fixture
def both(dsn: str) -> Iterator[Two]:
    with (
        open_connection(dsn, role=ENGINE_ROLE) as first,
        open_connection(dsn, role=ENGINE_ROLE) as second,
        open_connection(dsn) as watch,
    ):
        yield Two(first, second, watch)


@dataclass
class Call:
    """A call in a thread of its own, with what came of it."""

    work: Callable[[], Any]
    result: Any = None
    error: Exception | None = None
    thread: threading.Thread = field(init=False)

    def __post_init__(self) -> None:
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _run(self) -> None:
        try:
            self.result = self.work()
        except Exception as error:
            self.error = error

    def outcome(self) -> Any:
        self.thread.join(timeout=60)
        assert not self.thread.is_alive()
        if self.error is not None:
            raise self.error
        return self.result


def tick(conn: Connection, run: Run, day: str = MON) -> TickResult:
    return run_tick(
        conn, run.user_id, run.run_id, close_on(day), at_price("100"), intents=[RESTING]
    )


@pytest.mark.scenario("CC-01")
def test_a_stop_waits_for_the_tick_that_is_under_way(both: Two) -> None:
    run = a_run(both.one)
    a_plan(both.one, run)
    with both.one.transaction():
        tick(both.one, run)
        stop = Call(lambda: stop_run(both.two, run.user_id, run.run_id))
        both.wait()
        assert fresh(both.watch, run).status == "RUNNING"
        assert counts(both.watch, run)["orders"] == 0
    assert stop.outcome().status == "STOPPED"
    assert fresh(both.watch, run).status == "STOPPED"
    assert statuses(both.watch, run) == ["FILLED", "CANCELED"]
    assert events(both.watch, run)[-3:] == ["TICK", "ORDER_CANCELED", "RUN_STOPPED"]
    assert counts(both.watch, run)["mtm_ledger"] == 1


@pytest.mark.scenario("CC-01")
@pytest.mark.parametrize("commit", [True, False], ids=["committed", "rolled back"])
def test_a_tick_waits_for_the_stop_that_is_under_way(both: Two, commit: bool) -> None:
    run = a_run(both.one)
    a_plan(both.one, run)
    with both.one.transaction(force_rollback=not commit):
        stop_run(both.one, run.user_id, run.run_id)
        ticking = Call(lambda: tick(both.two, run))
        both.wait()
    if not commit:
        assert ticking.outcome().orders == 2
        assert fresh(both.watch, run).status == "RUNNING"
        return
    with pytest.raises(RunNotRunning, match="STOPPED"):
        ticking.outcome()
    assert fresh(both.watch, run).status == "STOPPED"
    had = counts(both.watch, run)
    assert {t for t, n in had.items() if n} == {"engine_status", "event_ledger", "sip_plan"}
    assert events(both.watch, run) == ["RUN_STOPPED"]


@pytest.mark.scenario("CC-01")
def test_the_plan_word_for_word_one_locks_the_run_row_the_other_updates_its_status(
    both: Two,
) -> None:
    run = a_run(both.one)
    with both.one.transaction():
        both.one.execute("SELECT 1 FROM strategy_run WHERE run_id = %s FOR UPDATE", [run.run_id])
        update = Call(
            lambda: both.two.execute(
                "UPDATE strategy_run SET status = 'STOPPED' WHERE run_id = %s", [run.run_id]
            )
        )
        both.wait()
        tick(both.one, run)
    update.outcome()
    assert fresh(both.watch, run).status == "STOPPED"
    assert statuses(both.watch, run) == ["CANCELED"]
    assert events(both.watch, run)[-1] == "RUN_STOPPED"


@pytest.mark.scenario("CC-01")
@pytest.mark.scenario("RL-02")
@pytest.mark.parametrize(
    ("table", "more"),
    [
        ("engine_state", {}),
        ("engine_status", {"lag_seconds": 1}),
        ("paper_order", {"symbol": "AAPL", "side": "BUY", "quantity": 1}),
        ("paper_trade", {"quantity": 1, "price": 10}),
        ("mtm_ledger", {}),
        ("event_ledger", {"event_type": "NOTE"}),
        ("paper_equity_curve", {}),
    ],
)
def test_no_write_slips_in_while_a_stop_commits(
    both: Two, table: str, more: dict[str, Any]
) -> None:
    run = a_run(both.watch)
    place_orders(both.watch, run.user_id, run.run_id, close_on(MON), at_price("100"), [RESTING])
    given: dict[str, Any] = {"user_id": run.user_id, "run_id": run.run_id} | more
    if table == "paper_trade":
        given["order_id"] = order_ids(both.watch, run)[0]
    before = one(both.watch, f"SELECT count(*) FROM {table}")
    # Checked before the stop and written after it, it would be a write into a stopped run.
    with both.one.transaction():
        both.one.execute(
            "UPDATE strategy_run SET status = 'STOPPED' WHERE run_id = %s", [run.run_id]
        )
        insert = Call(
            lambda: both.two.execute(
                f"INSERT INTO {table} ({', '.join(given)})"
                f" VALUES ({', '.join(['%s'] * len(given))})",
                [*given.values()],
            )
        )
        both.wait()
    with pytest.raises(psycopg.IntegrityError) as caught:
        insert.outcome()
    assert caught.value.sqlstate == "23T03"
    more_events = 2 if table == "event_ledger" else 0  # the stop's own: CANCELED and STOPPED
    assert one(both.watch, f"SELECT count(*) FROM {table}") == before + more_events


@pytest.mark.scenario("CC-01")
@pytest.mark.parametrize("first", ["the stop", "the failure"])
def test_a_strategy_that_fails_while_a_stop_waits_ends_the_run_once(
    both: Two, hooks: Hooks, monkeypatch: pytest.MonkeyPatch, first: str
) -> None:
    """Once the failed tick is taken back, the run's row is free: either may have it first."""
    run = a_run(both.one, strategy=SCRIPTED)
    stops: list[Call] = []
    asked = iter(["worked out without a lock", "again, in steps"])

    def fail_once_somebody_waits(context: object) -> None:
        if next(asked) == "again, in steps" and first == "the stop":
            stops.append(Call(lambda: stop_run(both.two, run.user_id, run.run_id)))
            both.wait()
        raise RuntimeError("too late")

    def wait_for_the_stop(*what: Any) -> Run:
        for stop in stops:
            stop.outcome()
        return fail_run(*what)

    hooks["on_tick"] = fail_once_somebody_waits
    monkeypatch.setattr("engine.tick.fail_run", wait_for_the_stop)
    with pytest.raises(StrategyFailed, match="too late"):
        tick(both.one, run)
    error = one(both.watch, "SELECT last_error FROM engine_status WHERE :run", run)
    if first == "the stop":
        assert fresh(both.watch, run).status == "STOPPED"
        assert events(both.watch, run) == ["RUN_STOPPED"]
        assert error is None
    else:
        with pytest.raises(IllegalRunMove):
            stop_run(both.two, run.user_id, run.run_id)
        assert fresh(both.watch, run).status == "ERROR"
        assert events(both.watch, run) == ["RUN_FAILED", "RUN_ERROR"]
        assert "too late" in error


@pytest.mark.scenario("CC-02")
@pytest.mark.parametrize("commit", [True, False], ids=["committed", "rolled back"])
def test_of_two_ticks_at_once_one_wins(both: Two, commit: bool) -> None:
    run = a_run(both.one)
    a_plan(both.one, run)
    with both.one.transaction(force_rollback=not commit):
        first = tick(both.one, run)
        ticking = Call(lambda: tick(both.two, run))
        both.wait()
    second = ticking.outcome()
    assert (first.repeated, second.repeated) == (False, commit)
    assert (second.orders, second.equity) == (first.orders, first.equity)
    assert events(both.watch, run).count("SIP_EXECUTED") == 1
    assert events(both.watch, run).count("TICK") == 1
    assert statuses(both.watch, run) == ["FILLED", "PENDING"]
    assert counts(both.watch, run)["mtm_ledger"] == 1


@pytest.mark.scenario("CC-02")
def test_ticks_of_two_runs_do_not_wait_for_each_other(both: Two) -> None:
    ann, ben = a_run(both.one), a_run(both.one, user="ben")
    ensure_sessions(both.watch, "XNYS", date(2001, 1, 1), date(2001, 12, 31))
    with both.one.transaction():
        tick(both.one, ann)
        both.two.execute("SET lock_timeout = '1s'")
        assert not tick(both.two, ben).repeated
    assert statuses(both.watch, ann) == statuses(both.watch, ben) == ["PENDING"]


def start_children(dsn: str, watch: Connection, last: str, runs: list[Run]) -> list[Any]:
    """Two processes that tick all these runs, both waiting to be let go."""
    command = [sys.executable, str(TICKER), dsn, MON, last]
    children = [
        subprocess.Popen(
            [*command, *(f"{run.user_id}/{run.run_id}" for run in runs)],
            stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        )
        for _ in range(2)
    ]
    wait_until(
        lambda: (
            any(child.poll() is not None for child in children)
            or waiting_for_advisory_locks(watch) == 2
        ),
        "both children to be ready",
    )
    return children


def told(children: list[Any]) -> dict[str, int]:
    """What the children printed, added up."""
    sums: dict[str, int] = {"written": 0, "repeated": 0, "stopped": 0}
    for child in children:
        output, _ = child.communicate(timeout=60)
        assert child.returncode == 0
        for name, number in json.loads(output).items():
            sums[name] += number
    return sums


@pytest.mark.scenario("CC-02")
def test_two_processes_ticking_the_same_sessions_write_each_once(dsn: str, both: Two) -> None:
    ensure_sessions(both.watch, "XNYS", date(2001, 1, 1), date(2001, 12, 31))
    run = a_run(both.watch, cash="100000")
    for day in range(1, 29, 3):
        a_plan(both.watch, run, plan=f"day {day}", day_of_month=day, amount=Decimal(day))
    both.one.execute("SELECT pg_advisory_lock(%s)", [LOCK])
    children = start_children(dsn, both.watch, "2001-07-31", [run])
    both.one.execute("SELECT pg_advisory_unlock(%s)", [LOCK])
    sums = told(children)
    sessions = one(
        both.watch,
        "SELECT count(*) FROM calendar_session"
        f" WHERE session_date BETWEEN '{MON}' AND '2001-07-31' AND calendar = 'XNYS'",
    )
    assert sums == {"written": sessions, "repeated": sessions, "stopped": 0}
    happened = events(both.watch, run)
    assert happened.count("TICK") == counts(both.watch, run)["mtm_ledger"] == sessions
    assert happened.count("RUN_STARTED") == 1
    occasions = rows(
        both.watch, "SELECT subject FROM event_ledger WHERE event_type = 'SIP_EXECUTED'"
    )
    # Ten plans in May (from day 1 on: the first tick comes late, not never), June and July.
    assert len(occasions) == len(set(occasions)) == 30
    assert happened.count("EXECUTION") == 30


@pytest.mark.scenario("CC-01")
def test_stops_in_the_middle_of_ticking_processes_leave_whole_ticks(dsn: str, both: Two) -> None:
    ensure_sessions(both.watch, "XNYS", date(2001, 1, 1), date(2001, 12, 31))
    runs = [a_run(both.watch, user=f"user {number}") for number in range(8)]
    for run in runs:
        a_plan(both.watch, run)
        place_orders(both.watch, run.user_id, run.run_id, close_on("2001-05-04"), {}, [RESTING])
    both.one.execute("SELECT pg_advisory_lock(%s)", [LOCK])
    children = start_children(dsn, both.watch, "2001-11-30", runs)
    both.one.execute("SELECT pg_advisory_unlock(%s)", [LOCK])
    for number, run in enumerate(runs):
        ticks = f"SELECT count(*) FROM mtm_ledger WHERE run_id = '{run.run_id}'"
        wait_until(lambda t=ticks, n=number: one(both.watch, t) > 1 + n, "a run to tick")  # type: ignore[misc]
        end = stop_run if number % 2 else fail
        end(both.two, run.user_id, run.run_id)
    assert told(children)["stopped"] == 2 * len(runs)
    for number, run in enumerate(runs):
        ended = "STOPPED" if number % 2 else "ERROR"
        assert fresh(both.watch, run).status == ended
        happened = events(both.watch, run)
        assert happened[-1] == f"RUN_{ended}"
        assert happened.count("TICK") == counts(both.watch, run)["mtm_ledger"]
        # The tick before the end is whole, and nothing of the next one is there.
        ending = 3 if ended == "ERROR" else 2
        assert happened[-ending - 1] == "TICK"
        assert set(statuses(both.watch, run)) <= {"FILLED", "CANCELED"}
    assert_sound(both.watch)


def fail(conn: Connection, user_id: UUID, run_id: UUID) -> Run:
    return fail_run(conn, user_id, run_id, "a fault", close_on(TUE))
