"""The arrays that take what a server sends of tensors: every byte of a reply once, and in order."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

import numpy as np

from optserve import halves
from optserve.errors import InternalError
from optserve.v1 import steps_pb2
from optserve.wire import Buffer

HELD_BYTES = 1 << 20
"""A reply of up to this size is written all at once, when it is complete and its result is right. Of a longer one, each
message is written when it has come: holding it back would take as much memory as the reply, and time."""


class Updates:
    """The arrays that take the reply of one step, in the order of the step's tensors.

    Args:
        indices: The parameters that take part.
        arrays: C-contiguous, in the parameters' shapes and dtypes.
        wire: Dtype of the payload; None for each array's own.
        reply: What is asked for; no arrays for REPLY_NOTHING.

    Attributes:
        begun: Whether something has been written to the arrays.
    """

    def __init__(
        self,
        indices: Sequence[int],
        arrays: Sequence[np.ndarray],
        wire: np.dtype | None = None,
        reply: steps_pb2.Reply = steps_pb2.REPLY_UPDATES,
    ) -> None:
        self.reply = reply
        self.indices = indices
        self.arrays = arrays
        self._wire = wire
        # See `_lay_out`: what comes through shared memory needs none of it.
        self._ordinals: dict[int, int] = {}
        self._arrays: list[np.ndarray] = []
        self._wires: list[np.dtype] = []
        self._begins: list[int] = []
        self.begun = False
        self._received = 0
        self._held: list[tuple[int, int, Buffer]] = []
        self._held_bytes = 0

    def _lay_out(self) -> None:
        """Find out where each tensor begins in the reply, and where the last one ends."""
        self._ordinals = {index: ordinal for ordinal, index in enumerate(self.indices)}
        self._arrays = [array.reshape(-1) for array in self.arrays]
        self._wires = [array.dtype if self._wire is None else self._wire for array in self.arrays]
        sizes = (array.size * dtype.itemsize for array, dtype in zip(self._arrays, self._wires, strict=True))
        self._begins = list(accumulate(sizes, initial=0))

    @property
    def received(self) -> bool:
        """Whether part of the reply has come."""
        return self._received > 0

    def reset(self) -> None:
        """Forget what has arrived, before the reply is received once more."""
        self.begun = False
        self._received = self._held_bytes = 0
        self._held.clear()

    def put(self, tensor: int, offset: int, data: Buffer) -> None:
        """Take the next chunk; what is beyond the end of its tensor belongs to the next one.

        Args:
            tensor: Index of the parameter in which it begins.
            offset: First byte within that parameter's wire bytes.
            data: Elements.

        Raises:
            InternalError: It does not go on where the chunk before has ended, which would leave a gap or a byte that
                came twice; or it is empty, ends within an element or beyond the last tensor. Nothing of it is written.
        """
        if not self._begins:
            self._lay_out()
        ordinal = self._ordinals.get(tensor, -1)
        # A tensor is known by its index alone; an offset beyond its end would be in another.
        if (
            ordinal < 0
            or self._begins[ordinal] + offset != self._received
            or self._received > self._begins[ordinal + 1]
        ):
            raise InternalError(
                f"The server's reply is not in order: byte {offset} of tensor {tensor} came after {self._received} of "
                f"{self._begins[-1]} bytes."
            )
        end = self._received + len(data)
        if not data or end > self._begins[-1]:
            raise InternalError(
                f"The server's reply has a chunk of {len(data)} bytes, where {self._begins[-1] - self._received} are "
                "missing."
            )
        last = bisect_right(self._begins, end) - 1
        if last < len(self._wires) and (end - self._begins[last]) % self._wires[last].itemsize:
            raise InternalError("The server's reply is cut within an element.")
        self._held.append((ordinal, offset, data))
        self._received, self._held_bytes = end, self._held_bytes + len(data)

    def write_large(self) -> None:
        """Write what has come so far, if it is more than is held back."""
        if self._held_bytes > HELD_BYTES:
            self._write()

    def finish(self) -> None:
        """The reply is complete: write what was held back.

        Raises:
            InternalError: Bytes are missing.
        """
        if not self._begins:
            self._lay_out()
        if self._received != self._begins[-1]:
            raise InternalError(f"The server's reply lacks {self._begins[-1] - self._received} bytes.")
        self._write()

    def _write(self) -> None:
        self.begun = True
        for ordinal, offset, data in self._held:
            self._copy(ordinal, offset, data)
        self._held.clear()
        self._held_bytes = 0

    def _copy(self, ordinal: int, offset: int, data: Buffer) -> None:
        """Copy a chunk that fits to where it belongs."""
        taken, size = 0, len(data)
        while taken < size:
            array, wire_dtype = self._arrays[ordinal], self._wires[ordinal]
            start = offset // wire_dtype.itemsize
            count = min(array.size - start, (size - taken) // wire_dtype.itemsize)
            if count > 0:
                elements = np.frombuffer(data, wire_dtype, count, taken)
                if wire_dtype == array.dtype:
                    array[start : start + count] = elements
                else:
                    halves.convert(elements, array[start : start + count])
                taken += count * wire_dtype.itemsize
            ordinal, offset = ordinal + 1, 0

    def by_index(self) -> dict[int, np.ndarray]:
        """The arrays by index of their parameters."""
        return dict(zip(self.indices, self.arrays, strict=True))
