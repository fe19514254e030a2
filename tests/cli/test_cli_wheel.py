"""An installed wheel works from any folder: the schema and the data travel in it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import psycopg
import pytest
from cli_cases import environment
from psycopg.conninfo import make_conninfo

from engine.db.embedded import Server
from engine.db.install import OWNER_ROLE, head

ROOT = Path(__file__).resolve().parents[2]
BUILD_SECONDS_MAX = 300


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    built = _pip("wheel", "--no-deps", "--wheel-dir", str(folder), str(ROOT))
    if built.returncode and "No matching distribution" in built.stderr:
        pytest.skip("there is no package index here to take the build tool from")
    assert built.returncode == 0, built.stderr
    (found,) = folder.glob("oms-*.whl")
    return found


def _pip(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments],
        capture_output=True,
        text=True,
        timeout=BUILD_SECONDS_MAX,
        check=False,
    )


@pytest.mark.slow
def test_the_wheel_holds_what_a_database_is_made_of(wheel: Path) -> None:
    names = ZipFile(wheel).namelist()

    for folder in ("sql", "migrations", "data", "plans"):
        files = [path for path in (ROOT / folder).rglob("*") if path.is_file()]
        travelling = [path for path in files if "__pycache__" not in path.parts]
        assert travelling
        for path in travelling:
            assert f"engine/_resources/{path.relative_to(ROOT)}" in names
    assert "cli/main.py" in names
    assert not [name for name in names if name.startswith("tests/")]


@pytest.mark.slow
def test_an_installed_wheel_works_from_another_folder(
    wheel: Path, tmp_path: Path, server: Server
) -> None:
    target = tmp_path / "installed"
    installed = _pip("install", "--no-deps", "--target", str(target), str(wheel))
    assert installed.returncode == 0, installed.stderr
    with psycopg.connect(server.dsn(), autocommit=True) as admin:
        admin.execute(f"CREATE DATABASE wheel OWNER {OWNER_ROLE}".encode())
    env = environment(
        {
            "PYTHONPATH": str(target),
            "DB_DSN": make_conninfo(server.dsn("wheel"), user=OWNER_ROLE),
            "OMS_HOME": str(tmp_path / "home"),
        }
    )

    def run(*words: str) -> str:
        return subprocess.run(
            words, env=env, cwd=tmp_path, capture_output=True, text=True, check=True
        ).stdout

    where = run(
        sys.executable, "-c", "import engine.resources as r; print(r.__file__, r.data_dir())"
    )
    oms = (sys.executable, str(target / "bin" / "oms"))
    migrated = run(*oms, "db", "migrate")
    run(*oms, "user", "add", "alice")
    started = run(*oms, "run", "start", "--user", "alice", "--cash", "1000")
    audited = run(*oms, "audit")

    assert all(path.startswith(str(target)) for path in where.split())
    assert migrated == f"The database is at migration {head()}; it was at none.\n"
    assert " is RUNNING" in started
    assert "rules hold" in audited
    assert not os.path.exists(tmp_path / "home"), "a named database needs no other"
