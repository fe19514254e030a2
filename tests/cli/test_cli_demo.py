"""`oms demo`: twice at once, and then again, on one home."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path

import pytest
from cli_cases import SCRIPT, Result, counts, environment, process

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
    assert "All 6,540 ticks were in the ledger already: nothing was added." in third.out
    for words in ("Money-weighted return", "Max drawdown", "oms db stop", "oms-demo.html"):
        assert words in third.out
    assert "demo-sip" in (tmp_path / "oms-demo.html").read_text()
    assert counts(url) == before

    audited = process("audit", "--json", env=env)
    assert (audited.code, audited.json["findings"]) == (0, [])
    shown = process("run", "show", "demo-sip", "--json", env=env).json
    assert (shown["ticks"], shown["status"]) == (3270, "STOPPED")
