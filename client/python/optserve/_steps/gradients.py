"""The gradients of a step on their way: cut into chunks, in the wire's dtype, as the contract's messages."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from optserve._common import half_floats, wire
from optserve._steps.error_feedback import Attempt, Rounding
from optserve._steps.shared_memory import CURVATURE, GRADIENT, Arrival, Operand
from optserve._values.step_settings import StepOptions
from optserve.v1 import steps_pb2

ANNOUNCED_BYTES = 1 << 16
"""Steps of workers from this size on are announced."""


class _Chunk(NamedTuple):
    """A stretch of one operand's bytes, which may run on into the next tensors of the step.

    Attributes:
        operand: Gradient or curvature.
        tensor: Index of the parameter in which it begins.
        offset: First byte within that parameter's wire bytes.
        parts: The bytes, of one tensor each.
    """

    operand: Operand
    tensor: int
    offset: int
    parts: list[memoryview]


class Gradients:
    """The gradients of one step, as they are sent.

    Args:
        indices: The parameters that take part, ascending.
        arrays: Their gradients, C-contiguous, little-endian.
        whole: Whether these are all parameters of the optimizer.
        wire: Dtype of the payload; None for each array's own.
        curvature: The diagonals of the Hessian, like `arrays`, for the methods that take them.

    Attributes:
        rounding: Adds the rounding errors of earlier gradients; None without error feedback.
        options: What the step asks for beside its reply; None for nothing.
    """

    incremental = False
    """Whether the caller adds the gradients one by one, while the step is being sent."""

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
        self.options: StepOptions | None = None
        self._wire = wire

    def messages(
        self, request: steps_pb2.StreamStepsRequest, max_chunk_bytes: int, *, announce: bool
    ) -> Iterator[bytes]:
        """The messages of a step: `request`, which has `begin`, then chunks, then `commit`.

        With `announce`, a larger step sends `begin` in a message of its
        own. Where many workers share a server, it then reads the chunks when the upload limiter lets the step in, and
        does not have to keep them before.
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
            header, pending = request.chunk, chunk.parts
            header.operand, header.tensor, header.offset = chunk.operand, chunk.tensor, chunk.offset
        if attempt is not None:
            attempt.finish()
        request.commit.SetInParent()
        yield wire.encode(request, *pending)

    def single_message(
        self, request: steps_pb2.StreamStepsRequest, max_chunk_bytes: int, *, announce: bool
    ) -> bytes | None:
        """The message of a step that needs one only; None, and `request` unchanged, for a step that needs more.

        Also None where gradients are converted on their way, or are still to come.
        """
        if self.incremental or self._wire is not None or self._curvature is not None:
            return None
        parts: list[memoryview] = []
        first, size = 0, 0
        for index, array in zip(self.indices, self.arrays, strict=True):
            if array.nbytes:
                if not parts:
                    first = index
                parts.append(array.data.cast("B"))
                size += array.nbytes
        if size > max_chunk_bytes or (announce and size >= ANNOUNCED_BYTES):
            return None
        if parts:
            header = request.chunk
            header.operand, header.tensor, header.offset = GRADIENT, first, 0
        request.commit.SetInParent()
        return wire.encode(request, *parts)

    def _chunks(self, max_chunk_bytes: int, attempt: Attempt | None) -> Iterator[_Chunk | None]:
        """Chunks of at most `max_chunk_bytes`; small neighbours share one.

        None says that the caller may take long to add the next gradient: send what there is.
        """
        parts: list[memoryview] = []
        operand, index, tensor, offset, size = GRADIENT, 0, 0, 0, 0
        for arrival in self.arrivals():
            # A chunk runs on into the next tensor of the step, and into no other.
            if parts and (arrival is None or arrival[:2] != (operand, self._next_index(index))):
                yield _Chunk(operand, tensor, offset, parts)
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
                    yield _Chunk(operand, tensor, offset, parts)
                    parts, size = [], 0
                    continue
                if not parts:
                    tensor, offset = index, begin * item
                elements = array.reshape(-1)[begin : begin + room] if begin or room < array.size else array
                if self._wire is None or self._wire == array.dtype:
                    part = elements.data.cast("B")
                elif attempt is not None and operand == GRADIENT:
                    part = self._convert_with_feedback(attempt, index, array, begin, elements.size)
                else:
                    part = self._convert(elements)
                parts.append(part)
                begin, size = begin + room, size + len(part)
        if parts:
            yield _Chunk(operand, tensor, offset, parts)

    @property
    def with_curvature(self) -> bool:
        """Whether there is a diagonal of the Hessian as well."""
        return self._curvature is not None

    def arrivals(self) -> Iterator[Arrival | None]:
        """Each parameter's gradient, then each one's curvature; None before one that the caller has not added yet."""
        for index, array in zip(self.indices, self.arrays, strict=True):
            yield GRADIENT, index, array
        for index, array in zip(self.indices, self._curvature or (), strict=False):
            yield CURVATURE, index, array

    def _next_index(self, index: int) -> int | None:
        """Index of the next parameter of the step; None after the last."""
        position = bisect_right(self.indices, index)
        return self.indices[position] if position < len(self.indices) else None

    def _convert(self, elements: np.ndarray) -> memoryview:
        converted = np.empty(elements.size, self._wire)
        half_floats.convert(elements.reshape(-1), converted)
        return converted.data.cast("B")

    def _convert_with_feedback(
        self, attempt: Attempt, index: int, array: np.ndarray, begin: int, size: int
    ) -> memoryview:
        converted = np.empty(size, self._wire)
        attempt.convert(index, array.reshape(-1), begin, converted)
        return converted.data.cast("B")
