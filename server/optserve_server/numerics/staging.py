"""The staging buffer: receives and checks the gradients of a step, and holds the updates that overwrite them.

Gradients come in chunks, or are in a segment that the server shares with a client. If nothing else reads the buffer,
the segment itself is the buffer, and nothing is copied. `engine/steps.py` decides which step may use the
buffer, and when.
"""

from __future__ import annotations

import math
from typing import Protocol

import numpy as np

from optserve._common import half_floats
from optserve_server.domain.errors import OptserveError, Reason
from optserve_server.numerics.backends import Backend
from optserve_server.numerics.layout import STATE_DTYPES, Arenas, Largest, Layout, Operand, Operands, Payload, Run
from optserve_server.numerics.shared_segment import Segment

_GRADIENT = Operand.GRADIENT


class Model(Protocol):
    """What the buffer needs of a state. The attributes are those of `State`."""

    layout: Layout
    backend: Backend
    operand_kinds: tuple[Operand, ...]
    limits: dict[tuple[Operand, np.dtype], float]


class Upload:
    """A model for a buffer that takes only x. See Model.

    Args:
        layout: The parameters.
        backend: Makes and fills the buffer.
    """

    def __init__(self, layout: Layout, backend: Backend) -> None:
        self.layout = layout
        self.backend = backend
        self.operand_kinds: tuple[Operand, ...] = (_GRADIENT,)
        self.limits = {(Operand.PARAMETER, dtype): float(np.finfo(dtype).max) for dtype in STATE_DTYPES}


class Staging:
    """The buffer. It has arenas for each operand of a step.

    Args:
        state: The state whose layout, limits and backend the buffer uses.

    Attributes:
        operands: The arenas of the buffer.
        updates: The arenas of the gradients, which the updates overwrite when the step is applied.
        layout: The parameters that it has room for.
        segment: The segment that the server shares with a client now; None if it shares none.
        in_place: Whether the buffer is the segment.
    """

    def __init__(self, state: Model) -> None:
        self._state = state
        self._backend = state.backend
        self.layout = state.layout
        self._use(self._new_operands())
        self.segment: Segment | None = None

    def _use(self, operands: Operands, *, in_place: bool = False) -> None:
        self.operands = operands
        self.updates = operands[_GRADIENT]
        self.in_place = in_place

    def _new_operands(self) -> Operands:
        layout = self.layout
        return {
            operand: layout.arenas(self._backend.staging(layout.size_bytes)) for operand in self._state.operand_kinds
        }

    def take_over(self, larger: Staging) -> None:
        """Continue with the arenas of a larger buffer, because the state has more parameters now; the content stays."""
        for operand, arenas in self.operands.items():
            for dtype, arena in arenas.items():
                self._backend.copy(arena, larger.operands[operand][dtype][: arena.size])
        # A segment keeps its size, so it is no longer the buffer.
        self._use(larger.operands)
        self.layout = larger.layout

    def release(self) -> None:
        """Let go of the arrays; it is of no further use."""
        self._use({operand: {} for operand in self.operands})
        self.segment = None

    def copy_updates(self, source: Arenas, payload: Payload) -> None:
        """Copy the values of a step's tensors from `source` over the updates."""
        for run in payload.runs:
            part = slice(run.start, run.stop)
            self._backend.copy(source[run.dtype][part], self.updates[run.dtype][part])

    # Chunks.

    def stage(
        self, payload: Payload, operand: Operand, position: int, data: memoryview | bytes, largest: Largest
    ) -> None:
        """Copy wire bytes of a step into the buffer, and check them.

        Args:
            payload: The payload of the step.
            operand: The operand that the bytes belong to.
            position: Position of the first byte in the payload.
            data: The bytes; they end within the payload.
            largest: The largest magnitudes of the step so far; updated.

        Raises:
            OptserveError: CHUNK_OUT_OF_BOUNDS, NON_FINITE_VALUE or GRADIENT_OVERFLOW.
        """
        end = position + len(data)
        for run in payload.runs_between(position, end):
            if run.begin <= position and end <= run.end:
                self._stage_run(payload, operand, run, position, data, largest)
            else:
                low, high = max(position, run.begin), min(end, run.end)
                part = memoryview(data)[low - position : high - position]
                self._stage_run(payload, operand, run, low, part, largest)

    def _stage_run(
        self,
        payload: Payload,
        operand: Operand,
        run: Run,
        position: int,
        data: memoryview | bytes,
        largest: Largest,
    ) -> None:
        size = run.wire.itemsize
        if (position - run.begin) % size or len(data) % size:
            raise payload.out_of_bounds(*payload.locate(position), "does not begin and end on an element")
        elements = np.frombuffer(data, run.wire)
        # An uploaded x takes the place of the gradient.
        arena, limit = self.operands.get(operand, self.updates)[run.dtype], self._state.limits[operand, run.dtype]
        start = run.start + (position - run.begin) // size
        staged = arena[start : start + elements.size]
        found = self._backend.receive(staged, elements)
        # `not <=` also catches NaN.
        if not found <= limit:
            bad = _first_beyond(staged, limit)
            raise self._bad_value(
                payload, operand, run, position + bad * size, half_floats.value(elements[bad : bad + 1])
            )
        key = (operand, run.dtype)
        if found > largest.get(key, -1.0):
            largest[key] = found

    def to_wire(self, source: Arenas, run: Run, begin: int, end: int) -> np.ndarray:
        """The values of `source` from byte `begin` to byte `end` of the payload, within a run, in the run's wire dtype.

        Returns a view of the source if that is the dtype of the source.
        """
        size = run.wire.itemsize
        part = source[run.dtype][run.start + (begin - run.begin) // size : run.start + (end - run.begin) // size]
        return part if run.wire is run.dtype else self._backend.to_wire(part, run.wire)

    # Shared memory.

    def share(self, *, in_place: bool) -> Segment:
        """Make a segment. If `in_place`, move the buffer into it.

        Raises:
            OSError: There is no memory for it, or the system has no shared memory.
        """
        # Kernels work on the buffer alone.
        self.segment = Segment(self.layout, self.operands, self._backend.pin if in_place else np.asarray)
        if in_place:
            self._move_to(self.segment.operands, in_place=True)
        return self.segment

    def unshare(self) -> None:
        """Drop the segment; the content of the buffer stays."""
        self.leave_segment()
        self.segment = None

    def leave_segment(self) -> None:
        """Move the buffer out of the segment, so that its client cannot write into the steps of others."""
        if self.in_place:
            self._move_to(self._new_operands(), in_place=False)

    def _move_to(self, operands: Operands, *, in_place: bool) -> None:
        before = self.operands
        self._use(operands, in_place=in_place)
        for operand, arenas in operands.items():
            for dtype, arena in arenas.items():
                arena[...] = before[operand][dtype]

    @property
    def shared_bytes(self) -> int:
        """Bytes of the segment; 0 if the segment is the buffer, or there is none."""
        # Read once, because other threads may change it: they call this without a lock.
        segment = self.segment
        return segment.size_bytes if segment is not None and self.operands is not segment.operands else 0

    def take_gradients(self, segment: Segment, payload: Payload, largest: Largest) -> None:
        """Take the gradients that a client has written into a segment: copy, check and measure them.

        Raises:
            OptserveError: NON_FINITE_VALUE or GRADIENT_OVERFLOW.
        """
        is_in_place = segment.operands is self.operands
        for operand, arenas in self.operands.items():
            for run in payload.runs:
                part = slice(run.start, run.stop)
                staged, limit = arenas[run.dtype][part], self._state.limits[operand, run.dtype]
                source = segment.operands[operand][run.dtype][part]
                found = self._backend.largest(staged) if is_in_place else self._backend.receive_large(staged, source)
                if not found <= limit:
                    bad = _first_beyond(staged, limit)
                    position = run.begin + bad * run.dtype.itemsize
                    raise self._bad_value(payload, operand, run, position, float(staged[bad]))
                key = (operand, run.dtype)
                largest[key] = max(found, largest.get(key, 0.0))

    def write_reply(self, segment: Segment, payload: Payload, step: int, source: Arenas) -> None:
        """Write the reply of a step over the gradients in a segment."""
        target = segment.operands[_GRADIENT]
        if source is not target:
            segment.begin_reply(step)
            for run in payload.runs:
                part = slice(run.start, run.stop)
                self._backend.copy(source[run.dtype][part], target[run.dtype][part])
        segment.clear_dirty()

    def _bad_value(self, payload: Payload, operand: Operand, run: Run, position: int, value: float) -> OptserveError:
        """The error for an element at a position of the payload."""
        tensor, byte = payload.locate(position)
        name, index = payload.layout.parameters[tensor].name, byte // run.wire.itemsize
        finite = math.isfinite(value)
        wire = f", as {half_floats.name_of(run.wire)} on the wire" if run.wire != run.dtype else ""
        return OptserveError(
            Reason.GRADIENT_OVERFLOW if finite else Reason.NON_FINITE_VALUE,
            f"The {operand.value} of {name!r} is {value:g} at flat index {index}{wire}"
            + (f", too large for {run.dtype.name} or for its square to be finite there." if finite else "."),
            field="data",
            parameter=name,
            index=index,
        )


def _first_beyond(staged: np.ndarray, limit: float) -> int:
    """Index of the first element that is NaN, infinite or too large."""
    return int(np.flatnonzero(~(np.abs(staged) <= limit))[0])
