"""What ticks told and nobody has written yet: columns for one call of ``ticks_write``.

Any number of ticks are written by one statement: it says what was decided, and the database works
out what follows, or refuses. Values are put into the text of array literals as they come: a batch
holds thousands, and the words, numbers and times that go in are known to need no quoting. Whatever
people may have written is quoted.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from decimal import Decimal
from select import POLLIN, poll
from typing import Any
from uuid import UUID
from weakref import WeakSet

import psycopg
from psycopg.pq import ConnStatus, ExecStatus, TransactionStatus
from psycopg.pq.abc import PGconn, PGresult

from engine.db.connect import Connection
from engine.ledger import Told
from engine.orders.model import Fill, Order

_CALL = """SELECT ticks_write(
    {}::uuid, {}::uuid, {}::bigint, {}::jsonb,
    {}::timestamptz[], {}::text[], {}::text[], {}::jsonb[],
    {}::uuid[], {}::text[], {}::text[], {}::numeric[], {}::text[], {}::text[], {}::numeric[],
    {}::timestamptz[], {}::numeric[], {}::text[], {}::numeric[], {}::numeric[], {}::timestamptz[],
    {}::numeric[], {}::numeric[],
    {}::timestamptz, {}::numeric)"""
_PARAMETERS = _CALL.count("{}")
_TICKS_WRITE = _CALL.format(*["%s"] * _PARAMETERS)
# The same, prepared by us under a name of ours.
_NAME = b"oms_ticks_write"
_PREPARED = _CALL.format(*[f"${place}" for place in range(1, _PARAMETERS + 1)]).encode()
_has_prepared: WeakSet[Connection] = WeakSet()

Taken = list[str | None]


class Journal:
    """Trades, events and ticks of one run, in the order in which the ledger will tell them.

    ``head`` is the number of the last event that is in the ledger. A trade is an order that its
    own tick filled whole, with one execution.
    """

    def __init__(self, head: int) -> None:
        self.head = head
        self._clear()

    def _clear(self) -> None:
        self._told: list[tuple[str, str, str, str]] = []
        self._trades: list[tuple[str, ...]] = []
        self._ticks: list[tuple[str, str]] = []

    @property
    def empty(self) -> bool:
        return not self._told

    @property
    def has_ticks(self) -> bool:
        return bool(self._ticks)

    def place(self) -> tuple[int, int, int]:
        """Where the story stands, for ``back_to``."""
        return len(self._told), len(self._trades), len(self._ticks)

    def back_to(self, place: tuple[int, int, int]) -> None:
        """Forget what was told since."""
        told, trades, ticks = place
        del self._told[told:], self._trades[trades:], self._ticks[ticks:]

    def trade(
        self, order: Order, reference: Decimal, client_order_id: str | None, fill: Fill
    ) -> None:
        """An order placed, and filled whole by ``fill``, its first execution.

        What its two events say follows from the trade, and is worded by the database.
        """
        at = str(order.logical_time)
        self._told.append((at, "ORDER_PLACED", "NULL", "NULL"))
        self._told.append((at, "EXECUTION", "NULL", "NULL"))
        limit, expire = order.limit_price, order.expire_at
        self._trades.append(
            (
                str(order.order_id),
                f'"{order.symbol}"',
                order.side.value,
                str(order.quantity),
                order.order_type.value,
                order.time_in_force.value,
                "NULL" if limit is None else str(limit),
                "NULL" if expire is None else str(expire),
                str(reference),
                "NULL" if client_order_id is None else _quoted(client_order_id),
                str(fill.price),
                str(fill.commission),
                str(fill.event_at),
            )
        )

    def event(
        self, at: datetime, event_type: str, subject: str, payload: Mapping[str, Any]
    ) -> None:
        """Something else that happened, about ``subject``."""
        facts = _quoted(json.dumps(dict(payload)))
        self._told.append((str(at), _quoted(event_type), _quoted(subject), facts))

    def tick(
        self,
        at: datetime,
        told: Told,
        marks: Mapping[str, Decimal],
        marked: Mapping[str, datetime],
    ) -> None:
        """A tick closed, and what it tells: what it did, and what the run is worth.

        ``marks`` are the prices that holdings were marked with, ``marked`` the times of those
        that are older than the tick.
        """
        prices = ",".join([f'\\"{symbol}\\":\\"{price}\\"' for symbol, price in marks.items()])
        facts = (
            f'\\"orders\\":{told.orders},\\"executions\\":{told.executions},'
            f'\\"prices\\":{{{prices}}}'
        )
        if marked:
            times = ",".join([f'\\"{symbol}\\":\\"{when}\\"' for symbol, when in marked.items()])
            facts += f',\\"priced_at\\":{{{times}}}'
        self._told.append((str(at), "TICK", '""', f'"{{{facts}}}"'))
        self._ticks.append((str(told.cash), str(told.market_value)))

    def take(
        self,
        user_id: UUID,
        run_id: UUID,
        state: Mapping[str, Any] | None,
        *,
        now: datetime | None,
        lag_seconds: Decimal | None,
    ) -> Taken:
        """The parameters that write all of it; the journal is empty afterwards.

        ``state`` is the strategy's after the last tick, ``None`` where it stays what it is; ``now``
        the wall clock of a live tick, for the run's heartbeat.
        """
        taken: Taken = [
            str(user_id),
            str(run_id),
            str(self.head),
            None if state is None else json.dumps(dict(state)),
            *_columns(self._told, 4),
            *_columns(self._trades, 13),
            *_columns(self._ticks, 2),
            None if now is None else str(now),
            None if lag_seconds is None else str(lag_seconds),
        ]
        self.head += len(self._told)
        self._clear()
        return taken


def write(conn: Connection, taken: Taken) -> None:
    """Write what was taken from a journal, in one statement.

    Raises Retryable when the run has moved since the journal was begun, and what the database
    refuses, in which case nothing is written.
    """
    if conn.info.transaction_status != TransactionStatus.IDLE:
        conn.execute(_TICKS_WRITE, taken, prepare=True)
        return
    (failure,) = _written(conn, [taken], _write_one)
    if failure is not None:
        raise failure


def write_each(conn: Connection, many: Sequence[Taken]) -> list[psycopg.Error | None]:
    """Write what was taken from several runs' journals, each in a transaction of its own.

    Returns for each why it was not written, or ``None``. They are sent together, so that none
    costs a round trip of its own. The connection must be outside of a transaction.
    """
    return _written(conn, many, _write_in_pipeline) if many else []


Parameters = list[bytes | None]
Failures = list[psycopg.Error | None]


def _written(
    conn: Connection,
    many: Sequence[Taken],
    send: Callable[[PGconn, Sequence[Parameters], str], Failures],
) -> Failures:
    """Send it through libpq itself: a cursor costs more than all that it would do here."""
    encoding = conn.info.encoding
    sent = [[None if text is None else text.encode(encoding) for text in taken] for taken in many]
    with conn.lock:
        if conn not in _has_prepared:
            _prepare(conn, encoding)
        failures = send(conn.pgconn, sent, encoding)
        # psycopg lets the server forget all that is prepared when a transaction is rolled back.
        if isinstance(failures[0], psycopg.errors.InvalidSqlStatementName):
            _prepare(conn, encoding)
            failures = send(conn.pgconn, sent, encoding)
    return failures


def _prepare(conn: Connection, encoding: str) -> None:
    failure = _failure(conn.pgconn.prepare(_NAME, _PREPARED), encoding)
    if failure is not None:
        raise failure
    _has_prepared.add(conn)


def _write_one(server: PGconn, sent: Sequence[Parameters], encoding: str) -> Failures:
    (parameters,) = sent
    # psycopg's types forget that a parameter may be NULL.
    return [_failure(server.exec_prepared(_NAME, parameters), encoding)]  # type: ignore[arg-type]


def _write_in_pipeline(server: PGconn, sent: Sequence[Parameters], encoding: str) -> Failures:
    server.enter_pipeline_mode()
    for parameters in sent:
        server.send_query_prepared(_NAME, parameters)
        # Ends the transaction: what was sent before it can't fail what is sent after it.
        server.pipeline_sync()
    failures = [_answer(server, encoding) for _ in sent]
    if server.status == ConnStatus.OK:
        server.exit_pipeline_mode()
    return failures


def _answer(server: PGconn, encoding: str) -> psycopg.Error | None:
    """The answer to one statement of a pipeline, up to the end of its transaction."""
    failure = None
    try:
        while server.status == ConnStatus.OK:
            # Not left to get_result, which would keep all threads waiting.
            while server.is_busy():
                _await_word(server)
            result = server.get_result()
            if result is None:  # the end of what one statement answers
                continue
            if result.status == ExecStatus.PIPELINE_SYNC:
                return failure
            failure = failure or _failure(result, encoding)
    except psycopg.OperationalError as lost:
        return failure or lost
    return failure or psycopg.OperationalError("the connection is lost")


def _await_word(server: PGconn) -> None:
    waiting = poll()
    waiting.register(server.socket, POLLIN)
    waiting.poll()
    server.consume_input()


def _failure(result: PGresult, encoding: str) -> psycopg.Error | None:
    if result.status in (ExecStatus.TUPLES_OK, ExecStatus.COMMAND_OK):
        return None
    return psycopg.errors.error_from_result(result, encoding)


def _columns(rows: Sequence[tuple[str, ...]], width: int) -> list[str]:
    if not rows:
        return ["{}"] * width
    return ["{" + ",".join(column) + "}" for column in zip(*rows, strict=True)]


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
