"""What a broker knows of an account, put into the inbox as a connector does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from broker_cases import ACCOUNT, Wire

from engine.reconcile import Reconciliation, reconcile, request_snapshot

PART_ROWS = 5_000


@dataclass
class Books:
    """The broker's own books of one account."""

    wire: Wire
    account: str = ACCOUNT
    orders: dict[UUID, dict[str, Any]] = field(default_factory=dict)
    strangers: list[dict[str, Any]] = field(default_factory=list)
    closed: list[dict[str, Any]] = field(default_factory=list)
    positions: dict[str, str] = field(default_factory=dict)
    cash: dict[str, str] = field(default_factory=lambda: {"USD": "100000"})

    def works(self, order_id: UUID, **more: Any) -> None:
        """The broker works our order on our terms, unless told otherwise."""
        ours = self.wire.order(order_id, must=False)
        known = ("symbol", "side", "quantity", "order_type", "time_in_force", "limit_price")
        terms = {name: _text(ours[name]) for name in known if ours and ours[name] is not None}
        self.orders[order_id] = {
            "order_ref": str(order_id),
            "broker_order_id": 1,
            "status": "ROUTED",
            "filled": _text(ours.get("filled_quantity", 0)),
            "ours": True,
            **terms,
            **more,
        }

    def ended(self, order_id: UUID, status: str, **more: Any) -> None:
        """The broker says of our order how it ended lately."""
        self.works(order_id, status=status, **more)
        self.closed.append(self.orders.pop(order_id))

    def ask(self, why: str = "DEMAND", *, dry_run: bool = False, claimed: bool = True) -> UUID:
        """Request a snapshot; the connector takes it."""
        conn, run = self.wire.conn, self.wire.run
        snapshot_id = request_snapshot(conn, run.user_id, self.account, why, dry_run=dry_run)
        if claimed:
            conn.execute(
                """UPDATE broker_command SET claimed_by = %s, claimed_at = clock_timestamp()
                   WHERE user_id = %s AND command_id = %s""",
                [self.wire.holder, run.user_id, snapshot_id],
            )
        return snapshot_id

    def answer(
        self, snapshot_id: UUID, *, at: datetime | None = None, parts: Sequence[int] | None = None
    ) -> None:
        """Put the snapshot into the inbox, or some of its parts."""
        orders = [*self.orders.values(), *self.strangers]
        chunks = [orders[n : n + PART_ROWS] for n in range(0, len(orders), PART_ROWS)] or [[]]
        taken_at = at or self.wire.now + timedelta(milliseconds=1)
        row = self.wire.conn.execute("SELECT clock_timestamp()").fetchone()
        assert row is not None
        for number, chunk in enumerate(chunks, start=1):
            if parts is not None and number not in parts:
                continue
            positions: list[Mapping[str, str]] = []
            if number == 1:
                positions = [{"symbol": s, "quantity": q} for s, q in self.positions.items()]
            self.wire.say(
                "SNAPSHOT",
                at=taken_at,
                lag=row[0] - taken_at,
                snapshot_id=str(snapshot_id),
                part=number,
                parts=len(chunks),
                taken_at=taken_at.isoformat(),
                open_orders=chunk,
                closed_orders=self.closed if number == 1 else [],
                positions=positions,
                cash=self.cash,
            )
        self.wire.conn.execute(
            """UPDATE broker_command SET done_at = clock_timestamp(), outcome = 'SENT',
                      sent_at = clock_timestamp()
               WHERE user_id = %s AND command_id = %s AND claimed_by IS NOT NULL
                 AND done_at IS NULL""",
            [self.wire.run.user_id, snapshot_id],
        )

    def reconcile(self, *, dry_run: bool = False) -> Reconciliation:
        """Ask, answer, apply what waits, compare."""
        snapshot_id = self.ask(dry_run=dry_run)
        self.answer(snapshot_id)
        self.wire.apply()
        done = self.compare(dry_run=dry_run, snapshot_id=snapshot_id if dry_run else None)
        assert done is not None
        return done

    def compare(
        self, *, dry_run: bool = False, snapshot_id: UUID | None = None
    ) -> Reconciliation | None:
        return reconcile(
            self.wire.conn,
            self.wire.run.user_id,
            self.account,
            self.wire.now,
            dry_run,
            snapshot_id,
        )


def _text(value: Any) -> str:
    return str(value)


def kinds(done: Reconciliation) -> list[tuple[str, str]]:
    """Class and action of each difference."""
    return [(d.kind, d.action) for d in done.differences]
