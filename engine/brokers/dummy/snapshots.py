"""How orders, reports and whole accounts are told."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import datetime
from typing import Any

from engine.brokers.dummy.ledger import Ledger
from engine.brokers.dummy.model import ZERO, Order, Report
from engine.quantities import EXACT

__all__ = ["message_line", "order_line", "parts"]

ROWS_A_PART_MAX = 1_000
_PRICES = ("limit_price", "stop_price", "trail_amount", "trail_percent")


def message_line(
    order: Order, kind: str, payload: Mapping[str, Any], at: datetime
) -> dict[str, Any]:
    """A message about an order. It has no permId yet while it is on its way to its book."""
    on_its_way = kind == "ORDER_STATUS" and order.status == "PENDING_SUBMIT"
    return {
        "kind": kind,
        "event_at": at.isoformat(),
        "payload": payload,
        "order_ref": order.order_ref or None,
        "broker_order_id": order.broker_order_id,
        "perm_id": 0 if on_its_way else order.perm_id,
    }


def order_line(order: Order, client_id: int) -> dict[str, Any]:
    """An order as a list tells it to a client."""
    terms: dict[str, Any] = {
        "order_ref": order.order_ref,
        "symbol": order.symbol,
        "side": order.side,
        "quantity": f"{order.quantity:f}",
        "order_type": order.order_type,
        "time_in_force": order.time_in_force,
    }
    for name in _PRICES:
        price = getattr(order, name)
        if price is not None:
            terms[name] = f"{price:f}"
    if order.expire_at is not None:
        terms["expire_at"] = order.expire_at.isoformat()
    return {
        "order": terms,
        "status": order.status,
        "filled": f"{order.filled:f}",
        "broker_order_id": order.broker_order_id,
        "perm_id": order.perm_id,
        "ours": order.client_id == client_id,
    }


def parts(
    orders: Mapping[int, Order],
    ledger: Ledger,
    account: str,
    client_id: int,
    since: datetime | None,
    now: datetime,
) -> Iterator[dict[str, Any]]:
    """All that is known of an account at this moment, so many rows a part."""
    rows: list[tuple[str, dict[str, Any]]] = []
    for order in orders.values():
        if order.account != account:
            continue
        if order.is_open:
            rows.append(("open_orders", order_line(order, client_id)))
        elif order.ended_at is not None and (since is None or order.ended_at >= since):
            rows.append(("closed_orders", order_line(order, client_id)))
    rows += [
        ("executions", _report_line(report, orders.get(report.order_number)))
        for report in ledger.since(account, since)
    ]
    books = ledger.account(account)
    rows += [
        (
            "positions",
            {
                "symbol": symbol,
                "quantity": f"{holding.quantity:f}",
                "avg_cost": f"{EXACT.divide(holding.cost, holding.quantity):f}",
            },
        )
        for symbol, holding in sorted(books.holdings.items())
        if holding.quantity != ZERO
    ]
    cash = {currency: f"{amount:f}" for currency, amount in sorted(books.cash.items())}
    count = max(1, -(-len(rows) // ROWS_A_PART_MAX))
    for part in range(count):
        said: dict[str, Any] = {"part": part + 1, "parts": count, "taken_at": now.isoformat()}
        for name, row in rows[part * ROWS_A_PART_MAX : (part + 1) * ROWS_A_PART_MAX]:
            said.setdefault(name, []).append(row)
        yield said | ({"cash": cash} if part == 0 else {})


def _report_line(report: Report, order: Order | None) -> dict[str, Any]:
    return {
        "kind": report.kind,
        "event_at": report.at.isoformat(),
        "payload": report.payload,
        "order_ref": order.order_ref or None if order else None,
        "broker_order_id": order.broker_order_id if order else None,
        "perm_id": order.perm_id if order else None,
    }
