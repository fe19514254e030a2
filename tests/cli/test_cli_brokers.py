"""`oms account`, `oms order place/cancel/modify` and `oms work --once`."""

from __future__ import annotations

import pytest
from cli_cases import Result, oms, started

from engine.brokers.protocol import KINDS
from engine.brokers.registry import ADAPTERS
from engine.db.connect import open_connection


def _add(dsn: str, account: str = "DU1", *words: str) -> Result:
    return oms(dsn, "account", "add", account, "--user", "alice", *words)


def _live(dsn: str) -> str:
    """A run of alice at an account that is always open; its id."""
    paper = started(dsn)
    assert oms(dsn, "run", "stop", paper).code == 0
    assert _add(dsn, "DU1", "--calendar", "24/7", "--cash", "50000").code == 0
    words = ("--user", "alice", "--name", "live", "--account", "DU1", "--cash", "10000")
    made = oms(dsn, "run", "start", *words, "--json")
    assert made.err == ""
    run_id: str = made.json["run_id"]
    return run_id


def _place(dsn: str, *words: str) -> Result:
    given = ("--symbol", "AAPL", "--type", "lmt", "--limit-price", "100", "--quantity", "2")
    return oms(dsn, "order", "place", "--run-id", "live", *given, *words, "--json")


# --- Accounts ---------------------------------------------------------------------------------


def test_an_account_is_added_and_listed(dsn: str) -> None:
    started(dsn)
    hours = ("--hours", "09:30-16:00", "--time-zone", "America/New_York")
    added = _add(dsn, "DU1", "--cash", "1000.50", *hours, "--settings", '{"port": 7500}')
    assert (added.code, "Account DU1 of alice is at dummy." in added.out) == (0, True)
    more = ("--currency", "eur", "--out-of-session", "refuse", "--orders-per-second", "3")
    assert _add(dsn, "DU2", *more, "--json").json == {
        "user": "alice",
        "account": "DU2",
        "broker": "dummy",
    }
    first, second = oms(dsn, "account", "list", "--user", "alice", "--json").json["accounts"]
    assert (first["account"], first["opening_cash"]) == ("DU1", "1000.5")
    assert (first["opens_at"], first["closes_at"]) == ("09:30:00", "16:00:00")
    assert (first["time_zone"], first["settings"]) == ("America/New_York", {"port": 7500})
    assert (first["connected"], first["out_of_session"]) == (False, "QUEUE")
    assert (second["currency"], second["out_of_session"]) == ("EUR", "REFUSE")
    assert second["orders_per_second"] == 3
    listed = oms(dsn, "account", "list").out
    assert "DU1" in listed
    assert "DU2" in listed


def test_without_accounts_it_says_how_to_add_one(dsn: str) -> None:
    started(dsn)
    assert "oms account add" in oms(dsn, "account", "list").out
    assert oms(dsn, "account", "list", "--json").json == {"accounts": []}


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--broker", "nope"), "there is no kind of broker 'nope'; there are: dummy."),
        (
            ("--broker", "paper"),
            "the paper book needs no account; start the run without",
        ),
        (("--time-zone", "Mars/Base"), '"Mars/Base" not recognized'),
        (("--calendar", "MARS"), "There is no exchange calendar 'MARS'"),
        (("--hours", "9 to 5"), "The hours '9 to 5' can't be read; write them as 09:00-17:00."),
        (("--hours", "09:00"), "write them as 09:00-17:00."),
        (("--hours", "25:00-26:00"), "write them as 09:00-17:00."),
        (("--hours", "09:00-09:00"), "write them as 09:00-17:00."),
        (("--hours", "09:00Z-17:00Z"), "write them as 09:00-17:00."),
        (("--hours", ""), "write them as 09:00-17:00."),
        (("--cash", "lots"), "The cash 'lots' isn't a number"),
        (("--currency", "dollar"), "broker_account_currency_format"),
        (("--out-of-session", "MAYBE"), "broker_account_out_of_session_known"),
        (("--orders-per-second", "0"), "broker_account_rates_positive"),
        (("--settings", "[]"), "is no JSON object"),
        (("--settings", "{"), "isn't JSON"),
    ],
)
def test_what_is_wrong_with_an_account_is_one_sentence(
    dsn: str, words: tuple[str, ...], sentence: str
) -> None:
    started(dsn)
    refused = _add(dsn, "DU1", *words)
    assert refused.code == 1
    assert sentence in refused.sentence
    assert oms(dsn, "account", "list", "--json").json == {"accounts": []}


def test_an_account_is_somebodys_and_is_added_once(dsn: str) -> None:
    started(dsn)
    assert "there is no user 'bob'" in oms(dsn, "account", "add", "X", "--user", "bob").sentence
    assert _add(dsn).code == 0
    assert "already exists" in _add(dsn).sentence
    assert "broker_account_account_format" in _add(dsn, "DU 1").sentence


def test_every_kind_of_broker_has_its_adapter() -> None:
    assert set(ADAPTERS) == KINDS


# --- Orders -----------------------------------------------------------------------------------


def test_an_order_is_placed_modified_and_cancelled(dsn: str) -> None:
    _live(dsn)
    placed = _place(dsn).json
    order_id = placed["order_id"]
    assert (placed["status"], placed["limit_price"], placed["quantity"]) == ("NEW", "100", "2")
    terms = ("--limit-price", "99.5", "--quantity", "3", "--version", "1")
    changed = oms(dsn, "order", "modify", order_id, *terms, "--json").json
    assert changed == {"order_id": order_id, "result": "MODIFIED"}
    with open_connection(dsn) as conn:
        # Nobody has taken it, so that one command says it all.
        rows = conn.execute("SELECT kind, payload FROM broker_command").fetchall()
    ((kind, payload),) = rows
    assert (kind, payload["limit_price"], payload["quantity"]) == ("SUBMIT", "99.5", "3")
    assert oms(dsn, "order", "cancel", order_id[:13], "--json").json["result"] == "CANCELED"
    # However often it is asked for.
    for _ in range(3):
        again = oms(dsn, "order", "cancel", order_id)
        assert (again.code, again.out) == (0, f"Order {order_id}: CANCEL_IGNORED.\n")
    with open_connection(dsn) as conn:
        rows = conn.execute("SELECT outcome FROM broker_command").fetchall()
    assert rows == [("WITHDRAWN",)]


def test_what_the_gate_refuses_is_told_with_its_reason(dsn: str) -> None:
    _live(dsn)
    refused = _place(dsn, "--quantity", "1000").json
    assert (refused["status"], refused["reject_code"]) == ("REJECTED", "INSUFFICIENT_CASH")
    words = ("--symbol", "AAPL", "--type", "limit")
    bare = oms(dsn, "order", "place", "--run-id", "live", *words).out
    assert bare.rstrip().endswith("is REJECTED: LIMIT_PRICE_MISSING.")
    assert oms(dsn, "halt", "--user", "alice", "--reason", "odd").code == 0
    assert _place(dsn).json["reject_code"] == "HALTED"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--side", "HOLD"), "'HOLD' is none of BUY, SELL."),
        (("--type", "WHAT"), "'WHAT' is none of MARKET, LIMIT, STOP, STOP_LIMIT, TRAIL."),
        (("--tif", "WHAT"), "'WHAT' is none of DAY, GTC, IOC, FOK"),
        (("--quantity", "x"), "The quantity 'x' isn't a number"),
        (("--limit-price", "x"), "The limit price 'x' isn't a number"),
        (("--run-id", "nope"), "there is no run 'nope'"),
    ],
)
def test_an_order_that_cannot_be_read_is_one_sentence(
    dsn: str, words: tuple[str, ...], sentence: str
) -> None:
    _live(dsn)
    given = ("--run-id", "live", "--symbol", "AAPL", *words)
    refused = oms(dsn, "order", "place", *given)
    assert refused.code == 1
    assert sentence in refused.sentence
    assert oms(dsn, "order", "list", "--json").json == {"orders": []}


def test_an_order_is_not_modified_on_a_guess(dsn: str) -> None:
    run_id = _live(dsn)
    order_id = _place(dsn).json["order_id"]

    def modify(*words: str) -> str:
        refused = oms(dsn, "order", "modify", *words)
        assert refused.code == 1
        return refused.sentence

    assert "nothing is to be modified" in modify(order_id)
    assert "is at version 1, not 9" in modify(order_id, "--quantity", "3", "--version", "9")
    assert "isn't a number" in modify(order_id, "--quantity", "x")
    assert "there is no order 'nope'" in modify("nope", "--quantity", "3")
    assert "there is no order 'nope'" in oms(dsn, "order", "cancel", "nope").sentence
    order = oms(dsn, "order", "show", order_id, "--json").json
    assert (order["quantity"], order["limit_price"]) == ("2", "100")
    assert oms(dsn, "order", "cancel", order_id).code == 0
    assert "is CANCELED" in modify(order_id, "--quantity", "3")
    assert oms(dsn, "run", "stop", run_id).code == 0
    stopped = oms(dsn, "order", "place", "--run-id", "live", "--symbol", "AAPL")
    assert "is STOPPED" in stopped.sentence


def test_a_run_needs_accounts_that_there_are(dsn: str) -> None:
    run_id = started(dsn)
    assert oms(dsn, "run", "stop", run_id).code == 0
    refused = oms(dsn, "run", "start", "--user", "alice", "--account", "DU9", "--cash", "1")
    assert refused.sentence == "there is no account DU9; `oms account add` makes one."
    unknown = oms(dsn, "connect", "--user", "alice", "--account", "DU9")
    assert "the user has no account 'DU9'" in unknown.sentence


# --- The worker -------------------------------------------------------------------------------


def test_work_takes_in_what_is_there_and_ends(dsn: str) -> None:
    run_id = _live(dsn)
    assert oms(dsn, "work", "--once", "--json").json == {"events": 0}
    order_id = _place(dsn).json["order_id"]
    with open_connection(dsn) as conn:
        conn.execute(
            """WITH sent AS (
                   UPDATE broker_command SET claimed_by = gen_random_uuid(), outcome = 'SENT',
                          claimed_at = now(), sent_at = now(), done_at = now()
                   WHERE order_id = %s RETURNING user_id, account, claimed_by)
               INSERT INTO broker_event (user_id, account, number, holder, kind, order_ref,
                                         broker_order_id, payload, event_at, received_at)
               SELECT user_id, account, 1, claimed_by, 'ORDER_STATUS', %s, 1,
                      '{"status": "ROUTED", "filled": "0", "remaining": "2"}', now(), now()
               FROM sent""",
            [order_id, order_id],
        )
    done = oms(dsn, "work", "--once")
    assert (done.code, done.out) == (0, "1 word of brokers taken in.\n")
    listed = oms(dsn, "order", "list", "--run-id", run_id, "--status", "routed", "--json").json
    assert [order["order_id"] for order in listed["orders"]] == [order_id]
    assert oms(dsn, "work", "--once").out == "0 words of brokers taken in.\n"


@pytest.mark.parametrize("part", ["3/2", "0/1", "x", "1"])
def test_a_part_that_is_none_is_refused(dsn: str, part: str) -> None:
    refused = oms(dsn, "work", "--once", "--part", part)
    assert refused.code == 2
    assert f"{part!r} is no part of a whole" in refused.sentence
