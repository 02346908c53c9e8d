"""The arrays that take what a server sends of tensors: every byte of a reply once, and in order."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

import numpy as np

from optserve._common import half_floats
from optserve._common.wire import Buffer
from optserve.errors import InternalError
from optserve.v1 import steps_pb2

HELD_BYTES = 1 << 20
"""A reply of up to this size is written all at once, when it is complete and its result is right. Of a longer one, each
message is written when it has come: holding it back would take as much memory as the reply, and time."""


class ReplyLayout:
    """How a reply lies on the wire.

    Args:
        indices: The parameters that take part.
        arrays: That take them.
        wire: Dtype of the payload; None for each array's own.

    Attributes:
        ordinals: Which of the reply's tensors each parameter is.
        wires: Dtype of each tensor on the wire.
        begins: First byte of each tensor, and the one after the last.
    """

    def __init__(self, indices: Sequence[int], arrays: Sequence[np.ndarray], wire: np.dtype | None) -> None:
        self.ordinals = {index: ordinal for ordinal, index in enumerate(indices)}
        self.wires = [array.dtype if wire is None else wire for array in arrays]
        sizes = (array.size * dtype.itemsize for array, dtype in zip(arrays, self.wires, strict=True))
        self.begins = list(accumulate(sizes, initial=0))


class ReplyLayouts:
    """The layout that one optimizer's replies mostly have, worked out once.

    Args:
        wire: See ReplyLayout.
    """

    def __init__(self, wire: np.dtype | None = None) -> None:
        self._wire = wire
        self._last: tuple[Sequence[int], ReplyLayout] | None = None

    def of(self, indices: Sequence[int], arrays: Sequence[np.ndarray]) -> ReplyLayout:
        """The layout for parameters, whose arrays have always the same sizes and dtypes."""
        # Looked at once, as other threads may step as well.
        last = self._last
        # The very same list: that of all parameters, where all take part.
        if last is None or last[0] is not indices:
            last = self._last = indices, ReplyLayout(indices, arrays, self._wire)
        return last[1]


class Updates:
    """The arrays that take the reply of one step, in the order of the step's tensors.

    Args:
        indices: The parameters that take part.
        arrays: C-contiguous, in the parameters' shapes and dtypes.
        layouts: Those of the optimizer's replies.
        reply: What is asked for; no arrays for REPLY_NOTHING.

    Attributes:
        begun: Whether something has been written to the arrays.
    """

    def __init__(
        self,
        indices: Sequence[int],
        arrays: Sequence[np.ndarray],
        layouts: ReplyLayouts | None = None,
        reply: steps_pb2.Reply = steps_pb2.REPLY_UPDATES,
    ) -> None:
        self.reply = reply
        self.indices = indices
        self.arrays = arrays
        self._layouts = layouts or ReplyLayouts()
        # Worked out when something comes: what comes through shared memory needs none.
        self._layout: ReplyLayout | None = None
        self.begun = False
        self._received = 0
        self._held: list[tuple[int, int, Buffer]] = []
        self._held_bytes = 0

    @property
    def received(self) -> bool:
        """Whether part of the reply has come."""
        return self._received > 0

    def reset(self) -> None:
        """Forget what has arrived, before the reply is received once more."""
        self.begun = False
        self._received = self._held_bytes = 0
        self._held.clear()

    def _lay_out(self) -> ReplyLayout:
        self._layout = self._layouts.of(self.indices, self.arrays)
        return self._layout

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
        layout = self._layout or self._lay_out()
        begins, received = layout.begins, self._received
        ordinal = layout.ordinals.get(tensor, -1)
        # A tensor is known by its index alone; an offset beyond its end would be in another.
        if ordinal < 0 or begins[ordinal] + offset != received or received > begins[ordinal + 1]:
            raise InternalError(
                f"The server's reply is not in order: byte {offset} of tensor {tensor} came after {received} of "
                f"{begins[-1]} bytes."
            )
        end = received + len(data)
        if not data or end > begins[-1]:
            raise InternalError(
                f"The server's reply has a chunk of {len(data)} bytes, where {begins[-1] - received} are missing."
            )
        last = bisect_right(begins, end) - 1
        if last < len(layout.wires) and (end - begins[last]) % layout.wires[last].itemsize:
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
        size_bytes = (self._layout or self._lay_out()).begins[-1]
        if self._received != size_bytes:
            raise InternalError(f"The server's reply lacks {size_bytes - self._received} bytes.")
        self._write()

    def _write(self) -> None:
        self.begun = True
        wires = (self._layout or self._lay_out()).wires
        for ordinal, offset, data in self._held:
            self._copy(wires, ordinal, offset, data)
        self._held.clear()
        self._held_bytes = 0

    def _copy(self, wires: Sequence[np.dtype], ordinal: int, offset: int, data: Buffer) -> None:
        """Copy a chunk that fits to where it belongs."""
        taken, size = 0, len(data)
        while taken < size:
            array, wire_dtype = self.arrays[ordinal].reshape(-1), wires[ordinal]
            start = offset // wire_dtype.itemsize
            count = min(array.size - start, (size - taken) // wire_dtype.itemsize)
            if count > 0:
                elements = np.frombuffer(data, wire_dtype, count, taken)
                if wire_dtype == array.dtype:
                    array[start : start + count] = elements
                else:
                    half_floats.convert(elements, array[start : start + count])
                taken += count * wire_dtype.itemsize
            ordinal, offset = ordinal + 1, 0

    def by_index(self) -> dict[int, np.ndarray]:
        """The arrays by index of their parameters."""
        return dict(zip(self.indices, self.arrays, strict=True))
