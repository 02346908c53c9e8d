"""Files and folders that only their owner may read."""

from __future__ import annotations

import os
from pathlib import Path
from typing import BinaryIO


def make_folder(path: Path) -> None:
    """Make a folder, unless it is there."""
    path.mkdir(mode=0o700, exist_ok=True)


def create(path: Path) -> BinaryIO:
    """Make a file, or empty it, for reading and writing."""
    return os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600), "w+b")
