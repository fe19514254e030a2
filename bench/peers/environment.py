"""The peers' environment, made when it is first needed, and the processes that run in it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import platformdirs

from bench.harness import CHILD_SECONDS_MAX, result_of
from engine.errors import ConfigurationError

__all__ = ["PACKAGES", "InstalledPeer", "arguments_of", "default_folder", "installed_peers"]

PACKAGES = MappingProxyType(
    {"nautilus_trader": "1.221.0", "backtrader": "1.9.78.123", "pandas": "2.3.3"}
)
PEERS = ("nautilus_trader", "backtrader")
_HERE = Path(__file__).resolve().parent
# Prints what is missing; a package that is there in another version is taken as it is.
_MISSING = """
import sys
from importlib.util import find_spec
print(" ".join(name for name in sys.argv[1:] if find_spec(name) is None))
"""

Run = Callable[[list[str]], str]


@dataclass(frozen=True, slots=True)
class InstalledPeer:
    """A peer in the environment that ``python`` belongs to."""

    name: str
    python: Path

    def seconds(self, bars: Path, every: int) -> float:
        """How long its backtest over the bars of a file takes, in seconds.

        Raises ConfigurationError if it fails or fills another number of orders than it should.
        """
        process = subprocess.Popen(
            arguments_of(self.python, self.name, bars, every),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        return float(result_of(process)["seconds"])


def arguments_of(python: Path, peer: str, bars: Path, every: int) -> list[str]:
    """The command that runs a peer's backtest; -I keeps our own packages out of its sight."""
    return [str(python), "-I", str(_HERE / f"run_{peer}.py"), str(bars), str(every)]


def default_folder() -> Path:
    """Where the environment is kept from one benchmark to the next."""
    return Path(platformdirs.user_cache_dir("oms")) / "bench-peers"


def installed_peers(
    folder: Path | None, tell: Callable[[str], None], run: Run | None = None
) -> list[InstalledPeer]:
    """The peers, installed below ``folder`` unless they are there already.

    Raises ConfigurationError where they can't be installed.
    """
    run = run or _run
    folder = folder or default_folder()
    python = folder / "bin" / "python"
    if not python.exists():
        tell(f"Making an environment for the peers in {folder}; this happens once.")
        run([sys.executable, "-m", "venv", str(folder)])
    missing = run([str(python), "-I", "-c", _MISSING, *PACKAGES]).split()
    if missing:
        tell(f"Installing {', '.join(missing)} into {folder} ...")
        wanted = [f"{name}=={PACKAGES[name]}" for name in missing]
        run([str(python), "-m", "pip", "install", "--quiet", *wanted])
    return [InstalledPeer(name, python) for name in PEERS]


def _run(arguments: list[str]) -> str:
    done = subprocess.run(
        arguments, capture_output=True, text=True, timeout=CHILD_SECONDS_MAX, check=False
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise ConfigurationError(
            f"the peers' environment can't be made: {last}; name one that has "
            f"{' and '.join(PEERS)} by --peers, or choose rows without a peer by --only"
        )
    return done.stdout
