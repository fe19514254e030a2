"""The operator's desk: what the control connection may do, one request and one answer a line.

``{"op": "set_price", "symbol": "AAPL", "price": "100"}`` is answered by ``{"done": ...}`` or by
``{"error": ...}``. Every public method of ``Desk`` is such a request; ``control`` has them as
functions.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

from engine.brokers.dummy.exchange import Exchange
from engine.brokers.dummy.mischief import place
from engine.brokers.dummy.model import HAND, Order, Report
from engine.brokers.dummy.snapshots import order_line
from engine.brokers.dummy.wire import order_of
from engine.brokers.protocol import MessageKind
from engine.errors import BadInput

__all__ = ["Desk"]


class Desk:
    """The requests of the control connection. An order is meant by its number or reference."""

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange

    def answer(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Do one request; what is wrong with it is said in one sentence."""
        given = dict(request)
        op = str(given.pop("op", ""))
        act = getattr(self, op, None)
        if op.startswith("_") or op == "answer" or act is None:
            return {"error": f"There is no control request {op!r}."}
        try:
            inspect.signature(act).bind(**given)
            return {"done": self._exchange.by_operator(lambda: act(**given))}
        except BadInput as error:
            return {"error": str(error)}
        except (TypeError, ValueError, ArithmeticError, KeyError) as error:
            return {"error": f"The control request {op!r} can't be read: {error}."}

    # --- The market ---------------------------------------------------------------------------

    def set_price(self, symbol: str, price: str) -> None:
        self._exchange.set_price(symbol, Decimal(price))

    def set_liquidity(self, symbol: str, liquidity: str | None) -> None:
        self._exchange.set_liquidity(symbol, None if liquidity is None else Decimal(liquidity))

    def freeze(self, frozen: bool) -> None:
        self._exchange.freeze(frozen)

    def set_session(self, is_open: bool) -> None:
        self._exchange.set_session(is_open)

    def rename(self, old: str, new: str) -> None:
        self._exchange.rename(old, new)

    def step(self, times: int) -> None:
        for _ in range(times):
            self._exchange.step()

    # --- Orders -------------------------------------------------------------------------------

    def fill(self, order: str | int, quantity: str | None, price: str | None) -> str:
        """Fill an order, whatever its state; returns the id of the execution."""
        found = self._order(order)
        book = self._exchange.books.get(found.symbol)
        at = book.symbol.price if price is None and book else Decimal(price or 0)
        if at is None:
            raise BadInput(f"{found.symbol} has no price; name one.")
        size = found.remaining if quantity is None else Decimal(quantity)
        if size <= 0:
            raise BadInput(f"Nothing is left of order {order}; name a quantity.")
        self._exchange.fill(found, size, at)
        return self._exchange.ledger.reports[-1].execution_id

    def cancel(self, order: str | int, reason: str) -> None:
        found = self._order(order)
        if not found.is_open:
            raise BadInput(f"Order {order} is {found.status} already.")
        self._exchange.cancel(found, reason)

    def forget(self, order: str | int) -> None:
        self._exchange.forget(self._order(order))

    def place(self, order: dict[str, Any], account: str, client_id: int | None) -> int:
        """Place an order by hand, or as a client has that we know nothing of; its number."""
        wanted = order_of(order)
        return place(
            self._exchange, wanted, account, HAND if client_id is None else client_id
        ).number

    def correct(self, execution_id: str, quantity: str | None, price: str | None) -> str:
        """Correct an execution; returns its new id."""
        report = self._execution(execution_id)
        return self._exchange.correct(
            report,
            report.quantity if quantity is None else Decimal(quantity),
            report.price if price is None else Decimal(price),
        ).execution_id

    def bust(self, execution_id: str) -> None:
        self._exchange.bust(self._execution(execution_id))

    def change_perm_id(self, order: str | int) -> int:
        found = self._order(order)
        self._exchange.change_perm_id(found)
        return found.perm_id

    # --- Connections, ids, time ---------------------------------------------------------------

    def drop(self, account: str | None) -> None:
        for name in {session.account for session in self._exchange.post.sessions.values()}:
            if account in (None, name):
                self._exchange.drop_account(name)

    def refuse_logons(self, refused: bool) -> None:
        self._exchange.refuses_logons = refused

    def silence(self, seconds: float | None) -> None:
        for session in self._exchange.post.sessions.values():
            self._exchange.post.silence(session, seconds)

    def steal(self, by: str) -> None:
        for session in list(self._exchange.post.sessions.values()):
            self._exchange.steal(session, by)

    def switch_account(self, account: str) -> None:
        for session in list(self._exchange.post.sessions.values()):
            self._exchange.switch_account(session, account)

    def notice(self, code: str, message: str) -> None:
        self._exchange.notice(list(self._exchange.post.sessions.values()), code, message)

    def say(self, order: str | int, kind: str, payload: dict[str, Any]) -> None:
        """Say something about an order that may be a lie; the books don't change."""
        self._exchange.say_of(self._order(order), MessageKind(kind), payload)

    def set_next_order_id(self, number: int) -> None:
        self._exchange.set_next_order_id(number)

    def set_skew(self, seconds: float) -> None:
        self._exchange.set_skew(seconds)

    def sessions(self) -> list[dict[str, Any]]:
        return [
            {"account": session.account, "client_id": session.client_id}
            for session in self._exchange.post.sessions.values()
        ]

    def strikes(self) -> dict[str, int]:
        """How often each fault of the plan has struck, by its place in the plan."""
        return {key: struck for key, (_, struck) in self._exchange.faults.counted.items()}

    # --- The books ----------------------------------------------------------------------------

    def books(self, account: str) -> dict[str, Any]:
        """The exchange's own truth about an account: what counts, and all that was reported."""
        ledger = self._exchange.ledger
        of_account = ledger.account(account)
        orders = [each for each in self._exchange.orders.values() if each.account == account]
        return {
            "orders": [_order_fact(order) for order in orders],
            "executions": [self._execution_fact(each) for each in ledger.executions(account)],
            "reports": [self._report_fact(each) for each in ledger.since(account, None)],
            "positions": {
                symbol: f"{holding.quantity:f}"
                for symbol, holding in sorted(of_account.holdings.items())
                if holding.quantity
            },
            "cash": {currency: f"{amount:f}" for currency, amount in of_account.cash.items()},
        }

    def market(self) -> dict[str, Any]:
        """Prices, and whether there is trading."""
        return {
            "is_open": self._exchange.is_open,
            "is_frozen": self._exchange.is_frozen,
            "time": self._exchange.now().isoformat(),
            "prices": {
                name: None if book.symbol.price is None else f"{book.symbol.price:f}"
                for name, book in sorted(self._exchange.books.items())
            },
        }

    def _order(self, named: str | int) -> Order:
        found = [
            order
            for order in self._exchange.orders.values()
            if named in (order.number, order.order_ref)
        ]
        if not found:
            raise BadInput(f"There is no order {named}.")
        return found[-1]

    def _execution(self, execution_id: str) -> Report:
        found = self._exchange.ledger.effective(execution_id)
        if found is None:
            raise BadInput(f"There is no execution {execution_id}, or it is busted.")
        return found

    def _execution_fact(self, report: Report) -> dict[str, Any]:
        order = self._exchange.orders.get(report.order_number)
        return {
            **report.payload,
            "order_number": report.order_number,
            "order_ref": order.order_ref if order else "",
        }

    def _report_fact(self, report: Report) -> dict[str, Any]:
        return {"kind": report.kind, "at": report.at.isoformat(), **report.payload}


def _order_fact(order: Order) -> dict[str, Any]:
    line = order_line(order, order.client_id)
    terms = line.pop("order")
    del line["ours"]
    by_hand = order.client_id == HAND
    return {**terms, **line, "number": order.number, "by_hand": by_hand, "reason": order.reason}
