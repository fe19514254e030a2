"""`oms halt`, `oms flatten`, `oms limit` and `oms alert`."""

from __future__ import annotations

import pytest
from cli_cases import bought, oms, started, tick

from engine.db.connect import open_connection


def test_a_user_is_halted_listed_and_lifted_by_name(dsn: str) -> None:
    run_id = started(dsn, "alice", "--strategy", "cli_strategies:Buys")
    halted = oms(dsn, "halt", "--user", "alice", "--reason", "odd", "--by", "ann", "--json").json
    again = oms(dsn, "halt", "--user", "alice", "--reason", "again", "--json").json

    assert (halted["name"], halted["scope"], halted["trading_state"]) == ("user", "USER", "HALTED")
    assert again == halted
    assert oms(dsn, "halt", "list", "--json").json["halts"] == [halted]
    assert "odd" in oms(dsn, "halt", "list").out
    tick(dsn, run_id, "2024-01-05T21:00:00Z", "AAPL=250")
    orders = oms(dsn, "order", "list", "--json").json["orders"]
    assert {order["reject_code"] for order in orders} <= {"HALTED"}
    wrong = oms(dsn, "halt", "lift", "nope", "--user", "alice")
    assert (wrong.code, "no halt nope is open" in wrong.sentence) == (1, True)
    lifted = oms(dsn, "halt", "lift", "user", "--user", "alice", "--by", "ben", "--json").json
    assert [halt["lifted_by"] for halt in lifted["lifted"]] == ["ben"]
    assert oms(dsn, "halt", "list").out.strip() == "Nothing is halted."
    assert len(oms(dsn, "halt", "list", "--all", "--json").json["halts"]) == 1


def test_everything_is_halted_and_lifted(dsn: str) -> None:
    started(dsn, "alice")
    assert oms(dsn, "halt", "--everything", "--reason", "odd", "--reducing").code == 0
    scopes = [halt["scope"] for halt in oms(dsn, "halt", "list", "--json").json["halts"]]
    assert scopes == ["EVERYTHING", "EVERYTHING"]
    assert oms(dsn, "halt", "lift", "everything", "--everything").code == 0
    assert oms(dsn, "halt", "list", "--json").json["halts"] == []


def test_a_halt_says_what_it_needs(dsn: str) -> None:
    started(dsn, "alice")
    assert "say why" in oms(dsn, "halt", "--user", "alice").sentence
    assert "Usage" in oms(dsn, "halt").out
    assert "--everything" in oms(dsn, "halt", "lift", "x").sentence


def test_a_run_is_flattened_once(dsn: str) -> None:
    run_id = bought(dsn)
    first = oms(dsn, "flatten", "--run-id", run_id, "--reason", "enough", "--json").json
    second = oms(dsn, "flatten", "--run-id", run_id, "--reason", "more")
    assert (first["status"], first["repeated"]) == ("CLOSING", False)
    assert "no second one was begun" in second.out
    orders = oms(dsn, "order", "list", "--json").json["orders"]
    assert [order["side"] for order in orders if order["status"] == "NEW"] == ["SELL"]
    assert oms(dsn, "flatten", "--reason", "what").code == 2


def test_a_limit_is_added_listed_and_removed(dsn: str) -> None:
    started(dsn, "alice")
    terms = ("--user", "alice", "--symbol", "aapl")
    added = oms(dsn, "limit", "add", "max_position", *terms, "--value", "5", "--json").json
    assert (added["kind"], added["limit_value"], added["unit"]) == ("MAX_POSITION", "5", "units")
    dates = ("--from", "2024-01-01", "--until", "2024-02-01")
    assert oms(dsn, "limit", "add", "RESTRICTED_SYMBOL", *terms, *dates).code == 0
    listed = oms(dsn, "limit", "list", "--user", "alice", "--json").json["limits"]
    assert [limit["kind"] for limit in listed] == ["RESTRICTED_SYMBOL", "MAX_POSITION"]
    assert "RESTRICTED_SYMBOL" in oms(dsn, "limit", "list").out
    assert oms(dsn, "limit", "remove", added["limit_id"][:8]).code == 0
    assert len(oms(dsn, "limit", "list", "--json").json["limits"]) == 1
    for wrong in (
        ("add", "NOPE", "--user", "alice", "--value", "1"),
        ("add", "MAX_POSITION", "--user", "alice"),
        ("add", "MAX_POSITION", "--value", "1"),
        ("remove", "nope"),
    ):
        assert oms(dsn, "limit", *wrong).code in (1, 2)


def test_an_alert_is_listed_and_acknowledged(dsn: str) -> None:
    started(dsn, "alice")
    with open_connection(dsn) as conn:
        conn.execute(
            """INSERT INTO alert (user_id, code, subject, message)
               SELECT user_id, 'HEARTBEAT_LOST', n, 'silent'
               FROM app_user, unnest('{a,b}'::text[]) n"""
        )
    alerts = oms(dsn, "alert", "list", "--user", "alice", "--json").json["alerts"]
    assert [alert["code"] for alert in alerts] == ["HEARTBEAT_LOST"] * 2
    assert oms(dsn, "alert", "ack", alerts[0]["alert_id"], "--by", "ann").code == 0
    assert oms(dsn, "alert", "ack", "heartbeat_lost", "--json").code == 0
    assert oms(dsn, "alert", "list").out.strip() == "Nothing is waiting for anybody."
    told = oms(dsn, "alert", "list", "--all", "--json").json["alerts"]
    assert "ann" in {alert["acknowledged_by"] for alert in told}
    assert "no open alert" in oms(dsn, "alert", "ack", "HEARTBEAT_LOST").sentence


# --- Accounts that there are not ----------------------------------------------------------------

NO_ACCOUNT = "the user has no account 'DU9'; `oms account list` shows them."


@pytest.mark.parametrize(
    "words",
    [
        ("halt", "--reason", "odd"),
        ("flatten", "--reason", "odd"),
        ("limit", "add", "MAX_POSITION", "--value", "1"),
        ("breaker", "set", "LATENCY", "--value", "1"),
        ("reconcile", "--wait", "0"),
    ],
)
def test_an_account_that_there_is_not_is_told_in_one_sentence(
    dsn: str, words: tuple[str, ...]
) -> None:
    started(dsn, "alice")
    refused = oms(dsn, *words, "--user", "alice", "--account", "DU9")
    assert (refused.code, refused.sentence) == (1, NO_ACCOUNT)
    assert oms(dsn, "halt", "list", "--json").json["halts"] == []


# --- Circuit breakers ---------------------------------------------------------------------------


def _breakers(dsn: str) -> list[tuple[str, str | None, str | None, int | None]]:
    """Kind, account, threshold and window of what is set at all."""
    listed = oms(dsn, "breaker", "list", "--user", "alice", "--json").json["breakers"]
    return [
        (each["kind"], each["account"], each["threshold"], each["seconds"])
        for each in listed
        if each["user_id"] is not None
    ]


def test_a_breaker_is_set_for_a_user_or_an_account_and_set_back(dsn: str) -> None:
    started(dsn, "alice")
    assert oms(dsn, "account", "add", "DU1", "--user", "alice").code == 0
    whose = ("--user", "alice")
    assert _breakers(dsn) == []
    assert "by default" in oms(dsn, "breaker", "list").out
    told = oms(dsn, "breaker", "set", "daily_loss", *whose, "--value", "500").out
    assert told == "DAILY_LOSS trips at 500 currency.\n"
    of_account = ("breaker", "set", "LATENCY", *whose, "--account", "DU1")
    assert oms(dsn, *of_account, "--value", "100", "--seconds", "60").code == 0
    assert oms(dsn, *of_account, "--off").out == "LATENCY is off.\n"
    assert _breakers(dsn) == [("DAILY_LOSS", None, "500", None), ("LATENCY", "DU1", None, 300)]
    back = oms(dsn, *of_account, "--default", "--json").json
    assert (back["threshold"], back["account"]) == ("5000", None)
    assert _breakers(dsn) == [("DAILY_LOSS", None, "500", None)]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("LATENCY",), "give one of --value, --off and --default."),
        (("LATENCY", "--off", "--value", "1"), "give one of --value, --off and --default."),
        (("NOPE", "--off"), "The table breaker_kind lists the kinds of breakers."),
        (("NOPE", "--default"), "there is no breaker 'NOPE'; `oms breaker list` shows them."),
        (("HEARTBEAT", "--value", "5"), "silent is heartbeat_seconds of its account."),
        (("LATENCY", "--value", "-1"), "without one it is off."),
        (("LATENCY", "--value", "1", "--seconds", "0"), "A window is 1 to 86400 seconds."),
    ],
)
def test_a_breaker_that_cannot_be_is_one_sentence(
    dsn: str, words: tuple[str, ...], sentence: str
) -> None:
    started(dsn, "alice")
    refused = oms(dsn, "breaker", "set", *words, "--user", "alice")
    assert refused.code == 1
    assert refused.sentence.endswith(sentence)
    assert _breakers(dsn) == []
