"""What the shell offers at TAB. It must be quick and silent: on any trouble it offers nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import typer

from cli.database import EMBEDDED_DATABASE

if TYPE_CHECKING:
    from engine.db.connect import Connection

__all__ = ["complete_run", "complete_strategy", "complete_symbol"]

Offers = list[tuple[str, str]]


class _NothingToAsk(Exception):
    """No server is up; TAB is no reason to start one."""


def complete_run(ctx: typer.Context, incomplete: str) -> Offers:
    """Names of runs; their ids once something is typed."""
    offers: Offers = []
    try:
        with _running_database(ctx) as conn:
            from engine import reads

            for run in reads.list_runs(conn, limit=reads.ROWS_MAX):
                words = f"{run.strategy} of {run.user_name}, {run.status}"
                if run.name:
                    offers.append((run.name, words))
                if incomplete or not run.name:
                    offers.append((str(run.run_id), words))
    except Exception:  # whatever it is, the command itself will say it in words
        return []
    return [offer for offer in offers if offer[0].startswith(incomplete)]


def complete_symbol(ctx: typer.Context, incomplete: str) -> Offers:
    """Known symbols."""
    try:
        with _running_database(ctx) as conn:
            from engine.market.store import list_data

            known = [(data.symbol, data.name or "") for data in list_data(conn)]
    except Exception:  # as above
        return []
    return [offer for offer in known if offer[0].startswith(incomplete)]


def complete_strategy(incomplete: str) -> Offers:
    """The strategies that ship."""
    from engine.strategies.registry import SHIPPED

    return [
        (name, (kind.__doc__ or "").partition("\n")[0])
        for name, kind in sorted(SHIPPED.items())
        if name.startswith(incomplete)
    ]


@contextmanager
def _running_database(ctx: typer.Context) -> Iterator[Connection]:
    """A connection to the database that the command line names, if it is there already."""
    from engine import config
    from engine.db.connect import connected

    dsn = ctx.params.get("dsn") or config.configured_dsn()
    if dsn is None:
        if not config.home().exists():
            raise _NothingToAsk
        from engine.db.embedded import default_server

        server = default_server()
        if not server.is_running():
            raise _NothingToAsk
        dsn = server.dsn(EMBEDDED_DATABASE)
    with connected(dsn) as conn:
        yield conn
