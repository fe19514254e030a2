"""Help is good enough to learn everything from, and is there at once."""

from __future__ import annotations

import subprocess
import sys

import pytest
from cli_cases import commands, here, process
from typer.testing import CliRunner

from cli.main import app

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

    shown = CliRunner().invoke(app, [*words.split(), "--help"], prog_name="oms")

    assert shown.exit_code == 0
    assert len(summary) <= 66, "the overview would break it into two lines"
    assert summary.endswith(".")
    assert "Example" in shown.output
    assert f"oms {words}" in shown.output.partition("Example")[2]


@pytest.mark.parametrize("words", sorted(commands()))
def test_help_fits_80_columns_without_breaking_lines(words: str) -> None:
    for line in commands()[words].help.splitlines():
        assert len(line) <= 78


@pytest.mark.parametrize("words", sorted(set(commands()) - WITHOUT_JSON))
def test_each_command_speaks_json(words: str) -> None:
    options = {option for parameter in commands()[words].params for option in parameter.opts}

    assert "--json" in options


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
