"""The memory that an optimizer shares with one client on the same host: a control page, then the staging arenas."""

from __future__ import annotations

import secrets
from collections.abc import Collection

import numpy as np

from optserve._common import sysv
from optserve_server.numerics.layout import Layout, Operand, Operands

_CONTROL_BYTES = 4096
_ALIGNMENT = 64
NONCE_OFFSET, NONCE_BYTES = 0, 32
DIRTY_OFFSET, REPLIED_OFFSET = 64, 128
"""Words of 64 bits, on cache lines of their own."""


class Segment:
    """A segment that this server has made. A client writes into it whatever and whenever it likes.

    Attributes:
        name: For the client.
        size_bytes: Of the whole.
        nonce: What the client has to find in it.
        operands: Views of the staging arenas.
        offsets: First byte of each parameter, for each operand.

    Raises:
        OSError: There is no room, or no shared memory here.
    """

    def __init__(self, layout: Layout, operands: Collection[Operand]) -> None:
        self.size_bytes = _CONTROL_BYTES + len(operands) * _aligned(layout.size_bytes)
        number, memory = sysv.create(self.size_bytes)
        self.name = f"sysv:{number}"
        self.nonce = secrets.token_bytes(NONCE_BYTES)
        memory[NONCE_OFFSET : NONCE_OFFSET + NONCE_BYTES] = np.frombuffer(self.nonce, np.uint8)
        # Not as an array, whose elements take five times as long to reach.
        self._words = memory[:_CONTROL_BYTES].data.cast("B").cast("Q")
        begin = _CONTROL_BYTES
        self.operands: Operands = {}
        self.offsets: dict[Operand, list[int]] = {}
        for operand in operands:
            arenas = self.operands[operand] = layout.arenas(memory[begin : begin + layout.size_bytes])
            starts = {dtype: arena.ctypes.data - memory.ctypes.data for dtype, arena in arenas.items()}
            self.offsets[operand] = [
                starts[parameter.dtype] + start * parameter.dtype.itemsize
                for parameter, start in zip(layout.parameters, layout.starts, strict=True)
            ]
            begin += _aligned(layout.size_bytes)

    @property
    def dirty(self) -> bool:
        """Whether the client has, or may have, overwritten what was last put into it or taken from it."""
        return bool(self._words[DIRTY_OFFSET // 8])

    def clean(self) -> None:
        """Gradients have been taken from it, or a reply has been put into it."""
        self._words[DIRTY_OFFSET // 8] = 0

    def replying(self, step: int) -> None:
        """The updates of that step are about to take the place of its gradients."""
        self._words[REPLIED_OFFSET // 8] = step


def _aligned(size_bytes: int) -> int:
    """That many bytes, up to the next cache line."""
    return -(-size_bytes // _ALIGNMENT) * _ALIGNMENT
