"""`oms user` and `oms run`: people, and the lives of their runs."""

from __future__ import annotations

from pathlib import Path

import pytest
import typer
from cli_cases import bought, counts, oms, process, stamp, started, tick

from cli.database import acting, owning, reading
from engine import reads
from engine.db.connect import Connection, open_connection
from engine.ids import user_id_of


def _status(conn: Connection, run_id: str) -> str:
    row = conn.execute("SELECT status FROM strategy_run WHERE run_id = %s", [run_id]).fetchone()
    assert row is not None
    status: str = row[0]
    return status


@pytest.mark.scenario("RL-08")
def test_a_run_is_started(dsn: str, owner_conn: Connection) -> None:
    stamp(dsn)
    env = {"DB_DSN": dsn}
    assert process("user", "add", "alice", env=env).code == 0

    begun = process(
        "run", "start", "--user", "alice", "--cash", "10000", "--name", "first", "--json", env=env
    )

    assert begun.code == 0
    run_id = begun.json["run_id"]
    assert begun.json["status"] == "RUNNING"
    assert begun.json["cash"] == "10000"
    assert _status(owner_conn, run_id) == "RUNNING"
    health = owner_conn.execute("SELECT count(*) FROM engine_status WHERE run_id = %s", [run_id])
    assert health.fetchone() == (1,)


@pytest.mark.scenario("RL-09")
def test_a_run_is_stopped_and_never_written_again(dsn: str, owner_conn: Connection) -> None:
    run_id = started(dsn)

    stopped = process("run", "stop", run_id, "--json", env={"DB_DSN": dsn})

    assert stopped.code == 0
    assert stopped.json["status"] == "STOPPED"
    assert _status(owner_conn, run_id) == "STOPPED"
    before = counts(dsn)
    late = tick(dsn, run_id, "2024-01-05T21:00:00Z", "AAPL=250")
    assert late.code == 1
    assert late.error["type"] == "RunNotRunning"
    assert oms(dsn, "run", "stop", run_id, "--json").error["type"] == "RunNotRunning"
    assert counts(dsn) == before


def test_a_user_is_added_once(dsn: str) -> None:
    first = oms(dsn, "user", "add", "alice", "--json")
    again = oms(dsn, "user", "add", "alice", "--json")

    assert first.json == {"user_id": str(user_id_of("alice")), "name": "alice", "created": True}
    assert again.json == {**first.json, "created": False}
    assert "they were there already" in oms(dsn, "user", "add", "alice").out
    assert "alice" in oms(dsn, "user", "list").out
    listed = oms(dsn, "user", "list", "--json").json["users"]
    assert [(user["name"], user["runs"], user["running_run_id"]) for user in listed] == [
        ("alice", 0, None)
    ]


def test_a_name_that_is_none_is_refused(dsn: str) -> None:
    for name in ("", " ", "a\nb", "x" * 101):
        refused = oms(dsn, "user", "add", name)
        assert refused.code == 1
        assert "app_user_name_printable" in refused.sentence
    assert counts(dsn)["app_user"] == 0


def test_a_start_needs_a_user_that_is_there(dsn: str) -> None:
    refused = oms(dsn, "run", "start", "--user", "nobody")

    assert refused.code == 1
    assert "oms user add nobody" in refused.sentence


TERMS_THAT_DO_NOT_FIT = {
    ("--strategy", "nope"): "unknown strategy 'nope'",
    ("--strategy", "no.such:Thing"): "can't be imported",
    ("--strategy", "rebalance"): "weights",
    ("--param", "x=1"): "x: Extra inputs",
    ("--param", "x"): "isn't an assignment",
    ("--params", "[1]"): "no JSON object",
    ("--cash", "NaN"): "isn't a number",
    ("--cash", "1e30"): "too large",
    ("--cash", "-5"): "strategy_run_",
    ("--calendar", "XNYX"): "XNYS",
    ("--paper", '{"slippage": {"model": "MAGIC"}}'): "paper setting slippage",
    ("--account-type", "gift"): "strategy_run_account_type_known",
    ("--tick-at", "noon"): "strategy_run_tick_at_known",
}


def test_terms_that_do_not_fit_make_no_run(dsn: str) -> None:
    assert oms(dsn, "user", "add", "alice").code == 0

    for options, told in TERMS_THAT_DO_NOT_FIT.items():
        refused = oms(dsn, "run", "start", "--user", "alice", *options)
        assert refused.code == 1
        assert told in refused.sentence

    assert counts(dsn)["strategy_run"] == 0


def test_people_are_told_what_became_of_a_run_and_what_to_do_next(dsn: str) -> None:
    oms(dsn, "user", "add", "alice")

    begun = oms(dsn, "run", "start", "--user", "alice", "--cash", "10000", "--name", "first").out
    stopped = oms(dsn, "run", "stop", "first").out
    weights = ("--strategy", "rebalance", "--param", "weights.AAPL=1")
    other = oms(dsn, "run", "start", "--user", "alice", *weights).out
    deleted = oms(dsn, "run", "delete", "first", "--yes").out

    assert " of alice is RUNNING: sip, 10,000.00 USD, calendar XNYS.\nNext: oms sip add" in begun
    assert stopped.endswith(" is STOPPED; its equity was 10,000.00 USD.\n")
    assert "\nNext: oms tick --run-id " in other
    assert deleted.endswith(" is deleted, with everything in it.\n")


def test_a_second_running_run_leaves_nothing(dsn: str) -> None:
    started(dsn)

    assert oms(dsn, "run", "start", "--user", "alice").code == 1
    assert counts(dsn)["strategy_run"] == 1


def test_parameters_come_in_pieces_or_as_a_whole(dsn: str) -> None:
    pieces = ("--param", "weights.AAPL=0.6", "--param", "weights.ibm=0.4")
    run_id = started(dsn, "alice", "--strategy", "rebalance", *pieces, "--param", "period=YEARLY")
    whole = ("--params", '{"weights": {"AAPL": 0.6, "IBM": 0.4}, "period": "YEARLY"}')
    other = started(dsn, "bob", "--strategy", "rebalance", *whole)

    shown = [oms(dsn, "run", "show", run, "--json").json["parameters"] for run in (run_id, other)]

    assert shown[0] == shown[1]
    assert shown[0]["period"] == "YEARLY"


def test_a_strategy_of_ones_own_lies_in_the_current_folder(dsn: str, tmp_path: Path) -> None:
    stamp(dsn)
    (tmp_path / "mine_alone.py").write_text(
        "from engine.strategies.base import Strategy\nclass Mine(Strategy): pass\n"
    )
    assert process("user", "add", "alice", env={"DB_DSN": dsn}).code == 0
    arguments = ("run", "start", "--user", "alice", "--strategy", "mine_alone:Mine", "--json")

    elsewhere = process(*arguments, env={"DB_DSN": dsn})
    here = process(*arguments, env={"DB_DSN": dsn}, cwd=tmp_path)

    assert elsewhere.error["type"] == "BadInput"
    assert here.json["strategy"] == "mine_alone:Mine"


def test_every_term_of_a_run_is_taken(dsn: str) -> None:
    run_id = started(
        dsn,
        "alice",
        *("--account-type", "margin", "--calendar", "nse", "--currency", "inr"),
        *("--tick-at", "open", "--name", "mine", "--paper", '{"max_volume_share": "0.5"}'),
    )

    shown = oms(dsn, "run", "show", "mine", "--json").json

    assert shown["run_id"] == run_id
    assert (shown["account_type"], shown["calendar"], shown["currency"]) == (
        "MARGIN",
        "XNSE",
        "INR",
    )
    assert shown["tick_at"] == "OPEN"


def test_runs_are_listed_newest_first_and_by_user_and_status(dsn: str) -> None:
    first = started(dsn, "alice")
    oms(dsn, "run", "stop", first)
    second = started(dsn, "alice")
    third = started(dsn, "bob")

    def listed(*options: str) -> list[str]:
        runs = oms(dsn, "run", "list", *options, "--json").json["runs"]
        return [run["run_id"] for run in runs]

    assert listed() == [third, second, first]
    assert listed("--user", "alice") == [second, first]
    assert listed("--status", "running") == [third, second]
    assert listed("--limit", "1") == [third]
    assert listed("--user", "nobody") == []
    wrong = oms(dsn, "run", "list", "--status", "runing")
    assert wrong.code == 1
    assert "RUNNING" in wrong.sentence


def test_a_list_in_a_pipe_holds_whole_ids(dsn: str) -> None:
    run_id = started(dsn, "alice", "--name", "first")

    listed = process("run", "list", env={"DB_DSN": dsn, "COLUMNS": "40"})

    assert run_id in listed.out
    assert "\x1b" not in listed.out
    assert len(listed.out.splitlines()) == 2


def test_a_run_is_named_by_id_first_digits_or_name(dsn: str) -> None:
    run_id = bought(dsn)

    named = (run_id, run_id.upper(), run_id.replace("-", ""), run_id[:8], run_id[:4], "first")
    shown = [oms(dsn, "run", "show", name, "--json").json["run_id"] for name in named]

    assert shown == [run_id] * len(named)
    assert oms(dsn, "run", "show", "--run-id", "first", "--json").json["run_id"] == run_id


def test_a_run_that_is_none_is_refused(dsn: str) -> None:
    started(dsn)
    for name in ("nothing", "abc", "00000000-0000-0000-0000-000000000000", "g123", " "):
        refused = oms(dsn, "run", "show", name)
        assert refused.code == 1
        assert "oms run list" in refused.sentence


def test_a_name_of_two_runs_is_refused_with_both_ids(dsn: str) -> None:
    first = started(dsn, "alice", "--name", "same")
    second = started(dsn, "bob", "--name", "same")

    refused = oms(dsn, "run", "show", "same")

    assert refused.code == 1
    assert first in refused.sentence
    assert second in refused.sentence


def test_a_run_is_shown_with_all_that_it_has(dsn: str) -> None:
    run_id = bought(dsn)

    shown = oms(dsn, "run", "show", run_id, "--json").json
    text = oms(dsn, "run", "show", run_id).out

    assert shown["cash"] == "9500"
    assert shown["equity"] == "10000"
    assert shown["orders"] == {"FILLED": 1}
    assert (shown["ticks"], shown["executions"]) == (1, 1)
    assert shown["last_logical_time"] == "2024-01-05T21:00:00Z"
    assert [position["quantity"] for position in shown["positions"]] == ["2"]
    assert [plan["executed"] for plan in shown["plans"]] == [1]
    assert shown["events"][0]["event_type"] == "TICK"
    assert oms(dsn, "run", "show", run_id, "--events", "0", "--json").json["events"] == []
    with open_connection(dsn) as conn:
        executions = reads.list_events(conn, reads.find_run(conn, run_id), event_type="execution")
    assert [event.payload["symbol"] for event in executions] == ["AAPL"]
    for word in (run_id, "RUNNING", "10,000.00 USD", "1 FILLED", "Positions", "Plans", "AAPL"):
        assert word in text


def test_a_run_that_failed_shows_its_error(dsn: str) -> None:
    run_id = started(dsn, "alice", "--strategy", "cli_strategies:Raises")

    failed = tick(dsn, run_id, "2024-01-05T21:00:00Z", "AAPL=250")

    assert failed.code == 1
    assert failed.error["type"] == "StrategyFailed"
    assert "ValueError('on purpose')" in failed.error["message"]
    shown = oms(dsn, "run", "show", run_id)
    assert "ERROR" in shown.out
    assert "on purpose" in shown.out


def test_open_orders_and_what_they_reserve_are_shown(dsn: str) -> None:
    run_id = started(dsn, "alice", "--strategy", "cli_strategies:BidsLow")
    assert tick(dsn, run_id, "2024-01-05T21:00:00Z", "AAPL=250").code == 0

    shown = oms(dsn, "run", "show", run_id).out
    stopped = oms(dsn, "run", "stop", run_id)

    assert "1 PENDING" in shown
    assert "100.00 reserved by open orders" in shown
    assert stopped.code == 0
    orders = oms(dsn, "order", "list", "--status", "canceled", "--json").json["orders"]
    assert [order["status_reason"] for order in orders] == ["RUN_STOPPED"]


def test_a_run_is_deleted_with_everything_by_its_owner(dsn: str) -> None:
    before = counts(dsn)
    run_id = bought(dsn)

    assert oms(dsn, "run", "delete", run_id, "--yes").code == 1, "it is RUNNING"
    assert oms(dsn, "run", "stop", run_id).code == 0
    unasked = oms(dsn, "run", "delete", run_id)
    deleted = oms(dsn, "run", "delete", run_id, "--yes", "--json")

    assert unasked.code == 2
    assert "--yes" in unasked.sentence
    assert deleted.json == {"run_id": run_id, "deleted": True}
    grown = {"app_user", "calendar_session", "instrument", "alembic_version"}
    after = counts(dsn)
    assert {table for table in after if after[table] != before.get(table, 0)} <= grown
    assert oms(dsn, "run", "show", run_id).code == 1


@pytest.mark.parametrize(("answer", "code", "left"), [(True, 0, 0), (False, 1, 1)])
def test_a_person_is_asked_before_history_goes(
    dsn: str, monkeypatch: pytest.MonkeyPatch, answer: bool, code: int, left: int
) -> None:
    run_id = started(dsn, "alice", "--name", "first")
    oms(dsn, "run", "stop", run_id)
    asked: list[str] = []

    def confirm(question: str, *, abort: bool) -> None:
        asked.append(question)
        if abort and not answer:
            raise typer.Abort

    monkeypatch.setattr("cli.run.is_terminal", lambda: True)
    monkeypatch.setattr("typer.confirm", confirm)

    deleted = oms(dsn, "run", "delete", "first")

    assert asked == [f"Delete run {run_id} (first) with all of its history?"]
    assert deleted.code == code
    assert counts(dsn)["strategy_run"] == left


def test_reading_commands_read_as_the_auditor(dsn: str) -> None:
    started(dsn)
    acts = {"reading": reading, "acting": acting, "owning": owning}

    found = {}
    for name, connect in acts.items():
        with connect(dsn) as conn:
            found[name] = conn.execute("SELECT current_user").fetchone()

    assert found == {
        "reading": ("oms_auditor",),
        "acting": ("oms_engine",),
        "owning": ("oms_owner",),
    }


def test_a_newer_schema_is_not_touched(dsn: str) -> None:
    stamp(dsn)
    with open_connection(dsn) as owner:
        owner.execute("UPDATE alembic_version SET version_num = '9999'")

    refused = oms(dsn, "run", "list")

    assert refused.code == 2
    assert "upgrade oms" in refused.sentence
