"""The inbox: what brokers said is classified and taken into the books, each word once.

A batch of one account's words is applied in one transaction, in the order in which they arrived,
those about risk before the rest: the runs are locked, the orders read, ``engine.orders.lifecycle``
says what each word is, and what follows is written in a few statements. Every row of the inbox
keeps what became of it. Any number of workers may share the work; ``Part`` gives each its orders.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from uuid import UUID

from engine.db.connect import Connection
from engine.errors import BadInput, EngineError, RuleViolation, translated
from engine.log import tell
from engine.orders import broker_write
from engine.orders.lifecycle import (
    SKEW_MAX,
    Finding,
    Heard,
    Identify,
    OrderState,
    Tell,
    Verdict,
    hear,
    skew_words,
)

# How many words one transaction takes in: the longest that a tick of the run has to wait.
BATCH_EVENTS = 500

_OF_ORDERS = frozenset(
    {
        "ORDER_STATUS",
        "MODIFIED",
        "EXECUTION",
        "BUST",
        "COMMISSION",
        "REJECTED",
        "CANCEL_REJECTED",
        "MODIFY_REJECTED",
    }
)
_NEED_EXECUTION = frozenset({"COMMISSION", "BUST"})
# Held words whose turn has come: their execution is booked now, and their rate is known.
_IS_READY = """e.finding = 'HELD' AND e.kind IN ('COMMISSION', 'BUST') AND EXISTS (
    SELECT FROM execution x
    JOIN orders o ON o.user_id = x.user_id AND o.run_id = x.run_id AND o.order_id = x.order_id
    JOIN strategy_run r ON r.user_id = x.user_id AND r.run_id = x.run_id
    WHERE x.user_id = e.user_id AND o.account = e.account AND x.execution_id = e.execution_id
      AND r.status IN ('RUNNING', 'STOPPING')
      AND (e.kind = 'BUST'
           OR fx_rate_at(e.payload ->> 'currency', r.currency, e.event_at) IS NOT NULL))"""
_BOOKED = (Finding.NEW, Finding.CORRECTION, Finding.ORPHAN)
# Words of the connection and the account that a person must know of.
_ALARMS: Mapping[str, str] = {
    "STOLEN": "CONNECTION_STOLEN",
    "ACCOUNT_MISMATCH": "ACCOUNT_MISMATCH",
    "SEND_FAILED": "SEND_FAILED",
}


class Part(NamedTuple):
    """The share of the orders that a worker takes: ``number`` of ``of``, from 1 on."""

    number: int = 1
    of: int = 1


@dataclass(slots=True)
class Applied:
    """What a batch did: how many words it took, how many of them were fills that it booked, and
    the codes of what they turned out to be."""

    events: int = 0
    fills: int = 0
    codes: list[str] = field(default_factory=list)
    runs: set[UUID] = field(default_factory=set)
    # Filled orders that flatten, with their runs.
    flattened: set[tuple[UUID, UUID]] = field(default_factory=set)
    # Whether there were words about the connection or the account.
    of_account: bool = False


class _Row(NamedTuple):
    """A word and the order that it is about, as far as that is known."""

    heard: Heard
    order_ref: str | None
    run_id: UUID | None
    order_id: UUID | None
    reused: bool

    @property
    def ref(self) -> UUID | None:
        """Our order id in the broker's reference; ``None`` for what was not placed by us."""
        try:
            return UUID(self.order_ref) if self.order_ref else None
        except ValueError:
            return None


def _until_ids_change(rows: list[_Row]) -> list[_Row]:
    """The words up to one whose id has meant another order, or none, in this batch.

    Whose it is shows when those before it are booked: the next batch begins with it.
    """
    meant: dict[tuple[str, int], UUID | None] = {}
    for place, row in enumerate(rows):
        for name, number in (("perm", row.heard.perm_id), ("id", row.heard.broker_order_id)):
            if number and meant.setdefault((name, number), row.order_id) != row.order_id:
                return rows[:place]
    return rows


def waiting(conn: Connection) -> list[tuple[UUID, str]]:
    """The accounts, with their users, whose inbox holds words that nobody has applied."""
    rows = conn.execute(
        "SELECT DISTINCT user_id, account FROM broker_event WHERE applied_at IS NULL"
    ).fetchall()
    return [(user_id, account) for user_id, account in rows]


def apply_batch(
    conn: Connection,
    user_id: UUID,
    account: str,
    *,
    part: Part = Part(),  # noqa: B008  (an immutable value)
    limit: int = BATCH_EVENTS,
) -> Applied:
    """Apply the next words of an account's inbox in one transaction; none left: 0 events.

    A word whose booking the database refuses is set aside with its reason (finding REFUSED) and
    raises a person; the words around it are applied. Raises Retryable where another transaction
    was in the way, and DatabaseUnavailable.
    """
    batch = _Batch(conn, user_id, account, part)
    try:
        with translated(), conn.transaction():
            applied = batch.apply(limit)
        batch.report()
    except (RuleViolation, BadInput) as violation:
        if batch.applied.events > 1:
            # By halves, so that what stands before it is not tried one by one.
            limit = batch.applied.events // 2
            return apply_batch(conn, user_id, account, part=part, limit=limit)
        return _Batch(conn, user_id, account, part).set_aside(batch.first, violation)
    return applied


def retry_held(conn: Connection, user_id: UUID, account: str) -> int:
    """Book what was held for an execution or an exchange rate that is there now.

    Returns how many words that were. Raises as ``apply_batch`` does.
    """
    batch = _Batch(conn, user_id, account, Part())
    with translated(), conn.transaction():
        applied = batch.apply_held()
    batch.report()
    return applied.events


class _Batch:
    """One transaction's words of one account."""

    def __init__(self, conn: Connection, user_id: UUID, account: str, part: Part) -> None:
        self.conn = conn
        self.user_id = user_id
        self.account = account
        self.part = part
        self.orders: dict[UUID, OrderState] = {}
        self.closed_runs: set[UUID] = set()
        self.currencies: dict[UUID, str] = {}
        self.held: dict[str, list[Heard]] = {}
        self.writer = broker_write.Writer(conn, user_id, account)
        self.applied = Applied()
        self.told: list[tuple[str, Mapping[str, Any], str | None]] = []
        self.numbers: list[int] = []

    @property
    def first(self) -> int:
        """The number of the first word."""
        return self.numbers[0]

    def apply(self, limit: int) -> Applied:
        self._hear_all(self._take(limit))
        return self.applied

    def apply_held(self) -> Applied:
        """Hear again what was held for want of what is there now."""
        self._hear_all(self._take(BATCH_EVENTS, held=True))
        return self.applied

    def _hear_all(self, rows: Sequence[_Row]) -> None:
        self.numbers = [row.heard.number for row in rows]
        self.applied.events = len(rows)
        self.held = self._held_for(rows)
        for row in rows:
            self._take_in(row)
        self.writer.write_out()

    def report(self) -> None:
        """Log what was committed."""
        for code, facts, alarm in self.told:
            level = logging.WARNING if alarm else logging.INFO
            # A broker's payload may name anything, "account" and "level" too.
            tell(code, **{**facts, "level": level, "account": self.account})

    def _take_in(self, row: _Row) -> None:
        """Hear a word, and what has waited for it."""
        verdict = self._hear(row)
        self._note(row, verdict)
        name = row.heard.execution_id or ""
        if verdict.finding is Finding.HELD and row.heard.kind in _NEED_EXECUTION:
            self.held.setdefault(name, []).append(row.heard)
        elif row.heard.kind == "EXECUTION" and verdict.finding in _BOOKED:
            for waited in self.held.pop(name, ()):
                self._take_in(_Row(waited, row.order_ref, None, self._order_of(row), False))

    def set_aside(self, number: int, violation: EngineError) -> Applied:
        """Mark a word as refused by the database, unless another worker has meanwhile."""
        with translated(), self.conn.transaction():
            rows = self._read(1, lock=True, upto=[number])
            if not rows:
                return Applied(1)
            words = f"{rows[0].heard.kind} {number} of {self.account}: {violation}"
            verdict = Verdict(Finding.REFUSED, "EVENT_REFUSED")
            self.writer.alert("EVENT_REFUSED", f"{self.account}/{number}", words, None)
            self.writer.finding(number, verdict, str(violation)[:1000])
            self.writer.write_out()
        tell("EVENT_REFUSED", level=logging.ERROR, account=self.account, reason=str(violation))
        return Applied(1, codes=["EVENT_REFUSED"])

    def _take(self, limit: int, *, held: bool = False) -> list[_Row]:
        """The next words, their runs locked first, and their orders read."""
        rows: list[_Row] = []
        while looked_at := self._read(limit, lock=False, held=held):
            self._lock_runs(row.run_id for row in looked_at)
            # Another worker may have taken some of them, or all, while the runs were waited for.
            numbers = [row.heard.number for row in looked_at]
            if rows := self._read(limit, lock=True, upto=numbers, held=held):
                break
        rows = _until_ids_change(rows)
        self.orders = broker_write.order_states(
            self.conn, self.user_id, {row.order_id for row in rows if row.order_id is not None}
        )
        return rows

    def _lock_runs(self, runs: Iterable[UUID | None]) -> None:
        wanted = sorted({run for run in runs if run is not None} - self.applied.runs)
        rows = self.conn.execute(
            """SELECT run_id, status, currency FROM strategy_run
               WHERE user_id = %s AND run_id = ANY (%s) ORDER BY run_id FOR NO KEY UPDATE""",
            [self.user_id, wanted],
        ).fetchall()
        for run_id, status, currency in rows:
            self.applied.runs.add(run_id)
            self.currencies[run_id] = currency
            if status not in ("RUNNING", "STOPPING"):
                self.closed_runs.add(run_id)

    def _read(
        self, limit: int, *, lock: bool, upto: Sequence[int] | None = None, held: bool = False
    ) -> list[_Row]:
        among = "" if upto is None else "AND e.number = ANY (%(upto)s)"
        waits = _IS_READY if held else "e.applied_at IS NULL"
        share = (
            ""
            if self.part.of == 1
            else "AND mod(hashtext(coalesce(e.order_ref, '')) & 2147483647, %(of)s) = %(part)s"
        )
        rows = self.conn.execute(
            f"""SELECT e.number, e.kind, e.payload, e.event_at, e.received_at, e.execution_id,
                       e.broker_order_id, e.perm_id, coalesce(e.order_ref, x.order_ref),
                       o.run_id, o.order_id, coalesce(o.reused, false)
                FROM (SELECT * FROM broker_event e
                      WHERE e.user_id = %(user)s AND e.account = %(account)s
                        AND {waits} {among} {share}
                      ORDER BY e.priority, e.number LIMIT %(limit)s
                      {"FOR UPDATE" if lock else ""}) e
                LEFT JOIN LATERAL (
                    SELECT b.order_ref, b.perm_id, b.broker_order_id FROM broker_event b
                    WHERE b.user_id = e.user_id AND b.account = e.account
                      AND b.execution_id = e.execution_id AND b.kind = 'EXECUTION'
                      AND e.kind IN ('COMMISSION', 'BUST')
                    LIMIT 1) x ON true
                LEFT JOIN LATERAL order_of_broker(
                    e.user_id, e.account, coalesce(e.order_ref, x.order_ref),
                    coalesce(nullif(e.perm_id, 0), x.perm_id),
                    coalesce(nullif(e.broker_order_id, 0), x.broker_order_id), e.event_at) o
                    ON e.kind = ANY (%(kinds)s)
                ORDER BY e.priority, e.number""",
            {
                "user": self.user_id,
                "account": self.account,
                "upto": upto,
                "of": self.part.of,
                "part": self.part.number - 1,
                "limit": limit,
                "kinds": list(_OF_ORDERS),
            },
        ).fetchall()
        return [_Row(Heard(*row[:8]), *row[8:]) for row in rows]

    def _held_for(self, rows: Sequence[_Row]) -> dict[str, list[Heard]]:
        """Commissions and busts that came before the executions that are here now."""
        wanted = [row.heard.execution_id for row in rows if row.heard.kind == "EXECUTION"]
        held: dict[str, list[Heard]] = {}
        if not wanted:
            return held
        found = self.conn.execute(
            """SELECT number, kind, payload, event_at, received_at, execution_id, broker_order_id,
                      perm_id
               FROM broker_event
               WHERE user_id = %s AND account = %s AND execution_id = ANY (%s)
                 AND finding = 'HELD' AND kind IN ('COMMISSION', 'BUST')
               ORDER BY number""",
            [self.user_id, self.account, wanted],
        ).fetchall()
        for row in found:
            heard = Heard(*row)
            held.setdefault(heard.execution_id or "", []).append(heard)
        return held

    def _order_of(self, row: _Row) -> UUID | None:
        return row.order_id if row.order_id is not None else row.ref

    def _hear(self, row: _Row) -> Verdict:
        heard = row.heard
        if heard.kind not in _OF_ORDERS:
            self.applied.of_account = True
            return self._hear_account(heard)
        order_id = self._order_of(row)
        order = self.orders.get(order_id) if order_id is not None else None
        if order is None:
            return self._hear_unknown(row)
        if order.run_id in self.closed_runs:
            return self._hear_too_late(order, heard)
        if heard.kind == "COMMISSION" and self._lacks_rate(order, heard):
            return Verdict(Finding.HELD, "FX_RATE_MISSING")
        verdict = hear(order, heard)
        if row.reused and any(isinstance(effect, Identify) for effect in verdict.effects):
            reuse = Tell("ORDER_ID_REUSE", {"broker_order_id": heard.broker_order_id})
            verdict.effects = [*verdict.effects, reuse]
            verdict.code = verdict.code or "ORDER_ID_REUSE"
        self._keep(order, heard, verdict)
        return verdict

    def _lacks_rate(self, order: OrderState, heard: Heard) -> bool:
        """Whether a commission in another currency can't be converted at its time."""
        paid, ours = str(heard.payload.get("currency")), self.currencies[order.run_id]
        if paid == ours or broker_write.has_rate(self.conn, paid, ours, heard.event_at):
            return False
        words = f"no rate from {paid} to {ours} at {heard.event_at.isoformat()}; import it"
        self.writer.alert("FX_RATE_MISSING", f"{paid}{ours}", words, order.run_id)
        return True

    def _keep(self, order: OrderState, heard: Heard, verdict: Verdict) -> None:
        """Remember what is to be written of an order."""
        if order.purpose == "FLATTEN" and heard.kind == "EXECUTION":
            self.applied.flattened.add((order.run_id, order.order_id))
        for effect in verdict.effects:
            if isinstance(effect, Tell):
                facts = {"order_id": order.order_id, "symbol": order.symbol, **effect.facts}
                subject = f"{order.order_id}@{heard.number}"
                self.writer.event(order.run_id, effect.code, subject, effect.facts)
                if effect.alarm is not None:
                    # A clock is the account's: one alert for all the words that it stamps.
                    about = self.account if effect.code == "TIME_SKEW" else subject
                    self.writer.alert(effect.code, about, effect.alarm, order.run_id)
                self.told.append((effect.code, facts, effect.alarm))
            else:
                self.writer.effect(order, effect)

    def _hear_account(self, heard: Heard) -> Verdict:
        """A word about the connection or the account."""
        code = _ALARMS.get(heard.kind)
        if heard.kind == "THROTTLED":
            self.writer.throttled(heard.payload)
            code = str(heard.payload.get("code", "THROTTLED"))
        elif heard.kind == "DISCONNECTED":
            self.writer.unanswered(heard.number)
        elif heard.kind == "CONNECTED":
            code = self._skew(heard)
        elif code is not None:
            words = f"{self.account}: {heard.kind} {dict(heard.payload)}"
            self.writer.alert(code, self.account, words, None)
        if code is not None:
            alarm = code if heard.kind in _ALARMS else None
            self.told.append((code, dict(heard.payload), alarm))
        return Verdict(Finding.NEW, code)

    def _skew(self, heard: Heard) -> str | None:
        seconds = (heard.received_at - heard.event_at).total_seconds()
        if abs(seconds) <= SKEW_MAX.total_seconds():
            return None
        words = f"{self.account}: {skew_words(seconds)}"
        self.writer.alert("TIME_SKEW", self.account, words, None)
        return "TIME_SKEW"

    def _hear_too_late(self, order: OrderState, heard: Heard) -> Verdict:
        """The run has ended and its books are closed: kept for a person."""
        if heard.kind == "EXECUTION":
            words = (
                f"run {order.run_id} has ended, order {order.order_id} in {order.symbol} was "
                f"filled since: {dict(heard.payload)}"
            )
            self.writer.alert("FILL_AFTER_STOP", str(heard.execution_id), words, order.run_id)
            self.told.append(("FILL_AFTER_STOP", {"order_id": order.order_id}, words))
            return Verdict(Finding.HELD, "FILL_AFTER_STOP")
        return Verdict(Finding.HELD)

    def _hear_unknown(self, row: _Row) -> Verdict:
        """A word about an order that our books don't have."""
        heard, ref = row.heard, row.ref
        if heard.kind in ("COMMISSION", "BUST"):
            return Verdict(Finding.HELD)
        if ref is None:
            name = heard.perm_id or heard.broker_order_id or "without an id"
            words = f"{self.account}: order {name} is not ours; it is watched, not touched"
            self.writer.alert("FOREIGN_ORDER", f"{self.account}/{name}", words, None)
            self.told.append(("FOREIGN_ORDER", {"perm_id": heard.perm_id}, words))
            return Verdict(Finding.FOREIGN, "FOREIGN_ORDER")
        if heard.kind != "EXECUTION":
            # What it is, only a snapshot tells; reconciliation takes it up.
            return Verdict(Finding.ORPHAN, "ORPHAN_ORDER")
        return self._adopt(ref, heard)

    def _adopt(self, ref: UUID, heard: Heard) -> Verdict:
        """Make up the order that a fill belongs to, and book it."""
        if not broker_write.is_whole(heard):
            words = f"{self.account}: fill of unknown order {ref} lacks its facts"
            self.writer.alert("EXECUTION_INCOMPLETE", f"{ref}@{heard.number}", words, None)
            self.told.append(("EXECUTION_INCOMPLETE", {"order_id": ref}, words))
            return Verdict(Finding.REFUSED, "EXECUTION_INCOMPLETE")
        run_id = broker_write.adopting_run(self.conn, self.user_id, self.account)
        subject = f"{ref}@{heard.number}"
        if run_id is None:
            words = f"{self.account}: fill of unknown order {ref}, and no run that takes it up"
            self.writer.alert("ORPHAN_FILL", subject, words, None)
            self.told.append(("ORPHAN_FILL", {"order_id": ref}, words))
            return Verdict(Finding.HELD, "ORPHAN_FILL")
        self._lock_runs([run_id])
        order = broker_write.recover_order(
            self.conn, self.user_id, run_id, self.account, ref, heard
        )
        self.orders[ref] = order
        words = f"{self.account}: fill of unknown order {ref}; it was taken up as recovered"
        verdict = hear(order, heard)
        verdict.effects = [*verdict.effects, Tell("ORPHAN_FILL", {"order_id": str(ref)}, words)]
        self._keep(order, heard, verdict)
        return Verdict(Finding.ORPHAN, "ORPHAN_FILL")

    def _note(self, row: _Row, verdict: Verdict) -> None:
        self.writer.finding(row.heard.number, verdict, None)
        if row.heard.kind == "EXECUTION" and verdict.finding in _BOOKED:
            self.applied.fills += 1
        if verdict.code is not None:
            self.applied.codes.append(verdict.code)
