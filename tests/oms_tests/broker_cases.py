"""A user with an account at a broker, a run that trades there, and what the broker says of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any
from uuid import UUID, uuid4

from psycopg.rows import dict_row

from engine.db.connect import Connection
from engine.inbox import Applied, apply_batch
from engine.orders.model import Order, OrderType, Side, TimeInForce
from engine.orders.write import cancel_order, insert_orders, modify_order
from engine.runs import Run, Terms, add_user, create_run, find_run, start_run

ACCOUNT = "DU1"
# The broker's clock; ours is a second behind unless a test says otherwise.
NOW = datetime(2024, 1, 4, 15, 0, tzinfo=UTC)
SECOND = timedelta(seconds=1)


def an_account(conn: Connection, user_id: UUID, account: str = ACCOUNT, **columns: Any) -> None:
    """An account at the dummy broker that never closes."""
    given = {"broker": "dummy", "calendar": "24/7", "opening_cash": 100_000, **columns}
    names = ", ".join(given)
    conn.execute(
        f"INSERT INTO broker_account (user_id, account, {names}) "
        f"VALUES (%s, %s, {', '.join(['%s'] * len(given))})",
        [user_id, account, *given.values()],
    )


def a_broker_run(
    conn: Connection, *, user: str = "ann", accounts: tuple[str, ...] = (ACCOUNT,), **terms: Any
) -> Run:
    """A RUNNING run whose orders go to the accounts, which are made."""
    user_id = add_user(conn, user)
    for account in accounts:
        an_account(conn, user_id, account)
    given: dict[str, Any] = {"initial_cash": Decimal(100_000), "accounts": accounts, **terms}
    made = create_run(conn, user_id, Terms(**given))
    return start_run(conn, user_id, made.run_id)


@dataclass
class Wire:
    """The broker's side of one account: inserts what it says, as a connector would."""

    conn: Connection
    run: Run
    account: str = ACCOUNT
    now: datetime = NOW
    holder: UUID = field(default_factory=uuid4)

    def say(
        self,
        kind: str,
        order_id: UUID | str | None = None,
        *,
        at: datetime | None = None,
        lag: timedelta = SECOND,
        broker_order_id: int | None = None,
        perm_id: int | None = None,
        **payload: Any,
    ) -> int:
        """Insert one word and return its number."""
        self.now += SECOND
        at = at or self.now
        row = self.conn.execute(
            """INSERT INTO broker_event (user_id, account, number, holder, kind, order_ref,
                                         broker_order_id, perm_id, execution_id, payload, event_at,
                                         received_at)
               SELECT %(user)s, %(account)s, coalesce(max(number), 0) + 1, %(holder)s, %(kind)s,
                      %(ref)s, %(number)s, %(perm)s, %(execution)s, %(payload)s, %(at)s,
                      %(received)s
               FROM broker_event WHERE user_id = %(user)s AND account = %(account)s
               RETURNING number""",
            {
                "user": self.run.user_id,
                "account": self.account,
                "holder": self.holder,
                "kind": kind,
                "ref": str(order_id) if order_id else None,
                "number": broker_order_id,
                "perm": perm_id,
                "execution": payload.get("execution_id"),
                "payload": json.dumps(payload, default=str),
                "at": at,
                "received": at + lag,
            },
        ).fetchone()
        assert row is not None
        return int(row[0])

    def status(self, order_id: UUID | str, status: str, **more: Any) -> int:
        return self.say("ORDER_STATUS", order_id, status=status, **more)

    def fill(
        self, order_id: UUID, quantity: str, price: str, execution_id: str, **more: Any
    ) -> int:
        """An execution of the order, with the order's symbol and side unless told otherwise."""
        order = self.order(order_id, must=False)
        facts = {"symbol": order["symbol"], "side": order["side"]} if order else {}
        return self.say(
            "EXECUTION",
            order_id,
            **{
                "execution_id": execution_id,
                "quantity": quantity,
                "price": price,
                **facts,
                **more,
            },
        )

    def apply(self) -> Applied:
        """Apply all that waits."""
        applied = Applied()
        while (done := apply_batch(self.conn, self.run.user_id, self.account)).events:
            applied.events += done.events
            applied.codes += done.codes
        return applied

    def order(self, order_id: UUID, *, must: bool = True) -> dict[str, Any]:
        with self.conn.cursor(row_factory=dict_row) as cursor:
            row = cursor.execute(
                "SELECT * FROM orders WHERE user_id = %s AND order_id = %s",
                [self.run.user_id, order_id],
            ).fetchone()
        assert row is not None or not must
        return row or {}

    def place(
        self,
        side: str = "BUY",
        quantity: str = "10",
        symbol: str = "AAPL",
        *,
        limit_price: str | None = None,
        reference: str = "100",
    ) -> UUID:
        """Place an order in the run; returns its id."""
        order_id = uuid4()
        order = Order(
            order_id,
            symbol,
            Side(side),
            Decimal(quantity),
            OrderType.MARKET if limit_price is None else OrderType.LIMIT,
            TimeInForce.DAY,
            self.stands_at(),
            Decimal(limit_price) if limit_price else None,
        )
        insert_orders(self.conn, self.run, [order], [Decimal(reference)], [None])
        return order_id

    def sent(self, order_id: UUID) -> None:
        """Mark the order's commands as sent, as a connector does."""
        self.conn.execute(
            """UPDATE broker_command SET claimed_by = %s, claimed_at = clock_timestamp(),
                      sent_at = clock_timestamp(), done_at = clock_timestamp(), outcome = 'SENT'
               WHERE user_id = %s AND order_id = %s AND done_at IS NULL""",
            [self.holder, self.run.user_id, order_id],
        )

    def working(self, **terms: Any) -> UUID:
        """An order that the broker works."""
        order_id = self.place(**terms)
        self.sent(order_id)
        self.status(order_id, "ROUTED", broker_order_id=self.commands(order_id), perm_id=None)
        self.apply()
        assert self.order(order_id)["status"] == "ROUTED"
        return order_id

    def cancel(self, order_id: UUID) -> str:
        return cancel_order(self.conn, self.run, order_id, "USER")

    def modify(self, order_id: UUID, **terms: str) -> str:
        version = self.order(order_id)["version"]
        given = {name: Decimal(value) for name, value in terms.items()}
        return modify_order(self.conn, self.run, order_id, version, **given)

    def commands(self, order_id: UUID) -> int:
        """How many commands there are about the order."""
        row = self.conn.execute(
            "SELECT count(*) FROM broker_command WHERE user_id = %s AND order_id = %s",
            [self.run.user_id, order_id],
        ).fetchone()
        return int(row[0]) if row else 0

    def kinds(self, order_id: UUID) -> list[str]:
        """The kinds of the order's commands, in their order."""
        rows = self.conn.execute(
            """SELECT kind FROM broker_command WHERE user_id = %s AND order_id = %s
               ORDER BY order_version""",
            [self.run.user_id, order_id],
        ).fetchall()
        return [kind for (kind,) in rows]

    def events(self, *types: str) -> list[tuple[str, Mapping[str, Any]]]:
        """The run's ledger events of these types, or all, in order."""
        return self.conn.execute(
            """SELECT event_type, payload FROM event_ledger
               WHERE user_id = %s AND run_id = %s
                 AND (event_type = ANY (%s) OR cardinality(%s::text[]) = 0) ORDER BY seq""",
            [self.run.user_id, self.run.run_id, list(types), list(types)],
        ).fetchall()

    def alerts(self) -> list[str]:
        rows = self.conn.execute(
            "SELECT code FROM alert WHERE user_id = %s ORDER BY raised_at", [self.run.user_id]
        ).fetchall()
        return [code for (code,) in rows]

    def finding(self, number: int) -> tuple[str | None, str | None]:
        """What a word turned out to be, and its code."""
        row = self.conn.execute(
            "SELECT finding, code FROM broker_event WHERE user_id = %s AND account = %s "
            "AND number = %s",
            [self.run.user_id, self.account, number],
        ).fetchone()
        assert row is not None
        return row[0], row[1]

    def position(self, symbol: str = "AAPL") -> Any:
        row = self.conn.execute(
            "SELECT quantity FROM position WHERE user_id = %s AND run_id = %s AND symbol = %s",
            [self.run.user_id, self.run.run_id, symbol],
        ).fetchone()
        return row[0] if row else Decimal(0)

    def cash(self) -> Any:
        return find_run(self.conn, self.run.run_id).cash

    def stands_at(self) -> datetime:
        row = self.conn.execute(
            "SELECT run_last_time(%s, %s)", [self.run.user_id, self.run.run_id]
        ).fetchone()
        assert row is not None
        at: datetime = row[0]
        return at
