"""`oms data`: prices, splits and symbols come in whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest
from cli_cases import counts, here, oms

HEADER = "symbol,date,open,high,low,close,volume"
GOOD = "AAPL,2024-01-04,249,251,248,250,1000"
SPLITS = "symbol,ex_date,numerator,denominator\nAAPL,2024-01-05,2,1\n"


@pytest.fixture
def prices(tmp_path: Path) -> Path:
    path = tmp_path / "prices.csv"
    path.write_text(f"{HEADER}\n{GOOD}\nNEWS,2024-01-04,1,2,1,2,\n")
    return path


def test_prices_and_splits_come_in_once(dsn: str, prices: Path, tmp_path: Path) -> None:
    splits = tmp_path / "splits.csv"
    splits.write_text(SPLITS)
    arguments = ("data", "import", str(prices), "--splits", str(splits))

    first = oms(dsn, *arguments, "--json").json
    before = counts(dsn)
    again = oms(dsn, *arguments).out

    assert (first["bars"]["read"], first["bars"]["added"]) == (2, 2)
    assert (first["splits"]["read"], first["splits"]["added"]) == (1, 1)
    assert again == "Read 2 bars: 0 new.\nRead 1 splits: 0 new.\n"
    assert counts(dsn) == before
    stored = {row["symbol"]: row for row in oms(dsn, "data", "list", "--json").json["symbols"]}
    assert (stored["AAPL"]["bars"], stored["AAPL"]["splits"]) == (1, 1)
    assert stored["NEWS"]["last"] == "2024-01-04T21:00:00Z"
    assert "NEWS" in oms(dsn, "data", "list").out


def test_new_symbols_are_counted(dsn: str, prices: Path) -> None:
    assert "new symbol" in oms(dsn, "data", "import", str(prices), "--currency", "usd").out


BROKEN_LINES = (
    "AAPL,2024-01-05,250,251,249",
    "AAPL,2024-01-05,nan,251,249,250,1",
    "AAPL,2024-01-05,-1,251,-2,250,1",
    "AAPL,2024-01-05,250,240,249,250,1",
    "AAPL,2024-01-06,250,251,249,250,1",
    GOOD,
    "AAPL,2024-01-03,249,251,248,250,1000",
    "AAPL,yesterday,249,251,248,250,1000",
    "AAPL,2024-01-05,1e300,1e300,1e300,1e300,1",
    ",2024-01-05,250,251,249,250,1",
    '"AAPL,2024-01-05,250,251,249,250,1',
)


def test_a_broken_line_is_named_and_nothing_is_imported(dsn: str, tmp_path: Path) -> None:
    path = tmp_path / "prices.csv"

    for line in BROKEN_LINES:
        path.write_text(f"{HEADER}\n{GOOD}\n{line}\n")
        refused = oms(dsn, "data", "import", str(path))
        assert refused.code == 1
        assert refused.sentence.startswith("prices.csv, line 3: ")
        assert refused.sentence.endswith("; nothing was imported.")

    assert counts(dsn)["price_bar"] == 0


def test_bad_splits_keep_good_prices_out(dsn: str, prices: Path, tmp_path: Path) -> None:
    splits = tmp_path / "splits.csv"
    splits.write_text(SPLITS + "AAPL,2024-01-08,2,0\n")

    refused = oms(dsn, "data", "import", str(prices), "--splits", str(splits))

    assert refused.code == 1
    assert refused.sentence.startswith("splits.csv, line 3: ")
    assert counts(dsn)["price_bar"] == 0


def test_other_figures_for_a_stored_bar_are_refused(dsn: str, prices: Path) -> None:
    assert oms(dsn, "data", "import", str(prices)).code == 0
    prices.write_text(f"{HEADER}\nAAPL,2024-01-04,249,251,248,249,1000\n")

    refused = oms(dsn, "data", "import", str(prices))

    assert refused.code == 1
    assert "close 250 to 249" in refused.sentence


def test_a_file_that_is_not_there_is_refused(dsn: str) -> None:
    refused = oms(dsn, "data", "import", "/no/such/prices.csv")

    assert refused.code == 1
    assert "No such file" in refused.sentence


def test_an_import_needs_a_file(dsn: str) -> None:
    assert here("data", "import", "--dsn", dsn).code == 2


def test_a_symbol_is_made_known_once(dsn: str) -> None:
    terms = ("TCS", "--name", "Tata", "--currency", "inr", "--decimals", "0")

    first = oms(dsn, "data", "add", *terms, "--json")
    again = oms(dsn, "data", "add", *terms)
    other = oms(dsn, "data", "add", "TCS", "--currency", "USD")
    bad = oms(dsn, "data", "add", "no symbol!")

    assert first.json == {"symbol": "TCS", "added": True}
    assert again.out == "TCS is known already.\n"
    assert (other.code, bad.code) == (1, 1)
    assert "can't be changed" in other.sentence
