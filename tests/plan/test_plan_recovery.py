"""IR and FI: a tick happens once, or not at all; also when its process is killed inside it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from market_days import (
    MON,
    TUE,
    WED,
    a_plan,
    a_run,
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
    snapshot,
    statuses,
    waiting_for_advisory_locks,
)
from scripted import BLOCKING, LOCK, SCRIPTED, Hooks, hooks
from waits import wait_until

from engine import journal, ledger
from engine.db.connect import ENGINE_ROLE, Connection, open_connection
from engine.errors import AlreadyHappened
from engine.orders import write
from engine.tick import log_mtm, place_orders, run_tick, try_execute_sip

__all__ = ["audited", "hooks"]

CRASHER = Path(__file__).parent / "crash_child.py"
BOTH = at_price("100") | at_price("50", "IBM")


class Crash(Exception):
    """What goes wrong in these tests."""


@pytest.mark.scenario("IR-01")
def test_the_second_tick_at_a_time_changes_nothing_and_tells_the_same(conn: Connection) -> None:
    run = a_run(conn)
    a_plan(conn, run)
    first = run_tick(conn, run.user_id, run.run_id, close_on(MON), BOTH, intents=[buy("1", "IBM")])
    before, had = snapshot(conn), counts(conn, run)
    again = run_tick(
        conn, run.user_id, run.run_id, close_on(MON), at_price("7"), intents=[buy("9", "IBM")]
    )
    assert counts(conn, run) == had
    assert snapshot(conn) == before
    assert (first.repeated, again.repeated) == (False, True)
    for name in ("logical_time", "orders", "executions", "cash", "market_value", "equity"):
        assert getattr(again, name) == getattr(first, name)


@pytest.mark.scenario("IR-01")
def test_an_older_tick_is_still_told_after_newer_ones(conn: Connection) -> None:
    run = a_run(conn)
    ticks = [
        run_tick(conn, run.user_id, run.run_id, close_on(day), at_price("100"), intents=[buy("1")])
        for day in (MON, TUE, WED)
    ]
    before = snapshot(conn)
    again = run_tick(conn, run.user_id, run.run_id, close_on(MON), at_price("100"))
    assert (again.repeated, again.cash) == (True, ticks[0].cash)
    assert snapshot(conn) == before


@pytest.mark.scenario("IR-02")
def test_what_is_raised_in_the_middle_of_a_transaction_takes_all_of_it_back(
    conn: Connection,
) -> None:
    run = a_run(conn)
    a_plan(conn, run)
    before = snapshot(conn)

    def crash_after_three_calls() -> None:
        with conn.transaction():
            key = run.user_id, run.run_id
            assert try_execute_sip(conn, *key, close_on(MON), BOTH) == 1
            place_orders(conn, *key, close_on(MON), BOTH, [buy("1", "IBM")])
            run_tick(conn, *key, close_on(MON), BOTH)
            assert counts(conn, run)["execution"] == 2
            raise Crash

    with pytest.raises(Crash):
        crash_after_three_calls()
    assert snapshot(conn) == before


def a_fault(name: str, after: bool) -> Callable[[pytest.MonkeyPatch], None]:
    """Make one of the functions that write raise, before or after it has written."""
    module, function = name.split(".")
    home = {"write": write, "ledger": ledger, "journal": journal}[module]

    def inject(patch: pytest.MonkeyPatch) -> None:
        whole = getattr(home, function)

        def broken(*args: Any, **more: Any) -> None:
            if after:
                whole(*args, **more)
            raise Crash

        patch.setattr(home, function, broken)

    return inject


FAULTS = [
    (f"{name} {'done' if after else 'not done'}", a_fault(name, after))
    for name in (
        "write.insert_orders",
        "write.insert_executions",
        "write.move_orders",
        "journal.write",
        "ledger.append",
    )
    for after in (False, True)
]


@pytest.mark.scenario("IR-02")
@pytest.mark.scenario("IR-03")
@pytest.mark.parametrize("inject", [f for _, f in FAULTS], ids=[name for name, _ in FAULTS])
def test_a_fault_at_any_step_leaves_nothing_and_the_retry_happens_once(
    conn: Connection,
    monkeypatch: pytest.MonkeyPatch,
    inject: Callable[[pytest.MonkeyPatch], None],
) -> None:
    run = a_run(conn)
    a_plan(conn, run)
    resting = buy("1", "IBM", order_type="LIMIT", limit_price="40")

    def tick() -> bool:
        return run_tick(
            conn,
            run.user_id,
            run.run_id,
            close_on(MON),
            BOTH,
            intents=[resting],
            now=close_on(MON),
        ).repeated

    before = snapshot(conn)
    with monkeypatch.context() as patch:
        inject(patch)
        with pytest.raises(Crash):
            tick()
    assert snapshot(conn) == before
    assert [tick(), tick()] == [False, True]
    assert events(conn, run) == [
        "RUN_STARTED",
        "ORDER_PLACED",
        "EXECUTION",
        "SIP_EXECUTED",
        "ORDER_PLACED",
        "ORDER_PENDING",
        "TICK",
    ]
    assert statuses(conn, run) == ["FILLED", "PENDING"]


@pytest.mark.scenario("IR-03")
def test_a_retry_makes_the_same_rows_as_if_nothing_had_happened(
    conn: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = a_run(conn)
    a_plan(conn, run)

    def tick() -> None:
        run_tick(conn, run.user_id, run.run_id, close_on(MON), BOTH)

    with conn.transaction(force_rollback=True):
        tick()
        undisturbed = snapshot(conn)
    with monkeypatch.context() as patch:
        a_fault("journal.write", after=True)(patch)
        with pytest.raises(Crash):
            tick()
    tick()
    # To the last byte: ids, numbers and hashes; the transaction, and with it now(), is the same.
    assert snapshot(conn) == undisturbed


@pytest.fixture
def crashed(dsn: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Connection, Any]]:
    """A run, and the backend of a process that was killed in the middle of its first tick."""
    monkeypatch.setenv("OMS_TEST_LOCK_DSN", dsn)
    with open_connection(dsn) as owner, open_connection(dsn) as holder:
        run = a_run(owner, strategy=BLOCKING)
        # The sessions are stored first, so that the child need not import the calendar library.
        with owner.transaction():
            run_tick(owner, run.user_id, run.run_id, close_on("2001-05-04"), {})
        holder.execute("SELECT pg_advisory_lock(%s)", [LOCK])
        child = subprocess.Popen(
            [sys.executable, str(CRASHER), dsn, str(run.user_id), str(run.run_id), MON],
            cwd=Path(__file__).parents[2],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        )
        try:
            wait_until(
                lambda: child.poll() is not None or waiting_for_advisory_locks(owner),
                "the child to be inside its tick",
            )
            assert child.poll() is None, "the child ended before it was killed"
            # It has written: an order and an execution wait for a commit that won't come.
            writing = rows(
                owner,
                """SELECT pid FROM pg_stat_activity
                   WHERE state = 'idle in transaction' AND backend_xid IS NOT NULL""",
            )
            assert len(writing) == 1
        finally:
            os.kill(child.pid, signal.SIGKILL)
            child.wait()
        holder.execute("SELECT pg_advisory_unlock(%s)", [LOCK])
        wait_until(
            lambda: not rows(owner, f"SELECT 1 FROM pg_stat_activity WHERE pid = {writing[0]}"),
            "the server to notice that the child is dead",
        )
        yield owner, run


@pytest.mark.scenario("IR-02")
@pytest.mark.scenario("IR-03")
def test_a_process_killed_inside_its_tick_leaves_nothing_and_the_retry_happens_once(
    crashed: tuple[Connection, Any],
) -> None:
    conn, run = crashed
    assert counts(conn, run)["orders"] == counts(conn, run)["execution"] == 0
    assert events(conn, run) == ["RUN_STARTED", "TICK"]
    assert fresh(conn, run).cash == 10_000
    results = [
        run_tick(conn, run.user_id, run.run_id, close_on(MON), BOTH).repeated for _ in range(2)
    ]
    assert results == [False, True]
    assert statuses(conn, run) == ["FILLED", "FILLED"]
    assert events(conn, run).count("EXECUTION") == 2
    assert events(conn, run).count("TICK") == 2
    assert counts(conn, run)["mtm_ledger"] == 2
    assert fresh(conn, run).cash == 9_850


@pytest.mark.scenario("FI-01")
def test_a_plan_in_one_transaction_and_its_mark_in_another(dsn: str) -> None:
    with open_connection(dsn, role=ENGINE_ROLE) as conn:
        run = a_run(conn)
        a_plan(conn, run)
        key = run.user_id, run.run_id
        with conn.transaction():
            assert try_execute_sip(conn, *key, close_on(MON), at_price("100")) == 1
        with open_connection(dsn) as other:
            assert counts(other, run)["execution"] == 1
            assert rows(other, "SELECT 1 FROM mtm_ledger") == []
            assert rows(other, "SELECT 1 FROM paper_equity_curve") == []

        def crash_while_marking() -> None:
            with conn.transaction():
                log_mtm(conn, *key, close_on(MON), at_price("110"))
                raise Crash

        with pytest.raises(Crash):
            crash_while_marking()
        assert rows(conn, "SELECT 1 FROM mtm_ledger") == []
        with conn.transaction():
            equity = log_mtm(conn, *key, close_on(MON), at_price("110"))
        before = snapshot(conn)
        assert log_mtm(conn, *key, close_on(MON), at_price("120")) == equity == 10_050
        assert snapshot(conn) == before
        assert one(conn, "SELECT count(*) FROM mtm_ledger WHERE :run", run) == 1
        assert one(conn, "SELECT logical_time, equity FROM mtm_ledger WHERE :run", run) == (
            close_on(MON),
            equity,
        )
        assert events(conn, run).count("SIP_EXECUTED") == 1


@pytest.mark.scenario("FI-01")
def test_a_tick_after_its_own_mark_is_refused_whole(conn: Connection) -> None:
    """The mark is history: a tick that trades after it would contradict it."""
    run = a_run(conn)
    log_mtm(conn, run.user_id, run.run_id, close_on(MON), at_price("100"))
    before = snapshot(conn)
    with pytest.raises(AlreadyHappened):
        run_tick(conn, run.user_id, run.run_id, close_on(MON), at_price("100"), intents=[buy("1")])
    assert snapshot(conn) == before
    run_tick(conn, run.user_id, run.run_id, close_on(TUE), at_price("100"), intents=[buy("1")])
    assert statuses(conn, run) == ["FILLED"]


@pytest.mark.scenario("IR-02")
def test_a_strategy_that_raises_after_its_first_fill_leaves_no_fill(
    conn: Connection, hooks: Hooks
) -> None:
    run = a_run(conn, strategy=SCRIPTED)
    before = snapshot(conn)

    def crash(*_: object) -> None:
        raise Crash

    hooks.update(on_tick=lambda context: [buy("1")], on_fill=crash)
    with pytest.raises(Exception, match="Crash"):
        run_tick(conn, run.user_id, run.run_id, close_on(MON), at_price("100"))
    after = snapshot(conn)
    for table in ("orders", "execution", "position", "mtm_ledger", "engine_state"):
        assert after[table] == before[table], table
    assert events(conn, run) == ["RUN_FAILED", "RUN_ERROR"]
    assert order_ids(conn, run) == []
