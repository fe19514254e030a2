"""docs/paper-book.md names every code, model and setting, and tests that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from engine.orders.model import OrderType, TimeInForce
from engine.paper.costs import PaperSettings

HERE = Path(__file__).parent
PAGE = (HERE.parents[1] / "docs" / "paper-book.md").read_text(encoding="utf-8")
BOOK = (HERE.parents[1] / "engine" / "paper" / "book.py").read_text(encoding="utf-8")

REASONS = set(re.findall(r'\("(?:CANCELED|EXPIRED)", "(\w+)"\)', BOOK)) | {
    "BELOW_QUANTITY_STEP",
    "EXPIRED_DAY",
    "EXPIRED_GTD",
}
MODELS = set(re.findall(r"'const': '(\w+)'", str(PaperSettings.model_json_schema())))


def test_the_codes_and_models_are_found() -> None:
    assert len(REASONS) == 7
    assert len(MODELS) == 7


@pytest.mark.parametrize(
    "word", sorted(REASONS | MODELS | {*OrderType, *TimeInForce, *PaperSettings.model_fields})
)
def test_the_page_names(word: str) -> None:
    assert re.search(rf"\b{word}\b", PAGE)


def test_every_proof_on_the_page_is_a_test() -> None:
    named = set(re.findall(r"`(test_\w+)`", PAGE))
    defined = {
        name
        for file in HERE.glob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", file.read_text(encoding="utf-8"), re.MULTILINE)
    }
    assert named
    assert named <= defined
