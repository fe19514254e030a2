"""The process between an account's outbox and inbox, and its broker.

It holds the account's lease, so that there is one of it; it takes commands when the connection
is up and the throttle allows, sends each once, and writes down whatever the broker says. Whoever
kills it loses nothing: a command is claimed before it is sent, so that one that was perhaps sent
is never sent again, and what the broker said meanwhile is in its next snapshot.
"""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime
from enum import IntEnum
from typing import Any
from uuid import UUID, uuid4

from engine.brokers.conversation import (
    CONNECTION_LOST,
    LOOKS_A_HEARTBEAT,
    Conversation,
    Pace,
    TakenOver,
    Tools,
    end,
    quietly,
    require_account,
)
from engine.brokers.hours import Span, next_span
from engine.brokers.journal import AWAY, Journal
from engine.brokers.protocol import Broker
from engine.brokers.registry import adapter
from engine.brokers.store import Account, Store
from engine.brokers.throttle import WINDOW_SECONDS, Throttle
from engine.clock import Clock, utc_now
from engine.errors import DatabaseUnavailable, LeaseLost
from engine.log import tell

__all__ = ["Connector", "Ended", "Pace", "connect"]


class Ended(IntEnum):
    """Why a connector ended: its exit code."""

    STOPPED = 0
    CONNECTION_STOLEN = 3  # another session, or another connector, has taken over
    ACCOUNT_MISMATCH = 4  # the broker speaks for another account


class Connector:
    """The connector of one account. ``run`` it once; ``stop`` ends it."""

    def __init__(
        self,
        store: Store,
        account: Account,
        make_broker: Callable[[], Broker],
        *,
        jitter: Callable[[], float],
        clock: Clock = utc_now,
        seconds: Callable[[], float] = time.monotonic,
        pace: Pace | None = None,
    ) -> None:
        self._store = store
        self._name = account.account
        self._account = account
        self._make_broker = make_broker
        self._jitter = jitter
        self._clock = clock
        self._seconds = seconds
        self._pace = pace or Pace()
        self._journal = Journal(store, clock)
        self._throttle = Throttle(account.orders_per_second, account.messages_per_second)
        self._wake = asyncio.Event()
        self._stopping = asyncio.Event()
        self._renew_now = asyncio.Event()
        self._ended = Ended.STOPPED
        self._failure: BaseException | None = None
        self._is_connected = False
        self._is_logged_on = False

    def stop(self) -> None:
        """End it: what is being sent is finished, and nothing else is begun."""
        self._stopping.set()

    async def run(self, holder_name: str) -> Ended:
        """Serve the account. Raises LeaseHeld, which says by whom, where it is served already."""
        await self._store.take_lease(holder_name, self._pace.lease)
        tell("LEASE_TAKEN", account=self._name, holder=holder_name)
        sent = await self._store.sent_lately(self._clock(), 2 * WINDOW_SECONDS)
        self._throttle.resume(self._seconds(), sent)
        parts = (self._journal.write(), self._keep_lease(), self._listen())
        helpers = [asyncio.ensure_future(part) for part in parts]
        for helper in helpers:
            helper.add_done_callback(self._give_up)
        try:
            await self._serve()
            await self._leave()
        finally:
            await end(*helpers)
        tell("CONNECTOR_ENDED", account=self._name, why=self._ended.name)
        return self._ended

    def _give_up(self, helper: asyncio.Future[Any]) -> None:
        """None of them ends by itself; where one does, it is for a reason to end us all."""
        if not helper.cancelled() and self._failure is None:
            self._failure = helper.exception()
            self.stop()

    async def _leave(self) -> None:
        """Have everything committed, and let another connector follow."""
        if self._failure is not None:
            raise self._failure
        try:
            async with asyncio.timeout(self._pace.leave_max):
                for command in await self._journal.unanswered():
                    await self._journal.failed(command, "NEVER_ARRIVED", "the connector ended")
                await self._journal.settled()
        except TimeoutError as error:
            raise DatabaseUnavailable(
                "the database is away, so what the broker said last is not stored; "
                "its next snapshot tells it"
            ) from error
        with suppress(*AWAY):
            await self._store.release_lease()

    # --- The lease --------------------------------------------------------------------------

    async def _keep_lease(self) -> None:
        # With it goes when the broker was last heard: later, and a short heartbeat seems lost.
        pause = min(self._pace.lease, self._account.heartbeat_seconds) / LOOKS_A_HEARTBEAT
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await self._renew_now.wait()
            self._renew_now.clear()
            try:
                await self._store.renew_lease(
                    self._pace.lease, self._is_connected, self._journal.heard_at, self._journal.skew
                )
            except LeaseLost as error:
                await self._taken_over(TakenOver("CONNECTION_STOLEN", str(error)))
                await asyncio.Future()  # until everything has ended
            except AWAY as error:
                tell("DATABASE_AWAY", account=self._name, error=str(error))

    async def _taken_over(self, by: TakenOver) -> None:
        """Leave, say so, and have a person told."""
        tell(by.code, account=self._name, message=str(by))
        if not self._stopping.is_set():
            self._ended = Ended[by.code]
            self.stop()
        with suppress(*AWAY):
            await self._store.alert(by.code, str(by))

    async def _listen(self) -> None:
        """Wake whoever claims; where nobody wakes us, the poll does."""
        while True:
            with suppress(*AWAY):
                async for _ in self._store.wakes():
                    self._wake.set()
            await asyncio.sleep(self._pace.poll)

    # --- Sessions and connections -----------------------------------------------------------

    async def _serve(self) -> None:
        attempt = 0
        while not self._stopping.is_set():
            span = await self._span()
            if span is None or not span.holds(self._clock()):
                await self._pause(self._pace.poll)
                continue
            began = self._seconds()
            await self._serve_once(span)
            attempt = 0 if self._seconds() - began > self._pace.steady else attempt + 1
            if span.holds(self._clock()):
                await self._pause(self._backoff(attempt))

    async def _serve_once(self, span: Span) -> None:
        """One connection, or the attempt at one."""
        broker = self._make_broker()
        try:
            await self._connect(broker, span)
            await self._converse(broker, span)
        except TakenOver as error:
            if error.code == "ACCOUNT_MISMATCH":
                await self._journal.say(error.code, {"message": str(error)}, priority=0)
            await self._taken_over(error)
        except CONNECTION_LOST as error:
            tell("CONNECT_FAILED", account=self._name, error=str(error))
        finally:
            await quietly(broker.close(), self._pace.leave_max)
        await self._log_off(span)

    async def _connect(self, broker: Broker, span: Span) -> None:
        async with asyncio.timeout(self._pace.connect_max):
            account = await broker.connect()
            require_account(self._name, account)
            broker_time = await broker.ping()
        self._throttle.note(self._seconds(), is_order=False)
        self._journal.heard(broker_time)
        tell("CONNECTED", account=account)
        said = {"account": account, "broker_time": broker_time}
        await self._journal.say("CONNECTED", said, priority=1)
        if not self._is_logged_on:
            self._is_logged_on = True
            tell("LOGON", account=account)
            await self._journal.say("LOGON", {"closes_at": span.close_at}, priority=1)

    async def _converse(self, broker: Broker, span: Span) -> None:
        tools = Tools(
            self._account,
            self._store,
            self._journal,
            self._throttle,
            self._clock,
            self._seconds,
            self._pace,
        )
        over = asyncio.create_task(self._over(span.close_at))
        self._is_connected = True
        self._renew_now.set()
        try:
            reason = await Conversation(tools, broker, self._wake).run(over)
            tell("DISCONNECTED", account=self._name, reason=reason)
        finally:
            self._is_connected = False
            self._renew_now.set()
            await end(over)

    async def _log_off(self, span: Span) -> None:
        closed = not span.holds(self._clock())
        if self._is_logged_on and (closed or self._stopping.is_set()):
            self._is_logged_on = False
            reason = "SESSION" if closed else "SHUTDOWN"
            tell("LOGOUT", account=self._name, reason=reason)
            await self._journal.say("LOGOUT", {"reason": reason}, priority=1)

    async def _span(self) -> Span | None:
        now = self._clock()
        with suppress(*AWAY):
            return next_span(await self._store.spans(self._account, now), now)
        return None  # without a database there is nothing to send

    async def _over(self, close_at: datetime) -> None:
        """Until the session closes or somebody stops us; the clock may be set meanwhile."""
        while not self._stopping.is_set():
            left = (close_at - self._clock()).total_seconds()
            if left <= 0:
                return
            await self._pause(min(left, self._pace.poll))

    async def _pause(self, seconds: float) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._stopping.wait()

    def _backoff(self, attempt: int) -> float:
        """Twice as long each time, and never the same for two: they would all come at once."""
        longest = min(self._pace.retry_max, self._pace.retry_first * 2.0 ** min(attempt, 16))
        return longest * (0.5 + self._jitter() / 2)


def holder_name() -> str:
    """This host and process, for people who want to know who holds an account."""
    return f"{socket.gethostname()}, process {os.getpid()}"[:200]


async def connect(
    dsn: str,
    user_id: UUID,
    account: str,
    *,
    jitter: Callable[[], float],
    started: Callable[[Connector], None],
    pace: Pace | None = None,
) -> Ended:
    """Serve an account until the connector ends; ``started`` is given it, to stop it by.

    Raises LeaseHeld where another one serves it, BadInput where there is no such account.
    """
    store = Store(dsn, user_id, account, uuid4())
    try:
        found = await store.account()
        settings = {**found.settings, "account": account}
        connector = Connector(
            store, found, lambda: adapter(found.broker, settings), jitter=jitter, pace=pace
        )
        started(connector)
        return await connector.run(holder_name())
    finally:
        await store.close()
