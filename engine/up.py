"""All that one machine needs, in one process: schedule, worker, and a connector for each account.

They know nothing of each other but the database, here as in processes of their own: each may fail
and be started again by itself.
"""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Callable
from uuid import UUID

from engine import schedule, worker
from engine.brokers.connector import Connector, Ended, connect
from engine.brokers.sessions import prepare
from engine.clock import utc_now
from engine.db.connect import ANSWER_SECONDS_MAX, connected
from engine.errors import EngineError, translated
from engine.log import tell
from engine.schedule import Round

# Between two looks at which accounts there are, and before one that ended is tried again.
LOOK_SECONDS = 10.0
_STOP_SECONDS = 0.2
# How long connectors have to end before the worker is told to end, too.
LEAVE_SECONDS_MAX = 60.0

Key = tuple[UUID, str]


def serve(
    dsn: str, *, every_seconds: int, report: Callable[[Round], None] = lambda done: None
) -> None:
    """Serve until SIGINT or SIGTERM; what is under way is finished first.

    The connectors end before the worker, which takes in what their brokers said last.
    """
    connecting_ends, working_ends = threading.Event(), threading.Event()
    connectors = threading.Thread(
        target=_run_connectors, args=(dsn, connecting_ends), name="oms-connect"
    )
    work = threading.Thread(target=worker.serve, args=(dsn, working_ends), name="oms-work")
    connectors.start()
    work.start()
    try:
        schedule.serve(dsn, every_seconds=every_seconds, report=report)
    finally:
        connecting_ends.set()
        connectors.join(LEAVE_SECONDS_MAX)
        working_ends.set()
        work.join()


def _run_connectors(dsn: str, stopped: threading.Event) -> None:
    asyncio.run(_Connectors(dsn).serve(stopped))


class _Connectors:
    """A connector for each account, old and new, until it is told to stop."""

    def __init__(self, dsn: str) -> None:
        self._dsn = dsn
        self._running: dict[Key, asyncio.Task[Ended]] = {}
        self._connectors: dict[Key, Connector] = {}
        # Somebody else's now, or not what it says it is: a person must look.
        self._given_up: set[Key] = set()

    async def serve(self, stopped: threading.Event) -> None:
        loop = asyncio.get_running_loop()
        next_look = 0.0
        while not stopped.is_set():
            if loop.time() >= next_look:
                await self._look()
                next_look = loop.time() + LOOK_SECONDS
            await asyncio.sleep(_STOP_SECONDS)
        for connector in self._connectors.values():
            connector.stop()
        await asyncio.gather(*self._running.values(), return_exceptions=True)

    async def _look(self) -> None:
        """Start what isn't served; what has ended meanwhile says why."""
        for key, task in list(self._running.items()):
            if task.done():
                self._note_end(key, task)
        try:
            keys = await asyncio.to_thread(self._accounts)
        except EngineError as error:
            tell("CONNECTORS_WAIT", error=str(error))
            return
        for key in keys:
            if key not in self._running and key not in self._given_up:
                self._running[key] = asyncio.ensure_future(self._connect(key))

    def _note_end(self, key: Key, task: asyncio.Task[Ended]) -> None:
        del self._running[key]
        self._connectors.pop(key, None)
        if task.cancelled():
            return
        error = task.exception()
        if error is not None:
            tell("CONNECTOR_FAILED", account=key[1], error=str(error))
        elif task.result() is not Ended.STOPPED:
            tell("CONNECTOR_GIVEN_UP", account=key[1], why=task.result().name)
            self._given_up.add(key)

    async def _connect(self, key: Key) -> Ended:
        def started(connector: Connector) -> None:
            self._connectors[key] = connector

        return await connect(self._dsn, *key, jitter=random.random, started=started)

    def _accounts(self) -> list[Key]:
        """The accounts that there are, their calendars stored."""
        with translated(), connected(self._dsn, answer_seconds=ANSWER_SECONDS_MAX) as conn:
            keys: list[Key] = conn.execute(
                "SELECT user_id, account FROM broker_account ORDER BY user_id, account"
            ).fetchall()
            for user_id, account in keys:
                prepare(conn, user_id, account, utc_now().date())
        return keys
