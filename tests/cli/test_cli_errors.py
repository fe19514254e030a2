"""Whatever goes wrong is one line on stderr and an exit code."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Callable
from typing import NoReturn

import psycopg
import pytest
import typer
from cli_cases import SCRIPT, environment, here, oms, started

from cli import errors
from cli import main as cli_main
from engine import errors as engine_errors


@pytest.mark.parametrize(
    ("error", "kind", "code"),
    [
        (engine_errors.BadInput("no"), "BadInput", 1),
        (engine_errors.StrategyFailed("no"), "StrategyFailed", 1),
        (engine_errors.RunNotRunning("no", "rule", "23T03", "Do."), "RunNotRunning", 1),
        (engine_errors.ConfigurationError("no"), "ConfigurationError", 2),
        (engine_errors.DatabaseUnavailable("no"), "DatabaseUnavailable", 2),
        (engine_errors.Retryable("no"), "Retryable", 2),
        (psycopg.errors.LockNotAvailable("no"), "Retryable", 2),
        (psycopg.OperationalError("the server left"), "DatabaseUnavailable", 2),
        (psycopg.errors.UndefinedTable("no such table"), "UndefinedTable", 2),
        (PermissionError(errno.EACCES, os.strerror(errno.EACCES), "/a/b"), "PermissionError", 2),
        (OSError("odd"), "OSError", 2),
        (KeyError("odd"), "KeyError", 2),
        (typer.Abort(), "Aborted", 1),
        (typer.BadParameter("Do it right"), "UsageError", 2),
        (typer.BadParameter("not so", param_hint="--x"), "UsageError", 2),
    ],
)
def test_each_error_has_a_code_and_a_sentence(error: Exception, kind: str, code: int) -> None:
    failure = errors.explain(error)

    assert (failure.type, failure.code) == (kind, code)
    assert "\n" not in failure.message


def test_an_error_on_several_lines_becomes_one() -> None:
    failure = errors.explain(engine_errors.BadInput("one\n  two"))

    assert failure.message == "one two."


def test_a_bug_says_how_to_see_more_of_it() -> None:
    assert "OMS_TRACEBACK=1" in errors.explain(ZeroDivisionError("odd")).message
    assert "/a/b" in errors.explain(OSError(errno.ENOSPC, "No space", "/a/b")).message


def _raising(error: BaseException) -> Callable[..., NoReturn]:
    def command(*arguments: object, **options: object) -> NoReturn:
        raise error

    return command


def test_a_bug_is_told_in_a_sentence_unless_the_traceback_is_wanted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cli_main, "app", _raising(ZeroDivisionError("odd")))
    told = here("anything")
    assert told.code == 2
    assert told.sentence.startswith("ZeroDivisionError: odd; this is a bug")

    monkeypatch.setenv("OMS_TRACEBACK", "1")
    with pytest.raises(ZeroDivisionError):
        here("anything")


def test_an_interrupted_command_says_what_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cli.user.reading", _raising(KeyboardInterrupt()))

    interrupted = here("user", "list")

    assert interrupted.code == 130
    assert "what was committed stays" in interrupted.sentence
    assert here("user", "list", "--json").error["type"] == "Interrupted"


def test_a_rule_of_the_database_is_named(dsn: str) -> None:
    run_id = started(dsn)
    arguments = ("run", "start", "--user", "alice", "--cash", "1")

    refused = oms(dsn, *arguments)
    error = oms(dsn, *arguments, "--json").error

    assert refused.code == 1
    assert f"Stop run {run_id} first" in refused.sentence
    assert error["type"] == "RunAlreadyRunning"
    assert error["constraint"] == "strategy_run_one_running_per_user"


def test_an_unreachable_server_is_no_traceback(dsn: str) -> None:
    nowhere = here("run", "list", "--dsn", "postgresql://x@127.0.0.1:1/x")
    nonsense = here("run", "list", "--dsn", "nonsense")

    assert (nowhere.code, nonsense.code) == (2, 2)
    assert "Connection refused" in nowhere.sentence
    assert "postgresql://user@host/name" in nonsense.sentence


def test_a_database_without_the_schema_is_named_and_left_alone(dsn: str) -> None:
    # As the tests make it, from sql/, no migration is noted in it.
    refused = here("run", "list", "--dsn", dsn)

    assert refused.code == 2
    assert "oms db migrate" in refused.sentence
    assert here("run", "list", "--dsn", dsn, "--json").error["type"] == "ConfigurationError"


def test_a_reader_that_leaves_early_is_no_error(dsn: str) -> None:
    started(dsn)
    with subprocess.Popen(
        [SCRIPT, "run", "list", "--dsn", dsn],
        env=environment({}),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.stderr is not None
        told = process.stderr.read()

    assert process.returncode == 141
    assert told == b""
