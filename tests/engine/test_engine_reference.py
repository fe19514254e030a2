"""What a tick looks up, and the small values that ticks are made of."""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st
from market_days import (
    FRI,
    MON,
    TUE,
    a_bar,
    a_plan,
    a_run,
    at_price,
    audited,
    buy,
    close_on,
    new_york,
    one,
    open_on,
    rows,
    statuses,
)

from engine import ids, ledger
from engine.db.connect import Connection
from engine.errors import AlreadyHappened, BadInput, translated
from engine.market.calendar import ensure_sessions
from engine.market.model import Bar, Session, Split
from engine.market.store import add_instrument, import_splits
from engine.market.view import look
from engine.orders import write
from engine.orders.model import Order, OrderType, Side, TimeInForce
from engine.paper.book import Moment
from engine.quantities import cut
from engine.reference import Reference
from engine.runs import Run, find_run
from engine.tick import place_orders, run_tick, try_execute_sip

__all__ = ["audited"]


class Counting:
    """A connection that counts its queries."""

    def __init__(self, conn: Connection) -> None:
        self._conn = conn
        self.queries = 0

    def execute(self, *args: Any) -> Any:
        self.queries += 1
        return self._conn.execute(*args)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._conn, name)


def day_of(session: Session | None) -> str | None:
    return None if session is None else session.day.isoformat()


# Sessions


def test_sessions_are_found_by_any_moment(conn: Connection) -> None:
    reference = Reference(conn, "XNYS")
    for moment, at, after in [
        (open_on(MON), MON, TUE),
        (open_on(MON) - timedelta(microseconds=1), "2001-05-04", MON),
        (close_on(MON), MON, TUE),
        (new_york(FRI, "23:59"), FRI, "2001-05-14"),
        (new_york("2001-05-12", "12:00"), FRI, "2001-05-14"),
        (new_york("2001-09-12", "12:00"), "2001-09-10", "2001-09-17"),
    ]:
        assert day_of(reference.session_at(moment)) == at
        assert day_of(reference.session_after(moment)) == after


def test_sessions_are_read_once_for_a_whole_replay(conn: Connection) -> None:
    ensure_sessions(conn, "XNYS", date(2001, 1, 1), date(2001, 12, 31))
    counting = Counting(conn)
    reference = Reference(counting, "XNYS")  # type: ignore[arg-type]
    moment = close_on(MON)
    while moment < close_on("2001-11-30"):
        reference.session_at(moment)
        reference.session_after(moment)
        moment += timedelta(days=1)
    assert counting.queries == 1


def test_sessions_go_on_into_the_years_that_nobody_has_stored_yet(conn: Connection) -> None:
    reference = Reference(conn, "XNYS")
    for year in range(2001, 2006):
        assert day_of(reference.session_at(close_on(f"{year}-12-31"))) is not None
        assert day_of(reference.session_after(new_york(f"{year}-12-31", "23:00"))) is not None
    # And back.
    assert day_of(reference.session_at(new_york("2001-05-12", "12:00"))) == FRI


def test_a_year_that_is_missing_between_stored_ones_is_stored_when_it_is_needed(
    conn: Connection,
) -> None:
    """Another run may have stored a later year, but not the one in between."""
    for year in (2000, 2002):
        ensure_sessions(conn, "XNYS", date(year, 1, 1), date(year, 12, 31))
    reference = Reference(conn, "XNYS")
    assert day_of(reference.session_at(close_on("2000-12-01"))) == "2000-12-01"
    assert day_of(reference.session_at(close_on("2001-01-10"))) == "2001-01-10"
    assert day_of(reference.session_after(close_on("2000-12-29"))) == "2001-01-02"


def test_the_plans_of_a_missing_year_are_due(conn: Connection) -> None:
    for year in (2000, 2002):
        ensure_sessions(conn, "XNYS", date(year, 1, 1), date(year, 12, 31))
    run = a_run(conn)
    a_plan(conn, run, day_of_month=10, start_on=date(2001, 1, 1))
    key = run.user_id, run.run_id
    assert try_execute_sip(conn, *key, close_on("2000-12-01"), at_price("9")) == 0
    assert try_execute_sip(conn, *key, close_on("2001-01-10"), at_price("9")) == 1


def a_calendar_with_a_gap(conn: Connection) -> None:
    """XGAP is open every day but from May to August: longer than anybody looks back."""
    conn.execute(
        """INSERT INTO calendar_session
           SELECT 'XGAP', day, day + interval '14 hours', day + interval '20 hours'
           FROM generate_series('2001-01-01'::timestamptz, '2001-12-31', interval '1 day') day
           WHERE extract(month FROM day) NOT BETWEEN 5 AND 8"""
    )


def test_an_exchange_that_was_closed_for_long_has_no_session(conn: Connection) -> None:
    a_calendar_with_a_gap(conn)
    reference = Reference(conn, "XGAP")
    july = new_york("2001-07-01", "12:00")
    assert reference.session_at(july) is None
    assert day_of(reference.session_after(july)) == "2001-09-01"
    view = look(reference, july, at_price("9"))
    assert (view.session, view.market_open) == (None, False)
    assert view.moment(view.bars["AAPL"]) == Moment(opens_session=False, closes_session=False)


def run_of_the_gap(conn: Connection) -> Run:
    run = a_run(conn, start=False)
    conn.execute(
        """INSERT INTO strategy_run (user_id, run_id, status, initial_cash, calendar)
           VALUES (%s, '11111111-1111-4111-8111-111111111111', 'RUNNING', 1000, 'XGAP')""",
        [run.user_id],
    )
    return find_run(conn, UUID("11111111-1111-4111-8111-111111111111"))


def test_a_run_goes_on_without_any_session(conn: Connection) -> None:
    """Nothing is due, nothing is split, a day order waits for the next day there is."""
    a_calendar_with_a_gap(conn)
    run = run_of_the_gap(conn)
    a_plan(conn, run)
    key = run.user_id, run.run_id
    order = buy("1", order_type="LIMIT", limit_price="5")
    run_tick(conn, *key, new_york("2001-07-01", "12:00"), at_price("9"), intents=[order])
    run_tick(conn, *key, new_york("2001-07-02", "12:00"), at_price("9"), market_open=True)
    assert statuses(conn, run) == ["PENDING"]
    assert one(conn, "SELECT expire_at FROM orders") == datetime(2001, 9, 1, 20, tzinfo=UTC)


def test_at_the_end_of_the_calendar_a_day_order_has_no_end(
    conn: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Reference, "session_after", lambda *_: None)
    run = a_run(conn)
    order = buy("1", order_type="LIMIT", limit_price="5")
    place_orders(conn, run.user_id, run.run_id, close_on(MON), {}, [order])
    assert rows(conn, "SELECT status, expire_at FROM orders") == [("PENDING", None)]


# Instruments and splits


def test_instruments_are_looked_up_once(conn: Connection) -> None:
    add_instrument(conn, "SPREAD", quantity_decimals=2, negative_price_allowed=True)
    counting = Counting(conn)
    reference = Reference(counting, "XNYS")  # type: ignore[arg-type]
    for _ in range(3):
        assert reference.quantity_decimals(["AAPL", "SPREAD"]) == {"AAPL": 6, "SPREAD": 2}
        assert (reference.may_be_negative("AAPL"), reference.may_be_negative("SPREAD")) == (
            False,
            True,
        )
    assert counting.queries == 1
    assert reference.quantity_decimals([]) == {}
    with pytest.raises(BadInput, match="unknown symbol NADA, NOPE;"):
        reference.quantity_decimals(["NOPE", "AAPL", "NADA"])
    with pytest.raises(BadInput, match="unknown symbol NOPE;"):
        reference.may_be_negative("NOPE")


def test_splits_are_looked_up_once_and_by_their_day(conn: Connection) -> None:
    two = Decimal(2)
    splits = [
        Split("AAPL", date(2001, 5, 8), two, Decimal(1)),
        Split("AAPL", date(2001, 5, 7), two, Decimal(1)),
        Split("IBM", date(2001, 5, 7), two, Decimal(1)),
        Split("MSFT", date(2001, 5, 7), two, Decimal(1)),
    ]
    import_splits(conn, splits)
    counting = Counting(conn)
    reference = Reference(counting, "XNYS")  # type: ignore[arg-type]
    both = ["AAPL", "IBM"]
    assert reference.splits(both, date(2001, 5, 6), date(2001, 5, 8)) == [
        splits[1],
        splits[2],
        splits[0],
    ]
    assert reference.splits(both, date(2001, 5, 7), date(2001, 5, 8)) == [splits[0]]
    assert reference.splits(both, date(2001, 5, 8), date(2001, 5, 9)) == []
    assert reference.splits(both, date(2001, 5, 6), date(2001, 5, 7)) == [splits[1], splits[2]]
    assert counting.queries == 1
    assert reference.splits([], date(2001, 1, 1), date(2002, 1, 1)) == []


# Where a bar stands in its session


@pytest.mark.parametrize(
    ("start", "end", "opens", "closes"),
    [
        (open_on(MON), close_on(MON), True, True),
        (open_on(MON), open_on(MON) + timedelta(minutes=5), True, False),
        (open_on(MON) + timedelta(minutes=5), close_on(MON), False, True),
        (new_york(MON, "12:00"), new_york(MON, "12:05"), False, False),
        # It holds the open, though it began before.
        (new_york(MON, "09:00"), new_york(MON, "10:00"), True, False),
        (new_york(MON, "09:00"), open_on(MON), True, False),
        (new_york(MON, "08:00"), new_york(MON, "09:00"), False, False),
        # Yesterday's.
        (open_on("2001-05-04"), close_on("2001-05-04"), False, False),
    ],
)
def test_a_bar_opens_or_closes_its_session(
    conn: Connection, start: datetime, end: datetime, opens: bool, closes: bool
) -> None:
    price = Decimal(9)
    bar = Bar("AAPL", start, end, price, price, price, price)
    view = look(Reference(conn, "XNYS"), close_on(MON), [bar])
    assert view.moment(bar) == Moment(opens_session=opens, closes_session=closes)


@pytest.mark.parametrize(
    ("at", "is_open"),
    [
        (open_on(MON) - timedelta(microseconds=1), False),
        (open_on(MON), True),
        (close_on(MON), True),
        (close_on(MON) + timedelta(microseconds=1), False),
    ],
)
def test_the_market_is_open_from_open_to_close(
    conn: Connection, at: datetime, is_open: bool
) -> None:
    reference = Reference(conn, "XNYS")
    assert look(reference, at, {}).market_open is is_open
    assert look(reference, at, {}, market_open=not is_open).market_open is not is_open


def test_a_view_without_a_wall_clock_takes_the_logical_time(conn: Connection) -> None:
    view = look(Reference(conn, "XNYS"), close_on(MON), [a_bar(MON)])
    assert view.now == view.logical_time == close_on(MON)
    assert view.prices == {"AAPL": 105}


# Ids, quantities, words


@given(
    st.integers(0, (1 << ids.SALT_BITS) - 1),
    st.datetimes(datetime(1600, 1, 1), datetime(9000, 1, 1), timezones=st.just(UTC)),  # noqa: DTZ001
    st.integers(0, ids.ORDERS_PER_TICK_MAX - 1),
)
def test_an_order_id_is_a_uuid_that_tells_its_time(salt: int, at: datetime, number: int) -> None:
    order_id = ids.order_id_of(salt, at, number)
    assert (order_id.version, order_id.variant) == (8, "specified in RFC 4122")
    assert order_id.int & ((1 << 46) - 1) == salt
    assert order_id.int >> 46 & 0xFFFF == number
    if at.year >= 1970 and number + 1 < ids.ORDERS_PER_TICK_MAX:
        later = ids.order_id_of(0, at + timedelta(microseconds=1), 0)
        assert order_id < ids.order_id_of(salt, at, number + 1) < later


def test_ids_follow_from_what_they_name() -> None:
    ann = ids.user_id_of("ann")
    assert ann == ids.user_id_of("ann") != ids.user_id_of("ben")
    one_, other = UUID(int=1), UUID(int=2)
    assert ids.run_salt(one_, other) != ids.run_salt(other, one_)
    assert 0 <= ids.run_salt(one_, other) < 1 << ids.SALT_BITS
    # Known values: the ids of past runs must never change.
    assert str(ann) == "9042fd46-3286-5aca-97b7-38b1cef8d24b"
    assert ids.run_salt(one_, other) == 33215696369582
    order_id = ids.order_id_of(1, datetime(2001, 5, 7, 20, tzinfo=UTC), 2)
    assert str(order_id) == "00383bb5-8ad3-8000-8000-800000000001"


@pytest.mark.parametrize(
    ("value", "decimals", "expected"),
    [
        ("1.9999999", 6, "1.999999"),
        ("-1.9999999", 6, "-1.999999"),
        ("0.0000009", 6, "0"),
        ("7", 0, "7"),
        ("7.9", 0, "7"),
        ("123456789012345.12345678901234567890", 8, "123456789012345.12345678"),
    ],
)
def test_a_quantity_is_cut_towards_zero(value: str, decimals: int, expected: str) -> None:
    assert cut(Decimal(value), decimals) == Decimal(expected)


def test_words_are_read_in_any_case() -> None:
    assert Side("sell") is Side.SELL
    assert [OrderType(word) for word in ("mkt", "LMT", "stp", "Stp_Lmt", "moc", "loc")] == [
        OrderType.MARKET,
        OrderType.LIMIT,
        OrderType.STOP,
        OrderType.STOP_LIMIT,
        OrderType.MARKET,
        OrderType.LIMIT,
    ]
    assert TimeInForce(" gtc ") is TimeInForce.GTC
    with pytest.raises(ValueError, match="HOLD"):
        Side("HOLD")


def test_what_is_left_of_an_order() -> None:
    order = Order(
        UUID(int=1),
        "AAPL",
        Side.BUY,
        Decimal("2.5"),
        OrderType.MARKET,
        TimeInForce.DAY,
        close_on(MON),
        filled_quantity=Decimal("0.75"),
    )
    assert order.remaining == Decimal("1.75")


# Writing nothing, and writing twice


def test_nothing_to_write_is_no_statement(conn: Connection) -> None:
    run = a_run(conn)
    counting: Any = Counting(conn)
    assert write.insert_orders(counting, run, [], [], []) == {}
    write.insert_executions(counting, run, close_on(MON), [])
    write.move_orders(counting, run, close_on(MON), [])
    ledger.append(counting, run.user_id, run.run_id, close_on(MON), [])
    write.mark(counting, run, look(Reference(conn, "XNYS"), close_on(MON), {}))
    assert counting.queries == 0


def test_events_are_appended_in_their_order_and_once(conn: Connection) -> None:
    run = a_run(conn)
    key = run.user_id, run.run_id, close_on(MON)
    happened = [ledger.Event(name, "", {"n": n}) for n, name in enumerate(("B", "A", "C"))]
    ledger.append(conn, *key, happened)
    found = rows(conn, "SELECT seq, event_type, payload ->> 'n' FROM event_ledger ORDER BY seq")
    assert found == [(1, "B", "0"), (2, "A", "1"), (3, "C", "2")]
    with pytest.raises(AlreadyHappened), translated(), conn.transaction():
        ledger.append(conn, *key, happened[1:2])
    assert ledger.ticked(conn, run.user_id, run.run_id, [close_on(MON)]) == {}
