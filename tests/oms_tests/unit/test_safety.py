"""What keeps trading safe: limits, breakers, walls."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from connector_cases import Desk, Wire, connector

from engine.brokers.throttle import Free, Throttle
from engine.db.connect import Connection

ENGINE = Path(__file__).parents[3] / "engine"


class _Seconds:
    """A clock that moves when it is told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def _send(throttle: Throttle, seconds: _Seconds, count: int, *, is_order: bool) -> list[float]:
    """Send as fast as the throttle allows; returns when each went."""
    sent = []
    for _ in range(count):
        while delay := throttle.delay(seconds(), is_order=is_order):
            seconds.now += delay
        throttle.note(seconds(), is_order=is_order)
        sent.append(seconds())
    return sent


def _most_in_a_second(sent: list[float]) -> int:
    """How many went in any one second, wherever it begins."""
    return max(sum(start <= at < start + 1 for at in sent) for start in sent)


@pytest.mark.scenario("SAFETY-02")
@pytest.mark.scenario("OMS-THROTTLE")
def test_max_orders_per_second_queues_and_throttles(dsn: str, owner_conn: Connection) -> None:
    desk, wire = Desk(owner_conn, orders_per_second=5, messages_per_second=100), Wire()
    with connector(dsn, desk, wire):
        refs = desk.submits(12)
        told = desk.wait_for("THROTTLED", 7)
        (cancelled,) = desk.orders(1)
        desk.command("CANCEL", cancelled)
        desk.wake()
        desk.wait_until_done()
    assert wire.refs("SUBMIT") == refs, "in the order of their arrival"
    at = [when for when, kind, _ in wire.sent if kind == "SUBMIT"]
    assert _most_in_a_second(at) == 5
    assert wire.refs().index(str(cancelled)) <= 10, "a cancel waits for no order"
    assert len(told) == len(desk.events("THROTTLED")) == 7, "each is told once"
    assert {each["code"] for each in told} == {"THROTTLED"}
    assert [round(float(each["wait_seconds"])) for each in told] == [1] * 5 + [2] * 2
    assert desk.rows(
        """SELECT array_agg(order_ref ORDER BY number) FROM broker_event
           WHERE user_id = %s AND kind = 'THROTTLED'"""
    ) == [(refs[5:],)]


@pytest.mark.scenario("RATE-01")
def test_rate_limit_50_orders_per_second_throttles_extra() -> None:
    seconds = _Seconds()
    throttle = Throttle(orders_per_second=1000, messages_per_second=50)
    sent = _send(throttle, seconds, 60, is_order=True)
    assert sent[:50] == [1000.0] * 50
    assert all(at >= 1001.0 for at in sent[50:])
    assert throttle.free(seconds()) == Free(40, 40)


def test_the_throttle_is_exact_over_ten_seconds_and_in_every_second() -> None:
    for limit in (1, 7, 50, 200):
        seconds = _Seconds()
        sent = _send(Throttle(limit, 1000), seconds, 10 * limit, is_order=True)
        assert _most_in_a_second(sent) <= limit
        assert 9 <= sent[-1] - sent[0] <= 9 * 1.01


def test_orders_that_trickle_in_are_not_held_back_by_a_burst_long_ago() -> None:
    seconds = _Seconds()
    throttle = Throttle(2, 10)
    for at in (0.0, 0.6, 1.1, 1.7):
        seconds.now = 1000 + at
        assert throttle.delay(seconds(), is_order=True) == 0, at
        throttle.note(seconds(), is_order=True)
    assert throttle.delay(1001.7, is_order=True) == pytest.approx(0.4, abs=0.01)


def test_a_cancel_is_a_message_and_no_order() -> None:
    throttle = Throttle(1, 3)
    throttle.note(0.0, is_order=True)
    assert throttle.free(0.0) == Free(2, 0)
    assert throttle.limits_orders(0.0)
    throttle.note(0.0, is_order=False)
    throttle.note(0.0, is_order=False)
    assert throttle.free(0.0) == Free(0, 0)
    assert not throttle.limits_orders(0.0)


def test_a_restart_remembers_the_last_second() -> None:
    throttle = Throttle(3, 10)
    throttle.resume(1000.0, [(0.2, True), (0.9, True), (5.0, True), (0.1, False)])
    assert throttle.free(1000.0) == Free(7, 1)
    assert throttle.free(1000.11) == Free(8, 2)


def test_a_restart_of_the_process_remembers_the_last_second(
    dsn: str, owner_conn: Connection
) -> None:
    desk, wire = Desk(owner_conn, orders_per_second=4, messages_per_second=100), Wire()
    for _ in range(2):
        with connector(dsn, desk, wire):
            desk.submits(4)
            desk.wait_until_done()
    assert _most_in_a_second([at for at, *_ in wire.sent]) == 4
    assert len(wire.sent) == 8


# --- The wall between engine and brokers ------------------------------------------------------


def _imports(path: Path) -> Iterator[str]:
    """What a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module
            yield from (f"{node.module}.{name.name}" for name in node.names)


# What speaks to brokers. What the engine may know of them are the words that both use.
ADAPTERS = (
    "engine.brokers.conversation",
    "engine.brokers.dummy",
    "engine.brokers.ibkr",
    "engine.brokers.registry",
    "engine.brokers.store",
    "ib_async",
    "ib_insync",
)


@pytest.mark.scenario("BOUNDARY-02")
def test_engine_never_calls_broker_api_directly(conn: Connection) -> None:
    looked = 0
    for path in ENGINE.rglob("*.py"):
        if path.is_relative_to(ENGINE / "brokers"):
            continue
        looked += 1
        assert [name for name in _imports(path) if name.startswith(ADAPTERS)] == [], path
    assert looked > 30
    rights = conn.execute(
        """SELECT has_any_column_privilege('oms_engine', 'broker_event', 'INSERT'),
                  bool_or(has_function_privilege('oms_engine', oid, 'EXECUTE'))
           FROM pg_proc WHERE pronamespace = 'public'::regnamespace
             AND proname IN ('lease_take', 'commands_claim', 'commands_done')"""
    ).fetchone()
    assert rights == (False, False), "the engine can't pretend to have heard a broker"
