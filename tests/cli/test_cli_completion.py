"""TAB offers what there is, and never gets in the way."""

from __future__ import annotations

from pathlib import Path

from cli_cases import process, started


def _offers(words: str, env: dict[str, str]) -> list[str]:
    asked = process(
        env={
            **env,
            "_OMS_COMPLETE": "complete_bash",
            "COMP_WORDS": words,
            "COMP_CWORD": str(words.count(" ")),
        }
    )
    assert asked.err == ""
    return asked.out.split()


def test_runs_symbols_strategies_and_commands_are_offered(dsn: str) -> None:
    run_id = started(dsn, "alice", "--name", "first")
    nameless = started(dsn, "bob")
    env = {"DB_DSN": dsn}

    assert sorted(_offers("oms run show ", env)) == sorted(["first", nameless])
    assert _offers(f"oms run show {run_id[:8]}", env) == [run_id]
    assert _offers("oms tick --run-id fi", env) == ["first"]
    assert _offers("oms order list --symbol AA", env) == ["AAPL"]
    assert _offers("oms run start --strategy r", env) == ["rebalance"]
    assert _offers("oms run st", env) == ["start", "stop"]


def test_without_a_database_nothing_is_offered_and_nothing_is_started(tmp_path: Path) -> None:
    nowhere = {"DB_DSN": "postgresql://x@127.0.0.1:1/x"}
    never = {"OMS_HOME": str(tmp_path / "home")}

    for env in (nowhere, never):
        assert _offers("oms run show ", env) == []
        assert _offers("oms order list --symbol ", env) == []
    assert not (tmp_path / "home").exists()


def test_the_shells_script_can_be_had() -> None:
    shown = process(
        "--show-completion",
        env={"SHELL": "/bin/bash", "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"},
    )

    assert shown.code in (0, 2)
    assert "Traceback" not in shown.err
