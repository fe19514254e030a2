"""The kill switch: at once, after a restart, for ticks written at once, and lifted by name only."""

from __future__ import annotations

import threading
from datetime import date, timedelta
from decimal import Decimal
from uuid import UUID, uuid4

import psycopg
import pytest
from market_days import MON, TUE, at_price, buy, close_on, sell
from safety_cases import ACCOUNT, Live

from engine.clock import utc_now
from engine.db.connect import Connection, open_connection
from engine.errors import AlreadyHappened, UnknownReference
from engine.flatten import CLOSE_WAIT, Scope, advance, flatten
from engine.market.calendar import ensure_sessions
from engine.safety import (
    HaltOrder,
    cancel_breaches,
    check_breakers,
    enforce_halts,
    halt_everything,
    lift_everything,
    lift_halt,
    list_halts,
    place_halt,
)
from engine.tick import run_tick
from engine.worker import serve

STOP = HaltOrder("something is wrong", "ann")
REDUCE = HaltOrder("something is wrong", "ann", trading_state="REDUCING")


@pytest.fixture
def live(owner_conn: Connection, engine_conn: Connection) -> Live:
    return Live.start(owner_conn, engine_conn)


@pytest.fixture
def paper(owner_conn: Connection, engine_conn: Connection) -> Live:
    ensure_sessions(owner_conn, "XNYS", date.fromisoformat(MON), date.fromisoformat(TUE))
    return Live.start(owner_conn, engine_conn, broker="paper")


def test_halt_cancels_what_works_and_refuses_what_is_new(live: Live) -> None:
    unsent, _ = live.place(quantity=2)
    working = live.work(quantity=3)
    halt = place_halt(live.engine, live.user, STOP)
    assert (halt.name, halt.scope, halt.trading_state) == ("user", "USER", "HALTED")
    # What no connector has taken never goes; what the broker has is asked back, ahead of all else.
    assert (live.status(unsent), live.status(working)) == ("CANCELED", "PENDING_CANCEL")
    assert [(p, c["order_ref"]) for _, p, c in live.commands("CANCEL")] == [(0, str(working))]
    order, code = live.place()
    assert (code, live.status(order)) == ("HALTED", "REJECTED")
    assert live.owner.execute(
        "SELECT status_reason, reject_source FROM orders WHERE order_id = %s", [order]
    ).fetchone() == ("HALTED: user: something is wrong", "RISK")
    assert live.events("KILL_SWITCH") == [
        {
            "name": "user",
            "scope": "USER",
            "reason": "something is wrong",
            "trading_state": "HALTED",
            "by": "ann",
        }
    ]


def test_halt_twice_is_once(live: Live) -> None:
    first = place_halt(live.engine, live.user, STOP)
    second = place_halt(live.engine, live.user, HaltOrder("again", "ben"))
    assert second == first
    assert len(live.events("KILL_SWITCH")) == 1


def test_name_of_another_halt_is_refused(live: Live) -> None:
    place_halt(live.engine, live.user, REDUCE._replace(name="x"))
    for other in (STOP._replace(name="x"), REDUCE._replace(name="x", run_id=live.run)):
        with pytest.raises(AlreadyHappened) as caught:
            place_halt(live.engine, live.user, other)
        assert caught.value.constraint == "trading_halt_open_once"
    # One that asks for less is in the one that is there.
    place_halt(live.engine, live.user, STOP._replace(name="y"))
    assert place_halt(live.engine, live.user, REDUCE._replace(name="y")).trading_state == "HALTED"


def test_halt_is_lifted_by_its_name_and_nothing_else(live: Live) -> None:
    place_halt(live.engine, live.user, STOP._replace(name="one"))
    place_halt(live.engine, live.user, STOP._replace(name="two"))
    assert lift_halt(live.engine, live.user, "three", "ben") is None
    assert live.place()[1] == "HALTED"
    lifted = lift_halt(live.engine, live.user, "one", "ben")
    assert lifted is not None
    assert lifted.lifted_by == "ben"
    assert live.place()[1] == "HALTED"
    assert lift_halt(live.engine, live.user, "two", "ben") is not None
    assert live.place()[1] is None
    assert [event["name"] for event in live.events("HALT_LIFTED")] == ["one", "two"]
    assert lift_halt(live.engine, live.user, "two", "ben") is None
    # Neither the engine nor the owner has another way.
    place_halt(live.engine, live.user, STOP)
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        live.engine.execute("UPDATE trading_halt SET lifted_at = now(), lifted_by = 'me'")
    for attack in (
        "DELETE FROM trading_halt",
        "UPDATE trading_halt SET trading_state = 'REDUCING'",
        "UPDATE trading_halt SET lifted_at = NULL, lifted_by = NULL",
        "UPDATE trading_halt SET reason = 'nothing was'",
    ):
        with pytest.raises(psycopg.errors.IntegrityError) as caught:
            live.owner.execute(attack.encode())
        assert caught.value.diag.constraint_name == "trading_halt_lifted_once"


def test_halt_survives_a_restart_and_is_carried_out_again(live: Live, dsn: str) -> None:
    place_halt(live.engine, live.user, STOP)
    with open_connection(dsn, role="oms_engine") as after:
        code = after.execute(
            """INSERT INTO orders (user_id, run_id, symbol, side, quantity)
               VALUES (%s, %s, 'AAPL', 'BUY', 1) RETURNING reject_code""",
            [live.user, live.run],
        ).fetchone()
        assert code == ("HALTED",)
        # What works although it should not: here, by an owner who took the gate away.
        live.owner.execute("ALTER TABLE orders DISABLE TRIGGER orders_b_pass_gate")
        order, code_ = live.place()
        live.owner.execute("ALTER TABLE orders ENABLE TRIGGER orders_b_pass_gate")
        assert code_ is None
        assert enforce_halts(after, live.user) == 1
        assert live.status(order) == "CANCELED"
        assert enforce_halts(after, live.user) == 0


@pytest.mark.parametrize("scope", ["RUN", "ACCOUNT", "USER"])
def test_halt_holds_for_its_scope_alone(
    live: Live, owner_conn: Connection, engine_conn: Connection, scope: str
) -> None:
    stranger = Live.start(owner_conn, engine_conn)
    order = STOP._replace(
        run_id=live.run if scope == "RUN" else None,
        account=ACCOUNT if scope == "ACCOUNT" else None,
    )
    assert place_halt(live.engine, live.user, order).scope == scope
    assert live.place()[1] == "HALTED"
    assert stranger.place()[1] is None
    with pytest.raises(UnknownReference):
        place_halt(live.engine, live.user, STOP._replace(run_id=stranger.run))
    with pytest.raises(UnknownReference):
        place_halt(live.engine, live.user, STOP._replace(account="DU9"))
    # The next run of the user is under the halts of account and user.
    live.owner.execute("UPDATE strategy_run SET status = 'STOPPED' WHERE run_id = %s", [live.run])
    run = uuid4()
    live.owner.execute(
        """INSERT INTO strategy_run (user_id, run_id, broker, account_type)
           VALUES (%s, %s, 'dummy', 'MARGIN')""",
        [live.user, run],
    )
    live.owner.execute(
        "INSERT INTO run_route (user_id, run_id, account) VALUES (%s, %s, %s)",
        [live.user, run, ACCOUNT],
    )
    live.owner.execute("UPDATE strategy_run SET status = 'RUNNING' WHERE run_id = %s", [run])
    assert live.place(run_id=run)[1] == (None if scope == "RUN" else "HALTED")


def test_reducing_lets_pass_only_what_shrinks(live: Live) -> None:
    live.hold(10)
    closing = live.work("SELL", 4, 200)
    too_much = live.work("SELL", 8, 300)
    opening = live.work("BUY", 1, 50)
    place_halt(live.engine, live.user, REDUCE)
    assert [live.status(order) for order in (closing, too_much, opening)] == [
        "ROUTED",
        "PENDING_CANCEL",
        "PENDING_CANCEL",
    ]
    assert live.place("BUY")[1] == "REDUCE_ONLY"
    assert live.place("SELL", 1, symbol="IBM")[1] == "REDUCE_ONLY"
    live.hear("ORDER_STATUS", {"status": "CANCELED", "filled": "0"}, too_much)
    live.apply()
    assert live.place("SELL", 7)[1] == "REDUCE_ONLY"
    assert live.place("SELL", 6)[1] is None
    place_halt(live.engine, live.user, STOP)
    assert live.place("SELL", 1)[1] == "HALTED"


def test_safety_order_passes_a_halt_only_if_it_shrinks(live: Live) -> None:
    live.hold(10)
    live.limit("MAX_ORDER_QUANTITY", 1)
    live.limit("DAILY_LOSS_MAX", 0)
    place_halt(live.engine, live.user, STOP)
    for side, quantity, symbol in (("SELL", 11, "AAPL"), ("BUY", 1, "AAPL"), ("SELL", 1, "IBM")):
        assert live.place(side, quantity, symbol=symbol, purpose="FLATTEN")[1] == "HALTED"
    assert live.place("SELL", 10, purpose="FLATTEN")[1] is None


def test_safety_order_that_grows_a_position_is_none(live: Live) -> None:
    assert live.place("SELL", 1, purpose="FLATTEN")[1] == "FLATTEN_MUST_SHRINK"
    live.hold(10)
    live.limit("RESTRICTED_SYMBOL", symbol="AAPL")
    assert live.place("SELL", 1, purpose="FLATTEN")[1] == "RESTRICTED_SYMBOL"


def test_everything_is_halted_for_users_of_today_and_tomorrow(
    live: Live, owner_conn: Connection, engine_conn: Connection
) -> None:
    other = Live.start(owner_conn, engine_conn)
    working = [live.work(), other.work()]
    for _ in range(2):  # as after a crash
        halt_everything(engine_conn, "all of it", "ann")
    assert [live.status(order) for order in working] == ["PENDING_CANCEL", "PENDING_CANCEL"]
    newcomer = Live.start(owner_conn, engine_conn)
    for user in (live, other, newcomer):
        assert user.place()[1] == "HALTED"
    assert len(live.events("KILL_SWITCH")) == len(other.events("KILL_SWITCH")) == 1
    assert [halt.scope for halt in list_halts(engine_conn)] == ["EVERYTHING"] * 3
    # A user's copy goes only with the halt of everything.
    with pytest.raises(psycopg.Error) as caught:
        owner_conn.execute("SELECT halt_lift(%s, 'everything', 'ann')", [live.user])
    assert caught.value.diag.constraint_name == "trading_halt_of_everything"
    assert len(lift_everything(engine_conn, "ann")) == 3
    for user in (live, other, newcomer):
        assert user.place()[1] is None
    assert list_halts(engine_conn) == []
    assert len(list_halts(engine_conn, lifted=True)) == 3


@pytest.mark.parametrize("how", ["user", "run", "everything"])
def test_tick_that_is_written_at_once_meets_the_halt(paper: Live, how: str) -> None:
    run_tick(
        paper.engine, paper.user, paper.run, close_on(MON), at_price("100"), intents=[buy("2")]
    )
    assert paper.held() == {"AAPL": 2}
    if how == "everything":
        halt_everything(paper.engine, "all of it", "ann")
    else:
        place_halt(
            paper.engine, paper.user, STOP._replace(run_id=paper.run if how == "run" else None)
        )
    run_tick(
        paper.engine, paper.user, paper.run, close_on(TUE), at_price("100"), intents=[buy("2")]
    )
    assert paper.held() == {"AAPL": 2}
    assert paper.owner.execute(
        "SELECT status, reject_code FROM orders WHERE user_id = %s ORDER BY order_id", [paper.user]
    ).fetchall() == [("FILLED", None), ("REJECTED", "HALTED")]


def test_flatten_on_paper_waits_for_a_price_in_silence(paper: Live) -> None:
    run_tick(
        paper.engine, paper.user, paper.run, close_on(MON), at_price("100"), intents=[buy("2")]
    )
    now = utc_now()
    flatten(paper.engine, paper.user, Scope(run_id=paper.run), "test", "ann", now)
    asked = advance(paper.engine, paper.user, now + 10 * CLOSE_WAIT)
    assert asked is not None
    assert asked.status == "CLOSING"
    assert paper.alerts() == []


def test_tick_under_reducing_may_sell(paper: Live) -> None:
    run_tick(
        paper.engine, paper.user, paper.run, close_on(MON), at_price("100"), intents=[buy("2")]
    )
    place_halt(paper.engine, paper.user, REDUCE)
    intents = [sell("1"), buy("1"), sell("2")]
    run_tick(paper.engine, paper.user, paper.run, close_on(TUE), at_price("100"), intents=intents)
    assert paper.held() == {"AAPL": 1}
    codes = paper.owner.execute(
        "SELECT side, reject_code FROM orders WHERE user_id = %s ORDER BY order_id", [paper.user]
    ).fetchall()
    assert codes == [
        ("BUY", None),
        ("SELL", None),
        ("BUY", "REDUCE_ONLY"),
        ("SELL", "REDUCE_ONLY"),
    ]


def test_limits_of_the_books_hold_in_a_tick_that_is_written_at_once(paper: Live) -> None:
    paper.limit("GROSS_EXPOSURE_MAX", 500)
    intents = [buy("3"), buy("2"), buy("1"), buy("3", "IBM"), buy("2", "IBM"), buy("2", "IBM")]
    run_tick(
        paper.engine,
        paper.user,
        paper.run,
        close_on(MON),
        at_price("100") | at_price("50", "IBM"),
        intents=intents,
    )
    codes = paper.owner.execute(
        "SELECT reject_code FROM orders WHERE user_id = %s ORDER BY order_id", [paper.user]
    ).fetchall()
    assert [code for (code,) in codes] == [
        None,
        None,
        "GROSS_EXPOSURE_MAX",
        "GROSS_EXPOSURE_MAX",
        "GROSS_EXPOSURE_MAX",
        "GROSS_EXPOSURE_MAX",
    ]


def test_same_intent_twice_in_a_tick_is_refused_once(paper: Live) -> None:
    paper.limit("DUPLICATE_INTENT", 5)
    intents = [buy("3"), buy("2"), buy("3")]
    run_tick(paper.engine, paper.user, paper.run, close_on(MON), at_price("100"), intents=intents)
    codes = paper.owner.execute(
        "SELECT reject_code FROM orders WHERE user_id = %s ORDER BY order_id", [paper.user]
    ).fetchall()
    assert [code for (code,) in codes] == [None, None, "DUPLICATE_INTENT"]
    # In the next tick it is none any more.
    run_tick(
        paper.engine, paper.user, paper.run, close_on(TUE), at_price("100"), intents=[buy("3")]
    )
    assert paper.held() == {"AAPL": 8}


def test_fill_that_breaks_a_limit_cancels_the_rest(live: Live) -> None:
    order = live.work(quantity=10)
    other = live.work(quantity=5, price=90)
    live.limit("MAX_POSITION", 12)
    live.fill(order, 4)
    (breach,) = cancel_breaches(live.engine, live.user, live.run)
    # 4 held, 5 open elsewhere, 6 left of it.
    assert (breach.order_id, breach.code, breach.limit_value, breach.value) == (
        order,
        "MAX_POSITION",
        Decimal(12),
        Decimal(15),
    )
    assert (live.status(order), live.status(other)) == ("PENDING_CANCEL", "ROUTED")
    assert live.commands("CANCEL")[0][1] == 0
    assert cancel_breaches(live.engine, live.user, live.run) == []


def test_worker_that_begins_cancels_what_the_one_before_left(live: Live, dsn: str) -> None:
    """It may have died between the fill and what follows from it."""
    order = live.work(quantity=10)
    live.limit("MAX_POSITION", 5)
    live.fill(order, 4)
    assert live.status(order) == "PARTIALLY_FILLED"
    ended = threading.Event()
    serve(dsn, ended, watches=(lambda *_: ended.set(),))
    assert live.status(order) == "PENDING_CANCEL"


def test_fill_within_the_limits_cancels_nothing(live: Live) -> None:
    live.limit("MAX_POSITION", 10)
    order = live.work(quantity=10)
    live.fill(order, 4)
    assert cancel_breaches(live.engine, live.user, live.run) == []
    closing = live.work("SELL", 4, 300)
    live.limit("DAILY_LOSS_MAX", 0)
    live.mark(1)
    live.fill(closing, 1, 300)
    # Losing is no reason to keep what loses.
    assert [b.order_id for b in cancel_breaches(live.engine, live.user, live.run)] == [order]


# --- Circuit breakers -------------------------------------------------------------------------


def test_silence_of_the_broker_blocks_submissions_until_it_is_heard(live: Live) -> None:
    now = utc_now()
    working = live.work()
    live.lease(now)
    assert check_breakers(live.engine, live.user, now + timedelta(seconds=60)) == []
    (trip,) = check_breakers(live.engine, live.user, now + timedelta(seconds=61))
    assert (trip.code, trip.account, trip.halt.scope) == ("HEARTBEAT_LOST", ACCOUNT, "ACCOUNT")
    assert live.place()[1] == "HALTED"
    assert live.status(working) == "ROUTED"
    assert live.alerts() == ["HEARTBEAT_LOST"]
    assert len(live.events("HEARTBEAT_LOST")) == 1
    # That nobody listens any more is no sign of life.
    live.lease(now + timedelta(seconds=61), connected=False)
    assert check_breakers(live.engine, live.user, now + timedelta(seconds=62)) == []
    assert live.place()[1] == "HALTED"
    live.lease(now + timedelta(seconds=63))
    assert check_breakers(live.engine, live.user, now + timedelta(seconds=64)) == []
    assert live.place()[1] is None
    assert [event["by"] for event in live.events("HALT_LIFTED")] == ["breaker"]


def test_silence_out_of_session_is_none(live: Live) -> None:
    now = utc_now()
    live.lease(now - timedelta(hours=1), connected=False)
    opens = now + timedelta(hours=1)
    live.owner.execute(
        "UPDATE broker_account SET opens_at = %s, closes_at = %s WHERE user_id = %s",
        [opens.time(), (opens + timedelta(hours=1)).time(), live.user],
    )
    assert check_breakers(live.engine, live.user, now) == []


def test_storm_of_rejections_trips(live: Live) -> None:
    _breaker(live, "REJECT_STORM", 3, seconds=60)
    for number in range(3):
        assert check_breakers(live.engine, live.user, utc_now()) == []
        order, _ = live.place(quantity=number + 1)
        live.send(order)
        live.hear("REJECTED", {"code": "201", "message": "no"}, order)
        live.apply()
    later = utc_now() + timedelta(seconds=61)
    assert check_breakers(live.engine, live.user, later) == []
    (trip,) = check_breakers(live.engine, live.user, utc_now())
    assert (trip.code, trip.value) == ("REJECT_STORM", Decimal(3))
    assert live.place()[1] == "HALTED"


def test_slow_answers_trip_and_quick_ones_do_not(live: Live) -> None:
    _breaker(live, "LATENCY", 2000, seconds=300)
    for number in range(19):
        live.work(quantity=number + 1)
    # One slow answer in twenty is none; two are.
    for trips in (0, 1):
        live.work(seconds_ago=3)
        assert len(check_breakers(live.engine, live.user, utc_now())) == trips
    assert live.alerts() == ["LATENCY_HIGH"]


def test_stale_price_of_what_is_held_trips_while_the_exchange_is_open(live: Live) -> None:
    _breaker(live, "STALE_PRICE", 60)
    live.hold(10)
    now = utc_now()
    live.owner.execute("UPDATE position SET marked_at = %s", [now])
    late = now + timedelta(seconds=61)
    # Nothing is known to be open.
    assert check_breakers(live.engine, live.user, late) == []
    live.owner.execute(
        """INSERT INTO calendar_session (calendar, session_date, open_at, close_at)
           VALUES ('XNYS', %s, %s, %s)""",
        [now.date(), now - timedelta(hours=1), now + timedelta(hours=1)],
    )
    assert check_breakers(live.engine, live.user, now + timedelta(seconds=60)) == []
    (trip,) = check_breakers(live.engine, live.user, late)
    assert (trip.code, trip.run_id) == ("STALE_PRICE", live.run)


def test_breaker_of_an_account_goes_before_the_users(live: Live) -> None:
    _breaker(live, "DAILY_LOSS", 1)
    _breaker(live, "DAILY_LOSS", None, account=ACCOUNT)
    live.hold(10)
    live.mark(1)
    assert check_breakers(live.engine, live.user, utc_now()) == []


def _breaker(
    live: Live,
    kind: str,
    threshold: int | None,
    *,
    seconds: int | None = None,
    account: str | None = None,
) -> None:
    live.owner.execute(
        """INSERT INTO circuit_breaker (user_id, account, kind, threshold, seconds)
           VALUES (%s, %s, %s, %s, %s)""",
        [live.user, account, kind, threshold, seconds],
    )


def test_halt_waits_for_a_tick_under_way_and_takes_its_orders(live: Live, dsn: str) -> None:
    """The tick has the run's row; what it places is cancelled when the halt gets it."""
    with open_connection(dsn, role="oms_engine") as ticking:
        order: UUID
        with ticking.transaction():
            row = ticking.execute(
                """INSERT INTO orders (user_id, run_id, symbol, side, quantity, order_type,
                                       limit_price)
                   VALUES (%s, %s, 'AAPL', 'BUY', 1, 'LIMIT', 10) RETURNING order_id""",
                [live.user, live.run],
            ).fetchone()
            assert row is not None
            order = row[0]
            live.engine.execute("SET lock_timeout = '200ms'")
            with pytest.raises(Exception, match="run it again"):
                place_halt(live.engine, live.user, STOP)
            live.engine.execute("RESET lock_timeout")
        place_halt(live.engine, live.user, STOP)
        assert live.status(order) == "CANCELED"
