"""The peers' environment and their processes, without installing any of them."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench.harness import result_of
from bench.live import tps_of
from bench.peers import environment
from bench.peers.environment import PACKAGES, InstalledPeer, arguments_of, installed_peers
from bench.replays import DENSE, SPARSE
from engine.errors import ConfigurationError

SCRIPTS = {peer: Path(environment.__file__).parent / f"run_{peer}.py" for peer in DENSE.must}


class Commands:
    """Stands in for the processes that make an environment."""

    def __init__(self, missing: str = "") -> None:
        self.missing = missing
        self.ran: list[list[str]] = []

    def __call__(self, arguments: list[str]) -> str:
        self.ran.append(arguments)
        return self.missing if "-c" in arguments else ""


def test_a_peer_is_asked_with_its_bars_and_its_minutes() -> None:
    words = arguments_of(Path("env/bin/python"), "backtrader", Path("bars.csv"), 390)
    assert words == ["env/bin/python", "-I", str(SCRIPTS["backtrader"]), "bars.csv", "390"]


@pytest.mark.parametrize("peer", sorted(SCRIPTS))
def test_a_peers_script_imports_nothing_of_ours(peer: str) -> None:
    tree = ast.parse(SCRIPTS[peer].read_text(encoding="utf-8"))
    imported = {
        name
        for node in ast.walk(tree)
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    assert any(name.partition(".")[0] == peer for name in imported)
    assert not {name.partition(".")[0] for name in imported} & {"engine", "cli", "bench"}


def test_both_replays_are_measured_against_both_peers() -> None:
    assert {peer.name for peer in _environment(Commands())} == set(DENSE.must) == set(SPARSE.must)


def _environment(commands: Commands, folder: Path | None = None) -> list[InstalledPeer]:
    return installed_peers(folder or Path("nowhere"), lambda _: None, commands)


def test_an_environment_that_has_everything_is_taken_as_it_is(tmp_path: Path) -> None:
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.touch()
    commands = Commands()
    peers = _environment(commands, tmp_path)
    assert len(commands.ran) == 1
    assert {peer.python for peer in peers} == {python}


def test_what_is_missing_is_installed_in_its_version(tmp_path: Path) -> None:
    commands = Commands(missing="backtrader\n")
    _environment(commands, tmp_path / "new")
    made, _, installed = commands.ran
    assert made[-3:] == ["-m", "venv", str(tmp_path / "new")]
    assert installed[0] == str(tmp_path / "new" / "bin" / "python")
    assert installed[-1] == f"backtrader=={PACKAGES['backtrader']}"


def test_an_environment_that_can_not_be_made_names_the_way_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(environment.sys, "executable", "false")  # type: ignore[attr-defined]
    with pytest.raises(ConfigurationError, match="--peers"):
        installed_peers(tmp_path / "new", lambda _: None)


@pytest.mark.parametrize(
    ("program", "told"),
    [
        ("import sys; sys.exit('nothing was filled')", "nothing was filled"),
        ("pass", "said nothing"),
    ],
)
def test_a_process_that_fails_is_told_by_its_last_word(program: str, told: str) -> None:
    with pytest.raises(ConfigurationError, match=told):
        result_of(_process(program))


def test_a_process_answers_with_its_last_line() -> None:
    program = f"print('starting'); print({json.dumps({'seconds': 1.5})!r})"
    assert result_of(_process(program)) == {"seconds": 1.5}


def _process(program: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_pgbench_tells_its_transactions_a_second() -> None:
    said = "latency average = 0.6 ms\ntps = 1697.123456 (without initial connection time)\n"
    assert tps_of(said) == 1697.123456
    with pytest.raises(ConfigurationError):
        tps_of("pgbench: error")
