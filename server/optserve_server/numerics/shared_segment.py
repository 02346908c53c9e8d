"""The memory that an optimizer shares with one client on the same host: a control page, then the staging arenas."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Collection

import numpy as np

from optserve._common import sysv
from optserve_server.numerics.layout import Layout, Operand, Operands

_CONTROL_BYTES = 4096
_ALIGNMENT = 64
NONCE_OFFSET, NONCE_BYTES = 0, 32
DIRTY_OFFSET, REPLIED_OFFSET = 64, 128
"""Words of 64 bits, on cache lines of their own."""


class Segment:
    """A segment that this server has made. A client can write anything into it at any time.

    Args:
        layout: The model.
        operands: Those of a step.
        pin: Prepares the memory for kernels; see `Backend.pin`.

    Attributes:
        name: The name under which the client attaches it.
        size_bytes: Bytes of the segment.
        nonce: Random bytes in the segment, by which the client proves that it sees it.
        operands: Views of the staging arenas.
        offsets: First byte of each parameter, for each operand.

    Raises:
        OSError: The system has no shared memory, or not enough.
    """

    def __init__(
        self, layout: Layout, operands: Collection[Operand], pin: Callable[[np.ndarray], np.ndarray] = np.asarray
    ) -> None:
        self.size_bytes = _CONTROL_BYTES + len(operands) * _aligned(layout.size_bytes)
        number, memory = sysv.create(self.size_bytes)
        memory = pin(memory)
        self.name = f"sysv:{number}"
        self.nonce = secrets.token_bytes(NONCE_BYTES)
        memory[NONCE_OFFSET : NONCE_OFFSET + NONCE_BYTES] = np.frombuffer(self.nonce, np.uint8)
        # A memoryview, because access to an array's element takes five times as long.
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
    def is_dirty(self) -> bool:
        """Whether the client has set the dirty word: it has written new gradients, or may have changed the reply."""
        return bool(self._words[DIRTY_OFFSET // 8])

    def clear_dirty(self) -> None:
        """Clear the dirty word: the gradients were taken, or a reply was written."""
        self._words[DIRTY_OFFSET // 8] = 0

    def begin_reply(self, step: int) -> None:
        """Say in the segment that the updates of this step begin to overwrite its gradients."""
        self._words[REPLIED_OFFSET // 8] = step


def _aligned(size_bytes: int) -> int:
    """That many bytes, up to the next cache line."""
    return -(-size_bytes // _ALIGNMENT) * _ALIGNMENT
