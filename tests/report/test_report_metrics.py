"""The figures of a report against answers that are known without it."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from decimal import Decimal
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from report_cases import DAY, INITIAL_CASH, START, a_history, a_point, a_sip_history, points_of

from engine.report.metrics import Drawdown, max_drawdown, money_weighted_return, summary
from engine.report.model import CashFlow

YEAR = timedelta(days=365)
TOLERANCE = Decimal("1e-9")


def flows_of(*flows: tuple[float, str | int]) -> list[CashFlow]:
    """Flows as (years after START, amount)."""
    return [(START + YEAR * years, Decimal(amount)) for years, amount in flows]


def rate_of(*flows: tuple[float, str | int], final: str | int, years: float = 1) -> Decimal | None:
    return money_weighted_return(flows_of(*flows), Decimal(final), START + YEAR * years)


# --- Money-weighted return ------------------------------------------------------------------


def test_return_is_that_of_the_example_in_the_manual_of_a_spreadsheet() -> None:
    # Microsoft's page on XIRR: 0.373362535.
    flows = [
        (datetime(2008, 1, 1, tzinfo=UTC), Decimal(-10_000)),
        (datetime(2008, 3, 1, tzinfo=UTC), Decimal(2_750)),
        (datetime(2008, 10, 30, tzinfo=UTC), Decimal(4_250)),
        (datetime(2009, 2, 15, tzinfo=UTC), Decimal(3_250)),
    ]
    rate = money_weighted_return(flows, Decimal(2_750), datetime(2009, 4, 1, tzinfo=UTC))
    assert rate is not None
    assert abs(rate - Decimal("0.373362535")) < Decimal("5e-9")


@pytest.mark.parametrize(
    ("flows", "final", "years", "rate"),
    [
        ([(0, -1000)], 1100, 1, "0.1"),
        ([(0, -1000)], 1000, 1, "0"),
        ([(0, -1000)], 500, 1, "-0.5"),
        # 1.1 in half a year is 1.21 in a year.
        ([(0, -1000)], 1100, 0.5, "0.21"),
        # 1000 x 1.1² + 1000 x 1.1 = 2310.
        ([(0, -1000), (1, -1000)], 2310, 2, "0.1"),
        # 1000 x 1.2² - 500 x 1.2 = 840: money taken out stops earning.
        ([(0, -1000), (1, 500)], 840, 2, "0.2"),
        # Put in and out at one moment is as if it never was.
        ([(0, -1000), (0, 400), (0, -400)], 1100, 1, "0.1"),
        # What happens before the first money doesn't count.
        ([(-3, 0), (0, -1000)], 1100, 1, "0.1"),
        # All taken out again before the end.
        ([(0, -1000), (1, 1100)], 0, 5, "0.1"),
        # A short sale: money comes in first, buying back costs less.
        ([(0, 1000)], -900, 1, "-0.1"),
        ([(0, -1)], 2, 100, "0.0069555501"),
        ([(0, -1)], "0.5", 100, "-0.0069075046"),
        ([(0, -1)], 500_000, 1, "499999"),
        ([(0, -1_000_000)], 10, 1, "-0.99999"),
    ],
)
def test_return_solves_the_sum_by_hand(
    flows: list[tuple[float, str | int]], final: int | str, years: float, rate: str
) -> None:
    found = rate_of(*flows, final=final, years=years)
    assert found is not None
    assert abs(found - Decimal(rate)) <= Decimal("1e-10") * max(Decimal(1), abs(Decimal(rate)))


def test_of_two_rates_the_one_nearest_to_zero_is_meant() -> None:
    # 100 x² - 230 x + 132 = 0 for x = 1.1 and x = 1.2.
    found = rate_of((0, -100), (1, 230), final=-132, years=2)
    assert found is not None
    assert abs(found - Decimal("0.1")) < TOLERANCE


@pytest.mark.parametrize(
    ("flows", "final", "years"),
    [
        ([], 0, 1),
        ([], 100, 1),
        ([(0, -100)], 0, 1),
        ([(0, -100), (0.5, -100)], 0, 1),
        ([(0, 100)], 100, 1),
        # No time has passed.
        ([(1, -100)], 200, 1),
        # x² - x + 1 has no real root.
        ([(0, -100), (1, 100)], -100, 2),
        # A million per cent, a day: no annual rate that anyone could read.
        ([(0, -100)], 10_000, 1 / 365),
        ([(0, -100)], "0.00000001", 1),
    ],
)
def test_where_no_rate_fits_there_is_none(
    flows: list[tuple[float, str | int]], final: str | int, years: float
) -> None:
    assert rate_of(*flows, final=final, years=years) is None


def test_a_flow_after_the_end_is_refused() -> None:
    with pytest.raises(ValueError, match="later than the final value"):
        rate_of((2, -100), final=100, years=1)


@pytest.mark.parametrize("amount", ["NaN", "Infinity"])
def test_an_amount_that_is_not_finite_is_refused(amount: str) -> None:
    with pytest.raises(ValueError, match="must be a finite amount"):
        rate_of((0, amount), final=100)
    with pytest.raises(ValueError, match="must be a finite amount"):
        rate_of((0, -100), final=amount)


DEPOSITS = st.lists(
    st.tuples(st.integers(0, 5_000), st.integers(1, 10_000_000)), min_size=1, max_size=12
)
RATES = st.floats(-0.6, 4, allow_nan=False)


def grown(deposits: list[tuple[int, int]], rate: float, end: int) -> Decimal:
    """What deposits (day, amount) become by the day ``end``, in decimals of 28 digits."""
    factor = Decimal(repr(1 + rate))
    return sum(
        (amount * factor ** (Decimal(end - day) / 365) for day, amount in deposits), Decimal(0)
    )


@given(deposits=DEPOSITS, rate=RATES, more_days=st.integers(30, 3_000))
def test_the_rate_at_which_deposits_grew_is_found(
    deposits: list[tuple[int, int]], rate: float, more_days: int
) -> None:
    end = max(day for day, _ in deposits) + more_days
    flows = [(START + DAY * day, Decimal(-amount)) for day, amount in deposits]
    found = money_weighted_return(flows, grown(deposits, rate, end), START + DAY * end)
    assert found is not None
    assert abs(found - Decimal(repr(rate))) < Decimal("1e-8")


@given(deposits=DEPOSITS, rate=RATES, scale=st.integers(1, 1_000), shift=st.integers(1, 3_000))
def test_rate_depends_on_neither_the_unit_of_money_nor_the_calendar(
    deposits: list[tuple[int, int]], rate: float, scale: int, shift: int
) -> None:
    end = max(day for day, _ in deposits) + 365
    final = grown(deposits, rate, end)

    def found(units: int, later: int) -> Decimal:
        flows = [
            (START + DAY * (day + later), Decimal(-amount * units)) for day, amount in deposits
        ]
        answer = money_weighted_return(flows, final * units, START + DAY * (end + later))
        assert answer is not None
        return answer

    assert abs(found(1, 0) - found(scale, shift)) < TOLERANCE


# --- Drawdown -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("equity", "fraction", "peak", "trough"),
    [
        ((100,), "0", 0, 0),
        ((100, 110, 120), "0", 0, 0),
        ((100, 100), "0", 0, 0),
        ((100, 75), "0.25", 0, 1),
        ((100, 120, 60, 130), "0.5", 1, 2),
        # The first of two that are as deep.
        ((100, 50, 200, 100), "0.5", 0, 1),
        # A later, deeper one, from a higher peak.
        ((100, 90, 200, 50, 60), "0.75", 2, 3),
        # The peak is the first moment at that height.
        ((100, 200, 200, 150), "0.25", 1, 3),
        # More than all is lost.
        ((100, -50), "1.5", 0, 1),
        # A peak that isn't above zero has nothing to lose.
        ((-100, -200, -50), "0", 0, 0),
        ((0, -1, 10, 9), "0.1", 2, 3),
        ((3, 2), "0.3333333333", 0, 1),
    ],
)
def test_drawdown_is_the_deepest_fall_from_an_earlier_peak(
    equity: tuple[int, ...], fraction: str, peak: int, trough: int
) -> None:
    found = max_drawdown(points_of(*equity))
    assert found == Drawdown(Decimal(fraction), START + DAY * peak, START + DAY * trough)


def test_without_marks_there_is_no_drawdown() -> None:
    assert max_drawdown([]) is None


@given(st.lists(st.integers(1, 1_000), min_size=1, max_size=30))
def test_drawdown_is_the_worst_of_all_pairs(equity: list[int]) -> None:
    worst = max(
        (Decimal(high - low) / high for high, low in combinations(equity, 2)), default=Decimal(0)
    )
    found = max_drawdown(points_of(*equity))
    assert found is not None
    assert abs(found.fraction - max(worst, Decimal(0))) <= Decimal("1e-10")
    assert found.peak_at <= found.trough_at


# --- Summary --------------------------------------------------------------------------------


def test_summary_before_the_first_mark_is_the_initial_cash() -> None:
    found = summary(a_history(orders=2))
    assert (found.cash, found.equity) == (INITIAL_CASH, INITIAL_CASH)
    assert not any((found.invested, found.market_value, found.gain))
    assert (found.money_weighted_return, found.max_drawdown) == (None, None)
    assert (found.orders, found.executions, found.ticks) == (2, 0, 0)


def test_summary_is_that_of_the_last_mark() -> None:
    equity = [a_point(0, 1000, cash=900), a_point(365, 1010, cash=900)]
    flows = flows_of((0, -100))
    found = summary(
        a_history(equity, initial_cash=Decimal(1000), cash_flows=flows, orders=3, executions=1)
    )
    assert [found.cash, found.market_value, found.equity] == list(map(Decimal, (900, 110, 1010)))
    assert [found.invested, found.gain] == [Decimal(100), Decimal(10)]
    # The money invested grew by a tenth; the cash beside it doesn't dilute the rate.
    assert found.money_weighted_return == Decimal("0.1")
    assert found.max_drawdown == Drawdown(Decimal(0), START, START)
    assert (found.orders, found.executions, found.ticks) == (3, 1, 2)


def test_summary_of_a_sip_agrees_with_discounting_its_flows() -> None:
    history = a_sip_history(ticks=800)
    found = summary(history)
    assert found.money_weighted_return is not None
    factor = 1 + found.money_weighted_return
    end = history.equity[-1].at
    worth = sum(
        (amount * factor ** (Decimal((end - at).days) / 365) for at, amount in history.cash_flows),
        Decimal(0),
    )
    assert abs(worth + found.market_value) < Decimal("0.01")
