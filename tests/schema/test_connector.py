"""Lease, outbox and inbox, attacked in plain SQL: by the owner, by the connector's role, and by
two connectors at once. Nobody sleeps: waits are for locks."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest
from connector_cases import ACCOUNT, Desk
from psycopg.types.json import Jsonb
from waits import SECONDS_MAX, wait_until_blocked

from engine.db.connect import CONNECTOR_ROLE, Connection, open_connection
from engine.errors import (
    BooksDisagree,
    EngineError,
    HistoryIsFixed,
    InvalidValue,
    LeaseHeld,
    LeaseLost,
    UnknownReference,
    translated,
)

FIRST, SECOND = uuid4(), uuid4()
MANY = 1_000


@pytest.fixture
def desk(conn: Connection) -> Desk:
    """An account, in a transaction that is rolled back."""
    return Desk(conn)


@pytest.fixture
def own_desk(owner_conn: Connection) -> Desk:
    """An account in a database of the test's own."""
    return Desk(owner_conn)


@pytest.fixture
def racers(dsn: str) -> Iterator[tuple[Connection, Connection]]:
    """Two connections as connectors have them."""
    with (
        open_connection(dsn, role=CONNECTOR_ROLE) as first,
        open_connection(dsn, role=CONNECTOR_ROLE) as second,
    ):
        yield first, second


def call(conn: Connection, function: str, desk: Desk, *arguments: Any) -> list[tuple[Any, ...]]:
    """Call one of the connector's functions for the desk's account, or raise as the engine does."""
    marks = ", ".join(["%s"] * (2 + len(arguments)))
    with translated(), conn.transaction():
        return conn.execute(
            f"SELECT * FROM {function}({marks})".encode(),
            [desk.user_id, desk.account, *arguments],
        ).fetchall()


def take(conn: Connection, desk: Desk, holder: UUID, seconds: int = 60) -> None:
    call(conn, "lease_take", desk, holder, f"connector {str(holder)[:8]}", seconds)


def claim(
    conn: Connection, desk: Desk, holder: UUID = FIRST, messages: int = MANY, orders: int = MANY
) -> list[UUID]:
    column = next(
        number
        for number, (name,) in enumerate(
            conn.execute(
                """SELECT attname FROM pg_attribute WHERE attrelid = 'broker_command'::regclass
                   AND attnum > 0 ORDER BY attnum"""
            )
        )
        if name == "command_id"
    )
    return [row[column] for row in call(conn, "commands_claim", desk, holder, messages, orders)]


def done(
    conn: Connection, desk: Desk, command: UUID, outcome: str = "SENT", holder: UUID = FIRST
) -> None:
    with translated(), conn.transaction():
        conn.execute(
            "SELECT commands_done(%s, %s, %s, %s, ARRAY[now()], %s)",
            [desk.user_id, desk.account, holder, [command], [outcome]],
        )


def refused(desk: Desk, kind: type[EngineError], rule: str, statement: str, *values: Any) -> None:
    """The owner's statement about the desk is refused by that rule, with a hint."""
    with pytest.raises(kind) as caught, translated(), desk.conn.transaction():
        desk.conn.execute(statement.encode(), values)
    assert getattr(caught.value, "constraint", None) == rule
    assert getattr(caught.value, "hint", None)


# --- The lease --------------------------------------------------------------------------------


def test_a_lease_is_one_connectors_until_it_ends(desk: Desk) -> None:
    take(desk.conn, desk, FIRST)
    with pytest.raises(LeaseHeld, match=f"held by connector {str(FIRST)[:8]} until"):
        take(desk.conn, desk, SECOND)
    take(desk.conn, desk, FIRST)  # its own, once more
    call(desk.conn, "lease_release", desk, SECOND)  # not the other's to end
    with pytest.raises(LeaseHeld):
        take(desk.conn, desk, SECOND)
    call(desk.conn, "lease_release", desk, FIRST)
    take(desk.conn, desk, SECOND)
    with pytest.raises(LeaseLost, match=f"connector {str(SECOND)[:8]} holds it until"):
        renew(desk, FIRST)
    renew(desk, SECOND)


def renew(desk: Desk, holder: UUID, heard: str | None = None) -> None:
    call(desk.conn, "lease_renew", desk, holder, 60, True, heard, "1 second")


def test_a_lease_that_has_ended_is_anybodys_and_till_then_still_its_holders(desk: Desk) -> None:
    take(desk.conn, desk, FIRST, 0)
    renew(desk, FIRST)
    with pytest.raises(LeaseHeld):
        take(desk.conn, desk, SECOND)
    take(desk.conn, desk, FIRST, 0)
    take(desk.conn, desk, SECOND)
    with pytest.raises(LeaseLost):
        renew(desk, FIRST)


def test_what_was_heard_is_never_forgotten(desk: Desk) -> None:
    take(desk.conn, desk, FIRST)
    for heard in ("2024-01-02 00:00+00", "2024-01-01 00:00+00", None):
        renew(desk, FIRST, heard)
    assert desk.rows(
        "SELECT connected, last_heard_at::text, clock_skew::text FROM broker_lease "
        "WHERE user_id = %s"
    ) == [(True, "2024-01-02 00:00:00+00", "00:00:01")]
    take(desk.conn, desk, FIRST)
    assert not desk.lease()[1], "whoever begins isn't connected yet"


def test_there_is_no_lease_of_an_account_that_is_not_there(desk: Desk) -> None:
    desk.account = "nobody"
    with pytest.raises(UnknownReference):
        take(desk.conn, desk, FIRST)
    with pytest.raises(LeaseLost, match="nobody has taken it"):
        renew(desk, FIRST)


@pytest.mark.parametrize("ends", ["COMMIT", "ROLLBACK"])
def test_of_two_who_take_it_at_once_one_gets_it(
    own_desk: Desk, racers: tuple[Connection, Connection], ends: str
) -> None:
    first, second = racers
    first.execute("BEGIN")
    take(first, own_desk, FIRST)
    caught: list[EngineError] = []

    def race() -> None:
        try:
            take(second, own_desk, SECOND)
        except EngineError as error:
            caught.append(error)

    thread = threading.Thread(target=race)
    thread.start()
    wait_until_blocked(own_desk.conn, second, by=first)
    first.execute(ends)
    thread.join(SECONDS_MAX)
    holder = own_desk.rows("SELECT holder FROM broker_lease WHERE user_id = %s")
    if ends == "COMMIT":
        assert [type(error) for error in caught] == [LeaseHeld]
        assert holder == [(FIRST,)]
    else:
        assert (caught, holder) == ([], [(SECOND,)])


def test_who_takes_an_ended_lease_waits_for_its_holders_renewal(
    own_desk: Desk, racers: tuple[Connection, Connection]
) -> None:
    first, second = racers
    take(first, own_desk, FIRST, 0)
    first.execute("BEGIN")
    call(first, "lease_renew", own_desk, FIRST, 60, True, None, None)
    caught: list[EngineError] = []

    def race() -> None:
        try:
            take(second, own_desk, SECOND)
        except EngineError as error:
            caught.append(error)

    thread = threading.Thread(target=race)
    thread.start()
    wait_until_blocked(own_desk.conn, second, by=first)
    first.execute("COMMIT")
    thread.join(SECONDS_MAX)
    assert [type(error) for error in caught] == [LeaseHeld]


# --- Claims -----------------------------------------------------------------------------------


def test_only_the_holder_of_a_lease_that_holds_may_claim(desk: Desk) -> None:
    (order,) = desk.orders(1)
    command = desk.command("SUBMIT", order)
    with pytest.raises(LeaseLost, match="nobody has taken it"):
        claim(desk.conn, desk)
    take(desk.conn, desk, SECOND)
    with pytest.raises(LeaseLost, match="holds it until"):
        claim(desk.conn, desk)
    take(desk.conn, desk, SECOND, 0)
    with pytest.raises(LeaseLost, match="ended at"):
        claim(desk.conn, desk, SECOND)
    take(desk.conn, desk, FIRST)
    assert claim(desk.conn, desk) == [command]
    assert claim(desk.conn, desk) == [], "once"


def test_claims_go_by_priority_cancels_first_then_age(desk: Desk) -> None:
    take(desk.conn, desk, FIRST)
    orders = desk.orders(6)
    asked = [
        desk.command(kind, order, priority=priority)
        for order, (kind, priority) in zip(
            orders,
            [
                ("SUBMIT", 2),
                ("CANCEL", 2),
                ("MODIFY", 2),
                ("SUBMIT", 0),
                ("SUBMIT", 1),
                ("CANCEL", 2),
            ],
            strict=True,
        )
    ]
    snapshot = desk.command("SNAPSHOT", priority=1)
    wanted = [asked[3], asked[4], snapshot, asked[1], asked[5], asked[0], asked[2]]
    assert claim(desk.conn, desk, messages=2) == wanted[:2]
    assert claim(desk.conn, desk, orders=0) == [snapshot, asked[1], asked[5], asked[2]]
    assert claim(desk.conn, desk, messages=0) == []
    assert claim(desk.conn, desk, orders=1) == [asked[0]]


def test_an_orders_commands_go_one_after_the_other(desk: Desk) -> None:
    take(desk.conn, desk, FIRST)
    (order,) = desk.orders(1)
    submit = desk.command("SUBMIT", order, 1)
    modify = desk.command("MODIFY", order, 2)
    cancel = desk.command("CANCEL", order, 3, priority=0)
    assert claim(desk.conn, desk) == [submit]
    assert claim(desk.conn, desk) == []
    done(desk.conn, desk, submit)
    assert claim(desk.conn, desk) == [modify]
    done(desk.conn, desk, modify)
    assert claim(desk.conn, desk) == [cancel]


def test_behind_what_may_have_arrived_nothing_goes_but_a_cancel(desk: Desk) -> None:
    take(desk.conn, desk, FIRST)
    first, second = desk.orders(2)
    submits = [desk.command("SUBMIT", order, 1) for order in (first, second)]
    claim(desk.conn, desk)
    for submit in submits:
        done(desk.conn, desk, submit, "UNKNOWN")
    modify = desk.command("MODIFY", first, 2)
    cancel = desk.command("CANCEL", second, 2)
    assert claim(desk.conn, desk) == [cancel]
    desk.conn.execute(
        "UPDATE broker_command SET outcome = 'ARRIVED' WHERE command_id = %s", [submits[0]]
    )
    assert claim(desk.conn, desk) == [modify]


def test_what_may_not_go_yet_is_not_claimed(desk: Desk) -> None:
    take(desk.conn, desk, FIRST)
    later, passed = desk.orders(2)
    with desk.conn.cursor() as cursor:
        cursor.execute("SELECT now() + interval '1 hour', now() - interval '1 hour'")
        times = cursor.fetchone()
    assert times is not None
    desk.command("SUBMIT", later, not_before=times[0])
    due = desk.command("SUBMIT", passed, not_before=times[1])
    assert claim(desk.conn, desk) == [due]


def test_a_question_ends_with_the_connector_that_took_it_an_order_does_not(desk: Desk) -> None:
    take(desk.conn, desk, FIRST)
    (order,) = desk.orders(1)
    asked, sent = desk.command("SNAPSHOT", priority=1), desk.command("SUBMIT", order)
    assert claim(desk.conn, desk) == [asked, sent]
    take(desk.conn, desk, FIRST)  # its own, once more, ends nothing
    assert desk.rows("SELECT outcome FROM broker_command WHERE user_id = %s") == [(None,)] * 2
    call(desk.conn, "lease_release", desk, FIRST)
    waiting = desk.command("SNAPSHOT", priority=1)
    take(desk.conn, desk, SECOND)
    assert dict(desk.rows("SELECT command_id, outcome FROM broker_command WHERE user_id = %s")) == {
        asked: "UNKNOWN",
        sent: None,
        waiting: None,
    }


def test_one_account_gets_none_of_anothers(desk: Desk) -> None:
    other = Desk(desk.conn, "DU2")
    (order,) = other.orders(1)
    theirs = other.command("SUBMIT", order)
    take(desk.conn, desk, FIRST)
    take(other.conn, other, FIRST)
    assert claim(desk.conn, desk) == []
    assert claim(other.conn, other) == [theirs]


def test_two_connectors_never_claim_the_same_command(
    own_desk: Desk, racers: tuple[Connection, Connection]
) -> None:
    """The lease of the first ends while it claims; the second waits for what it has done."""
    first, second = racers
    commands = [own_desk.command("SUBMIT", order) for order in own_desk.orders(4)]
    take(first, own_desk, FIRST)
    first.execute("BEGIN")
    assert claim(first, own_desk, FIRST, 2) == commands[:2]
    call(first, "lease_release", own_desk, FIRST)
    taken: list[UUID] = []

    def race() -> None:
        take(second, own_desk, SECOND)
        taken.extend(claim(second, own_desk, SECOND))

    thread = threading.Thread(target=race)
    thread.start()
    wait_until_blocked(own_desk.conn, second, by=first)
    first.execute("COMMIT")
    thread.join(SECONDS_MAX)
    assert taken == commands[2:]
    with pytest.raises(LeaseLost):
        claim(first, own_desk, FIRST)


def test_a_lease_does_not_end_under_a_claim(
    own_desk: Desk, racers: tuple[Connection, Connection]
) -> None:
    first, second = racers
    take(first, own_desk, FIRST)
    first.execute("BEGIN")
    assert claim(first, own_desk, FIRST) == []
    thread = threading.Thread(target=call, args=(second, "lease_release", own_desk, FIRST))
    thread.start()
    wait_until_blocked(own_desk.conn, second, by=first)
    first.execute("COMMIT")
    thread.join(SECONDS_MAX)
    assert not own_desk.lease()[0]


def test_a_command_that_somebody_else_holds_is_passed_over(
    own_desk: Desk, racers: tuple[Connection, Connection]
) -> None:
    """The engine withdraws one: nobody waits for it, and nobody gets it."""
    withdrawn, other = (own_desk.command("SUBMIT", order) for order in own_desk.orders(2))
    take(racers[0], own_desk, FIRST)
    with open_connection(own_desk.conn.info.dsn) as engine:
        engine.execute("BEGIN")
        engine.execute(
            """UPDATE broker_command SET done_at = now(), outcome = 'WITHDRAWN'
               WHERE command_id = %s""",
            [withdrawn],
        )
        assert claim(racers[0], own_desk) == [other]
        engine.execute("COMMIT")
    assert claim(racers[0], own_desk) == []


# --- What became of commands ------------------------------------------------------------------


def test_who_claimed_says_what_became_of_it_once(desk: Desk) -> None:
    take(desk.conn, desk, FIRST)
    claimed, unclaimed = (desk.command("SUBMIT", order) for order in desk.orders(2))
    claim(desk.conn, desk, messages=1)
    for holder, command in ((SECOND, claimed), (FIRST, unclaimed), (FIRST, uuid4())):
        with pytest.raises(LeaseLost) as caught:
            done(desk.conn, desk, command, holder=holder)
        assert caught.value.constraint == "broker_command_done_by_claimer"
    call(desk.conn, "lease_release", desk, FIRST)  # what was sent was sent
    done(desk.conn, desk, claimed)
    before = desk.outcomes()
    done(desk.conn, desk, claimed, "UNKNOWN")  # a repeat changes nothing
    assert desk.outcomes() == before == {claimed: "SENT", unclaimed: None}


def test_a_withdrawn_command_was_never_claimed(desk: Desk) -> None:
    take(desk.conn, desk, FIRST)
    command, other = (desk.command("SUBMIT", order) for order in desk.orders(2))
    claim(desk.conn, desk, messages=1)
    withdraw = (
        "UPDATE broker_command SET done_at = now(), outcome = 'WITHDRAWN' WHERE command_id = %s"
    )
    refused(desk, InvalidValue, "broker_command_withdrawn_unclaimed", withdraw, command)
    desk.conn.execute(withdraw.encode(), [other])
    assert claim(desk.conn, desk) == []


@pytest.mark.parametrize(
    "change",
    [
        'payload = \'{"quantity": "1000000"}\'',
        "kind = 'CANCEL'",
        "priority = 0",
        "order_id = NULL, run_id = NULL, kind = 'SNAPSHOT'",
        "order_version = 9",
        "not_before = now()",
        "created_at = '2000-01-01'",
        "command_id = gen_random_uuid()",
    ],
)
def test_what_a_command_says_is_fixed(desk: Desk, change: str) -> None:
    take(desk.conn, desk, FIRST)
    (order,) = desk.orders(1)
    command = desk.command("SUBMIT", order)
    claim(desk.conn, desk)
    refused(
        desk,
        HistoryIsFixed,
        "broker_command_terms_fixed",
        f"UPDATE broker_command SET {change} WHERE command_id = %s",
        command,
    )


def test_an_order_that_waits_may_be_given_new_terms_and_nothing_else(desk: Desk) -> None:
    waiting, withdrawn = (desk.command("SUBMIT", order) for order in desk.orders(2))
    modify = """UPDATE broker_command c SET payload = orders_command_payload(o) FROM orders o
                WHERE o.user_id = c.user_id AND o.order_id = c.order_id AND c.command_id = %s"""
    desk.conn.execute(modify.encode(), [waiting])
    rule = "broker_command_terms_fixed"
    claiming = "payload = '{}', claimed_by = gen_random_uuid()"
    for change in ("priority = 0", "not_before = now()", claiming):
        statement = f"UPDATE broker_command SET {change} WHERE command_id = %s"
        refused(desk, HistoryIsFixed, rule, statement, waiting)
    desk.conn.execute(
        "UPDATE broker_command SET done_at = now(), outcome = 'WITHDRAWN' WHERE command_id = %s",
        [withdrawn],
    )
    other = "UPDATE broker_command SET payload = '{}' WHERE command_id = %s"
    refused(desk, HistoryIsFixed, rule, other, withdrawn)


@pytest.mark.parametrize(
    "change",
    [
        "claimed_by = gen_random_uuid()",
        "claimed_by = NULL, claimed_at = NULL, sent_at = NULL",
        "claimed_at = now() + interval '1 s'",
        "sent_at = NULL",
        "sent_at = now() + interval '1 s'",
        "done_at = NULL, outcome = NULL",
        "done_at = now() + interval '1 s'",
        "outcome = 'NEVER_ARRIVED', done_at = NULL",
        "outcome = 'REFUSED'",
        "outcome = 'UNKNOWN'",
    ],
)
def test_what_became_of_a_command_is_said_once(desk: Desk, change: str) -> None:
    take(desk.conn, desk, FIRST)
    (order,) = desk.orders(1)
    command = desk.command("SUBMIT", order)
    claim(desk.conn, desk)
    done(desk.conn, desk, command)
    refused(
        desk,
        HistoryIsFixed,
        "broker_command_said_once",
        f"UPDATE broker_command SET {change} WHERE command_id = %s",
        command,
    )


@pytest.mark.parametrize("first", ["SENT", "UNKNOWN"])
@pytest.mark.parametrize("then", ["ARRIVED", "NEVER_ARRIVED"])
def test_the_broker_says_what_arrived(desk: Desk, first: str, then: str) -> None:
    take(desk.conn, desk, FIRST)
    (order,) = desk.orders(1)
    command = desk.command("SUBMIT", order)
    claim(desk.conn, desk)
    done(desk.conn, desk, command, first)
    asked = desk.command("SNAPSHOT")
    claim(desk.conn, desk)
    whole = {"snapshot_id": str(asked), "part": 1, "parts": 1, "open_orders": []}
    hear(desk.conn, desk, kind="SNAPSHOT", payload=whole)
    decide = "UPDATE broker_command SET outcome = %s WHERE command_id = %s"
    desk.conn.execute(decide.encode(), [then, command])
    for other in ("SENT", "UNKNOWN", "ARRIVED" if then != "ARRIVED" else "NEVER_ARRIVED"):
        refused(desk, HistoryIsFixed, "broker_command_said_once", decide, other, command)


def test_an_order_is_submitted_at_an_account_once(desk: Desk) -> None:
    (order,) = desk.orders(1)
    desk.command("SUBMIT", order)
    with pytest.raises(psycopg.errors.UniqueViolation), desk.conn.transaction():
        desk.command("SUBMIT", order, 2)


# --- The inbox --------------------------------------------------------------------------------


def hear(
    conn: Connection,
    desk: Desk,
    number: int = 1,
    kind: str = "EXECUTION",
    order: UUID | None = None,
    command: UUID | None = None,
    holder: UUID = FIRST,
    payload: dict[str, Any] | None = None,
) -> None:
    if payload is None:
        payload = {"price": "100"} if command is None else {"command_id": str(command)}
    conn.execute(
        """INSERT INTO broker_event (user_id, account, number, holder, kind, order_ref, payload,
                                     event_at)
           VALUES (%s, %s, %s, %s, %s, %s, %s, '2024-01-02')""",
        [
            desk.user_id,
            desk.account,
            number,
            holder,
            kind,
            None if order is None else str(order),
            Jsonb(payload),
        ],
    )


def test_who_claimed_may_say_that_it_never_went_and_nobody_else(desk: Desk) -> None:
    """Else only a snapshot of the broker's shows it: it may have been sent."""
    take(desk.conn, desk, FIRST)
    (order,) = desk.orders(1)
    command = desk.command("SUBMIT", order)
    claim(desk.conn, desk)
    hear(desk.conn, desk, 1, "SEND_FAILED", order, uuid4())
    hear(desk.conn, desk, 2, "SEND_FAILED", order, command, holder=SECOND)
    with pytest.raises(BooksDisagree) as caught:
        done(desk.conn, desk, command, "NEVER_ARRIVED")
    assert caught.value.constraint == "broker_command_outcome_said_by_broker"
    hear(desk.conn, desk, 3, "SEND_FAILED", order, command)
    done(desk.conn, desk, command, "NEVER_ARRIVED")
    assert desk.outcomes()[command] == "NEVER_ARRIVED"


@pytest.mark.parametrize(
    "change",
    [
        'payload = \'{"price": "1"}\'',
        "number = 2",
        "kind = 'NOTICE'",
        "event_at = now()",
        "received_at = now() + interval '1 s'",
        "order_ref = 'another'",
        "execution_id = 'another'",
        "holder = gen_random_uuid()",
        "perm_id = 7",
    ],
)
def test_what_the_broker_said_is_fixed(desk: Desk, change: str) -> None:
    hear(desk.conn, desk)
    refused(
        desk,
        HistoryIsFixed,
        "broker_event_append_only",
        f"UPDATE broker_event SET {change} WHERE user_id = %s",
        desk.user_id,
    )


APPLY = "UPDATE broker_event SET applied_at = now(), finding = %s, code = %s WHERE user_id = %s"


def test_an_event_is_applied_once(desk: Desk) -> None:
    hear(desk.conn, desk)
    rule = "broker_event_applied_once"
    note = "UPDATE broker_event SET note = 'x' WHERE user_id = %s"
    refused(desk, HistoryIsFixed, rule, note, desk.user_id)
    desk.conn.execute(APPLY.encode(), ["NEW", "FILL", desk.user_id])
    unapply = "UPDATE broker_event SET applied_at = NULL, finding = NULL WHERE user_id = %s"
    refused(desk, HistoryIsFixed, rule, unapply, desk.user_id)
    refused(desk, HistoryIsFixed, rule, APPLY, "REPEAT", "FILL", desk.user_id)
    refused(desk, HistoryIsFixed, rule, APPLY, "NEW", "OTHER", desk.user_id)
    refused(desk, HistoryIsFixed, rule, note, desk.user_id)


def test_what_is_held_for_a_person_is_decided_later_and_never_unapplied(desk: Desk) -> None:
    hear(desk.conn, desk)
    desk.conn.execute(APPLY.encode(), ["HELD", "RUN_OVER", desk.user_id])
    unapply = "UPDATE broker_event SET applied_at = NULL, finding = NULL WHERE user_id = %s"
    refused(desk, HistoryIsFixed, "broker_event_applied_once", unapply, desk.user_id)
    desk.conn.execute(APPLY.encode(), ["ORPHAN", "ORPHAN_FILL", desk.user_id])
    refused(desk, HistoryIsFixed, "broker_event_applied_once", APPLY, "HELD", "X", desk.user_id)


def test_a_number_is_given_once(desk: Desk) -> None:
    hear(desk.conn, desk)
    with pytest.raises(psycopg.errors.UniqueViolation), desk.conn.transaction():
        hear(desk.conn, desk)
    hear(desk.conn, desk, 2)


# --- History ----------------------------------------------------------------------------------


@pytest.mark.parametrize("table", ["broker_command", "broker_event"])
@pytest.mark.parametrize("statement", ["DELETE FROM {}", "TRUNCATE {}"])
def test_outbox_and_inbox_are_history(desk: Desk, table: str, statement: str) -> None:
    hear(desk.conn, desk)
    (order,) = desk.orders(1)
    desk.command("SUBMIT", order)
    desk.command("SNAPSHOT")
    refused(desk, HistoryIsFixed, f"{table}_kept", statement.format(table))


def test_they_go_with_their_account(desk: Desk) -> None:
    hear(desk.conn, desk)
    (order,) = desk.orders(1)
    desk.command("SUBMIT", order)
    desk.command("SNAPSHOT")
    take(desk.conn, desk, FIRST)
    # An account with orders stays, as they do.
    delete = "DELETE FROM broker_account WHERE user_id = %s"
    refused(desk, UnknownReference, "run_route_to_account", delete, desk.user_id)
    desk.conn.execute("DELETE FROM strategy_run WHERE user_id = %s", [desk.user_id])
    desk.conn.execute(delete.encode(), [desk.user_id])
    for table in ("broker_command", "broker_event", "broker_lease"):
        assert desk.rows(f"SELECT count(*) FROM {table} WHERE user_id = %s") == [(0,)]


def test_commands_go_with_their_run_and_what_the_broker_said_stays(desk: Desk) -> None:
    hear(desk.conn, desk)
    (order,) = desk.orders(1)
    desk.command("SUBMIT", order)
    desk.command("SNAPSHOT")
    desk.conn.execute("DELETE FROM strategy_run WHERE user_id = %s", [desk.user_id])
    assert desk.rows("SELECT kind FROM broker_command WHERE user_id = %s") == [("SNAPSHOT",)]
    assert desk.rows("SELECT count(*) FROM broker_event WHERE user_id = %s") == [(1,)]


# --- Rights -----------------------------------------------------------------------------------

CALLS = [
    "lease_take(%(user)s, 'DU1', %(user)s, 'x', 1)",
    "lease_renew(%(user)s, 'DU1', %(user)s, 1, true, NULL, NULL)",
    "lease_release(%(user)s, 'DU1', %(user)s)",
    "commands_claim(%(user)s, 'DU1', %(user)s, 1, 1)",
    "commands_throttled(%(user)s, 'DU1', 1)",
    "commands_done(%(user)s, 'DU1', %(user)s, '{}', '{}', '{}')",
    "connector_alert(%(user)s, 'DU1', 'X', 'x')",
]


@pytest.mark.parametrize("role", ["oms_engine", "oms_auditor"])
@pytest.mark.parametrize("function", CALLS)
def test_what_a_connector_does_nobody_else_does(desk: Desk, role: str, function: str) -> None:
    desk.conn.execute(f"SET LOCAL ROLE {role}".encode())
    with pytest.raises(psycopg.errors.InsufficientPrivilege), desk.conn.transaction():
        desk.conn.execute(f"SELECT {function}".encode(), {"user": desk.user_id})
    desk.conn.execute("RESET ROLE")


def test_a_connector_does_all_of_its_work_with_its_rights(desk: Desk) -> None:
    (order,) = desk.orders(1)
    command = desk.command("SUBMIT", order)
    desk.conn.execute(f"SET LOCAL ROLE {CONNECTOR_ROLE}".encode())
    take(desk.conn, desk, FIRST)
    renew(desk, FIRST)
    assert [place for *_, place in call(desk.conn, "commands_throttled", desk, 10)] == [0]
    assert claim(desk.conn, desk) == [command]
    done(desk.conn, desk, command)
    hear(desk.conn, desk)
    call(desk.conn, "connector_alert", desk, "CONNECTION_STOLEN", "once")
    call(desk.conn, "connector_alert", desk, "CONNECTION_STOLEN", "twice")
    call(desk.conn, "lease_release", desk, FIRST)
    with pytest.raises(psycopg.errors.InsufficientPrivilege), desk.conn.transaction():
        desk.rows("SELECT payload FROM broker_event WHERE user_id = %s")
    desk.conn.execute("RESET ROLE")
    assert desk.rows("SELECT message, subject FROM alert WHERE user_id = %s") == [("once", ACCOUNT)]


def test_what_waits_for_the_throttle_is_told_of_once(desk: Desk) -> None:
    orders = desk.orders(3)
    commands = [desk.command("SUBMIT", order) for order in orders]
    desk.command("MODIFY", orders[0], 2)  # waits for its order, not for the throttle
    desk.command("SNAPSHOT", priority=1)
    found = call(desk.conn, "commands_throttled", desk, 10)
    assert [(row[0], row[3]) for row in found] == list(zip(commands, (1, 2, 3), strict=True))
    desk.conn.execute(
        """INSERT INTO broker_event (user_id, account, number, holder, kind, order_ref, payload,
                                     event_at)
           VALUES (%s, %s, 1, %s, 'THROTTLED', %s, jsonb_build_object('command_id', %s::text),
                   now())""",
        [desk.user_id, desk.account, FIRST, str(orders[0]), commands[0]],
    )
    found = call(desk.conn, "commands_throttled", desk, 10)
    assert [row[0] for row in found] == commands[1:]
