"""Our books against an exchange's own, row by row: what differs, in words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from decimal import Decimal
from typing import Any

from psycopg.rows import dict_row

from engine.db.connect import Connection
from engine.runs import Run, find_run

# Where an order of ours may stand by what the exchange says of it.
_STATUSES = {
    "PENDING_SUBMIT": {"PENDING_SUBMIT", "ROUTED", "PARTIALLY_FILLED"},
    "ROUTED": {"ROUTED", "PARTIALLY_FILLED"},
    # What was filled, and then taken back, is not worked any more.
    "FILLED": {"FILLED", "CANCELED"},
    "CANCELED": {"CANCELED"},
    "EXPIRED": {"EXPIRED"},
    "INACTIVE": {"CANCELED", "REJECTED"},
    "REJECTED": {"REJECTED"},
}
_OVER = {"FILLED", "CANCELED", "REJECTED", "EXPIRED"}
_ENDED = _STATUSES.keys() - {"PENDING_SUBMIT", "ROUTED"}
_TERMS = ("quantity", "limit_price", "stop_price")


def disagreements(
    conn: Connection, run: Run, books: Mapping[str, Any], *, was_restored: bool = False
) -> list[str]:
    """In what our books of a run and the exchange's of its account differ; empty is right.

    After a restore from a backup nobody tells us of orders that ended without a fill since.
    """
    return [
        *_of_orders(conn, run, books, was_restored),
        *_of_executions(conn, run, books),
        *_of_holdings(conn, run, books),
    ]


def _rows(conn: Connection, query: str, run: Run) -> list[dict[str, Any]]:
    with conn.cursor(row_factory=dict_row) as cursor:
        return cursor.execute(query.encode(), [run.user_id, run.run_id]).fetchall()


def _of_orders(
    conn: Connection, run: Run, books: Mapping[str, Any], was_restored: bool
) -> Iterator[str]:
    refs = Counter(each["order_ref"] for each in books["orders"] if not each["by_hand"])
    yield from (f"{ref} is {count} orders there" for ref, count in refs.items() if count > 1)
    theirs = {each["order_ref"]: each for each in books["orders"]}
    ours = _rows(
        conn,
        """SELECT o.order_id::text AS ref, o.status, o.filled_quantity, o.quantity, o.limit_price,
                  o.stop_price, o.recovered,
                  coalesce(c.outcome, '') AS submit
           FROM orders o LEFT JOIN broker_command c ON c.user_id = o.user_id
                AND c.order_id = o.order_id AND c.kind = 'SUBMIT'
           WHERE o.user_id = %s AND o.run_id = %s""",
        run,
    )
    for order in ours:
        there = theirs.pop(order["ref"], None)
        if there is None:
            yield from _not_there(order)
        else:
            yield from _both(order, there)
    yield from (
        f"{ref} is there, and not here"
        for ref, there in theirs.items()
        if not (was_restored and there["status"] in _ENDED and Decimal(there["filled"]) == 0)
    )


def _not_there(order: Mapping[str, Any]) -> Iterator[str]:
    """An order that the exchange doesn't have: it has lost it, or never had it."""
    kept = order["status"] == "NEW" and order["submit"] == "NEVER_ARRIVED"
    if order["status"] not in _OVER and not kept:
        yield f"{order['ref']} is {order['status']} here ({order['submit']}), and not there"


def _both(order: Mapping[str, Any], there: Mapping[str, Any]) -> Iterator[str]:
    name = order["ref"]
    if order["filled_quantity"] != Decimal(there["filled"]):
        yield f"{name}: filled {order['filled_quantity']} here, {there['filled']} there"
    # Of an order that was taken up for its fills, and had ended, no more than those is known.
    ended = order["recovered"] and order["status"] in _OVER and there["status"] in _ENDED
    if order["status"] not in _STATUSES[there["status"]] and not ended:
        yield f"{name} is {order['status']} here, {there['status']} there"
    if order["status"] not in _OVER:
        for term in _TERMS:
            said = there.get(term)
            if order[term] != (None if said is None else Decimal(said)):
                yield f"{name}: {term} is {order[term]} here, {said} there"


def _of_executions(conn: Connection, run: Run, books: Mapping[str, Any]) -> Iterator[str]:
    ours = {
        row["execution_id"]: (row["symbol"], row["side"], row["quantity"], row["price"])
        for row in _rows(
            conn,
            """SELECT e.* FROM execution e
               WHERE e.user_id = %s AND e.run_id = %s AND e.reverses IS NULL
                 AND NOT EXISTS (SELECT FROM execution r
                                 WHERE r.user_id = e.user_id AND r.run_id = e.run_id
                                   AND r.reverses = e.execution_id)""",
            run,
        )
    }
    theirs = {
        each["execution_id"]: (
            each["symbol"],
            each["side"],
            Decimal(each["quantity"]),
            Decimal(each["price"]),
        )
        for each in books["executions"]
    }
    for name in sorted(ours.keys() | theirs.keys()):
        if ours.get(name) != theirs.get(name):
            yield f"execution {name} is {ours.get(name)} here, {theirs.get(name)} there"


def _of_holdings(conn: Connection, run: Run, books: Mapping[str, Any]) -> Iterator[str]:
    ours = {
        row["symbol"]: row["quantity"]
        for row in _rows(
            conn,
            "SELECT symbol, quantity FROM position WHERE user_id = %s AND run_id = %s",
            run,
        )
        if row["quantity"]
    }
    theirs = {symbol: Decimal(quantity) for symbol, quantity in books["positions"].items()}
    if ours != theirs:
        yield f"positions are {ours} here, {theirs} there"
    cash = find_run(conn, run.run_id).cash
    if {"USD": cash} != {name: Decimal(amount) for name, amount in books["cash"].items()}:
        yield f"cash is {cash} here, {books['cash']} there"
