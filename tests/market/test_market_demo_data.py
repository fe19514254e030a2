"""The demo's prices and splits are what data/README.md says they are."""

from __future__ import annotations

import gzip
import hashlib
import re
import subprocess
import sys
from datetime import date
from decimal import Decimal
from importlib.util import find_spec
from itertools import groupby, pairwise

import pytest

from engine.market.calendar import sessions
from engine.market.imports import read_bars, read_splits
from engine.market.model import Bar
from engine.resources import data_dir

PRICES = data_dir() / "demo_prices.csv.gz"
SPLITS = data_dir() / "demo_splits.csv"
README = (data_dir() / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def bars() -> dict[str, list[Bar]]:
    read = read_bars(PRICES, calendar="XNYS")
    return {symbol: list(group) for symbol, group in groupby(read, key=lambda bar: bar.symbol)}


def test_each_symbol_has_one_bar_for_each_session(bars: dict[str, list[Bar]]) -> None:
    expected = [
        (session.open_at, session.close_at)
        for session in sessions("XNYS", date(2000, 3, 1), date(2013, 3, 1))
    ]
    assert len(expected) == 3270
    assert list(bars) == ["AAPL", "IBM", "MSFT"]
    for of_symbol in bars.values():
        assert [(bar.start, bar.end) for bar in of_symbol] == expected


def test_figures_have_four_decimals_and_something_was_traded(bars: dict[str, list[Bar]]) -> None:
    for bar in (bar for of_symbol in bars.values() for bar in of_symbol):
        assert all(price == round(price, 4) for price in (bar.open, bar.high, bar.low, bar.close))
        assert bar.volume
        assert bar.volume > 0


def test_prices_halve_where_a_split_is_and_nowhere_else(bars: dict[str, list[Bar]]) -> None:
    halved = {
        (symbol, after.start.date())
        for symbol, of_symbol in bars.items()
        for before, after in pairwise(of_symbol)
        if after.open / before.close < Decimal("0.52")
    }
    splits = read_splits(SPLITS, calendar="XNYS")
    assert {(split.symbol, split.ex_date) for split in splits} == halved
    assert {(split.numerator, split.denominator) for split in splits} == {(Decimal(2), Decimal(1))}
    assert len(splits) == 3


def test_the_readme_states_the_checksums() -> None:
    packed = PRICES.read_bytes()
    stated = dict(re.findall(r"`([0-9a-f]{64})` \| (.*?) \|", README))
    assert len(stated) == 3
    for content in (packed, gzip.decompress(packed), SPLITS.read_bytes()):
        assert hashlib.sha256(content).hexdigest() in stated


def test_the_packed_file_holds_no_time_and_no_name() -> None:
    header = PRICES.read_bytes()[:10]
    assert header[:4] == b"\x1f\x8b\x08\x00"
    assert header[4:8] == bytes(4)


@pytest.mark.skipif(
    find_spec("bokeh_sampledata") is None, reason="bokeh_sampledata isn't installed"
)
def test_the_script_makes_the_same_figures_again() -> None:
    program = (
        "import hashlib, make_demo_prices as made;"
        "print(hashlib.sha256(made.demo_csv(made.source())).hexdigest())"
    )
    done = subprocess.run(
        [sys.executable, "-B", "-c", program],
        cwd=data_dir(),
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == hashlib.sha256(gzip.decompress(PRICES.read_bytes())).hexdigest()
