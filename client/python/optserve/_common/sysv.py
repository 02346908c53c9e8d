"""System V shared memory: segments of a fixed size. They belong to one user and end with the last process using them.

No process can truncate or resize such a segment, so no process can make another one fail. It has no name in a file
system, so a crash leaves nothing behind. Containers that share an IPC namespace can share it.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

_IPC_PRIVATE, _IPC_RMID, _IPC_STAT = 0, 0, 2
_IPC_CREAT = 0o1000
_OWNER_ONLY = 0o600
_MAX_NUMBER = (1 << 31) - 1
# struct shmid_ds of 64-bit Linux: the owner's id, the segment's size.
_STAT_BYTES, _UID_OFFSET, _SIZE_OFFSET = 256, 4, 48
_FAILED = ctypes.c_void_p(-1).value


def host_id() -> str:
    """An id of this kernel, IPC namespace and user; empty if there is no System V shared memory."""
    if sys.platform != "linux" or sys.maxsize < 1 << 32:
        return ""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        namespace = Path("/proc/self/ns/ipc").readlink()
    except OSError:
        return ""
    return hashlib.sha256(f"{boot} {namespace} {os.getuid()}".encode()).hexdigest()[:32]


class _Attached:
    """The memory of a segment, which stays attached as long as an array of it exists."""

    def __init__(self, number: int, size_bytes: int) -> None:
        libc = _libc()
        address = libc.shmat(number, None, 0)
        if address == _FAILED:
            raise _error(f"attach segment {number}")
        self._detach = libc.shmdt
        self._address = address
        self.__array_interface__ = {"data": (address, False), "shape": (size_bytes,), "typestr": "|u1", "version": 3}

    def __del__(self) -> None:
        if hasattr(self, "_address"):
            self._detach(self._address)


def create(size_bytes: int) -> tuple[int, np.ndarray]:
    """Make a segment: (its number, its bytes, all 0). It ends when no process has an array of it any more.

    Raises:
        OSError: There is no memory for it, or the system has no shared memory.
    """
    libc = _libc()
    number = libc.shmget(_IPC_PRIVATE, size_bytes, _IPC_CREAT | _OWNER_ONLY)
    if number < 0:
        raise _error(f"make a segment of {size_bytes} bytes")
    try:
        return number, np.asarray(_Attached(number, size_bytes))
    finally:
        # The system removes it when no process is attached, also after kill -9; until then processes can attach it.
        libc.shmctl(number, _IPC_RMID, None)


def attach(number: int, size_bytes: int) -> np.ndarray:
    """The bytes of a segment that another process has made.

    Raises:
        OSError: There is no such segment of that size that belongs to this user.
    """
    # A number that does not fit into C's int would be cut off silently, and be the number of another segment.
    if not 0 <= number <= _MAX_NUMBER:
        raise OSError(f"there is no segment {number}")
    libc = _libc()
    status = ctypes.create_string_buffer(_STAT_BYTES)
    if libc.shmctl(number, _IPC_STAT, status) < 0:
        raise _error(f"look at segment {number}")
    owner = int.from_bytes(status[_UID_OFFSET : _UID_OFFSET + 4], sys.byteorder)
    size = int.from_bytes(status[_SIZE_OFFSET : _SIZE_OFFSET + 8], sys.byteorder)
    if owner != os.getuid() or size != size_bytes:
        raise OSError(f"segment {number} has {size} bytes and belongs to user {owner}")
    return np.asarray(_Attached(number, size_bytes))


def _libc() -> Any:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.shmget.argtypes = [ctypes.c_int, ctypes.c_size_t, ctypes.c_int]
    libc.shmat.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_int]
    libc.shmat.restype = ctypes.c_void_p
    libc.shmdt.argtypes = [ctypes.c_void_p]
    libc.shmctl.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_void_p]
    return libc


def _error(what: str) -> OSError:
    number = ctypes.get_errno()
    return OSError(number, f"cannot {what}: {os.strerror(number)}")
