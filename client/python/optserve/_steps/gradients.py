"""The gradients of a step on their way: cut into chunks, in the wire's dtype, as the contract's messages."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence

import numpy as np

from optserve._common import half_floats, wire
from optserve._steps.error_feedback import Attempt, Rounding
from optserve._steps.shared_memory import CURVATURE, GRADIENT, Arrival, Operand
from optserve.v1 import steps_pb2

ANNOUNCED_BYTES = 1 << 16
"""Steps of workers from this size on are announced."""


class Gradients:
    """The gradients of one step as it travels.

    Args:
        indices: The parameters that take part, ascending.
        arrays: Their gradients, C-contiguous, little-endian.
        whole: Whether these are all parameters of the optimizer.
        wire: Dtype of the payload; None for each array's own.
        curvature: The diagonals of the Hessian, like `arrays`, for the methods that take them.

    Attributes:
        rounding: Adds to the gradients what rounding has left out of those before, where that is wanted.
    """

    grow = False
    """Whether some may have to be waited for."""

    def __init__(
        self,
        indices: Sequence[int],
        arrays: Sequence[np.ndarray],
        *,
        whole: bool,
        wire: np.dtype | None = None,
        curvature: Sequence[np.ndarray] | None = None,
    ) -> None:
        self.indices = indices
        self._curvature = curvature
        self.arrays = arrays
        self.whole = whole
        self.rounding: Rounding | None = None
        self._wire = wire

    def messages(
        self, request: steps_pb2.StreamStepsRequest, max_chunk_bytes: int, *, announce: bool
    ) -> Iterator[bytes]:
        """`request`, which has begin, then chunks and commit; a step that fits into one chunk is one message.

        Where many workers share a server, begin is better sent ahead: the server reads on when it is its turn, and what
        it has not read it need not keep.
        """
        pending: list[memoryview] = []
        if announce and sum(array.nbytes for array in self.arrays) >= ANNOUNCED_BYTES:
            yield wire.encode(request)
            request = steps_pb2.StreamStepsRequest()
        attempt = self.rounding.attempt() if self.rounding else None
        for chunk in self._chunks(max_chunk_bytes, attempt):
            if pending:
                yield wire.encode(request, *pending)
                request, pending = steps_pb2.StreamStepsRequest(), []
            if chunk is None:
                continue
            header = request.chunk
            header.operand, header.tensor, header.offset, pending = chunk
        if attempt is not None:
            attempt.finish()
        request.commit.SetInParent()
        yield wire.encode(request, *pending)

    def _chunks(
        self, max_chunk_bytes: int, attempt: Attempt | None
    ) -> Iterator[tuple[Operand, int, int, list[memoryview]] | None]:
        """(operand, tensor, offset, bytes) of at most `max_chunk_bytes`; small neighbours share a chunk.

        None where the next one may be long in coming, and what there is should be sent.
        """
        parts: list[memoryview] = []
        operand, index, tensor, offset, size = GRADIENT, 0, 0, 0, 0
        for arrival in self.arrivals():
            # A chunk runs on into the next tensor of the step, and into no other.
            if parts and (arrival is None or arrival[:2] != (operand, self._after(index))):
                yield operand, tensor, offset, parts
                parts, size = [], 0
            if arrival is None:
                yield None
                continue
            operand, index, array = arrival
            item, begin = (self._wire or array.dtype).itemsize, 0
            while begin < array.size:
                # Chunks end between elements.
                room = (max_chunk_bytes - size) // item
                if room == 0:
                    yield operand, tensor, offset, parts
                    parts, size = [], 0
                    continue
                if not parts:
                    tensor, offset = index, begin * item
                elements = array.reshape(-1)[begin : begin + room] if begin or room < array.size else array
                if self._wire is None or self._wire == array.dtype:
                    part = elements.data.cast("B")
                elif attempt is not None and operand == GRADIENT:
                    part = self._rounded(attempt, index, array, begin, elements.size)
                else:
                    part = self._on_the_wire(elements)
                parts.append(part)
                begin, size = begin + room, size + len(part)
        if parts:
            yield operand, tensor, offset, parts

    @property
    def with_curvature(self) -> bool:
        """Whether there is a diagonal of the Hessian as well."""
        return self._curvature is not None

    def arrivals(self) -> Iterator[Arrival | None]:
        """Each parameter's gradient, then each one's curvature; None before one that is waited for."""
        for index, array in zip(self.indices, self.arrays, strict=True):
            yield GRADIENT, index, array
        for index, array in zip(self.indices, self._curvature or (), strict=False):
            yield CURVATURE, index, array

    def _after(self, index: int) -> int | None:
        """The parameter after that one in the step."""
        position = bisect_right(self.indices, index)
        return self.indices[position] if position < len(self.indices) else None

    def _on_the_wire(self, elements: np.ndarray) -> memoryview:
        converted = np.empty(elements.size, self._wire)
        half_floats.convert(elements.reshape(-1), converted)
        return converted.data.cast("B")

    def _rounded(self, attempt: Attempt, index: int, array: np.ndarray, begin: int, size: int) -> memoryview:
        converted = np.empty(size, self._wire)
        attempt.convert(index, array.reshape(-1), begin, converted)
        return converted.data.cast("B")
