"""Investment plans: which session they fall on, in every calendar, and what was missed."""

from __future__ import annotations

from datetime import date, timedelta
from decimal import Decimal
from typing import Any

import pytest
from market_days import (
    MON,
    TUE,
    WED,
    a_plan,
    a_run,
    at_price,
    audited,
    close_on,
    counts,
    events,
    fresh,
    new_york,
    one,
    rows,
    statuses,
)
from scripted import SCRIPTED, WATCHING, Hooks, hooks

from engine import agenda as agenda_module
from engine.db.connect import Connection
from engine.errors import StrategyFailed
from engine.market.calendar import sessions
from engine.orders.model import Side
from engine.runs import Run
from engine.sips import pause_plan, resume_plan
from engine.strategies.base import PlaceOrder, SipDue
from engine.tick import run_tick, try_execute_sip

__all__ = ["audited", "hooks"]


def walk(
    conn: Connection, run: Run, first: str, last: str, calendar: str = "XNYS", price: str = "50"
) -> None:
    """Tick every close from one day to another."""
    days = sessions(calendar, date.fromisoformat(first), date.fromisoformat(last))
    with conn.transaction():
        for session in days:
            run_tick(conn, run.user_id, run.run_id, session.close_at, at_price(price))


def bought(conn: Connection, kind: str = "SIP_EXECUTED") -> list[tuple[str, str]]:
    """Occasions and the days, in UTC, at which they were executed."""
    found = rows(
        conn,
        f"""SELECT subject, logical_time FROM event_ledger
            WHERE event_type = '{kind}' ORDER BY seq""",
    )
    return [(subject, at.date().isoformat()) for subject, at in found]


# The planned day and its session


@pytest.mark.parametrize(
    ("day", "first", "last", "expected"),
    [
        # The 31st: the last day of a shorter month, or the next session if that is none.
        (
            31,
            "2001-01-02",
            "2001-05-10",
            [
                ("2001-01", "2001-01-31"),
                ("2001-02", "2001-02-28"),
                ("2001-03", "2001-04-02"),
                ("2001-04", "2001-04-30"),
            ],
        ),
        # A leap year's February.
        (30, "2000-02-01", "2000-03-03", [("2000-02", "2000-02-29")]),
        # September 11 to 14, 2001: the exchange was closed.
        (11, "2001-09-04", "2001-09-20", [("2001-09", "2001-09-17")]),
        (14, "2001-09-04", "2001-09-20", [("2001-09", "2001-09-17")]),
        # A Saturday, a Sunday, and a weekend with a holiday behind it.
        (5, "2001-05-01", "2001-05-10", [("2001-05", "2001-05-07")]),
        (26, "2001-05-01", "2001-05-31", [("2001-05", "2001-05-29")]),
        # New Year's Day: the next session is in the month after the planned day's.
        (1, "2000-12-20", "2001-01-05", [("2001-01", "2001-01-02")]),
        (31, "2000-12-20", "2001-01-05", [("2000-12", "2001-01-02")]),
        # Daylight saving time began on April 1, 2001, and ended on October 28.
        (1, "2001-03-28", "2001-04-05", [("2001-04", "2001-04-02")]),
        (28, "2001-10-22", "2001-11-02", [("2001-10", "2001-10-29")]),
    ],
)
def test_a_plan_falls_on_its_day_or_the_next_session(
    conn: Connection, day: int, first: str, last: str, expected: list[tuple[str, str]]
) -> None:
    run = a_run(conn, cash="100000")
    a_plan(conn, run, plan="p", day_of_month=day, start_on=date.fromisoformat(first))
    walk(conn, run, first, last)
    assert bought(conn) == [(f"p@{month}", on) for month, on in expected]


def test_the_close_of_a_session_follows_daylight_saving_time(conn: Connection) -> None:
    run = a_run(conn, cash="100000")
    a_plan(conn, run, day_of_month=2, start_on=date(2001, 3, 1))
    walk(conn, run, "2001-03-01", "2001-04-05")
    found = rows(conn, "SELECT logical_time FROM event_ledger WHERE event_type = 'SIP_EXECUTED'")
    assert [at.isoformat() for at in found] == [
        "2001-03-02T21:00:00+00:00",
        "2001-04-02T20:00:00+00:00",
    ]


def test_indian_plans_follow_the_indian_calendar(conn: Connection) -> None:
    """Republic Day, January 26, is a holiday of the NSE and none of New York."""
    run = a_run(conn, cash="100000", calendar="NSE", currency="INR")
    assert run.calendar == "XNSE"
    other = a_run(conn, user="ben", cash="100000")
    for each in (run, other):
        a_plan(conn, each, plan="p", day_of_month=26, start_on=date(2006, 1, 1))
    walk(conn, run, "2006-01-23", "2006-01-31", "XNSE")
    assert bought(conn) == [("p@2006-01", "2006-01-27")]
    at = one(conn, "SELECT logical_time FROM event_ledger WHERE event_type = 'SIP_EXECUTED'")
    assert at.isoformat() == "2006-01-27T10:00:00+00:00"
    walk(conn, other, "2006-01-23", "2006-01-31")
    # Events of two runs have no order among each other.
    assert sorted(bought(conn)) == [("p@2006-01", "2006-01-26"), ("p@2006-01", "2006-01-27")]


def test_a_plan_begins_and_ends_with_its_days(conn: Connection) -> None:
    run = a_run(conn, cash="100000")
    a_plan(conn, run, plan="late", day_of_month=7, start_on=date(2001, 5, 8))
    a_plan(conn, run, plan="to the day", day_of_month=7, end_on=date(2001, 6, 7))
    a_plan(conn, run, plan="a day short", day_of_month=7, end_on=date(2001, 6, 6))
    walk(conn, run, "2001-05-01", "2001-07-10")
    assert bought(conn) == [
        ("a day short@2001-05", "2001-05-07"),
        ("to the day@2001-05", "2001-05-07"),
        ("late@2001-06", "2001-06-07"),
        ("to the day@2001-06", "2001-06-07"),
        ("late@2001-07", "2001-07-09"),
    ]


def test_a_paused_plan_is_not_executed_and_not_made_up_for(conn: Connection) -> None:
    run = a_run(conn, cash="100000")
    a_plan(conn, run)
    key = run.user_id, run.run_id
    pause_plan(conn, *key, "apples")
    walk(conn, run, "2001-05-01", "2001-06-20")
    assert bought(conn) == []
    resume_plan(conn, *key, "apples", date(2001, 6, 20))
    walk(conn, run, "2001-06-21", "2001-07-10")
    assert bought(conn) == [("apples@2001-07", "2001-07-09")]


def test_the_names_of_plans_do_not_get_in_each_others_way(conn: Connection) -> None:
    """The ledger knows a plan by its name, also beside one that begins with it."""
    run = a_run(conn, cash="100000")
    names = ["a", "a 2001-05", "aA", "a.b", "A", "a_"]
    for name in names:
        a_plan(conn, run, plan=name)
    walk(conn, run, MON, WED)
    assert sorted(name for name, _ in bought(conn)) == sorted(f"{n}@2001-05" for n in names)


# What was missed

# From March to the middle of May nothing ticked: March, April and May are due, and May has begun.
MISSED = {
    "RUN_EACH": (["2001-03", "2001-04", "2001-05"], []),
    "RUN_ONCE": (["2001-05"], ["2001-03", "2001-04"]),
    "SKIP": ([], ["2001-03", "2001-04", "2001-05"]),
}


@pytest.mark.parametrize("policy", MISSED)
def test_missed_occasions_follow_the_plans_policy(conn: Connection, policy: str) -> None:
    executed, skipped = MISSED[policy]
    run = a_run(conn)
    a_plan(conn, run, start_on=date(2001, 3, 1), missed_policy=policy)
    key = run.user_id, run.run_id
    for _ in range(2):
        run_tick(conn, *key, close_on("2001-05-17"), at_price("50"))
    run_tick(conn, *key, close_on("2001-05-18"), at_price("50"))
    assert bought(conn) == [(f"apples@{month}", "2001-05-17") for month in executed]
    assert bought(conn, "SIP_SKIPPED") == [(f"apples@{month}", "2001-05-17") for month in skipped]
    # What is on time again is executed whatever the policy.
    run_tick(conn, *key, close_on("2001-06-07"), at_price("50"))
    assert bought(conn)[-1] == ("apples@2001-06", "2001-06-07")


def test_a_skip_says_what_was_skipped(conn: Connection) -> None:
    run = a_run(conn)
    a_plan(conn, run, missed_policy="SKIP")
    run_tick(conn, run.user_id, run.run_id, close_on("2001-05-17"), at_price("50"))
    assert one(conn, "SELECT payload FROM event_ledger WHERE event_type = 'SIP_SKIPPED'") == {
        "plan": "apples",
        "symbol": "AAPL",
        "amount": "500",
        "planned_on": "2001-05-07",
    }
    assert counts(conn, run)["orders"] == 0


@pytest.mark.parametrize(("hours", "executed"), [(24, True), (25, False)])
def test_an_occasion_is_on_time_for_a_day_after_its_close(
    conn: Connection, hours: int, executed: bool
) -> None:
    """By the wall clock of a live tick, which comes after an import in the evening."""
    run = a_run(conn)
    a_plan(conn, run, missed_policy="SKIP")
    now = close_on(MON) + timedelta(hours=hours)
    run_tick(conn, run.user_id, run.run_id, close_on(MON), at_price("50"), now=now)
    assert bought(conn, "SIP_EXECUTED" if executed else "SIP_SKIPPED")


def test_a_live_catch_up_of_several_ticks_runs_once(conn: Connection) -> None:
    """The ticks that were missed come one by one, long after their time."""
    run = a_run(conn, cash="100000")
    a_plan(conn, run, start_on=date(2001, 3, 1), missed_policy="RUN_ONCE")
    now = new_york("2001-05-17", "12:00")
    for session in sessions("XNYS", date(2001, 3, 5), date(2001, 5, 16)):
        run_tick(conn, run.user_id, run.run_id, session.close_at, at_price("50"), now=now)
    assert bought(conn) == [("apples@2001-05", "2001-05-07")]
    assert [name for name, _ in bought(conn, "SIP_SKIPPED")] == ["apples@2001-03", "apples@2001-04"]


def test_more_occasions_than_one_tick_takes_up_wait_for_the_next(
    conn: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agenda_module, "SIPS_DUE_MAX", 2)
    run = a_run(conn)
    for name in "abc":
        a_plan(conn, run, plan=name, amount=Decimal(10))
    run_tick(conn, run.user_id, run.run_id, close_on(MON), at_price("50"))
    assert bought(conn) == [("a@2001-05", MON), ("b@2001-05", MON)]
    run_tick(conn, run.user_id, run.run_id, close_on(TUE), at_price("50"))
    assert bought(conn)[2:] == [("c@2001-05", TUE)]


# Money into units


@pytest.mark.parametrize(
    ("price", "decimals", "quantity"),
    [("3", 6, "166.666666"), ("3", 0, "166"), ("0.07", 8, "7142.85714285"), ("500", 6, "1")],
)
def test_money_becomes_units_that_are_cut_and_not_rounded(
    conn: Connection, price: str, decimals: int, quantity: str
) -> None:
    conn.execute("UPDATE instrument SET quantity_decimals = %s WHERE symbol = 'AAPL'", [decimals])
    run = a_run(conn, paper={"quantity_decimals": 8})
    a_plan(conn, run)
    run_tick(conn, run.user_id, run.run_id, close_on(MON), at_price(price))
    assert one(conn, "SELECT quantity FROM execution") == Decimal(quantity)
    payload = one(conn, "SELECT payload FROM event_ledger WHERE event_type = 'SIP_EXECUTED'")
    assert Decimal(payload.pop("quantity")) == Decimal(quantity)
    assert payload == {
        "plan": "apples",
        "symbol": "AAPL",
        "amount": "500",
        "planned_on": MON,
        "price": price,
    }


def test_too_little_money_for_one_unit_is_rejected_once(conn: Connection) -> None:
    conn.execute("UPDATE instrument SET quantity_decimals = 0 WHERE symbol = 'AAPL'")
    run = a_run(conn)
    a_plan(conn, run)
    for day in (MON, TUE):
        run_tick(conn, run.user_id, run.run_id, close_on(day), at_price("501"))
    assert statuses(conn, run) == ["REJECTED"]
    assert bought(conn, "SIP_REJECTED") == [("apples@2001-05", MON)]


@pytest.mark.parametrize(
    ("cash", "paper"),
    [("499", {}), ("500", {"commission": {"model": "FIXED", "amount": "0.01"}})],
    ids=["at the gate", "when it fills"],
)
def test_a_plan_without_the_money_is_rejected_and_says_so(
    conn: Connection, cash: str, paper: dict[str, Any]
) -> None:
    run = a_run(conn, cash=cash, paper=paper)
    a_plan(conn, run)
    run_tick(conn, run.user_id, run.run_id, close_on(MON), at_price("50"))
    assert statuses(conn, run) == ["REJECTED"]
    assert bought(conn) == []
    code = one(
        conn,
        "SELECT payload ->> 'reject_code' FROM event_ledger WHERE event_type = 'SIP_REJECTED'",
    )
    assert code == "INSUFFICIENT_CASH"
    assert fresh(conn, run).cash == Decimal(cash)


def test_a_plan_waits_for_the_price_of_its_symbol(conn: Connection) -> None:
    run = a_run(conn)
    a_plan(conn, run)
    key = run.user_id, run.run_id
    assert try_execute_sip(conn, *key, close_on(MON), at_price("50", "IBM")) == 0
    assert try_execute_sip(conn, *key, close_on(TUE), at_price("50")) == 1


def test_the_plans_of_another_strategys_run_wait_for_a_call_of_their_own(
    conn: Connection, hooks: Hooks
) -> None:
    run = a_run(conn, strategy=SCRIPTED)
    a_plan(conn, run)
    key = run.user_id, run.run_id
    filled: list[str] = []
    hooks["on_fill"] = lambda context, fill: filled.append(fill.symbol)
    run_tick(conn, *key, close_on(MON), at_price("50"))
    assert events(conn, run) == ["RUN_STARTED", "TICK"]
    assert try_execute_sip(conn, *key, close_on(MON), at_price("50")) == 1
    assert filled == ["AAPL"]


@pytest.mark.parametrize("is_open", [True, False])
def test_occasions_are_shown_while_the_market_is_open(
    conn: Connection, hooks: Hooks, is_open: bool
) -> None:
    run = a_run(conn, strategy=WATCHING)
    a_plan(conn, run)
    seen: list[SipDue] = []
    hooks["on_tick"] = lambda context: seen.extend(context.sips_due)
    key = run.user_id, run.run_id
    run_tick(conn, *key, close_on(MON), at_price("50"), market_open=is_open)
    assert [due.occasion for due in seen] == (["apples@2001-05"] if is_open else [])
    assert counts(conn, run)["orders"] == 0


def test_an_occasion_can_not_be_executed_without_a_price(conn: Connection, hooks: Hooks) -> None:
    run = a_run(conn, strategy=SCRIPTED)
    (session,) = sessions("XNYS", date(2001, 5, 7), date(2001, 5, 7))
    due = SipDue("p", "IBM", Decimal(1), "SKIP", "p@2001-05", date(2001, 5, 7), None, session)
    hooks["on_tick"] = lambda context: [PlaceOrder("AAPL", Side.BUY, Decimal(1), occasion=due)]
    with pytest.raises(StrategyFailed, match="plan p can't be executed without a price of IBM"):
        run_tick(conn, run.user_id, run.run_id, close_on(MON), at_price("50"))
