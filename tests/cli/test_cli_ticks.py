"""`oms tick`, `oms replay` and `oms schedule`: how runs move."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from uuid import UUID

import pytest
from cli_cases import SCRIPT, Result, counts, environment, oms, process, started, tick

from engine.clock import utc_now
from engine.db.connect import open_connection
from engine.schedule import Round, Share

CLOSE = "2024-01-05T21:00:00Z"
PLAN = ("--symbol", "AAPL", "--amount", "500", "--day", "5", "--from", "2024-01-01")
PRICES = """symbol,date,open,high,low,close,volume
AAPL,2024-01-04,249,251,248,250,1000
AAPL,2024-01-05,250,251,249,250,1000
AAPL,2024-01-08,255,261,254,260,1000
"""


def _planned(dsn: str) -> str:
    run_id = started(dsn, "alice", "--name", "first")
    assert oms(dsn, "sip", "add", "--run-id", run_id, *PLAN).code == 0
    return run_id


def _with_prices(dsn: str, folder: Path) -> str:
    run_id = _planned(dsn)
    (folder / "prices.csv").write_text(PRICES)
    assert oms(dsn, "data", "import", str(folder / "prices.csv")).code == 0
    return run_id


def test_a_tick_twice_is_a_tick_once(dsn: str) -> None:
    run_id = _planned(dsn)

    first = tick(dsn, run_id, CLOSE, "AAPL=250")
    before = counts(dsn)
    again = tick(dsn, run_id, CLOSE, "AAPL=250")
    told = oms(dsn, "tick", "--run-id", run_id, "--at", CLOSE, "--price", "AAPL=250")

    assert first.json == {
        "run_id": run_id,
        "logical_time": CLOSE,
        "repeated": False,
        "orders": 1,
        "executions": 1,
        "cash": "9500",
        "market_value": "500",
        "equity": "10000",
    }
    assert again.code == told.code == 0
    assert again.json == {**first.json, "repeated": True}
    assert "was in the ledger already; nothing was written" in told.out
    assert counts(dsn) == before


def test_a_tick_says_what_it_did(dsn: str) -> None:
    run_id = _planned(dsn)

    told = oms(dsn, "tick", "--run-id", run_id, "--at", CLOSE, "--price", "AAPL=250")

    assert told.out == (
        "Tick at 2024-01-05 21:00 UTC: 1 order, 1 execution; equity 10,000.00 = "
        "cash 9,500.00 + market value 500.00 USD.\n"
    )


def test_a_tick_without_prices_takes_the_stored_ones(dsn: str, tmp_path: Path) -> None:
    run_id = _with_prices(dsn, tmp_path)

    done = tick(dsn, run_id, CLOSE)

    assert (done.json["executions"], done.json["market_value"]) == (1, "500")


def test_a_tick_without_a_time_is_now(dsn: str) -> None:
    run_id = started(dsn)

    done = oms(dsn, "tick", "--run-id", run_id)

    assert done.code == 0
    assert ": 0 orders, 0 executions; equity 10,000.00 = " in done.out
    with open_connection(dsn) as conn:
        row = conn.execute(
            "SELECT now() - logical_time < interval '1 minute' FROM event_ledger "
            "WHERE event_type = 'TICK'"
        ).fetchone()
    assert row == (True,)


def test_bad_input_is_refused_and_nothing_is_written(dsn: str) -> None:
    run_id = _planned(dsn)
    before = counts(dsn)

    def refused(at: str, *prices: str) -> str:
        given = [word for price in prices for word in ("--price", price)]
        done = oms(dsn, "tick", "--run-id", run_id, "--at", at, *given)
        assert done.code == 1
        return done.sentence

    assert "has no timezone" in refused("2024-01-05T21:00:00", "AAPL=250")
    assert "isn't a date and time" in refused("soon", "AAPL=250")
    for price in ("AAPL=abc", "AAPL=nan", "AAPL=-1", "AAPL=0", "AAPL=1e400", "AAPL", "=5"):
        refused(CLOSE, price)
    assert "has two prices" in refused(CLOSE, "AAPL=250", "aapl=251")
    assert "NOPE" in refused(CLOSE, "NOPE=1")
    assert "oms run list" in oms(dsn, "tick", "--run-id", "nope").sentence
    assert counts(dsn) == before


def test_a_run_only_moves_forward(dsn: str) -> None:
    run_id = _planned(dsn)
    assert tick(dsn, run_id, CLOSE, "AAPL=250").code == 0

    error = tick(dsn, run_id, "2024-01-04T21:00:00Z", "AAPL=250").error

    assert error["type"] == "TimeMovesForward"


def test_a_replay_ticks_at_every_stored_price_once(dsn: str, tmp_path: Path) -> None:
    run_id = _with_prices(dsn, tmp_path)
    times = ("--from", "2024-01-05", "--to", "2024-01-08")

    first = oms(dsn, "replay", "--run-id", run_id, *times, "--json").json
    before = counts(dsn)
    again = oms(dsn, "replay", "--run-id", run_id, *times, "--json").json
    told = oms(dsn, "replay", "--run-id", run_id, *times).out
    onwards = oms(dsn, "replay", "--run-id", run_id)

    assert (first["written"], first["repeated"]) == (2, 0)
    assert (first["equity"], first["last_logical_time"]) == ("10020", "2024-01-08T21:00:00Z")
    assert (again["written"], again["repeated"]) == (0, 2)
    assert "All 2 ticks were in the ledger already." in told
    assert "There are no stored prices" in onwards.out
    assert onwards.code == 0
    assert counts(dsn) == before


def test_a_replay_goes_on_from_the_last_tick(dsn: str, tmp_path: Path) -> None:
    run_id = _with_prices(dsn, tmp_path)
    assert oms(dsn, "replay", "--run-id", run_id, "--to", "2024-01-04T21:00:00Z").code == 0

    rest = oms(dsn, "replay", "--run-id", run_id)

    assert rest.out.startswith("2 ticks in ")
    assert "At 2024-01-08 21:00 UTC: equity 10,020.00" in rest.out


def test_a_replay_of_nonsense_is_refused(dsn: str) -> None:
    run_id = started(dsn)

    upside_down = oms(
        dsn, "replay", "--run-id", run_id, "--from", "2024-01-05", "--to", "2024-01-04"
    )
    naive = oms(dsn, "replay", "--run-id", run_id, "--from", "2024-01-05T00:00:00")

    assert (upside_down.code, naive.code) == (1, 1)
    assert "swap them" in upside_down.sentence
    assert "has no timezone" in naive.sentence


def _behind(dsn: str, *options: str) -> str:
    """A run whose last tick was six days ago, so that at least two closes have come since."""
    run_id = started(dsn, "alice", *options)
    assert tick(dsn, run_id, (utc_now() - timedelta(days=6)).isoformat()).code == 0
    return run_id


def test_a_round_of_the_schedule_ticks_what_is_due(dsn: str) -> None:
    _behind(dsn)

    done = oms(dsn, "schedule", "--once", "--json")
    again = oms(dsn, "schedule", "--once")

    assert done.code == 0
    assert 2 <= done.json["ticks"] <= 6
    assert (done.json["repeated"], done.json["stuck"]) == (0, [])
    assert again.out.endswith("UTC: 0 ticks.\n")


def test_a_run_that_can_not_go_on_is_a_finding(dsn: str) -> None:
    run_id = _behind(dsn, "--strategy", "cli_strategies:FailsLater")

    done = oms(dsn, "schedule", "--once")

    assert done.code == 1
    assert f"run {run_id} " in done.out
    assert "on purpose" in done.out


def _scheduled(dsn: str, number: signal.Signals, **env: str) -> Result:
    """Run the schedule until it has told of a round, then end it by a signal."""
    with subprocess.Popen(
        [SCRIPT, "schedule", "--every", "1", "--dsn", dsn, "--json"],
        env=environment(env),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as running:
        assert running.stdout is not None
        first = running.stdout.readline()
        os.kill(running.pid, number)
        out, err = running.communicate(timeout=90)
    return Result(running.returncode, first + out, err)


def test_the_schedule_runs_until_it_is_told_to_end(dsn: str) -> None:
    _behind(dsn)

    by_hand = _scheduled(dsn, signal.SIGINT)
    by_service = _scheduled(dsn, signal.SIGTERM)

    assert (by_hand.code, by_hand.err) == (0, "")
    assert (by_service.code, by_service.err) == (0, "")
    assert json.loads(by_hand.out.splitlines()[0])["ticks"] >= 2
    assert json.loads(by_service.out.splitlines()[0])["ticks"] == 0


def test_what_the_schedule_tells_is_on_stderr_and_in_its_log(dsn: str, tmp_path: Path) -> None:
    run_id = _behind(dsn, "--strategy", "cli_strategies:FailsLater")
    modules = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])

    done = _scheduled(dsn, signal.SIGTERM, OMS_LOG=str(tmp_path), PYTHONPATH=modules)

    logged = (tmp_path / "schedule.log").read_text(encoding="utf-8").splitlines()
    first = json.loads(logged[0])
    assert (first["event"], first["level"], first["run_id"]) == ("TICK_FAILED", "ERROR", run_id)
    assert "on purpose" in first["error"]
    assert logged[0] in done.err.splitlines()


def test_the_schedule_tells_of_rounds_in_which_something_happened(
    dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def serve(
        dsn: str, *, every_seconds: int, share: Share, report: Callable[[Round], None]
    ) -> None:
        assert every_seconds == 60
        report(Round())
        report(Round(ticks=3, stuck={UUID(int=7): "waits"}))

    monkeypatch.setattr("engine.schedule.serve", serve)

    told = oms(dsn, "schedule").out

    lines = told.splitlines()
    assert [line.partition(" UTC: ")[2] for line in lines] == [
        "3 ticks.",
        f"run {UUID(int=7)} waits.",
    ]


def test_a_schedule_without_a_database_ends_at_once() -> None:
    done = process("schedule", "--dsn", "postgresql://x@127.0.0.1:1/x", env={})

    assert done.code == 2
    assert "can't connect" in done.sentence
