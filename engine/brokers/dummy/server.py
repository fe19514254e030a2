"""The exchange as a process: a TCP server on the loopback interface.

Its protocol is described in ``wire``, its control connection in ``desk``. Whatever arrives together
is done together: the books are written once, and only then is anything said about it.
"""

from __future__ import annotations

import asyncio
import gc
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import datetime
from pathlib import Path
from typing import cast

from engine.brokers.dummy.desk import Desk
from engine.brokers.dummy.exchange import Exchange
from engine.brokers.dummy.faults import Plan
from engine.brokers.dummy.store import Store
from engine.brokers.dummy.wire import LINE_BYTES_MAX, decode, encode
from engine.clock import utc_now
from engine.errors import BadInput, ConfigurationError

__all__ = ["HOST", "run", "serving"]

HOST = "127.0.0.1"
PORT_FILE = "port"
GC_THRESHOLD = 200_000
# A client that doesn't read is thrown out before it fills our memory.
UNREAD_BYTES_MAX = 512 * 1024 * 1024


def run(
    folder: Path, plan: Plan, *, port: int, seed: int, listening: Callable[[int], None]
) -> None:
    """Serve until SIGINT or SIGTERM; ``listening`` is told the port, which FOLDER/port holds too.

    Raises ConfigurationError if the folder is in use or the port is taken.
    """
    store = Store(folder)
    # Orders stay for good and form no cycles: to look through them all again and again costs a
    # third of the time.
    gc.set_threshold(GC_THRESHOLD)
    try:
        exchange = Exchange(plan, store, seed=seed, clock=utc_now)
        exchange.release()
        asyncio.run(_serve(exchange, folder, port, listening))
    finally:
        store.close()


async def _serve(
    exchange: Exchange, folder: Path, port: int, listening: Callable[[int], None]
) -> None:
    loop = asyncio.get_running_loop()
    stopped = asyncio.Event()
    for signum in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(signum, stopped.set)
    async with serving(exchange, port) as got:
        (folder / PORT_FILE).write_text(f"{got}\n", encoding="ascii")
        listening(got)
        await stopped.wait()


@asynccontextmanager
async def serving(exchange: Exchange, port: int = 0) -> AsyncIterator[int]:
    """Serve an exchange for the length of a block, on the port that it yields."""
    loop = asyncio.get_running_loop()
    floor = _Floor(exchange, loop)
    try:
        server = await loop.create_server(lambda: _Connection(floor), HOST, port)
    except OSError as error:
        raise ConfigurationError(
            f"Port {port} of {HOST} can't be had ({error.strerror}); name another, or 0 for any."
        ) from error
    async with server:
        floor.settle()
        try:
            yield server.sockets[0].getsockname()[1]
        finally:
            floor.close()


class _Floor:
    """Connects the exchange to its connections and to time."""

    def __init__(self, exchange: Exchange, loop: asyncio.AbstractEventLoop) -> None:
        self.exchange = exchange
        self.desk = Desk(exchange)
        self._loop = loop
        self._connections: dict[int, _Connection] = {}
        self._next = 1
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at: datetime | None = None

    def enter(self, connection: _Connection) -> int:
        number, self._next = self._next, self._next + 1
        self._connections[number] = connection
        return number

    def leave(self, number: int) -> None:
        self._connections.pop(number, None)
        self.exchange.leave(number)

    def settle(self) -> None:
        """Write the books, say what is to be said, and see when to look again."""
        self.exchange.advance()
        waiting: dict[int, list[bytes]] = {}
        for number, data in self.exchange.release():
            connection = self._connections.get(number)
            if connection is None:
                continue
            if data is None:
                connection.send(b"".join(waiting.pop(number, [])))
                connection.end()
            else:
                waiting.setdefault(number, []).append(data)
        for number, lines in waiting.items():
            if number in self._connections:
                self._connections[number].send(b"".join(lines))
        self._arm()

    def close(self) -> None:
        """End all connections."""
        if self._timer is not None:
            self._timer.cancel()
        for connection in list(self._connections.values()):
            connection.end()

    def _arm(self) -> None:
        at = self.exchange.next_at()
        if at == self._timer_at:
            return
        if self._timer is not None:
            self._timer.cancel()
        self._timer_at = at
        self._timer = None
        if at is not None:
            seconds = max((at - utc_now()).total_seconds(), 0)
            self._timer = self._loop.call_later(seconds, self._ring)

    def _ring(self) -> None:
        self._timer_at = self._timer = None
        self.settle()


class _Connection(asyncio.Protocol):
    """One connection: a client's, or the operator's."""

    def __init__(self, floor: _Floor) -> None:
        self._floor = floor
        self._number = 0
        self._transport: asyncio.Transport | None = None
        self._rest = b""
        self._is_control = False
        self._is_over = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._number = self._floor.enter(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._is_over = True
        self._floor.leave(self._number)

    def data_received(self, data: bytes) -> None:
        *lines, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > LINE_BYTES_MAX:
            self.end()
            return
        answers = [self._do(line) for line in lines if not self._is_over]
        self._floor.settle()
        self.send(b"".join(answer for answer in answers if answer is not None))

    def send(self, data: bytes) -> None:
        """Write, unless the connection is over."""
        if self._transport is None or self._is_over or not data:
            return
        self._transport.write(data)
        if self._transport.get_write_buffer_size() > UNREAD_BYTES_MAX:
            self._is_over = True
            self._transport.abort()

    def end(self) -> None:
        """Close once all is written; whatever still comes isn't heard."""
        self._is_over = True
        if self._transport is not None:
            self._transport.close()

    def _do(self, line: bytes) -> bytes | None:
        try:
            request = decode(line)
        except BadInput as error:
            return encode({"error": str(error)})
        if self._is_control:
            return encode(self._floor.desk.answer(request))
        if request.get("op") == "CONTROL":
            self._is_control = True
            return encode({"done": None})
        self._floor.exchange.handle(self._number, request)
        return None
