"""Faults by lot, and a busy session by lot: whatever happens, the books agree in the end.

One run a seed. ``OMS_FAULT_RUNS`` says how many (100), ``OMS_FAULT_SEED`` which is the first.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from chaos import Loop, Session, a_loop, a_stand

from engine.brokers.dummy.random_plans import random_plan
from engine.db.connect import ENGINE_ROLE, Connection, open_connection

RUNS = int(os.environ.get("OMS_FAULT_RUNS", "100"))
FIRST = int(os.environ.get("OMS_FAULT_SEED", "1"))
# So many runs share a database.
RUNS_A_TEST = 20

_HOW = "OMS_FAULT_SEED={seed} OMS_FAULT_RUNS=1 pytest -n0 tests/oms_tests/stress/{file}"


@pytest.mark.slow
@pytest.mark.parametrize("first", range(FIRST, FIRST + RUNS, RUNS_A_TEST))
def test_the_books_agree_with_the_exchange_whatever_happens(
    dsn: str, owner_conn: Connection, tmp_path: Path, first: int
) -> None:
    with open_connection(dsn, role=ENGINE_ROLE) as engine, a_loop() as loop:
        for seed in range(first, min(first + RUNS_A_TEST, FIRST + RUNS)):
            one_run(dsn, owner_conn, engine, loop, tmp_path / str(seed), seed)


def one_run(
    dsn: str, owner: Connection, engine: Connection, loop: Loop, folder: Path, seed: int
) -> None:
    with a_stand(dsn, owner, engine, loop, folder, random_plan(seed), f"seed{seed}") as stand:
        try:
            with stand.connected():
                Session(stand, seed).run()
                stand.settle()
            stand.must_agree()
        except BaseException:
            how = _HOW.format(seed=seed, file=Path(__file__).name)
            sys.stderr.write(f"{stand.story()}\nseed {seed} failed; to repeat just it:\n  {how}\n")
            raise
