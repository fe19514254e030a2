"""The structured log: one JSON object a line, through the standard library's logging."""

from __future__ import annotations

import json
import logging

__all__ = ["tell"]

_log = logging.getLogger("oms")


def tell(code: str, *, level: int = logging.INFO, **fields: object) -> None:
    """Log that ``code`` happened; the fields say to what."""
    if _log.isEnabledFor(level):
        _log.log(level, "%s", json.dumps({"event": code, **fields}, default=str))
