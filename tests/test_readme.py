"""README.md does what it says: its tour runs as written, its strategy trades, its links lead."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SECONDS_MAX = 300


@pytest.fixture
def at_home(tmp_path: Path) -> Iterator[dict[str, str]]:
    """An environment with an embedded server of its own, which is ended afterwards."""
    home = Path(tempfile.mkdtemp(prefix="oms-readme-"))
    home.chmod(0o755)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("PG", "DB_DSN", "COV"))}
    env = inherited | {"OMS_HOME": str(home), "PATH": path, "PYTHONPATH": str(tmp_path)}
    yield env
    subprocess.run(["oms", "db", "stop"], env=env, check=True, capture_output=True)
    subprocess.run(["rm", "-r", str(home)], check=True)


def _console_lines(heading: str) -> Iterator[tuple[str, str]]:
    """The commands of a section, each with what is typed into it."""
    section = README.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    for block in re.findall(r"```console\n(.*?)```", section, re.DOTALL):
        for command in re.split(r"^\$ ", block.replace("\\\n", " "), flags=re.MULTILINE)[1:]:
            first, *rest = command.splitlines()
            typed = [line.removeprefix("oms=> ") for line in rest if line.startswith("oms=> ")]
            yield first, "\n".join(typed)


@pytest.mark.slow
def test_the_tour_runs_as_it_is_written(at_home: dict[str, str], tmp_path: Path) -> None:
    printed = {}
    for command, typed in [("oms demo", ""), *_console_lines("Ten minutes")]:
        done = subprocess.run(
            ["bash", "-c", command],
            input=typed,
            env=at_home,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=SECONDS_MAX,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        printed[command] = done.stdout + done.stderr
    assert "2.666666" in printed["oms position list --run-id first"]
    assert "HINT:  Insert executions; the database computes cash." in printed["oms db psql"]

    (module,) = re.findall(r"```python\n# momentum.py\n(.*?)```", README, re.DOTALL)
    (tmp_path / "momentum.py").write_text(module, encoding="utf-8")
    start, *_ = [command for command, _ in _console_lines("Your own strategy")]
    replay = "oms replay --run-id clever --from 2008-01-01T00:00Z --to 2008-07-01T00:00Z --json"
    for command in (
        "oms user add cleo",
        f"{start} --name clever",
        replay,
        "oms order list --run-id clever --json",
        "oms audit",
    ):
        done = subprocess.run(
            ["bash", "-c", command], env=at_home, cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        printed[command] = done.stdout
    assert "FILLED" in printed["oms order list --run-id clever --json"]


@pytest.mark.parametrize("document", sorted(p.relative_to(ROOT) for p in ROOT.glob("*.md")))
def test_its_links_lead_somewhere(document: Path) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert (ROOT / document.parent / target).exists(), f"{document}: {target}"
