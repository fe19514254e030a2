"""A slow broker holds up nobody: not the other accounts, not what is heard, not the engine."""

from __future__ import annotations

import asyncio
import threading

from connector_cases import Desk, Wire, connector, desk, wire
from waits import wait_until

from engine.brokers.protocol import MessageKind
from engine.db.connect import Connection, open_connection

__all__ = ["desk", "wire"]


def _blocked(wire: Wire) -> threading.Event:
    """Have the broker take nothing until the event is set."""
    gate = threading.Event()

    async def hold(kind: str, ref: str) -> None:
        await asyncio.to_thread(gate.wait)

    wire.before = hold
    return gate


def test_a_slow_broker_blocks_neither_other_accounts_nor_the_inbox(
    dsn: str, owner_conn: Connection, desk: Desk, wire: Wire
) -> None:
    quick, quick_wire = Desk(owner_conn, "DU2"), Wire(account="DU2")
    gate = _blocked(wire)
    with connector(dsn, desk, wire), connector(dsn, quick, quick_wire):
        slow_ref = desk.submits(1)
        wait_until(
            lambda: desk.rows(
                "SELECT 1 FROM broker_command WHERE user_id = %s AND claimed_at > '-infinity'"
            ),
            "the slow command to be claimed",
        )
        refs = quick.submits(5)
        quick.wait_until_done()
        wire.say(MessageKind.NOTICE, code="1", message="heard meanwhile")
        desk.wait_for("NOTICE")
        assert (quick_wire.refs(), wire.refs(), desk.undone()) == (refs, [], 1)
        gate.set()
        desk.wait_until_done()
    assert wire.refs() == slow_ref


def test_a_slow_answer_blocks_no_order(dsn: str, desk: Desk, wire: Wire) -> None:
    wire.snapshot_gate = asyncio.Event()
    with connector(dsn, desk, wire):
        desk.command("SNAPSHOT", priority=1)
        refs = desk.submits(3)
        wait_until(lambda: desk.undone() == 1, "everything but the snapshot")
        assert wire.refs() == refs
        assert wire.loop is not None
        wire.loop.call_soon_threadsafe(wire.snapshot_gate.set)
        desk.wait_until_done()
        desk.wait_for("SNAPSHOT")


def test_a_slow_broker_blocks_no_write_of_the_engine(dsn: str, desk: Desk, wire: Wire) -> None:
    """Nothing is locked while the broker thinks."""
    gate = _blocked(wire)
    with connector(dsn, desk, wire):
        desk.submits(20)
        wait_until(
            lambda: desk.rows(
                "SELECT 1 FROM broker_command WHERE user_id = %s AND claimed_by IS NOT NULL"
            ),
            "some to be claimed",
        )
        with open_connection(dsn) as engine:
            engine.execute("SET lock_timeout = '1s'")
            (claimed,) = engine.execute(
                "SELECT count(*) FROM (SELECT FROM broker_command WHERE user_id = %s "
                "AND claimed_by IS NOT NULL FOR UPDATE) c",
                [desk.user_id],
            ).fetchone() or (0,)
            assert claimed >= 1
            engine.execute("SELECT FROM orders WHERE user_id = %s FOR UPDATE", [desk.user_id])
            withdrawn = engine.execute(
                """UPDATE broker_command SET done_at = now(), outcome = 'WITHDRAWN'
                   WHERE user_id = %s AND claimed_by IS NULL RETURNING 1""",
                [desk.user_id],
            ).fetchall()
            assert withdrawn
        gate.set()
        desk.wait_until_done()
    assert len(wire.refs()) == 20 - len(withdrawn)
