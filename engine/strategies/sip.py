"""Systematic investment plans: so much money on a day of every month.

The plans are rows of ``sip_plan``; what is due is decided in the database (``sip_due``), by the
run's calendar and the ledger. This strategy decides what becomes of occasions that were missed and
turns money into units.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta

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
        for due in context.sips_due:
            if _is_skipped(context, due):
                yield Announce("SIP_SKIPPED", due.occasion, _facts(due))
            elif due.symbol in context.prices:
                yield _invest(context, due)


def _is_skipped(context: Context, due: SipDue) -> bool:
    """Whether an occasion was missed and its plan's policy lets it go."""
    missed = context.now - due.session.close_at > timedelta(hours=ON_TIME_HOURS_MAX)
    if due.missed_policy == "RUN_ONCE":
        return missed and due.next_open_at is not None and due.next_open_at <= context.now
    return missed and due.missed_policy == "SKIP"


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
