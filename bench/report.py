"""The benchmark's figures for programs and as pictures: in the terminal, or as a PNG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.harness import Row

__all__ = ["bars", "document", "figure", "save_picture", "title"]

WIDTH_CHARS = 48
# What is drawn at most, as a multiple of what must be reached.
REACHED_MAX = 3.0
_EIGHTHS = " ▏▎▍▌▋▊▉"
_DPI = 150
_MET, _MISSED = "#009e73", "#d55e00"


def document(rows: Sequence[Row], tolerance: float) -> dict[str, Any]:
    """The rows as one JSON document."""
    return {
        "rows": [
            {
                "name": title(row),
                "ours": _rounded(row.ours),
                "peer": _rounded(row.peer),
                "peer_name": row.peer_name,
                "ratio": _rounded(row.ratio),
                "must": row.must,
                "unit": row.unit,
                "meets": row.meets(tolerance),
            }
            for row in rows
        ]
    }


def _rounded(figure: float | None) -> float | None:
    return None if figure is None else float(f"{figure:.4g}") if figure < 1_000 else round(figure)


def figure(value: float | None) -> str:
    """A figure for people, three digits of it or all that stand before the point."""
    if value is None:
        return "–"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def title(row: Row) -> str:
    """A row's name with that of its peer."""
    return row.name if row.peer_name is None else f"{row.name} / {row.peer_name}"


def bars(rows: Sequence[Row], tolerance: float) -> list[tuple[str, bool]]:
    """How much of what must be reached each row reaches, as bars; with each whether it is enough.

    A mark stands where it is just enough. A bar that would be too long ends in an arrow.
    """
    asked = [row for row in rows if row.reached is not None]
    widest = max((len(title(row)) for row in asked), default=0)
    return [
        (f"{title(row):<{widest}}  {_bar(row.reached or 0.0)}", row.meets(tolerance))
        for row in asked
    ]


def _bar(reached: float) -> str:
    eighths = round(min(reached, REACHED_MAX) / REACHED_MAX * WIDTH_CHARS * 8)
    full, rest = divmod(eighths, 8)
    drawn = "█" * full + (_EIGHTHS[rest] if rest else "")
    drawn = f"{drawn[:-1]}▶" if reached > REACHED_MAX else drawn
    mark = round(WIDTH_CHARS / REACHED_MAX)
    line = f"{drawn:<{WIDTH_CHARS}}"
    if line[mark] == " ":
        line = f"{line[:mark]}│{line[mark + 1 :]}"
    return f"{line} {reached:.2f}"


def save_picture(path: Path, rows: Sequence[Row], tolerance: float) -> None:
    """Draw the same bars as a PNG."""
    from matplotlib.figure import Figure

    asked = [row for row in reversed(rows) if row.reached is not None]
    drawn = Figure(figsize=(9, 1 + 0.4 * len(asked)), layout="constrained")
    axes = drawn.add_subplot()
    colours = [_MET if row.meets(tolerance) else _MISSED for row in asked]
    reached = [row.reached or 0.0 for row in asked]
    made = axes.barh(
        [title(row) for row in asked], [min(r, REACHED_MAX) for r in reached], color=colours
    )
    axes.bar_label(made, labels=[f"{r:.2f}" for r in reached], padding=3)
    axes.axvline(1.0, color="#1f2933", linewidth=1)
    axes.set_xlim(0, REACHED_MAX * 1.1)
    axes.set_xlabel("share of what must be reached")
    drawn.savefig(path, dpi=_DPI)
