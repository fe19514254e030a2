"""The primary is killed in the middle of a busy session, and its standby takes over."""

from __future__ import annotations

import os
import sys

import pytest
from siege import (
    a_server,
    a_siege,
    copy_of,
    dsn_of_both,
    install,
    make_synchronous,
    open_folder,
    promote,
)

from engine.db.embedded import Server

ROUNDS = int(os.environ.get("OMS_CRASH_ROUNDS", "1"))
FIRST = int(os.environ.get("OMS_CRASH_SEED", "1"))
STEPS = 40


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(FIRST, FIRST + ROUNDS))
def test_what_was_acknowledged_outlives_the_primary_and_everybody_goes_on(
    server: Server, seed: int
) -> None:
    """No tick, order or execution is lost or doubled, and nobody starts anything again."""
    with open_folder() as folder, a_server(folder, server.bin_dir) as primary:
        dsn = install(primary)
        standby = copy_of(primary, folder / "standby", follows=True)
        try:
            standby.start()
            make_synchronous(primary)
            with a_siege(dsn_of_both(dsn, primary, standby), folder, seed) as siege:
                siege.has_manager = False
                seen: set[str] = set()

                def fail_over() -> None:
                    seen.update(siege.executions())
                    primary.kill()
                    promote(standby)

                try:
                    siege.busy(STEPS, fail_over)
                    siege.wait_until_up()
                    siege.settle()
                    siege.must_agree()
                    assert seen <= siege.executions()
                    ended = [n for n, each in siege.house.programs.items() if each.has_ended]
                    assert ended == []
                except BaseException:
                    sys.stderr.write(f"{siege.story()}\nto repeat it: OMS_CRASH_SEED={seed}\n")
                    raise
        finally:
            standby.stop("immediate")
