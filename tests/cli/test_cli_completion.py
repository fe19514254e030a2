"""TAB offers what there is, and never gets in the way."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cli_cases import process, started

from cli.completion import complete_run, complete_strategy, complete_symbol


def _words(offers: list[tuple[str, str]]) -> list[str]:
    return sorted(word for word, _ in offers)


def _typed(dsn: str | None) -> Any:
    """What completion sees of the command line so far."""
    return SimpleNamespace(params={"dsn": dsn})


def test_runs_are_offered_by_name_and_once_something_is_typed_by_id(dsn: str) -> None:
    first = started(dsn, "alice", "--name", "first")
    nameless = started(dsn, "bob")

    assert _words(complete_run(_typed(dsn), "")) == sorted(["first", nameless])
    assert _words(complete_run(_typed(dsn), first[:8])) == [first]
    assert complete_run(_typed(dsn), "fi") == [("first", "sip of alice, RUNNING")]
    assert complete_run(_typed(dsn), "zz") == []


def test_symbols_and_strategies_are_offered(dsn: str) -> None:
    started(dsn)

    assert _words(complete_symbol(_typed(dsn), "AA")) == ["AAPL"]
    assert _words(complete_strategy("")) == ["rebalance", "sip"]
    assert _words(complete_strategy("r")) == ["rebalance"]


def test_the_shell_is_answered(dsn: str) -> None:
    started(dsn, "alice", "--name", "first")

    asked = process(
        env={
            "DB_DSN": dsn,
            "_OMS_COMPLETE": "complete_bash",
            "COMP_WORDS": "oms run show ",
            "COMP_CWORD": "3",
        }
    )

    assert (asked.out.split(), asked.err) == (["first"], "")


def test_without_a_database_nothing_is_offered_and_nothing_is_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("DB_DSN", "PGHOST", "PGHOSTADDR", "PGPORT", "PGSERVICE", "PGDATABASE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OMS_HOME", str(tmp_path / "home"))

    for dsn in (None, "postgresql://x@127.0.0.1:1/x", "nonsense"):
        assert complete_run(_typed(dsn), "") == []
        assert complete_symbol(_typed(dsn), "") == []
    assert not (tmp_path / "home").exists()


def test_the_shells_script_can_be_had() -> None:
    env = {"SHELL": "/bin/bash", "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}

    shown = process("--show-completion", "bash", env=env)

    assert shown.code == 0
    assert "_oms_completion" in shown.out
