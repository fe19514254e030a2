"""What a row says, and when it fails: pure figures, no server."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from bench.harness import Row, interleave
from bench.report import bars, document, figure, save_picture

FASTER = Row("live tick", 900.0, "ticks/s", 0.8, peer=1_000.0, peer_name="pgbench")
SLOWER = Row("growth", 1.5, "ms/tick", 1.25, peer=1.0, peer_name="empty", better="less")
RATE = Row("SIP day", 1_000.0, "executions/s", 2_000.0)
TIME = Row("help", 0.6, "s", 0.3, better="less")
SPACE = Row("space", 3_500.0, "bytes/tick", None, better="less")


@pytest.mark.parametrize(
    ("row", "ratio", "reached"),
    [
        (FASTER, 0.9, 1.125),
        (SLOWER, 1.5, 1.25 / 1.5),
        (RATE, 0.5, 0.5),
        (TIME, 0.5, 0.5),
        (SPACE, None, None),
    ],
)
def test_a_ratio_is_against_the_peer_or_against_what_must_be_reached(
    row: Row, ratio: float | None, reached: float | None
) -> None:
    assert row.ratio == (ratio if ratio is None else pytest.approx(ratio))
    assert row.reached == (reached if reached is None else pytest.approx(reached))


@pytest.mark.parametrize(
    ("row", "tolerance", "meets"),
    [
        (FASTER, 1.0, True),
        (SLOWER, 1.0, False),
        (SLOWER, 0.9, False),
        (SLOWER, 0.8, True),
        (RATE, 1.0, False),
        (TIME, 1.0, False),
        (SPACE, 1.0, True),
    ],
)
def test_a_row_fails_below_its_share_of_what_must_be_reached(
    row: Row, tolerance: float, meets: bool
) -> None:
    assert row.meets(tolerance) is meets


def test_an_absolute_figure_never_fails_with_a_tolerance() -> None:
    hopeless = Row("help", 100.0, "s", 0.3, better="less")
    assert not hopeless.meets()
    assert hopeless.meets(0.99)


def test_exactly_what_must_be_reached_is_enough() -> None:
    assert Row("x", 0.8, "y", 0.8, peer=1.0, peer_name="z").meets()
    assert Row("x", 1.25, "y", 1.25, peer=1.0, peer_name="z", better="less").meets()


def test_the_document_has_these_keys_and_no_others() -> None:
    made = document([FASTER, SPACE], tolerance=1.0)
    assert made == {
        "rows": [
            {
                "name": "live tick / pgbench",
                "ours": 900.0,
                "peer": 1_000.0,
                "peer_name": "pgbench",
                "ratio": 0.9,
                "must": 0.8,
                "unit": "ticks/s",
                "meets": True,
            },
            {
                "name": "space",
                "ours": 3_500,
                "peer": None,
                "peer_name": None,
                "ratio": None,
                "must": None,
                "unit": "bytes/tick",
                "meets": True,
            },
        ]
    }


def test_the_sides_take_turns_and_their_medians_count() -> None:
    order: list[str] = []
    figures = {"ours": [3.0, 1.0, 2.0], "theirs": [30.0, 10.0, 50.0]}

    def side(name: str) -> float:
        order.append(name)
        return figures[name][order.count(name) - 1]

    found = interleave(3, {"ours": lambda: side("ours"), "theirs": lambda: side("theirs")})

    assert order == ["ours", "theirs"] * 3
    assert found == {"ours": 2.0, "theirs": 30.0}


def test_a_bar_shows_where_enough_is() -> None:
    missed, met, far = bars([RATE, FASTER, Row("far", 9.0, "s", 1.0), SPACE], tolerance=1.0)
    assert (missed[1], met[1], far[1]) == (False, True, True)
    assert "│" in missed[0]
    assert missed[0].endswith(" 0.50")
    assert "│" not in met[0]
    assert "▶" in far[0]
    assert len({line.rindex(" ") for line, _ in (missed, met, far)}) == 1


@pytest.mark.parametrize(
    ("value", "shown"), [(None, "–"), (0.12345, "0.123"), (3, "3"), (12_345.6, "12,346")]
)
def test_figures_are_short(value: float | None, shown: str) -> None:
    assert figure(value) == shown


def test_the_picture_is_a_png(tmp_path: Path) -> None:
    path = tmp_path / "bars.png"
    save_picture(path, [FASTER, SLOWER, SPACE], tolerance=1.0)
    head = path.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    assert all(side > 100 for side in struct.unpack(">II", head[16:24]))
