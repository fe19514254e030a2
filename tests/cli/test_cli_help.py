"""Help is good enough to learn everything from, and is there at once."""

from __future__ import annotations

import subprocess
import sys

import pytest
from cli_cases import commands, here, process

# Each of these costs a command more than help may take altogether.
HEAVY = (
    "sqlalchemy",
    "alembic",
    "matplotlib",
    "exchange_calendars",
    "pandas",
    "psycopg",
    "pydantic",
)

WITHOUT_JSON = {"db psql"}


def test_help_imports_nothing_heavy() -> None:
    program = (
        "import sys, cli.main; cli.main.main(['--help']); "
        f"print('heavy:', sorted(set(sys.modules) & set({HEAVY!r})))"
    )

    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )

    assert done.stdout.endswith("heavy: []\n")


@pytest.mark.parametrize("words", sorted(commands()))
def test_each_command_explains_itself(words: str) -> None:
    command = commands()[words]
    summary = command.help.partition("\n")[0]

    shown = here(*words.split(), "--help")

    assert shown.code == 0
    assert len(summary) <= 66, "the overview would break it into two lines"
    assert summary.endswith(".")
    assert "Example" in shown.out
    assert f"oms {words}" in shown.out.partition("Example")[2]
    assert all(len(line) <= 78 for line in command.help.splitlines()), "80 columns would break it"
    assert "--json" in shown.out or words in WITHOUT_JSON


def test_the_installed_command_shows_its_help_and_its_version() -> None:
    shown = process("--help", env={})
    version = process("--version", env={})

    assert (shown.code, version.code) == (0, 0)
    assert "oms demo" in shown.out
    assert "Exit codes" in shown.out
    assert version.out.startswith("oms ")


@pytest.mark.parametrize("words", [(), ("run",), ("db",)])
def test_without_a_verb_the_help_is_shown_and_nothing_is_done(words: tuple[str, ...]) -> None:
    shown = here(*words)

    assert shown.code == 2
    assert "Usage: oms" in shown.out
    assert shown.err == ""


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("nope",), "No such command 'nope'"),
        (("tick",), "Missing option '--run-id'; `oms tick --help` shows how."),
        (("tick", "--run-id", "x", "--prize", "1"), "No such option: --prize"),
        (("run", "list", "--limit", "many"), "Invalid value for '--limit'"),
        (("run", "show"), "Name the run"),
        (("run", "show", "a", "--run-id", "b"), "The run is named twice"),
        (("data", "import"), "Name a file of prices"),
        (
            ("sip", "add", "--run-id", "x", "--symbol", "A", "--amount", "1", "--day", "32"),
            "'--day'",
        ),
    ],
)
def test_wrong_usage_is_one_sentence_that_points_to_help(words: tuple[str, ...], told: str) -> None:
    wrong = here(*words)

    assert wrong.code == 2
    assert told in wrong.sentence
    assert "--help` shows how." in wrong.sentence
    assert here(*words, "--json").error["type"] == "UsageError"
