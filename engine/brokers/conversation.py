"""One connection to a broker, from its first word to its last: hear, claim, send, ask."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any

from engine.brokers.journal import AWAY, Journal
from engine.brokers.payloads import as_payload, moment_of, order_of, snapshot_parts
from engine.brokers.priority import PriorityQueue
from engine.brokers.protocol import Broker, BrokerUnavailable, Message, MessageKind
from engine.brokers.store import Account, Command, Done, Heard, Store
from engine.brokers.throttle import Throttle
from engine.clock import Clock
from engine.errors import BadInput, EngineError, LeaseLost
from engine.log import tell

# Claimed and not yet written, at most: so many are lost to the connection when it breaks.
AHEAD_MAX = 8
# Waiting commands that are told of at once.
THROTTLED_ROWS_MAX = 1_000
# To look for what waits takes at most this share of the time.
LOOK_SHARE_MAX = 0.1
# Who must not take a broker for silent looks and tells so many times in a heartbeat.
LOOKS_A_HEARTBEAT = 3
# Silence, in heartbeats of the account, after which the connection counts as dead.
SILENCE_HEARTBEATS_MAX = 2

CONNECTION_LOST = (BrokerUnavailable, OSError, TimeoutError)

_PRIORITIES: Mapping[MessageKind, int] = {MessageKind.STOLEN: 0, MessageKind.DISCONNECTED: 1}


@dataclass(frozen=True, slots=True)
class Pace:
    """How often, and how long at most, in seconds."""

    lease: int = 15
    poll: float = 1.0
    ping: float = 5.0
    connect_max: float = 30.0
    write_max: float = 10.0
    answer_max: float = 60.0
    retry_first: float = 0.25
    retry_max: float = 30.0
    # A connection that held this long was a good one: the next retry is quick again.
    steady: float = 10.0
    # What was begun has this long to end when we leave.
    leave_max: float = 10.0


@dataclass(frozen=True, slots=True)
class Tools:
    """What every connection of a connector shares."""

    account: Account
    store: Store
    journal: Journal
    throttle: Throttle
    clock: Clock
    seconds: Callable[[], float]
    pace: Pace


class TakenOver(Exception):
    """Somebody else has this session, or it is another account's: leave it to them."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


def require_account(expected: str, account: str) -> None:
    """Refuse to go on where the broker speaks for another account."""
    if account != expected:
        raise TakenOver(
            "ACCOUNT_MISMATCH", f"the broker speaks for account {account}, not for {expected}"
        )


class Conversation:
    """What is said over one connection. ``run`` it once."""

    def __init__(self, tools: Tools, broker: Broker, wake: asyncio.Event) -> None:
        self._account = tools.account
        self._store = tools.store
        self._journal = tools.journal
        self._throttle = tools.throttle
        self._clock = tools.clock
        self._seconds = tools.seconds
        self._pace = tools.pace
        self._broker = broker
        self._wake = wake
        self._queue: PriorityQueue[Command] = PriorityQueue()
        self._unwritten = 0
        self._orders_unwritten = 0
        self._answers: dict[asyncio.Task[None], Command] = {}
        self._look_at = 0.0
        self._is_enough = False
        self._said_goodbye = False

    async def run(self, over: asyncio.Future[Any]) -> str:
        """Converse until the connection breaks or ``over`` is; returns why it ended.

        Where it is over and not broken, what was claimed is still sent. Raises TakenOver.
        """
        hearing = asyncio.create_task(self._hear())
        sending = asyncio.create_task(self._send_all())
        claiming = asyncio.create_task(self._claim_all())
        pinging = asyncio.create_task(self._ping())
        mine: tuple[asyncio.Future[Any], ...] = (hearing, sending, claiming, pinging)
        try:
            done, _ = await asyncio.wait({*mine, over}, return_when=asyncio.FIRST_COMPLETED)
            if not done.intersection(mine):
                await self._finish(claiming, hearing, sending)
        finally:
            await end(claiming, sending, pinging)
            asked = dict(self._answers)
            await end(*asked)
            # A task that is cancelled before it begins says nothing itself.
            for command in (*self._queue.drain(), *self._answers.values()):
                await self._never_sent(command)
        await self._close(hearing)
        _raise_errors_of_ours(claiming)
        return await self._part(hearing, sending, pinging)

    async def _finish(self, claiming: asyncio.Task[None], *broken: asyncio.Future[Any]) -> None:
        """What is claimed is yet written, and answered, while the connection holds."""
        self._is_enough = True
        self._wake.set()
        # A claim under way is waited for: what it takes would else be taken in vain.
        await asyncio.wait({claiming}, timeout=self._pace.leave_max)
        rest = asyncio.gather(self._queue.dealt_with(), *self._answers)
        await asyncio.wait(
            {rest, *broken}, timeout=self._pace.leave_max, return_when=asyncio.FIRST_COMPLETED
        )
        await end(rest)

    async def _close(self, hearing: asyncio.Task[str]) -> None:
        await quietly(self._broker.close(), self._pace.leave_max)
        # What it had said before is heard to the end.
        await asyncio.wait({hearing}, timeout=self._pace.leave_max)
        await end(hearing)

    async def _part(self, hearing: asyncio.Task[str], *others: asyncio.Task[None]) -> str:
        """Say why it ended, unless the broker has."""
        errors = [task.exception() for task in (hearing, *others) if not task.cancelled()]
        error = next(filter(None, errors), None)
        if isinstance(error, TakenOver):
            raise error
        if error is not None and not isinstance(error, CONNECTION_LOST):
            tell("ADAPTER_FAILED", account=self._account.account, error=repr(error))
        said = "" if hearing.cancelled() or error else hearing.result()
        reason = str(error or said) or "logged off"
        if not self._said_goodbye:
            await self._journal.say("DISCONNECTED", {"reason": reason}, priority=1)
        return reason

    # --- What the broker says ---------------------------------------------------------------

    async def _hear(self) -> str:
        """Pass on all that the broker says; returns why it ended."""
        async for message in self._broker.messages():
            self._journal.heard()
            if message.kind is MessageKind.CONNECTED:
                # Who we are talking to has been written down; only another one is news.
                require_account(self._account.account, str(message.payload.get("account")))
                continue
            await self._journal.put(self._row(message))
            if message.kind is MessageKind.STOLEN:
                by = message.payload.get("by", "another process")
                raise TakenOver("CONNECTION_STOLEN", f"{by} has taken the session")
            if message.kind is MessageKind.DISCONNECTED:
                self._said_goodbye = True
                return str(message.payload.get("reason", ""))
        return "the broker ended the connection"

    def _row(self, message: Message) -> Heard:
        return Heard(
            message.kind.value,
            message.event_at,
            self._clock(),
            as_payload(message.payload),
            _PRIORITIES.get(message.kind, 2),
            message.order_ref,
            message.broker_order_id,
            message.perm_id,
        )

    async def _ping(self) -> None:
        """Ask for the time, which tells of clocks and of life."""
        silence_max = timedelta(seconds=SILENCE_HEARTBEATS_MAX * self._account.heartbeat_seconds)
        pause = min(self._pace.ping, self._account.heartbeat_seconds / LOOKS_A_HEARTBEAT)
        while True:
            await asyncio.sleep(pause)
            if self._throttle.free(self._seconds()).messages:
                self._throttle.note(self._seconds(), is_order=False)
                with suppress(TimeoutError):
                    async with asyncio.timeout(pause):
                        self._journal.heard(await self._broker.ping())
            heard_at = self._journal.heard_at
            if heard_at is not None and self._clock() - heard_at > silence_max:
                raise BrokerUnavailable(f"nothing was heard for {silence_max.total_seconds():g} s")

    # --- What is claimed --------------------------------------------------------------------

    async def _claim_all(self) -> None:
        """Take commands as fast as they can be written, and no faster."""
        while not self._is_enough:
            self._wake.clear()
            taken: list[Command] = []
            try:
                taken = await self._claim()
            except LeaseLost as error:
                # Only for a while, or the lease's keeper will find out who has it.
                tell("LEASE_ENDED", account=self._account.account, error=str(error))
            except AWAY as error:
                tell("DATABASE_AWAY", account=self._account.account, error=str(error))
            if not taken and not self._is_enough:
                await self._claim_later()

    async def _claim(self) -> list[Command]:
        free = self._throttle.free(self._seconds())
        room = AHEAD_MAX - self._unwritten
        messages = free.messages - self._unwritten
        orders = min(messages, free.orders - self._orders_unwritten)
        if orders <= 0 < room:
            await self._tell_throttled()
        if min(messages, room) <= 0:
            return []
        taken = await self._journal.claim(min(messages, room), max(0, min(orders, room)))
        for command in taken:
            self._unwritten += 1
            self._orders_unwritten += command.kind == "SUBMIT"
            self._queue.put(command, command.priority, first=command.kind == "CANCEL")
        return taken

    async def _claim_later(self) -> None:
        delay = self._throttle.delay(self._seconds(), is_order=True) or self._pace.poll
        with suppress(TimeoutError):
            async with asyncio.timeout(min(self._pace.poll, max(delay, 0.001))):
                await self._wake.wait()

    def _written(self, command: Command) -> None:
        self._unwritten -= 1
        self._orders_unwritten -= command.kind == "SUBMIT"
        self._wake.set()

    async def _never_sent(self, command: Command) -> None:
        self._written(command)
        why = "the connection ended before it was written"
        await self._journal.failed(command, "NEVER_ARRIVED", why)

    async def _tell_throttled(self) -> None:
        """Say of every command that has to wait, once, that it does."""
        began = self._seconds()
        if began < self._look_at:
            return
        waiting = await self._store.throttled(THROTTLED_ROWS_MAX)
        by_orders = self._throttle.limits_orders(began)
        for each in waiting:
            is_order = each.kind == "SUBMIT"
            code = "THROTTLED" if is_order and by_orders else "RATE_LIMIT"
            wait = self._throttle.wait_seconds(began, each.place, is_order=is_order)
            said = {"command_id": str(each.command_id), "wait_seconds": f"{wait:.3f}"}
            ref = str(each.order_id)
            tell(code, account=self._account.account, order_id=ref, wait=said["wait_seconds"])
            await self._journal.say("THROTTLED", {**said, "code": code}, order_ref=ref)
        if waiting:
            await self._journal.settled()  # or the next look would find them again
        now = self._seconds()
        self._look_at = now + (now - began) * (1 / LOOK_SHARE_MAX - 1)

    # --- What is sent -----------------------------------------------------------------------

    async def _send_all(self) -> None:
        while True:
            command = await self._queue.get()
            try:
                if command.kind in ("SNAPSHOT", "WHAT_IF"):
                    self._ask(command)
                else:
                    await self._send(command)
            finally:
                self._queue.done()

    async def _turn(self, *, is_order: bool) -> None:
        """Wait until one more may be written."""
        while (delay := self._throttle.delay(self._seconds(), is_order=is_order)) > 0:
            await asyncio.sleep(delay)

    async def _send(self, command: Command) -> None:
        """Write one command about an order; whatever happens, it is said what became of it."""
        is_order = command.kind == "SUBMIT"
        try:
            write = _writing(self._broker, command)
            await self._turn(is_order=is_order)
        except asyncio.CancelledError:
            await self._never_sent(command)
            raise
        except BadInput as error:
            self._written(command)
            await self._journal.failed(command, "REFUSED", str(error))
            return
        at = self._clock()
        try:
            async with asyncio.timeout(self._pace.write_max):
                await write()
        except BaseException as error:
            if not isinstance(error, EngineError) or isinstance(error, BrokerUnavailable):
                await self._perhaps_sent(command, Done(command.command_id, "UNKNOWN", at), error)
                raise
            await self._journal.failed(command, "REFUSED", str(error))
        else:
            await self._journal.put(Done(command.command_id, "SENT", at))
        finally:
            self._throttle.note(self._seconds(), is_order=is_order)
            self._written(command)

    async def _perhaps_sent(self, command: Command, done: Done, error: BaseException) -> None:
        code = "SUBMIT_PENDING" if command.kind == "SUBMIT" else "OUTCOME_UNKNOWN"
        tell(
            code,
            account=self._account.account,
            order_id=command.order_ref,
            command_id=str(command.command_id),
            error=repr(error),
        )
        await self._journal.put(done)

    # --- What is asked ----------------------------------------------------------------------

    def _ask(self, command: Command) -> None:
        """Ask, and go on sending while the broker thinks about it."""
        task = asyncio.create_task(self._answer(command))
        self._answers[task] = command

    async def _answer(self, command: Command) -> None:
        failed = partial(self._journal.failed, command)
        try:
            await self._turn(is_order=False)
            self._throttle.note(self._seconds(), is_order=False)
            at = self._clock()
            async with asyncio.timeout(self._pace.answer_max):
                rows = await self._answer_rows(command)
        except asyncio.CancelledError:
            await failed("NEVER_ARRIVED", "the connection ended before the answer")
            raise
        except BadInput as error:
            await failed("REFUSED", str(error))
        except Exception as error:  # whatever it is: nothing was placed, and it can be asked again
            await failed("NEVER_ARRIVED", str(error) or repr(error))
        else:
            self._journal.heard()
            await self._journal.put(*rows, Done(command.command_id, "SENT", at))
        finally:
            self._written(command)
            self._answers = {t: c for t, c in self._answers.items() if c is not command}

    async def _answer_rows(self, command: Command) -> list[Heard]:
        if command.kind == "SNAPSHOT":
            snapshot = await self._broker.snapshot(moment_of(command.payload, "since"))
            # As urgent as executions are: those that came before it are to be applied before it,
            # and those of which we never heard are heard now.
            return [
                *await self._journal.unheard([self._row(each) for each in snapshot.executions]),
                *(
                    Heard("SNAPSHOT", snapshot.taken_at, self._clock(), part)
                    for part in snapshot_parts(snapshot, str(command.command_id))
                ),
            ]
        ref = command.order_ref or str(command.command_id)
        answer = await self._broker.what_if(order_of(command.payload, ref))
        payload = as_payload({**answer, "command_id": command.command_id})
        now = self._clock()
        at = now - (self._journal.skew or timedelta())
        return [Heard("WHAT_IF", at, now, payload, command.priority, command.order_ref)]


def _writing(broker: Broker, command: Command) -> Callable[[], Awaitable[None]]:
    """The call that writes a command; raises BadInput where it is about no order."""
    ref = command.order_ref or ""
    broker_order_id = command.payload.get("broker_order_id")
    if command.kind == "CANCEL":
        return partial(broker.cancel, ref, broker_order_id)
    order = order_of(command.payload, ref)
    if command.kind == "MODIFY":
        return partial(broker.modify, order, broker_order_id)
    return partial(broker.submit, order)


def _raise_errors_of_ours(claiming: asyncio.Task[None]) -> None:
    if not claiming.cancelled() and (error := claiming.exception()):
        raise error


async def end(*tasks: asyncio.Future[Any]) -> None:
    """Cancel tasks and wait until they are over; what they raise is asked for elsewhere."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def quietly(call: Awaitable[None], seconds_max: float) -> None:
    """Close what may be broken already."""
    with suppress(Exception):
        async with asyncio.timeout(seconds_max):
            await call
