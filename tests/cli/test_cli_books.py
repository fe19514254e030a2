"""`oms sip`, `oms order`, `oms position`, `oms equity` and `oms report`: looking at the books."""

from __future__ import annotations

from pathlib import Path

import pytest
from cli_cases import bought, counts, oms, started, tick


def _resting(dsn: str) -> str:
    """A run with a limit, a stop and a trailing order that rest."""
    run_id = started(dsn, "alice", "--name", "bids", "--strategy", "cli_strategies:BidsLow")
    for day in (5, 8, 9):
        assert tick(dsn, run_id, f"2024-01-0{day}T21:00:00Z", "AAPL=250").code == 0
    return run_id


def test_a_plan_is_added_listed_paused_and_resumed(dsn: str) -> None:
    run_id = started(dsn, "alice", "--name", "first")
    terms = ("--symbol", "aapl", "--amount", "500", "--day", "5", "--from", "2024-01-01")

    added = oms(
        dsn, "sip", "add", "--run-id", "first", *terms, "--until", "2025-01-01", "--json"
    ).json
    paused = oms(dsn, "sip", "pause", "AAPL", "--run-id", run_id, "--json").json
    while_paused = oms(dsn, "sip", "list", "--run-id", "first", "--json").json["plans"]
    resumed = oms(dsn, "sip", "resume", "AAPL", "--run-id", run_id, "--from", "2024-03-01").out

    assert (added["plan"], added["amount"], added["day_of_month"]) == ("AAPL", "500", 5)
    assert (added["start_on"], added["end_on"]) == ("2024-01-01", "2025-01-01")
    assert paused == {"run_id": run_id, "plan": "AAPL", "status": "PAUSED"}
    assert [plan["status"] for plan in while_paused] == ["PAUSED"]
    assert resumed == f"Plan AAPL of run {run_id} is ACTIVE.\n"
    (plan,) = oms(dsn, "sip", "list", "--json").json["plans"]
    assert (plan["status"], plan["start_on"]) == ("ACTIVE", "2024-03-01")
    assert "AAPL" in oms(dsn, "sip", "list").out


def test_a_plan_says_what_it_will_do_from_today_on(dsn: str) -> None:
    started(dsn, "alice", "--name", "first")
    terms = ("--symbol", "AAPL", "--amount", "500", "--name", "monthly", "--missed", "run-once")

    told = oms(dsn, "sip", "add", "--run-id", "first", *terms).out

    assert told.startswith("Plan monthly buys AAPL for 500.00 USD on day 1 of every month from ")
    (plan,) = oms(dsn, "sip", "list", "--json").json["plans"]
    assert (plan["missed_policy"], plan["executed"]) == ("RUN_ONCE", 0)
    assert oms(dsn, "sip", "resume", "monthly", "--run-id", "first").code == 0


def test_a_plan_that_does_not_fit_is_refused(dsn: str) -> None:
    run_id = started(dsn)
    good = {"--symbol": "AAPL", "--amount": "500"}
    before = counts(dsn)

    for option, value, told in (
        ("--symbol", "NOPE", "unknown symbol NOPE"),
        ("--symbol", "a b!", "isn't a symbol"),
        ("--amount", "0", "sip_plan_amount_positive"),
        ("--amount", "lots", "isn't a number"),
        ("--from", "01/02/2024", "isn't a day"),
        ("--missed", "maybe", "sip_plan_missed_policy_known"),
        ("--until", "1999-01-01", "sip_plan_ends_after_it_starts"),
        ("--name", "@", "sip_plan_plan_format"),
    ):
        words = [word for pair in (good | {option: value}).items() for word in pair]
        refused = oms(dsn, "sip", "add", "--run-id", run_id, *words)
        assert refused.code == 1
        assert told in refused.sentence

    assert "oms sip list" in oms(dsn, "sip", "pause", "NOPE", "--run-id", run_id).sentence
    assert counts(dsn) == before


def test_a_plan_of_the_same_name_is_refused(dsn: str) -> None:
    bought(dsn)

    again = ("sip", "add", "--run-id", "first", "--symbol", "AAPL", "--amount", "1")

    assert oms(dsn, *again, "--json").error["type"] == "AlreadyHappened"


def test_plans_tell_what_became_of_them(dsn: str) -> None:
    bought(dsn)
    assert tick(dsn, "first", "2024-02-05T21:00:00Z", "AAPL=250").code == 0

    (plan,) = oms(dsn, "sip", "list", "--json").json["plans"]

    assert (plan["executed"], plan["rejected"], plan["skipped"]) == (2, 0, 0)
    assert plan["last_logical_time"] == "2024-02-05T21:00:00Z"


def test_orders_are_listed_by_run_status_and_symbol(dsn: str) -> None:
    bought(dsn)
    bob = started(dsn, "bob", "--name", "bobs", "--strategy", "cli_strategies:Buys")
    assert tick(dsn, bob, "2024-01-05T21:00:00Z", "AAPL=250").code == 0

    def listed(*options: str) -> list[tuple[str, str]]:
        orders = oms(dsn, "order", "list", *options, "--json").json["orders"]
        return [(order["run_name"], order["status"]) for order in orders]

    assert sorted(listed()) == [("bobs", "FILLED"), ("bobs", "REJECTED"), ("first", "FILLED")]
    assert sorted(listed("--run-id", "bobs")) == [("bobs", "FILLED"), ("bobs", "REJECTED")]
    assert listed("--status", "rejected") == [("bobs", "REJECTED")]
    assert listed("--symbol", "ibm") == []
    assert len(listed("--limit", "1")) == 1
    assert oms(dsn, "order", "list", "--status", "nope").code == 1
    assert oms(dsn, "order", "list", "--symbol", "IBM").out == "There are no such orders.\n"
    table = oms(dsn, "order", "list", "--status", "rejected").out
    assert "INSUFFICIENT_CASH" in table


def test_an_order_is_shown_with_its_executions_and_events(dsn: str) -> None:
    bought(dsn)
    (order,) = oms(dsn, "order", "list", "--json").json["orders"]
    order_id = order["order_id"]

    shown = oms(dsn, "order", "show", order_id, "--json").json
    text = oms(dsn, "order", "show", order_id[:30], "--run-id", "first").out

    assert shown["avg_fill_price"] == "250"
    assert [execution["quantity"] for execution in shown["executions"]] == ["2"]
    assert [event["event_type"] for event in shown["events"]] == ["ORDER_PLACED", "EXECUTION"]
    for word in (order_id, "BUY 2 AAPL", "FILLED", "2 at 250.00 on average", "Executions"):
        assert word in text


def test_an_order_that_is_none_or_many_is_refused(dsn: str) -> None:
    run_id = _resting(dsn)
    ids = [order["order_id"] for order in oms(dsn, "order", "list", "--json").json["orders"]]

    nothing = oms(dsn, "order", "show", "ffff")
    no_id = oms(dsn, "order", "show", "xyz")
    many = oms(dsn, "order", "show", ids[0][:4], "--run-id", run_id)

    assert (nothing.code, no_id.code, many.code) == (1, 1, 1)
    assert "oms order list" in nothing.sentence
    assert "oms order list" in no_id.sentence
    assert all(order_id in many.sentence for order_id in ids)


def test_every_term_of_an_order_is_shown(dsn: str) -> None:
    _resting(dsn)
    orders = oms(dsn, "order", "list", "--json").json["orders"]

    shown = "".join(oms(dsn, "order", "show", order["order_id"]).out for order in orders)

    for words in ("LIMIT GTC", "STOP GTC", "TRAIL GTC", "Limit price", "900.00", "5 %", "mine"):
        assert words in shown


def test_positions_are_valued_at_their_marks(dsn: str) -> None:
    bought(dsn)
    assert tick(dsn, "first", "2024-01-08T21:00:00Z", "AAPL=260").code == 0

    (position,) = oms(dsn, "position", "list", "--run-id", "first", "--json").json["positions"]
    table = oms(dsn, "position", "list").out

    assert position["quantity"] == "2"
    assert (position["avg_cost"], position["mark_price"]) == ("250", "260")
    assert (position["market_value"], position["unrealized_pnl"]) == ("520", "20")
    assert "520.00" in table


def test_nothing_held_is_said(dsn: str) -> None:
    started(dsn)

    assert oms(dsn, "position", "list", "--closed").out == "Nothing is held.\n"
    assert oms(dsn, "position", "list", "--json").json == {"positions": []}


def test_equity_is_drawn_and_listed(dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    bought(dsn)
    assert tick(dsn, "first", "2024-01-08T21:00:00Z", "AAPL=260").code == 0

    drawn = oms(dsn, "equity", "--run-id", "first", "--height", "10").out
    marks = oms(dsn, "equity", "--run-id", "first", "--json").json

    assert "$10,020.00" in drawn
    assert "\x1b" not in drawn
    assert len(drawn.splitlines()) == 10
    assert max(map(len, drawn.splitlines())) <= 60
    assert [mark["equity"] for mark in marks["equity"]] == ["10000", "10020"]
    assert marks["equity"][0]["at"] == "2024-01-05T21:00:00Z"


def test_a_run_without_a_mark_has_no_chart(dsn: str) -> None:
    started(dsn, "alice", "--name", "first")

    assert "has no mark yet" in oms(dsn, "equity", "--run-id", "first").out


def test_a_report_is_one_file(dsn: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run_id = bought(dsn)

    told = oms(dsn, "report", "--run-id", "first").out
    named = oms(
        dsn, "report", "--run-id", "first", "--run-id", run_id, "--output", "a/b.html", "--json"
    ).json

    assert told == "The report is in oms-first.html; open it in a browser.\n"
    assert "<title>Run report: first</title>" in Path("oms-first.html").read_text()
    assert named == {"path": str(tmp_path / "a" / "b.html"), "runs": [run_id, run_id]}
    assert Path("a/b.html").exists()


def test_a_report_that_can_not_be_written_is_named(dsn: str, tmp_path: Path) -> None:
    bought(dsn)
    (tmp_path / "file").write_text("")

    refused = oms(dsn, "report", "--run-id", "first", "--output", str(tmp_path / "file" / "r.html"))

    assert refused.code == 2
    assert f"({tmp_path}/file/r.html)" in refused.sentence
