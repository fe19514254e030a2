"""The dummy exchange as a real process: its adapter over a real socket, kills, signals, speed."""

from __future__ import annotations

import asyncio
import json
import subprocess
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from exchange import ExchangeProcess, order, running_exchange
from floor import Floor, explained
from programs import environment, oms_process

from engine.brokers.dummy.adapter import DummyBroker
from engine.brokers.dummy.control import Control
from engine.brokers.dummy.wire import decode, encode, order_on_wire
from engine.brokers.protocol import (
    Broker,
    BrokerOrder,
    BrokerUnavailable,
    Message,
    MessageKind,
    Position,
)
from engine.errors import BadInput

SECONDS_MAX = 60
FILLS = 5_000
OPEN_ORDERS = 5_000


@pytest.fixture
def exchange(tmp_path: Path) -> Iterator[ExchangeProcess]:
    with running_exchange(tmp_path / "exchange") as started:
        yield started


def go(act: Awaitable[None]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(SECONDS_MAX):
            await act

    asyncio.run(bounded())


async def until(messages: AsyncIterator[Message], true: Callable[[Message], bool]) -> list[Message]:
    """What is heard up to the message that is waited for."""
    heard = []
    async for message in messages:
        heard.append(message)
        if true(message):
            return heard
    raise AssertionError(f"the broker ended with {heard[-1:]}")


def says(status: str, given: BrokerOrder) -> Callable[[Message], bool]:
    return lambda message: (
        message.order_ref == given.order_ref and message.payload.get("status") == status
    )


def test_an_order_over_a_real_socket(exchange: ExchangeProcess) -> None:
    async def act() -> None:
        broker: Broker = exchange.adapter()
        assert await broker.connect() == "DU1"
        messages = broker.messages()
        given = order(quantity="10.25", limit_price="100.0001")
        await broker.submit(given)
        heard = await until(messages, says("FILLED", given))
        assert [message.kind for message in heard] == [
            MessageKind.CONNECTED,
            MessageKind.ORDER_STATUS,
            MessageKind.ORDER_STATUS,
            MessageKind.EXECUTION,
            MessageKind.COMMISSION,
            MessageKind.ORDER_STATUS,
        ]
        execution = heard[3]
        assert execution.payload["quantity"] == "10.25"
        assert execution.event_at.utcoffset() == timedelta(0)
        assert execution.broker_order_id == 1

        snapshot = await broker.snapshot(None)
        assert snapshot.positions == [Position("AAPL", Decimal("10.25"), Decimal(100))]
        assert snapshot.cash == {"USD": Decimal("1000000") - 1025 - Decimal("0.05125")}
        assert [each.order for each in snapshot.closed_orders] == [given]
        assert snapshot.open_orders == []
        assert [each.kind for each in snapshot.executions] == ["EXECUTION", "COMMISSION"]
        assert snapshot.executions[0] == execution
        await broker.close()
        await broker.close()

    go(act())


def test_an_order_of_every_kind_comes_back_as_it_was_sent(exchange: ExchangeProcess) -> None:
    async def act() -> None:
        broker = exchange.adapter()
        await broker.connect()
        end = datetime.now(UTC).replace(microsecond=123) + timedelta(days=3)
        sent = [
            order(limit_price="0.00000001", time_in_force="GTC"),
            order("SELL", order_type="STOP", stop_price="99.5"),
            order(order_type="STOP_LIMIT", stop_price="110", limit_price="111.123456"),
            order("SELL", order_type="TRAIL", trail_amount="7"),
            order(order_type="TRAIL", trail_percent="2.5", time_in_force="GTC"),
            order(limit_price="1", time_in_force="GTD", expire_at=end),
        ]
        for given in sent:
            await broker.submit(given)
        await broker.ping()
        snapshot = await broker.snapshot(None)
        stops = {each.order.order_ref: each.order.stop_price for each in snapshot.open_orders}
        assert [stops[sent[n].order_ref] for n in (3, 4)] == [Decimal(93), Decimal("102.5")]
        assert [
            replace(each.order, stop_price=None) if each.order.order_type == "TRAIL" else each.order
            for each in snapshot.open_orders
        ] == sent
        assert all(each.ours and each.status == "ROUTED" for each in snapshot.open_orders)
        await broker.close()

    go(act())


def test_change_cancel_what_if_and_time(exchange: ExchangeProcess) -> None:
    async def act() -> None:
        broker = exchange.adapter()
        await broker.connect()
        messages = broker.messages()
        given = order(limit_price="90")
        await broker.submit(given)
        await broker.modify(replace(given, limit_price=Decimal("91.5")), None)
        heard = await until(messages, lambda message: message.kind == "MODIFIED")
        assert heard[-1].payload == {"quantity": "10", "limit_price": "91.5", "stop_price": None}
        await broker.cancel(given.order_ref, None)
        await until(messages, says("CANCELED", given))
        margin = await broker.what_if(order(quantity="10"))
        assert margin["accepted"] is True
        assert Decimal(margin["initial_margin"]) == 250
        assert abs(await broker.ping() - datetime.now(UTC)) < timedelta(seconds=10)
        await broker.close()

    go(act())


def test_cancel_by_the_brokers_id_alone(exchange: ExchangeProcess) -> None:
    async def act() -> None:
        broker = exchange.adapter()
        await broker.connect()
        messages = broker.messages()
        given = order(limit_price="90", order_ref="")
        await broker.submit(given)
        (*_, routed) = await until(messages, lambda m: m.payload.get("status") == "ROUTED")
        await broker.cancel("", routed.broker_order_id)
        await until(messages, lambda m: m.payload.get("status") == "CANCELED")
        await broker.close()

    go(act())


def test_the_end_of_a_connection_is_the_last_message(exchange: ExchangeProcess) -> None:
    async def act() -> None:
        broker = exchange.adapter()
        await broker.connect()
        with exchange.control() as control:
            await asyncio.to_thread(control.drop)
        heard = [message async for message in broker.messages()]
        assert [message.kind for message in heard] == ["CONNECTED", "DISCONNECTED"]
        for call in (
            broker.submit(order()),
            broker.cancel("x", None),
            broker.ping(),
            broker.snapshot(None),
        ):
            with pytest.raises(BrokerUnavailable):
                await call
        assert await broker.connect() == "DU1"
        assert await broker.ping()
        await broker.close()

    go(act())


def test_the_second_connection_steals_the_session(exchange: ExchangeProcess) -> None:
    async def act() -> None:
        first, second, other = exchange.adapter(), exchange.adapter(), exchange.adapter(client_id=7)
        for broker in (first, other, second):
            await broker.connect()
        heard = [message async for message in first.messages()]
        assert [message.kind for message in heard] == ["CONNECTED", "STOLEN"]
        assert await second.ping()
        assert await other.ping()
        await asyncio.gather(first.close(), second.close(), other.close())

    go(act())


def test_a_silent_broker_is_given_up(
    exchange: ExchangeProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.brokers.dummy.adapter.ANSWER_SECONDS_MAX", 0.2)

    async def act() -> None:
        broker = exchange.adapter()
        await broker.connect()
        with exchange.control() as control:
            await asyncio.to_thread(control.silence)
        with pytest.raises(BrokerUnavailable, match="No answer came"):
            await broker.ping()
        await broker.submit(order())
        await broker.close()

    go(act())
    assert len(exchange.books()["orders"]) == 1


def test_nobody_there() -> None:
    async def act() -> None:
        with pytest.raises(BrokerUnavailable, match="can't be reached"):
            await DummyBroker(1).connect()

    go(act())
    with pytest.raises(BrokerUnavailable):
        Control(1)


def test_a_refused_logon(tmp_path: Path) -> None:
    async def act(exchange: ExchangeProcess) -> None:
        with pytest.raises(BrokerUnavailable, match="refused the logon"):
            await exchange.adapter().connect()

    with running_exchange(tmp_path / "x", faults="ROUTE-01") as exchange:
        go(act(exchange))


def test_the_operators_hand(exchange: ExchangeProcess) -> None:
    with exchange.control() as control:
        control.set_liquidity("AAPL", "3")
        number = control.manual_order(order(quantity="5"))
        control.orphan_order(order(symbol="MSFT", limit_price="300"))
        execution = control.fill(number, "1", "99.5")
        control.correct(execution, price="98.5")
        control.bust("1.01")
        assert control.change_perm_id(number) == 900_000_003
        control.set_next_order_id(77)
        control.set_skew(-60)
        control.open_session()
        control.close_session()
        assert not control.market()["is_open"]
        with pytest.raises(BadInput, match="There is no order 99"):
            control.fill(99)
        books = control.books()
        explained(books)
        assert books["positions"] == {"AAPL": "1"}
        assert [each["by_hand"] for each in books["orders"]] == [True, False]
        assert control.sessions() == []
        assert control.strikes() == {}


@pytest.mark.parametrize("round_", range(3))
def test_sigkill_loses_nothing_that_was_said(tmp_path: Path, round_: int) -> None:
    """Kill in the middle of a stream of orders: whatever was heard is in the books after it."""

    async def act(exchange: ExchangeProcess) -> list[Message]:
        broker = exchange.adapter()
        await broker.connect()
        sending = asyncio.create_task(send(broker))
        heard: list[Message] = []
        async for message in broker.messages():
            heard.append(message)
            if len(heard) == 200 + 300 * round_:
                exchange.kill()
        sending.cancel()
        await asyncio.gather(sending, return_exceptions=True)
        await broker.close()
        return heard

    async def send(broker: DummyBroker) -> None:
        while True:
            await broker.submit(order(("BUY", "SELL")[round_ % 2], "1"))
            await broker.submit(order(quantity="1", limit_price="50", time_in_force="GTC"))
            await asyncio.sleep(0)

    with running_exchange(tmp_path / "x") as exchange:
        heard = asyncio.run(asyncio.wait_for(act(exchange), SECONDS_MAX))
        assert heard[-1].kind == "DISCONNECTED"
        exchange.start()
        books = exchange.books()
    explained(books)
    kept = {each["execution_id"] for each in books["executions"]}
    told = {m.payload["execution_id"] for m in heard if m.kind == "EXECUTION"}
    assert told <= kept
    assert told
    status = {each["order_ref"]: each["status"] for each in books["orders"]}
    for message in heard:
        if message.kind == "ORDER_STATUS":
            said = message.payload["status"]
            assert message.order_ref in status
            assert said in ("PENDING_SUBMIT", "ROUTED") or status[message.order_ref] == said


def test_after_a_restart_orders_work_on(exchange: ExchangeProcess) -> None:
    async def place(given: BrokerOrder) -> None:
        broker = exchange.adapter()
        await broker.connect()
        await broker.submit(given)
        await broker.ping()
        await broker.close()

    async def fill(given: BrokerOrder) -> None:
        broker = exchange.adapter()
        await broker.connect()
        snapshot = await broker.snapshot(None)
        assert [each.order for each in snapshot.open_orders] == [given]
        with exchange.control() as control:
            await asyncio.to_thread(control.set_price, "AAPL", "89")
        await until(broker.messages(), says("FILLED", given))
        await broker.close()

    given = order(limit_price="90", time_in_force="GTC")
    go(place(given))
    exchange.kill()
    exchange.start()
    go(fill(given))


def test_a_second_exchange_on_the_same_folder_is_told(exchange: ExchangeProcess) -> None:
    second = command("broker", "dummy", "--state", str(exchange.folder))
    assert second.returncode == 2
    assert "give each its own" in second.stderr
    assert second.stderr.count("\n") == 1


def test_a_port_that_is_taken_is_told(exchange: ExchangeProcess, tmp_path: Path) -> None:
    second = command(
        "broker", "dummy", "--state", str(tmp_path / "other"), "--port", str(exchange.port)
    )
    assert second.returncode == 2
    assert "name another" in second.stderr


def test_the_signals_end_it_cleanly(tmp_path: Path) -> None:
    exchange = ExchangeProcess(tmp_path / "x")
    exchange.start()
    assert (tmp_path / "x" / "port").read_text(encoding="ascii") == f"{exchange.port}\n"
    assert exchange.stop() == 0


def test_plans_are_listed_and_a_wrong_one_is_told(tmp_path: Path) -> None:
    listed = command("broker", "plans", "--json")
    names = {plan["name"] for plan in json.loads(listed.stdout)["plans"]}
    assert {"CONN-01", "ROUTE-01", "PERMID-MISMATCH"} <= names
    assert "CONN-01" in command("broker", "plans").stdout
    wrong = tmp_path / "wrong.toml"
    wrong.write_text('[[fault]]\ndo = "DANCE"\n', encoding="utf-8")
    for words, told in (
        (("--faults", str(wrong)), "fault 1"),
        (("--faults", "NONE-01"), "There is no fault plan"),
        (("--price", "AAPL=high"), "price"),
        (("--price", "AAPL"), "isn't an assignment"),
        (("--session", "noon"), "session"),
    ):
        refused = command("broker", "dummy", "--state", str(tmp_path / "x"), *words)
        assert refused.returncode == 1
        assert told in refused.stderr
        assert refused.stderr.count("\n") == 1


def command(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        oms_process(*words),
        env=environment(),
        capture_output=True,
        text=True,
        timeout=SECONDS_MAX,
        check=False,
    )


def test_a_fill_costs_the_exchange_no_more_after_thousands(tmp_path: Path) -> None:
    """Processor time, which a busy machine doesn't spoil; three orders are written together."""
    floor = Floor(tmp_path)
    floor.log_on()
    parts: list[float] = []
    for _ in range(5):
        lines = [
            encode({"op": "SUBMIT", "order": order_on_wire(order(quantity="1"))})
            for _ in range(FILLS // 5)
        ]
        began = time.process_time()
        for n, line in enumerate(lines):
            floor.exchange.handle(1, decode(line))
            if n % 3 == 0:
                floor.exchange.release()
        floor.exchange.release()
        parts.append(time.process_time() - began)
    assert len(floor.books()["executions"]) == FILLS
    assert min(parts[1:]) < 3 * parts[0], parts


def test_a_list_costs_as_it_is_long(tmp_path: Path) -> None:
    floor = Floor(tmp_path)
    floor.log_on()
    took: list[float] = []
    for _ in range(2):
        for _ in range(OPEN_ORDERS):
            floor.submit(order(quantity="1", limit_price="50", time_in_force="GTC"))
        tries = []
        for _ in range(5):
            began = time.process_time()
            floor.exchange.handle(1, {"op": "SNAPSHOT", "request": 1, "since": None})
            said = [data for _, data in floor.exchange.release() if data is not None]
            tries.append(time.process_time() - began)
        took.append(min(tries))
    parts = [decode(data) for data in said]
    assert sum(len(part["open_orders"]) for part in parts) == 2 * OPEN_ORDERS
    assert took[1] < 4 * took[0], "twice as long a list costs about twice"


@pytest.mark.slow
def test_many_open_orders_are_listed_at_one_moment(exchange: ExchangeProcess) -> None:
    async def act() -> None:
        broker = exchange.adapter()
        await broker.connect()
        given = order(quantity="1", limit_price="50", time_in_force="GTC")
        sent = [replace(given, order_ref=f"resting-{n}") for n in range(10_000)]
        for each in sent:
            await broker.submit(each)
        snapshot = await broker.snapshot(None)
        assert [each.order for each in snapshot.open_orders] == sent
        await broker.close()

    go(act())


def test_a_plan_works_in_the_process(tmp_path: Path) -> None:
    """CONN-01 itself: the first order arrives, the second doesn't, and nobody was told."""

    async def act(exchange: ExchangeProcess) -> tuple[BrokerOrder, BrokerOrder]:
        first, second = order(), order()
        for given in (first, second):
            broker = exchange.adapter()
            await broker.connect()
            await broker.submit(given)
            heard = [message async for message in broker.messages()]
            assert [message.kind for message in heard] == ["CONNECTED", "DISCONNECTED"]
            await broker.close()
        broker = exchange.adapter()
        await broker.connect()
        snapshot: Any = await broker.snapshot(None)
        assert [each.order for each in snapshot.closed_orders] == [first]
        await broker.close()
        return first, second

    with running_exchange(tmp_path / "x", faults="plans/CONN-01.toml", seed=3) as exchange:
        first, _ = asyncio.run(asyncio.wait_for(act(exchange), SECONDS_MAX))
        assert [each["order_ref"] for each in exchange.books()["orders"]] == [first.order_ref]
