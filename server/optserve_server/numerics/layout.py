"""The positions of tensors: in the server's arrays, and in the bytes of a step.

The parameters of one dtype lie side by side in one flat array (an arena), in the order of their indices. So one call of
a kernel can cover a whole model, and one chunk of bytes many small tensors.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np

from optserve_server.domain.errors import OptserveError, Reason

FLOAT32 = np.dtype("<f4")
FLOAT64 = np.dtype("<f8")
STATE_DTYPES = (FLOAT64, FLOAT32)
"""Dtypes of state. The wider one comes first, so that both arenas of a buffer are aligned."""


def dtype_of(name: str) -> np.dtype:
    """The dtype of state with that name, or raise ValueError."""
    return STATE_DTYPES[[dtype.name for dtype in STATE_DTYPES].index(name)]


class Operand(Enum):
    """What a client sends for each parameter. The update, and an uploaded x, use the arenas of the gradient."""

    # Faster than the hash of Enum, which is Python code; every step looks its operands up.
    __hash__ = object.__hash__

    GRADIENT = "gradient"
    CURVATURE = "curvature"
    PARAMETER = "parameter"


Arenas = dict[np.dtype, np.ndarray]
"""One flat array per dtype, in which the parameters lie side by side."""

Operands = dict[Operand, Arenas]
"""The arenas of each operand of a step, the gradient first."""

Largest = dict[tuple[Operand, np.dtype], float]
"""The largest magnitude of each operand of a step, in each dtype of state."""


@dataclass(frozen=True)
class Parameter:
    """One tensor of the model."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype

    @cached_property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


class Layout:
    """The arenas of a model.

    Attributes:
        parameters: In the order of their indices in the contract.
        all_tensors: The indices of all parameters.
        indices: Index of each parameter by name.
        starts: First element of each parameter in the arena of its dtype.
        sizes: Elements of each arena.
        dtypes: Those of the arenas that are not empty.
        size_bytes: Bytes of all parameters.
    """

    def __init__(self, parameters: tuple[Parameter, ...]) -> None:
        self.parameters = parameters
        self.all_tensors = tuple(range(len(parameters)))
        self.indices = {parameter.name: index for index, parameter in enumerate(parameters)}
        self.starts: list[int] = []
        self.sizes = dict.fromkeys(STATE_DTYPES, 0)
        for parameter in parameters:
            self.starts.append(self.sizes[parameter.dtype])
            self.sizes[parameter.dtype] += parameter.size
        self.dtypes = [dtype for dtype, size in self.sizes.items() if size]
        self.size_bytes = sum(dtype.itemsize * size for dtype, size in self.sizes.items())

    def arenas(self, buffer: np.ndarray) -> Arenas:
        """Views of the arenas in a buffer of `size_bytes` bytes."""
        views, begin = {}, 0
        for dtype in STATE_DTYPES:
            end = begin + dtype.itemsize * self.sizes[dtype]
            views[dtype] = buffer[begin:end].view(dtype)
            begin = end
        return views

    def each_arena(self, arrays: int) -> Iterator[tuple[np.dtype, int, int]]:
        """(dtype, index of the array, elements) of each arena that is not empty, in the order of files."""
        for array in range(arrays):
            for dtype, size in self.sizes.items():
                if size:
                    yield dtype, array, size

    def with_added(self, added: Layout) -> Layout:
        """The layout with other parameters behind these, which keep their indices and their places in the arenas."""
        return Layout((*self.parameters, *added.parameters))

    def to_json(self) -> list[list[Any]]:
        """The form on disk."""
        return [[item.name, list(item.shape), item.dtype.name] for item in self.parameters]

    @classmethod
    def from_json(cls, content: list[list[Any]]) -> Layout:
        """The reverse of `to_json`."""
        return cls(tuple(Parameter(name, tuple(shape), dtype_of(dtype)) for name, shape, dtype in content))


@dataclass(frozen=True)
class Run:
    """A stretch of tensors that are neighbours both on the wire and in their arena.

    Attributes:
        begin: First byte within the payload of the step.
        end: Byte after the last.
        dtype: Dtype of the state, and so the arena.
        wire: Dtype on the wire.
        start: First element within the arena.
        stop: Element after the last.
    """

    begin: int
    end: int
    dtype: np.dtype
    wire: np.dtype
    start: int
    stop: int


@dataclass(frozen=True)
class Selection:
    """The parameters that take part in a step, a reply or an upload, in their order on the wire.

    Attributes:
        listed: Their indices, as in the contract and the journal; empty for all parameters.
    """

    listed: tuple[int, ...] = ()

    @property
    def is_all(self) -> bool:
        """Whether it has all parameters, in the order of their indices."""
        return not self.listed

    def __contains__(self, tensor: int) -> bool:
        """Whether it has the parameter with this index."""
        return not self.listed or tensor in self.listed

    def tensors(self, layout: Layout) -> tuple[int, ...]:
        """The indices of its parameters."""
        return self.listed or layout.all_tensors

    def normalized(self, layout: Layout) -> Selection:
        """An equal selection: ALL if it lists all parameters of the model in order, else itself."""
        return ALL if self.listed == layout.all_tensors else self

    def check(self, layout: Layout) -> None:
        """Raise UNKNOWN_PARAMETER or DUPLICATE_PARAMETER unless its indices are different parameters of the model."""
        seen: set[int] = set()
        for index in self.listed:
            if index >= len(layout.parameters):
                raise OptserveError(
                    Reason.UNKNOWN_PARAMETER,
                    f"There is no parameter {index}; the model has {len(layout.parameters)}.",
                    field="tensors",
                    parameter=index,
                )
            if index in seen:
                name = layout.parameters[index].name
                raise OptserveError(
                    Reason.DUPLICATE_PARAMETER,
                    f"Parameter {name!r} is listed twice in one step.",
                    field="tensors",
                    parameter=name,
                )
            seen.add(index)

    def among_first(self, count: int) -> Selection:
        """The part of the selection that lies among the first `count` parameters."""
        return Selection(tuple(index for index in self.listed or range(count) if index < count))

    def runs(self, layout: Layout, wire: np.dtype | None) -> Iterator[Run]:
        """A run for each parameter, in order; neighbours are not joined.

        Args:
            layout: The model.
            wire: Dtype on the wire; None for each parameter's own.
        """
        position = 0
        for index in self.tensors(layout):
            parameter, start = layout.parameters[index], layout.starts[index]
            wire_dtype = parameter.dtype if wire is None else wire
            end = position + parameter.size * wire_dtype.itemsize
            yield Run(position, end, parameter.dtype, wire_dtype, start, start + parameter.size)
            position = end


ALL = Selection()
"""All parameters."""


def _joined(runs: Iterable[Run]) -> Iterator[Run]:
    """Join neighbouring runs, and leave out empty ones."""
    last: Run | None = None
    for run in runs:
        if last is not None and last.dtype == run.dtype and last.stop == run.start:
            last = Run(last.begin, run.end, run.dtype, run.wire, last.start, run.stop)
            continue
        if last is not None and last.stop > last.start:
            yield last
        last = run
    if last is not None and last.stop > last.start:
        yield last


class Payload:
    """The wire bytes of a selection: its tensors, one after the other. Positions count from the first byte.

    Args:
        layout: The model.
        selection: The parameters; it has been checked.
        wire: Dtype on the wire; None for each parameter's own.

    Attributes:
        tensors: Indices of the parameters, in order.
        begins: Position of each tensor's first byte, in order.
        byte_ranges: (first byte, byte after the last) of each tensor, by index of its parameter.
        size_bytes: Bytes of all tensors.
        narrow_wire: The dtype on the wire, if it is narrower than the dtype of some parameter; else None.
        runs: The stretches of the arenas, in order, joined.
    """

    def __init__(self, layout: Layout, selection: Selection, wire: np.dtype | None = None) -> None:
        self.layout = layout
        self.selection = selection
        self.tensors = selection.tensors(layout)
        each = list(selection.runs(layout, wire))
        self.begins = [run.begin for run in each]
        self.size_bytes = each[-1].end if each else 0
        self.narrow_wire = next((run.wire for run in each if run.wire.itemsize < run.dtype.itemsize), None)
        self.runs = tuple(_joined(each))
        self._run_begins = [run.begin for run in self.runs]
        self.byte_ranges = dict(zip(self.tensors, pairwise((*self.begins, self.size_bytes)), strict=True))

    def parts(self, arenas: Arenas) -> list[np.ndarray]:
        """The part of the arenas that each run covers."""
        return [arenas[run.dtype][run.start : run.stop] for run in self.runs]

    def tensors_of(self, run: Run) -> tuple[int, ...]:
        """Indices of a run's parameters, in order; parameters without elements may be missing."""
        first, end = bisect_left(self.begins, run.begin), bisect_left(self.begins, run.end)
        return self.tensors[first:end]

    def runs_between(self, begin: int, end: int) -> tuple[Run, ...]:
        """The runs that have bytes in [begin, end)."""
        if begin == end:
            return ()
        if len(self.runs) == 1:
            return self.runs
        return self.runs[bisect_right(self._run_begins, begin) - 1 : bisect_left(self._run_begins, end)]

    def locate(self, position: int) -> tuple[int, int]:
        """(index of the tensor, byte within it) of a position in the payload."""
        # If several tensors begin at one position, all but the last of them are empty.
        ordinal = bisect_right(self.begins, position) - 1
        return self.tensors[ordinal], position - self.begins[ordinal]

    def out_of_bounds(self, tensor: int, offset: int, what: str) -> OptserveError:
        """The error CHUNK_OUT_OF_BOUNDS for a chunk at byte `offset` of a tensor; `what` completes the sentence."""
        name = self.layout.parameters[tensor].name
        return OptserveError(
            Reason.CHUNK_OUT_OF_BOUNDS,
            f"The chunk at byte {offset} of {name!r} {what}.",
            field="offset",
            parameter=name,
            offset=offset,
        )


class Payloads:
    """Makes the payloads of one model's steps, and keeps those of all parameters.

    Attributes:
        layout: The model.
    """

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self._whole: dict[np.dtype | None, Payload] = {}

    def payload_for(self, selection: Selection, wire: np.dtype | None) -> Payload:
        """The payload of a step.

        Args:
            selection: The parameters.
            wire: Dtype on the wire; None for each parameter's own.

        Raises:
            OptserveError: UNKNOWN_PARAMETER or DUPLICATE_PARAMETER.
        """
        if selection.listed:
            selection = selection.normalized(self.layout)
        if not selection.listed:
            payload = self._whole.get(wire)
            if payload is None:
                payload = self._whole[wire] = Payload(self.layout, ALL, wire)
            return payload
        selection.check(self.layout)
        return Payload(self.layout, selection, wire)
