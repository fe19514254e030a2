"""The report file: whole, harmless, the same every time, and without a network."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from decimal import Decimal
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from report_cases import a_history, a_holding, a_sip_history, points_of

from engine.report.charts import PALETTE
from engine.report.html import render, write
from engine.report.model import RunHistory

HOSTILE = "</script><script>alert('x')</script><img src=http://evil.example/x onerror=alert(1)>&"
VOID = {"meta", "br", "img", "link", "input"}
PAGE_BYTES_MAX = 2_000_000


class _Page(HTMLParser):
    """Reads a page as a browser would, and notes what matters."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.handlers: list[str] = []
        self.text: list[str] = []
        self.data = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        self._note(attrs)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self._note(attrs)

    def _note(self, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            if name in ("src", "href", "xlink:href", "action", "data", "srcset"):
                self.links.append(value or "")
            if name.startswith("on"):
                self.handlers.append(name)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.data += data
        else:
            self.text.append(data.strip())


def page_of(*histories: RunHistory) -> _Page:
    page = _Page(render(histories))
    assert page.open == []
    return page


def figures_of(*histories: RunHistory) -> list[dict[str, Any]]:
    runs: list[dict[str, Any]] = json.loads(page_of(*histories).data)["runs"]
    return runs


# --- No network -----------------------------------------------------------------------------


def test_the_page_refers_to_nothing_outside_itself() -> None:
    text = render([a_sip_history(), a_history()])
    assert not re.search(r"(?:src|href)\s*=\s*[\"']?(?:https?:)?//", text)
    assert "http://" not in text
    assert "https://" not in text
    assert "@import" not in text
    page = page_of(a_sip_history(), a_history())
    assert all(link.startswith("#") for link in page.links)
    assert {link[1:] for link in page.links} <= set(page.ids)
    assert re.findall(r"url\((?!#)", text) == []


def test_the_page_forbids_the_browser_to_fetch_or_run_anything() -> None:
    text = render([a_sip_history()])
    assert "default-src 'none'; style-src 'unsafe-inline'" in text
    assert re.findall(r"<script[^>]*>", text) == ['<script type="application/json" id="figures">']


# --- Names ----------------------------------------------------------------------------------


def hostile() -> RunHistory:
    history = a_sip_history(ticks=30, symbols=[HOSTILE, "IBM"], currency="<b>")
    return replace(
        history, name=HOSTILE, run_id=HOSTILE, user_id=HOSTILE, strategy=HOSTILE, calendar=HOSTILE
    )


def test_hostile_names_are_text() -> None:
    page = page_of(hostile())
    assert page.tags.count("script") == 1
    assert "img" not in page.tags
    assert "b" not in page.tags
    assert page.handlers == []
    assert HOSTILE in page.text


def test_hostile_names_come_back_from_the_data() -> None:
    (run,) = figures_of(hostile())
    assert run["name"] == run["run_id"] == run["user_id"] == run["strategy"] == HOSTILE


def test_a_name_with_braces_or_a_colour_is_left_as_it_is() -> None:
    history = a_sip_history(ticks=3, symbols=[PALETTE["blue"], "{style}"], name="{runs}{0}")
    page = page_of(history)
    assert "{runs}{0}" in page.text
    assert any(text.startswith(f"{PALETTE['blue']} $") for text in page.text)
    assert any(text.startswith("{style} $") for text in page.text)


# --- What it says ---------------------------------------------------------------------------


def test_the_summary_shows_every_run_with_a_link_to_it() -> None:
    page = page_of(a_sip_history(name="first"), a_history(points_of(100, 75), name="second"))
    assert {"run-1", "run-2"} <= set(page.ids)
    assert page.links[:2] == ["#run-1", "#run-2"]
    for words in ("Invested", "Cash", "Market value", "Equity", "Money-weighted return",
                  "Max drawdown", "Orders", "Executions", "Ticks"):  # fmt: skip
        assert words in page.text
    assert "−25.00 %" in page.text
    assert "2 runs, 2000-03-01 to 2000-04-29" in page.text


def test_the_data_holds_the_figures_as_exact_strings() -> None:
    history = a_sip_history(ticks=400)
    (run,) = figures_of(history)
    last = history.equity[-1]
    assert Decimal(run["equity"]) == last.equity
    assert Decimal(run["cash"]) == last.cash
    assert Decimal(run["market_value"]) == last.market_value
    assert Decimal(run["invested"]) == last.invested
    assert run["ticks"] == 400
    assert run["orders"] == run["executions"] == run["sip_executions"] == len(history.sips)
    assert run["first_at"] == "2000-03-01T21:00:00+00:00"
    assert re.fullmatch(r"-?0\.\d{10}", run["money_weighted_return"])
    assert set(run["max_drawdown"]) == {"fraction", "peak_at", "trough_at"}


def test_a_tiny_amount_is_not_written_with_an_exponent() -> None:
    (run,) = figures_of(a_history(initial_cash=Decimal("1E-9")))
    assert run["cash"] == "0.000000001"


def test_holdings_are_listed_with_their_sums() -> None:
    holdings = [
        a_holding("AAPL", Decimal("2.500000"), Decimal(100)),
        replace(a_holding("IBM", Decimal(10), Decimal(80)), realized_pnl=Decimal("-7.5")),
    ]
    page = page_of(a_history(points_of(1, 1), holdings=holdings))
    for words in ("2.5", "10", "$100.0000", "$250.00", "+$25.00", "−$100.00", "−$75.00",
                  "−$7.50", "$1,050.00", "$0.00"):  # fmt: skip
        assert words in page.text, words


def test_a_run_without_a_tick_says_so() -> None:
    page = page_of(a_history())
    assert "No mark yet, so there is nothing to draw." in page.text
    assert "No position is held." in page.text
    assert "1 run" in page.text
    assert "svg" not in page.tags
    (run,) = figures_of(a_history())
    assert run["money_weighted_return"] is None
    assert run["max_drawdown"] is None
    assert run["first_at"] is None
    assert run["equity"] == "250000"


def test_a_run_of_one_mark_is_reported() -> None:
    page = page_of(a_sip_history(ticks=1))
    assert page.tags.count("svg") == 4
    assert "0.00 %" in page.text


def test_a_run_without_sips_has_no_chart_of_them() -> None:
    assert "SIP" not in render([a_history(points_of(100, 110))])


def test_no_run_at_all_is_a_page() -> None:
    assert "no run" in page_of().text
    assert figures_of() == []


# --- The look -------------------------------------------------------------------------------


def test_charts_take_their_colours_from_the_theme() -> None:
    text = render([a_sip_history()])
    drawn = "".join(re.findall(r"<svg.*?</svg>", text, re.DOTALL))
    used = set(re.findall(r"var\(--(\w+)\)", drawn))
    assert {"ink", "muted", "grid", "blue", "sky", "orange", "green", "vermillion"} <= used
    assert not re.search(r"#[0-9a-f]{6}\b", drawn)
    dark = text[text.index("prefers-color-scheme: dark") :]
    light = text[: text.index("prefers-color-scheme: dark")]
    for name in used:
        assert f"--{name}: #" in light
        assert f"--{name}: #" in dark


def contrast(one: str, other: str) -> float:
    """The contrast ratio of WCAG 2 between two colours, 1 to 21."""

    def luminance(colour: str) -> float:
        parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    lower, higher = sorted((luminance(one), luminance(other)))
    return (higher + 0.05) / (lower + 0.05)


def test_text_can_be_read_in_both_themes() -> None:
    themes = re.findall(r":root \{([^}]*)\}", render([]))
    assert len(themes) == 2
    for theme in themes:
        colours = dict(re.findall(r"--(\w+): (#\w{6})", theme))
        for name in ("ink", "muted", "blue", "profit", "loss"):
            assert contrast(colours[name], colours["paper"]) >= 4.5, name
        assert contrast(colours["vermillion"], colours["paper"]) >= 3


def test_every_picture_says_what_it_shows() -> None:
    text = render([a_sip_history()])
    labels = re.findall(r'<figure role="img" aria-label="([^"]+)">', text)
    assert len(labels) == text.count("<svg") == 4


# --- The file -------------------------------------------------------------------------------


def test_the_same_histories_give_the_same_page() -> None:
    history = a_sip_history()
    assert render([history, a_history()]) == render([replace(history), a_history()])


def test_thirteen_years_of_two_runs_stay_small() -> None:
    history = a_sip_history(ticks=3_270)
    page = render([history, replace(history, name="second")])
    assert len(page.encode()) < PAGE_BYTES_MAX
    ids = re.findall(r'\bid="([^"]*)"', page)
    assert len(ids) == len(set(ids))


def test_many_runs_share_the_detail() -> None:
    history = a_sip_history(ticks=1_000)
    one, eight = render([history]), render([history] * 8)
    assert len(eight.encode()) < PAGE_BYTES_MAX
    assert len(eight) < 5 * len(one)


def test_a_page_is_written_whole(tmp_path: Path) -> None:
    path = tmp_path / "reports" / "run.html"
    history = a_sip_history(ticks=2, name="Zoë 印度")
    write(path, [history])
    assert path.read_text(encoding="utf-8") == render([history])
    write(path, [])
    assert path.read_text(encoding="utf-8") == render([])
    assert [file.name for file in path.parent.iterdir()] == ["run.html"]


def test_a_page_can_be_read_by_whom_the_umask_lets(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.touch()
    write(tmp_path / "run.html", [])
    assert (tmp_path / "run.html").stat().st_mode == other.stat().st_mode


def test_a_page_that_could_not_be_written_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run.html"
    path.write_text("old", encoding="utf-8")

    def fail(self: Path, target: Path) -> Path:
        raise OSError("disk full")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write(path, [])
    assert [file.name for file in tmp_path.iterdir()] == ["run.html"]
    assert path.read_text(encoding="utf-8") == "old"
