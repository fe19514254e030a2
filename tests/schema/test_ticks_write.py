"""What may be told to ``ticks_write``, and what follows: nothing is taken on anybody's word.

Its rows are not proven again by the triggers as long as the function is the keeper's. So everything
here is told twice: to the keeper's function, and to the same one in its owner's hands, where every
trigger proves every row. Both must come to the same rows, or refuse by the same rule.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from schema_cases import contents, findings

from engine.db.connect import Connection
from engine.errors import typed

AT = datetime(2024, 1, 10, 15, 0, tzinfo=UTC)
MINUTE = timedelta(minutes=1)
CASH = Decimal(1000)
# After the run, the last event and the state: what is told, the trades, the ticks.
_TYPES = [
    *("timestamptz[]", "text[]", "text[]", "jsonb[]"),
    *("uuid[]", "text[]", "text[]", "numeric[]", "text[]", "text[]", "numeric[]", "timestamptz[]"),
    *("numeric[]", "text[]", "numeric[]", "numeric[]", "timestamptz[]"),
    *("numeric[]", "numeric[]"),
]
_WRITE = (
    f"SELECT ticks_write(%s, %s, %s, %s::jsonb, {', '.join(f'%s::{kind}' for kind in _TYPES)}, "
    "%s::timestamptz, %s::numeric)"
).encode()


@dataclass
class Telling:
    """What is told in one call; a trade's columns are order, symbol, side, quantity and so on."""

    told: list[list[Any]] = field(default_factory=list)
    trades: list[list[Any]] = field(default_factory=list)
    ticks: list[list[Any]] = field(default_factory=list)
    state: str | None = None
    heartbeat: datetime | None = None

    def trade(self, at: datetime, symbol: str, side: str, quantity: Any, price: Any) -> None:
        self.told += [[at, "ORDER_PLACED", None, None], [at, "EXECUTION", None, None]]
        self.trades.append(
            [
                *(uuid4(), symbol, side, quantity, "MARKET", "DAY", None, None),
                *(price, None, price, Decimal(0), at),
            ]
        )

    def tick(self, at: datetime, prices: dict[str, Any], cash: Any, value: Any) -> None:
        facts = {"orders": 0, "executions": 0, "prices": {s: str(p) for s, p in prices.items()}}
        self.told.append([at, "TICK", "", json.dumps(facts)])
        self.ticks.append([cash, value])

    def write(self, conn: Connection, key: tuple[UUID, UUID], after_seq: int) -> int:
        """Returns how many events are written."""
        columns = [
            *_columns(self.told, 4),
            *_columns(self.trades, 13),
            *_columns(self.ticks, 2),
        ]
        lag = None if self.heartbeat is None else 0
        parameters = [*key, after_seq, self.state, *columns, self.heartbeat, lag]
        row = conn.execute(_WRITE, parameters).fetchone()
        conn.execute("SET CONSTRAINTS ALL IMMEDIATE")
        assert row is not None
        written: int = row[0]
        return written


def _columns(rows: list[list[Any]], width: int) -> list[list[Any]]:
    return [[row[place] for row in rows] for place in range(width)]


@pytest.fixture
def key(conn: Connection) -> tuple[UUID, UUID]:
    """A run with 1,000 in cash that has told one event."""
    return _run(conn)


def _run(conn: Connection, account_type: str = "CASH") -> tuple[UUID, UUID]:
    user, run = uuid4(), uuid4()
    conn.execute("INSERT INTO app_user (user_id) VALUES (%s)", [user])
    conn.execute(
        """INSERT INTO strategy_run (user_id, run_id, status, initial_cash, account_type)
           VALUES (%s, %s, 'RUNNING', %s, %s)""",
        [user, run, CASH, account_type],
    )
    conn.execute(
        """INSERT INTO event_ledger (user_id, run_id, logical_time, event_type)
           VALUES (%s, %s, %s, 'RUN_STARTED')""",
        [user, run, AT - MINUTE],
    )
    return user, run


@pytest.fixture
def telling() -> Telling:
    """A purchase of two at 100, and the tick's end, at which they are worth 101 each."""
    telling = Telling(heartbeat=AT, state='{"seen": 1}')
    telling.trade(AT, "AAPL", "BUY", Decimal(2), Decimal(100))
    telling.tick(AT, {"AAPL": 101}, Decimal(800), Decimal(202))
    return telling


@contextmanager
def in_the_hands_of(conn: Connection, owner: str) -> Iterator[None]:
    """Whose function ``ticks_write`` is meanwhile: the keeper's, or the schema's owner's."""
    with conn.transaction():
        conn.execute("GRANT oms_keeper TO oms_owner")
        conn.execute("GRANT CREATE ON SCHEMA public TO oms_keeper")
        conn.execute(f"ALTER FUNCTION ticks_write OWNER TO {owner}".encode())
        conn.execute("REVOKE CREATE ON SCHEMA public FROM oms_keeper")
        conn.execute("REVOKE oms_keeper FROM oms_owner")
        yield


Outcome = dict[str, tuple[int, str]] | str


def refused_after(events: int, rows: Outcome) -> str:
    """The outcome of an order that the gate refuses, after so many events that are written."""
    assert isinstance(rows, dict)
    told = f" after {events}: {sorted(rows.items())}" if events else ""
    return f"orders_gate_decides{told}"


def outcomes(
    conn: Connection, key: tuple[UUID, UUID], telling: Telling, after_seq: int = 1
) -> list[Outcome]:
    """What comes of it unproven and proven: all rows, or the rule that refuses.

    The gate's refusal comes with the rows of the ticks that are whole before it, if there are any.
    """
    found: list[Outcome] = []
    for owner in ("oms_keeper", "oms_owner"):
        before = contents(conn)
        try:
            with conn.transaction(force_rollback=True), in_the_hands_of(conn, owner):
                written, rows = telling.write(conn, key, after_seq), contents(conn)
                assert findings(conn) == []
                if written == len(telling.told):
                    found.append(rows)
                else:
                    assert (rows == before) == (written == 0)
                    found.append(refused_after(written, rows))
        except psycopg.Error as error:
            meaning = typed(error)
            found.append(getattr(meaning, "constraint", None) or type(meaning).__name__)
        assert contents(conn) == before
    return found


def test_what_follows_is_the_same_as_what_would_be_proven(
    conn: Connection, key: tuple[UUID, UUID], telling: Telling
) -> None:
    telling.trade(AT + MINUTE, "MSFT", "BUY", Decimal("0.5"), Decimal("20.1"))
    telling.trade(AT + MINUTE, "AAPL", "SELL", Decimal(2), Decimal(102))
    telling.trades[-1][11] = Decimal("0.35")
    telling.told.append([AT + MINUTE, "NOTE", "about", '{"what": "ever"}'])
    telling.tick(AT + MINUTE, {"MSFT": 21}, Decimal("993.6"), Decimal("10.5"))
    keepers, owners = outcomes(conn, key, telling)
    assert keepers == owners
    telling.write(conn, key, 1)
    assert conn.execute("SELECT cash, books_seq FROM strategy_run").fetchone() == (
        Decimal("993.6"),
        8,
    )
    assert conn.execute(
        "SELECT symbol, quantity, cost_basis, realized_pnl, mark_price FROM position ORDER BY 1"
    ).fetchall() == [
        ("AAPL", 0, 0, 4, Decimal(102)),
        ("MSFT", Decimal("0.5"), Decimal("10.05"), 0, 21),
    ]
    assert conn.execute("SELECT last_logical_time, state FROM engine_state").fetchone() == (
        AT + MINUTE,
        {"seen": 1},
    )


_TRADE = [
    *("order", "symbol", "side", "quantity", "order_type", "time_in_force", "limit", "expire"),
    *("reference", "client", "price", "commission", "event_at"),
]


def _trade(**changes: Any) -> Callable[[Telling], None]:
    def tell(telling: Telling) -> None:
        for name, value in changes.items():
            telling.trades[0][_TRADE.index(name)] = value

    return tell


def _trade_alone(**changes: Any) -> Callable[[Telling], None]:
    """Without the tick, whose value would be another."""

    def tell(telling: Telling) -> None:
        _trade(**changes)(telling)
        del telling.told[2], telling.ticks[0]

    return tell


def _twice(telling: Telling) -> None:
    telling.told[2:2] = telling.told[:2]
    telling.trades.append(telling.trades[0])
    del telling.told[4], telling.ticks[0]


def _told(number: int, place: int, value: Any) -> Callable[[Telling], None]:
    def tell(telling: Telling) -> None:
        telling.told[number][place] = value

    return tell


def _add(kind: str, subject: str = "", payload: str = "{}") -> Callable[[Telling], None]:
    def tell(telling: Telling) -> None:
        telling.told.append([AT, kind, subject, payload])

    return tell


def _events_alone(*types: str) -> Callable[[Telling], None]:
    """These events about the trade and no tick, whose value would be another."""

    def tell(telling: Telling) -> None:
        telling.told = [[AT, each, None, None] for each in types]
        telling.ticks.clear()

    return tell


def _mark_from(moment: datetime) -> Callable[[Telling], None]:
    def tell(telling: Telling) -> None:
        facts = {"prices": {"AAPL": "101"}, "priced_at": {"AAPL": moment.isoformat()}}
        telling.told[2][3] = json.dumps(facts)

    return tell


def _tick(cash: Any, value: Any) -> Callable[[Telling], None]:
    def tell(telling: Telling) -> None:
        telling.ticks[0] = [cash, value]

    return tell


TELLS = "event_ledger_tells_what_happened"
LIES: dict[str, tuple[Callable[[Telling], None], str]] = {
    "more than the cash buys": (_trade(quantity=Decimal(11)), "orders_gate_decides"),
    "what isn't held is sold": (_trade(side="SELL"), "orders_gate_decides"),
    "nothing is bought": (_trade(quantity=Decimal(0)), "orders_gate_decides"),
    "a limit order without a limit": (_trade(order_type="LIMIT"), "orders_gate_decides"),
    "a price that is none": (_trade(reference=Decimal(-1)), "orders_gate_decides"),
    "no price at all": (_trade(reference=None), TELLS),
    "an execution below zero": (_trade(price=Decimal(-1)), "execution_price_positive"),
    "paid more than there is": (
        _trade(price=Decimal(501)),
        "strategy_run_cash_not_negative_in_cash_account",
    ),
    "a commission that eats the rest": (
        _trade(commission=Decimal(801)),
        "strategy_run_cash_not_negative_in_cash_account",
    ),
    "a side that is none": (_trade_alone(side="HOLD"), "orders_side_known"),
    "a symbol in small letters": (_trade_alone(symbol="aapl"), "orders_symbol_format"),
    "a quantity too fine": (
        _trade_alone(quantity=Decimal("1e-9")),
        "execution_quantity_positive",
    ),
    "an order twice": (_twice, "event_ledger_once_per_logical_time"),
    "other cash": (_tick(Decimal(801), Decimal(202)), TELLS),
    "another value": (_tick(Decimal(800), Decimal(203)), TELLS),
    "no cash": (_tick(None, Decimal(202)), TELLS),
    "a mark from before": (_mark_from(AT - MINUTE), "position_mark_moves_forward"),
    "a time that is past": (
        _told(0, 0, AT - 2 * MINUTE),
        "event_ledger_time_moves_forward",
    ),
    "an execution at another time": (_told(1, 0, AT + MINUTE), TELLS),
    "an order without its execution": (_events_alone("ORDER_PLACED"), TELLS),
    "an execution without its order": (_events_alone("EXECUTION"), TELLS),
    "an execution twice": (_events_alone("ORDER_PLACED", "EXECUTION", "EXECUTION"), TELLS),
    "two ticks at once": (_told(1, 1, "TICK"), TELLS),
    "an order's move": (_add("ORDER_CANCELED", str(UUID(int=1))), TELLS),
    "a commission": (_add("COMMISSION", "x", '{"cost": "-100"}'), TELLS),
    "a split": (_add("SPLIT_APPLIED", "AAPL@2024-01-10"), TELLS),
    "the run's end": (_add("RUN_STOPPED"), TELLS),
    "a plan that isn't there": (_add("SIP_EXECUTED", "p@2024-01"), "Retryable"),
    "an event of no name": (_add("lower"), "event_ledger_event_type_format"),
    "a payload that is none": (_add("NOTE", "", "[]"), "event_ledger_payload_is_object"),
    "the same again": (_add("TICK", "", '{"prices": {}}'), TELLS),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_is_refused_by_its_rule(
    conn: Connection, key: tuple[UUID, UUID], telling: Telling, lie: str
) -> None:
    tell, rule = LIES[lie]
    tell(telling)
    assert outcomes(conn, key, telling) == [rule, rule]


def test_the_same_tick_is_written_once(
    conn: Connection, key: tuple[UUID, UUID], telling: Telling
) -> None:
    telling.write(conn, key, 1)
    again = Telling()
    again.tick(AT, {"AAPL": 101}, Decimal(800), Decimal(202))
    assert set(outcomes(conn, key, again, 4)) == {"event_ledger_once_per_logical_time"}
    assert outcomes(conn, key, again, 1) == ["Retryable"] * 2


def test_an_ended_run_is_told_nothing(
    conn: Connection, key: tuple[UUID, UUID], telling: Telling
) -> None:
    conn.execute("UPDATE strategy_run SET status = 'STOPPED' WHERE run_id = %s", [key[1]])
    assert outcomes(conn, key, telling, 2) == ["event_ledger_run_is_running"] * 2


def test_a_mark_from_after_the_tick_holds_it_up(
    conn: Connection, key: tuple[UUID, UUID], telling: Telling
) -> None:
    conn.execute(
        "INSERT INTO mtm_ledger (user_id, run_id, logical_time) VALUES (%s, %s, %s)",
        [*key, AT + MINUTE],
    )
    assert outcomes(conn, key, telling) == ["mtm_ledger_time_moves_forward"] * 2


def test_open_orders_hold_back_their_cash_and_units(conn: Connection) -> None:
    key = _run(conn)
    bought = Telling()
    bought.trade(AT, "AAPL", "BUY", Decimal(2), Decimal(100))
    bought.write(conn, key, 1)
    for side, price in (("BUY", 300), ("SELL", 200)):
        conn.execute(
            """INSERT INTO orders (user_id, run_id, symbol, side, quantity, order_type, limit_price)
               VALUES (%s, %s, 'AAPL', %s, 2, 'LIMIT', %s)""",
            [*key, side, price],
        )
    for side, quantity in (("BUY", 3), ("SELL", 1)):
        telling = Telling()
        telling.trade(AT, "AAPL", side, Decimal(quantity), Decimal(100))
        assert outcomes(conn, key, telling, 5) == ["orders_gate_decides"] * 2


def _limit(conn: Connection, key: tuple[UUID, UUID], kind: str, value: Any) -> None:
    conn.execute(
        "INSERT INTO risk_limit (user_id, kind, limit_value, seconds) VALUES (%s, %s, %s, %s)",
        [key[0], kind, value, 600 if kind == "ORDER_RATE_MAX" else None],
    )


@pytest.mark.parametrize(
    ("kind", "value", "allowed"),
    [
        ("ORDER_RATE_MAX", 2, 2),
        ("DUPLICATE_INTENT", 90, 1),
        ("MAX_POSITION", 4, 2),
        ("GROSS_EXPOSURE_MAX", 450, 2),
        ("NET_EXPOSURE_MAX", 450, 2),
        ("CONCENTRATION_MAX", 45, 2),
        ("LEVERAGE_MAX", "0.45", 2),
    ],
)
def test_limits_count_what_is_told_before_in_the_same_call(
    conn: Connection, key: tuple[UUID, UUID], kind: str, value: Any, allowed: int
) -> None:
    _limit(conn, key, kind, value)
    telling = Telling()
    for number in range(allowed):
        at = AT + number * MINUTE
        telling.trade(at, "AAPL", "BUY", Decimal(2), Decimal(100))
        telling.tick(at, {"AAPL": 100}, CASH - 200 * (number + 1), 200 * (number + 1))
    keepers, owners = outcomes(conn, key, telling)
    assert keepers == owners
    assert isinstance(keepers, dict)
    whole = len(telling.told)
    telling.trade(AT + allowed * MINUTE, "AAPL", "BUY", Decimal(2), Decimal(100))
    telling.tick(AT + allowed * MINUTE, {}, Decimal(0), 0)
    assert outcomes(conn, key, telling) == [refused_after(whole, keepers)] * 2


@pytest.mark.parametrize(
    ("kind", "value", "more"),
    [("DAILY_LOSS_MAX", 79, 80), ("DRAWDOWN_MAX", 7, 8), ("PRICE_COLLAR", 7, 8)],
)
def test_limits_look_at_marks_that_are_told_before_in_the_same_call(
    conn: Connection, key: tuple[UUID, UUID], kind: str, value: int, more: int
) -> None:
    """Today's fall from yesterday's mark, which nothing but this call tells."""
    tomorrow = AT + timedelta(days=1)
    telling = Telling()
    telling.trade(AT, "AAPL", "BUY", Decimal(2), Decimal(100))
    telling.tick(AT, {"AAPL": 150}, Decimal(800), Decimal(300))
    telling.tick(tomorrow, {"AAPL": 110}, Decimal(800), Decimal(220))
    _limit(conn, key, kind, value)
    before, _ = outcomes(conn, key, telling)
    telling.trade(tomorrow + MINUTE, "MSFT", "BUY", Decimal(1), Decimal(100))
    if kind == "PRICE_COLLAR":
        telling.trades[-1][1] = "AAPL"
        telling.trades[-1][4] = "LIMIT"
        telling.trades[-1][6] = Decimal(102)
    assert outcomes(conn, key, telling) == [refused_after(4, before)] * 2
    conn.execute("UPDATE risk_limit SET limit_value = %s", [more])
    keepers, owners = outcomes(conn, key, telling)
    assert keepers == owners
    assert isinstance(keepers, dict)


def test_no_tick_is_written_by_half(conn: Connection, key: tuple[UUID, UUID]) -> None:
    """Neither its first trades, nor ticks without the state that belongs to them."""
    telling = Telling()
    telling.trade(AT, "AAPL", "BUY", Decimal(2), Decimal(100))
    telling.tick(AT, {}, Decimal(800), Decimal(200))
    whole, _ = outcomes(conn, key, telling)
    telling.trade(AT + MINUTE, "AAPL", "BUY", Decimal(3), Decimal(100))
    telling.trade(AT + MINUTE, "MSFT", "BUY", Decimal(9), Decimal(100))
    telling.tick(AT + MINUTE, {}, Decimal(-400), Decimal(1400))
    assert outcomes(conn, key, telling) == [refused_after(3, whole)] * 2
    telling.state = '{"seen": 2}'
    assert outcomes(conn, key, telling) == ["orders_gate_decides"] * 2

    # What is looked back at is in the tables before the next order is weighed.
    _limit(conn, key, "ORDER_RATE_MAX", 9)
    assert outcomes(conn, key, telling) == ["orders_gate_decides"] * 2
    telling.state = None
    assert outcomes(conn, key, telling) == ["orders_gate_decides"] * 2
    del telling.told[3:5], telling.trades[1]
    with conn.transaction(force_rollback=True):
        assert telling.write(conn, key, 1) == 3
    telling.state = '{"seen": 2}'
    assert outcomes(conn, key, telling) == ["orders_gate_decides"] * 2
    telling.state = None
    telling.told.insert(3, [AT + MINUTE, "NOTE", "first", "{}"])
    assert outcomes(conn, key, telling) == ["orders_gate_decides"] * 2


def test_the_kinds_that_look_back_are_those_that_read_what_is_written(conn: Connection) -> None:
    """Any other is told all that it needs; a kind that is added belongs to one or the other."""
    back = conn.execute("SELECT kind FROM limit_kind WHERE looks_back ORDER BY 1").fetchall()
    assert [kind for (kind,) in back] == [
        *("DAILY_LOSS_MAX", "DRAWDOWN_MAX", "DUPLICATE_INTENT", "ORDER_RATE_MAX", "PRICE_COLLAR")
    ]


_SYMBOLS = st.sampled_from(["AAPL", "MSFT", "IBM"])
_PRICES = st.decimals(min_value="0.01", max_value=400, places=2)
_TRADES = st.tuples(
    _SYMBOLS,
    st.sampled_from(["BUY", "SELL"]),
    st.decimals(min_value=0, max_value=4, places=3),
    _PRICES,
    st.sampled_from([Decimal(0), Decimal("0.35"), Decimal("-0.1")]),
)
_MINUTES = st.lists(
    st.tuples(st.lists(_TRADES, max_size=3), st.dictionaries(_SYMBOLS, _PRICES, max_size=3)),
    min_size=1,
    max_size=4,
)


@settings(max_examples=60)
@given(minutes=_MINUTES, account_type=st.sampled_from(["CASH", "MARGIN"]), off=st.booleans())
def test_whatever_is_told_both_come_to_the_same(
    conn: Connection, minutes: list[Any], account_type: str, off: bool
) -> None:
    """Trades and marks by a small model, whose last value is off in some of the stories."""
    with conn.transaction(force_rollback=True):
        key, telling = _run(conn, account_type), Telling(heartbeat=AT)
        cash, held = CASH, dict[str, Decimal]()
        marks: dict[str, tuple[Decimal, datetime]] = {}
        for number, (trades, prices) in enumerate(minutes):
            at = AT + number * MINUTE
            for symbol, side, quantity, price, commission in trades:
                telling.trade(at, symbol, side, quantity, price)
                telling.trades[-1][11] = commission
                units = quantity if side == "BUY" else -quantity
                held[symbol] = held.get(symbol, Decimal(0)) + units
                cash -= units * price + commission
                if symbol not in marks or marks[symbol][1] < at:
                    marks[symbol] = price, at
            holdings = {symbol: units for symbol, units in held.items() if units}
            marks |= {symbol: (prices[symbol], at) for symbol in prices.keys() & holdings.keys()}
            value = sum((n * marks[symbol][0] for symbol, n in holdings.items()), Decimal(0))
            telling.tick(at, prices, cash, value)
        if off:
            telling.ticks[-1][1] += 1
        keepers, owners = outcomes(conn, key, telling)
        assert keepers == owners
        assert isinstance(keepers, str) or not off
