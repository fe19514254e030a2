"""Orders at brokers, as the inbox reads and writes them: a few statements for a whole batch."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from typing import Any
from uuid import UUID

from psycopg.types.json import Jsonb

from engine.db.connect import Connection
from engine.log import tell
from engine.orders.lifecycle import (
    Change,
    Charge,
    Execute,
    Executed,
    Heard,
    Identify,
    OrderState,
    Terms,
    Verdict,
)
from engine.orders.model import Side


def order_states(
    conn: Connection, user_id: UUID, order_ids: Collection[UUID]
) -> dict[UUID, OrderState]:
    """Orders as far as their brokers' words concern them, by their ids."""
    if not order_ids:
        return {}
    parameters: dict[str, Any] = {"user": user_id, "orders": list(order_ids)}
    rows = conn.execute(
        """SELECT o.account, o.order_id, o.run_id, o.symbol, o.side, o.status, o.quantity,
                  o.limit_price, o.stop_price, o.filled_quantity, o.purpose, o.recovered,
                  o.pending_reconcile, coalesce(i.negative_price_allowed, false)
           FROM orders o LEFT JOIN instrument i ON i.symbol = o.symbol
           WHERE o.user_id = %(user)s AND o.order_id = ANY (%(orders)s) AND o.broker <> 'paper'""",
        parameters,
    ).fetchall()
    states = {}
    for _, order_id, run_id, symbol, side, status, quantity, limit_price, *rest in rows:
        stop_price, *more = rest
        states[order_id] = OrderState(
            order_id,
            run_id,
            symbol,
            Side(side),
            status,
            Terms(quantity, limit_price, stop_price),
            *more,
        )
    # Asked for by whole keys: a planner without statistics finds no better way than the index.
    parameters["orders"] = list(states)
    parameters["runs"] = list({state.run_id for state in states.values()})
    parameters["accounts"] = list({account for account, *_ in rows})
    _add_executions(conn, states, parameters)
    _add_ids(conn, states, parameters)
    _add_words(conn, states, parameters)
    return states


def _add_executions(
    conn: Connection, states: dict[UUID, OrderState], parameters: Mapping[str, Any]
) -> None:
    rows = conn.execute(
        """SELECT e.order_id, e.execution_id, e.quantity, e.price, e.event_at, e.reverses,
                  c.amount, c.currency
           FROM execution e
           LEFT JOIN execution_commission c ON c.user_id = e.user_id AND c.run_id = e.run_id
                                           AND c.execution_id = e.execution_id
           WHERE e.user_id = %(user)s AND e.run_id = ANY (%(runs)s)
             AND e.order_id = ANY (%(orders)s)""",
        parameters,
    ).fetchall()
    for order_id, execution_id, quantity, price, event_at, reverses, amount, currency in rows:
        state = states[order_id]
        if reverses is None:
            state.executions[execution_id] = Executed(quantity, price, event_at)
        else:
            state.reversed[reverses] = event_at
        if amount is not None:
            state.commissions[execution_id] = (amount, currency)


def _add_ids(
    conn: Connection, states: dict[UUID, OrderState], parameters: Mapping[str, Any]
) -> None:
    for order_id, broker_order_id, perm_id in conn.execute(
        """SELECT m.order_id, m.broker_order_id, m.perm_id
           FROM order_broker_id m
           WHERE m.user_id = %(user)s AND m.run_id = ANY (%(runs)s)
             AND m.order_id = ANY (%(orders)s)""",
        parameters,
    ).fetchall():
        states[order_id].ids.add((broker_order_id, perm_id))
    for order_id, quantity, limit_price, stop_price in conn.execute(
        """SELECT c.order_id, (c.payload ->> 'quantity')::numeric,
                  (c.payload ->> 'limit_price')::numeric, (c.payload ->> 'stop_price')::numeric
           FROM broker_command c
           WHERE c.user_id = %(user)s AND c.run_id = ANY (%(runs)s)
             AND c.order_id = ANY (%(orders)s) AND c.kind = 'MODIFY'
             AND c.claimed_by IS NOT NULL""",
        parameters,
    ).fetchall():
        states[order_id].asked.append(Terms(quantity, limit_price, stop_price))


def _add_words(
    conn: Connection, states: dict[UUID, OrderState], parameters: Mapping[str, Any]
) -> None:
    """What brokers have said of the orders' lives, in the order in which it was heard."""
    heard_at: dict[UUID, datetime] = {}
    for order_id, kind, payload, event_at, finding in conn.execute(
        """SELECT b.order_ref::uuid, b.kind, b.payload, b.event_at, b.finding
           FROM broker_event b
           WHERE b.user_id = %(user)s AND b.account = ANY (%(accounts)s)
             AND b.order_ref = ANY (%(orders)s::text[])
             AND b.kind IN ('ORDER_STATUS', 'MODIFIED', 'REJECTED', 'CANCEL_REJECTED',
                            'MODIFY_REJECTED')
             AND b.finding <> ALL ('{REFUSED,HELD}')
           ORDER BY b.number""",
        parameters,
    ).fetchall():
        state = states[order_id]
        state.remember(kind, payload, event_at)
        heard_at[order_id] = max(event_at, heard_at.get(order_id, event_at))
        if kind == "MODIFIED" and finding != "CONTRADICTION":
            state.terms_at = max(event_at, state.terms_at or event_at)
    for order_id, state in states.items():
        said_so = state.ended in ("CANCELED", "EXPIRED")
        if not state.is_open and state.stands != state.status and not said_so:
            # Ended by us or by what a snapshot showed: right until the broker says otherwise.
            state.end, state.closed_at = state.status, heard_at.get(order_id)


def has_rate(conn: Connection, currency: str, quote: str, at: datetime) -> bool:
    """Whether a currency's rate at a moment is known."""
    row = conn.execute("SELECT fx_rate_at(%s, %s, %s)", [currency, quote, at]).fetchone()
    return row is not None and row[0] is not None


def adopting_run(conn: Connection, user_id: UUID, account: str) -> UUID | None:
    """The run that takes up what an account's broker reports of orders unknown to us."""
    row = conn.execute(
        """SELECT r.run_id FROM run_route t
           JOIN strategy_run r ON r.user_id = t.user_id AND r.run_id = t.run_id
           WHERE t.user_id = %s AND t.account = %s AND r.status IN ('RUNNING', 'STOPPING')
           ORDER BY r.status, r.run_id LIMIT 1""",
        [user_id, account],
    ).fetchone()
    return row[0] if row else None


def is_whole(heard: Heard) -> bool:
    """Whether an execution says all that an order can be made up of."""
    quantity, price = heard.amount("quantity"), heard.amount("price")
    whole = quantity is not None and quantity > 0 and price is not None
    return whole and "symbol" in heard.payload and heard.payload.get("side") in list(Side)


def recover_order(
    conn: Connection, user_id: UUID, run_id: UUID, account: str, order_id: UUID, heard: Heard
) -> OrderState:
    """Make up the order that a fill belongs to: on the terms that a snapshot tells which came with
    it, else as large as the fill, which is all that is known.

    Its id is the reference that the broker returned, so that a second telling finds it.
    """
    symbol, side = str(heard.payload["symbol"]), Side(heard.payload["side"])
    quantity = heard.amount("quantity") or Decimal(0)
    conn.execute(
        """INSERT INTO orders (user_id, run_id, order_id, account, symbol, side, quantity,
                               order_type, time_in_force, limit_price, stop_price, trail_amount,
                               trail_percent, expire_at, recovered)
           SELECT %(user)s, %(run)s, %(order)s, %(account)s, %(symbol)s, %(side)s,
                  greatest(t.quantity, %(quantity)s), coalesce(t.order_type, 'MARKET'),
                  coalesce(t.time_in_force, 'DAY'), t.limit_price, t.stop_price, t.trail_amount,
                  t.trail_percent, t.expire_at, true
           FROM (SELECT) AS one
           LEFT JOIN snapshot_terms(%(user)s, %(account)s, %(order)s::text) t
                  ON t.symbol = %(symbol)s AND t.side = %(side)s""",
        {
            "user": user_id,
            "run": run_id,
            "order": order_id,
            "account": account,
            "symbol": symbol,
            "side": str(side),
            "quantity": quantity,
        },
    )
    return order_states(conn, user_id, [order_id])[order_id]


@dataclass(slots=True)
class _Written:
    """One order's row as a phase changes it."""

    run_id: UUID
    change: Change | None = None
    broker_order_id: int | None = None
    perm_id: int | None = None


class Writer:
    """Collects what a batch writes, and writes it in phases.

    Within one order the sequence counts (routed, filled, cancelled), between orders it doesn't:
    so changes of rows and executions take turns, each phase one statement for all orders in it.
    """

    def __init__(self, conn: Connection, user_id: UUID, account: str) -> None:
        self._conn = conn
        self._user_id = user_id
        self._account = account
        # Changes at even places, executions at odd ones.
        self._phases: list[dict[UUID, _Written] | list[tuple[OrderState, Execute]]] = []
        self._reached: dict[UUID, int] = defaultdict(int)
        self._charges: list[tuple[UUID, Charge]] = []
        self._ids: list[tuple[OrderState, Identify]] = []
        self._events: list[tuple[UUID, str, str, Mapping[str, Any]]] = []
        self._alerts: list[tuple[str, str, str, UUID | None]] = []
        self._findings: dict[int, tuple[str, str | None, str | None]] = {}
        self._throttled: list[Mapping[str, Any]] = []
        self._unanswered: list[int] = []

    def effect(self, order: OrderState, effect: Execute | Charge | Identify | Change) -> None:
        """Take in what is to be written of an order."""
        match effect:
            case Execute():
                phase = self._phase(order.order_id, odd=True)
                phase.append((order, effect))
            case Charge():
                self._charges.append((order.run_id, effect))
            case Identify(broker_order_id, perm_id):
                self._ids.append((order, effect))
                written = self._row(order)
                written.broker_order_id = broker_order_id or written.broker_order_id
                written.perm_id = perm_id or written.perm_id
            case _:
                written = self._row(order, anew=True)
                written.change = effect

    def event(self, run_id: UUID, code: str, subject: str, facts: Mapping[str, Any]) -> None:
        """Take in an event for a run's ledger."""
        self._events.append((run_id, code, subject, facts))

    def alert(self, code: str, subject: str, words: str, run_id: UUID | None) -> None:
        """Take in what a person must know of."""
        self._alerts.append((code, subject, words, run_id))

    def finding(self, number: int, verdict: Verdict, note: str | None) -> None:
        """Take in what a word turned out to be; the last one counts."""
        self._findings[number] = (str(verdict.finding), verdict.code, note)

    def throttled(self, payload: Mapping[str, Any]) -> None:
        """Take in that a command has to wait for the throttle."""
        self._throttled.append(payload)

    def unanswered(self, number: int) -> None:
        """Take in that a connection ended, after which submits may be without an answer."""
        self._unanswered.append(number)

    def write_out(self) -> None:
        """Write all that was taken in, and mark the words as applied."""
        for phase in self._phases:
            if isinstance(phase, dict):
                self._write_changes(phase)
            else:
                self._write_executions(phase)
        self._write_charges()
        self._write_ids()
        self._hold_throttled()
        self._tell_unanswered()
        self._write_events()
        self._write_alerts()
        self._write_findings()

    def _phase(self, order_id: UUID, *, odd: bool) -> Any:
        place = self._reached[order_id]
        if place % 2 != odd:
            place += 1
        self._reached[order_id] = place
        while len(self._phases) <= place:
            self._phases.append([] if len(self._phases) % 2 else {})
        return self._phases[place]

    def _row(self, order: OrderState, *, anew: bool = False) -> _Written:
        """The order's row in its present phase; ``anew``: in one without a change of its own."""
        phase = self._phase(order.order_id, odd=False)
        written: _Written = phase.setdefault(order.order_id, _Written(order.run_id))
        if anew and written.change is not None:
            self._reached[order.order_id] += 2
            return self._row(order)
        return written

    def _write_changes(self, phase: Mapping[UUID, _Written]) -> None:
        if not phase:
            return
        changes = [written.change or Change() for written in phase.values()]
        terms = [change.terms for change in changes]
        self._conn.execute(
            """UPDATE orders o
               SET status = coalesce(m.status, o.status),
                   status_reason = CASE WHEN m.status IS NULL OR m.status = o.status
                                        THEN o.status_reason ELSE m.reason END,
                   reject_source = CASE WHEN m.status IS NULL OR m.status = o.status
                                        THEN o.reject_source
                                        WHEN m.status = 'REJECTED' THEN 'BROKER' END,
                   reject_code = CASE WHEN m.status IS NULL OR m.status = o.status
                                      THEN o.reject_code
                                      WHEN m.status = 'REJECTED' THEN m.reject_code END,
                   quantity = coalesce(m.quantity, o.quantity),
                   limit_price = CASE WHEN m.quantity IS NULL THEN o.limit_price
                                      ELSE m.limit_price END,
                   stop_price = CASE WHEN m.quantity IS NULL THEN o.stop_price
                                     ELSE m.stop_price END,
                   pending_reconcile = coalesce(m.pending_reconcile, o.pending_reconcile),
                   broker_order_id = coalesce(m.broker_order_id, o.broker_order_id),
                   perm_id = coalesce(m.perm_id, o.perm_id)
               FROM unnest(%s::uuid[], %s::uuid[], %s::text[], %s::text[], %s::text[],
                           %s::numeric[], %s::numeric[], %s::numeric[], %s::boolean[],
                           %s::bigint[], %s::bigint[])
                    AS m (run_id, order_id, status, reason, reject_code, quantity, limit_price,
                          stop_price, pending_reconcile, broker_order_id, perm_id)
               WHERE o.user_id = %s AND o.run_id = m.run_id AND o.order_id = m.order_id
                 -- Nothing new is no change, which a closed order would refuse.
                 AND (m.status <> o.status OR m.quantity IS NOT NULL
                      OR m.pending_reconcile <> o.pending_reconcile
                      OR m.broker_order_id <> coalesce(o.broker_order_id, 0)
                      OR m.perm_id <> coalesce(o.perm_id, 0))""",
            [
                [written.run_id for written in phase.values()],
                list(phase),
                [change.status for change in changes],
                [change.reason for change in changes],
                [change.reject_code for change in changes],
                [t and t.quantity for t in terms],
                [t and t.limit_price for t in terms],
                [t and t.stop_price for t in terms],
                [change.pending_reconcile for change in changes],
                [written.broker_order_id for written in phase.values()],
                [written.perm_id for written in phase.values()],
                self._user_id,
            ],
        )

    def _write_executions(self, phase: list[tuple[OrderState, Execute]]) -> None:
        if not phase:
            return
        self._conn.execute(
            """INSERT INTO execution (user_id, run_id, order_id, execution_id, symbol, side,
                                      quantity, price, event_at, reverses)
               SELECT %s, e.run_id, e.order_id, e.execution_id, e.symbol, e.side, e.quantity,
                      e.price, e.event_at, e.reverses
               FROM unnest(%s::uuid[], %s::uuid[], %s::text[], %s::text[], %s::text[],
                           %s::numeric[], %s::numeric[], %s::timestamptz[], %s::text[])
                    WITH ORDINALITY
                    AS e (run_id, order_id, execution_id, symbol, side, quantity, price, event_at,
                          reverses, place)
               ORDER BY e.place""",
            [
                self._user_id,
                [order.run_id for order, _ in phase],
                [order.order_id for order, _ in phase],
                [done.execution_id for _, done in phase],
                [order.symbol for order, _ in phase],
                [str(order.side) for order, _ in phase],
                [done.quantity for _, done in phase],
                [done.price for _, done in phase],
                [done.event_at for _, done in phase],
                [done.reverses for _, done in phase],
            ],
        )

    def _write_charges(self) -> None:
        if not self._charges:
            return
        self._conn.execute(
            """INSERT INTO execution_commission (user_id, run_id, execution_id, amount, currency,
                                                 event_at)
               SELECT %s, c.run_id, c.execution_id, c.amount, c.currency, c.event_at
               FROM unnest(%s::uuid[], %s::text[], %s::numeric[], %s::text[], %s::timestamptz[])
                    WITH ORDINALITY AS c (run_id, execution_id, amount, currency, event_at, place)
               ORDER BY c.place""",
            [
                self._user_id,
                [run_id for run_id, _ in self._charges],
                [charge.execution_id for _, charge in self._charges],
                [charge.amount for _, charge in self._charges],
                [charge.currency for _, charge in self._charges],
                [charge.event_at for _, charge in self._charges],
            ],
        )

    def _write_ids(self) -> None:
        if not self._ids:
            return
        self._conn.execute(
            """INSERT INTO order_broker_id (user_id, run_id, order_id, account, broker_order_id,
                                            perm_id, since)
               SELECT %s, m.run_id, m.order_id, %s, m.broker_order_id, m.perm_id, m.since
               FROM unnest(%s::uuid[], %s::uuid[], %s::bigint[], %s::bigint[], %s::timestamptz[])
                    AS m (run_id, order_id, broker_order_id, perm_id, since)
               ON CONFLICT DO NOTHING""",
            [
                self._user_id,
                self._account,
                [order.run_id for order, _ in self._ids],
                [order.order_id for order, _ in self._ids],
                [named.broker_order_id for _, named in self._ids],
                [named.perm_id for _, named in self._ids],
                [named.since for _, named in self._ids],
            ],
        )

    def _hold_throttled(self) -> None:
        for payload in self._throttled:
            code = str(payload.get("code", "THROTTLED"))
            held = self._conn.execute(
                """UPDATE orders o SET status = 'PENDING', status_reason = %s
                   FROM broker_command c
                   WHERE c.user_id = %s AND c.account = %s AND c.command_id = %s
                     AND c.kind = 'SUBMIT' AND o.user_id = c.user_id AND o.run_id = c.run_id
                     AND o.order_id = c.order_id AND o.status = 'NEW'
                   RETURNING o.run_id, o.order_id, o.version""",
                [code, self._user_id, self._account, payload.get("command_id")],
            ).fetchall()
            for run_id, order_id, version in held:
                self.event(run_id, code, f"{order_id}@{version}", payload)

    def _tell_unanswered(self) -> None:
        for number in self._unanswered:
            for run_id, order_id in self._conn.execute(
                """SELECT c.run_id, c.order_id FROM broker_command c
                   JOIN orders o ON o.user_id = c.user_id AND o.run_id = c.run_id
                                AND o.order_id = c.order_id
                   WHERE c.user_id = %s AND c.account = %s AND c.kind = 'SUBMIT'
                     AND c.claimed_by IS NOT NULL AND o.status IN ('NEW', 'PENDING')
                     AND c.outcome IS DISTINCT FROM 'NEVER_ARRIVED'
                     AND NOT EXISTS (SELECT FROM broker_event e
                                     WHERE e.user_id = c.user_id AND e.account = c.account
                                       AND e.order_ref = c.order_id::text)
                   ORDER BY c.order_id""",
                [self._user_id, self._account],
            ).fetchall():
                self.event(run_id, "SUBMIT_PENDING", f"{order_id}@{number}", {})
                tell("SUBMIT_PENDING", account=self._account, order_id=order_id)

    def _write_events(self) -> None:
        if not self._events:
            return
        self._conn.execute(
            """INSERT INTO event_ledger (user_id, run_id, event_type, subject, payload)
               SELECT %s, e.run_id, e.event_type, e.subject, e.payload
               FROM unnest(%s::uuid[], %s::text[], %s::text[], %s::jsonb[]) WITH ORDINALITY
                    AS e (run_id, event_type, subject, payload, place)
               ORDER BY e.place""",
            [
                self._user_id,
                [run_id for run_id, *_ in self._events],
                [code for _, code, *_ in self._events],
                [subject for _, _, subject, _ in self._events],
                [Jsonb(dict(facts)) for *_, facts in self._events],
            ],
        )

    def _write_alerts(self) -> None:
        if not self._alerts:
            return
        self._conn.execute(
            """INSERT INTO alert (user_id, code, subject, account, run_id, message)
               SELECT %s, a.code, left(a.subject, 200), %s, a.run_id, left(a.message, 2000)
               FROM unnest(%s::text[], %s::text[], %s::text[], %s::uuid[])
                    AS a (code, subject, message, run_id)
               ON CONFLICT (user_id, code, subject) WHERE acknowledged_at IS NULL DO NOTHING""",
            [
                self._user_id,
                self._account,
                [code for code, *_ in self._alerts],
                [subject for _, subject, *_ in self._alerts],
                [words for _, _, words, _ in self._alerts],
                [run_id for *_, run_id in self._alerts],
            ],
        )

    def _write_findings(self) -> None:
        if not self._findings:
            return
        found = list(self._findings.values())
        self._conn.execute(
            """UPDATE broker_event e
               SET applied_at = coalesce(e.applied_at, now()), finding = f.finding, code = f.code,
                   note = f.note
               FROM unnest(%s::bigint[], %s::text[], %s::text[], %s::text[])
                    AS f (number, finding, code, note)
               WHERE e.user_id = %s AND e.account = %s AND e.number = f.number""",
            [
                list(self._findings),
                [finding for finding, _, _ in found],
                [code for _, code, _ in found],
                [note for *_, note in found],
                self._user_id,
                self._account,
            ],
        )
