"""Connections: the one place that opens them, and the role and settings that they have."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import psycopg
from psycopg.pq import TransactionStatus
from psycopg.rows import TupleRow

from engine.errors import ConfigurationError

if TYPE_CHECKING:
    import sqlalchemy

Connection = psycopg.Connection[TupleRow]
AsyncConnection = psycopg.AsyncConnection[TupleRow]

ENGINE_ROLE = "oms_engine"
CONNECTOR_ROLE = "oms_connector"
CONNECT_TIMEOUT_SECONDS = 10
LOCK_TIMEOUT_MS = 30_000
# A machine that is gone says nothing: so long until we notice, when we wait and when we send.
KEEPALIVE_IDLE_SECONDS, KEEPALIVE_SECONDS, KEEPALIVES_MAX = 10, 5, 4
TCP_USER_TIMEOUT_MS = 30_000
# A server that hangs keeps its connections alive: after this long without an answer it counts as
# gone. It ends a statement itself before that, so that nothing goes on that nobody waits for.
ANSWER_SECONDS_MAX = 60.0
STATEMENT_SHARE = 0.8
POOL_SIZE_MAX = 5
_SETTINGS: dict[str, Any] = {
    "application_name": "oms",
    "connect_timeout": CONNECT_TIMEOUT_SECONDS,
    "keepalives_idle": KEEPALIVE_IDLE_SECONDS,
    "keepalives_interval": KEEPALIVE_SECONDS,
    "keepalives_count": KEEPALIVES_MAX,
    "tcp_user_timeout": TCP_USER_TIMEOUT_MS,
    "options": f"-c timezone=UTC -c lock_timeout={LOCK_TIMEOUT_MS}",
}


class _Impatient(psycopg.Connection[TupleRow]):
    """A connection that waits for an answer for so long and no longer."""

    answer_seconds: float

    def wait(self, gen: Generator[Any, Any, Any], *args: Any, **kwargs: Any) -> Any:
        # psycopg comes by several times a second while it waits, whether there is news or not.
        return super().wait(self._in_time(gen), *args, **kwargs)

    def _in_time(self, gen: Generator[Any, Any, Any]) -> Generator[Any, Any, Any]:
        ends_at = time.monotonic() + self.answer_seconds
        ready = None
        while True:
            try:
                awaited = gen.send(ready)
            except StopIteration as done:
                return done.value
            ready = yield awaited
            if not ready and time.monotonic() >= ends_at:
                # Whatever it still says would be taken for the answer to another question.
                self.close()
                raise psycopg.OperationalError(
                    f"the server has not answered for {self.answer_seconds:g} s"
                )


def open_connection(
    dsn: str, *, role: str | None = None, answer_seconds: float | None = None
) -> Connection:
    """A connection in autocommit: every write names its own transaction.

    ``role`` is what it acts as, where the login may. With ``answer_seconds`` a server that does
    not answer for that long counts as gone. Raises ConfigurationError in one sentence where the
    server can't be reached.
    """
    with _told_in_one_sentence():
        if answer_seconds is None:
            conn = psycopg.connect(dsn, autocommit=True, **_SETTINGS)
        else:
            conn = _open_impatient(dsn, answer_seconds)
    if role is not None:
        _act_as(conn, role)
    return conn


def _open_impatient(dsn: str, answer_seconds: float) -> Connection:
    statement_ms = round(answer_seconds * 1000 * STATEMENT_SHARE)
    options = f"{_SETTINGS['options']} -c statement_timeout={statement_ms}"
    conn = _Impatient.connect(dsn, autocommit=True, **{**_SETTINGS, "options": options})
    conn.answer_seconds = answer_seconds
    return conn


async def open_async_connection(dsn: str, *, role: str | None = None) -> AsyncConnection:
    """What ``open_connection`` returns, for programs that wait for many things at once."""
    with _told_in_one_sentence():
        conn = await psycopg.AsyncConnection.connect(dsn, autocommit=True, **_SETTINGS)
    if role is not None:
        try:
            with _unless_not_ours():
                await conn.execute(f"SET ROLE {role}".encode())
        except BaseException:  # a cancellation, too: nobody else would close it
            await conn.close()
            raise
    return conn


@contextmanager
def _told_in_one_sentence() -> Iterator[None]:
    try:
        yield
    except psycopg.OperationalError as error:
        lines = str(error).strip().splitlines()
        # The last lines are libpq's questions; of several attempts each has its own line.
        reason = next((line.strip() for line in lines if "failed: " in line), lines[0])
        raise ConfigurationError(
            f"can't connect to Postgres: {reason}; check DB_DSN or run `oms db start`"
        ) from error
    except psycopg.ProgrammingError as error:
        raise ConfigurationError(
            f"the DSN can't be read: {str(error).strip()}; write it as postgresql://user@host/name"
        ) from error


def _unless_not_ours() -> suppress:
    """A role that isn't there, or isn't the login's to act as, is left out."""
    return suppress(psycopg.errors.InsufficientPrivilege, psycopg.errors.InvalidParameterValue)


def _act_as(conn: Connection, role: str) -> None:
    """Act with the least rights that serve; without the role, with the login's own."""
    with _unless_not_ours():
        conn.execute(f"SET ROLE {role}")


@contextmanager
def connected(
    dsn: str, *, role: str | None = ENGINE_ROLE, answer_seconds: float | None = None
) -> Iterator[Connection]:
    """A connection for the length of a block, as the engine's role."""
    with open_connection(dsn, role=role, answer_seconds=answer_seconds) as conn:
        yield conn


@contextmanager
def snapshot(conn: Connection) -> Iterator[None]:
    """Read everything in the block as of one moment; within a transaction, as that one does."""
    began = conn.info.transaction_status == TransactionStatus.IDLE
    with conn.transaction():
        if began:
            conn.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")
        yield


def pool(dsn: str, *, role: str | None = ENGINE_ROLE) -> sqlalchemy.Engine:
    """A pool for programs that stay up; a connection that broke is replaced."""
    import sqlalchemy

    return sqlalchemy.create_engine(
        "postgresql+psycopg://",
        creator=lambda: open_connection(dsn, role=role, answer_seconds=ANSWER_SECONDS_MAX),
        isolation_level="AUTOCOMMIT",
        pool_pre_ping=True,
        pool_size=POOL_SIZE_MAX,
        max_overflow=0,
    )


@contextmanager
def pooled(engine: sqlalchemy.Engine) -> Iterator[Connection]:
    """A psycopg connection borrowed from a pool."""
    borrowed = engine.raw_connection()
    try:
        driver: Any = borrowed.driver_connection
        yield driver
    finally:
        borrowed.close()
