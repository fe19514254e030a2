"""`oms account`, `oms order place/cancel/modify` and `oms work --once`."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
from cli_cases import Result, oms, started
from waits import wait_until

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
        (("--orders-per-second", "0"), "Let it send 1 to 10000 new orders"),
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


# --- What a person asks of the orders, and of the broker ----------------------------------------


def _orders(dsn: str) -> dict[str, str]:
    listed = oms(dsn, "order", "list", "--run-id", "live", "--json").json["orders"]
    return {order["order_id"]: order["status"] for order in listed}


def test_a_modification_that_the_gate_refuses_is_a_refusal(dsn: str) -> None:
    _live(dsn)
    order_id = _place(dsn).json["order_id"]
    refused = oms(dsn, "order", "modify", order_id, "--quantity", "1000")
    assert refused.code == 1
    assert refused.sentence.startswith(f"order {order_id} keeps its terms: INSUFFICIENT_CASH")
    told = oms(dsn, "order", "modify", order_id, "--quantity", "1000", "--json")
    assert (told.code, told.error["type"]) == (1, "BadInput")
    order = oms(dsn, "order", "show", order_id, "--json").json
    assert (order["quantity"], order["status"]) == ("2", "NEW")
    assert "MODIFY_REFUSED" in [event["event_type"] for event in order["events"]]


def test_all_open_orders_of_a_run_are_cancelled(dsn: str) -> None:
    _live(dsn)
    assert oms(dsn, "order", "cancel-all", "--run-id", "live").out == "No order is open.\n"
    over, *wanted = [_place(dsn).json["order_id"] for _ in range(3)]
    assert oms(dsn, "order", "cancel", over).code == 0
    done = oms(dsn, "order", "cancel-all", "--run-id", "live", "--json")
    assert done.code == 0
    assert done.json == {
        "orders": [{"order_id": each, "result": "CANCELED"} for each in sorted(wanted)]
    }
    assert set(_orders(dsn).values()) == {"CANCELED"}
    again = _place(dsn).json["order_id"]
    said = oms(dsn, "order", "cancel-all", "--run-id", "live").out
    assert said == f"Order {again}: CANCELED.\n"
    assert "there is no run 'nope'" in oms(dsn, "order", "cancel-all", "--run-id", "nope").sentence


_ANSWER = """
    WITH asked AS (
        UPDATE broker_command SET claimed_by = gen_random_uuid(), outcome = 'SENT',
               claimed_at = clock_timestamp(), sent_at = clock_timestamp(),
               done_at = clock_timestamp()
        WHERE kind = 'SNAPSHOT' AND done_at IS NULL
        RETURNING user_id, account, claimed_by, payload ->> 'snapshot_id' AS snapshot_id)
    INSERT INTO broker_event (user_id, account, number, holder, kind, payload, event_at,
                              received_at)
    SELECT a.user_id, a.account,
           (SELECT coalesce(max(number), 0) + 1 FROM broker_event e WHERE e.user_id = a.user_id),
           a.claimed_by, 'SNAPSHOT',
           jsonb_build_object('snapshot_id', a.snapshot_id, 'part', 1, 'parts', 1,
               'taken_at', clock_timestamp(), 'open_orders', '[]'::jsonb, 'executions',
               '[]'::jsonb, 'positions', %s::jsonb, 'cash', '{"USD": "50000"}'::jsonb),
           clock_timestamp(), clock_timestamp()
    FROM asked a RETURNING number"""


@contextmanager
def _a_broker_that_answers(dsn: str, positions: str) -> Iterator[None]:
    """What a connector would do with one question: answer it as soon as it is asked."""
    with ThreadPoolExecutor(1) as other, open_connection(dsn) as conn:
        answer = other.submit(
            wait_until, lambda: conn.execute(_ANSWER, [positions]).fetchall(), "a question"
        )
        yield
        answer.result()


@pytest.mark.parametrize("dry", [(), ("--dry-run",)])
@pytest.mark.parametrize(
    ("positions", "code", "classes"),
    [("[]", 0, []), ('[{"symbol": "AAPL", "quantity": "3"}]', 1, ["POSITION_DIFFERS"])],
)
def test_books_are_compared_on_demand(
    dsn: str, dry: tuple[str, ...], positions: str, code: int, classes: list[str]
) -> None:
    _live(dsn)
    words = ("reconcile", "--account", "DU1", "--user", "alice", *dry)
    with _a_broker_that_answers(dsn, positions):
        done = oms(dsn, *words, "--json")
    assert done.code == code, done.err
    assert [each["class"] for each in done.json["differences"]] == classes
    assert (done.json["account"], done.json["dry_run"]) == ("DU1", bool(dry))
    with _a_broker_that_answers(dsn, positions):
        said = oms(dsn, *words).out
    assert ("Nothing differs." in said) == (code == 0)
    assert ("This was a dry run" in said) == bool(dry)
    with open_connection(dsn) as conn:
        stored = conn.execute("SELECT count(*) FROM reconciliation").fetchone()
    assert stored == (0 if dry else 2,)


def test_a_broker_that_does_not_answer_is_one_sentence(dsn: str) -> None:
    _live(dsn)
    refused = oms(dsn, "reconcile", "--account", "DU1", "--user", "alice", "--wait", "0")
    assert refused.code in (1, 2)
    assert refused.sentence.startswith("no snapshot of DU1 within 0 s; see that `oms connect`")
