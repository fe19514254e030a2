"""What ticks told and nobody has written yet: columns for one call of ``ticks_write``.

Any number of ticks are written by one statement: it says what was decided, and the database works
out what follows, or refuses. Values are put into the text of array literals as they come: a batch
holds thousands, and the words, numbers and times that go in are known to need no quoting. Whatever
people may have written is quoted.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from decimal import Decimal
from select import POLLIN, poll
from typing import Any, NamedTuple
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
_LOST = "the connection is lost"
_has_prepared: WeakSet[Connection] = WeakSet()


class Taken(NamedTuple):
    """What was taken from a journal: the parameters that write it, and how many events they tell.

    ``ticks`` is how many events there are up to the end of each tick, in order.
    """

    parameters: list[str | None]
    events: int
    ticks: list[int]

    def whole_ticks(self, written: int) -> int:
        """How many of the ticks are in so many events."""
        return bisect_right(self.ticks, written)


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
        """What writes all of it; the journal is empty afterwards.

        ``state`` is the strategy's after the last tick, ``None`` where it stays what it is; ``now``
        the wall clock of a live tick, for the run's heartbeat.
        """
        parameters = [
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
        ticks = [number for number, told in enumerate(self._told, 1) if told[1] == "TICK"]
        taken = Taken(parameters, len(self._told), ticks)
        self.head += taken.events
        self._clear()
        return taken


def write(conn: Connection, taken: Taken) -> int:
    """Write what was taken from a journal, in one statement; returns how many events are written.

    These are all, or the ticks before the one with an order that the gate refuses. Raises Retryable
    when the run has moved since the journal was begun, and what else the database refuses, in
    which case nothing is written.
    """
    if conn.info.transaction_status != TransactionStatus.IDLE:
        row = conn.execute(_TICKS_WRITE, taken.parameters, prepare=True).fetchone()
        assert row is not None
        written: int = row[0]
        return written
    (answer,) = _written(conn, [taken], _write_one)
    if isinstance(answer, psycopg.Error):
        raise answer
    return answer


def write_each(conn: Connection, many: Sequence[Taken]) -> list[int | psycopg.Error]:
    """Write what was taken from several runs' journals, each in a transaction of its own.

    Returns for each how many events are written, as ``write`` does, or why none is. They are sent
    together, so that none costs a round trip of its own. The connection must be outside of a
    transaction.
    """
    return _written(conn, many, _write_in_pipeline) if many else []


Parameters = list[bytes | None]
Answers = list[int | psycopg.Error]


def _written(
    conn: Connection,
    many: Sequence[Taken],
    send: Callable[[PGconn, Sequence[Parameters], str], Answers],
) -> Answers:
    """Send it through libpq itself: a cursor costs more than all that it would do here."""
    encoding = conn.info.encoding
    sent = [
        [None if text is None else text.encode(encoding) for text in taken.parameters]
        for taken in many
    ]
    with conn.lock:
        if conn not in _has_prepared:
            _prepare(conn, encoding)
        answers = send(conn.pgconn, sent, encoding)
        # psycopg lets the server forget all that is prepared when a transaction is rolled back.
        if isinstance(answers[0], psycopg.errors.InvalidSqlStatementName):
            _prepare(conn, encoding)
            answers = send(conn.pgconn, sent, encoding)
    return answers


def _prepare(conn: Connection, encoding: str) -> None:
    result = conn.pgconn.prepare(_NAME, _PREPARED)
    if result.status != ExecStatus.COMMAND_OK:
        raise psycopg.errors.error_from_result(result, encoding)
    _has_prepared.add(conn)


def _write_one(server: PGconn, sent: Sequence[Parameters], encoding: str) -> Answers:
    (parameters,) = sent
    # psycopg's types forget that a parameter may be NULL.
    result = server.exec_prepared(_NAME, parameters)  # type: ignore[arg-type]
    return [_answer_of(result, encoding)]


def _write_in_pipeline(server: PGconn, sent: Sequence[Parameters], encoding: str) -> Answers:
    server.enter_pipeline_mode()
    for parameters in sent:
        server.send_query_prepared(_NAME, parameters)
        # Ends the transaction: what was sent before it can't fail what is sent after it.
        server.pipeline_sync()
    answers = [_next_answer(server, encoding) for _ in sent]
    if server.status == ConnStatus.OK:
        server.exit_pipeline_mode()
    return answers


def _next_answer(server: PGconn, encoding: str) -> int | psycopg.Error:
    """The answer to one statement of a pipeline, up to the end of its transaction."""
    answer: int | psycopg.Error = psycopg.OperationalError(_LOST)
    try:
        while server.status == ConnStatus.OK:
            # Not left to get_result, which would keep all threads waiting.
            while server.is_busy():
                _await_word(server)
            result = server.get_result()
            if result is None:  # the end of what one statement answers
                continue
            if result.status == ExecStatus.PIPELINE_SYNC:
                return answer
            # A commit that fails answers after the statement.
            answer = _answer_of(result, encoding)
    except psycopg.OperationalError as lost:
        return lost
    return answer if isinstance(answer, psycopg.Error) else psycopg.OperationalError(_LOST)


def _await_word(server: PGconn) -> None:
    waiting = poll()
    waiting.register(server.socket, POLLIN)
    waiting.poll()
    server.consume_input()


def _answer_of(result: PGresult, encoding: str) -> int | psycopg.Error:
    """How many events a statement has written, or why none."""
    if result.status != ExecStatus.TUPLES_OK:
        return psycopg.errors.error_from_result(result, encoding)
    return int(result.get_value(0, 0) or 0)


def _columns(rows: Sequence[tuple[str, ...]], width: int) -> list[str]:
    if not rows:
        return ["{}"] * width
    return ["{" + ",".join(column) + "}" for column in zip(*rows, strict=True)]


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
