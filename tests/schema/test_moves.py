"""Every move of a run's and an order's status: those that are rows of the table, and no other."""

from __future__ import annotations

from itertools import product

import pytest
from schema_cases import ORDER, TRADE, assert_refused, findings, rows, said

from engine.db.connect import Connection

# How an order of a real broker gets into each status, from NEW on.
_PATHS = {
    "NEW": (),
    "PENDING": ("PENDING",),
    "PENDING_SUBMIT": ("PENDING_SUBMIT",),
    "ROUTED": ("ROUTED",),
    "PARTIALLY_FILLED": ("trade 1",),
    "PENDING_CANCEL": ("ROUTED", "PENDING_CANCEL"),
    "PENDING_MODIFY": ("ROUTED", "modify"),
    "FILLED": ("trade 2",),
    "CANCELED": ("CANCELED",),
    "REJECTED": ("REJECTED",),
    "EXPIRED": ("EXPIRED",),
}
_RUN_PATHS = {
    "CREATED": (),
    "RUNNING": ("RUNNING",),
    "STOPPING": ("RUNNING", "STOPPING"),
    "STOPPED": ("STOPPED",),
    "ERROR": ("RUNNING", "ERROR"),
}
_KEY = "WHERE user_id = :'eve' AND run_id = :'new_order'"


def _move(to: str) -> str:
    """A move, an hour after the one before: the ledger tells each move once a moment."""
    reason = ", reject_source = 'BROKER', reject_code = 'X'" if to == "REJECTED" else ""
    return (
        f"UPDATE orders SET status = '{to}', status_at = status_at + interval '1 hour'"
        f"{reason} {_KEY}"
    )


def _trade(quantity: int, broker: str, number: int = 1) -> str:
    """A fill; at a broker the inbox says it first."""
    trade = f"{TRADE}, execution_id) VALUES (:'eve', :'new_order', :'new_order', {quantity}, 10, "
    if broker == "paper":
        return f"{trade}'E{number}')"
    return (
        "INSERT INTO broker_event (user_id, account, number, holder, kind, order_ref, "
        "execution_id, payload, event_at) "
        f"VALUES (:'eve', 'A1', {number}, :'nobody', 'EXECUTION', :'new_order', 'E{number}', "
        f'\'{{"side": "BUY", "quantity": "{quantity}", "price": "10"}}\', :\'t0\'); '
        f"{trade}'E{number}')"
    )


# The broker's word that it is over; what a connector has taken ends with none else.
_END = (
    "INSERT INTO broker_event (user_id, account, number, holder, kind, order_ref, payload, "
    "event_at) VALUES (:'eve', 'A1', 90, :'nobody', 'ORDER_STATUS', :'new_order', "
    "'{\"status\": \"CANCELED\"}', :'t0')"
)
_ENDS = ("CANCELED", "EXPIRED", "REJECTED")
# A connector has taken what was sent.
_CLAIM = f"UPDATE broker_command SET claimed_by = :'nobody', claimed_at = now() {_KEY}"
_MODIFY = (
    f"SELECT order_modify(user_id, run_id, order_id, version, new_quantity => 3) FROM orders {_KEY}"
)


def _order_in(world: Connection, status: str, broker: str) -> None:
    world.execute(
        said(
            "INSERT INTO strategy_run (user_id, run_id, status, broker, initial_cash) "
            f"VALUES (:'eve', :'new_order', 'RUNNING', '{broker}', 1000); "
        )
    )
    if broker != "paper":
        world.execute(
            said(
                "INSERT INTO broker_account (user_id, account, broker, calendar) "
                f"VALUES (:'eve', 'A1', '{broker}', 'NONE'); "
                "INSERT INTO run_route (user_id, run_id, account) "
                "VALUES (:'eve', :'new_order', 'A1')"
            )
        )
    world.execute(
        said(
            f"{ORDER}, logical_time) "
            "VALUES (:'eve', :'new_order', :'new_order', 'AAPL', 'BUY', 2, :'t0')"
        )
    )
    if status not in ("NEW", "PENDING"):
        world.execute(said(_CLAIM))
    for step in _PATHS[status]:
        if step in _ENDS and broker != "paper":
            world.execute(said(_END))
        if step.startswith("trade"):
            step = _trade(int(step.split()[1]), broker)
        elif step == "modify":
            step = _MODIFY if broker != "paper" else _move("PENDING_MODIFY")
        else:
            step = _move(step)
        world.execute(said(step))
    assert rows(world, f"SELECT status FROM orders {_KEY}") == [(status,)]


def _table(world: Connection, name: str) -> set[tuple[str, str]]:
    return set(rows(world, f"SELECT from_status, to_status FROM {name}"))


def _agrees(status: str, filled: int) -> bool:
    """Whether an order of two units that has filled so many may be in a status."""
    if status == "FILLED":
        return filled == 2
    if status == "PARTIALLY_FILLED":
        return filled == 1
    if status in ("NEW", "PENDING", "PENDING_SUBMIT", "ROUTED", "REJECTED"):
        return filled == 0
    return filled < 2


@pytest.mark.parametrize("broker", ["paper", "dummy"])
@pytest.mark.parametrize("status", _PATHS)
def test_an_order_moves_as_the_table_says_and_not_otherwise(
    world: Connection, status: str, broker: str
) -> None:
    allowed = _table(world, "order_transition")
    known = {name for (name,) in rows(world, "SELECT status FROM order_status")}
    assert known == _PATHS.keys()
    _order_in(world, status, broker)
    closed_on_paper = broker == "paper" and status in ("FILLED", "CANCELED", "EXPIRED", "REJECTED")
    filled = {"PARTIALLY_FILLED": 1, "FILLED": 2}.get(status, 0)
    for to in sorted(known - {status}):
        if (status, to) not in allowed or closed_on_paper:
            for role in ("oms_owner", "oms_engine"):
                assert_refused(world, _move(to), role, "orders_status_transition")
        elif not _agrees(to, filled):
            # A legal move, but of an execution: without one it contradicts what is filled.
            assert_refused(world, _move(to), "oms_engine", "orders_status_agrees_with_fills")
        else:
            with world.transaction(force_rollback=True):
                if (to, broker) == ("PENDING_MODIFY", "dummy"):
                    for role in ("oms_owner", "oms_engine"):
                        assert_refused(world, _move(to), role, "orders_modified_by_command")
                    world.execute(said(_MODIFY))
                else:
                    never_went = status in ("NEW", "PENDING") and to != "REJECTED"
                    if to in _ENDS and broker == "dummy" and not never_went:
                        for role in ("oms_owner", "oms_engine"):
                            assert_refused(world, _move(to), role, "orders_end_said_by_broker")
                        world.execute(said(_END))
                    world.execute(said(_move(to)))
                assert rows(world, f"SELECT status FROM orders {_KEY}") == [(to,)]
                assert findings(world) == []


@pytest.mark.parametrize("status", ["FILLED", "CANCELED", "EXPIRED", "REJECTED"])
def test_an_order_of_a_real_broker_takes_a_late_fill(world: Connection, status: str) -> None:
    """What the broker did is a fact, whatever we believed; on paper nothing comes late."""
    late = _trade(2, "paper", 2)
    with world.transaction(force_rollback=True):
        _order_in(world, status, "paper")
        assert_refused(world, late, "oms_engine", "execution_order_is_open")
    _order_in(world, status, "dummy")
    assert_refused(world, late, "oms_engine", "execution_said_by_broker")
    world.execute(said(_trade(2, "dummy", 2)))
    # More than was ordered is real exposure too.
    filled = 4 if status == "FILLED" else 2
    assert rows(world, f"SELECT status, filled_quantity, reject_code FROM orders {_KEY}") == [
        ("FILLED", filled, None)
    ]
    assert findings(world) == []


@pytest.mark.parametrize("status", _RUN_PATHS)
def test_a_run_moves_as_the_table_says_and_not_otherwise(world: Connection, status: str) -> None:
    allowed = _table(world, "run_transition")
    known = {name for (name,) in rows(world, "SELECT status FROM run_status")}
    assert known == _RUN_PATHS.keys()
    world.execute(said("INSERT INTO strategy_run (user_id, run_id) VALUES (:'eve', :'new_order')"))
    for step in _RUN_PATHS[status]:
        world.execute(said(f"UPDATE strategy_run SET status = '{step}' {_KEY}"))
    for to in sorted(known - {status}):
        move = f"UPDATE strategy_run SET status = '{to}' {_KEY}"
        if (status, to) not in allowed:
            for role in ("oms_owner", "oms_engine"):
                assert_refused(world, move, role, "strategy_run_status_transition")
            continue
        with world.transaction(force_rollback=True):
            world.execute(said(move))
            assert rows(
                world, f"SELECT status, stopped_at IS NOT NULL FROM strategy_run {_KEY}"
            ) == [(to, to in ("STOPPED", "ERROR"))]
            assert findings(world) == []


@pytest.mark.parametrize(
    ("path", "told"),
    [
        (("STOPPED",), ["RUN_STOPPED"]),
        (("ERROR",), ["RUN_ERROR"]),
        (("STOPPING", "STOPPED"), ["RUN_STOPPING", "RUN_STOPPED"]),
        (("STOPPING", "ERROR"), ["RUN_STOPPING", "RUN_ERROR"]),
    ],
)
@pytest.mark.parametrize(
    "status", ["NEW", "PENDING", "PENDING_SUBMIT", "ROUTED", "PARTIALLY_FILLED", "PENDING_CANCEL"]
)
def test_a_run_that_ends_takes_its_open_paper_orders_with_it(
    world: Connection, status: str, path: tuple[str, ...], told: list[str]
) -> None:
    _order_in(world, status, "paper")
    for step in path:
        world.execute(said(f"UPDATE strategy_run SET status = '{step}' {_KEY}"))
    world.execute("SET CONSTRAINTS ALL IMMEDIATE")
    assert rows(world, f"SELECT status, status_reason FROM orders {_KEY}") == [
        ("CANCELED", f"RUN_{path[0]}")
    ]
    events = rows(
        world, f"SELECT event_type FROM event_ledger {_KEY} ORDER BY seq DESC LIMIT {len(told) + 1}"
    )
    assert [event for (event,) in reversed(events)] == ["ORDER_CANCELED", *told]
    assert findings(world) == []


def test_a_cancel_that_was_refused_is_told(world: Connection) -> None:
    """The move back is no fill's, so that no execution's event tells it."""
    _order_in(world, "PARTIALLY_FILLED", "dummy")
    world.execute(said(_move("PENDING_CANCEL")))
    world.execute(said(_move("PARTIALLY_FILLED")))
    assert rows(world, f"SELECT event_type FROM event_ledger {_KEY} ORDER BY seq DESC LIMIT 2") == [
        ("ORDER_PARTIALLY_FILLED",),
        ("ORDER_PENDING_CANCEL",),
    ]


def test_an_order_that_we_refused_ourselves_does_not_come_back(world: Connection) -> None:
    """No broker has ever heard of it, so that nothing can have disproved it."""
    _order_in(world, "NEW", "dummy")
    world.execute(
        said(
            "UPDATE orders SET status = 'REJECTED', reject_source = 'RISK', reject_code = 'X' "
            f"{_KEY}"
        )
    )
    for role in ("oms_owner", "oms_engine"):
        assert_refused(world, _move("ROUTED"), role, "orders_status_transition")


def test_the_moves_lead_from_birth_to_an_end(world: Connection) -> None:
    """No status is out of reach, and from every open one some end can be reached."""
    moves = _table(world, "order_transition")
    closed = {name for (name,) in rows(world, "SELECT status FROM order_status WHERE NOT is_open")}
    assert {to for _, to in moves} | {"NEW"} == _PATHS.keys()
    reach = {(a, b) for a, b in moves}
    for middle, start, end in product(_PATHS, _PATHS, _PATHS):
        if (start, middle) in reach and (middle, end) in reach:
            reach.add((start, end))
    assert all(any((status, end) in reach for end in closed) for status in _PATHS.keys() - closed)
    assert closed == {"FILLED", "CANCELED", "REJECTED", "EXPIRED"}
