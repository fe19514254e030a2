"""`oms connect`: the process that stands between an account's outbox and its broker."""

from __future__ import annotations

import random
import signal
from typing import TYPE_CHECKING, Annotated

import typer

from cli.database import acting, owner_dsn
from cli.options import Dsn, Json
from cli.output import log_to_stderr, note, print_json, say

if TYPE_CHECKING:
    from engine.brokers.connector import Connector, Ended

__all__ = ["connect"]

_WHY = {
    "STOPPED": "Stopped; everything is stored, and another connector may follow.",
    "CONNECTION_STOLEN": "Another process has taken over; it was left to it.",
    "ACCOUNT_MISMATCH": "The broker speaks for another account; nothing more is sent.",
}


def connect(
    account: Annotated[
        str, typer.Option("--account", metavar="NAME", help="The account.", show_default=False)
    ],
    user: Annotated[
        str, typer.Option("--user", metavar="NAME", help="Whose it is.", show_default=False)
    ],
    dsn: Dsn = None,
    as_json: Json = False,
) -> None:
    """Connect an account to its broker, until Ctrl-C.

    Sends what the engine has committed, no faster than the account allows and
    inside its hours, and stores whatever the broker says. One connector an
    account: a second one is told who holds it. After a kill it goes on where
    it was; nothing is sent twice.

    SIGTERM ends it too: what is being sent is finished, and it logs off. Exit
    code 3 means that another process has taken over, 4 that the broker speaks
    for another account. The log is on stderr, one JSON object a line,
    and in connect-ACCOUNT.log in OMS_LOG, or in the folder log of OMS_HOME.

    Example:
      oms connect --account DU123 --user alice
    """
    ended = _serve(owner_dsn(dsn), user, account)
    if as_json:
        print_json({"account": account, "ended": ended.name})
    else:
        say(_WHY[ended.name])
    if ended:
        raise typer.Exit(int(ended))


def _serve(dsn: str, user: str, account: str) -> Ended:
    import asyncio

    from engine import config
    from engine.brokers.connector import connect as serve
    from engine.brokers.sessions import prepare
    from engine.clock import utc_now
    from engine.log import open_log
    from engine.reads import find_user

    with acting(dsn) as conn:
        user_id = find_user(conn, user).user_id
        prepare(conn, user_id, account, utc_now().date())
    log_to_stderr()
    note(f"Serving account {account}; Ctrl-C ends it.")
    jitter = random.Random().random
    with open_log(config.log_folder() / f"connect-{account}.log"):
        return asyncio.run(serve(dsn, user_id, account, jitter=jitter, started=_end_by_signals))


def _end_by_signals(connector: Connector) -> None:
    from asyncio import get_running_loop

    loop = get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, connector.stop)
