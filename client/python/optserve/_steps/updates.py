"""Copies the chunks of a reply into arrays; each byte must come once and in order."""

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
"""A reply of up to this size is copied at once, when it is complete and its result is right. Of a longer reply each
message is copied when it arrives: holding all of them would take time, and as much memory as the reply."""


class ReplyLayout:
    """The order and the sizes of a reply's tensors on the wire.

    Args:
        indices: The parameters in the reply, ascending.
        arrays: The array for each of them.
        wire: Dtype of the payload; None for each array's own.

    Attributes:
        ordinals: Position in the reply of each parameter, by its index.
        wires: Dtype of each tensor on the wire.
        begins: First byte of each tensor, and the one after the last.
    """

    def __init__(self, indices: Sequence[int], arrays: Sequence[np.ndarray], wire: np.dtype | None) -> None:
        self.ordinals = {index: ordinal for ordinal, index in enumerate(indices)}
        self.wires = [array.dtype if wire is None else wire for array in arrays]
        sizes = (array.size * dtype.itemsize for array, dtype in zip(arrays, self.wires, strict=True))
        self.begins = list(accumulate(sizes, initial=0))


class ReplyLayouts:
    """Makes the layouts of one optimizer's replies, and keeps the last one, which is mostly the same.

    Args:
        wire: See ReplyLayout.
    """

    def __init__(self, wire: np.dtype | None = None) -> None:
        self._wire = wire
        self._last: tuple[Sequence[int], ReplyLayout] | None = None

    def layout_for(self, indices: Sequence[int], arrays: Sequence[np.ndarray]) -> ReplyLayout:
        """The layout of a reply with these parameters; the arrays of a parameter have the same size at each call."""
        # Read once, because other threads may replace it.
        last = self._last
        # A step of all parameters always passes the same list object.
        if last is None or last[0] is not indices:
            last = self._last = indices, ReplyLayout(indices, arrays, self._wire)
        return last[1]


class Updates:
    """The arrays that take the reply of one step, in the order of the step's tensors.

    Args:
        indices: The parameters that take part.
        arrays: C-contiguous, in the parameters' shapes and dtypes.
        layouts: Makes the layout of the reply.
        reply: What the reply has; no arrays for REPLY_NOTHING.

    Attributes:
        begun: Whether something was written to the arrays.
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
        # Made when the first chunk arrives; a reply through shared memory needs none.
        self._layout: ReplyLayout | None = None
        self.begun = False
        self._received = 0
        self._held: list[tuple[int, int, Buffer]] = []
        self._held_bytes = 0

    @property
    def received(self) -> bool:
        """Whether a part of the reply has arrived."""
        return self._received > 0

    def reset(self) -> None:
        """Forget the chunks that have arrived, before the reply is received once more."""
        self.begun = False
        self._received = self._held_bytes = 0
        self._held.clear()

    def put(self, tensor: int, offset: int, data: Buffer) -> None:
        """Take the next chunk. Bytes beyond the end of its tensor belong to the next tensor.

        Args:
            tensor: Index of the parameter in which the chunk begins.
            offset: First byte within that parameter's wire bytes.
            data: Elements.

        Raises:
            InternalError: The chunk does not begin where the previous one ended; or it is empty, ends within an
                element, or ends beyond the last tensor. Nothing of it is written.
        """
        layout = self._layout
        if layout is None:
            layout = self._layout = self._layouts.layout_for(self.indices, self.arrays)
        begins, received = layout.begins, self._received
        ordinal = layout.ordinals.get(tensor, -1)
        # An offset beyond the end of its tensor would name a byte of another tensor.
        if ordinal < 0 or begins[ordinal] + offset != received or received > begins[ordinal + 1]:
            raise InternalError(
                f"The server's reply is not in order: after {received} of {begins[-1]} bytes came byte {offset} of "
                f"tensor {tensor}."
            )
        end = received + len(data)
        if not data or end > begins[-1]:
            raise InternalError(
                f"The server's reply has a chunk of {len(data)} bytes, but {begins[-1] - received} bytes are left."
            )
        last = bisect_right(begins, end) - 1
        if last < len(layout.wires) and (end - begins[last]) % layout.wires[last].itemsize:
            raise InternalError("The server's reply is cut within an element.")
        self._held.append((ordinal, offset, data))
        self._received, self._held_bytes = end, self._held_bytes + len(data)

    def write_large(self) -> None:
        """Copy the chunks that are held, if they have more than HELD_BYTES."""
        if self._held_bytes > HELD_BYTES and self._layout is not None:
            self._write(self._layout)

    def finish(self) -> None:
        """The reply is complete: copy the chunks that are held.

        Raises:
            InternalError: Bytes are missing.
        """
        layout = self._layout or self._layouts.layout_for(self.indices, self.arrays)
        if self._received != layout.begins[-1]:
            raise InternalError(f"The server's reply lacks {layout.begins[-1] - self._received} bytes.")
        self._write(layout)

    def _write(self, layout: ReplyLayout) -> None:
        self.begun = True
        for ordinal, offset, data in self._held:
            self._copy(layout.wires, ordinal, offset, data)
        self._held.clear()
        self._held_bytes = 0

    def _copy(self, wires: Sequence[np.dtype], ordinal: int, offset: int, data: Buffer) -> None:
        """Copy a checked chunk into the arrays."""
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
