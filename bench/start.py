"""Starting: how long until the demo's first tick is committed, and until the help is there.

Both from an installed package: in a checkout a wheel is built and installed into an environment of
its own, whose dependencies are those of ours; elsewhere the installed package is what runs.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from statistics import median

import psycopg

from bench.ground import temporary_folder
from bench.harness import Row
from bench.sizes import Sizes
from engine.db.embedded import Server, programs
from engine.errors import ConfigurationError

__all__ = ["measure"]

DEMO_SECONDS_MUST = 4.0
HELP_SECONDS_MUST = 0.3
HELP_ROUNDS = 5
DEMO_SECONDS_MAX = 120.0
INSTALL_SECONDS_MAX = 600.0
POLL_SECONDS = 0.01
_ROOT = Path(__file__).resolve().parents[1]
# What names a database would keep the demo from its own.
_PLACES = ("DB_DSN", "PGHOST", "PGHOSTADDR", "PGPORT", "PGSERVICE", "PGDATABASE", "PYTHONPATH")


def measure(sizes: Sizes) -> list[Row]:
    """The rows of the demo's first tick and of the help."""
    with temporary_folder() as folder:
        oms = _installed(folder)
        _help_seconds(oms, folder)  # compiles what is imported
        helped = median(_help_seconds(oms, folder) for _ in range(HELP_ROUNDS))
        first = median(_demo_seconds(oms) for _ in range(sizes.start_rounds))
    return [
        Row(
            "oms demo to first tick",
            first,
            "s",
            DEMO_SECONDS_MUST,
            better="less",
            note="installed wheel, empty OMS_HOME, seen from another process",
        ),
        Row(
            "oms --help",
            helped,
            "s",
            HELP_SECONDS_MUST,
            better="less",
            note=f"installed wheel, median of {HELP_ROUNDS}",
        ),
    ]


def _installed(folder: Path) -> Path:
    """The installed command. Raises ConfigurationError where it can't be installed."""
    if not (_ROOT / "pyproject.toml").is_file():
        return Path(sysconfig.get_path("scripts")) / "oms"
    environment = folder / "environment"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    _run([*pip, "wheel", "--no-deps", "--wheel-dir", str(folder), str(_ROOT)])
    (wheel,) = folder.glob("oms-*.whl")
    _run([sys.executable, "-m", "venv", "--without-pip", str(environment)])
    python = environment / "bin" / "python"
    _run([*pip, "--python", str(python), "install", "--no-deps", str(wheel)])
    (site,) = environment.glob("lib/python*/site-packages")
    # A path file in a path file isn't read, so that our own editable install stays out of it.
    paths = dict.fromkeys((sysconfig.get_path("purelib"), sysconfig.get_path("platlib")))
    (site / "dependencies.pth").write_text("\n".join([*paths, ""]), encoding="utf-8")
    return environment / "bin" / "oms"


def _run(arguments: list[str]) -> None:
    done = subprocess.run(
        arguments, capture_output=True, text=True, timeout=INSTALL_SECONDS_MAX, check=False
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise ConfigurationError(f"the package can't be installed to measure its start: {last}")


def _environment(home: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in _PLACES}
    return kept | {"OMS_HOME": str(home)}


def _help_seconds(oms: Path, folder: Path) -> float:
    began = time.perf_counter()
    subprocess.run(
        [oms, "--help"],
        cwd=folder,
        env=_environment(folder / "home"),
        stdout=subprocess.DEVNULL,
        check=True,
    )
    return time.perf_counter() - began


def _demo_seconds(oms: Path) -> float:
    """From the start of ``oms demo`` in an empty home to its first committed tick, in seconds."""
    with temporary_folder() as folder:
        home = folder / "home"
        server = Server(home / "postgres-18", bin_dir=programs())
        began = time.perf_counter()
        with subprocess.Popen(
            [oms, "demo", "--json"],
            cwd=folder,
            env=_environment(home),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        ) as demo:
            try:
                _await_tick(server, demo)
                return time.perf_counter() - began
            finally:
                demo.kill()
                server.stop("immediate")


def _await_tick(server: Server, demo: subprocess.Popen[bytes]) -> None:
    """Look again and again, as any other program could, until a tick is committed."""
    deadline = time.monotonic() + DEMO_SECONDS_MAX
    while not _has_tick(server, deadline):
        if time.monotonic() > deadline:
            raise ConfigurationError(f"the demo has no tick after {DEMO_SECONDS_MAX:.0f} s")
        if demo.poll() is not None:
            raise ConfigurationError(f"the demo ended with {demo.returncode} before its first tick")
        time.sleep(POLL_SECONDS)


def _has_tick(server: Server, deadline: float) -> bool:
    """Whether a tick is there, waiting for it once the table is; no database isn't one either."""
    if not (server.data / "postmaster.pid").exists():
        return False
    try:
        with psycopg.connect(server.dsn("oms"), autocommit=True) as conn:
            while time.monotonic() < deadline:
                row = conn.execute(
                    "SELECT EXISTS (SELECT FROM event_ledger WHERE event_type = 'TICK')"
                ).fetchone()
                if row == (True,):
                    return True
                time.sleep(POLL_SECONDS)
    except (psycopg.OperationalError, psycopg.errors.UndefinedTable):
        return False
    return False
