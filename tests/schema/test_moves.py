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
    "PENDING_MODIFY": ("ROUTED", "PENDING_MODIFY"),
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


def _order_in(world: Connection, status: str, broker: str) -> None:
    world.execute(
        said(
            "INSERT INTO strategy_run (user_id, run_id, status, broker, initial_cash) "
            f"VALUES (:'eve', :'new_order', 'RUNNING', '{broker}', 1000); "
            f"{ORDER}, logical_time) "
            "VALUES (:'eve', :'new_order', :'new_order', 'AAPL', 'BUY', 2, :'t0')"
        )
    )
    for step in _PATHS[status]:
        if step.startswith("trade"):
            quantity = step.split()[1]
            step = f"{TRADE}) VALUES (:'eve', :'new_order', :'new_order', {quantity}, 10)"
        else:
            step = _move(step)
        world.execute(said(step))
    assert rows(world, f"SELECT status FROM orders {_KEY}") == [(status,)]


def _table(world: Connection, name: str) -> set[tuple[str, str]]:
    return set(rows(world, f"SELECT from_status, to_status FROM {name}"))


@pytest.mark.parametrize("broker", ["paper", "dummy"])
@pytest.mark.parametrize("status", _PATHS)
def test_an_order_moves_as_the_table_says_and_not_otherwise(
    world: Connection, status: str, broker: str
) -> None:
    allowed = _table(world, "order_transition")
    known = {name for (name,) in rows(world, "SELECT status FROM order_status")}
    assert known == _PATHS.keys()
    _order_in(world, status, broker)
    closed_on_paper = broker == "paper" and status in ("CANCELED", "EXPIRED", "REJECTED")
    for to in sorted(known - {status}):
        if (status, to) not in allowed or closed_on_paper:
            for role in ("oms_owner", "oms_engine"):
                assert_refused(world, _move(to), role, "orders_status_transition")
        elif to in ("FILLED", "PARTIALLY_FILLED") and status != "PARTIALLY_FILLED":
            # A legal move, but of an execution: without one it contradicts what is filled.
            assert_refused(world, _move(to), "oms_engine", "orders_status_agrees_with_fills")
        elif to != "FILLED":
            with world.transaction(force_rollback=True):
                world.execute(said(_move(to)))
                assert rows(world, f"SELECT status FROM orders {_KEY}") == [(to,)]
                assert findings(world) == []


@pytest.mark.parametrize("status", ["FILLED", "CANCELED", "EXPIRED", "REJECTED"])
def test_an_order_of_a_real_broker_takes_a_late_fill(world: Connection, status: str) -> None:
    """What the broker did is a fact, whatever we believed; on paper nothing comes late."""
    late = f"{TRADE}) VALUES (:'eve', :'new_order', :'new_order', 2, 10)"
    with world.transaction(force_rollback=True):
        _order_in(world, status, "paper")
        assert_refused(world, late, "oms_engine", "execution_order_is_open")
    _order_in(world, status, "dummy")
    world.execute(said(late))
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
