"""Workers that share the orders: each word is applied once, an order's words by one and in turn."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from decimal import Decimal
from typing import Any
from uuid import UUID

import pytest
from broker_cases import Wire, a_broker_run
from waits import SECONDS_MAX, wait_until_someone_is_blocked

from engine.audit import audit
from engine.db.connect import ENGINE_ROLE, Connection, open_connection
from engine.inbox import Part, apply_batch, retry_held
from engine.worker import work_through

BOTH = (Part(1, 2), Part(2, 2))


@pytest.fixture
def shared(owner_conn: Connection) -> Wire:
    """A run in a database of its own, so that several connections see it."""
    return Wire(owner_conn, a_broker_run(owner_conn))


@pytest.fixture
def workers(dsn: str) -> Iterator[list[Connection]]:
    with ExitStack() as stack:
        yield [stack.enter_context(open_connection(dsn, role=ENGINE_ROLE)) for _ in BOTH]


def ordered(wire: Wire, orders: int) -> list[UUID]:
    """Orders that were sent, and everything that the broker says of them, in turns."""
    ids = [wire.place(quantity="3") for _ in range(orders)]
    for order_id in ids:
        wire.sent(order_id)
    for number in range(3):
        for place, order_id in enumerate(ids):
            if number == 0:
                wire.status(order_id, "ROUTED", broker_order_id=place + 1)
            wire.fill(order_id, "1", f"{100 + number}", f"{place}-e{number}")
    return ids


def of_part(wire: Wire, part: Part) -> set[str]:
    rows = wire.conn.execute(
        """SELECT DISTINCT coalesce(order_ref, '') FROM broker_event
           WHERE mod(hashtext(coalesce(order_ref, '')) & 2147483647, %s) = %s""",
        [part.of, part.number - 1],
    ).fetchall()
    return {ref for (ref,) in rows}


def applied_by(wire: Wire) -> set[str]:
    rows = wire.conn.execute(
        "SELECT DISTINCT order_ref FROM broker_event WHERE applied_at IS NOT NULL"
    ).fetchall()
    return {ref for (ref,) in rows}


def assert_all_filled(wire: Wire, ids: list[UUID]) -> None:
    assert [wire.order(order_id)["status"] for order_id in ids] == ["FILLED"] * len(ids)
    assert wire.position() == 3 * len(ids)
    assert wire.cash() == 100_000 - 303 * len(ids)
    waits = wire.conn.execute("SELECT count(*) FROM broker_event WHERE finding IS NULL").fetchone()
    repeats = wire.conn.execute(
        "SELECT count(*) FROM broker_event WHERE finding NOT IN ('NEW', 'STALE')"
    ).fetchone()
    assert (waits, repeats) == ((0,), (0,))
    # In sequence: what an order filled first was booked first.
    told = wire.conn.execute(
        "SELECT subject, seq FROM event_ledger WHERE event_type = 'EXECUTION' ORDER BY seq"
    ).fetchall()
    for order_id in ids:
        names = [subject[-1] for subject, _ in told if subject.startswith(str(order_id))]
        assert names == ["0", "1", "2"]
    assert audit(wire.conn) == []


def in_threads(*works: Callable[[], object]) -> None:
    """Run all at once and wait for their ends; what one raises is raised."""
    failed: list[BaseException] = []

    def run(work: Callable[[], object]) -> None:
        try:
            work()
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=run, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS_MAX)
        assert not thread.is_alive()
    assert failed == []


def test_each_part_takes_its_own_orders_and_nothing_is_left(
    shared: Wire, workers: list[Connection]
) -> None:
    ids = ordered(shared, 12)
    shares = [of_part(shared, part) for part in BOTH]
    assert all(shares)
    assert shares[0] | shares[1] == {str(order_id) for order_id in ids}
    assert not shares[0] & shares[1]
    assert work_through(workers[0], BOTH[0]).words == 4 * len(shares[0])
    assert applied_by(shared) == shares[0]
    assert work_through(workers[1], BOTH[1]).words == 4 * len(shares[1])
    assert work_through(workers[0], BOTH[0]).words == 0
    assert_all_filled(shared, ids)


def test_two_workers_at_once_apply_each_word_once_and_in_turn(
    shared: Wire, workers: list[Connection]
) -> None:
    ids = ordered(shared, 12)

    def work(conn: Connection, part: Part) -> None:
        while apply_batch(conn, shared.run.user_id, shared.account, part=part, limit=5).events:
            pass

    in_threads(*(lambda c=c, p=p: work(c, p) for c, p in zip(workers, BOTH, strict=True)))
    assert_all_filled(shared, ids)


def test_words_without_a_reference_go_to_exactly_one_part(
    shared: Wire, workers: list[Connection]
) -> None:
    numbers = [shared.say("NOTICE", code=str(code), message="") for code in range(4)]
    taken = [
        apply_batch(conn, shared.run.user_id, shared.account, part=part).events
        for conn, part in zip(workers, BOTH, strict=True)
    ]
    assert sorted(taken) == [0, 4]
    assert [shared.finding(number) for number in numbers] == [("NEW", None)] * 4


@pytest.mark.parametrize("limit", [500, 2])
def test_two_workers_with_the_same_part_apply_each_word_once(
    shared: Wire, workers: list[Connection], dsn: str, limit: int
) -> None:
    ids = ordered(shared, 4)
    first, second = workers
    done: list[int] = []

    def work(conn: Connection) -> None:
        taken = 0
        while events := apply_batch(conn, *about, limit=limit).events:
            taken += events
        done.append(taken)

    about = (shared.run.user_id, shared.account)
    with open_connection(dsn) as watch:
        with first.transaction():
            held = apply_batch(first, *about, limit=limit).events
            thread = threading.Thread(target=work, args=(second,))
            thread.start()
            # The second has read the same words, and waits for the run that the first has locked.
            wait_until_someone_is_blocked(watch, by=first)
        work(first)
        thread.join(SECONDS_MAX)
        assert not thread.is_alive()
    assert held == min(limit, 16)
    assert held + sum(done) == 16
    assert_all_filled(shared, ids)


def test_a_poisoned_word_that_another_worker_sets_aside_costs_no_other_word(
    shared: Wire, workers: list[Connection], dsn: str
) -> None:
    order_id = shared.place(quantity="3")
    shared.sent(order_id)
    poison = shared.fill(order_id, "1.123456789", "100", "poison")  # nine decimals
    good = shared.fill(order_id, "3", "101", "good")
    about = (shared.run.user_id, shared.account)
    with open_connection(dsn) as watch, watch.transaction():
        watch.execute("SELECT FROM strategy_run FOR UPDATE")
        threads = [
            threading.Thread(target=work_through, args=(conn,), daemon=True) for conn in workers
        ]
        for thread in threads:
            thread.start()
        with open_connection(dsn) as other:
            wait_until_someone_is_blocked(other, by=watch)
    for thread in threads:
        thread.join(SECONDS_MAX)
        assert not thread.is_alive()
    assert apply_batch(workers[0], *about).events == 0
    assert shared.finding(poison) == ("REFUSED", "EVENT_REFUSED")
    assert shared.finding(good) == ("NEW", None)
    assert shared.order(order_id)["status"] == "FILLED"
    assert shared.alerts() == ["EVENT_REFUSED"]


def test_a_commission_that_a_race_left_held_is_tried_again(
    shared: Wire, workers: list[Connection]
) -> None:
    """It names no order, so another worker may hold it while its execution is being booked."""
    ordered(shared, 1)
    work_through(workers[0])
    facts: dict[str, Any] = {"execution_id": "0-e0", "amount": "1.5", "currency": "USD"}
    number = shared.say("COMMISSION", **facts)
    shared.conn.execute(
        "UPDATE broker_event SET finding = 'HELD', applied_at = now() WHERE number = %s", [number]
    )
    about = (shared.run.user_id, shared.account)
    assert retry_held(workers[1], *about) == 1
    assert shared.finding(number) == ("NEW", None)
    assert retry_held(workers[1], *about) == 0
    assert shared.cash() == Decimal("100000") - 303 - Decimal("1.5")
    assert audit(shared.conn) == []
