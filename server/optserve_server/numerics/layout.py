"""Where every tensor lies: in the arrays of the server, and in the bytes of a step.

Parameters of one dtype lie side by side in one flat array (an arena), in the order of their creation, so that a
whole model is one call of a kernel, and one chunk of bytes can cover many small tensors.
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
"""Dtypes of state; the wider first, which keeps both arenas of a buffer aligned."""


def dtype_of(name: str) -> np.dtype:
    """The dtype of state with that name, or raise ValueError."""
    return STATE_DTYPES[[dtype.name for dtype in STATE_DTYPES].index(name)]


class Operand(Enum):
    """What arrives for each parameter. In the gradient's place come the update later, and x when it is uploaded."""

    # Every step looks its operands up; that of Enum is a call of Python code.
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
        parameters: In the order of creation, which is also that of the contract's indices.
        all_tensors: All indices.
        indices: Index of each parameter by name.
        starts: First element of each parameter in the arena of its dtype.
        sizes: Elements of each arena.
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
        """(dtype, array, elements) of the arenas of so many arrays, in the order in which they are written down.

        Empty ones are left out.
        """
        for array in range(arrays):
            for dtype, size in self.sizes.items():
                if size:
                    yield dtype, array, size

    def to_json(self) -> list[list[Any]]:
        """As it is written down."""
        return [[item.name, list(item.shape), item.dtype.name] for item in self.parameters]

    @classmethod
    def from_json(cls, content: list[list[Any]]) -> Layout:
        """The reverse of `to_json`."""
        return cls(tuple(Parameter(name, tuple(shape), dtype_of(dtype)) for name, shape, dtype in content))


@dataclass(frozen=True)
class Run:
    """Tensors of a step that are neighbours both on the wire and in their arena.

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
    """Which parameters something is of, in the order in which they are on the wire; each of them whole.

    Attributes:
        listed: Their indices, as the contract and the journal list them: none for all.
    """

    listed: tuple[int, ...] = ()

    @property
    def is_all(self) -> bool:
        """Whether it is of all parameters, in their own order."""
        return not self.listed

    def __contains__(self, tensor: int) -> bool:
        """Whether the parameter with an index is part of it."""
        return not self.listed or tensor in self.listed

    def tensors(self, layout: Layout) -> tuple[int, ...]:
        """Their indices, each of them."""
        return self.listed or layout.all_tensors

    def within(self, layout: Layout) -> Selection:
        """The same for the parameters of a model: ALL where it lists each of them in their own order."""
        return ALL if self.listed == layout.all_tensors else self

    def check(self, layout: Layout) -> None:
        """Raise UNKNOWN_PARAMETER or DUPLICATE_PARAMETER where it cannot be of the parameters of a model."""
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

    def runs(self, layout: Layout, wire: np.dtype | None) -> Iterator[Run]:
        """Where each of them is on the wire, one behind the other, and in its arena; neighbours are not joined.

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
    """Runs of which those that are neighbours are one, without empty ones."""
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
    """The bytes of one step, seen as one line: the tensors that take part, one after the other.

    Args:
        layout: The model.
        selection: What takes part, which has been checked.
        wire: Dtype on the wire; None for each parameter's own.

    Attributes:
        tensors: Indices of the parameters that take part.
        begins: Position of each tensor, in their order.
        places: (first byte, byte after the last) of each tensor, by index of its parameter.
        size_bytes: Of all.
        narrow: The dtype on the wire, where it does not hold all that some of the parameters' own dtypes do.
        runs: The stretches of arenas that take part.
    """

    def __init__(self, layout: Layout, selection: Selection, wire: np.dtype | None = None) -> None:
        self.layout = layout
        self.selection = selection
        self.tensors = selection.tensors(layout)
        each = list(selection.runs(layout, wire))
        self.begins = [run.begin for run in each]
        self.size_bytes = each[-1].end if each else 0
        self.narrow = next((run.wire for run in each if run.wire.itemsize < run.dtype.itemsize), None)
        self.runs = tuple(_joined(each))
        self._run_begins = [run.begin for run in self.runs]
        self.places = dict(zip(self.tensors, pairwise((*self.begins, self.size_bytes)), strict=True))

    def parts(self, arenas: Arenas) -> list[np.ndarray]:
        """What the step has of some arenas, run by run."""
        return [arenas[run.dtype][run.start : run.stop] for run in self.runs]

    def tensors_of(self, run: Run) -> tuple[int, ...]:
        """The tensors of a run, in their order; empty ones may be missing."""
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
        # Of the tensors that begin at one position all but the last are empty.
        ordinal = bisect_right(self.begins, position) - 1
        return self.tensors[ordinal], position - self.begins[ordinal]

    def misfit(self, tensor: int, offset: int, what: str) -> OptserveError:
        """The error for a chunk at a byte of a tensor that does not fit there."""
        name = self.layout.parameters[tensor].name
        return OptserveError(
            Reason.CHUNK_OUT_OF_BOUNDS,
            f"The chunk at byte {offset} of {name!r} {what}.",
            field="offset",
            parameter=name,
            offset=offset,
        )


class Payloads:
    """The payloads of one model's steps; those of all parameters are made once.

    Attributes:
        layout: The model.
    """

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self._whole: dict[np.dtype | None, Payload] = {}

    def of(self, selection: Selection, wire: np.dtype | None) -> Payload:
        """The payload of a step.

        Args:
            selection: What takes part.
            wire: Dtype on the wire; None for each parameter's own.

        Raises:
            OptserveError: UNKNOWN_PARAMETER or DUPLICATE_PARAMETER.
        """
        selection = selection.within(self.layout)
        if selection.is_all:
            if wire not in self._whole:
                self._whole[wire] = Payload(self.layout, ALL, wire)
            return self._whole[wire]
        selection.check(self.layout)
        return Payload(self.layout, selection, wire)
