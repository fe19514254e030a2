"""Connector processes that are told to end, or killed: nothing lost, nothing half-sent, nothing
sent twice."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from connector_cases import Desk, desk
from waits import SECONDS_MAX, wait_until

__all__ = ["desk"]

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
ORDERS = 60


@contextmanager
def _process(dsn: str, desk: Desk, file: Path) -> Iterator[subprocess.Popen[bytes]]:
    child = subprocess.Popen(
        [
            sys.executable,
            str(HERE / "connector_child.py"),
            dsn,
            str(desk.user_id),
            desk.account,
            str(file),
            "0.01",
        ],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])},
    )
    try:
        yield child
    finally:
        child.kill()
        child.wait()


def _sent(file: Path) -> list[str]:
    return file.read_text(encoding="utf-8").splitlines() if file.exists() else []


@pytest.mark.slow
@pytest.mark.scenario("OMS-SHUTDOWN")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_it_cleanly(
    dsn: str, desk: Desk, tmp_path: Path, number: signal.Signals
) -> None:
    refs = desk.submits(ORDERS)
    with _process(dsn, desk, tmp_path / "sent") as child:
        wait_until(lambda: len(_sent(tmp_path / "sent")) > 5, "some to be sent")
        child.send_signal(number)
        assert child.wait(SECONDS_MAX) == 0
    sent = _sent(tmp_path / "sent")
    assert 5 < len(sent) < ORDERS
    assert sent == [f"SUBMIT {ref}" for ref in refs[: len(sent)]]
    # What was sent is said to be sent; nothing is claimed that wasn't.
    assert desk.rows(
        """SELECT count(*) FILTER (WHERE outcome = 'SENT'), count(claimed_by), count(done_at)
           FROM broker_command WHERE user_id = %s"""
    ) == [(len(sent), len(sent), len(sent))]
    assert desk.kinds() == ["CONNECTED", "LOGON", "DISCONNECTED", "LOGOUT"]
    assert desk.events("LOGOUT") == [{"reason": "SHUTDOWN"}]
    assert desk.lease()[:2] == (False, False)
    # The next one goes on where it was, at once.
    with _process(dsn, desk, tmp_path / "sent") as child:
        desk.wait_until_done()
        child.send_signal(number)
        assert child.wait(SECONDS_MAX) == 0
    assert _sent(tmp_path / "sent") == [f"SUBMIT {ref}" for ref in refs]


@pytest.mark.slow
def test_a_kill_loses_nothing_and_sends_nothing_twice(dsn: str, desk: Desk, tmp_path: Path) -> None:
    refs = desk.submits(ORDERS)
    file = tmp_path / "sent"
    for kills in range(1, 4):
        with _process(dsn, desk, file) as child:
            seen = len(_sent(file))
            wait_until(lambda: len(_sent(file)) > seen + 5, "some to be sent")  # noqa: B023
            child.send_signal(signal.SIGKILL)
            assert child.wait(SECONDS_MAX) == -signal.SIGKILL
        wait_until(lambda: not desk.lease()[0], f"the lease of killed process {kills} to end")
    with _process(dsn, desk, file) as child:
        wait_until(
            lambda: (
                desk.rows(
                    """SELECT count(*) FROM broker_command
                       WHERE user_id = %s AND claimed_by IS NULL"""
                )
                == [(0,)]
            ),
            "all to be claimed",
        )
        wait_until(lambda: f"SUBMIT {refs[-1]}" in _sent(file), "the last to be sent")
        child.send_signal(signal.SIGTERM)
        assert child.wait(SECONDS_MAX) == 0
    sent = _sent(file)
    assert max(Counter(sent).values()) == 1
    # What a killed process had claimed is left as it is: the broker's snapshot decides.
    left = {
        f"SUBMIT {ref}"
        for (ref,) in desk.rows(
            "SELECT order_id FROM broker_command WHERE user_id = %s AND done_at IS NULL"
        )
    }
    assert {f"SUBMIT {ref}" for ref in refs} - set(sent) <= left
    assert len(left) <= 3 * 20, "what was in hand, and sent and not yet said to be"
    said = desk.rows("SELECT order_id FROM broker_command WHERE user_id = %s AND outcome = 'SENT'")
    assert {f"SUBMIT {ref}" for (ref,) in said} <= set(sent)
