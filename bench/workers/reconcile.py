"""Reconciles open orders: ``DSN ORDERS``; tells the seconds, and the peak memory in bytes."""

from __future__ import annotations

import json
import sys

from bench.broker import reconcile_open_orders
from bench.workers.fill import peak_bytes

if __name__ == "__main__":
    seconds = reconcile_open_orders(sys.argv[1], int(sys.argv[2]))
    print(json.dumps({"seconds": seconds, "peak": peak_bytes()}))
