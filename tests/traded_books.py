"""Runs that trade by plain SQL, on paper and at a broker whose words are given."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any
from uuid import UUID, uuid4

from market_days import FRI, MON, THU, TUE, WED, a_bar, a_plan, a_run, close_on
from psycopg.types.json import Jsonb

from engine.db.connect import Connection
from engine.runs import Run, find_run
from engine.tick import run_tick

# A Monday, in the session of New York.
MONDAY = datetime(2024, 1, 8, 15, tzinfo=UTC)
ACCOUNT = "DU1"


@dataclass
class Book:
    """A RUNNING run on margin, and what is traded in it; ``broker`` is paper or another."""

    conn: Connection
    method: str = "AVERAGE"
    broker: str = "paper"
    currency: str = "USD"
    user_id: UUID = field(default_factory=uuid4)
    run_id: UUID = field(default_factory=uuid4)
    at: datetime = MONDAY
    said: int = 0

    def __post_init__(self) -> None:
        write = self.conn.execute
        write("INSERT INTO app_user (user_id) VALUES (%s)", [self.user_id])
        write(
            """INSERT INTO strategy_run (user_id, run_id, status, initial_cash, account_type,
                                         pnl_method, broker, currency)
               VALUES (%s, %s, 'RUNNING', 100000, 'MARGIN', %s, %s, %s)""",
            [*self.key, self.method, self.broker, self.currency],
        )
        if self.broker != "paper":
            write(
                """INSERT INTO broker_account (user_id, account, broker, opens_at, closes_at)
                   VALUES (%s, %s, %s, '00:00', '23:59:59')""",
                [self.user_id, ACCOUNT, self.broker],
            )
            write(
                "INSERT INTO run_route (user_id, run_id, account) VALUES (%s, %s, %s)",
                [*self.key, ACCOUNT],
            )

    @property
    def key(self) -> list[UUID]:
        return [self.user_id, self.run_id]

    def heard(self, kind: str, event_at: datetime, payload: dict[str, Any], **ids: Any) -> None:
        """The broker says something."""
        self.said += 1
        self.conn.execute(
            """INSERT INTO broker_event (user_id, account, number, holder, kind, order_ref,
                                         execution_id, payload, event_at)
               VALUES (%s, %s, %s, %s, %s, %s, %s, %s, %s)""",
            [
                self.user_id,
                ACCOUNT,
                self.said,
                UUID(int=1),
                kind,
                ids.get("order_ref"),
                ids.get("execution_id"),
                Jsonb(payload),
                event_at,
            ],
        )

    def order(self, quantity: str, symbol: str) -> UUID:
        units = Decimal(quantity)
        order_id = uuid4()
        self.conn.execute(
            """INSERT INTO orders (user_id, run_id, order_id, symbol, side, quantity, logical_time)
               VALUES (%s, %s, %s, %s, %s, %s, %s)""",
            [*self.key, order_id, symbol, "BUY" if units > 0 else "SELL", abs(units), self.at],
        )
        self.conn.execute(
            """UPDATE broker_command SET claimed_by = %s, claimed_at = clock_timestamp(),
                   sent_at = clock_timestamp(), done_at = clock_timestamp(), outcome = 'SENT'
               WHERE user_id = %s AND order_id = %s""",
            [UUID(int=1), self.user_id, order_id],
        )
        return order_id

    def trade(
        self,
        quantity: str,
        price: str,
        *,
        symbol: str = "AAPL",
        event_at: datetime | None = None,
        commission: str = "0",
        after: timedelta = timedelta(minutes=1),
    ) -> str:
        """Buy a quantity, or sell a negative one; returns the execution's id."""
        self.at += after
        return self.fill(
            self.order(quantity, symbol), quantity, price, symbol, event_at, commission
        )

    def fill(
        self,
        order_id: UUID,
        quantity: str,
        price: str,
        symbol: str = "AAPL",
        event_at: datetime | None = None,
        commission: str = "0",
    ) -> str:
        """A first execution of an order, of all of it or of a part."""
        execution_id = f"{order_id}.01"
        if self.broker != "paper":
            self.heard(
                "EXECUTION",
                event_at or self.at,
                {
                    "quantity": quantity.lstrip("-"),
                    "price": price,
                    "symbol": symbol,
                    "side": "SELL" if quantity.startswith("-") else "BUY",
                },
                order_ref=str(order_id),
                execution_id=execution_id,
            )
        self.execute(order_id, execution_id, abs(Decimal(quantity)), price, event_at, commission)
        return execution_id

    def execute(
        self,
        order_id: UUID,
        execution_id: str,
        quantity: Decimal,
        price: str,
        event_at: datetime | None = None,
        commission: str = "0",
        reverses: str | None = None,
    ) -> None:
        self.conn.execute(
            """INSERT INTO execution (user_id, run_id, order_id, execution_id, quantity, price,
                                      commission, event_at, reverses)
               VALUES (%s, %s, %s, %s, %s, %s, %s, %s, %s)""",
            [
                *self.key,
                order_id,
                execution_id,
                quantity,
                Decimal(price),
                Decimal(commission),
                event_at or self.at,
                reverses,
            ],
        )

    def bust(self, execution_id: str, quantity: str, price: str) -> None:
        """The broker takes an execution back."""
        order_id = UUID(execution_id.split(".")[0])
        self.heard("BUST", self.at, {}, order_ref=str(order_id), execution_id=execution_id)
        self.execute(
            order_id, f"{execution_id}-bust", -Decimal(quantity), price, reverses=execution_id
        )

    def commission(
        self, execution_id: str, amount: str, currency: str, event_at: datetime
    ) -> Decimal:
        """The broker reports a commission; what it costs in the run's currency."""
        self.heard(
            "COMMISSION",
            event_at,
            {"amount": amount, "currency": currency},
            execution_id=execution_id,
        )
        (cost,) = self.one(
            """INSERT INTO execution_commission (user_id, run_id, execution_id, amount, currency,
                                                 event_at)
               VALUES (%s, %s, %s, %s, %s, %s) RETURNING cost""",
            *self.key,
            execution_id,
            Decimal(amount),
            currency,
            event_at,
        )
        assert isinstance(cost, Decimal)
        return cost

    def mark(self, price: str, symbol: str = "AAPL") -> None:
        """The market moves."""
        self.at += timedelta(minutes=1)
        self.conn.execute(
            """UPDATE position SET mark_price = %s, marked_at = %s
               WHERE user_id = %s AND run_id = %s AND symbol = %s""",
            [Decimal(price), self.at, *self.key, symbol],
        )

    def one(self, query: str, *parameters: object) -> tuple[Any, ...]:
        row = self.conn.execute(query.encode(), parameters).fetchone()
        assert row is not None
        return row

    def pnl(self, columns: str, symbol: str = "AAPL") -> tuple[Any, ...]:
        """Columns of position_pnl."""
        return self.one(
            f"""SELECT {columns} FROM position_pnl
                WHERE user_id = %s AND run_id = %s AND symbol = %s""",
            *self.key,
            symbol,
        )

    def lots(self, symbol: str = "AAPL") -> list[Any]:
        """Quantity and cost of the open lots."""
        return self.conn.execute(
            "SELECT quantity, cost FROM position_lots(%s, %s, %s)", [*self.key, symbol]
        ).fetchall()

    def days(self) -> list[Any]:
        """Session, realised, commission and total by day."""
        return self.conn.execute(
            """SELECT session_date::text, realized_pnl, commission, total_pnl FROM pnl_daily
               WHERE user_id = %s AND run_id = %s ORDER BY session_date""",
            self.key,
        ).fetchall()


def a_life(conn: Connection) -> Run:
    """A run with everything that can happen on paper."""
    run = a_run(conn, account_type="MARGIN", name="life", paper={"seed": 3})
    a_plan(conn, run)
    key = [run.user_id, run.run_id]
    conn.execute(
        """INSERT INTO risk_limit (user_id, run_id, kind, limit_value)
           VALUES (%s, %s, 'MAX_POSITION', 500)""",
        key,
    )
    place = """INSERT INTO orders (user_id, run_id, symbol, side, quantity, order_type, limit_price,
                                   stop_price, trail_amount, time_in_force, logical_time)
               VALUES (%s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s)"""
    run_tick(conn, run.user_id, run.run_id, close_on(MON), [a_bar(MON), a_bar(MON, symbol="IBM")])
    conn.execute(
        """INSERT INTO corporate_action (symbol, ex_date, numerator, denominator)
           VALUES ('AAPL', %s, 2, 1)""",
        [THU],
    )
    at = close_on(MON)
    for order in (
        ("IBM", "BUY", 10, "MARKET", None, None, None, "DAY"),
        ("IBM", "BUY", 0, "MARKET", None, None, None, "DAY"),
        ("AAPL", "BUY", 3, "LIMIT", 50, None, None, "GTC"),
        ("AAPL", "SELL", 2, "TRAIL", None, None, 20, "GTC"),
        ("IBM", "SELL", 15, "STOP", None, 95, None, "GTC"),
        ("IBM", "BUY", 1, "LIMIT", 40, None, None, "DAY"),
        ("IBM", "BUY", 1, "STOP_LIMIT", 60, 104, None, "GTC"),
    ):
        conn.execute(place, [*key, *order, at])
    for day, prices in ((TUE, "100 110 98 105"), (WED, "105 130 104 128"), (THU, "64 66 60 61")):
        ibm = a_bar(day, "104 106 90 96", symbol="IBM")
        run_tick(conn, run.user_id, run.run_id, close_on(day), [a_bar(day, prices), ibm])
    # A mark outside of a tick, and something in the strategy's memory.
    conn.execute(
        """UPDATE position SET mark_price = 62.5, marked_at = %s
           WHERE user_id = %s AND run_id = %s AND symbol = 'AAPL'""",
        [close_on(THU) + timedelta(hours=1), *key],
    )
    conn.execute(
        "INSERT INTO mtm_ledger (user_id, run_id, logical_time) VALUES (%s, %s, %s)",
        [*key, close_on(THU) + timedelta(hours=1)],
    )
    conn.execute(
        """UPDATE engine_state SET state = '{"seen": 1.50}' WHERE user_id = %s AND run_id = %s""",
        key,
    )
    run_tick(
        conn,
        run.user_id,
        run.run_id,
        close_on(FRI),
        [a_bar(FRI, "61 63 58 59"), a_bar(FRI, symbol="IBM")],
    )
    return find_run(conn, run.run_id)
