"""Systematic investment plans: so much money on a day of every month.

The plans are rows of ``sip_plan``; what is due is decided in the database (``sip_due``), by the
run's calendar and the ledger. This strategy decides what becomes of occasions that were missed and
turns money into units.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import timedelta
from itertools import groupby

from engine.orders.model import Side
from engine.quantities import cut
from engine.strategies.base import Announce, Context, Intent, PlaceOrder, SipDue, Strategy

# An occasion counts as missed when its session closed longer ago than this: a daily import that
# arrives in the evening, or a scheduler that was restarted over night, is still on time.
ON_TIME_HOURS_MAX = 24


class Sip(Strategy):
    """Executes the run's investment plans."""

    def on_tick(self, context: Context) -> Iterator[Intent]:
        if not context.market_open:
            return
        for _, group in groupby(
            sorted(context.sips_due, key=lambda due: (due.plan, due.planned_on)),
            key=lambda due: due.plan,
        ):
            yield from _decide(context, list(group))


def _decide(context: Context, due: Sequence[SipDue]) -> Iterator[Intent]:
    """What becomes of one plan's occasions, oldest first."""
    for number, occasion in enumerate(due):
        newest = number == len(due) - 1
        missed = context.now - occasion.session.close_at > timedelta(hours=ON_TIME_HOURS_MAX)
        policy = occasion.missed_policy
        if missed and (policy == "SKIP" or (policy == "RUN_ONCE" and not newest)):
            yield Announce("SIP_SKIPPED", occasion.occasion, _facts(occasion))
        elif occasion.symbol in context.prices:
            yield _invest(context, occasion)


def _invest(context: Context, due: SipDue) -> PlaceOrder:
    decimals = context.quantity_decimals[due.symbol]
    quantity = cut(due.amount / context.prices[due.symbol], decimals)
    return PlaceOrder(due.symbol, Side.BUY, quantity, occasion=due)


def _facts(due: SipDue) -> dict[str, str]:
    return {
        "plan": due.plan,
        "symbol": due.symbol,
        "amount": str(due.amount),
        "planned_on": due.planned_on.isoformat(),
    }
