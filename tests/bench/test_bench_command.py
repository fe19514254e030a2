"""`oms bench` as people and programs meet it: its options, its output, its exit codes."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest

import bench.run
from bench import MEASUREMENTS
from bench.harness import Row
from bench.profile import Cost
from bench.run import Benchmark
from bench.sizes import FULL, QUICK, Sizes
from bench.space import Relation
from cli.main import main
from engine.audit import Finding
from engine.errors import ConfigurationError

MET = Row("live tick", 900.0, "ticks/s", 0.8, peer=1_000.0, peer_name="pgbench")
MISSED = Row("dense replay", 2_000.0, "bars/s", 3.0, peer=1_000.0, peer_name="nautilus_trader")
SLOW = Row("oms --help", 0.6, "s", 0.3, better="less")
WRONG = Finding("audit_cash", None, None, "cash", "is 1, the executions make it 2", 1)


class Faked:
    """Stands in for the benchmark: what it is asked, and what it answers."""

    def __init__(self, *rows: Row, findings: tuple[Finding, ...] = ()) -> None:
        self.asked: dict[str, Any] = {}
        self.answer = Benchmark(
            list(rows),
            [Cost("ticks_write", 1.0, 900.0, 300.0), Cost("client", None, 250.0, 250.0)],
            [Relation("orders", "table", 553.0, None), Relation("orders_pkey", "index", 86.0, 7)],
            {"fsync": "on"},
            {"live": list(findings)},
        )

    def __call__(
        self, sizes: Sizes, *, only: Collection[str], peers: Path | None, tell: object
    ) -> Benchmark:
        self.asked = {"sizes": sizes, "only": list(only), "peers": peers}
        return self.answer


def _bench(*words: str) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(["bench", *words])
    return code, out.getvalue(), err.getvalue()


@pytest.mark.parametrize(
    ("rows", "words", "code"),
    [
        ((MET,), (), 0),
        ((MET, MISSED), (), 1),
        ((MISSED,), ("--tolerance", "0.7"), 1),
        ((MISSED,), ("--tolerance", "0.6"), 0),
        ((SLOW,), (), 1),
        ((SLOW,), ("--tolerance", "0.9"), 0),
    ],
)
def test_the_exit_code_says_whether_all_rows_meet_what_they_must(
    monkeypatch: pytest.MonkeyPatch, rows: tuple[Row, ...], words: tuple[str, ...], code: int
) -> None:
    monkeypatch.setattr(bench.run, "run", Faked(*rows))
    assert _bench(*words)[0] == code
    assert _bench("--json", *words)[0] == code


def test_json_is_the_rows_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench.run, "run", Faked(MET, SLOW))
    _, out, err = _bench("--json")
    found = json.loads(out)
    assert list(found) == ["rows"]
    assert [row["name"] for row in found["rows"]] == ["live tick / pgbench", "oms --help"]
    assert set(found["rows"][0]) == {
        *("name", "ours", "peer", "peer_name", "ratio", "must", "unit", "meets"),
    }
    assert err == ""


def test_people_see_the_rows_the_bars_the_space_and_the_audit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bench.run, "run", Faked(MET, SLOW))
    _, out, _ = _bench()
    for words in (
        *("live tick / pgbench", ">= 0.8x", "<= 0.3 s", "WRONG", "│", "orders_pkey", "553.0"),
        *("PART OF A LIVE TICK", "ticks_write", "900.0", "300.0"),
        *("Server: fsync on.", "Audit: nothing found in live."),
    ):
        assert words in out


def test_books_that_do_not_hold_fail_whatever_the_rows_say(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bench.run, "run", Faked(MET, findings=(WRONG,)))
    code, out, err = _bench("--json", "--tolerance", "0.01")
    assert code == 1
    assert json.loads(out)["rows"]
    assert "audit of live: audit_cash: cash is 1" in err


def test_the_options_reach_the_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    faked = Faked(MET)
    monkeypatch.setattr(bench.run, "run", faked)
    _bench("--quick", "--only", "live", "--only", "sip", "--peers", "somewhere")
    assert faked.asked == {"sizes": QUICK, "only": ["live", "sip"], "peers": Path("somewhere")}
    _bench()
    assert faked.asked == {"sizes": FULL, "only": [], "peers": None}


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--only", "nothing"), f"choose of {', '.join(MEASUREMENTS)}"),
        (("--tolerance", "2"), "--tolerance"),
        (("--tolerance", "0"), "--tolerance"),
        (("--fast",), "No such option"),
    ],
)
def test_wrong_usage_is_told_and_measures_nothing(
    monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], told: str
) -> None:
    faked = Faked(MET)
    monkeypatch.setattr(bench.run, "run", faked)
    code, out, err = _bench(*words)
    assert (code, out) == (2, "")
    assert told in err
    assert not faked.asked


def test_what_can_not_be_measured_is_no_missed_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> Benchmark:
        raise ConfigurationError("the peers can't be installed")

    monkeypatch.setattr(bench.run, "run", fails)
    code, out, err = _bench("--json")
    assert (code, out) == (2, "")
    assert json.loads(err)["error"]["type"] == "ConfigurationError"


def test_the_picture_is_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(bench.run, "run", Faked(MET, MISSED))
    path = tmp_path / "bars.png"
    _bench("--picture", str(path))
    assert path.stat().st_size > 1_000
