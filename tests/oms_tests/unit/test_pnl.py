"""Profit and loss: realised and unrealised, by both methods, in the broker's time."""

from __future__ import annotations

from collections import deque
from datetime import UTC, datetime, timedelta
from decimal import ROUND_HALF_UP, Decimal, localcontext
from pathlib import Path
from typing import Any

import psycopg
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from market_days import assert_sound
from traded_books import MONDAY, Book

from engine.db.connect import Connection
from engine.errors import BadInput
from engine.market.imports import read_rates
from engine.market.store import import_rates
from engine.pnl import pnl
from engine.runs import find_run

D = Decimal
METHODS = ("AVERAGE", "FIFO")
MINUTE = timedelta(minutes=1)


def rate(
    conn: Connection, at: datetime, price: str, currency: str = "EUR", quote: str = "USD"
) -> None:
    conn.execute(
        "INSERT INTO fx_rate (currency, quote_currency, at, rate) VALUES (%s, %s, %s, %s)",
        [currency, quote, at, D(price)],
    )


@pytest.mark.scenario("PNL-01")
@pytest.mark.parametrize(("method", "after_first"), [("AVERAGE", 225), ("FIFO", 250)])
def test_realized_pnl_on_close_correct(conn: Connection, method: str, after_first: int) -> None:
    """10 at 100 and 10 at 110; 15 sold at 120, the rest at 120: 300, sooner or later."""
    book = Book(conn, method)
    book.trade("10", "100", commission="1")
    book.trade("10", "110", commission="1")
    assert book.pnl("realized_pnl") == (0,)
    book.trade("-15", "120", commission="1")
    # FIFO: 10 x 20 + 5 x 10. Average: 15 x (120 - 105).
    assert book.pnl("realized_pnl, quantity") == (after_first, 5)
    book.trade("-5", "120", commission="1")
    assert book.pnl("realized_pnl, unrealized_pnl, cost_basis, commission, total_pnl") == (
        300, 0, 0, 4, 296,
    )  # fmt: skip
    assert book.one("SELECT cash FROM strategy_run WHERE run_id = %s", book.run_id) == (100296,)


@pytest.mark.scenario("PNL-02")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("units", ["10", "-10"])
def test_unrealized_pnl_updates_on_price_change(conn: Connection, method: str, units: str) -> None:
    book = Book(conn, method)
    book.trade(units, "100")
    sign = 1 if D(units) > 0 else -1
    for price, profit in [("100.01", "0.1"), ("130", "300"), ("90", "-100")]:
        book.mark(price)
        assert book.pnl("realized_pnl, unrealized_pnl, total_pnl") == (
            0, sign * D(profit), sign * D(profit),
        )  # fmt: skip


@pytest.mark.scenario("ACCOUNT-PNL-DRIFT")
@pytest.mark.parametrize("method", METHODS)
def test_commission_currency_conversion_prevents_pnl_drift(conn: Connection, method: str) -> None:
    """Each commission at the rate of its own time, so that later rates move nothing."""
    book = Book(conn, method, broker="dummy")
    rate(conn, MONDAY, "1.10")
    rate(conn, MONDAY + 10 * MINUTE, "1.25")
    bought = book.trade("10", "100")
    # The report comes after the second rate, and tells of a moment before it.
    at = MONDAY + 10 * MINUTE - timedelta(microseconds=1)
    assert book.commission(bought, "1.00", "EUR", at) == D("1.10")
    sold = book.trade("-10", "101")
    assert book.commission(sold, "1.00", "EUR", MONDAY + 10 * MINUTE) == D("1.25")
    booked = book.pnl("realized_pnl, commission, total_pnl")
    assert booked == (10, D("2.35"), D("7.65"))
    rate(conn, MONDAY + 20 * MINUTE, "9")
    assert book.pnl("realized_pnl, commission, total_pnl") == booked
    # To the last digit what the cash says.
    assert book.one("SELECT cash - initial_cash FROM strategy_run WHERE run_id = %s", book.run_id)[
        0
    ] == D("7.65")
    assert_sound(conn)


def test_a_commission_without_a_rate_of_its_time_is_refused(conn: Connection) -> None:
    book = Book(conn, broker="dummy")
    rate(conn, MONDAY, "1.10")
    bought = book.trade("10", "100")
    for moment in (MONDAY - MINUTE, MONDAY + timedelta(days=7)):
        with pytest.raises(psycopg.errors.ForeignKeyViolation) as refused, conn.transaction():
            book.commission(bought, "1", "EUR", moment)
        assert refused.value.diag.constraint_name == "execution_commission_has_rate"
    last = MONDAY + timedelta(days=7) - timedelta(microseconds=1)
    assert book.commission(bought, "1", "EUR", last) == D("1.10")


@pytest.mark.parametrize(
    ("of", "into", "minutes", "expected"),
    [
        ("EUR", "EUR", -100, "1"),
        ("EUR", "USD", -1, None),
        ("EUR", "USD", 0, "1.1"),
        ("EUR", "USD", 5, "1.1"),
        ("USD", "EUR", 0, "0.9090909091"),
        # The pair turned round is newer.
        ("EUR", "USD", 10, "1.25"),
        ("USD", "EUR", 10, "0.8"),
        ("EUR", "INR", 10, None),
    ],
)
def test_the_rate_of_a_moment(
    conn: Connection, of: str, into: str, minutes: int, expected: str | None
) -> None:
    rate(conn, MONDAY, "1.1")
    rate(conn, MONDAY + 10 * MINUTE, "0.8", "USD", "EUR")
    found = conn.execute("SELECT fx_rate_at(%s, %s, %s)", [of, into, MONDAY + minutes * MINUTE])
    assert found.fetchone() == (None if expected is None else D(expected),)


def test_lots_are_closed_first_in_first_out(conn: Connection) -> None:
    book = Book(conn, "FIFO")
    book.trade("10", "100")
    book.trade("5", "110")
    book.trade("-12", "120")
    assert book.lots() == [(3, 330)]
    # Through zero: what is left of the sale opens a short lot.
    book.trade("-5", "115")
    assert book.lots() == [(-2, -230)]
    book.trade("1", "100")
    assert book.lots() == [(-1, -115)]
    assert book.pnl("realized_pnl")[0] == 200 + 2 * 10 + 3 * 5 + 15


@pytest.mark.parametrize("method", METHODS)
def test_what_a_broker_takes_back_never_was(conn: Connection, method: str) -> None:
    book = Book(conn, method, broker="dummy")
    book.trade("10", "100")
    wrong = book.trade("10", "200")
    book.bust(wrong, "10", "200")
    assert book.pnl("quantity, cost_basis, realized_pnl") == (10, 1000, 0)
    book.trade("-10", "110")
    assert book.pnl("quantity, cost_basis, realized_pnl, total_pnl") == (0, 0, 100, 100)
    assert book.one("SELECT cash FROM strategy_run WHERE run_id = %s", book.run_id) == (100100,)


_BOOKED = """SELECT p.quantity, p.avg_cost, p.cost_basis, p.realized_pnl
             FROM {} p WHERE p.user_id = %s AND p.run_id = %s"""


def _agreed(book: Book) -> tuple[Any, ...]:
    """Quantity, average cost, cost and profit, of which books and reckoning say the same."""
    told = [book.one(_BOOKED.format(each), *book.key) for each in ("position", "position_pnl")]
    assert told[0] == told[1]
    assert_sound(book.conn)
    return told[0]


def test_the_books_forget_what_a_broker_takes_back(conn: Connection) -> None:
    book = Book(conn, broker="dummy")
    book.trade("10", "100")
    before = _agreed(book)
    assert before == (10, 100, 1000, 0)
    wrong = book.trade("10", "200")
    assert _agreed(book) == (20, 150, 3000, 0)
    book.bust(wrong, "10", "200")
    assert _agreed(book) == before
    # A sale that was none: its profit is none, and the cost is what it was.
    sold = book.trade("-4", "130")
    assert _agreed(book) == (6, 100, 600, 120)
    book.bust(sold, "4", "130")
    assert _agreed(book) == before
    # All of it, and what comes afterwards begins anew.
    first = book.trade("-10", "90")
    book.bust(first, "10", "90")
    assert _agreed(book) == before
    book.trade("-15", "110")
    assert _agreed(book) == (-5, 110, -550, 100)


def _split(book: Book) -> None:
    """Two for one, the day after Monday."""
    book.conn.execute(
        """INSERT INTO corporate_action (symbol, ex_date, numerator, denominator)
           VALUES ('AAPL', '2024-01-09', 2, 1)"""
    )
    book.at = datetime(2024, 1, 9, 15, tzinfo=UTC)
    book.conn.execute(
        """INSERT INTO split_applied (user_id, run_id, symbol, ex_date, logical_time)
           VALUES (%s, %s, 'AAPL', '2024-01-09', %s)""",
        [*book.key, book.at],
    )


def test_nothing_is_taken_back_on_paper(conn: Connection) -> None:
    book = Book(conn)
    order_id = book.order("10", "AAPL")
    filled = book.fill(order_id, "5", "100")
    with pytest.raises(psycopg.errors.IntegrityError) as refused, conn.transaction():
        book.execute(order_id, "back", D(-5), "100", reverses=filled)
    assert refused.value.diag.constraint_name == "execution_said_by_broker"


def test_what_is_taken_back_after_others_have_traded_never_was_for_them(conn: Connection) -> None:
    book = Book(conn, broker="dummy")
    wrong = book.trade("10", "200")
    book.trade("10", "100")
    book.trade("-5", "150")
    assert _agreed(book) == (15, 150, 2250, 0)
    book.bust(wrong, "10", "200")
    assert _agreed(book) == (5, 100, 500, 250)


def test_several_that_are_taken_back_at_once_never_were(conn: Connection) -> None:
    book = Book(conn, broker="dummy")
    book.trade("10", "100")
    wrong = [book.trade("10", price) for price in ("200", "300")]
    book.trade("10", "110")
    for each in wrong:
        book.heard("BUST", book.at, {}, order_ref=each.split(".")[0], execution_id=each)
    conn.execute(
        """INSERT INTO execution (user_id, run_id, order_id, execution_id, quantity, price,
                                  event_at, reverses)
           SELECT user_id, run_id, order_id, execution_id || '-bust', -quantity, price, event_at,
                  execution_id
           FROM execution WHERE user_id = %s AND execution_id = ANY (%s)""",
        [book.user_id, wrong],
    )
    assert _agreed(book) == (20, 105, 2100, 0)


def test_what_is_taken_back_after_a_split_is_a_trade(conn: Connection) -> None:
    """Both sides of it count in other units, so nobody can say what it would have been."""
    book = Book(conn, broker="dummy")
    book.trade("10", "100")
    wrong = book.trade("10", "120")
    _split(book)
    book.bust(wrong, "10", "120")
    assert _agreed(book)[0] == 30
    later = book.trade("2", "70")
    before_bust = _agreed(book)
    book.bust(later, "2", "70")
    assert _agreed(book)[0] == before_bust[0] - 2


def test_the_price_of_what_is_taken_back_marks_nothing(conn: Connection) -> None:
    book = Book(conn, broker="dummy")
    book.trade("10", "100")
    wrong = book.trade("10", "200")
    book.mark("101")
    book.at += MINUTE
    book.bust(wrong, "10", "200")
    assert book.one("SELECT mark_price FROM position WHERE run_id = %s", book.run_id) == (101,)


def test_lots_follow_the_brokers_time(conn: Connection) -> None:
    """The news of the earlier fill comes later, and our clock has jumped."""
    book = Book(conn, "FIFO", broker="dummy")
    book.trade("10", "110", event_at=MONDAY + 5 * MINUTE)
    book.trade("10", "100", event_at=MONDAY + 1 * MINUTE, after=timedelta(seconds=30))
    book.trade("-10", "120", event_at=MONDAY + 6 * MINUTE)
    assert book.pnl("realized_pnl") == (200,)
    assert book.lots() == [(10, 1100)]


@pytest.mark.parametrize("method", METHODS)
def test_a_split_keeps_the_cost(conn: Connection, method: str) -> None:
    book = Book(conn, method)
    conn.execute(
        """INSERT INTO corporate_action (symbol, ex_date, numerator, denominator)
           VALUES ('AAPL', '2024-01-09', 2, 3)"""
    )
    book.trade("10", "100")
    book.trade("1", "100")
    book.at = datetime(2024, 1, 9, 15, tzinfo=UTC)
    conn.execute(
        """INSERT INTO split_applied (user_id, run_id, symbol, ex_date, logical_time)
           VALUES (%s, %s, 'AAPL', '2024-01-09', %s)""",
        [*book.key, book.at],
    )
    held = D("7.33333333")
    assert book.pnl("quantity, cost_basis, realized_pnl") == (held, 1100, 0)
    assert book.lots() == [(D("6.66666666"), 1000), (D("0.66666667"), 100)]
    book.trade(f"-{held}", "160")
    assert book.pnl("quantity, cost_basis, realized_pnl") == (0, 0, held * 160 - 1100)


def test_days_are_sessions_by_the_brokers_time(conn: Connection) -> None:
    conn.execute(
        """INSERT INTO calendar_session (calendar, session_date, open_at, close_at) VALUES
           ('XNYS', '2024-01-08', '2024-01-08 14:30Z', '2024-01-08 21:00Z'),
           ('XNYS', '2024-01-09', '2024-01-09 14:30Z', '2024-01-09 21:00Z')
           ON CONFLICT DO NOTHING"""
    )
    book = Book(conn)
    book.trade("10", "100", commission="1")
    book.mark("105")
    conn.execute("INSERT INTO mtm_ledger (user_id, run_id, logical_time) VALUES (%s, %s, %s)",
                 [*book.key, book.at])  # fmt: skip
    book.at = datetime(2024, 1, 9, 15, tzinfo=UTC)
    # The broker says that it was yesterday, after the close: after midnight in UTC, before in
    # New York.
    book.trade("-4", "110", event_at=datetime(2024, 1, 9, 1, tzinfo=UTC), commission="0.5")
    book.trade("-6", "111")
    conn.execute("INSERT INTO mtm_ledger (user_id, run_id, logical_time) VALUES (%s, %s, %s)",
                 [*book.key, book.at])  # fmt: skip
    assert book.days() == [
        ("2024-01-08", 40, D("1.5"), 49),
        ("2024-01-09", 66, 0, D("55.5")),
    ]
    found = pnl(conn, find_run(conn, book.run_id))
    assert [position.total_pnl for position in found.positions] == [D("104.5")]
    assert sum(day.realized_pnl - day.commission for day in found.days) == D("104.5")
    assert found.lots == []


def test_lots_are_told_of_a_fifo_run(conn: Connection) -> None:
    book = Book(conn, "FIFO")
    book.trade("1", "100")
    book.trade("2", "110")
    found = pnl(conn, find_run(conn, book.run_id))
    assert [(lot.symbol, lot.quantity, lot.cost) for lot in found.lots] == [
        ("AAPL", D(1), D(100)),
        ("AAPL", D(2), D(220)),
    ]
    assert found.days == []


@pytest.mark.parametrize(("column", "value"), [("pnl_method", "LIFO"), ("pnl_method", "fifo")])
def test_a_method_is_one_of_two(conn: Connection, column: str, value: str) -> None:
    with pytest.raises(psycopg.errors.CheckViolation), conn.transaction():
        Book(conn, value)
    book = Book(conn)
    with pytest.raises(psycopg.IntegrityError) as refused, conn.transaction():
        conn.execute(f"UPDATE strategy_run SET {column} = 'FIFO' WHERE run_id = %s", [book.run_id])
    assert refused.value.diag.constraint_name == "strategy_run_terms_fixed"


# --- Against a model ------------------------------------------------------------------------


class Fifo:
    """FIFO in a few lines: lots of units and price, closed from the left."""

    def __init__(self) -> None:
        self.lots: deque[tuple[Decimal, Decimal]] = deque()
        self.realized = D(0)

    def trade(self, units: Decimal, price: Decimal) -> None:
        while units and self.lots and self.lots[0][0] * units < 0:
            held, cost = self.lots.popleft()
            closed = min(abs(units), abs(held)).copy_sign(held)
            self.realized += closed * (price - cost)
            units += closed
            if held != closed:
                self.lots.appendleft((held - closed, cost))
        if units:
            self.lots.append((units, price))


class Average:
    """Average cost, a share of it cut to 12 decimals."""

    def __init__(self) -> None:
        self.units = self.cost = self.realized = D(0)

    def trade(self, units: Decimal, price: Decimal) -> None:
        if self.units * units < 0:
            closed = min(abs(units), abs(self.units)).copy_sign(self.units)
            share = self.cost * closed / self.units
            removed = (
                share.quantize(D("1e-12"), ROUND_HALF_UP) if closed != self.units else self.cost
            )
            self.realized += closed * price - removed
            self.units, self.cost, units = self.units - closed, self.cost - removed, units + closed
        self.units += units
        self.cost += units * price


TRADES = st.lists(
    st.tuples(
        st.decimals("-50", "50", places=3).filter(bool), st.decimals("0.01", "500", places=2)
    ),
    min_size=1,
    max_size=12,
)


@settings(max_examples=60)
@given(trades=TRADES, mark=st.decimals("0.01", "500", places=2))
def test_both_methods_agree_with_their_models_and_in_their_sum(
    conn: Connection, trades: list[tuple[Decimal, Decimal]], mark: Decimal
) -> None:
    fifo, average = Fifo(), Average()
    found = {}
    with localcontext(prec=60), conn.transaction(force_rollback=True):
        for model in (fifo, average):
            for units, price in trades:
                model.trade(units, price)
        for method in METHODS:
            book = Book(conn, method)
            for units, price in trades:
                book.trade(str(units), str(price))
            book.mark(str(mark))
            found[method] = book.pnl(
                "quantity, cost_basis, realized_pnl, unrealized_pnl, total_pnl"
            )
            if method == "FIFO":
                assert book.lots() == [(units, units * price) for units, price in fifo.lots]
            else:
                # What the books themselves say.
                assert book.one(
                    """SELECT quantity, cost_basis, realized_pnl FROM position
                       WHERE user_id = %s AND run_id = %s""", *book.key,
                ) == found[method][:3]  # fmt: skip
        units = sum((units for units, _ in trades), D(0))
        paid = sum((units * price for units, price in trades), D(0))
        cost = sum((units * price for units, price in fifo.lots), D(0))
        assert found["FIFO"][:3] == (units, cost, fifo.realized)
        assert found["AVERAGE"][:3] == (units, average.cost, average.realized)
        for of_method in found.values():
            assert of_method[2] + of_method[3] == of_method[4] == units * mark - paid


# --- Rates from files -----------------------------------------------------------------------


def a_file(folder: Path, text: str) -> Path:
    path = folder / "rates.csv"
    path.write_text(text)
    return path


HEADER = "currency,quote_currency,at,rate\n"


def test_rates_are_imported_once(conn: Connection, tmp_path: Path) -> None:
    path = a_file(tmp_path, HEADER + "eur,USD,2024-01-08T15:00:00Z,1.10\n")
    assert import_rates(conn, read_rates(path)).added == 1
    assert import_rates(conn, read_rates(path)).added == 0
    rows = "EUR,USD,2024-01-08T15:00:00Z,1.12\nEUR,USD,2024-01-09T15:00:00Z,1.11\n"
    path = a_file(tmp_path, HEADER + rows)
    with pytest.raises(BadInput, match=r"EUR/USD at 2024-01-08T15:00:00\+00:00 is stored as 1.10"):
        import_rates(conn, read_rates(path))
    assert conn.execute("SELECT count(*) FROM fx_rate").fetchone() == (1,)


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ("EURO,USD,2024-01-08T15:00Z,1.1", "'EURO' isn't a currency"),
        ("EUR,EUR,2024-01-08T15:00Z,1", "the rate of EUR in itself"),
        ("EUR,USD,2024-01-08T15:00,1.1", "has no timezone"),
        ("EUR,USD,2024-01-08T15:00Z,0", "must be above zero"),
        ("EUR,USD,2024-01-08T15:00Z,1000000000", "below 1000000000"),
        ("EUR,USD,2024-01-08T15:00Z,many", "isn't a number"),
        ("EUR,USD,2024-01-08T15:00Z,1\nEUR,USD,2024-01-08T15:00Z,1", "was on line 2 already"),
    ],
)
def test_a_broken_file_of_rates_is_refused(tmp_path: Path, row: str, says: str) -> None:
    with pytest.raises(BadInput, match=says):
        read_rates(a_file(tmp_path, HEADER + row + "\n"))
