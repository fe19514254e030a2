"""An exchange without a socket, on a clock that only moves when it is told to."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

from engine.brokers.dummy.desk import Desk
from engine.brokers.dummy.exchange import Exchange
from engine.brokers.dummy.faults import Plan
from engine.brokers.dummy.store import Store
from engine.brokers.dummy.wire import decode, order_on_wire
from engine.brokers.protocol import BrokerOrder

START = datetime(2026, 3, 2, 15, 0, tzinfo=UTC)
SYMBOLS = [{"name": "AAPL", "price": "100"}, {"name": "MSFT", "price": "400"}]


class Floor:
    """An exchange by its plan, with one client (number 1, client 0) unless told otherwise."""

    def __init__(self, folder: Path, *faults: Mapping[str, Any], **how: Any) -> None:
        seed = how.pop("seed", 1)
        symbols = how.pop("symbols", SYMBOLS)
        self.plan = how.pop("plan", None) or Plan.model_validate(
            {"exchange": how, "symbol": symbols, "fault": faults}
        )
        self.folder, self.seed = folder, seed
        self.clock_at = START
        self.said: dict[int, list[dict[str, Any]]] = {}
        self.ended: set[int] = set()
        self.open()

    def open(self) -> None:
        """Start the exchange on what its folder holds."""
        self.store = Store(self.folder)
        self.exchange = Exchange(self.plan, self.store, seed=self.seed, clock=lambda: self.clock_at)
        self.desk = Desk(self.exchange)
        self.take()

    def close(self) -> None:
        self.store.close()

    def log_on(self, number: int = 1, client_id: int = 0, account: str | None = None) -> None:
        self.exchange.handle(number, {"op": "LOGON", "client_id": client_id, "account": account})
        self.take()

    def ask(self, op: str, order: BrokerOrder | None = None, number: int = 1, **more: Any) -> None:
        """Send a request."""
        said = more if order is None else {"order": order_on_wire(order)} | more
        self.exchange.handle(number, {"op": op} | said)
        self.take()

    def submit(self, order: BrokerOrder, number: int = 1) -> BrokerOrder:
        self.ask("SUBMIT", order, number)
        return order

    def cancel(self, order: BrokerOrder) -> None:
        self.ask("CANCEL", order_ref=order.order_ref)

    def do(self, op: str, **given: Any) -> Any:
        """Do something at the desk."""
        answer = self.desk.answer({"op": op} | given)
        self.take()
        assert "error" not in answer, answer["error"]
        return answer["done"]

    def wait(self, seconds: float) -> None:
        """Let time pass, stopping wherever something is due."""
        until = self.clock_at + timedelta(seconds=seconds)
        while (at := self.exchange.next_at()) is not None and at <= until:
            self.clock_at = max(at, self.clock_at)
            self.exchange.advance()
            self.take()
        self.clock_at = until

    def take(self) -> None:
        for number, data in self.exchange.release():
            if data is None:
                self.ended.add(number)
            else:
                self.said.setdefault(number, []).append(decode(data))

    def heard(self, kind: str | None = None, number: int = 1) -> list[dict[str, Any]]:
        """The messages that a client has got."""
        return [
            line
            for line in self.said.get(number, [])
            if "kind" in line and kind in (None, line["kind"])
        ]

    def payloads(self, kind: str, number: int = 1) -> list[dict[str, Any]]:
        return [line["payload"] for line in self.heard(kind, number)]

    def kinds(self, number: int = 1) -> list[str]:
        return [line["kind"] for line in self.heard(number=number)]

    def statuses(self, order: BrokerOrder, number: int = 1) -> list[str]:
        """What was said of where an order stands, in order."""
        return [
            line["payload"]["status"]
            for line in self.heard("ORDER_STATUS", number)
            if line["order_ref"] == order.order_ref
        ]

    def answers(self, number: int = 1) -> list[dict[str, Any]]:
        return [line for line in self.said.get(number, []) if "reply" in line]

    def books(self, account: str = "DU1") -> dict[str, Any]:
        found: dict[str, Any] = self.do("books", account=account)
        return found

    def order(self, order: BrokerOrder) -> dict[str, Any]:
        """An order as the exchange has it."""
        (found,) = [each for each in self.books()["orders"] if each["order_ref"] == order.order_ref]
        return dict(found)


def explained(books: Mapping[str, Any], opening: Decimal = Decimal(1_000_000)) -> None:
    """Cash and positions follow from the executions that count and the commissions."""
    cash = opening
    positions: dict[str, Decimal] = {}
    for each in books["executions"]:
        quantity = Decimal(each["quantity"]) * (1 if each["side"] == "BUY" else -1)
        positions[each["symbol"]] = positions.get(each["symbol"], Decimal(0)) + quantity
        cash -= quantity * Decimal(each["price"])
    for each in books["reports"]:
        if each["kind"] == "COMMISSION" and each["currency"] == "USD":
            cash -= Decimal(each["amount"])
    assert {name: Decimal(q) for name, q in books["positions"].items()} == {
        name: quantity for name, quantity in positions.items() if quantity
    }
    assert Decimal(books["cash"]["USD"]) == cash
