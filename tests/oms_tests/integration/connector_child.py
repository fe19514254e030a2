"""A connector process for tests that end one: its broker writes what it is sent to a file.

    connector_child.py DSN USER ACCOUNT FILE SECONDS

Every line of FILE is what was sent, and its order; each takes SECONDS to be written. As the
command does, it ends by SIGINT or SIGTERM, with the exit code of why.
"""

from __future__ import annotations

import asyncio
import random
import sys
from pathlib import Path
from uuid import UUID

from connector_cases import ScriptedBroker, Wire

from cli.connect import _end_by_signals
from engine.brokers import registry
from engine.brokers.connector import Pace, connect

WIRE = Wire()


def main(dsn: str, user_id: str, account: str, file: str, seconds: str) -> int:
    WIRE.account = account
    with Path(file).open("a", encoding="utf-8") as lines:

        async def before(kind: str, ref: str) -> None:
            lines.write(f"{kind} {ref}\n")
            lines.flush()
            await asyncio.sleep(float(seconds))

        WIRE.before = before
        registry.ADAPTERS["scripted"] = lambda settings: ScriptedBroker(WIRE)
        return int(
            asyncio.run(
                connect(
                    dsn,
                    UUID(user_id),
                    account,
                    jitter=random.Random(1).random,
                    started=_end_by_signals,
                    pace=Pace(lease=2, poll=0.05),
                )
            )
        )


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
