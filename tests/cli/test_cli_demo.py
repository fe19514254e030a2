"""`oms demo`: twice at once, and then again, on one home."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from uuid import UUID

import pytest
from cli_cases import SCRIPT, Result, counts, environment, here, process

from engine.demo import Demo, DemoRun
from engine.report.model import EquityPoint, Holding, RunHistory, SipMark

DEMO_SECONDS_MAX = 300


@pytest.fixture
def home() -> Iterator[Path]:
    base = Path(tempfile.mkdtemp(prefix="oms-demo-"))
    base.chmod(0o755)
    yield base / "home"
    process("db", "stop", env={"OMS_HOME": str(base / "home")})
    shutil.rmtree(base)


def _two_at_once(home: Path, *arguments: str) -> list[Result]:
    begun = [
        subprocess.Popen(
            [SCRIPT, *arguments],
            env=environment({"OMS_HOME": str(home)}),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    ended = [process.communicate(timeout=DEMO_SECONDS_MAX) for process in begun]
    return [
        Result(process.returncode, out, err)
        for process, (out, err) in zip(begun, ended, strict=True)
    ]


@pytest.mark.slow
def test_two_demos_at_once_are_one_demo_and_a_third_adds_nothing(
    home: Path, tmp_path: Path
) -> None:
    env = {"OMS_HOME": str(home)}

    first, second = _two_at_once(home, "demo", "--json")

    assert (first.err, first.code, second.err, second.code) == ("", 0, "", 0)
    assert first.json == second.json
    plans, weights = first.json["runs"]
    assert list(plans) == [
        "name", "run_id", "ticks", "sip_executions", "orders", "trades", "invested", "cash",
        "market_value", "equity", "positions",
    ]  # fmt: skip
    assert (plans["name"], plans["ticks"], plans["sip_executions"]) == ("demo-sip", 3270, 465)
    assert (weights["name"], weights["ticks"]) == ("demo-rebalance", 3270)
    for run in (plans, weights):
        cash, value, equity = (Decimal(run[name]) for name in ("cash", "market_value", "equity"))
        assert cash + value == equity
        assert sorted(run["positions"]) == ["AAPL", "IBM", "MSFT"]
        assert set(run["positions"]["AAPL"]) == {"quantity", "avg_cost"}

    url = process("db", "url", env=env).out.strip()
    before = counts(url)
    third = process("demo", env=env, cwd=tmp_path)
    assert third.code == 0
    assert third.err == ""
    assert "All 6,540 ticks are already in the ledger: nothing was added." in third.out
    for words in ("Money-weighted return", "Max drawdown", "oms db stop", "oms-demo.html"):
        assert words in third.out
    assert "demo-sip" in (tmp_path / "oms-demo.html").read_text()
    assert counts(url) == before

    audited = process("audit", "--json", env=env)
    assert (audited.code, audited.json["findings"]) == (0, [])
    shown = process("run", "show", "demo-sip", "--json", env=env).json
    assert (shown["ticks"], shown["status"]) == (3270, "STOPPED")


def _told(written: int, repeated: int) -> Demo:
    """A demo of one run, told and not done."""
    at = datetime(2024, 1, 5, 21, tzinfo=UTC)
    amount = Decimal("500.5")
    mark = EquityPoint(at, 1000 - amount, amount, Decimal(1000), amount)
    holding = Holding("AAPL", Decimal(2), amount / 2, amount / 2, amount, Decimal(0), Decimal(0))
    run_id = UUID(int=7)
    history = RunHistory(
        *("demo-sip", str(run_id), str(run_id), "sip", "XNYS", "USD", Decimal(1000)),
        equity=[mark],
        holdings=[holding],
        sips=[SipMark(at, "AAPL", amount, amount / 2)],
        orders=1,
        executions=1,
        ticks=1,
        first_at=at,
        last_at=at,
    )
    return Demo((DemoRun("demo-sip", run_id, run_id, history),), written, repeated, 0.5)


def _pretend(monkeypatch: pytest.MonkeyPatch, demo: Demo) -> None:
    def run_demo(dsn: str, market: object, progress: Callable[[str, int, int], None]) -> Demo:
        progress("demo-sip", 0, 1)
        progress("demo-sip", 1, 1)
        return demo

    monkeypatch.setattr("engine.demo.run_demo", run_demo)


def test_a_demo_for_people(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    _pretend(monkeypatch, _told(2, 0))
    fresh = here("demo", "--dsn", "anywhere").out
    _pretend(monkeypatch, _told(1, 1))
    half = here("demo", "--dsn", "anywhere").out
    _pretend(monkeypatch, _told(0, 2))
    again = here("demo", "--dsn", "anywhere", "--report", "there.html").out

    rows = {line[:21].strip(): line[21:].strip() for line in fresh.splitlines()}
    assert (rows["Invested"], rows["Cash"], rows["Equity"]) == ("500.50", "499.50", "1,000.00")
    assert (rows["Money-weighted return"], rows["Max drawdown"]) == ("–", "0 %")
    assert rows["Orders"] == rows["Executions"] == rows["Ticks"] == "1"
    assert "Ticks per second" in rows
    assert "2 ticks in 0.5 s.\n" in fresh
    assert "1 tick in 0.5 s; 1 were in the ledger already.\n" in half
    assert "Ticks per second" not in half
    assert "oms db stop" not in fresh, "it isn't our server"
    assert Path("oms-demo.html").exists()
    assert "All 2 ticks are already in the ledger: nothing was added." in again
    assert "Ticks per second" not in again
    assert Path("there.html").exists()


def test_a_demo_for_programs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    _pretend(monkeypatch, _told(1, 0))

    document = here("demo", "--dsn", "anywhere", "--json").json

    assert document == {
        "runs": [
            {
                "name": "demo-sip",
                "run_id": str(UUID(int=7)),
                "ticks": 1,
                "sip_executions": 1,
                "orders": 1,
                "trades": 1,
                "invested": "500.5",
                "cash": "499.5",
                "market_value": "500.5",
                "equity": "1000",
                "positions": {"AAPL": {"quantity": "2", "avg_cost": "250.25"}},
            }
        ]
    }
    assert not list(tmp_path.iterdir()), "no report unless it is asked for"
