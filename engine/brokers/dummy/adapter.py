"""The connector's side of the dummy broker: the ``Broker`` protocol over its wire."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping
from datetime import datetime
from decimal import Decimal
from typing import Any

from engine.brokers.dummy.wire import (
    LINE_BYTES_MAX,
    decode,
    encode,
    message_of,
    order_of,
    order_on_wire,
)
from engine.brokers.protocol import (
    BrokerOrder,
    BrokerUnavailable,
    Message,
    MessageKind,
    OpenOrder,
    Position,
    Snapshot,
)
from engine.clock import Clock, utc_now
from engine.errors import BadInput

__all__ = ["DummyBroker"]

CONNECT_SECONDS_MAX = 10.0
WRITE_SECONDS_MAX = 10.0
ANSWER_SECONDS_MAX = 10.0
SNAPSHOT_SECONDS_MAX = 60.0
# Messages that nobody has taken yet. Beyond it we hang up: a snapshot tells the rest.
WAITING_MESSAGES_MAX = 1_000_000


class DummyBroker:
    """A connection to the simulated exchange at ``host`` and ``port``.

    ``account`` is the one to log on to; the exchange's first one if it is not named. Client 0 also
    hears of orders that were placed by hand.
    """

    def __init__(
        self,
        port: int,
        *,
        host: str = "127.0.0.1",
        client_id: int = 0,
        account: str | None = None,
        clock: Clock = utc_now,
    ) -> None:
        self._host, self._port = host, port
        self._client_id, self._account = client_id, account
        self._clock = clock
        self._writer: asyncio.StreamWriter | None = None
        self._reading: asyncio.Task[None] | None = None
        self._heard: asyncio.Queue[Message] = asyncio.Queue(WAITING_MESSAGES_MAX)
        self._is_over = True
        self._answers: dict[int, asyncio.Queue[dict[str, Any] | None]] = {}
        self._next_request = 1

    async def connect(self) -> str:
        """Connect and log on; returns the account that the broker says this is."""
        await self.close()
        self._heard = asyncio.Queue(WAITING_MESSAGES_MAX)
        try:
            async with asyncio.timeout(CONNECT_SECONDS_MAX):
                reader, writer = await asyncio.open_connection(
                    self._host, self._port, limit=LINE_BYTES_MAX
                )
                self._writer = writer
                writer.write(
                    encode({"op": "LOGON", "client_id": self._client_id, "account": self._account})
                )
                await writer.drain()
                said = await self._greeting(reader)
        except (OSError, TimeoutError, ValueError, BadInput) as error:
            await self.close()
            raise BrokerUnavailable(
                f"The exchange at {self._host}:{self._port} can't be reached: {_why(error)}."
            ) from error
        if said is None:
            await self.close()
            raise BrokerUnavailable("The exchange has refused the logon.")
        self._is_over = False
        self._reading = asyncio.create_task(self._read(reader))
        return str(said.payload["account"])

    async def messages(self) -> AsyncIterator[Message]:
        """What the broker says, until DISCONNECTED or STOLEN, which is the last."""
        heard = self._heard
        while True:
            message = await heard.get()
            yield message
            if message.kind in (MessageKind.DISCONNECTED, MessageKind.STOLEN):
                return

    async def submit(self, order: BrokerOrder) -> None:
        await self._write({"op": "SUBMIT", "order": order_on_wire(order)})

    async def modify(self, order: BrokerOrder, broker_order_id: int | None) -> None:
        await self._write(
            {"op": "MODIFY", "order": order_on_wire(order), "broker_order_id": broker_order_id}
        )

    async def cancel(self, order_ref: str, broker_order_id: int | None) -> None:
        await self._write(
            {"op": "CANCEL", "order_ref": order_ref, "broker_order_id": broker_order_id}
        )

    async def snapshot(self, since: datetime | None) -> Snapshot:
        """Open orders, executions since, positions and cash."""
        asked = None if since is None else since.isoformat()
        parts = await self._ask({"op": "SNAPSHOT", "since": asked}, SNAPSHOT_SECONDS_MAX)
        return Snapshot(
            taken_at=datetime.fromisoformat(parts[0]["taken_at"]),
            open_orders=[_order(row) for part in parts for row in part.get("open_orders", ())],
            executions=[message_of(row) for part in parts for row in part.get("executions", ())],
            positions=[_position(row) for part in parts for row in part.get("positions", ())],
            cash={currency: Decimal(amount) for currency, amount in parts[0]["cash"].items()},
            closed_orders=[_order(row) for part in parts for row in part.get("closed_orders", ())],
        )

    async def what_if(self, order: BrokerOrder) -> Mapping[str, Any]:
        """What the order would do to the margin: initial_margin, excess, accepted, message."""
        asked = {"op": "WHAT_IF", "order": order_on_wire(order)}
        (answer,) = await self._ask(asked, ANSWER_SECONDS_MAX)
        said: Mapping[str, Any] = answer["payload"]
        return said

    async def ping(self) -> datetime:
        """The broker's time."""
        (answer,) = await self._ask({"op": "PING"}, ANSWER_SECONDS_MAX)
        return datetime.fromisoformat(answer["broker_time"])

    async def close(self) -> None:
        """Log off and disconnect; a second call does nothing."""
        writer, self._writer = self._writer, None
        reading, self._reading = self._reading, None
        if writer is None:
            return
        with contextlib.suppress(OSError):
            if not writer.is_closing():
                writer.write(encode({"op": "LOGOFF"}))
            writer.close()
            await writer.wait_closed()
        if reading is not None and reading is not asyncio.current_task():
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)

    async def _greeting(self, reader: asyncio.StreamReader) -> Message | None:
        """Read until the broker says whose account this is; nothing if it hangs up instead."""
        while line := await reader.readline():
            message = message_of(decode(line))
            self._heard.put_nowait(message)
            if message.kind is MessageKind.CONNECTED:
                return message
        return None

    async def _write(self, request: dict[str, Any]) -> None:
        writer = self._writer
        if writer is None or self._is_over or writer.is_closing():
            raise BrokerUnavailable("There is no connection to the exchange.")
        try:
            writer.write(encode(request))
            async with asyncio.timeout(WRITE_SECONDS_MAX):
                await writer.drain()
        except (OSError, TimeoutError) as error:
            raise BrokerUnavailable(f"The connection broke: {_why(error)}.") from error

    async def _ask(self, request: dict[str, Any], seconds: float) -> list[dict[str, Any]]:
        """Write a request and wait for all parts of its answer."""
        number, self._next_request = self._next_request, self._next_request + 1
        answers = self._answers[number] = asyncio.Queue()
        parts: list[dict[str, Any]] = []
        try:
            async with asyncio.timeout(seconds):
                await self._write(request | {"request": number})
                while not parts or len(parts) < parts[0].get("parts", 1):
                    answer = await answers.get()
                    if answer is None:
                        raise BrokerUnavailable("The connection broke before the answer came.")
                    if all(answer.get("part") != part.get("part") for part in parts):
                        parts.append(answer)
        except TimeoutError as error:
            raise BrokerUnavailable(f"No answer came within {seconds:g} s.") from error
        finally:
            del self._answers[number]
        return sorted(parts, key=lambda part: part.get("part", 0))

    async def _read(self, reader: asyncio.StreamReader) -> None:
        """Sort what comes into answers and messages, until the connection ends."""
        why = "the exchange has hung up"
        try:
            while line := await reader.readline():
                if not self._take(decode(line)):
                    return
            if self._writer is None:
                why = "logged off"
        except (OSError, ValueError, BadInput) as error:
            why = _why(error)
        except asyncio.QueueFull:
            why = f"{WAITING_MESSAGES_MAX:,} messages wait to be taken"
        finally:
            self._end(why)

    def _take(self, said: dict[str, Any]) -> bool:
        """Pass one line on; whether there may be more."""
        if "reply" in said:
            waiting = self._answers.get(said["reply"])
            if waiting is not None:
                waiting.put_nowait(said)
            return True
        message = message_of(said)
        self._heard.put_nowait(message)
        return message.kind is not MessageKind.STOLEN

    def _end(self, why: str) -> None:
        self._is_over = True
        for waiting in self._answers.values():
            waiting.put_nowait(None)
        if self._writer is not None:
            self._writer.close()
        last = Message(MessageKind.DISCONNECTED, self._clock(), {"reason": why})
        if self._heard.full():
            self._heard.get_nowait()
        self._heard.put_nowait(last)


def _order(row: dict[str, Any]) -> OpenOrder:
    return OpenOrder(
        order_of(row["order"]),
        row["status"],
        Decimal(row["filled"]),
        row["broker_order_id"],
        row["perm_id"],
        row["ours"],
    )


def _position(row: dict[str, Any]) -> Position:
    return Position(row["symbol"], Decimal(row["quantity"]), Decimal(row["avg_cost"]))


def _why(error: BaseException) -> str:
    return str(error) or type(error).__name__
