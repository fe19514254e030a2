"""The exchange: requests in, messages out; no socket, and no clock but the one it is given.

Everything that it decides follows from its plan, its seed, its clock and the requests, in their
order. The server calls ``handle``, ``advance`` and ``desk``, then ``release`` for what may be said:
what is said is on disk by then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from datetime import datetime, time, timedelta
from decimal import Decimal
from heapq import heappop, heappush
from random import Random
from typing import Any

from engine.brokers.dummy import snapshots
from engine.brokers.dummy.book import Book
from engine.brokers.dummy.faults import (
    ORDER_ID_MAX,
    CommissionFirst,
    CommissionIn,
    Drop,
    Fault,
    Faults,
    FillAfterClose,
    Fills,
    Forget,
    Inactive,
    Plan,
    RefuseLogon,
    Reject,
)
from engine.brokers.dummy.ledger import Ledger
from engine.brokers.dummy.mischief import Subject, do_mischief
from engine.brokers.dummy.model import (
    HAND,
    ZERO,
    Order,
    Report,
    Symbol,
    Trade,
)
from engine.brokers.dummy.post import Post, Session
from engine.brokers.dummy.store import Store
from engine.brokers.dummy.terms import Refused, check_terms, margin_after
from engine.brokers.dummy.wire import order_of
from engine.brokers.protocol import BrokerOrder
from engine.clock import Clock
from engine.errors import BadInput
from engine.quantities import EXACT

__all__ = ["DEFAULT_ACCOUNT", "Exchange"]

DEFAULT_ACCOUNT = "DU1"
FIRST_PERM_ID = 900_000_001
# Prices that walk are kept to this many decimals.
_TICK = Decimal("0.01")
_BPS_IN_ONE = Decimal(10_000)
_AT_ONCE = frozenset({"IOC", "FOK"})


class Exchange:
    """A small exchange with one broker in front of it."""

    def __init__(self, plan: Plan, store: Store, *, seed: int, clock: Clock) -> None:
        self.plan = plan.exchange
        self._store = store
        self._clock = clock
        self._seed = seed
        self._notes = store.notes()
        self.faults = Faults(plan, seed, self._notes.get("counted", {}))
        self.post = Post(self.faults, clock)
        self.ledger = Ledger(store, dict(plan.exchange.cash))
        self.skew = timedelta(
            seconds=self._notes.get("skew", float(plan.exchange.clock_skew_seconds))
        )
        self.is_frozen: bool = self._notes.get("is_frozen", False)
        self.is_open: bool = self._notes.get("is_open", plan.exchange.session != "CLOSED")
        self._next_order_id: int = self._notes.get("next_order_id", plan.exchange.first_order_id)
        self._next_perm_id: int = self._notes.get("next_perm_id", FIRST_PERM_ID)
        self._later: list[Callable[[], None]] = []
        self._timers: list[tuple[datetime, int, Callable[[], None]]] = []
        self._next_timer = 1
        self._walks: dict[str, Random] = {}
        self.refuses_logons = False
        self.books: dict[str, Book] = {}
        self.orders: dict[int, Order] = {}
        self._by_ref: dict[tuple[str, str], int] = {}
        self._next_number = 1
        self._load(plan)
        if "is_started" not in self._notes:
            self._remember("is_started", True)
            self.strike("START", Subject(DEFAULT_ACCOUNT))
            self._settle()

    def _load(self, plan: Plan) -> None:
        for symbol in list(self._store.symbols()):
            if symbol.name not in self.ledger.renamed:
                self._add_symbol(symbol)
        for wanted in plan.symbols:
            if wanted.name not in self.books and wanted.name not in self.ledger.renamed:
                self._add_symbol(Symbol(**wanted.model_dump()))
        for order in self._store.orders():
            self._know(order)
        self._resume()
        if plan.exchange.step_seconds and any(book.symbol.walk_bps for book in self.books.values()):
            self._in(plan.exchange.step_seconds, self._walk)
        if "-" in plan.exchange.session:
            self._keep_hours()

    def _resume(self) -> None:
        """Put orders back where they were; who was on his way to his book arrives."""
        of_reports = (report.order_number for report in self.ledger.reports)
        self._next_number = 1 + max((*self.orders, *of_reports), default=0)
        for order in list(self.orders.values()):
            if order.status == "ROUTED":
                self._watch_expiry(order)
                if not order.aside:
                    self.books[order.symbol].rest(order)
        for order in [each for each in self.orders.values() if each.is_open]:
            self.work(order)

    # --- What the server calls ----------------------------------------------------------------

    def now(self) -> datetime:
        """The exchange's own time, however wrong."""
        return self._clock() + self.skew

    def handle(self, number: int, request: Mapping[str, Any]) -> None:
        """Do what a connection asks."""
        session = self.post.sessions.get(number)
        op = request.get("op")
        if session is None:
            if op == "LOGON":
                self._log_on(number, request)
            else:
                self.post.drop(number)
        elif not self._within_rate(session):
            self.notice([session], "RATE_LIMIT", "Too many messages in one second.")
            self.post.drop(number)
        elif op in _REQUESTS:
            self._request(session, str(op), request)
        elif op == "LOGOFF":
            self.post.drop(number)
        else:
            self.notice([session], "BAD_REQUEST", f"There is no request {op!r}.")
        self._settle()

    def leave(self, number: int) -> None:
        """A connection has ended."""
        self.post.sessions.pop(number, None)

    def advance(self) -> None:
        """Do what has come due."""
        while self._timers and self._timers[0][0] <= self._clock():
            heappop(self._timers)[2]()
            self._settle()
        self.post.advance()

    def next_at(self) -> datetime | None:
        """When ``advance`` has something to do, on the clock that was given."""
        moments = [self._timers[0][0]] if self._timers else []
        late = self.post.next_at()
        return min(moments if late is None else [*moments, late], default=None)

    def release(self) -> list[tuple[int, bytes | None]]:
        """Write the books, then hand out what may be said."""
        if self.faults.counted != self._notes.get("counted"):
            counted = {key: list(counts) for key, counts in self.faults.counted.items()}
            self._remember("counted", counted)
        self._store.commit()
        return self.post.take()

    def by_operator(self, act: Callable[[], Any]) -> Any:
        """Do something for the control connection, and what follows from it."""
        done = act()
        self._settle()
        return done

    # --- Requests -----------------------------------------------------------------------------

    def _log_on(self, number: int, request: Mapping[str, Any]) -> None:
        account = str(request.get("account") or DEFAULT_ACCOUNT)
        client_id = int(request.get("client_id") or 0)
        struck = self.faults.at("LOGON")
        if self.refuses_logons or any(isinstance(fault, RefuseLogon | Drop) for fault in struck):
            self.post.drop(number)
            return
        subject = Subject(account)
        self._act(struck, subject, first=True)
        before = self.post.open(number, account, client_id)
        session = subject.session = self.post.sessions[number]
        if before is not None:
            self.steal(before, f"connection {number}")
        self.ledger.account(account)
        self.connected(session)
        self._act(struck, subject, first=False)

    def _request(self, session: Session, op: str, request: Mapping[str, Any]) -> None:
        subject = Subject(session.account, session)
        try:
            wanted = order_of(request["order"]) if "order" in request else None
        except BadInput as error:
            self.notice([session], "BAD_REQUEST", str(error))
            return
        if op in ("MODIFY", "CANCEL"):
            subject.order = self._find(session.account, request)
        about = subject.order or wanted
        struck = self.faults.at(op, about.symbol, about.side) if about else self.faults.at(op)
        self._act(struck, subject, first=True)
        drops = [fault for fault in struck if isinstance(fault, Drop)]
        if drops:
            self.post.drop(session.number)
        if any(fault.is_first for fault in drops):
            return
        _REQUESTS[op](self, subject, request, wanted, struck)
        self._act(struck, subject, first=False)

    def _submit(
        self,
        subject: Subject,
        request: Mapping[str, Any],
        wanted: BrokerOrder | None,
        struck: list[Fault],
    ) -> None:
        if wanted is None:
            return
        assert subject.session is not None
        order = self.accept(wanted, subject.account, subject.session.client_id)
        subject.order = order
        try:
            self._refuse_as_told(struck)
            self.check(order)
        except Refused as refused:
            self._end(order, "REJECTED", refused.code)
            self._tell_refusal(order, "REJECTED", refused)
            return
        order.aside = any(isinstance(fault, Fills | FillAfterClose | Forget) for fault in struck)
        self.tell_status(order)
        self._after_latency(lambda: self.work(order))

    def _modify(
        self,
        subject: Subject,
        request: Mapping[str, Any],
        wanted: BrokerOrder | None,
        struck: list[Fault],
    ) -> None:
        if wanted is None:
            return

        def change() -> None:
            try:
                self._refuse_as_told(struck)
                self._change(self._open_order(subject.order), wanted)
            except Refused as refused:
                self._refuse(subject, request, "MODIFY_REJECTED", refused)

        self._after_latency(change)

    def _cancel(
        self,
        subject: Subject,
        request: Mapping[str, Any],
        wanted: BrokerOrder | None,
        struck: list[Fault],
    ) -> None:
        def cancel() -> None:
            try:
                self._refuse_as_told(struck)
                order = self._open_order(subject.order)
                self._make_inactive(order, struck)
            except Refused as refused:
                self._refuse(subject, request, "CANCEL_REJECTED", refused)
                return
            if order.is_open:
                self.cancel(order, "by request")

        self._after_latency(cancel)

    def _make_inactive(self, order: Order, struck: list[Fault]) -> None:
        for fault in struck:
            if isinstance(fault, Inactive) and fault.says == "INACTIVE":
                self.end(order, "INACTIVE", "held no more")
                return
            if isinstance(fault, Inactive):
                self._end(order, "CANCELED", "before it was asked for")
                raise Refused("ALREADY_CANCELED", "The order is cancelled already.")

    def _what_if(
        self,
        subject: Subject,
        request: Mapping[str, Any],
        wanted: BrokerOrder | None,
        struck: list[Fault],
    ) -> None:
        if wanted is None:
            return
        order = Order(
            0, subject.account, HAND, "", wanted.symbol, wanted.side, wanted.quantity,
            wanted.order_type, wanted.time_in_force, self.now(), wanted.limit_price,
            wanted.stop_price, wanted.trail_amount, wanted.trail_percent, wanted.expire_at,
        )  # fmt: skip
        said: dict[str, Any] = {"accepted": True, "message": ""}
        try:
            self._refuse_as_told(struck)
            self.check(order)
        except Refused as refused:
            said = {"accepted": False, "message": f"{refused.code}: {refused}"}
        margin = margin_after(self.ledger, self.books, order, self.plan.margin_rate)
        said |= {"initial_margin": f"{margin.initial:f}", "excess": f"{margin.excess:f}"}
        self._answer(subject, request, "WHAT_IF", {"payload": said})

    def _snapshot(
        self,
        subject: Subject,
        request: Mapping[str, Any],
        wanted: BrokerOrder | None,
        struck: list[Fault],
    ) -> None:
        session = subject.session
        assert session is not None
        since = request.get("since")
        moment = None if since is None else datetime.fromisoformat(since)
        for part in snapshots.parts(
            self.orders, self.ledger, session.account, session.client_id, moment, self.now()
        ):
            self._answer(subject, request, "SNAPSHOT", part)

    def _ping(
        self,
        subject: Subject,
        request: Mapping[str, Any],
        wanted: BrokerOrder | None,
        struck: list[Fault],
    ) -> None:
        self._answer(subject, request, "PONG", {"broker_time": self.now().isoformat()})

    # --- The life of an order -----------------------------------------------------------------

    def accept(self, wanted: BrokerOrder, account: str, client_id: int) -> Order:
        """Take an order in and give it its ids."""
        order = Order(
            self._next_number,
            account,
            client_id,
            wanted.order_ref,
            wanted.symbol,
            wanted.side,
            wanted.quantity,
            wanted.order_type,
            wanted.time_in_force,
            self.now(),
            wanted.limit_price,
            wanted.stop_price,
            wanted.trail_amount,
            wanted.trail_percent,
            wanted.expire_at,
            broker_order_id=0 if client_id == HAND else self._new_order_id(),
            perm_id=self.new_perm_id(),
        )
        self._next_number += 1
        self._know(order)
        self._store.order(order)
        return order

    def check(self, order: Order) -> None:
        """Raises Refused for an order that this exchange doesn't take now."""
        book = self.books.get(order.symbol)
        if book is None:
            raise Refused("UNKNOWN_SYMBOL", f"There is no symbol {order.symbol}.")
        check_terms(order, book.symbol, self.now())
        if self.is_frozen:
            raise Refused("FROZEN", "The market is frozen.")
        if not self.is_open and self.plan.out_of_session == "REJECT":
            raise Refused("SESSION_CLOSED", "The session is closed.")
        margin = margin_after(self.ledger, self.books, order, self.plan.margin_rate)
        if margin.grows and margin.excess < 0:
            raise Refused("MARGIN", f"It needs {-margin.excess:f} more than there is.")

    def work(self, order: Order) -> None:
        """Let an accepted order into its book, if there is trading."""
        if order.number not in self.orders or order.status != "PENDING_SUBMIT":
            return
        if not self.is_trading:
            return
        order.status = "ROUTED"
        self.tell_status(order)
        self._watch_expiry(order)
        if not order.aside:
            self.put_in_book(order)

    def put_in_book(self, order: Order) -> None:
        """Let an order trade, and wait for more if it may."""
        order.aside = False
        self.traded(self.books[order.symbol].arrive(order))
        if order.time_in_force in _AT_ONCE and order.is_open:
            self.end(order, "CANCELED", f"{order.time_in_force}_REMAINDER")

    def traded(self, trades: Iterable[Trade]) -> None:
        """Book what traded, and tell it."""
        for trade in trades:
            self._book(trade)

    def fill(self, order: Order, quantity: Decimal, price: Decimal) -> None:
        """Fill an order beside the book, whatever its state."""
        order.filled = EXACT.add(order.filled, quantity)
        self._book(Trade(order, quantity, price, order.filled))

    def cancel(self, order: Order, reason: str) -> None:
        """Cancel an open order."""
        self.end(order, "CANCELED", reason)
        subject = Subject(order.account, order=order)
        self._later.append(
            lambda: self.strike("CANCELED", subject, symbol=order.symbol, side=order.side)
        )

    def end(self, order: Order, status: str, reason: str) -> None:
        """Take an order out of its book, and tell it."""
        self._end(order, status, reason)
        self.tell_status(order)

    def forget(self, order: Order) -> None:
        """Lose an order without a word."""
        self._out_of_book(order)
        del self.orders[order.number]
        self._by_ref.pop((order.account, order.order_ref), None)
        self._store.forget(order)

    def correct(self, report: Report, quantity: Decimal, price: Decimal) -> Report:
        """Correct an execution, and tell it."""
        corrected = self.ledger.correct(report, quantity, price, self.now())
        self._refill(corrected)
        return corrected

    def bust(self, report: Report) -> Report:
        """Take an execution back, and tell it."""
        busted = self.ledger.bust(report, self.now())
        self._refill(busted)
        return busted

    def _refill(self, report: Report) -> None:
        self.tell_report(report)
        order = self.orders.get(report.order_number)
        if order is None:
            return
        order.filled = self.ledger.filled(order)
        if order.is_open and not order.remaining:
            self._end(order, "FILLED", "")
        self._store.order(order)
        self.tell_status(order)

    def _book(self, trade: Trade) -> None:
        order = trade.order
        struck = self.faults.at("FILL", order.symbol, order.side)
        subject = Subject(order.account, order=order)
        self._act(struck, subject, first=True)
        report = self.ledger.execution(order, trade.quantity, trade.price, self.now())
        subject.report = report
        if trade.filled >= order.quantity and order.status != "FILLED":
            self._end(order, "FILLED", "")
        self._store.order(order)
        if any(isinstance(fault, Drop) for fault in struck):
            self.drop_account(order.account)
        commission = self._charge(report, struck)
        told = [report] if commission is None else [report, commission]
        if any(isinstance(fault, CommissionFirst) for fault in struck):
            told.reverse()
        for each in told:
            self.tell_report(each)
        self.tell_status(order, filled=trade.filled)
        self._later.append(lambda: self._act(struck, subject, first=False))

    def _charge(self, report: Report, struck: list[Fault]) -> Report | None:
        amount = EXACT.multiply(report.quantity, self.plan.commission_per_unit)
        if not amount:
            return None
        currency = self.plan.commission_currency or report.currency
        for fault in struck:
            if isinstance(fault, CommissionIn):
                currency = fault.currency
        return self.ledger.commission(report, amount, currency, self.now())

    def _change(self, order: Order, wanted: BrokerOrder) -> None:
        if self.is_frozen:
            raise Refused("FROZEN", "The market is frozen.")
        if wanted.quantity < order.filled:
            raise Refused("QUANTITY_BELOW_FILLED", f"{order.filled:f} are filled already.")
        if (wanted.limit_price is None) != (order.limit_price is None):
            raise Refused("BAD_PRICE", "A change can't make a price, or take it away.")
        self._out_of_book(order)
        order.quantity = wanted.quantity
        order.limit_price = wanted.limit_price
        if order.order_type != "TRAIL" and wanted.stop_price is not None:
            order.stop_price = wanted.stop_price
        self._store.order(order)
        self._tell_terms(order)
        if not order.remaining:
            self.end(order, "FILLED", "")
        elif order.status == "ROUTED" and not order.aside:
            self.put_in_book(order) if self.is_trading else self.books[order.symbol].rest(order)

    def _open_order(self, order: Order | None) -> Order:
        if order is None or order.number not in self.orders:
            raise Refused("UNKNOWN_ORDER", "There is no such order.")
        if not order.is_open:
            raise Refused(f"ALREADY_{order.status}", f"The order is {order.status} already.")
        return order

    def _end(self, order: Order, status: str, reason: str) -> None:
        self._out_of_book(order)
        order.status, order.reason, order.ended_at = status, reason, self.now()
        self._store.order(order)

    def _out_of_book(self, order: Order) -> None:
        book = self.books.get(order.symbol)
        if book is not None:
            book.remove(order)

    def _watch_expiry(self, order: Order) -> None:
        if order.expire_at is not None and order.time_in_force == "GTD":
            self._at(order.expire_at - self.skew, lambda: self._expire(order))

    def _expire(self, order: Order) -> None:
        if not (order.is_open and order.number in self.orders):
            return
        # The clock may have been put back since.
        if order.expire_at is not None and order.expire_at > self.now():
            self._watch_expiry(order)
        else:
            self.end(order, "EXPIRED", "GTD")

    # --- The market ---------------------------------------------------------------------------

    def set_price(self, name: str, price: Decimal) -> None:
        """Move a market; one that there was not is there now."""
        book = self.books.get(name)
        if book is None:
            book = self._add_symbol(Symbol(name))
        self._store.symbol(book.symbol)
        if self.is_trading:
            self.traded(book.set_price(price))
        else:
            book.symbol.price = price
            book.refill()

    def set_liquidity(self, name: str, liquidity: Decimal | None) -> None:
        """Say how much can be had of a symbol on each side at a price."""
        book = self.books[name]
        book.symbol.liquidity = liquidity
        book.refill()
        self._store.symbol(book.symbol)

    def freeze(self, frozen: bool) -> None:
        """Stop all trading, or let it go on."""
        self.is_frozen = frozen
        self._remember("is_frozen", frozen)
        self._go_on()

    def set_session(self, is_open: bool) -> None:
        """Open or close the session; nothing happens if it is so already."""
        if is_open == self.is_open:
            return
        self.is_open = is_open
        self._remember("is_open", is_open)
        if is_open:
            self._go_on()
            self.strike("OPEN", Subject(DEFAULT_ACCOUNT))
        else:
            self._close()

    def _close(self) -> None:
        open_orders = [order for order in self.orders.values() if order.status == "ROUTED"]
        for order in open_orders:
            if order.time_in_force == "DAY" and not order.aside:
                self.end(order, "EXPIRED", "DAY")
        for order in open_orders:
            price = self.books[order.symbol].symbol.price
            if order.aside and order.is_open and price is not None:
                self.fill(order, order.remaining, price)
        self.strike("CLOSE", Subject(DEFAULT_ACCOUNT))

    def rename(self, old: str, new: str) -> None:
        """Give a symbol another name: tell it, cancel its orders, keep its positions."""
        book = self.books.pop(old, None)
        if book is None:
            return
        self.ledger.rename(old, new)
        self.say_all("CONTRACT_CHANGED", {"symbol": old, "new_symbol": new})
        for order in [each for each in self.orders.values() if each.symbol == old]:
            if order.is_open:
                self.end(order, "CANCELED", "CONTRACT_CHANGED")
        was = book.symbol
        self._add_symbol(
            Symbol(new, was.price, was.liquidity, was.currency, was.negative_prices, was.walk_bps)
        )
        self._store.symbol(self.books[new].symbol)

    @property
    def is_trading(self) -> bool:
        """Whether orders trade now."""
        return self.is_open and not self.is_frozen

    def _go_on(self) -> None:
        """Trade what has waited, if there is trading."""
        if not self.is_trading:
            return
        for order in [each for each in self.orders.values() if each.is_open]:
            self.work(order)
        for book in list(self.books.values()):
            book.refill()
            self.traded(book.sweep())

    def step(self) -> None:
        """Let every price that walks take a step."""
        for book in list(self.books.values()):
            symbol = book.symbol
            if symbol.walk_bps and symbol.price is not None:
                symbol.steps += 1
                drawn = Decimal(str(self._walks[symbol.name].uniform(-1, 1)))
                moved = symbol.price * drawn * symbol.walk_bps / _BPS_IN_ONE
                self.set_price(symbol.name, (symbol.price + moved).quantize(_TICK))

    def _walk(self) -> None:
        self.step()
        self._in(self.plan.step_seconds, self._walk)

    def _add_symbol(self, symbol: Symbol) -> Book:
        walk = self._walks[symbol.name] = Random(f"{self._seed}/walk/{symbol.name}")
        for _ in range(symbol.steps):
            walk.uniform(-1, 1)
        book = self.books[symbol.name] = Book(symbol, self._store.order)
        self.ledger.currencies[symbol.name] = symbol.currency
        self._store.symbol(symbol)
        return book

    def _keep_hours(self) -> None:
        opens, closes = (time.fromisoformat(text) for text in self.plan.session.split("-"))
        now = self.now()
        at = now.time()
        inside = opens <= at < closes if opens < closes else not closes <= at < opens
        self.set_session(inside)
        edge = closes if inside else opens
        then = now.replace(hour=edge.hour, minute=edge.minute, second=0, microsecond=0)
        if then <= now:
            then += timedelta(days=1)
        self._at(then - self.skew, self._keep_hours)

    # --- Ids and time -------------------------------------------------------------------------

    def set_next_order_id(self, number: int) -> None:
        """Let order ids go on from here."""
        self._next_order_id = number
        self._remember("next_order_id", number)

    def new_perm_id(self) -> int:
        """A permId that nobody has had."""
        given = self._next_perm_id
        self._next_perm_id += 1
        self._remember("next_perm_id", self._next_perm_id)
        return given

    def change_perm_id(self, order: Order) -> None:
        """Give an order another permId, and tell it."""
        order.perm_id = self.new_perm_id()
        self._store.order(order)
        self.tell_status(order)

    def set_skew(self, seconds: float) -> None:
        """Put the exchange's clock wrong by so much."""
        self.skew = timedelta(seconds=seconds)
        self._remember("skew", seconds)

    def _new_order_id(self) -> int:
        given = self._next_order_id
        self.set_next_order_id(1 if given >= ORDER_ID_MAX else given + 1)
        return given

    # --- Sessions and what they hear ----------------------------------------------------------

    def connected(self, session: Session) -> None:
        """Tell a session whose account it has."""
        self._say(
            [session],
            "CONNECTED",
            {"account": session.account, "broker_time": self.now().isoformat()},
        )

    def steal(self, session: Session, by: str) -> None:
        """End a session because somebody else has it now."""
        self.post.sessions.pop(session.number, None)
        line = {"kind": "STOLEN", "event_at": self.now().isoformat(), "payload": {"by": by}}
        self.post.say_as_it_is(session.number, line)
        self.post.drop(session.number)

    def switch_account(self, session: Session, account: str) -> None:
        """Let a session go on with another account."""
        self.ledger.account(account)
        session.account = account
        self.connected(session)

    def drop_account(self, account: str) -> None:
        """Drop every connection of an account."""
        for session in list(self.post.sessions.values()):
            if session.account == account:
                self.post.drop(session.number)

    def notice(self, sessions: list[Session], code: str, message: str) -> None:
        """Say something that concerns no order."""
        self._say(sessions, "NOTICE", {"code": code, "message": message})

    def say_all(self, kind: str, payload: Mapping[str, Any]) -> None:
        """Say something to everybody."""
        self._say(list(self.post.sessions.values()), kind, payload)

    def tell_status(self, order: Order, *, filled: Decimal | None = None) -> None:
        """Tell where an order stands."""
        done = order.filled if filled is None else filled
        remaining = max(EXACT.subtract(order.quantity, done), ZERO)
        payload = {"status": order.status, "filled": f"{done:f}", "remaining": f"{remaining:f}"}
        if order.reason:
            payload["reason"] = order.reason
        self.say_of(order, "ORDER_STATUS", payload)

    def tell_report(self, report: Report) -> None:
        """Tell an execution, a bust or a commission."""
        order = self.orders.get(report.order_number)
        if order is not None:
            self.say_of(order, report.kind, report.payload, at=report.at)

    def say_of(
        self,
        order: Order,
        kind: str,
        payload: Mapping[str, Any],
        *,
        at: datetime | None = None,
    ) -> None:
        """Say something about an order to those whom it concerns."""
        hearing = [
            session
            for session in self.post.sessions.values()
            if session.hears(order.account, order.client_id)
        ]
        if hearing:
            line = snapshots.message_line(order, kind, payload, at or self.now())
            self.post.tell(line, hearing, symbol=order.symbol, side=order.side)

    def _tell_terms(self, order: Order) -> None:
        prices = {"limit_price": order.limit_price, "stop_price": order.stop_price}
        said = {name: None if price is None else f"{price:f}" for name, price in prices.items()}
        self.say_of(order, "MODIFIED", {"quantity": f"{order.quantity:f}", **said})

    def _tell_refusal(self, order: Order, kind: str, refused: Refused) -> None:
        self.say_of(order, kind, {"code": refused.code, "message": str(refused)})

    def _refuse(
        self, subject: Subject, request: Mapping[str, Any], kind: str, refused: Refused
    ) -> None:
        if subject.order is not None:
            self._tell_refusal(subject.order, kind, refused)
        elif subject.session is not None and subject.session.number in self.post.sessions:
            order_ref = request.get("order_ref") or (request.get("order") or {}).get("order_ref")
            payload = {"code": refused.code, "message": str(refused)}
            self._say([subject.session], kind, payload, order_ref=order_ref)

    def _say(
        self,
        sessions: list[Session],
        kind: str,
        payload: Mapping[str, Any],
        *,
        order_ref: str | None = None,
    ) -> None:
        line: dict[str, Any] = {"kind": kind, "event_at": self.now().isoformat()}
        if order_ref is not None:
            line["order_ref"] = order_ref
        self.post.tell(line | {"payload": payload}, sessions)

    def _answer(
        self, subject: Subject, request: Mapping[str, Any], kind: str, said: Mapping[str, Any]
    ) -> None:
        session = subject.session
        if session is not None and session.number in self.post.sessions:
            self.post.tell({"reply": request.get("request"), "answers": kind, **said}, [session])

    # --- Faults and timers --------------------------------------------------------------------

    def strike(self, point: str, subject: Subject, *, symbol: str = "", side: str = "") -> None:
        """Let the faults of a point act, all at once: nothing is left that could come after."""
        struck = self.faults.at(point, symbol, side)
        self._act(struck, subject, first=True)
        self._act(struck, subject, first=False)

    def _act(self, struck: list[Fault], subject: Subject, *, first: bool) -> None:
        for fault in struck:
            if fault.is_first == first:
                do_mischief(self, fault, subject)

    def _refuse_as_told(self, struck: list[Fault]) -> None:
        for fault in struck:
            if isinstance(fault, Reject):
                raise Refused(fault.code, fault.text)

    def _settle(self) -> None:
        while self._later:
            self._later.pop(0)()

    def _after_latency(self, act: Callable[[], None]) -> None:
        if self.plan.latency_seconds:
            self._in(self.plan.latency_seconds, act)
        else:
            act()

    def _in(self, seconds: Decimal, act: Callable[[], None]) -> None:
        self._at(self._clock() + timedelta(seconds=float(seconds)), act)

    def _at(self, moment: datetime, act: Callable[[], None]) -> None:
        heappush(self._timers, (moment, self._next_timer, act))
        self._next_timer += 1

    # --- Small things -------------------------------------------------------------------------

    def open_orders(self, account: str) -> list[Order]:
        """The open orders of an account, in the order of their arrival."""
        return [
            order for order in self.orders.values() if order.account == account and order.is_open
        ]

    def _find(self, account: str, request: Mapping[str, Any]) -> Order | None:
        named = request.get("order_ref") or (request.get("order") or {}).get("order_ref")
        number = self._by_ref.get((account, str(named)))
        if number is not None:
            return self.orders.get(number)
        # A number names only what no reference does: numbers restart, and who asks for an order
        # that is forgotten must not get another one.
        wanted = request.get("broker_order_id")
        found = [
            o
            for o in self.open_orders(account)
            if wanted and o.broker_order_id == wanted and not (named and o.order_ref)
        ]
        return found[-1] if found else None

    def _know(self, order: Order) -> None:
        self.orders[order.number] = order
        if order.order_ref:
            self._by_ref[order.account, order.order_ref] = order.number

    def _within_rate(self, session: Session) -> bool:
        most = self.plan.messages_per_second_max
        return most is None or self.post.allows(session, most)

    def _remember(self, name: str, value: Any) -> None:
        self._notes[name] = value
        self._store.note(name, value)


_REQUESTS: Mapping[
    str,
    Callable[[Exchange, Subject, Mapping[str, Any], BrokerOrder | None, list[Fault]], None],
] = {
    "SUBMIT": Exchange._submit,
    "MODIFY": Exchange._modify,
    "CANCEL": Exchange._cancel,
    "WHAT_IF": Exchange._what_if,
    "SNAPSHOT": Exchange._snapshot,
    "PING": Exchange._ping,
}
