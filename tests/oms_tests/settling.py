"""The dust settles: what was under way ends, the broker is asked, and the books are compared."""

from __future__ import annotations

import threading
from contextlib import suppress
from typing import Any
from uuid import UUID

from broker_cases import Wire
from exchange_truth import disagreements
from waits import wait_until

from engine.audit import audit
from engine.brokers.dummy.control import Control
from engine.brokers.protocol import BrokerUnavailable
from engine.clock import utc_now
from engine.db.connect import Connection
from engine.reconcile import Reconciliation, reconcile, request_snapshot, stored

# Reconciliations until nothing happens at the exchange any more while one is made.
SETTLE_ROUNDS_MAX = 12


class Settling:
    """One run at one exchange, whoever runs connector and worker."""

    wire: Wire
    control: Control

    @property
    def conn(self) -> Connection:
        return self.wire.conn

    @property
    def user_id(self) -> UUID:
        return self.wire.run.user_id

    @property
    def latency(self) -> float:
        """How many seconds the exchange takes to act."""
        return 0.0

    def work(self) -> None:
        """A round of the worker, where it is no process of its own."""

    def settle(self) -> None:
        """Reconcile until nothing more happens at the exchange while it is done.

        A word may have been lost on any connection, so that each round begins with a new one.
        """
        self.control.freeze()
        for _ in range(SETTLE_ROUNDS_MAX):
            self.wait_quiet()
            before = self.exchange_state()
            self.reconnect()
            done = self.reconcile()
            self.wait_quiet()
            if before == self.exchange_state() and done.undecided == 0:
                return
        raise AssertionError(f"no end after {SETTLE_ROUNDS_MAX} rounds: {done}")

    def exchange_state(self) -> tuple[Any, ...]:
        return self.control.strikes(), self.control.books(self.wire.account)

    def wait_quiet(self) -> None:
        """Wait until no command waits or is on its way."""
        wait_until(lambda: self._one(_WAITING) == 0, "end of every command")
        # The exchange answers a ping behind what it has got before, and acts by its own timers.
        threading.Event().wait(2 * self.latency)

    def reconnect(self) -> None:
        """Break the connection, and wait for the next one."""
        last = self._one(_CONNECTED)
        self.control.drop()
        wait_until(lambda: self._one(_CONNECTED) > last, "new connection")

    def reconcile(self) -> Reconciliation:
        """Have the broker asked, as often as it takes to get an answer, and compare."""
        whose = self.user_id, self.wire.account
        asked: list[UUID] = []

        def look() -> Reconciliation | None:
            if not asked or self._one(_IN_VAIN, asked[-1]):
                asked.append(request_snapshot(self.conn, *whose, "TEST"))
            self.work()
            done = reconcile(self.conn, *whose, utc_now(), snapshot_id=asked[-1])
            return done or stored(self.conn, *whose, asked[-1])

        found = wait_until(look, "reconciliation")
        assert found is not None
        return found

    def story(self) -> str:
        """All that was asked, said and done, for who looks into a failure."""
        parts = []
        for query in _STORY:
            rows = self.conn.execute(query.encode(), [self.user_id]).fetchall()
            parts += [" ".join(str(value) for value in row) for row in rows]
        with suppress(BrokerUnavailable):
            books = self.control.books(self.wire.account)
            parts += [f"{name}: {row}" for name, rows in books.items() for row in rows]
            parts.append(f"{books['cash']} {books['positions']} {self.control.strikes()}")
        return "\n".join(parts)

    def _one(self, query: str, *more: Any) -> Any:
        row = self.conn.execute(query.encode(), [self.user_id, self.wire.account, *more]).fetchone()
        assert row is not None
        return row[0]

    # --- What must hold ---------------------------------------------------------------------

    def must_agree(self, *, was_restored: bool = False) -> None:
        """Our books are the exchange's, which has each order once, and the audit is clean."""
        books = self.control.books(self.wire.account)
        found = disagreements(self.conn, self.wire.run, books, was_restored=was_restored)
        assert found == [], "\n".join(found)
        findings = audit(self.conn, self.wire.run)
        assert findings == []
        assert self._one(_UNDONE) == 0, "of a command nobody knows what became of it"


# What a connector took that died since, a snapshot decides; and what waits for that isn't due.
_WAITING = """SELECT count(*) FROM broker_command c
    WHERE user_id = %s AND account = %s AND done_at IS NULL
      AND (command_is_due(c) OR EXISTS (
          SELECT FROM broker_lease l WHERE l.user_id = c.user_id AND l.account = c.account
             AND l.holder = c.claimed_by))"""
_UNDONE = """SELECT count(*) FROM broker_command
    WHERE user_id = %s AND account = %s AND done_at IS NULL AND kind <> 'SNAPSHOT'"""
_CONNECTED = """SELECT coalesce(max(number), 0) FROM broker_event
    WHERE user_id = %s AND account = %s AND kind = 'CONNECTED'"""
_IN_VAIN = """SELECT coalesce(bool_or(outcome IS DISTINCT FROM 'SENT' AND done_at IS NOT NULL),
    false) FROM broker_command WHERE user_id = %s AND account = %s AND command_id = %s"""


_STORY = (
    """SELECT kind, order_id, created_at::time, claimed_at::time, done_at::time, outcome, payload
       FROM broker_command WHERE user_id = %s ORDER BY created_at""",
    """SELECT number, kind, order_ref, event_at::time, received_at::time, applied_at::time, finding,
              code, payload
       FROM broker_event WHERE user_id = %s ORDER BY number""",
    "SELECT seq, event_type, subject, payload FROM event_ledger WHERE user_id = %s ORDER BY seq",
    """SELECT order_id, status, status_reason, side, symbol, quantity, filled_quantity, limit_price
       FROM orders WHERE user_id = %s ORDER BY recorded_at""",
    "SELECT class, subject, action, reason FROM reconciliation_difference WHERE user_id = %s",
)
