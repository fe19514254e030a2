"""What every measurement shares: rows, rounds taken in turn, medians, and child processes."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal

from engine.errors import ConfigurationError

__all__ = ["CHILD_SECONDS_MAX", "Row", "child", "interleave", "result_of", "seconds_of"]

CHILD_SECONDS_MAX = 3_600.0

Better = Literal["more", "less"]

# Children find this package wherever it is imported from: a checkout, or an installed wheel.
_PACKAGE_PARENT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True, slots=True)
class Row:
    """One figure, what it is compared with, and what it must reach.

    ``ours`` and ``peer`` are in ``unit``. With a peer, ``must`` is about ``ours / peer``; without
    one it is about ``ours``, in ``unit`` (``None``: nothing is asked). ``better`` says whether
    more or less of it is wanted. ``note`` is a sentence for people.
    """

    name: str
    ours: float
    unit: str
    must: float | None
    peer: float | None = None
    peer_name: str | None = None
    better: Better = "more"
    note: str = ""

    @property
    def ratio(self) -> float | None:
        """Ours against the peer's; without a peer, how much of what must be reached is (1: all)."""
        if self.peer is not None:
            return self.ours / self.peer
        return self.reached

    @property
    def reached(self) -> float | None:
        """How much of what must be reached is reached; 1 is just enough, more is better."""
        if self.must is None:
            return None
        figure = self.ours if self.peer is None else self.ours / self.peer
        return figure / self.must if self.better == "more" else self.must / figure

    def meets(self, tolerance: float = 1.0) -> bool:
        """Whether it is reached, or at least the share ``tolerance`` of it.

        With a tolerance below 1, on a machine that nobody knows, an absolute figure says nothing,
        so that only what is compared with a peer can fail.
        """
        if self.reached is None or (tolerance < 1 and self.peer is None):
            return True
        return self.reached >= tolerance


def interleave(rounds: int, sides: Mapping[str, Callable[[], float]]) -> dict[str, float]:
    """Measure each side once a round, in turn, and return each one's median.

    In turn, so that whatever else the machine does meanwhile meets all sides alike.
    """
    figures: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, measure in sides.items():
            figures[name].append(measure())
    return {name: median(found) for name, found in figures.items()}


def seconds_of(work: Callable[[], object]) -> float:
    """How long ``work`` takes, in seconds, without the garbage of what came before it."""
    gc.collect()
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def child(module: str, *arguments: str) -> subprocess.Popen[str]:
    """Start a module of this package in a process of its own, with pipes to talk through."""
    path = [str(_PACKAGE_PARENT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return subprocess.Popen(
        [sys.executable, "-m", f"bench.{module}", *arguments],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(path)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def result_of(process: subprocess.Popen[str]) -> Any:
    """Wait for a process and return the JSON document that is the last line of its output.

    Raises ConfigurationError with the last line of its complaints if it failed.
    """
    with process:
        try:
            out, complaints = process.communicate(timeout=CHILD_SECONDS_MAX)
        except BaseException:
            process.kill()
            raise
    lines = out.strip().splitlines()
    if process.returncode or not lines:
        last = (complaints.strip().splitlines() or ["it said nothing"])[-1]
        raise ConfigurationError(f"{_name(process)} failed: {last}")
    return json.loads(lines[-1])


def _name(process: subprocess.Popen[str]) -> str:
    """What a process runs: its module or its script."""
    words = [str(word) for word in process.args] if isinstance(process.args, list) else []
    named = [word for word in words if word.startswith("bench.") or word.endswith(".py")]
    return named[0] if named else "a process"
