"""Accounts and what happened in them: cash and positions follow from the reports alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from datetime import datetime
from decimal import Decimal

from engine.brokers.dummy.model import BUY, ZERO, Account, Holding, Order, Report
from engine.brokers.dummy.store import Store
from engine.quantities import EXACT

__all__ = ["Ledger", "base_of"]


def base_of(execution_id: str) -> str:
    """What the ids of an execution and of its corrections have in common."""
    return execution_id.rpartition(".")[0]


class Ledger:
    """The accounts, and every report in the order in which it was made."""

    def __init__(self, store: Store, opening_cash: dict[str, Decimal]) -> None:
        self._store = store
        self._opening_cash = opening_cash
        # What symbols are called now, and what they are paid in.
        self.renamed: dict[str, str] = dict(store.notes().get("renamed", {}))
        self.currencies: dict[str, str] = {}
        self.accounts = {account.name: account for account in store.accounts()}
        self.reports = list(store.reports())
        # The execution that counts now, by base id; none once it is busted.
        self._effective: dict[str, Report] = {}
        self._next_execution = 1
        for report in self.reports:
            self._follow(report)

    def account(self, name: str) -> Account:
        """An account, opened with the plan's cash if nobody has asked for it before."""
        found = self.accounts.get(name)
        if found is None:
            found = Account(name, dict(self._opening_cash), dict(self._opening_cash))
            self.accounts[name] = found
            self._store.account(found)
        return found

    def execution(self, order: Order, quantity: Decimal, price: Decimal, at: datetime) -> Report:
        """Write an execution of an order into the books."""
        report = Report(
            len(self.reports) + 1,
            order.account,
            "EXECUTION",
            at,
            order.number,
            f"{self._next_execution}.01",
            order.symbol,
            order.side,
            quantity,
            price,
            currency=self.currency_of(order.symbol),
        )
        self._trade(report, quantity)
        return self._append(report)

    def commission(self, of: Report, amount: Decimal, currency: str, at: datetime) -> Report:
        """Charge a commission for an execution."""
        report = Report(
            len(self.reports) + 1,
            of.account,
            "COMMISSION",
            at,
            of.order_number,
            of.execution_id,
            amount=amount,
            currency=currency,
        )
        account = self.account(of.account)
        account.pay(currency, amount)
        self._store.account(account)
        return self._append(report)

    def correct(self, old: Report, quantity: Decimal, price: Decimal, at: datetime) -> Report:
        """Put an execution right: the same id with the next number after the last dot."""
        base, _, version = old.execution_id.rpartition(".")
        report = replace(
            old,
            number=len(self.reports) + 1,
            at=at,
            execution_id=f"{base}.{int(version) + 1:02d}",
            quantity=quantity,
            price=price,
        )
        self._append(report)
        self._rebuild(report)
        return report

    def bust(self, old: Report, at: datetime) -> Report:
        """Take an execution back; its commission stays, as it does where it was charged."""
        report = replace(old, number=len(self.reports) + 1, kind="BUST", at=at)
        self._append(report)
        self._rebuild(report)
        return report

    def effective(self, execution_id: str) -> Report | None:
        """What counts now of an execution, whichever version of it is named."""
        return self._effective.get(base_of(execution_id))

    def executions(self, account: str | None = None) -> list[Report]:
        """The executions that count, oldest first."""
        return [
            report
            for report in self._effective.values()
            if account is None or report.account == account
        ]

    def since(self, account: str, moment: datetime | None) -> Iterator[Report]:
        """The reports of an account from a moment on, oldest first."""
        # A clock that was set back stamps later reports earlier: none of them may be missed.
        return (
            report
            for report in self.reports
            if report.account == account and (moment is None or report.at >= moment)
        )

    def filled(self, order: Order) -> Decimal:
        """What an order has filled, after corrections and busts."""
        return _sum(
            report.quantity
            for report in self._effective.values()
            if report.order_number == order.number
        )

    def rename(self, symbol: str, new_symbol: str) -> list[Account]:
        """Move all positions of a symbol to its new name; returns the accounts that had any."""
        moved = []
        for account in self.accounts.values():
            holding = account.holdings.pop(symbol, None)
            if holding is not None:
                account.holdings[new_symbol] = holding
                self._store.account(account)
                moved.append(account)
        self.renamed.pop(new_symbol, None)
        self.renamed[symbol] = new_symbol
        self._store.note("renamed", self.renamed)
        return moved

    def currency_of(self, symbol: str) -> str:
        return self.currencies.get(symbol, "USD")

    def _append(self, report: Report) -> Report:
        self.reports.append(report)
        self._store.report(report)
        self._follow(report)
        return report

    def _follow(self, report: Report) -> None:
        base = base_of(report.execution_id)
        if report.kind == "EXECUTION":
            self._effective[base] = report
            self._next_execution = max(self._next_execution, int(base) + 1)
        elif report.kind == "BUST":
            self._effective.pop(base, None)

    def _trade(self, report: Report, quantity: Decimal) -> None:
        account = self.account(report.account)
        signed = quantity if report.side == BUY else quantity.copy_negate()
        holding = account.holdings.setdefault(self._name_now(report.symbol), Holding())
        holding.trade(signed, report.price)
        account.pay(report.currency, EXACT.multiply(signed, report.price))
        self._store.account(account)

    def _rebuild(self, changed: Report) -> None:
        """Work an account out anew from its opening cash and every report that counts."""
        account = self.account(changed.account)
        account.cash = dict(account.opening_cash)
        account.holdings = {}
        for report in self.executions(account.name):
            self._trade(report, report.quantity)
        for report in self.reports:
            if report.account == account.name and report.kind == "COMMISSION":
                account.pay(report.currency, report.amount)
        self._store.account(account)

    def _name_now(self, symbol: str) -> str:
        while symbol in self.renamed:
            symbol = self.renamed[symbol]
        return symbol


def _sum(numbers: Iterable[Decimal]) -> Decimal:
    total = ZERO
    for number in numbers:
        total = EXACT.add(total, number)
    return total
