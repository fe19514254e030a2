"""Make demo_prices.csv.gz from the installed package bokeh_sampledata; see README.md here.

    pip install bokeh_sampledata
    python data/make_demo_prices.py

It copies figures as text, so that none is rounded, and writes the same bytes every time. It
prints the checksums that README.md states.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import zlib
from importlib.util import find_spec
from pathlib import Path

SYMBOLS = ("AAPL", "IBM", "MSFT")
DAY_FIRST, DAY_LAST = "2000-03-01", "2013-03-01"
COLUMNS = ("Ticker", "Date", "Open", "High", "Low", "Close", "Volume")
HEADER = ("symbol", "date", "open", "high", "low", "close", "volume")
TARGET = Path(__file__).with_name("demo_prices.csv.gz")


def source() -> Path:
    """Return the package's file, found without importing the package, which reads all its data."""
    spec = find_spec("bokeh_sampledata")
    if spec is None or spec.origin is None:
        raise SystemExit("bokeh_sampledata isn't installed; run: pip install bokeh_sampledata")
    return Path(spec.origin).parent / "_data" / "stocks.csv.gz"


def demo_csv(stocks: Path) -> bytes:
    """Return the rows that the demo uses, in the source's order, as a CSV file."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(HEADER)
    with gzip.open(stocks, "rt", encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            if row["Ticker"] in SYMBOLS and DAY_FIRST <= row["Date"] <= DAY_LAST:
                writer.writerow([row[column] for column in COLUMNS])
    return out.getvalue().encode()


def compressed(content: bytes) -> bytes:
    """Return gzip bytes without a file name or a time, so that they depend on the content alone."""
    deflate = zlib.compressobj(9, zlib.DEFLATED, 16 + zlib.MAX_WBITS)
    return deflate.compress(content) + deflate.flush()


def main() -> None:
    content = demo_csv(source())
    TARGET.write_bytes(compressed(content))
    print(f"{hashlib.sha256(content).hexdigest()}  {TARGET.stem}")
    print(f"{hashlib.sha256(TARGET.read_bytes()).hexdigest()}  {TARGET.name}")


if __name__ == "__main__":
    main()
