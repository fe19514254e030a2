"""Rows that claim to be complete (numbered, chained, filled, marked) are proven, whoever writes.

The story of one tick with one trade is told by the owner in one statement, with all its rows, and
then with one lie in it at a time.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any
from uuid import uuid4

import psycopg
import pytest
from schema_cases import findings

from engine.db.connect import Connection
from engine.errors import RuleViolation, typed

EMPTY = "'{}'"
_NO_TICK = f"SELECT ticks_write(%s, %s, %s, NULL, {', '.join([EMPTY] * 19)}, NULL, NULL)"
AT = datetime(2024, 1, 10, 21, 0, tzinfo=UTC)
DAY = timedelta(days=1)


@dataclass
class Story:
    """What a statement tells; ``events`` are chained after the run's last one."""

    key: tuple[str, str]
    seq: int
    hash: bytes
    orders: list[dict[str, Any]] = field(default_factory=list)
    executions: list[dict[str, Any]] = field(default_factory=list)
    marks: list[dict[str, Any]] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)
    break_chain: bool = False

    def tell(self, conn: Connection) -> None:
        parts, values = [], []
        tables = {
            "orders": self.orders,
            "execution": self.executions,
            "mtm_ledger": self.marks,
            "event_ledger": self._chained(conn),
        }
        for table, told in tables.items():
            for number, row in enumerate(told):
                names = ["user_id", "run_id", *row]
                marks = ", ".join(["%s"] * len(names))
                parts.append(
                    f"{table}_{number} AS (INSERT INTO {table} ({', '.join(names)}, recorded_at) "
                    f"VALUES ({marks}, now()))"
                )
                values += [*self.key, *row.values()]
        conn.execute(f"WITH {', '.join(parts)} SELECT 1".encode(), values)
        conn.execute("SET CONSTRAINTS ALL IMMEDIATE")

    def _chained(self, conn: Connection) -> list[dict[str, Any]]:
        before, told = self.hash, []
        for event in self.events:
            given = {**event, "payload": json.dumps(event["payload"])}
            row = conn.execute(
                "SELECT event_hash(%s, %s, %s, %s, %s, %s, %s, %s, now())",
                [before, *self.key, *given.values()],
            ).fetchone()
            assert row is not None
            before = row[0]
            told.append({**given, "hash": bytes(32) if self.break_chain else before})
        return told


@pytest.fixture
def story(conn: Connection) -> Story:
    """A purchase of one unit at 100 by a run that has 1,000, and the tick's end."""
    user, run, order = (str(uuid4()) for _ in range(3))
    conn.execute("INSERT INTO app_user (user_id) VALUES (%s)", [user])
    conn.execute(
        """INSERT INTO strategy_run (user_id, run_id, status, initial_cash)
           VALUES (%s, %s, 'RUNNING', 1000)""",
        [user, run],
    )
    conn.execute(
        "INSERT INTO broker_account (user_id, account, broker) VALUES (%s, 'A1', 'ibkr')", [user]
    )
    row = conn.execute(
        """INSERT INTO event_ledger (user_id, run_id, logical_time, event_type)
           VALUES (%s, %s, %s, 'RUN_STARTED') RETURNING seq, hash""",
        [user, run, AT - DAY],
    ).fetchone()
    assert row is not None
    trade = {"symbol": "AAPL", "side": "BUY", "quantity": 1}
    terms = {**trade, "order_type": "MARKET", "time_in_force": "DAY", "reference_price": 100}
    money = {**trade, "price": 100, "commission": 0, "commission_currency": "USD"}
    worth = {"cash": 900, "market_value": 100}
    moment = "2024-01-10T21:00:00+00:00"
    tick = {"orders": 1, "executions": 1, "prices": {"AAPL": "100"}, **worth, "equity": 1000}
    filled = {"status": "FILLED", "status_at": AT, "filled_quantity": 1, "filled_notional": 100}
    return Story(
        (user, run),
        row[0],
        row[1],
        orders=[{"order_id": order, **terms, **filled, "logical_time": AT}],
        executions=[
            {
                "execution_id": f"{order}-1",
                "order_id": order,
                **money,
                "logical_time": AT,
                "event_at": AT,
            }
        ],
        marks=[{"logical_time": AT, **worth}],
        events=[
            _event(2, "ORDER_PLACED", order, terms),
            _event(3, "EXECUTION", f"{order}/{order}-1", {**money, "event_at": moment}),
            _event(4, "TICK", "", tick),
        ],
    )


def _event(seq: int, kind: str, subject: str, payload: dict[str, Any]) -> dict[str, Any]:
    return {
        "seq": seq,
        "logical_time": AT,
        "event_type": kind,
        "subject": subject,
        "payload": payload,
    }


def test_a_true_story_is_taken_and_the_audit_finds_nothing(conn: Connection, story: Story) -> None:
    story.tell(conn)
    assert findings(conn) == []
    held = conn.execute("SELECT quantity, cost_basis, mark_price FROM position").fetchall()
    assert held == [(1, 100, 100)]
    run = conn.execute("SELECT cash, books_seq FROM strategy_run").fetchall()
    assert run == [(Decimal(900), 3)]


Lie = Callable[[Story], None]


def _in(rows: str, number: int = 0, /, **changes: Any) -> Lie:
    def lie(story: Story) -> None:
        getattr(story, rows)[number].update(changes)

    return lie


def _say(number: int, **changes: Any) -> Lie:
    """Another payload of an event; with it the row, where ``rows`` names it, would still agree."""

    def lie(story: Story) -> None:
        story.events[number]["payload"].update(changes)

    return lie


def _without(rows: str, *numbers: int) -> Lie:
    def lie(story: Story) -> None:
        kept = [row for n, row in enumerate(getattr(story, rows)) if n not in (numbers or (n,))]
        setattr(story, rows, kept)

    return lie


def _all(*lies: Lie) -> Lie:
    def lie(story: Story) -> None:
        for each in lies:
            each(story)

    return lie


def _quantity(units: int, side: str = "BUY") -> Lie:
    """The whole story, of another quantity and side, and without its end."""
    change = {"quantity": units, "side": side}
    return _all(
        _in("orders", **change, filled_quantity=units, filled_notional=100 * units),
        _in("executions", **change),
        _say(0, **change),
        _say(1, **change),
        _without("marks"),
        _without("events", 2),
    )


def _chain(story: Story) -> None:
    story.break_chain = True


def _skip(story: Story) -> None:
    for event in story.events:
        event["seq"] += 1


def _alone(kind: str, at: datetime = AT) -> Lie:
    """Nothing but an event, numbered and chained rightly."""

    def lie(story: Story) -> None:
        story.orders, story.executions, story.marks = [], [], []
        story.events = [{**_event(2, kind, "x", {}), "logical_time": at}]

    return lie


TOLD = "event_ledger_tells_what_happened"
LIES: dict[str, tuple[Lie, str]] = {
    "a broken chain": (_chain, "event_ledger_hash_chain"),
    "a gap in the numbers": (_skip, "event_ledger_seq_without_gap"),
    "an event before the last one": (
        _alone("NOTE", AT - 2 * DAY),
        "event_ledger_time_moves_forward",
    ),
    "an order that its event tells otherwise": (_say(0, quantity=2), TOLD),
    "an execution that its event tells otherwise": (_say(1, price=1), TOLD),
    "an execution of another symbol": (
        _all(_in("executions", symbol="IBM"), _say(1, symbol="IBM")),
        TOLD,
    ),
    "an execution of the other side": (
        _all(_in("executions", side="SELL"), _say(1, side="SELL")),
        TOLD,
    ),
    "an execution at another time": (_in("executions", logical_time=AT - DAY), TOLD),
    "events without rows": (
        _all(_without("orders"), _without("executions"), _without("marks")),
        TOLD,
    ),
    "a tick without its mark": (_without("marks"), TOLD),
    "a mark with other cash": (_in("marks", cash=901), TOLD),
    "a mark and a tick with other cash": (
        _all(_in("marks", cash=901), _say(2, cash=901, equity=1001)),
        TOLD,
    ),
    "a mark and a tick with another value": (
        _all(_in("marks", market_value=101), _say(2, market_value=101, equity=1001)),
        TOLD,
    ),
    "a price that the value doesn't have": (_say(2, prices={"AAPL": "101"}), TOLD),
    "a filled order without an execution": (
        _all(_without("executions"), _without("marks"), _without("events", 1, 2)),
        "orders_filled_from_executions",
    ),
    "an order that is filled for more than its executions": (
        _in("orders", filled_notional=99),
        "orders_closed_fixed",
    ),
    "an order filled at another time than it was placed": (_in("orders", status_at=AT + DAY), TOLD),
    "a purchase beyond the cash": (_quantity(11), "orders_gate_decides"),
    "a sale of what is not held": (_quantity(1, "SELL"), "orders_gate_decides"),
    "an order without a price to weigh it by": (
        _all(_in("orders", reference_price=None), _say(0, reference_price=None)),
        TOLD,
    ),
    "an order at another broker": (
        _all(_in("orders", broker="ibkr", account="A1"), _say(0, account="A1")),
        "orders_gate_decides",
    ),
    "an order at another broker and of no account": (
        _in("orders", broker="ibkr"),
        "orders_account_unless_paper",
    ),
    "an order that a broker is said to have known": (
        _in("orders", recovered=True),
        "orders_account_unless_paper",
    ),
    "a mark beside the tick's, of other books": (
        lambda story: story.marks.append({"logical_time": AT + DAY, "cash": 1, "market_value": 1}),
        "mtm_ledger_time_moves_forward",
    ),
    "a mark alone, of other books": (
        _all(
            _without("orders"), _without("executions"), _without("events"), _in("marks", cash=901)
        ),
        "mtm_ledger_equals_books",
    ),
}


@pytest.mark.parametrize(("lie", "rule"), LIES.values(), ids=LIES.keys())
def test_a_lie_is_refused_and_leaves_nothing(
    conn: Connection, story: Story, lie: Lie, rule: str
) -> None:
    told = deepcopy(story)
    lie(told)
    with pytest.raises(psycopg.Error) as caught, conn.transaction():
        told.tell(conn)
    refusal = typed(caught.value)
    assert isinstance(refusal, RuleViolation), caught.value
    assert (refusal.constraint, bool(refusal.hint)) == (rule, True)
    story.tell(conn)  # nothing is left, so the true one is still the next


@pytest.mark.parametrize("part", ["orders", "executions", "events"])
def test_a_story_is_told_once(conn: Connection, story: Story, part: str) -> None:
    story.tell(conn)
    again = Story(story.key, story.seq, story.hash)
    setattr(again, part, deepcopy(getattr(story, part)))
    with pytest.raises(psycopg.IntegrityError), conn.transaction():
        again.tell(conn)


def test_a_filled_order_takes_no_second_execution(conn: Connection, story: Story) -> None:
    story.tell(conn)
    again = Story(story.key, story.seq, story.hash)
    again.executions = [{**story.executions[0], "execution_id": "another"}]
    with pytest.raises(psycopg.IntegrityError) as caught, conn.transaction():
        again.tell(conn)
    assert caught.value.sqlstate in ("23T05", "23T09")


def test_a_cancelled_order_takes_no_execution(conn: Connection, story: Story) -> None:
    order = story.orders[0]["order_id"]
    conn.execute(
        """INSERT INTO orders (user_id, run_id, order_id, symbol, side, quantity, reference_price)
           VALUES (%s, %s, %s, 'AAPL', 'BUY', 1, 100)""",
        [*story.key, order],
    )
    conn.execute("UPDATE orders SET status = 'CANCELED' WHERE order_id = %s", [order])
    late = Story(story.key, story.seq, story.hash, executions=story.executions)
    with pytest.raises(psycopg.IntegrityError) as caught, conn.transaction():
        late.tell(conn)
    assert caught.value.sqlstate == "23T01"


def test_who_has_not_read_the_last_event_writes_no_tick(conn: Connection, story: Story) -> None:
    """As a run that has moved, to be read again, and not as a number that is taken."""
    for read in (0, 2):
        with pytest.raises(psycopg.errors.SerializationFailure, match="moved"), conn.transaction():
            conn.execute(_NO_TICK.encode(), [*story.key, read])
    conn.execute(_NO_TICK.encode(), [*story.key, story.seq])


@pytest.mark.parametrize("status", ["STOPPED", "ERROR"])
def test_an_ended_run_takes_no_story(conn: Connection, story: Story, status: str) -> None:
    conn.execute("UPDATE strategy_run SET status = %s WHERE run_id = %s", [status, story.key[1]])
    head = conn.execute("SELECT hash FROM event_ledger ORDER BY seq DESC LIMIT 1").fetchone()
    assert head is not None
    story.hash = head[0]
    _skip(story)  # the end was an event, too
    with pytest.raises(psycopg.IntegrityError) as caught, conn.transaction():
        story.tell(conn)
    assert caught.value.sqlstate == "23T03"


def test_limits_hold_for_a_story_too(conn: Connection, story: Story) -> None:
    conn.execute(
        "INSERT INTO risk_limit (user_id, kind, symbol) VALUES (%s, 'FORBIDDEN_SYMBOL', 'AAPL')",
        [story.key[0]],
    )
    with pytest.raises(psycopg.IntegrityError, match="FORBIDDEN_SYMBOL") as caught:
        story.tell(conn)
    assert caught.value.diag.constraint_name == "orders_gate_decides"


def _trade(story: Story, side: str, quantity: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """One more order at 100, filled whole; returns its two events."""
    order = str(uuid4())
    filled = {"status": "FILLED", "filled_quantity": quantity, "filled_notional": 100 * quantity}
    what = {"side": side, "quantity": quantity}
    story.orders.append({**story.orders[0], **what, **filled, "order_id": order})
    story.executions.append(
        {**story.executions[0], **what, "execution_id": f"{order}-1", "order_id": order}
    )
    placed, executed = (event for event in story.events[:2])
    return (
        {**placed, "subject": order, "payload": {**placed["payload"], **what}},
        {**executed, "subject": f"{order}/{order}-1", "payload": {**executed["payload"], **what}},
    )


@pytest.mark.parametrize("sold_first", [True, False])
def test_cash_is_never_below_zero_in_between(
    conn: Connection, story: Story, sold_first: bool
) -> None:
    """Both purchases were placed when the cash was still there for each of them."""
    one, two, sale = _trade(story, "BUY", 8), _trade(story, "BUY", 8), _trade(story, "SELL", 8)
    del story.orders[0], story.executions[0]
    story.marks.clear()
    told = [one[0], two[0], one[1]]
    told += [*sale, two[1]] if sold_first else [two[1], *sale]
    story.events = [{**event, "seq": number} for number, event in enumerate(told, 2)]
    if sold_first:
        story.tell(conn)
        assert findings(conn) == []
        return
    with pytest.raises(psycopg.errors.CheckViolation) as caught, conn.transaction():
        story.tell(conn)
    refusal = typed(caught.value)
    assert isinstance(refusal, RuleViolation)
    assert refusal.constraint == "strategy_run_cash_not_negative_in_cash_account"
