"""What a connector reads and writes: its account, its lease, the outbox and the inbox.

Everything here may be repeated after a connection broke: what was committed though nobody heard
of it is found out, never assumed.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime, time, timedelta
from decimal import Decimal
from functools import partial
from typing import Any
from uuid import UUID

import psycopg
from psycopg.rows import class_row
from psycopg.types.json import Jsonb, set_json_loads

from engine.brokers.hours import Span, daily_spans
from engine.db.connect import (
    ANSWER_SECONDS_MAX,
    CONNECTOR_ROLE,
    AsyncConnection,
    open_async_connection,
)
from engine.errors import BadInput, ConfigurationError, DatabaseUnavailable, translated

COMMAND_CHANNEL = "oms_command"
EVENT_CHANNEL = "oms_event"
# Sessions of a calendar that are read at once: the next ones, over any holidays.
SPANS_MAX = 5


@dataclass(frozen=True, slots=True)
class Account:
    """An account as its connector needs it."""

    user_id: UUID
    account: str
    broker: str
    calendar: str
    time_zone: str
    opens_at: time | None
    closes_at: time | None
    orders_per_second: int
    messages_per_second: int
    heartbeat_seconds: int
    settings: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Command:
    """A row of the outbox."""

    command_id: UUID
    priority: int
    kind: str
    order_id: UUID | None
    payload: Mapping[str, Any]

    @property
    def order_ref(self) -> str | None:
        """The order's id as text, as it travels to the broker."""
        return None if self.order_id is None else str(self.order_id)


@dataclass(frozen=True, slots=True)
class Waiting:
    """A command that the throttle holds back, and its place in the queue."""

    command_id: UUID
    kind: str
    order_id: UUID
    place: int


@dataclass(frozen=True, slots=True)
class Done:
    """What became of a claimed command."""

    command_id: UUID
    outcome: str
    sent_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class Heard:
    """A row of the inbox, without its number."""

    kind: str
    event_at: datetime
    received_at: datetime
    payload: Mapping[str, Any]
    priority: int = 2
    order_ref: str | None = None
    broker_order_id: int | None = None
    perm_id: int | None = None


@dataclass(slots=True)
class Batch:
    """What is committed together; ``numbers`` are those under which it was last tried."""

    heard: list[Heard] = field(default_factory=list)
    done: list[Done] = field(default_factory=list)
    numbers: range | None = None


class Link:
    """A connection to the database that is opened again after it broke."""

    def __init__(self, dsn: str) -> None:
        self._dsn = dsn
        self._conn: AsyncConnection | None = None
        self._lock = asyncio.Lock()
        self._was_there = False

    @asynccontextmanager
    async def use(self) -> AsyncIterator[AsyncConnection]:
        """The connection, for one caller at a time.

        Raises DatabaseUnavailable where it breaks, or doesn't answer.
        """
        async with self._lock:
            try:
                with translated():
                    async with asyncio.timeout(ANSWER_SECONDS_MAX):
                        conn = await self._open()
                        with _values_told_from_connections():
                            yield conn
            except TimeoutError as error:
                await self.close()
                raise DatabaseUnavailable("the database does not answer") from error
            except psycopg.errors.ReadOnlySqlTransaction as error:
                await self.close()  # it has become a standby; the DSN finds the new primary
                raise DatabaseUnavailable(str(error)) from error
            except (DatabaseUnavailable, asyncio.CancelledError):
                await self.close()
                raise

    async def _open(self) -> AsyncConnection:
        if self._conn is None or self._conn.closed:
            try:
                self._conn = await open_async_connection(self._dsn, role=CONNECTOR_ROLE)
            except ConfigurationError as error:
                if self._was_there:
                    raise DatabaseUnavailable(str(error)) from error
                raise
            set_json_loads(partial(json.loads, parse_float=Decimal), self._conn)
            self._was_there = True
        return self._conn

    async def close(self) -> None:
        """Close it; the next use opens another one."""
        conn, self._conn = self._conn, None
        if conn is not None:
            with suppress(psycopg.Error):
                await conn.close()


@contextmanager
def _values_told_from_connections() -> Iterator[None]:
    """What psycopg itself refuses to send has no SQLSTATE, as if the server were away."""
    try:
        yield
    except psycopg.DataError as error:
        if error.sqlstate is None:
            raise BadInput(f"the database can't take a value: {error}") from error
        raise


_ACCOUNT = """
    SELECT user_id, account, broker, calendar, time_zone, opens_at, closes_at, orders_per_second,
           messages_per_second, heartbeat_seconds, settings
    FROM broker_account WHERE user_id = %s AND account = %s"""
_COMMAND = "command_id, priority, kind, order_id, payload"
_COPY = """
    COPY broker_event (user_id, account, number, holder, kind, priority, order_ref,
                       broker_order_id, perm_id, execution_id, payload, event_at, received_at)
    FROM STDIN"""


class Store:
    """The database as the connector of one account sees it."""

    def __init__(self, dsn: str, user_id: UUID, account: str, holder: UUID) -> None:
        self._dsn = dsn
        self._key = (user_id, account)
        self._holder = holder
        self._outbox = Link(dsn)
        self._inbox = Link(dsn)

    async def close(self) -> None:
        """Close the connections."""
        await self._outbox.close()
        await self._inbox.close()

    # --- The account and its lease ----------------------------------------------------------

    async def account(self) -> Account:
        """The account; raises BadInput where there is none of that name."""
        async with self._outbox.use() as conn, conn.cursor(row_factory=class_row(Account)) as cur:
            await cur.execute(_ACCOUNT, self._key)
            found = await cur.fetchone()
        if found is None:
            raise BadInput(f"the user has no account {self._key[1]!r}; add it first")
        return found

    async def spans(self, account: Account, now: datetime) -> list[Span]:
        """The sessions around ``now``."""
        if account.opens_at is not None and account.closes_at is not None:
            return daily_spans(account.opens_at, account.closes_at, account.time_zone, now)
        async with self._outbox.use() as conn:
            rows = await conn.execute(
                """SELECT open_at, close_at FROM calendar_session
                   WHERE calendar = %s AND close_at > %s
                     AND session_date >= (%s AT TIME ZONE 'UTC')::date - 2
                   ORDER BY session_date LIMIT %s""",
                [account.calendar, now, now, SPANS_MAX],
            )
            return [Span(*row) for row in await rows.fetchall()]

    async def take_lease(self, holder_name: str, seconds: int) -> None:
        """Hold the account; raises LeaseHeld, which names who does."""
        await self._call("lease_take", self._holder, holder_name, seconds)

    async def renew_lease(
        self, seconds: int, connected: bool, heard_at: datetime | None, skew: timedelta | None
    ) -> None:
        """Hold the account for longer; raises LeaseLost where another has taken it."""
        await self._call("lease_renew", self._holder, seconds, connected, heard_at, skew)

    async def release_lease(self) -> None:
        """Let another connector follow at once."""
        await self._call("lease_release", self._holder)

    async def alert(self, code: str, message: str) -> None:
        """Raise an alert about the account."""
        await self._call("connector_alert", code, message)

    async def _call(self, function: str, *arguments: Any) -> None:
        marks = ", ".join(["%s"] * (len(arguments) + 2))
        async with self._outbox.use() as conn:
            await conn.execute(f"SELECT {function}({marks})".encode(), [*self._key, *arguments])

    # --- The outbox -------------------------------------------------------------------------

    async def claim(self, at_most: int, orders_at_most: int) -> list[Command]:
        """Take the next commands, the most urgent first; raises LeaseLost."""
        query = f"SELECT {_COMMAND} FROM commands_claim(%s, %s, %s, %s, %s)"
        return await self._commands(query, [*self._key, self._holder, at_most, orders_at_most])

    async def claimed(self) -> list[Command]:
        """What this connector has claimed and not said anything of."""
        query = f"""SELECT {_COMMAND} FROM broker_command
                    WHERE user_id = %s AND account = %s AND claimed_by = %s AND done_at IS NULL
                    ORDER BY priority, created_at"""
        return await self._commands(query, [*self._key, self._holder])

    async def _commands(self, query: str, arguments: Sequence[Any]) -> list[Command]:
        async with self._outbox.use() as conn, conn.cursor(row_factory=class_row(Command)) as cur:
            await cur.execute(query.encode(), arguments)
            return await cur.fetchall()

    async def throttled(self, at_most: int) -> list[Waiting]:
        """What waits for the throttle and wasn't told so."""
        async with self._outbox.use() as conn, conn.cursor(row_factory=class_row(Waiting)) as cur:
            await cur.execute("SELECT * FROM commands_throttled(%s, %s, %s)", [*self._key, at_most])
            return await cur.fetchall()

    async def sent_lately(self, now: datetime, seconds: float) -> list[tuple[float, bool]]:
        """Of all that was sent, or claimed to be, in the last seconds: how long ago, and whether
        it was a new order."""
        async with self._outbox.use() as conn:
            rows = await conn.execute(
                """SELECT greatest(0, extract(epoch FROM %(now)s - at))::float8, kind = 'SUBMIT'
                   FROM (SELECT coalesce(sent_at, claimed_at) AS at, kind FROM broker_command
                         WHERE user_id = %(user)s AND account = %(account)s
                           AND (sent_at > %(since)s
                                OR done_at IS NULL AND claimed_at > %(since)s)) s""",
                {
                    "now": now,
                    "since": now - timedelta(seconds=seconds),
                    "user": self._key[0],
                    "account": self._key[1],
                },
            )
            return [(ago, is_order) for ago, is_order in await rows.fetchall()]

    async def wakes(self) -> AsyncIterator[None]:
        """One for every time that the engine says that there is a command; None at first."""
        with translated():
            try:
                conn = await open_async_connection(self._dsn, role=CONNECTOR_ROLE)
            except ConfigurationError as error:
                raise DatabaseUnavailable(str(error)) from error
            async with conn:
                await conn.execute(f"LISTEN {COMMAND_CHANNEL}".encode())
                yield None
                async for notify in conn.notifies():
                    if notify.payload in ("", self._key[1]):
                        yield None

    # --- The inbox --------------------------------------------------------------------------

    async def write(self, batch: Batch) -> None:
        """Commit a batch: what was heard, in its order, and what became of commands.

        After a commit of which nobody heard, the same batch is given again.
        """
        async with self._inbox.use() as conn:
            if not await self._is_there(conn, batch):
                async with conn.transaction():
                    # First what was heard: that a command never went is proven by it.
                    await self._write_heard(conn, batch)
                    await self._write_done(conn, batch.done)
            if batch.heard:
                await conn.execute("SELECT pg_notify(%s, %s)", [EVENT_CHANNEL, self._key[1]])

    async def unheard(self, rows: Sequence[Heard]) -> list[int]:
        """The places of executions, busts and commissions that the inbox does not have."""
        if not rows:
            return []
        async with self._outbox.use() as conn:
            found = await conn.execute(
                "SELECT * FROM executions_unheard(%s, %s, %s::text[], %s::text[])",
                [
                    *self._key,
                    [each.kind for each in rows],
                    [each.payload.get("execution_id") for each in rows],
                ],
            )
            return [int(place) - 1 for (place,) in await found.fetchall()]

    async def _is_there(self, conn: AsyncConnection, batch: Batch) -> bool:
        if batch.numbers is None:
            return False
        rows = await conn.execute(
            """SELECT count(*) FROM broker_event WHERE user_id = %s AND account = %s
               AND number BETWEEN %s AND %s AND holder = %s""",
            [*self._key, batch.numbers[0], batch.numbers[-1], self._holder],
        )
        return await rows.fetchone() == (len(batch.numbers),)

    async def _write_done(self, conn: AsyncConnection, done: Sequence[Done]) -> None:
        if done:
            await conn.execute(
                "SELECT commands_done(%s, %s, %s, %s::uuid[], %s::timestamptz[], %s::text[])",
                [
                    *self._key,
                    self._holder,
                    [each.command_id for each in done],
                    [each.sent_at for each in done],
                    [each.outcome for each in done],
                ],
            )

    async def _write_heard(self, conn: AsyncConnection, batch: Batch) -> None:
        if not batch.heard:
            return
        rows = await conn.execute(
            "SELECT coalesce(max(number), 0) FROM broker_event WHERE user_id = %s AND account = %s",
            self._key,
        )
        last = await rows.fetchone()
        assert last is not None
        batch.numbers = range(last[0] + 1, last[0] + 1 + len(batch.heard))
        async with conn.cursor() as cursor, cursor.copy(_COPY.encode()) as copy:
            for number, each in zip(batch.numbers, batch.heard, strict=True):
                await copy.write_row(self._row(number, each))

    def _row(self, number: int, each: Heard) -> tuple[Any, ...]:
        return (
            *self._key,
            number,
            self._holder,
            each.kind,
            each.priority,
            each.order_ref,
            each.broker_order_id,
            each.perm_id,
            each.payload.get("execution_id"),
            Jsonb(each.payload),
            each.event_at,
            each.received_at,
        )
