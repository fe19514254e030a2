"""Each fault does what it says, and without it nothing of the kind happens."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from exchange import order
from floor import START, Floor, explained

from engine.brokers.dummy.faults import ORDER_ID_MAX, Plan, find_plan, list_plans, load_plan
from engine.brokers.dummy.random_plans import random_plan
from engine.brokers.protocol import BrokerOrder
from engine.errors import BadInput

Make = Callable[..., Floor]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    def made(*faults: dict[str, Any], **how: Any) -> Floor:
        floor = Floor(tmp_path, *faults, **how)
        floor.log_on()
        return floor

    return made


def trade(floor: Floor) -> list[BrokerOrder]:
    """A little of everything: what happens without faults is known."""
    bought = floor.submit(order(quantity="10"))
    resting = floor.submit(order(quantity="20", limit_price="90"))
    sold = floor.submit(order("SELL", quantity="4"))
    floor.cancel(resting)
    return [bought, resting, sold]


def test_without_faults_nothing_goes_wrong(make: Make) -> None:
    floor = make()
    bought, resting, sold = trade(floor)
    assert floor.statuses(bought) == ["PENDING_SUBMIT", "ROUTED", "FILLED"]
    assert floor.statuses(resting) == ["PENDING_SUBMIT", "ROUTED", "CANCELED"]
    assert floor.statuses(sold) == ["PENDING_SUBMIT", "ROUTED", "FILLED"]
    assert floor.kinds() == [
        "CONNECTED",
        *["ORDER_STATUS", "ORDER_STATUS", "EXECUTION", "COMMISSION", "ORDER_STATUS"],
        *["ORDER_STATUS", "ORDER_STATUS"],
        *["ORDER_STATUS", "ORDER_STATUS", "EXECUTION", "COMMISSION", "ORDER_STATUS"],
        "ORDER_STATUS",
    ]
    assert [line["broker_order_id"] for line in floor.heard("EXECUTION")] == [1, 3]
    assert floor.ended == set()
    assert floor.books()["positions"] == {"AAPL": "6"}
    explained(floor.books())


# --- Connections ------------------------------------------------------------------------------


@pytest.mark.parametrize(("moment", "orders"), [("BEFORE", 0), ("AFTER", 1)])
def test_drop_before_or_after_accepting(make: Make, moment: str, orders: int) -> None:
    floor = make({"do": "DROP", "on": "SUBMIT", "moment": moment, "nth": 1})
    given = floor.submit(order())
    assert floor.ended == {1}
    assert floor.statuses(given) == []
    assert len(floor.books()["orders"]) == len(floor.books()["executions"]) == orders
    floor.log_on(2)
    again = floor.submit(order(), number=2)
    assert floor.statuses(again, 2)[-1] == "FILLED"


def test_drop_of_a_symbol_and_side_only(make: Make) -> None:
    floor = make({"do": "DROP", "symbol": "MSFT", "side": "SELL"})
    floor.submit(order("SELL"))
    floor.submit(order("BUY", symbol="MSFT"))
    assert floor.ended == set()
    floor.submit(order("SELL", symbol="MSFT"))
    assert floor.ended == {1}


@pytest.mark.parametrize("on", ["MODIFY", "CANCEL", "SNAPSHOT", "FILL"])
def test_drop_at_other_points(make: Make, on: str) -> None:
    floor = make({"do": "DROP", "on": on, "moment": "AFTER", "nth": 1})
    resting = floor.submit(order(limit_price="90"))
    assert floor.ended == set()
    if on == "MODIFY":
        floor.ask("MODIFY", order(limit_price="91", order_ref=resting.order_ref))
        assert floor.order(resting)["limit_price"] == "91"
    elif on == "CANCEL":
        floor.cancel(resting)
        assert floor.order(resting)["status"] == "CANCELED"
    elif on == "SNAPSHOT":
        floor.ask("SNAPSHOT", request=1, since=None)
        assert floor.answers() == []
    else:
        floor.do("set_price", symbol="AAPL", price="90")
        assert floor.order(resting)["status"] == "FILLED"
    assert floor.ended == {1}
    assert floor.statuses(resting) == ["PENDING_SUBMIT", "ROUTED"]


def test_silence_for_good_and_for_a_while(make: Make) -> None:
    floor = make({"do": "SILENCE", "on": "SUBMIT", "nth": 1, "seconds": 30})
    floor.submit(order())
    heard = len(floor.heard())
    floor.submit(order())
    floor.ask("PING", request=1)
    assert len(floor.heard()) == heard
    assert floor.answers() == []
    assert floor.ended == set()
    floor.wait(30)
    floor.ask("PING", request=2)
    assert [answer["reply"] for answer in floor.answers()] == [2]


def test_steal(make: Make) -> None:
    floor = make({"do": "STEAL", "nth": 2, "by": "desk 9"})
    floor.submit(order())
    assert floor.ended == set()
    floor.submit(order())
    assert floor.payloads("STOLEN") == [{"by": "desk 9"}]
    assert floor.ended == {1}
    assert len(floor.books()["executions"]) == 2


def test_switch_account(make: Make) -> None:
    floor = make({"do": "SWITCH_ACCOUNT", "nth": 1, "account": "DU2"})
    floor.submit(order())
    assert [said["account"] for said in floor.payloads("CONNECTED")] == ["DU1", "DU2"]
    floor.submit(order())
    assert [len(floor.books(name)["orders"]) for name in ("DU1", "DU2")] == [1, 1]


def test_refuse_logon(make: Make) -> None:
    floor = make({"do": "REFUSE_LOGON", "times": 1})
    assert floor.ended == {1}
    assert floor.heard() == []
    floor.log_on(2)
    assert floor.kinds(2) == ["CONNECTED"]


# --- Messages ---------------------------------------------------------------------------------


def test_swallow_the_nth(make: Make) -> None:
    floor = make({"do": "SWALLOW", "message": "EXECUTION", "nth": 1})
    trade(floor)
    assert [said["execution_id"] for said in floor.payloads("EXECUTION")] == ["2.01"]
    assert len(floor.books()["executions"]) == 2


def test_swallow_by_status(make: Make) -> None:
    floor = make({"do": "SWALLOW", "message": "ORDER_STATUS", "status": "FILLED"})
    bought, _, _ = trade(floor)
    assert floor.statuses(bought) == ["PENDING_SUBMIT", "ROUTED"]


def test_repeat(make: Make) -> None:
    floor = make({"do": "REPEAT", "message": "EXECUTION", "copies": 2, "nth": [2]})
    trade(floor)
    told = [said["execution_id"] for said in floor.payloads("EXECUTION")]
    assert told == ["1.01", "2.01", "2.01", "2.01"]


def test_reorder(make: Make) -> None:
    floor = make({"do": "REORDER", "message": "EXECUTION", "by": 2})
    floor.submit(order())
    assert floor.kinds()[1:] == [
        "ORDER_STATUS", "ORDER_STATUS", "COMMISSION", "ORDER_STATUS", "EXECUTION",
    ]  # fmt: skip


def test_what_nothing_overtakes_comes_all_the_same(make: Make) -> None:
    floor = make({"do": "REORDER", "message": "EXECUTION", "by": 50})
    floor.submit(order())
    assert "EXECUTION" not in floor.kinds()
    floor.wait(0.5)
    assert floor.kinds()[-1] == "EXECUTION"


def test_delay(make: Make) -> None:
    floor = make({"do": "DELAY", "message": "ORDER_STATUS", "seconds": 3})
    given = floor.submit(order())
    assert floor.kinds() == ["CONNECTED", "EXECUTION", "COMMISSION"]
    floor.wait(2.999)
    assert floor.statuses(given) == []
    floor.wait(0.001)
    assert floor.statuses(given) == ["PENDING_SUBMIT", "ROUTED", "FILLED"]
    assert floor.heard("ORDER_STATUS")[0]["event_at"] == START.isoformat()


def test_any_message_and_answers_too(make: Make) -> None:
    floor = make({"do": "SWALLOW", "message": "PONG", "nth": 1})
    floor.ask("PING", request=1)
    floor.ask("PING", request=2)
    assert [answer["reply"] for answer in floor.answers()] == [2]


def test_by_probability_some_and_not_all(make: Make) -> None:
    floor = make({"do": "SWALLOW", "message": "EXECUTION", "probability": 0.5})
    for _ in range(200):
        floor.submit(order(quantity="1"))
    assert 60 < len(floor.heard("EXECUTION")) < 140


def test_every_and_times(make: Make) -> None:
    floor = make({"do": "SWALLOW", "message": "EXECUTION", "every": 3, "times": 2})
    for _ in range(10):
        floor.submit(order(quantity="1"))
    told = [said["execution_id"] for said in floor.payloads("EXECUTION")]
    assert told == [f"{n}.01" for n in (1, 2, 4, 5, 7, 8, 9, 10)]


# --- Orders -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("on", "kind"),
    [("SUBMIT", "REJECTED"), ("MODIFY", "MODIFY_REJECTED"), ("CANCEL", "CANCEL_REJECTED")],
)
def test_reject(make: Make, on: str, kind: str) -> None:
    floor = make({"do": "REJECT", "on": on, "nth": 1, "code": "E201", "text": "No."})
    for _ in range(2):
        resting = floor.submit(order(limit_price="90"))
        floor.ask("MODIFY", order(limit_price="91", order_ref=resting.order_ref))
        floor.cancel(resting)
    assert {"code": "E201", "message": "No."} in floor.payloads(kind)
    assert floor.order(resting)["limit_price"] == "91"
    assert floor.order(resting)["status"] == "CANCELED"


def test_reject_a_what_if(make: Make) -> None:
    floor = make({"do": "REJECT", "on": "WHAT_IF", "nth": 1})
    floor.ask("WHAT_IF", order(), request=1)
    floor.ask("WHAT_IF", order(), request=2)
    assert [answer["payload"]["accepted"] for answer in floor.answers()] == [False, True]


def test_a_storm_of_rejections_ends(make: Make) -> None:
    floor = make({"do": "REJECT", "times": 5})
    given = [floor.submit(order(quantity="1")) for _ in range(7)]
    statuses = [floor.order(each)["status"] for each in given]
    assert statuses == ["REJECTED"] * 5 + ["FILLED"] * 2


def test_freeze(make: Make) -> None:
    floor = make({"do": "FREEZE", "on": "FILL", "nth": 1})
    floor.submit(order())
    floor.submit(order())
    assert [said["code"] for said in floor.payloads("REJECTED")] == ["FROZEN"]


def test_forget(make: Make) -> None:
    floor = make({"do": "FORGET", "nth": 1})
    lost = floor.submit(order(limit_price="90"))
    kept = floor.submit(order(limit_price="90"))
    assert floor.statuses(lost) == ["PENDING_SUBMIT", "ROUTED"]
    assert [each["order_ref"] for each in floor.books()["orders"]] == [kept.order_ref]
    floor.cancel(lost)
    assert floor.payloads("CANCEL_REJECTED")[0]["code"] == "UNKNOWN_ORDER"
    floor.do("set_price", symbol="AAPL", price="80")
    assert len(floor.books()["executions"]) == 1
    floor.close()
    floor.open()
    assert [each["order_ref"] for each in floor.books()["orders"]] == [kept.order_ref]


def test_who_asks_for_a_forgotten_order_does_not_get_another_with_its_number(make: Make) -> None:
    floor = make({"do": "RESTART_ORDER_IDS", "nth": 2}, {"do": "FORGET", "nth": 2})
    kept = floor.submit(order(limit_price="90"))
    lost = floor.submit(order(limit_price="80"))
    assert floor.order(kept)["broker_order_id"] == 1
    floor.ask("MODIFY", lost, broker_order_id=1)
    floor.ask("CANCEL", order_ref=lost.order_ref, broker_order_id=1)
    for kind in ("MODIFY_REJECTED", "CANCEL_REJECTED"):
        assert floor.payloads(kind)[0]["code"] == "UNKNOWN_ORDER"
    assert floor.order(kept)["limit_price"] == "90"
    assert floor.statuses(kept) == ["PENDING_SUBMIT", "ROUTED"]


@pytest.mark.parametrize("says", ["INACTIVE", "ALREADY_CANCELED"])
def test_inactive_at_a_cancel(make: Make, says: str) -> None:
    floor = make({"do": "INACTIVE", "nth": 1, "says": says})
    given = floor.submit(order(limit_price="90"))
    floor.cancel(given)
    if says == "INACTIVE":
        assert floor.statuses(given)[-1] == "INACTIVE"
        assert floor.payloads("CANCEL_REJECTED") == []
    else:
        assert floor.statuses(given)[-1] == "ROUTED"
        assert [each["code"] for each in floor.payloads("CANCEL_REJECTED")] == [says]
    floor.do("set_price", symbol="AAPL", price="80")
    assert floor.books()["executions"] == []


@pytest.mark.parametrize(("quantity", "status"), [(None, "FILLED"), (5, "CANCELED")])
def test_a_fill_after_the_cancel(make: Make, quantity: int | None, status: str) -> None:
    fault = {"do": "FILL", "on": "CANCELED", "nth": 1}
    floor = make(fault if quantity is None else fault | {"quantity": quantity})
    given = floor.submit(order(quantity="20", limit_price="90"))
    floor.cancel(given)
    assert floor.statuses(given) == ["PENDING_SUBMIT", "ROUTED", "CANCELED", status]
    assert floor.order(given)["filled"] == str(quantity or 20)
    explained(floor.books())


def test_a_fill_just_before_the_cancel(make: Make) -> None:
    floor = make({"do": "FILL", "on": "CANCEL", "moment": "BEFORE"})
    given = floor.submit(order(limit_price="90"))
    floor.cancel(given)
    assert floor.statuses(given)[-1] == "FILLED"
    assert floor.payloads("CANCEL_REJECTED")[0]["code"] == "ALREADY_FILLED"


@pytest.mark.parametrize(("moment", "seen"), [("BEFORE", 1), ("AFTER", 0)])
def test_a_fill_beside_a_snapshot(make: Make, moment: str, seen: int) -> None:
    floor = make({"do": "FILL", "on": "SNAPSHOT", "moment": moment})
    floor.submit(order(limit_price="90"))
    floor.ask("SNAPSHOT", request=1, since=None)
    (said,) = floor.answers()
    assert len(said.get("executions", [])) == 2 * seen
    assert len(said.get("open_orders", [])) == 1 - seen
    assert len(floor.books()["executions"]) == 1


def test_fills_in_slices_and_the_rest_in_the_book(make: Make) -> None:
    slices = [{"quantity": "3", "price": "99.5"}, {"quantity": "2", "price": "101"}]
    floor = make({"do": "FILLS", "slices": slices, "nth": 1})
    given = floor.submit(order(quantity="6", limit_price="98"))
    assert floor.order(given)["filled"] == "5"
    assert floor.order(given)["status"] == "ROUTED"
    floor.do("set_price", symbol="AAPL", price="97")
    told = [(said["quantity"], said["price"]) for said in floor.payloads("EXECUTION")]
    assert told == [("3", "99.5"), ("2", "101"), ("1", "97")]
    explained(floor.books())


def test_a_fill_after_the_close(make: Make) -> None:
    floor = make({"do": "FILL_AFTER_CLOSE", "side": "SELL"})
    bought = floor.submit(order())
    sold = floor.submit(order("SELL"))
    assert floor.order(bought)["status"] == "FILLED"
    assert floor.order(sold)["status"] == "ROUTED"
    floor.do("set_price", symbol="AAPL", price="120")
    assert floor.order(sold)["status"] == "ROUTED"
    floor.do("set_session", is_open=False)
    assert floor.order(sold)["status"] == "FILLED"


def test_overfill(make: Make) -> None:
    floor = make({"do": "OVERFILL", "nth": 1, "quantity": 5})
    given = floor.submit(order(quantity="10"))
    floor.submit(order(quantity="10"))
    assert floor.order(given)["filled"] == "15"
    assert floor.books()["positions"] == {"AAPL": "25"}
    explained(floor.books())


def test_correct_and_bust(make: Make) -> None:
    floor = make(
        {"do": "CORRECT", "nth": 1, "price_change": "0.10", "quantity_change": "-2"},
        {"do": "BUST", "nth": 2},
    )
    floor.submit(order(quantity="10"))
    floor.submit(order(quantity="10"))
    floor.submit(order(quantity="10"))
    told = [(said["execution_id"], said["quantity"]) for said in floor.payloads("EXECUTION")]
    assert told == [("1.01", "10"), ("1.02", "8"), ("2.01", "10"), ("3.01", "10")]
    assert floor.payloads("BUST") == [{"execution_id": "2.01"}]
    assert floor.books()["positions"] == {"AAPL": "18"}
    explained(floor.books())


@pytest.mark.parametrize(
    ("fault", "name", "value"),
    [({"do": "ZERO_FILL"}, "quantity", "0"), ({"do": "NEGATIVE_FILL"}, "price", "-1")],
)
def test_false_fills_are_told_and_not_booked(
    make: Make, fault: dict[str, Any], name: str, value: str
) -> None:
    floor = make(fault | {"nth": 1})
    floor.submit(order(limit_price="90"))
    floor.submit(order(limit_price="90"))
    assert [said[name] for said in floor.payloads("EXECUTION")] == [value]
    assert floor.books()["executions"] == []
    assert floor.books()["cash"] == {"USD": "1000000"}


def test_commission_first_and_in_another_currency(make: Make) -> None:
    floor = make(
        {"do": "COMMISSION_FIRST", "nth": 1}, {"do": "COMMISSION_IN", "nth": 2, "currency": "EUR"}
    )
    floor.submit(order())
    floor.submit(order())
    kinds = [kind for kind in floor.kinds() if kind in ("EXECUTION", "COMMISSION")]
    assert kinds == ["COMMISSION", "EXECUTION", "EXECUTION", "COMMISSION"]
    assert [said["currency"] for said in floor.payloads("COMMISSION")] == ["USD", "EUR"]
    assert floor.books()["cash"] == {"USD": "997999.950", "EUR": "-0.050"}


# --- Ids, time, market ------------------------------------------------------------------------


def ids(floor: Floor) -> list[int]:
    return [each["broker_order_id"] for each in floor.books()["orders"]]


def test_order_ids_restart(make: Make) -> None:
    floor = make({"do": "RESTART_ORDER_IDS", "nth": 3})
    for _ in range(4):
        floor.submit(order())
    assert ids(floor) == [1, 2, 1, 2]


def test_order_ids_come_to_their_end(make: Make) -> None:
    floor = make({"do": "WRAP_ORDER_IDS", "next": ORDER_ID_MAX - 1})
    for _ in range(3):
        floor.submit(order())
    assert ids(floor) == [ORDER_ID_MAX - 1, ORDER_ID_MAX, 1]


def test_order_ids_may_begin_near_their_end(make: Make) -> None:
    floor = make(first_order_id=ORDER_ID_MAX)
    floor.submit(order())
    floor.submit(order())
    assert ids(floor) == [ORDER_ID_MAX, 1]


def test_change_perm_id(make: Make) -> None:
    symbols = [{"name": "AAPL", "price": "100", "liquidity": "4"}]
    floor = make({"do": "CHANGE_PERM_ID", "nth": 1}, symbols=symbols)
    floor.submit(order(quantity="8"))
    floor.do("set_price", symbol="AAPL", price="101")
    assert [line["perm_id"] for line in floor.heard("EXECUTION")] == [900_000_001, 900_000_002]


def test_skew_clock(make: Make) -> None:
    floor = make({"do": "SKEW_CLOCK", "on": "FILL", "nth": 2, "seconds": 45})
    floor.submit(order())
    floor.submit(order())
    at = [line["event_at"] for line in floor.heard("EXECUTION")]
    assert at == [START.isoformat(), (START + timedelta(seconds=45)).isoformat()]
    floor.ask("PING", request=1)
    assert floor.answers()[0]["broker_time"] == at[1]


def test_manual_orders_are_nobodys(make: Make) -> None:
    floor = make({"do": "MANUAL_ORDER", "on": "SUBMIT", "nth": 1, "quantity": 7})
    floor.log_on(2, client_id=3)
    floor.submit(order(limit_price="90"))
    (line,) = floor.heard("EXECUTION")
    assert (line["order_ref"], line["broker_order_id"]) == (None, 0)
    assert floor.heard("EXECUTION", number=2) == []
    assert floor.books()["positions"] == {"AAPL": "7"}


def test_an_orphan_is_ours_and_the_same_each_time(make: Make, tmp_path: Path) -> None:
    fault = {"do": "ORPHAN_ORDER", "nth": 1, "of": "AAPL", "quantity": 3}
    floor = make(fault)
    again = Floor(tmp_path / "again", fault)
    again.log_on()
    floor.ask("SNAPSHOT", request=1, since=None)
    (said,) = floor.answers()
    assert said["closed_orders"][0]["ours"]
    assert said["closed_orders"][0]["status"] == "FILLED"
    first, second = (each.books()["orders"][0]["order_ref"] for each in (floor, again))
    assert first == second != ""


def test_change_symbol(make: Make) -> None:
    floor = make({"do": "CHANGE_SYMBOL", "nth": 2, "old": "AAPL", "new": "APL"})
    floor.submit(order())
    resting = floor.submit(order(limit_price="90"))
    assert floor.payloads("CONTRACT_CHANGED") == [{"symbol": "AAPL", "new_symbol": "APL"}]
    assert floor.order(resting)["status"] == "CANCELED"
    assert floor.books()["positions"] == {"APL": "10"}
    floor.submit(order())
    assert floor.payloads("REJECTED")[0]["code"] == "UNKNOWN_SYMBOL"


def test_set_price_and_session(make: Make) -> None:
    floor = make(
        {"do": "SET_PRICE", "on": "FILL", "nth": 1, "of": "AAPL", "price": 60},
        {"do": "SET_SESSION", "on": "FILL", "nth": 2, "to": "CLOSED"},
    )
    floor.submit(order())
    assert floor.do("market")["prices"]["AAPL"] == "60"
    floor.submit(order())
    assert not floor.do("market")["is_open"]


def test_what_a_fault_has_counted_survives_a_restart(make: Make) -> None:
    fault = {"do": "SWALLOW", "message": "EXECUTION", "probability": 0.5}
    floor = make({"do": "RESTART_ORDER_IDS", "nth": 3}, fault)
    for n in range(30):
        floor.submit(order(quantity="1"))
        if n % 7 == 0:
            floor.close()
            floor.open()
            floor.log_on()
    whole = [said["execution_id"] for said in floor.payloads("EXECUTION")]
    other = Floor(floor.folder / "other", {"do": "RESTART_ORDER_IDS", "nth": 3}, fault)
    other.log_on()
    for _ in range(30):
        other.submit(order(quantity="1"))
    assert whole == [said["execution_id"] for said in other.payloads("EXECUTION")]
    assert ids(floor) == ids(other)


# --- Seeds ------------------------------------------------------------------------------------


def played(folder: Path, plan: Plan, seed: int) -> list[dict[str, Any]]:
    """What a client hears in a session that is the same each time but for plan and seed."""
    floor = Floor(folder, plan=plan, seed=seed)
    number = 1
    floor.log_on(number)
    for n in range(60):
        if number in floor.ended:
            number += 1
            floor.log_on(number)
        given = order(
            ("BUY", "SELL")[n % 2],
            str(5 + n % 4),
            ("AAPL", "MSFT")[n % 3 == 0],
            order_ref=f"order-{n}",
            limit_price=("99.9", "100.1", "400")[n % 3] if n % 5 else None,
        )
        floor.submit(given, number)
        if n % 4 == 0:
            floor.ask("CANCEL", number=number, order_ref=given.order_ref)
        floor.wait(0.03)
    explained(floor.books())
    told = [line for number in sorted(floor.said) for line in floor.said[number]]
    floor.close()
    return told


@pytest.mark.parametrize("lot", range(25))
def test_the_same_seed_and_plan_give_the_same_run(tmp_path: Path, lot: int) -> None:
    plan = random_plan(lot)
    assert plan == random_plan(lot)
    first = played(tmp_path / "a", plan, plan.seed)
    assert first == played(tmp_path / "b", plan, plan.seed)
    assert len(first) > 50


def test_another_seed_gives_another_run(tmp_path: Path) -> None:
    plan = Plan.model_validate(
        {
            "symbol": [{"name": "AAPL", "price": "100"}, {"name": "MSFT", "price": "400"}],
            "fault": [{"do": "SWALLOW", "message": "ANY", "probability": 0.3}],
        }
    )
    assert played(tmp_path / "a", plan, 1) != played(tmp_path / "b", plan, 2)


def test_plans_by_lot_differ_and_use_every_kind_of_fault() -> None:
    kinds = {fault.do for seed in range(300) for fault in random_plan(seed).faults}
    assert len(kinds) >= 17
    assert len({random_plan(seed).model_dump_json() for seed in range(100)}) == 100


# --- Plans ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(list_plans()))
def test_each_plan_can_be_played_and_says_what_must_happen(name: str, tmp_path: Path) -> None:
    path = find_plan(name)
    text = path.read_text(encoding="utf-8")
    assert text.startswith("# ")
    assert "Must happen:" in " ".join(text.partition("title =")[0].replace("#", " ").split())
    floor = Floor(tmp_path, plan=load_plan(path))
    floor.log_on()
    if 1 in floor.ended:
        return
    trade(floor)
    floor.wait(5)
    for number in sorted(floor.ended):
        floor.log_on(number + 1)
    assert floor.exchange.faults.counted.keys() == {
        str(n) for n in range(1, 1 + len(floor.plan.faults))
    }


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("title = ", "isn't TOML"),
        ('[[fault]]\ndo = "DANCE"', "fault 1"),
        ('[[fault]]\ndo = "DROP"\nwhen = 1', "fault 1 DROP when: extra inputs are not permitted"),
        ('[[fault]]\ndo = "DROP"\nnth = 0', "fault 1 DROP nth"),
        ('[[fault]]\ndo = "DROP"\nnth = 1\nevery = 2', "give one of nth, every and probability"),
        ('[[fault]]\ndo = "DELAY"\nmessage = "EXECUTION"', "seconds: field required"),
        ('[exchange]\nsession = "25:00-26:00"', "two different times"),
        ("[exchange]\nfirst_order_id = 2147483648", "less than or equal to 2147483647"),
        ('[[symbol]]\nname = "A"\nliquidity = 0', "symbol 1 liquidity"),
    ],
)
def test_a_plan_that_is_wrong_is_told_in_one_sentence(tmp_path: Path, text: str, told: str) -> None:
    path = tmp_path / "plan.toml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(BadInput) as refused:
        load_plan(path)
    assert told in str(refused.value)
    assert str(refused.value).endswith(".")
    assert "\n" not in str(refused.value)


def test_plans_are_found_by_name_and_by_path(tmp_path: Path) -> None:
    shipped = find_plan("CONN-01")
    assert find_plan("plans/CONN-01.toml").resolve() == shipped
    assert find_plan(str(shipped)) == shipped
    with pytest.raises(BadInput, match="There is no fault plan"):
        find_plan("NONE-01")
    with pytest.raises(BadInput, match="can't be read"):
        load_plan(tmp_path / "nothing.toml")


def test_the_plan_of_ten_fills_has_the_average_of_its_scenario(tmp_path: Path) -> None:
    floor = Floor(tmp_path, plan=load_plan(find_plan("LIFE-04")))
    floor.log_on()
    floor.submit(order(quantity="70"))
    fills = [(Decimal(f["quantity"]), Decimal(f["price"])) for f in floor.payloads("EXECUTION")]
    assert len(fills) == 10
    assert sum(q * p for q, p in fills) / sum(q for q, _ in fills) == Decimal(7020) / 70
