"""A blocking client of the exchange's control connection: the operator's hand, for tests."""

from __future__ import annotations

import json
import socket
from collections.abc import Mapping
from decimal import Decimal
from types import TracebackType
from typing import Any, Self

from engine.brokers.dummy.server import HOST
from engine.brokers.dummy.wire import encode, order_on_wire
from engine.brokers.protocol import BrokerOrder, BrokerUnavailable
from engine.errors import BadInput

__all__ = ["Control"]

ANSWER_SECONDS_MAX = 60.0
DEFAULT_ACCOUNT = "DU1"


class Control:
    """Moves the market and makes things go wrong. Each call returns when it is done and on disk.

    Raises BadInput for what the exchange refuses, BrokerUnavailable when it isn't there. An order
    is named by its reference or by the number that ``place`` returned.
    """

    def __init__(self, port: int) -> None:
        try:
            self._socket = socket.create_connection((HOST, port), timeout=ANSWER_SECONDS_MAX)
        except OSError as error:
            raise BrokerUnavailable(f"No exchange is at port {port}: {error}.") from error
        self._lines = self._socket.makefile("rb")
        self._ask({"op": "CONTROL"})

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Hang up."""
        self._lines.close()
        self._socket.close()

    def do(self, op: str, **given: Any) -> Any:
        """Any request of the desk by its name."""
        return self._ask({"op": op} | {name: _plain(value) for name, value in given.items()})

    # --- The market ---------------------------------------------------------------------------

    def set_price(self, symbol: str, price: Decimal | str) -> None:
        """Move the market to a price; a symbol that there was not is there now."""
        self.do("set_price", symbol=symbol, price=str(price))

    def set_liquidity(self, symbol: str, liquidity: Decimal | str | None) -> None:
        """Say how many units can be had on each side until the next price; None: no end."""
        self.do("set_liquidity", symbol=symbol, liquidity=liquidity)

    def freeze(self, frozen: bool = True) -> None:
        """Freeze the market: orders are rejected, nothing trades; or let it go on."""
        self.do("freeze", frozen=frozen)

    def open_session(self) -> None:
        """Open the session."""
        self.do("set_session", is_open=True)

    def close_session(self) -> None:
        """Close the session: DAY orders expire."""
        self.do("set_session", is_open=False)

    def rename(self, old: str, new: str) -> None:
        """Rename a symbol."""
        self.do("rename", old=old, new=new)

    def step(self, times: int = 1) -> None:
        """Let the prices that walk take steps."""
        self.do("step", times=times)

    def market(self) -> dict[str, Any]:
        """Prices, the exchange's time, whether it is open, whether it is frozen."""
        return dict(self.do("market"))

    # --- Orders -------------------------------------------------------------------------------

    def fill(
        self,
        order: str | int,
        quantity: Decimal | str | None = None,
        price: Decimal | str | None = None,
    ) -> str:
        """Fill an order, even one that has ended; all that is left, at the market, by default.

        Returns the id of the execution.
        """
        return str(self.do("fill", order=order, quantity=quantity, price=price))

    def cancel(self, order: str | int, reason: str = "by the operator") -> None:
        """Cancel an order without having been asked."""
        self.do("cancel", order=order, reason=reason)

    def forget(self, order: str | int) -> None:
        """Lose an order without a word."""
        self.do("forget", order=order)

    def manual_order(self, order: BrokerOrder, account: str = DEFAULT_ACCOUNT) -> int:
        """Place an order by hand; returns its number."""
        return self._place(order, account, None)

    def orphan_order(
        self, order: BrokerOrder, account: str = DEFAULT_ACCOUNT, client_id: int = 0
    ) -> int:
        """Place an order as that client, which knows nothing of it; returns its number."""
        return self._place(order, account, client_id)

    def correct(
        self,
        execution_id: str,
        quantity: Decimal | str | None = None,
        price: Decimal | str | None = None,
    ) -> str:
        """Correct an execution; returns the new id."""
        return str(self.do("correct", execution_id=execution_id, quantity=quantity, price=price))

    def bust(self, execution_id: str) -> None:
        """Take an execution back."""
        self.do("bust", execution_id=execution_id)

    def change_perm_id(self, order: str | int) -> int:
        """Give an order another permId, and return it."""
        return int(self.do("change_perm_id", order=order))

    def say(self, order: str | int, kind: str, payload: Mapping[str, Any]) -> None:
        """Say something about an order that the exchange's books know nothing of."""
        self.do("say", order=order, kind=kind, payload=dict(payload))

    # --- Connections, ids, time ---------------------------------------------------------------

    def drop(self, account: str | None = None) -> None:
        """Drop the connections of an account, or all."""
        self.do("drop", account=account)

    def refuse_logons(self, refused: bool = True) -> None:
        """Let nobody in, or let them in again; a restart of the exchange does so too."""
        self.do("refuse_logons", refused=refused)

    def silence(self, seconds: float | None = None) -> None:
        """Say nothing any more on the connections that there are; 0 ends it."""
        self.do("silence", seconds=seconds)

    def steal(self, by: str = "another program") -> None:
        """Take all sessions away from their clients."""
        self.do("steal", by=by)

    def switch_account(self, account: str) -> None:
        """Let all sessions go on with another account."""
        self.do("switch_account", account=account)

    def notice(self, code: str, message: str) -> None:
        """Say something that concerns no order."""
        self.do("notice", code=code, message=message)

    def set_next_order_id(self, number: int) -> None:
        """Let order ids go on from here: 1 restarts them, 2147483647 is the last."""
        self.do("set_next_order_id", number=number)

    def set_skew(self, seconds: float) -> None:
        """Put the exchange's clock wrong by so much."""
        self.do("set_skew", seconds=seconds)

    def sessions(self) -> list[dict[str, Any]]:
        """Who is logged on: account and client id."""
        return list(self.do("sessions"))

    def strikes(self) -> dict[str, int]:
        """How often each fault of the plan has struck, by its place in the plan."""
        return dict(self.do("strikes"))

    def books(self, account: str = DEFAULT_ACCOUNT) -> dict[str, Any]:
        """The exchange's own orders, executions that count, reports, positions and cash."""
        return dict(self.do("books", account=account))

    def _place(self, order: BrokerOrder, account: str, client_id: int | None) -> int:
        said = order_on_wire(order)
        return int(self.do("place", order=said, account=account, client_id=client_id))

    def _ask(self, request: dict[str, Any]) -> Any:
        try:
            self._socket.sendall(encode(request))
            line = self._lines.readline()
        except OSError as error:
            raise BrokerUnavailable(f"The exchange doesn't answer: {error}.") from error
        if not line:
            raise BrokerUnavailable("The exchange has hung up.")
        answer = json.loads(line)
        if "error" in answer:
            raise BadInput(answer["error"])
        return answer["done"]


def _plain(value: Any) -> Any:
    return f"{value:f}" if isinstance(value, Decimal) else value
