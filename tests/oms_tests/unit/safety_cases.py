"""A live run at a broker, whose connector and broker are played by rows in outbox and inbox."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

from engine.clock import utc_now
from engine.db.connect import Connection
from engine.inbox import apply_batch

ACCOUNT = "DU1"


@dataclass(frozen=True, slots=True)
class Live:
    """A RUNNING run: ``engine`` acts as the engine's role, ``owner`` as everybody else."""

    owner: Connection
    engine: Connection
    user: UUID
    run: UUID

    @classmethod
    def start(
        cls, owner: Connection, engine: Connection, *, broker: str = "dummy", cash: int = 100_000
    ) -> Live:
        """A margin run with ``cash`` at account DU1, which is open around the clock."""
        user, run = uuid4(), uuid4()
        owner.execute("INSERT INTO app_user (user_id) VALUES (%s)", [user])
        owner.execute(
            "INSERT INTO broker_account (user_id, account, broker) VALUES (%s, %s, 'dummy')",
            [user, ACCOUNT],
        )
        owner.execute(
            """INSERT INTO strategy_run (user_id, run_id, broker, account_type, initial_cash)
               VALUES (%s, %s, %s, 'MARGIN', %s)""",
            [user, run, broker, cash],
        )
        if broker != "paper":
            owner.execute(
                "INSERT INTO run_route (user_id, run_id, account) VALUES (%s, %s, %s)",
                [user, run, ACCOUNT],
            )
        owner.execute("UPDATE strategy_run SET status = 'RUNNING' WHERE user_id = %s", [user])
        return cls(owner, engine, user, run)

    def limit(self, kind: str, value: object = None, **more: object) -> None:
        columns = {"user_id": self.user, "kind": kind, "limit_value": value} | more
        self.owner.execute(
            f"""INSERT INTO risk_limit ({", ".join(columns)})
                VALUES ({", ".join(["%s"] * len(columns))})""".encode(),
            list(columns.values()),
        )

    def place(
        self, side: str = "BUY", quantity: object = 1, price: object = 100, **more: object
    ) -> tuple[UUID, str | None]:
        """A LIMIT order by the engine's role; its id, and the code if it was refused."""
        columns: dict[str, object] = {
            "user_id": self.user,
            "run_id": self.run,
            "symbol": "AAPL",
            "side": side,
            "quantity": quantity,
            "order_type": "LIMIT",
            "limit_price": price,
        } | more
        row = self.engine.execute(
            f"""INSERT INTO orders ({", ".join(columns)})
                VALUES ({", ".join(["%s"] * len(columns))})
                RETURNING order_id, reject_code""".encode(),
            list(columns.values()),
        ).fetchone()
        assert row is not None
        return row[0], row[1]

    def status(self, order: UUID) -> str:
        return str(self._one("SELECT status FROM orders WHERE order_id = %s", order))

    def send(self, order: UUID, *, seconds_ago: int = 0) -> None:
        """The connector takes the order's submit and writes it to the wire."""
        self.owner.execute(
            """UPDATE broker_command
               SET claimed_by = gen_random_uuid(), claimed_at = now(),
                   sent_at = clock_timestamp() - %s * interval '1 second',
                   done_at = now(), outcome = 'SENT'
               WHERE user_id = %s AND order_id = %s AND kind = 'SUBMIT'""",
            [seconds_ago, self.user, order],
        )

    def hear(
        self, kind: str, payload: dict[str, Any], order: UUID | None = None, **more: object
    ) -> None:
        """The broker says something; it is in the inbox, not yet applied."""
        columns: dict[str, object] = {
            "user_id": self.user,
            "account": ACCOUNT,
            "number": self._one(
                "SELECT coalesce(max(number), 0) + 1 FROM broker_event WHERE user_id = %s",
                self.user,
            ),
            "holder": uuid4(),
            "kind": kind,
            "order_ref": None if order is None else str(order),
            "payload": json.dumps(payload),
            "execution_id": payload.get("execution_id"),
            "event_at": utc_now(),
        } | more
        self.owner.execute(
            f"""INSERT INTO broker_event ({", ".join(columns)})
                VALUES ({", ".join(["%s"] * len(columns))})""".encode(),
            list(columns.values()),
        )

    def apply(self) -> None:
        """What the broker said goes into the books."""
        while apply_batch(self.engine, self.user, ACCOUNT).events:
            pass

    def work(
        self,
        side: str = "BUY",
        quantity: object = 1,
        price: object = 100,
        *,
        seconds_ago: int = 0,
    ) -> UUID:
        """An order that the broker works, which was sent so long ago."""
        order, code = self.place(side, quantity, price)
        assert code is None, code
        self.send(order, seconds_ago=seconds_ago)
        self.hear("ORDER_STATUS", {"status": "ROUTED", "filled": "0"}, order)
        self.apply()
        assert self.status(order) == "ROUTED"
        return order

    def fill(self, order: UUID, quantity: object, price: object = 100, **more: object) -> None:
        """The broker fills some of an order."""
        row = self.owner.execute(
            "SELECT symbol, side FROM orders WHERE user_id = %s AND order_id = %s",
            [self.user, order],
        ).fetchone()
        assert row is not None
        symbol, side = row
        self.hear(
            "EXECUTION",
            {
                "execution_id": f"X.{uuid4()}",
                "symbol": symbol,
                "side": side,
                "quantity": str(quantity),
                "price": str(price),
            },
            order,
            **more,
        )
        self.apply()

    def hold(self, quantity: int, price: object = 100, symbol: str = "AAPL") -> None:
        """Buy, or sell short, at the broker."""
        order, code = self.place(
            "BUY" if quantity > 0 else "SELL", abs(quantity), price, symbol=symbol
        )
        assert code is None, code
        self.send(order)
        self.fill(order, abs(quantity), price)

    def mark(self, price: object) -> None:
        """Everything that is held is worth ``price`` a unit from now on."""
        self.owner.execute(
            "UPDATE position SET mark_price = %s, marked_at = now() WHERE user_id = %s",
            [price, self.user],
        )

    def held(self) -> dict[str, Any]:
        return dict(
            self.owner.execute(
                "SELECT symbol, quantity FROM position WHERE user_id = %s AND quantity <> 0",
                [self.user],
            ).fetchall()
        )

    def safety_orders(self) -> list[UUID]:
        """The orders with which a flatten closes positions, by symbol."""
        return [
            row[0]
            for row in self.owner.execute(
                """SELECT order_id FROM orders WHERE user_id = %s AND purpose = 'FLATTEN'
                   ORDER BY symbol""",
                [self.user],
            )
        ]

    def events(self, event_type: str) -> list[dict[str, Any]]:
        """The payloads of a kind of events."""
        return [
            row[0]
            for row in self.owner.execute(
                """SELECT payload FROM event_ledger WHERE user_id = %s AND event_type = %s
                   ORDER BY seq""",
                [self.user, event_type],
            )
        ]

    def alerts(self) -> list[str]:
        rows = self.owner.execute(
            "SELECT code FROM alert WHERE user_id = %s ORDER BY raised_at", [self.user]
        )
        return [row[0] for row in rows]

    def commands(self, kind: str) -> list[tuple[Any, ...]]:
        """(command_id, priority, payload) of what the outbox holds of a kind."""
        return self.owner.execute(
            """SELECT command_id, priority, payload FROM broker_command
               WHERE user_id = %s AND kind = %s ORDER BY created_at""",
            [self.user, kind],
        ).fetchall()

    def lease(self, heard: datetime, *, connected: bool = True) -> None:
        """A connector holds the account and heard its broker at that time."""
        self.owner.execute(
            """INSERT INTO broker_lease AS l (user_id, account, holder, holder_name, taken_at,
                                              expires_at, connected, last_heard_at)
               VALUES (%s, %s, gen_random_uuid(), 'test', now(), %s, %s, %s)
               ON CONFLICT (user_id, account) DO UPDATE
               SET last_heard_at = excluded.last_heard_at, connected = excluded.connected""",
            [self.user, ACCOUNT, heard + timedelta(hours=1), connected, heard],
        )

    def _one(self, query: str, value: object) -> Any:
        row = self.owner.execute(query.encode(), [value]).fetchone()
        assert row is not None
        return row[0]


T0 = datetime(2024, 1, 2, 15, tzinfo=UTC)
