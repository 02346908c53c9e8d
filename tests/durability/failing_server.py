"""A server whose disk fails for as long as a file exists.

Usage: failing_server.py FILE CALL[,CALL…] ERRNO [options of `optserve serve`].
"""

import errno
import os
import sys
from pathlib import Path

from optserve_server.__main__ import main


def fail_while(flag: Path, name: str, number: int) -> None:
    real = getattr(os, name)

    def call(*arguments, **options):
        if flag.exists():
            raise OSError(number, os.strerror(number))
        return real(*arguments, **options)

    setattr(os, name, call)


if __name__ == "__main__":
    for name in sys.argv[2].split(","):
        fail_while(Path(sys.argv[1]), name, getattr(errno, sys.argv[3]))
    sys.argv[1:4] = []
    main()
