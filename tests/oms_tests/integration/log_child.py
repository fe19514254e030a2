"""A process that logs: FILE NAME LINES MAX_BYTES [FILE_SIZE_LIMIT].

It prints the longest time in seconds that a single ``tell`` took. With a limit, the kernel takes no
more into any file than that many bytes, as on a full disk, until half of the lines are told.
"""

from __future__ import annotations

import resource
import sys
import time
from pathlib import Path

from engine.log import open_log, tell


def main() -> None:
    path, name, lines, max_bytes = Path(sys.argv[1]), sys.argv[2], *map(int, sys.argv[3:5])
    limited = len(sys.argv) > 5
    if limited:
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[5]), resource.RLIM_INFINITY))
    slowest = 0.0
    with open_log(path, max_bytes, backups=1000, daily=True):
        for number in range(lines):
            began = time.monotonic()
            tell("FILL_RATE", name=name, number=number)
            slowest = max(slowest, time.monotonic() - began)
            if limited and number == lines // 2:
                sys.stdin.readline()
                unlimited = resource.RLIM_INFINITY
                resource.setrlimit(resource.RLIMIT_FSIZE, (unlimited, unlimited))
    print(slowest)


if __name__ == "__main__":
    main()
