"""The exchange's books on disk: SQLite in a folder of its own.

What changes is collected and written in one transaction before anything is said about it, so that
a kill loses nothing that anybody was told. The file is held exclusively: two exchanges on one
folder would have two truths.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Iterator
from dataclasses import fields
from datetime import datetime
from decimal import Decimal
from operator import attrgetter
from pathlib import Path
from typing import Any, TypeVar

from engine.brokers.dummy.model import Account, Holding, Order, Report, Symbol
from engine.errors import ConfigurationError

__all__ = ["Store"]

_Row = TypeVar("_Row", Order, Report, Symbol)

_DECIMALS = frozenset(
    {
        "quantity", "limit_price", "stop_price", "trail_amount", "trail_percent", "filled",
        "price", "amount", "liquidity", "walk_bps",
    }
)  # fmt: skip
_MOMENTS = frozenset({"placed_at", "expire_at", "ended_at", "at"})
_BOOLEANS = frozenset({"triggered", "aside", "negative_prices"})


def _columns(kind: type[Any]) -> list[str]:
    return [field.name for field in fields(kind)]


_TABLES: dict[str, tuple[type[Any], str]] = {
    "orders": (Order, "number"),
    "report": (Report, "number"),
    "symbol": (Symbol, "name"),
}


class Store:
    """The state in a folder; call ``commit`` before telling anybody of a change."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._file = folder / "exchange.sqlite3"
        self._conn = sqlite3.connect(self._file, isolation_level=None, timeout=0)
        try:
            self._prepare()
        except sqlite3.OperationalError as error:
            self._conn.close()
            raise ConfigurationError(
                f"Another exchange has the folder {folder} open ({error}); give each its own."
            ) from error
        self._dirty: dict[str, dict[Any, Any]] = {table: {} for table in _TABLES}
        self._gone: list[int] = []
        self._accounts: dict[str, Account] = {}
        self._notes: dict[str, str] = {}

    def _prepare(self) -> None:
        self._conn.execute("PRAGMA locking_mode = EXCLUSIVE")
        self._conn.execute("PRAGMA journal_mode = WAL")
        # A killed process loses nothing that the kernel has; only the machine could.
        self._conn.execute("PRAGMA synchronous = NORMAL")
        self._conn.execute("BEGIN IMMEDIATE")
        for table, (kind, key) in _TABLES.items():
            # SQLite would turn "100.10" into a float in a column that it takes for a number.
            columns = ", ".join(
                f"{name} {'INTEGER' if name == 'number' else 'TEXT'}"
                f"{' PRIMARY KEY' if name == key else ''}"
                for name in _columns(kind)
            )
            self._conn.execute(f"CREATE TABLE IF NOT EXISTS {table} ({columns})")
        self._conn.execute(
            "CREATE TABLE IF NOT EXISTS account (name TEXT PRIMARY KEY, document TEXT NOT NULL)"
        )
        self._conn.execute(
            "CREATE TABLE IF NOT EXISTS note (name TEXT PRIMARY KEY, value TEXT NOT NULL)"
        )
        self._conn.execute("COMMIT")

    # --- What changed -------------------------------------------------------------------------

    def order(self, order: Order) -> None:
        self._dirty["orders"][order.number] = order

    def report(self, report: Report) -> None:
        self._dirty["report"][report.number] = report

    def symbol(self, symbol: Symbol) -> None:
        self._dirty["symbol"][symbol.name] = symbol

    def account(self, account: Account) -> None:
        self._accounts[account.name] = account

    def note(self, name: str, value: object) -> None:
        """Remember a single value."""
        self._notes[name] = json.dumps(value)

    def forget(self, order: Order) -> None:
        """Remove an order, as if it had never come."""
        self._dirty["orders"].pop(order.number, None)
        self._gone.append(order.number)

    def commit(self) -> None:
        """Write what changed since the last time, all or nothing."""
        if not (self._gone or self._accounts or self._notes or any(self._dirty.values())):
            return
        self._conn.execute("BEGIN")
        for table, (kind, _) in _TABLES.items():
            rows = self._dirty[table]
            if not rows:
                continue
            names = _columns(kind)
            marks = ", ".join("?" * len(names))
            of_row = attrgetter(*names)
            self._conn.executemany(
                f"INSERT OR REPLACE INTO {table} VALUES ({marks})",
                [_values(of_row(row)) for row in rows.values()],
            )
            rows.clear()
        if self._gone:
            gone = [(number,) for number in self._gone]
            self._conn.executemany("DELETE FROM orders WHERE number = ?", gone)
        self._conn.executemany(
            "INSERT OR REPLACE INTO account VALUES (?, ?)",
            [(name, _account_text(account)) for name, account in self._accounts.items()],
        )
        self._conn.executemany("INSERT OR REPLACE INTO note VALUES (?, ?)", self._notes.items())
        self._conn.execute("COMMIT")
        self._gone.clear()
        self._accounts.clear()
        self._notes.clear()

    def close(self) -> None:
        self.commit()
        self._conn.close()

    # --- What is there ------------------------------------------------------------------------

    def orders(self) -> Iterator[Order]:
        """All orders, in the order of their arrival."""
        return self._rows("orders", Order)

    def reports(self) -> Iterator[Report]:
        """All reports, oldest first."""
        return self._rows("report", Report)

    def symbols(self) -> Iterator[Symbol]:
        return self._rows("symbol", Symbol)

    def accounts(self) -> Iterator[Account]:
        for name, text in self._conn.execute("SELECT name, document FROM account ORDER BY name"):
            said = json.loads(text)
            yield Account(
                name,
                {currency: Decimal(amount) for currency, amount in said["cash"].items()},
                {currency: Decimal(amount) for currency, amount in said["opening_cash"].items()},
                {
                    symbol: Holding(Decimal(quantity), Decimal(cost))
                    for symbol, (quantity, cost) in said["holdings"].items()
                },
            )

    def notes(self) -> dict[str, Any]:
        """The single values that were remembered."""
        rows = self._conn.execute("SELECT name, value FROM note")
        return {name: json.loads(value) for name, value in rows}

    def _rows(self, table: str, kind: type[_Row]) -> Iterator[_Row]:
        names = _columns(kind)
        for row in self._conn.execute(f"SELECT * FROM {table} ORDER BY 1"):
            yield kind(**{name: _read(name, value) for name, value in zip(names, row, strict=True)})


def _values(row: tuple[Any, ...]) -> list[Any]:
    return [
        value if value is None or (kind := type(value)) is str else _WRITTEN[kind](value)
        for value in row
    ]


_WRITTEN: dict[type[Any], Callable[[Any], Any]] = {
    Decimal: str,
    datetime: datetime.isoformat,
    int: int,
    bool: int,
}


def _read(name: str, value: Any) -> Any:
    if value is None:
        return None
    if name in _DECIMALS:
        return Decimal(value)
    if name in _MOMENTS:
        return datetime.fromisoformat(value)
    if name in _BOOLEANS:
        return value == "1"
    if name in _INTEGERS:
        return int(value)
    return value


_INTEGERS = frozenset(
    {"number", "client_id", "broker_order_id", "perm_id", "order_number", "steps"}
)


def _account_text(account: Account) -> str:
    return json.dumps(
        {
            "cash": _texts(account.cash),
            "opening_cash": _texts(account.opening_cash),
            "holdings": {
                symbol: [f"{holding.quantity:f}", f"{holding.cost:f}"]
                for symbol, holding in account.holdings.items()
            },
        }
    )


def _texts(amounts: dict[str, Decimal]) -> dict[str, str]:
    return {name: f"{amount:f}" for name, amount in amounts.items()}
