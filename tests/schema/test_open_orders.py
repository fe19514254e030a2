"""What open orders hold back is summed by buckets: always right, proven, and cheap to ask for."""

from __future__ import annotations

import random
from collections.abc import Iterator
from decimal import Decimal
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest
from schema_cases import DENIED, ROLES, acting_as, assert_refused, findings

from engine.db.connect import ENGINE_ROLE as ENGINE
from engine.db.connect import Connection, open_connection
from engine.errors import NotOurNumber, typed

AT = "2024-01-02 15:00+00"
MANY = 600  # open orders: more than are read one by one
ALL_OPEN = "status NOT IN ('FILLED', 'CANCELED', 'REJECTED', 'EXPIRED')"


class Desk:
    """A RUNNING paper run, and SQL into it."""

    def __init__(self, conn: Connection, account_type: str = "CASH") -> None:
        self.conn = conn
        self.user, self.run = uuid4(), uuid4()
        conn.execute("INSERT INTO app_user (user_id) VALUES (%s)", [self.user])
        conn.execute(
            """INSERT INTO strategy_run (user_id, run_id, status, initial_cash, account_type)
               VALUES (%s, %s, 'RUNNING', 1e6, %s)""",
            [self.user, self.run, account_type],
        )

    def execute(self, query: str, *parameters: object) -> psycopg.Cursor[Any]:
        """SQL in which ``{key}`` is the run."""
        key = f"user_id = '{self.user}' AND run_id = '{self.run}'"
        return self.conn.execute(query.format(key=key).encode(), parameters)

    def place(
        self, count: int = 1, quantity: object = 1, side: str = "BUY", symbol: str = "AAPL"
    ) -> list[tuple[UUID, str | None]]:
        """Limit orders at 10 in one statement: ids, and why they were refused."""
        return self.execute(
            f"""INSERT INTO orders (user_id, run_id, symbol, side, quantity, order_type,
                                    limit_price, time_in_force, logical_time)
                SELECT %s, %s, %s, %s, %s, 'LIMIT', 10, 'GTC', '{AT}' FROM generate_series(1, %s)
                RETURNING order_id, reject_code""",
            *(self.user, self.run, symbol, side, quantity, count),
        ).fetchall()

    def trade(self, order: UUID, quantity: object, price: object = 10) -> None:
        self.execute(
            """INSERT INTO execution (user_id, run_id, order_id, quantity, price)
               VALUES (%s, %s, %s, %s, %s)""",
            *(self.user, self.run, order, quantity, price),
        )

    def move(self, status: str, *orders: UUID) -> None:
        self.execute(
            "UPDATE orders SET status = %s WHERE {key} AND order_id = ANY (%s)",
            *(status, list(orders)),
        )

    def one(self, query: str, *parameters: object) -> Any:
        row = self.execute(query, *parameters).fetchone()
        assert row is not None
        return row[0]

    def held_back(self, kind: str = "CASH", symbol: str = "") -> Decimal:
        """What the database says of it, which the orders must bear out."""
        what = "reserved_cash" if kind == "CASH" else "quantity - filled_quantity"
        which = "true" if kind == "CASH" else f"side = '{kind}' AND symbol = '{symbol}'"
        summed = self.one(
            "SELECT open_orders_sum(%s, %s, %s, %s)", *(self.user, self.run, kind, symbol)
        )
        assert summed == self.one(
            f"SELECT coalesce(sum({what}), 0) FROM orders WHERE {{key}} AND {ALL_OPEN} AND {which}"
        )
        assert self.execute("SELECT * FROM audit_order").fetchall() == []
        return Decimal(summed)

    def know(self) -> None:
        """Every sum that was forgotten is asked for anew."""
        self.execute("UPDATE open_order_sum SET is_known = true WHERE {key}")

    def known(self, kind: str = "CASH") -> int:
        return int(
            self.one(
                "SELECT count(*) FROM open_order_sum WHERE {key} AND kind = %s AND is_known", kind
            )
        )


@pytest.fixture
def desk(conn: Connection) -> Desk:
    return Desk(conn)


@pytest.fixture
def busy(desk: Desk) -> Desk:
    """With many open orders, all of whose sums are known; those that are attacked differ."""
    desk.place(MANY)
    desk.held_back()
    while desk.known() < 128 or not desk.one(
        """SELECT max(amount) FILTER (WHERE bucket = 7)
                  NOT IN (0, 1, max(amount) FILTER (WHERE bucket = 8))
           FROM open_order_sum WHERE {key} AND kind = 'CASH'"""
    ):
        desk.place(20)
        desk.know()
    return desk


# --- Always right -----------------------------------------------------------------------------


def test_few_open_orders_are_not_summed(desk: Desk) -> None:
    desk.place(200)
    assert desk.held_back() == 2000
    assert desk.one("SELECT count(*) FROM open_order_sum") == 0


def test_many_are_and_their_changes_are_seen_at_once(busy: Desk) -> None:
    before = busy.held_back()
    (first, _), (second, _), (third, _) = busy.place(3, 2)
    assert 125 <= busy.known() < 128, "only their buckets have to be read"
    assert busy.held_back() == before + 60
    busy.know()
    busy.trade(first, 1)
    assert busy.known() == 127
    assert busy.held_back() == before + 50
    busy.know()
    busy.trade(first, 1)
    busy.move("CANCELED", second)
    assert busy.held_back() == before + 20
    busy.know()
    busy.move("PENDING", third)
    assert busy.known() == 128, "it holds back what it did"
    busy.move("EXPIRED", third)
    assert busy.held_back() == before


def test_the_last_cent_is_seen_within_one_statement(busy: Desk) -> None:
    busy.place(1, (10**6 - busy.held_back()) % 30 / 10)
    left = (10**6 - busy.held_back()) / 10
    placed = busy.place(4, left / 3)
    assert [code for _, code in placed] == [None, None, None, "INSUFFICIENT_CASH"]
    assert busy.place(1, Decimal("0.1"))[0][1] == "INSUFFICIENT_CASH"
    busy.know()
    busy.move("CANCELED", placed[0][0])
    assert busy.place(1, left / 3)[0][1] is None


def test_what_is_held_is_sold_once(desk: Desk) -> None:
    ((bought, _),) = desk.place(1, 700)
    desk.trade(bought, 700)
    assert {code for _, code in desk.place(700, 1, "SELL")} == {None}
    assert desk.place(1, 1, "SELL")[0][1] == "INSUFFICIENT_POSITION"
    assert desk.known("SELL") > 0
    assert desk.held_back("SELL", "AAPL") == 700
    assert desk.held_back("SELL", "IBM") == 0


def test_a_known_sum_follows_a_split(busy: Desk) -> None:
    ((bought, _),) = busy.place(1, 10)
    busy.trade(bought, 10)
    before, units = busy.held_back(), busy.held_back("BUY", "AAPL")
    busy.know()
    busy.execute(
        """INSERT INTO corporate_action (symbol, ex_date, numerator, denominator)
           VALUES ('AAPL', '2024-01-03', 2, 1)"""
    )
    busy.execute(
        """INSERT INTO split_applied (user_id, run_id, symbol, ex_date, logical_time)
           VALUES (%s, %s, 'AAPL', '2024-01-03', '2024-01-03 15:00+00')""",
        *(busy.user, busy.run),
    )
    assert busy.held_back() == before, "twice the units at half the price"
    assert busy.held_back("BUY", "AAPL") == 2 * units


def test_the_end_of_the_run_frees_everything(busy: Desk) -> None:
    busy.execute("UPDATE strategy_run SET status = 'STOPPED' WHERE {key}")
    assert busy.held_back() == 0


@pytest.mark.parametrize("seed", range(4))
def test_whatever_happens_to_orders_the_sums_are_right(busy: Desk, seed: int) -> None:
    lot = random.Random(seed)
    placed: list[UUID] = []
    for _ in range(40):
        act = lot.choice(("place", "trade", "end", "ask", "forget"))
        some = lot.sample(placed, min(len(placed), lot.randint(1, 5)))
        if act == "place":
            placed += [order for order, _ in busy.place(lot.randint(1, 30), lot.randint(2, 5))]
        elif act == "trade" and some:
            busy.trade(some[0], 2 if lot.random() < 0.5 else 1)
            placed.remove(some[0])
        elif act == "end":
            busy.move("CANCELED", *some)
            placed = [order for order in placed if order not in some]
        elif act == "forget":
            # Not to know is always right: a row that is gone, or one that says so.
            busy.execute(
                "DELETE FROM open_order_sum WHERE {key} AND bucket = %s", lot.randint(0, 9)
            )
        else:
            busy.held_back()
            busy.held_back("BUY", "AAPL")
    busy.held_back()
    busy.held_back("BUY", "AAPL")


def test_a_savepoint_takes_a_sum_back_with_its_orders(busy: Desk) -> None:
    before = busy.held_back()
    with busy.conn.transaction(force_rollback=True):
        busy.place(300, 2)
        assert busy.held_back() == before + 6000
    assert busy.held_back() == before


def test_the_engine_places_among_many_orders(busy: Desk) -> None:
    with acting_as(busy.conn, ENGINE):
        assert {code for _, code in busy.place(300)} == {None}
    busy.held_back()


# --- Proven, whoever writes -------------------------------------------------------------------

_ONE = "WHERE user_id = '{user}' AND run_id = '{run}' AND kind = 'CASH' AND bucket = 7"
_VALUES = "INSERT INTO open_order_sum (user_id, run_id, kind, symbol, bucket, amount) VALUES "
_FROM_ORDERS = "open_order_sum_from_orders"
ATTACKS = {
    "less is held back": (f"UPDATE open_order_sum SET amount = 0 {_ONE}", _FROM_ORDERS),
    "a cent less": (f"UPDATE open_order_sum SET amount = amount - 0.01 {_ONE}", _FROM_ORDERS),
    "not a number": (f"UPDATE open_order_sum SET amount = 'NaN' {_ONE}", _FROM_ORDERS),
    "a known nothing": (
        f"UPDATE open_order_sum SET is_known = false {_ONE}",
        "open_order_sum_amount_if_known",
    ),
    "an amount that is not known": (
        f"UPDATE open_order_sum SET is_known = false, amount = -1e6 {_ONE}",
        "open_order_sum_amount_if_known",
    ),
    "the sum of another bucket": (
        f"DELETE FROM open_order_sum WHERE bucket = 8; UPDATE open_order_sum SET bucket = 8 {_ONE}",
        _FROM_ORDERS,
    ),
    "forgotten, then known otherwise": (
        f"UPDATE open_order_sum SET is_known = false, amount = NULL {_ONE}; "
        f"UPDATE open_order_sum SET is_known = true, amount = 1 {_ONE}",
        _FROM_ORDERS,
    ),
    "made anew": (
        f"DELETE FROM open_order_sum {_ONE}; {_VALUES} ('{{user}}', '{{run}}', 'CASH', '', 7, 0)",
        _FROM_ORDERS,
    ),
    "a bucket that no order is in": (
        f"{_VALUES} ('{{user}}', '{{run}}', 'CASH', '', 128, -1000000)",
        _FROM_ORDERS,
    ),
    "an empty bucket that no order is in": (
        f"{_VALUES} ('{{user}}', '{{run}}', 'CASH', '', 128, 0)",
        "open_order_sum_bucket_in_range",
    ),
    "cash of a symbol": (
        f"{_VALUES} ('{{user}}', '{{run}}', 'CASH', 'AAPL', 7, NULL)",
        "open_order_sum_symbol_unless_cash",
    ),
    "a kind that is none": (
        f"{_VALUES} ('{{user}}', '{{run}}', 'GOLD', 'AAPL', 7, 0)",
        "open_order_sum_kind_known",
    ),
    "units that nobody sells": (
        f"{_VALUES} ('{{user}}', '{{run}}', 'SELL', 'AAPL', 7, -5)",
        _FROM_ORDERS,
    ),
    "a run that is not there": (
        f"{_VALUES} ('{{user}}', '{{user}}', 'CASH', '', 7, 0)",
        "open_order_sum_belongs_to_run",
    ),
    "another run's": (
        f"UPDATE open_order_sum SET user_id = '{{other_user}}', run_id = '{{other_run}}' {_ONE}",
        "open_order_sum_keeps_its_run",
    ),
    "an order in the same statement": (
        "WITH placed AS (INSERT INTO orders (user_id, run_id, symbol, side, quantity, order_type, "
        "limit_price, logical_time) SELECT '{user}', '{run}', 'AAPL', 'BUY', 1, 'LIMIT', 10, "
        f"'{AT}' FROM generate_series(1, 500) RETURNING 1) "
        f"UPDATE open_order_sum SET amount = amount - 10 {_ONE}",
        _FROM_ORDERS,
    ),
}


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("name", ATTACKS)
def test_nobody_says_that_less_is_held_back(busy: Desk, name: str, role: str) -> None:
    other = Desk(busy.conn)
    text, rule = ATTACKS[name]
    attack = text.format(user=busy.user, run=busy.run, other_user=other.user, other_run=other.run)
    assert_refused(busy.conn, attack, role, DENIED if role == ENGINE else rule)


def test_an_ended_runs_sums_are_not_written(busy: Desk) -> None:
    busy.execute("UPDATE strategy_run SET status = 'STOPPED' WHERE {key}")
    attack = f"UPDATE open_order_sum SET is_known = true {_ONE}"
    text = attack.format(user=busy.user, run=busy.run)
    (role,) = set(ROLES) - {ENGINE}
    assert_refused(busy.conn, text, role, "open_order_sum_run_is_running")


@pytest.fixture
def two(owner_conn: Connection, dsn: str) -> Iterator[tuple[Desk, Connection]]:
    """A desk that commits, and a transaction beside it that sees an older state."""
    desk = Desk(owner_conn)
    with open_connection(dsn) as other:
        other.autocommit = False
        other.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
        yield desk, other


def test_an_older_state_proves_nothing(two: tuple[Desk, Connection]) -> None:
    desk, other = two
    desk.place(MANY)
    other.execute("SELECT 1 FROM orders LIMIT 1")
    desk.place(MANY)
    # Asked from there it is what is seen from there, and nothing is kept of it.
    units = other.execute(
        "SELECT open_orders_sum(%s, %s, 'BUY', 'AAPL')", [desk.user, desk.run]
    ).fetchone()
    assert units == (MANY,)
    kinds = other.execute("SELECT DISTINCT kind FROM open_order_sum").fetchall()
    assert kinds == [("CASH",)], "which the gate asked for"
    with pytest.raises(psycopg.Error) as caught:
        other.execute(_VALUES.encode() + b"(%s, %s, 'BUY', 'AAPL', 7, NULL)", [desk.user, desk.run])
    meaning = typed(caught.value)
    assert isinstance(meaning, NotOurNumber)
    assert meaning.constraint == _FROM_ORDERS
    other.rollback()
    assert desk.held_back() == 10 * 2 * MANY


# --- Found, where a rule was switched off ------------------------------------------------------


def test_a_sum_that_was_falsified_is_found(busy: Desk) -> None:
    busy.execute("ALTER TABLE open_order_sum DISABLE TRIGGER USER")
    busy.execute("UPDATE open_order_sum SET amount = amount - 1 WHERE {key} AND bucket = 7")
    busy.execute("ALTER TABLE open_order_sum ENABLE TRIGGER USER")
    ((view, subject, finding),) = findings(busy.conn)
    assert (view, subject.split()) == ("audit_order", ["open_order_sum", "CASH", "7"])
    assert ", the open orders make it " in finding


def test_an_order_past_its_sum_is_found(busy: Desk) -> None:
    for how in ("DISABLE", "ENABLE"):
        busy.execute(f"ALTER TABLE orders {how} TRIGGER orders_c_forget_insert")
        if how == "DISABLE":
            busy.place(1)
    assert [row[0] for row in findings(busy.conn)] == ["audit_order"]


# --- Cheap to ask for -------------------------------------------------------------------------

READ = """
    SELECT sum(seq_tup_read + coalesce(idx_tup_fetch, 0))::integer FROM pg_stat_xact_user_tables
    WHERE relname IN ('orders', 'open_order_sum')"""


def _read_by_order(desk: Desk, side: str) -> float:
    """Rows that a new order reads, on average."""
    with desk.conn.transaction():
        before = desk.one(READ)
        for _ in range(40):
            assert desk.place(1, 1, side)[0][1] is None
        return float(desk.one(READ) - before) / 40


@pytest.mark.slow
@pytest.mark.parametrize(
    ("side", "statistics"), [("BUY", False), ("SELL", True)], ids=["no statistics", "statistics"]
)
def test_the_gate_reads_no_more_with_ten_thousand_open_orders(
    owner_conn: Connection, side: str, statistics: bool
) -> None:
    """What is read one by one is bounded, and 128 sums with it."""
    read = {}
    for count in (100, 10_000):
        desk = Desk(owner_conn)
        ((bought, _),) = desk.place(1, 20_000)
        desk.trade(bought, 20_000)
        for _ in range(count // 100):
            desk.place(100, 1, side)
        if statistics:
            owner_conn.execute("ANALYZE")
        read[count] = _read_by_order(desk, side)
    print(f"{side}: a new order reads {read}")
    assert read[10_000] < 1_000, read
    assert read[100] > 50, "it reads those that are open"
