"""The benchmark as a whole: which measurements there are, and running those that are wanted."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from bench import MEASUREMENTS, broker, growth, live, memory, profile, replays, sips, space, start
from bench.ground import Ground, ground
from bench.harness import Row
from bench.peers.environment import installed_peers
from bench.profile import Cost
from bench.sizes import Sizes
from bench.space import Relation
from engine.audit import Finding

__all__ = ["Benchmark", "run"]

Tell = Callable[[str], None]
Measure = Callable[[Ground, Sizes, Sequence[replays.Peer]], list[Row]]


@dataclass(frozen=True, slots=True)
class Benchmark:
    """What was found: the rows, what a tick's time and space are made of, and the audit's answer.

    ``settings`` are the server's own words on its durability, ``findings`` those of the audit by
    database; both by name.
    """

    rows: list[Row]
    costs: list[Cost]
    relations: list[Relation]
    settings: Mapping[str, str]
    findings: Mapping[str, list[Finding]]

    @property
    def holds(self) -> bool:
        """Whether the audit finds nothing in any database."""
        return not any(self.findings.values())

    def passes(self, tolerance: float) -> bool:
        """Whether the books hold and every row meets what it must, as far as ``tolerance`` asks."""
        return self.holds and all(row.meets(tolerance) for row in self.rows)


_MEASURES: Mapping[str, Measure] = MappingProxyType(
    {
        "live": lambda on, sizes, _: live.measure(on, sizes),
        "dense": lambda on, sizes, peers: replays.measure(replays.DENSE, on, sizes, peers),
        "sparse": lambda on, sizes, peers: replays.measure(replays.SPARSE, on, sizes, peers),
        "limited": lambda on, sizes, _: replays.measure_limited(on, sizes),
        "sip": lambda on, sizes, _: sips.measure(on, sizes),
        "broker": lambda on, sizes, _: broker.measure(on, sizes),
        "growth": lambda on, sizes, _: growth.measure(on, sizes),
        "start": lambda on, sizes, _: start.measure(sizes),
        "memory": lambda on, sizes, _: memory.measure(on, sizes),
    }
)
_AGAINST_PEERS = frozenset({"dense", "sparse"})


def run(
    sizes: Sizes, *, only: Collection[str] = (), peers: Path | None = None, tell: Tell
) -> Benchmark:
    """Run the measurements named by ``only`` (default: all) on one server, then the audit.

    ``peers`` is the folder of the other engines' environment; ``tell`` hears what is under way.
    Raises ConfigurationError where something can't be measured at all.
    """
    wanted = [name for name in MEASUREMENTS if not only or name in only]
    others = installed_peers(peers, tell) if _AGAINST_PEERS & set(wanted) else []
    rows: list[Row] = []
    costs: list[Cost] = []
    relations: list[Relation] = []
    tell("Starting a server ...")
    with ground() as on:
        for name in wanted:
            tell(f"Measuring {name} ...")
            if name == "profile":
                found, costs = profile.measure(on, sizes)
            elif name == "space":
                found, relations = space.measure(on, sizes)
            else:
                found = _MEASURES[name](on, sizes, others)
            rows += found
        tell("Auditing ...")
        return Benchmark(rows, costs, relations, on.settings(), on.audited())
