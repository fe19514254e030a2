"""Every class of difference, from both sides, by rows that the test puts into the inbox."""

from __future__ import annotations

from datetime import datetime, timedelta
from decimal import Decimal
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest
from broker_cases import ACCOUNT, SECOND, Wire
from snapshot_cases import Books, kinds

from engine.db.connect import Connection
from engine.reconcile import due_reconciliations, mark_stale, request_snapshot


@pytest.fixture
def books(wire: Wire) -> Books:
    return Books(wire)


def everything(wire: Wire) -> list[Any]:
    """All that a reconciliation might change."""
    tables = ("orders", "execution", "event_ledger", "position", "alert", "order_broker_id")
    return [
        wire.conn.execute(
            f"SELECT to_jsonb(t) FROM {table} t WHERE user_id = %s ORDER BY to_jsonb(t)::text",
            [wire.run.user_id],
        ).fetchall()
        for table in tables
    ]


def _clock(wire: Wire) -> datetime:
    """The database's clock, which claims and arrivals are timed by."""
    row = wire.conn.execute("SELECT clock_timestamp()").fetchone()
    assert row is not None
    at: datetime = row[0]
    return at


def outcome(wire: Wire, order_id: UUID, kind: str = "SUBMIT") -> str | None:
    row = wire.conn.execute(
        """SELECT outcome FROM broker_command
           WHERE user_id = %s AND order_id = %s AND kind = %s ORDER BY order_version DESC""",
        [wire.run.user_id, order_id, kind],
    ).fetchone()
    assert row is not None
    return row[0]  # type: ignore[no-any-return]


def claim(
    wire: Wire, order_id: UUID, outcome: str | None, *, by: UUID | None = None, kind: str = "SUBMIT"
) -> None:
    """The connector has taken a command, and it came to this."""
    wire.conn.execute(
        """UPDATE broker_command SET claimed_by = %s, claimed_at = clock_timestamp(),
                  sent_at = CASE WHEN %s::text = 'SENT' THEN clock_timestamp() END,
                  done_at = CASE WHEN %s::text IS NOT NULL THEN clock_timestamp() END,
                  outcome = %s
           WHERE user_id = %s AND order_id = %s AND kind = %s AND claimed_by IS NULL""",
        [by or wire.holder, outcome, outcome, outcome, wire.run.user_id, order_id, kind],
    )


def test_what_agrees_is_no_difference(wire: Wire, books: Books) -> None:
    books.works(wire.working())
    before = everything(wire)
    done = books.reconcile()
    assert (done.differences, done.undecided, done.open_orders) == ([], 0, 1)
    assert everything(wire) == before


# --- Missing ------------------------------------------------------------------------------------


def test_what_the_broker_no_longer_works_is_canceled(wire: Wire, books: Books) -> None:
    order_id = wire.working()
    done = books.reconcile()
    assert kinds(done) == [("MISSING_AT_BROKER", "CANCELED")]
    assert done.differences[0].derived == {"status": "ROUTED", "filled": "0", "quantity": "10"}
    order = wire.order(order_id)
    assert (order["status"], order["status_reason"]) == ("CANCELED", "RECONCILE_MISMATCH")
    (event,) = wire.events("RECONCILE_MISMATCH")
    assert event[1]["class"] == "MISSING_AT_BROKER"
    assert wire.alerts() == ["RECONCILE_MISMATCH"]


def test_a_fill_explains_why_it_is_missing(wire: Wire, books: Books) -> None:
    order_id = wire.working()
    snapshot_id = books.ask()
    wire.fill(order_id, "10", "100", "E1")  # the connector puts it before the snapshot's parts
    books.positions, books.cash = {"AAPL": "10"}, {"USD": "99000"}
    books.answer(snapshot_id)
    assert books.compare() is None  # the fill is not applied yet
    wire.apply()
    done = books.compare()
    assert done is not None
    assert done.differences == []
    assert wire.order(order_id)["status"] == "FILLED"


def test_newer_news_wins_over_a_snapshot(wire: Wire, books: Books) -> None:
    """The broker spoke of it after it had taken the snapshot: by its clock, or by the order of
    arrival."""
    by_clock, by_place = wire.working(), wire.working()
    snapshot_id = books.ask()
    taken_at = wire.now
    wire.status(by_clock, "ROUTED", at=taken_at + SECOND)
    books.answer(snapshot_id, at=taken_at)
    wire.status(by_place, "ROUTED", at=taken_at)
    wire.apply()
    done = books.compare()
    assert done is not None
    assert done.differences == []
    assert {wire.order(o)["status"] for o in (by_clock, by_place)} == {"ROUTED"}


def test_a_submit_on_its_way_is_not_missing(wire: Wire, books: Books) -> None:
    """Sent on a connection that stands, half a minute not yet over: nobody knows."""
    order_id = wire.place()
    wire.sent(order_id)
    done = books.reconcile()
    assert (done.differences, done.undecided) == ([], 1)
    assert wire.order(order_id)["status"] == "NEW"
    assert outcome(wire, order_id) == "SENT"


@pytest.mark.parametrize("how", ["reconnected", "unknown", "dead"])
def test_a_submit_that_nothing_carries_any_more_never_arrived(
    wire: Wire, books: Books, how: str
) -> None:
    order_id = wire.place()
    claim(
        wire,
        order_id,
        {"reconnected": "SENT", "unknown": "UNKNOWN", "dead": None}[how],
        by=uuid4() if how == "dead" else None,
    )
    if how == "reconnected":
        wire.say("CONNECTED", lag=_clock(wire) - wire.now)
    done = books.reconcile()
    assert kinds(done) == [("NEVER_ARRIVED", "KEPT")]
    assert wire.order(order_id)["status"] == "NEW"
    assert outcome(wire, order_id) == "NEVER_ARRIVED"
    assert [payload["class"] for _, payload in wire.events("RECONCILE")] == ["NEVER_ARRIVED"]
    before = everything(wire)
    assert books.reconcile().differences == []
    assert everything(wire) == before
    assert wire.kinds(order_id) == ["SUBMIT"]  # never sent again by itself


def test_a_submit_in_the_hands_of_a_living_connector_is_undecided(wire: Wire, books: Books) -> None:
    order_id = wire.place()
    claim(wire, order_id, None)
    assert books.reconcile().undecided == 1
    assert outcome(wire, order_id) is None


def test_a_submit_claimed_after_the_question_is_undecided(wire: Wire, books: Books) -> None:
    order_id = wire.place()
    snapshot_id = books.ask()
    claim(wire, order_id, "UNKNOWN")
    books.answer(snapshot_id)
    wire.apply()
    done = books.compare()
    assert done is not None
    assert (done.differences, done.undecided) == ([], 1)


def test_a_snapshot_that_nobody_asked_for_decides_nothing_unknown(wire: Wire, books: Books) -> None:
    order_id = wire.place()
    claim(wire, order_id, "UNKNOWN")
    books.answer(uuid4())
    wire.apply()
    done = books.compare()
    assert done is not None
    assert (done.why, done.undecided) == ("UNASKED", 1)


def test_what_waits_for_its_turn_is_not_missing(wire: Wire, books: Books) -> None:
    order_id = wire.place()
    assert books.reconcile().differences == []
    assert wire.order(order_id)["status"] == "NEW"


def test_a_cancelled_order_that_never_arrived_is_over(wire: Wire, books: Books) -> None:
    order_id = wire.place()
    claim(wire, order_id, "UNKNOWN")
    assert wire.cancel(order_id) == "PENDING_CANCEL"
    done = books.reconcile()
    assert kinds(done) == [("NEVER_ARRIVED", "CANCELED")]
    assert wire.order(order_id)["status"] == "CANCELED"
    assert outcome(wire, order_id, "CANCEL") == "WITHDRAWN"


# --- Found --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("said", "becomes"), [("ROUTED",) * 2, ("PENDING_SUBMIT",) * 2])
def test_what_the_broker_has_after_all_is_found(
    wire: Wire, books: Books, said: str, becomes: str
) -> None:
    order_id = wire.place()
    claim(wire, order_id, "UNKNOWN")
    books.works(order_id, status=said, broker_order_id=77, perm_id=9001)
    done = books.reconcile()
    assert kinds(done) == [("FOUND", "MOVED")]
    order = wire.order(order_id)
    assert (order["status"], order["broker_order_id"], order["perm_id"]) == (becomes, 77, 9001)
    assert outcome(wire, order_id) == "ARRIVED"
    assert [payload["class"] for _, payload in wire.events("RECONCILE")] == ["FOUND"]
    before = everything(wire)
    assert books.reconcile().differences == []
    assert everything(wire) == before


def test_an_order_that_was_cancelled_by_guess_works_again(wire: Wire, books: Books) -> None:
    order_id = wire.working()
    books.reconcile()
    assert wire.order(order_id)["status"] == "CANCELED"
    books.works(order_id)
    done = books.reconcile()
    assert kinds(done) == [("STATUS_DIFFERS", "MOVED")]
    assert wire.order(order_id)["status"] == "ROUTED"


def test_a_filled_order_that_the_broker_works_is_for_a_person(wire: Wire, books: Books) -> None:
    order_id = wire.working()
    wire.fill(order_id, "10", "100", "E1")
    wire.apply()
    books.works(order_id, filled="3")
    books.positions, books.cash = {"AAPL": "10"}, {"USD": "99000"}
    done = books.reconcile()
    assert kinds(done) == [("STATUS_DIFFERS", "ALERTED"), ("FILLED_DIFFERS", "ALERTED")]
    assert wire.order(order_id)["status"] == "FILLED"


# --- Modifications and cancels that were lost ---------------------------------------------------


def test_a_modification_whose_answer_was_lost_is_taken(wire: Wire, books: Books) -> None:
    order_id = wire.working(limit_price="99")
    assert wire.modify(order_id, quantity="7", limit_price="98") == "PENDING_MODIFY"
    wire.sent(order_id)
    books.works(order_id, quantity="7", limit_price="98")
    done = books.reconcile()
    assert kinds(done) == [("TERMS_DIFFER", "TERMS_TAKEN")]
    order = wire.order(order_id)
    assert (order["status"], order["quantity"], order["limit_price"]) == ("ROUTED", 7, 98)
    assert outcome(wire, order_id, "MODIFY") == "ARRIVED"
    assert books.reconcile().differences == []


def test_a_modification_of_a_dead_connector_is_taken_too(wire: Wire, books: Books) -> None:
    order_id = wire.working(limit_price="99")
    wire.modify(order_id, limit_price="98")
    claim(wire, order_id, None, by=uuid4(), kind="MODIFY")
    books.works(order_id, limit_price="98")
    assert kinds(books.reconcile()) == [("TERMS_DIFFER", "TERMS_TAKEN")]
    assert wire.order(order_id)["limit_price"] == 98


def test_a_modification_whose_answer_was_lost_is_taken_behind_fills_of_it(
    wire: Wire, books: Books
) -> None:
    """Filled by its old terms, and more than that: it works on by the new ones."""
    order_id = wire.working(limit_price="99")
    assert wire.modify(order_id, quantity="20", limit_price="99") == "PENDING_MODIFY"
    wire.sent(order_id)
    wire.fill(order_id, "12", "99", "E1")
    wire.apply()
    assert wire.order(order_id)["status"] == "FILLED"
    books.works(order_id, quantity="20", limit_price="99", filled="12")
    books.positions, books.cash = {"AAPL": "12"}, {"USD": "98812"}
    assert kinds(books.reconcile()) == [("TERMS_DIFFER", "TERMS_TAKEN")]
    order = wire.order(order_id)
    assert (order["status"], order["quantity"], order["filled_quantity"]) == (
        "PARTIALLY_FILLED",
        20,
        12,
    )
    assert outcome(wire, order_id, "MODIFY") == "ARRIVED"
    assert books.reconcile().differences == []
    wire.fill(order_id, "8", "99", "E2")
    wire.apply()
    assert wire.order(order_id)["status"] == "FILLED"


@pytest.mark.parametrize("ended", ["FILLED", "CANCELED"])
def test_an_order_that_has_ended_on_terms_whose_confirmation_was_lost_takes_them(
    wire: Wire, books: Books, ended: str
) -> None:
    order_id = wire.working(limit_price="99")
    assert wire.modify(order_id, quantity="7", limit_price="99") == "PENDING_MODIFY"
    wire.sent(order_id)
    units = "7" if ended == "FILLED" else "5"
    wire.fill(order_id, units, "99", "E1")
    wire.apply()
    assert wire.order(order_id)["status"] == "PENDING_MODIFY"
    books.ended(order_id, ended, quantity="7", limit_price="99", filled=units)
    books.positions, books.cash = {"AAPL": units}, {"USD": str(100_000 - 99 * int(units))}
    assert kinds(books.reconcile()) == [("TERMS_DIFFER", "TERMS_TAKEN")]
    order = wire.order(order_id)
    assert (order["status"], order["quantity"]) == (ended, 7)
    assert outcome(wire, order_id, "MODIFY") == "ARRIVED"
    assert books.reconcile().differences == []


def test_a_modification_that_never_arrived_changes_nothing(wire: Wire, books: Books) -> None:
    order_id = wire.working(limit_price="99")
    wire.modify(order_id, limit_price="98")
    claim(wire, order_id, "UNKNOWN", kind="MODIFY")
    books.works(order_id)
    assert kinds(books.reconcile()) == [("STATUS_DIFFERS", "MOVED")]
    order = wire.order(order_id)
    assert (order["status"], order["limit_price"]) == ("ROUTED", 99)
    assert outcome(wire, order_id, "MODIFY") == "NEVER_ARRIVED"


def test_a_modification_on_its_way_is_undecided(wire: Wire, books: Books) -> None:
    order_id = wire.working(limit_price="99")
    wire.modify(order_id, limit_price="98")
    wire.sent(order_id)
    books.works(order_id)
    done = books.reconcile()
    assert (done.differences, done.undecided) == ([], 1)
    assert wire.order(order_id)["status"] == "PENDING_MODIFY"


def test_terms_that_nobody_asked_for_are_for_a_person(wire: Wire, books: Books) -> None:
    order_id = wire.working(limit_price="99")
    books.works(order_id, limit_price="97")
    assert kinds(books.reconcile()) == [("TERMS_DIFFER", "ALERTED")]
    assert wire.order(order_id)["limit_price"] == 99
    assert wire.alerts() == ["RECONCILE_MISMATCH"]
    before = everything(wire)
    assert kinds(books.reconcile()) == [("TERMS_DIFFER", "ALERTED")]
    assert everything(wire) == before


def test_a_cancel_that_never_arrived_is_sent_again(wire: Wire, books: Books) -> None:
    order_id = wire.working()
    wire.cancel(order_id)
    claim(wire, order_id, "UNKNOWN", kind="CANCEL")
    books.works(order_id)
    assert kinds(books.reconcile()) == [("STATUS_DIFFERS", "CANCEL_SENT")]
    order = wire.order(order_id)
    assert (order["status"], order["status_reason"]) == ("PENDING_CANCEL", "USER")
    assert wire.kinds(order_id) == ["SUBMIT", "CANCEL", "CANCEL"]


def test_a_cancel_on_its_way_is_undecided(wire: Wire, books: Books) -> None:
    order_id = wire.working()
    wire.cancel(order_id)
    wire.sent(order_id)
    books.works(order_id)
    done = books.reconcile()
    assert (done.differences, done.undecided) == ([], 1)
    assert wire.kinds(order_id) == ["SUBMIT", "CANCEL"]


# --- Ids, contracts, strangers ------------------------------------------------------------------


def test_new_ids_are_recorded(wire: Wire, books: Books) -> None:
    order_id = wire.working()
    books.works(order_id, broker_order_id=5, perm_id=500)
    assert kinds(books.reconcile()) == [("IDS_DIFFER", "RECORDED")]
    order = wire.order(order_id)
    assert (order["broker_order_id"], order["perm_id"]) == (5, 500)
    assert books.reconcile().differences == []


def test_another_contract_behind_an_order_cancels_it(wire: Wire, books: Books) -> None:
    order_id = wire.working(symbol="FB")
    books.works(order_id, symbol="META")
    assert kinds(books.reconcile()) == [("CONTRACT_CHANGED", "CANCEL_SENT")]
    assert wire.order(order_id)["status"] == "PENDING_CANCEL"
    assert wire.alerts() == ["CONTRACT_CHANGED"]


def test_a_contract_that_changed_cancels_its_orders_only(wire: Wire, books: Books) -> None:
    old, other = wire.working(symbol="FB"), wire.working(symbol="IBM")
    books.works(old)
    books.works(other)
    wire.say("CONTRACT_CHANGED", lag=_clock(wire) - wire.now, symbol="FB", new_symbol="META")
    assert kinds(books.reconcile()) == [
        ("CONTRACT_CHANGED", "ALERTED"),
        ("CONTRACT_CHANGED", "CANCEL_SENT"),
    ]
    assert [wire.order(o)["status"] for o in (old, other)] == ["PENDING_CANCEL", "ROUTED"]
    assert len(wire.events("CONTRACT_CHANGED")) == 2
    wire.status(old, "CANCELED")
    del books.orders[old]
    assert books.reconcile().differences == []


def _stranger(ref: str | None, **more: Any) -> dict[str, Any]:
    return {
        "order_ref": ref,
        "broker_order_id": 8,
        "perm_id": 88,
        "symbol": "IBM",
        "side": "SELL",
        "quantity": "3",
        "order_type": "LIMIT",
        "time_in_force": "GTC",
        "limit_price": "150.5",
        "status": "ROUTED",
        "filled": "0",
        "ours": True,
        **more,
    }


def test_an_orphan_is_taken_up(wire: Wire, books: Books) -> None:
    order_id = uuid4()
    books.strangers = [_stranger(str(order_id))]
    assert kinds(books.reconcile()) == [("ORPHAN", "ADOPTED")]
    order = wire.order(order_id)
    assert (order["status"], order["recovered"], order["account"]) == ("ROUTED", True, ACCOUNT)
    assert (order["quantity"], order["limit_price"]) == (3, Decimal("150.5"))
    assert (order["broker_order_id"], order["perm_id"]) == (8, 88)
    assert wire.commands(order_id) == 0  # it is at the broker already
    assert wire.alerts() == ["ORPHAN_ORDER"]
    assert wire.events("ORPHAN_ORDER") != []
    before = everything(wire)
    assert books.reconcile().differences == []
    assert everything(wire) == before


def test_an_orphan_without_a_run_is_held(wire: Wire, books: Books) -> None:
    order_id = uuid4()
    books.strangers = [_stranger(str(order_id))]
    wire.conn.execute(
        "UPDATE strategy_run SET status = 'STOPPED' WHERE user_id = %s", [wire.run.user_id]
    )
    assert kinds(books.reconcile()) == [("ORPHAN", "HELD")]
    assert wire.order(order_id, must=False) == {}
    assert wire.alerts() == ["ORPHAN_ORDER"]


@pytest.mark.parametrize(
    "stranger",
    [_stranger(None), _stranger("by hand"), _stranger(str(uuid4()), ours=False)],
    ids=["no reference", "another reference", "not ours"],
)
def test_what_is_not_ours_is_left_alone(wire: Wire, books: Books, stranger: dict[str, Any]) -> None:
    books.strangers = [stranger]
    before = everything(wire)[0]
    assert kinds(books.reconcile()) == [("FOREIGN", "ALERTED")]
    assert everything(wire)[0] == before
    assert wire.alerts() == ["FOREIGN_ORDER"]
    before = everything(wire)
    assert kinds(books.reconcile()) == [("FOREIGN", "ALERTED")]
    assert everything(wire) == before


# --- Positions and cash -------------------------------------------------------------------------


def _bought(wire: Wire) -> None:
    order_id = wire.working()
    wire.fill(order_id, "10", "100", "E1")
    wire.say("COMMISSION", order_id, execution_id="E1", amount="1.25", currency="USD")
    wire.apply()


def test_positions_and_cash_that_agree(wire: Wire, books: Books) -> None:
    _bought(wire)
    books.positions, books.cash = {"AAPL": "10"}, {"USD": "98998.75"}
    assert books.reconcile().differences == []


def test_positions_and_cash_that_differ_are_for_a_person(wire: Wire, books: Books) -> None:
    _bought(wire)
    books.positions, books.cash = {"AAPL": "9", "IBM": "1"}, {"USD": "98998.74", "EUR": "2"}
    done = books.reconcile()
    assert [(d.kind, d.subject, d.ours, d.brokers, d.derived) for d in done.differences] == [
        ("POSITION_DIFFERS", "AAPL", "10", "9", "10"),
        ("POSITION_DIFFERS", "IBM", "0", "1", "0"),
        ("CASH_DIFFERS", "EUR", "0", "2", "0"),
        ("CASH_DIFFERS", "USD", "98998.75", "98998.74", "98998.75"),
    ]
    assert (wire.position(), wire.cash()) == (10, Decimal("98998.75"))
    assert set(wire.alerts()) == {"RECONCILE_MISMATCH"}
    before = everything(wire)
    books.reconcile()
    assert everything(wire) == before


def test_a_fill_since_the_snapshot_is_no_difference(wire: Wire, books: Books) -> None:
    """Applied before the comparison, and younger than the snapshot by the broker's clock."""
    order_id = wire.working()
    books.works(order_id)
    snapshot_id = books.ask()
    taken_at = wire.now
    wire.fill(order_id, "10", "100", "E1", at=taken_at + SECOND)
    books.answer(snapshot_id, at=taken_at)
    wire.apply()
    done = books.compare()
    assert done is not None
    assert done.differences == []


# --- Running it ---------------------------------------------------------------------------------


def test_a_dry_run_stores_nothing(wire: Wire, books: Books) -> None:
    order_id = wire.working()
    before = everything(wire)
    done = books.reconcile(dry_run=True)
    assert kinds(done) == [("MISSING_AT_BROKER", "CANCELED")]
    assert done.dry_run
    assert everything(wire) == before
    assert books.compare() is None  # nobody else takes it for a real one
    assert wire.order(order_id)["status"] == "ROUTED"


def test_a_snapshot_is_compared_once_and_whole(
    wire: Wire, books: Books, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("snapshot_cases.PART_ROWS", 1)
    for _ in range(3):
        books.works(wire.working())
    snapshot_id = books.ask()
    books.answer(snapshot_id, parts=[1, 3])
    assert books.compare() is None
    books.answer(snapshot_id, parts=[2])
    wire.apply()
    done = books.compare()
    assert done is not None
    assert (done.open_orders, done.differences) == (3, [])
    assert books.compare() is None


def test_an_older_snapshot_is_not_compared_after_a_newer_one(wire: Wire, books: Books) -> None:
    order_id = wire.working()
    older, newer = books.ask(), books.ask()
    books.answer(older)
    books.works(order_id)
    books.answer(newer)
    wire.apply()
    done = books.compare()
    assert done is not None
    assert (done.snapshot_id, done.differences) == (newer, [])
    assert books.compare() is None


def test_orders_of_an_ended_run_are_held(wire: Wire, books: Books) -> None:
    order_id = wire.working()
    wire.conn.execute(
        "UPDATE strategy_run SET status = 'ERROR' WHERE user_id = %s", [wire.run.user_id]
    )
    done = books.reconcile()
    assert kinds(done) == [("MISSING_AT_BROKER", "HELD")]
    assert wire.order(order_id)["status"] == "PENDING_CANCEL"
    assert wire.alerts() == ["RECONCILE_MISMATCH"]


@pytest.mark.parametrize("table", ["reconciliation", "reconciliation_difference"])
@pytest.mark.parametrize("act", ["UPDATE {} SET account = 'X'", "DELETE FROM {}", "TRUNCATE {}"])
def test_what_was_found_is_history(wire: Wire, books: Books, table: str, act: str) -> None:
    wire.working()
    books.reconcile()
    with pytest.raises(psycopg.Error) as refused, wire.conn.transaction():
        wire.conn.execute((act.format(table) + " CASCADE" * act.startswith("T")).encode())
    assert refused.value.diag.constraint_name in (
        "reconciliation_kept",
        "reconciliation_difference_kept",
    )


# --- When ---------------------------------------------------------------------------------------


def _lease(conn: Connection, wire: Wire, *, connected: bool = True) -> None:
    conn.execute(
        """INSERT INTO broker_lease (user_id, account, holder, holder_name, taken_at, expires_at,
                                     connected, last_heard_at)
           VALUES (%s, %s, %s, 'test', now(), now() + interval '1 hour', %s, now())""",
        [wire.run.user_id, ACCOUNT, wire.holder, connected],
    )


def _due(wire: Wire, after: timedelta = timedelta()) -> list[str]:
    return [due.why for due in due_reconciliations(wire.conn, _clock(wire) + after)]


def test_a_connection_asks_for_a_snapshot_once(wire: Wire, books: Books) -> None:
    assert _due(wire) == []  # nobody is connected
    _lease(wire.conn, wire)
    assert _due(wire) == ["CONNECTED"]
    snapshot_id = books.ask()
    assert _due(wire) == []  # asked for
    books.answer(snapshot_id)
    wire.apply()
    books.compare()
    assert _due(wire) == []
    wire.say("CONNECTED", lag=_clock(wire) - wire.now)
    assert _due(wire, SECOND) == ["CONNECTED"]


def test_time_and_what_was_left_open_ask_for_a_snapshot(wire: Wire, books: Books) -> None:
    _lease(wire.conn, wire)
    books.reconcile()
    assert _due(wire, timedelta(seconds=239)) == []
    assert _due(wire, timedelta(seconds=241)) == ["TIMER"]
    wire.sent(wire.place())
    assert books.reconcile().undecided == 1
    assert _due(wire) == []
    assert _due(wire, timedelta(seconds=6)) == ["UNDECIDED"]


def test_a_question_that_died_with_its_connector_is_asked_again(wire: Wire, books: Books) -> None:
    _lease(wire.conn, wire)
    wire.holder = uuid4()
    books.ask()
    assert _due(wire, timedelta(seconds=6)) == ["CONNECTED"]


def test_silence_makes_an_order_stale_and_an_answer_ends_it(wire: Wire, books: Books) -> None:
    order_id = wire.working()
    user_id, later = wire.run.user_id, _clock(wire) + timedelta(seconds=301)
    assert mark_stale(wire.conn, user_id, ACCOUNT, later - 2 * SECOND) == 0
    assert mark_stale(wire.conn, user_id, ACCOUNT, later) == 1
    assert mark_stale(wire.conn, user_id, ACCOUNT, later) == 0
    assert wire.order(order_id)["pending_reconcile"]
    assert len(wire.events("STATUS_STALE")) == 1
    books.works(order_id)
    assert books.reconcile().differences == []
    assert not wire.order(order_id)["pending_reconcile"]
    assert mark_stale(wire.conn, user_id, ACCOUNT, later - 2 * SECOND) == 0


def test_an_unknown_account_is_refused(wire: Wire) -> None:
    from engine.errors import BadInput

    with pytest.raises(BadInput, match="no account"):
        request_snapshot(wire.conn, wire.run.user_id, "NOBODY", "DEMAND")


def test_a_submit_in_doubt_has_arrived_though_the_order_is_seen_alike(
    wire: Wire, books: Books
) -> None:
    """What is asked of the order next waits for the word on its submit."""
    order_id = wire.place(limit_price="90")
    claim(wire, order_id, None, by=uuid4())  # by a connector that died
    wire.status(order_id, "ROUTED", broker_order_id=1)
    books.works(order_id)
    assert books.reconcile().differences == []
    assert outcome(wire, order_id) == "ARRIVED"


def test_a_submit_in_the_hands_of_who_lives_is_left_to_him(wire: Wire, books: Books) -> None:
    order_id = wire.place(limit_price="90")
    claim(wire, order_id, None, by=wire.holder)
    wire.status(order_id, "ROUTED", broker_order_id=1)
    books.works(order_id)
    assert books.reconcile().differences == []
    assert outcome(wire, order_id) is None


@pytest.mark.parametrize(("limit", "came_to"), [("91", "ARRIVED"), ("90", "NEVER_ARRIVED")])
def test_a_modification_in_doubt_of_an_order_that_works_is_told_by_its_terms(
    wire: Wire, books: Books, limit: str, came_to: str
) -> None:
    order_id = wire.working(limit_price="90")
    assert wire.modify(order_id, limit_price="91") == "PENDING_MODIFY"
    claim(wire, order_id, None, by=uuid4(), kind="MODIFY")
    if limit == "91":
        wire.say("MODIFIED", order_id, quantity="10", limit_price="91")
    else:
        wire.say("MODIFY_REJECTED", order_id, code="NO", message="no")
    wire.apply()
    books.works(order_id, broker_order_id=None)
    assert books.reconcile().differences == []
    assert outcome(wire, order_id, "MODIFY") == came_to


def test_after_a_restore_what_waits_is_sent_by_nobody_and_judged_by_the_snapshot(
    wire: Wire, books: Books
) -> None:
    arrived, never = wire.place(limit_price="90"), wire.place(limit_price="91")
    doubted = wire.conn.execute(
        "SELECT commands_doubt(%s, %s)", [wire.run.user_id, ACCOUNT]
    ).fetchone()
    assert doubted == (2,)
    books.works(arrived)
    books.reconcile()
    assert [outcome(wire, each) for each in (arrived, never)] == ["ARRIVED", "NEVER_ARRIVED"]
    assert [wire.order(each)["status"] for each in (arrived, never)] == ["ROUTED", "NEW"]
    assert wire.kinds(never) == ["SUBMIT"]


@pytest.mark.parametrize("code", ["NOT_FOUND", "UNKNOWN_ORDER"])
def test_a_cancel_that_finds_no_order_does_not_show_that_the_submit_arrived(
    wire: Wire, books: Books, code: str
) -> None:
    order_id = wire.place(limit_price="90")
    claim(wire, order_id, "UNKNOWN")
    assert wire.cancel(order_id) == "PENDING_CANCEL"
    claim(wire, order_id, "SENT", kind="CANCEL")
    wire.say("CANCEL_REJECTED", order_id, code=code, message="there is no such order")
    wire.apply()
    assert wire.order(order_id)["status"] == "PENDING_CANCEL"
    assert kinds(books.reconcile()) == [("NEVER_ARRIVED", "CANCELED")]
    assert outcome(wire, order_id) == "NEVER_ARRIVED"


def test_a_cancel_behind_a_submit_that_was_never_sent_is_settled(wire: Wire, books: Books) -> None:
    """The cancel was asked for while a connector had the submit, which it then could not write."""
    order_id = wire.place(limit_price="90")
    claim(wire, order_id, None)
    assert wire.cancel(order_id) == "PENDING_CANCEL"
    ((command_id,),) = wire.conn.execute(
        "SELECT command_id FROM broker_command WHERE order_id = %s AND kind = 'SUBMIT'", [order_id]
    ).fetchall()
    wire.say("SEND_FAILED", order_id, command_id=str(command_id), error="the connection ended")
    wire.conn.execute(
        """UPDATE broker_command SET done_at = clock_timestamp(), outcome = 'NEVER_ARRIVED'
           WHERE command_id = %s""",
        [command_id],
    )
    claim(wire, order_id, "SENT", kind="CANCEL")
    wire.say("CANCEL_REJECTED", order_id, code="UNKNOWN_ORDER", message="there is no such order")
    wire.apply()
    assert wire.order(order_id)["status"] == "PENDING_CANCEL"
    assert kinds(books.reconcile()) == [("NEVER_ARRIVED", "CANCELED")]
    assert wire.order(order_id)["status"] == "CANCELED"
    assert books.reconcile().differences == []


def test_a_cancel_that_comes_too_late_shows_that_the_submit_arrived(
    wire: Wire, books: Books
) -> None:
    order_id = wire.place(limit_price="90")
    claim(wire, order_id, "UNKNOWN")
    assert wire.cancel(order_id) == "PENDING_CANCEL"
    claim(wire, order_id, "SENT", kind="CANCEL")
    wire.say("CANCEL_REJECTED", order_id, code="ALREADY_FILLED", message="it is filled")
    wire.apply()
    assert kinds(books.reconcile()) == [("MISSING_AT_BROKER", "CANCELED")]
