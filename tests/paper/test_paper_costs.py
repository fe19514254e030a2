"""Slippage, commission and settings: what they compute, accept, refuse and store."""

from __future__ import annotations

import json
from decimal import Decimal
from typing import Any

import pytest
from paper_cases import dec, settings_of
from pydantic import ValidationError

from engine.orders.model import Side
from engine.paper.costs import PaperSettings

BPS = {"model": "BPS", "bps": "15"}
UNIFORM = {"model": "UNIFORM_BPS", "max_bps": "100"}
TICKS = {"model": "TICKS", "ticks": 2, "tick_size": "0.05"}


def price(
    slippage: dict[str, Any],
    at: str,
    side: Side,
    *,
    limit: str | None = None,
    key: str = "k",
    **more: Any,
) -> Decimal:
    settings = settings_of(slippage=slippage, **more)
    return settings.fill_price(Decimal(at), side, limit=dec(limit), key=key)


@pytest.mark.parametrize(
    ("slippage", "buy", "sell"),
    [
        ({"model": "NONE"}, "100", "100"),
        (BPS, "100.15", "99.85"),
        ({"model": "BPS", "bps": "0"}, "100", "100"),
        (TICKS, "100.1", "99.9"),
        ({"model": "UNIFORM_BPS", "max_bps": "0"}, "100", "100"),
    ],
)
def test_slippage_moves_the_price_against_the_order(
    slippage: dict[str, Any], buy: str, sell: str
) -> None:
    assert price(slippage, "100", Side.BUY) == Decimal(buy)
    assert price(slippage, "100", Side.SELL) == Decimal(sell)


def test_slippage_of_a_negative_price_is_still_against_the_order() -> None:
    assert price(BPS, "-100", Side.BUY) == Decimal("-99.85")
    assert price(BPS, "-100", Side.SELL) == Decimal("-100.15")
    assert price(UNIFORM, "-100", Side.BUY) > -100 > price(UNIFORM, "-100", Side.SELL)


def test_a_slipped_price_is_rounded_against_the_order() -> None:
    assert price(BPS, "33.33", Side.BUY, price_decimals=2) == Decimal("33.38")
    assert price(BPS, "33.33", Side.SELL, price_decimals=2) == Decimal("33.28")
    assert price({"model": "NONE"}, "33.333", Side.BUY, price_decimals=2) == Decimal("33.34")
    assert price({"model": "NONE"}, "33.333", Side.SELL, price_decimals=2) == Decimal("33.33")
    finest = price({"model": "NONE"}, "33.3333333333333", Side.SELL, price_decimals=12)
    assert finest == Decimal("33.333333333333")


def test_a_limit_binds_slippage_and_rounding() -> None:
    assert price(BPS, "100", Side.BUY, limit="100.1") == Decimal("100.1")
    assert price(BPS, "100", Side.BUY, limit="100.2") == Decimal("100.15")
    assert price(BPS, "100", Side.SELL, limit="99.9") == Decimal("99.9")
    assert price(BPS, "100", Side.SELL, limit="99.8") == Decimal("99.85")
    none = {"model": "NONE"}
    assert price(none, "33.333", Side.BUY, limit="33.333", price_decimals=2) == Decimal("33.333")


@pytest.mark.parametrize(
    ("at", "side", "paid"),
    [
        ("0.11", Side.SELL, "0.01"),
        ("0.10", Side.SELL, "0.01"),
        ("0.05", Side.SELL, "0.01"),
        ("0.004", Side.SELL, "0.004"),
        ("-0.05", Side.BUY, "-0.01"),
        ("-0.05", Side.SELL, "-0.15"),
        ("0", Side.BUY, "0.10"),
        ("0", Side.SELL, "-0.10"),
    ],
)
def test_slippage_never_changes_the_sign_of_a_price(at: str, side: Side, paid: str) -> None:
    assert price(TICKS, at, side, price_decimals=2) == Decimal(paid)


def test_random_slippage_depends_on_seed_and_fill_alone() -> None:
    def draw(key: str, seed: int) -> Decimal:
        return price(UNIFORM, "100", Side.BUY, key=key, seed=seed)

    # A known value, so that neither a release nor a platform changes past runs unnoticed.
    assert draw("an-order-1", 0) == Decimal("100.36497990")
    assert draw("an-order-1", 0) == draw("an-order-1", 0)
    assert len({draw(f"an-order-{n}", seed) for n in range(5) for seed in range(5)}) == 25


def test_random_slippage_is_uniform_from_zero_to_its_maximum() -> None:
    settings = settings_of(slippage=UNIFORM)
    drawn = [
        settings.fill_price(Decimal(100), Side.BUY, limit=None, key=str(n)) - 100
        for n in range(2000)
    ]
    assert min(drawn) >= 0
    assert max(drawn) <= 1
    for tenth in range(10):
        inside = [d for d in drawn if tenth <= d * 10 < tenth + 1]
        assert 150 < len(inside) < 250


@pytest.mark.parametrize(
    ("commission", "quantity", "at", "charge"),
    [
        ({"model": "NONE"}, "10", "100", "0"),
        ({"model": "FIXED", "amount": "1.5"}, "10", "100", "1.5"),
        ({"model": "PER_UNIT", "rate": "0.005"}, "10", "100", "0.05"),
        ({"model": "PER_UNIT", "rate": "0.005", "minimum": "1"}, "199", "100", "1"),
        ({"model": "PER_UNIT", "rate": "0.005", "minimum": "1"}, "201", "100", "1.005"),
        ({"model": "PERCENT", "percent": "0.1"}, "10", "100", "1"),
        ({"model": "PERCENT", "percent": "0.1"}, "10", "-100", "1"),
        ({"model": "PERCENT", "percent": "0.1", "minimum": "2"}, "19", "100", "2"),
        ({"model": "PERCENT", "percent": "0.1", "minimum": "2"}, "21", "100", "2.1"),
        # Half-even at the eighth decimal.
        ({"model": "PER_UNIT", "rate": "0.000000005"}, "1", "1", "0.00000000"),
        ({"model": "PER_UNIT", "rate": "0.000000005"}, "3", "1", "0.00000002"),
        ({"model": "PER_UNIT", "rate": "0.000000005"}, "5", "1", "0.00000002"),
        ({"model": "PER_UNIT", "rate": "0.0000000051"}, "1", "1", "0.00000001"),
    ],
)
def test_commission(commission: dict[str, Any], quantity: str, at: str, charge: str) -> None:
    settings = settings_of(commission=commission)
    assert settings.commission_on(Decimal(quantity), Decimal(at)) == Decimal(charge)


FULL: dict[str, Any] = {
    "slippage": {"model": "UNIFORM_BPS", "max_bps": "7.50"},
    "commission": {"model": "PERCENT", "percent": "0.1", "minimum": "1.00"},
    "max_volume_share": "0.25",
    "quantity_decimals": 2,
    "price_decimals": 4,
    "seed": 42,
    "stale_after_seconds": 900,
}


@pytest.mark.parametrize(
    "values",
    [
        {},
        FULL,
        {"slippage": TICKS},
        {"slippage": BPS},
        {"commission": {"model": "FIXED", "amount": "1"}},
        {"commission": {"model": "PER_UNIT", "rate": "0.01"}},
    ],
)
def test_settings_read_back_from_json_as_they_were(values: dict[str, Any]) -> None:
    settings = PaperSettings.model_validate(values)
    stored = json.loads(json.dumps(settings.model_dump(mode="json")))
    assert PaperSettings.model_validate(stored) == settings
    assert PaperSettings.model_validate_json(settings.model_dump_json()) == settings


def test_settings_store_decimals_as_strings() -> None:
    assert PaperSettings.model_validate(FULL).model_dump(mode="json") == FULL


def test_defaults_cost_nothing_and_limit_nothing() -> None:
    assert PaperSettings().model_dump(mode="json") == {
        "slippage": {"model": "NONE"},
        "commission": {"model": "NONE"},
        "max_volume_share": None,
        "quantity_decimals": 6,
        "price_decimals": 8,
        "seed": 0,
        "stale_after_seconds": None,
    }


def test_a_models_name_is_read_in_any_case() -> None:
    assert settings_of(slippage={"model": "bps", "bps": 5}) == settings_of(
        slippage={"model": "BPS", "bps": "5"}
    )
    ready = settings_of(slippage=BPS).slippage
    assert PaperSettings(slippage=ready).slippage == ready


def test_a_json_number_is_read_by_its_digits() -> None:
    settings = PaperSettings.model_validate_json('{"max_volume_share": 0.1}')
    assert settings.max_volume_share == Decimal("0.1")


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({"slipage": BPS}, "Extra inputs are not permitted"),
        ({"slippage": {"model": "BPS", "bps": "1", "ticks": 2}}, "Extra inputs"),
        ({"slippage": {"model": "BPS"}}, "Field required"),
        ({"slippage": {"model": "MAGIC"}}, "'NONE', 'BPS', 'UNIFORM_BPS', 'TICKS'"),
        ({"slippage": {"model": 5}}, "'NONE', 'BPS', 'UNIFORM_BPS', 'TICKS'"),
        ({"slippage": {"bps": "1"}}, "Unable to extract tag"),
        ({"slippage": {"model": "BPS", "bps": "-0.1"}}, "greater than or equal to 0"),
        ({"slippage": {"model": "BPS", "bps": "10000"}}, "less than 10000"),
        ({"slippage": {"model": "BPS", "bps": "NaN"}}, "finite number"),
        ({"slippage": {"model": "BPS", "bps": "5 bps"}}, "valid decimal"),
        ({"slippage": {"model": "TICKS", "ticks": 1, "tick_size": "0"}}, "greater than 0"),
        ({"slippage": {"model": "TICKS", "ticks": -1, "tick_size": "1"}}, "greater than or equal"),
        ({"commission": {"model": "FIXED", "amount": "-1"}}, "greater than or equal to 0"),
        ({"commission": {"model": "FIXED", "amount": "Infinity"}}, "finite number"),
        ({"commission": {"model": "PERCENT", "percent": "100.1"}}, "less than or equal to 100"),
        ({"commission": {"model": "PER_UNIT", "rate": "1e-13"}}, "12 decimal places"),
        ({"max_volume_share": "0"}, "greater than 0"),
        ({"max_volume_share": "1.01"}, "less than or equal to 1"),
        ({"quantity_decimals": 13}, "less than or equal to 12"),
        ({"quantity_decimals": -1}, "greater than or equal to 0"),
        ({"price_decimals": 13}, "less than or equal to 12"),
        ({"stale_after_seconds": -1}, "greater than or equal to 0"),
    ],
)
def test_settings_refuse_what_they_cannot_mean(values: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValidationError, match=complaint):
        PaperSettings.model_validate(values)


@pytest.mark.parametrize(
    "values",
    [
        {"slippage": {"model": "BPS", "bps": "9999.99"}},
        {"commission": {"model": "PERCENT", "percent": "100"}},
        {"commission": {"model": "PER_UNIT", "rate": "1e-12"}},
        {"max_volume_share": "1"},
        {"quantity_decimals": 0, "price_decimals": 12},
        {"stale_after_seconds": 0},
        {"seed": -(2**80)},
    ],
)
def test_settings_accept_their_outermost_values(values: dict[str, Any]) -> None:
    PaperSettings.model_validate(values)


def test_settings_cannot_change_under_a_running_book() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        PaperSettings().seed = 1
