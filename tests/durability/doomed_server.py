"""A server that is killed by itself, as by kill -9, at one chosen call to the disk: before it, in it or after it.

Usage: doomed_server.py SEED MAX_CALLS [options of `optserve serve`]. The seed chooses call and moment.
"""

import os
import random
import signal
import sys
import threading
from pathlib import Path

from optserve_server.__main__ import main


def doom(seed: int, max_calls: int) -> None:
    """Choose a call among the next `max_calls`, and die there."""
    rng = random.Random(seed)
    left = rng.randrange(1, max_calls + 1)
    moment = rng.choice(["before", "within", "after"])
    counting = threading.Lock()

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def wrap(owner: object, name: str) -> None:
        real = getattr(owner, name)

        def call(*arguments, **options):
            nonlocal left
            with counting:
                left -= 1
                chosen = left == 0
            if chosen and moment == "before":
                die()
            if chosen and moment == "within" and name == "pwritev":
                whole = b"".join(bytes(part) for part in arguments[1])
                os.pwrite(arguments[0], whole[: rng.randrange(len(whole))], arguments[2])
                die()
            if chosen and moment == "within" and name == "pwrite":
                real(arguments[0], arguments[1][: len(arguments[1]) // 2], arguments[2])
                die()
            try:
                return real(*arguments, **options)
            finally:
                # Also where the call fails, as one for a file that may be missing.
                if chosen:
                    die()

        setattr(owner, name, call)

    for name in ("pwritev", "pwrite", "fdatasync", "fsync", "posix_fallocate", "link", "rmdir"):
        wrap(os, name)
    for name in ("rename", "replace", "unlink"):
        wrap(Path, name)


if __name__ == "__main__":
    doom(int(sys.argv[1]), int(sys.argv[2]))
    sys.argv[1:3] = []
    main()
