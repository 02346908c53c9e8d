"""NumPy: the rule's formula on blocks that stay in the cache, because each operation of it is a pass of its own."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

from optserve._common import half_floats
from optserve_server.numerics.backends.base import Backend, DecayPlace, HostedKernel, Kernel
from optserve_server.numerics.backends.slices import FORMULA, PASS, Slices
from optserve_server.numerics.rules import Rule

BLOCK = 1 << 17
"""Elements per block: the fastest of 4 Ki to 256 Ki. Smaller ones stay in a smaller cache, but threads take the
interpreter from each other at every operation on a block."""


class NumpyBackend(Backend):
    """Always available; the reference for the others."""

    name = "numpy"

    def __init__(self, threads: int = 0) -> None:
        super().__init__()
        self._slices = Slices(threads)
        # Of a pass that copies or looks.
        self._alone_to = self._slices.alone_to(PASS)

    @property
    def device(self) -> str:
        """What it computes on, in words."""
        threads = self._slices.threads
        return f"CPU, {threads} thread{'s' if threads > 1 else ''}"

    def staging(self, size_bytes: int) -> np.ndarray:
        """A buffer of bytes."""
        return np.zeros(size_bytes, np.uint8)

    def zeros(self, size: int, dtype: np.dtype) -> np.ndarray:
        """A slot."""
        return np.zeros(size, dtype)

    def to_host(self, slot: np.ndarray) -> np.ndarray:
        """The slot itself."""
        return slot

    def fill(self, slot: np.ndarray, values: np.ndarray) -> None:
        """Copy."""
        slot[...] = values

    def extremes(self, slot: np.ndarray) -> tuple[float, float]:
        """Slice by slice; see Backend."""
        found: list[tuple[float, float]] = []
        extremes = super().extremes
        self._slices.run(slot.size, lambda a, b: found.append(extremes(slot[a:b])), self._alone_to)
        return float(np.min([low for low, _ in found])), float(np.max([high for _, high in found]))

    def receive(self, staged: np.ndarray, elements: np.ndarray) -> float:
        """On the calling thread, which may be one of the kernel's own; see Backend."""
        half_floats.convert(elements, staged)
        return self._largest(staged)

    def receive_large(self, staged: np.ndarray, elements: np.ndarray) -> float:
        """Slice by slice; see Backend."""
        if staged.size <= self._alone_to:
            return self.receive(staged, elements)
        found: list[float] = []
        self._slices.run(
            staged.size, lambda a, b: found.append(self.receive(staged[a:b], elements[a:b])), self._alone_to
        )
        return _max_or_nan(found)

    def copy(self, source: np.ndarray, target: np.ndarray) -> None:
        """Slice by slice; see Backend."""
        self._slices.run(source.size, lambda a, b: np.copyto(target[a:b], source[a:b]), self._alone_to)

    def advance(self, parameters: np.ndarray, updates: np.ndarray, decay: np.floating) -> None:
        """Slice by slice; see Backend."""
        advance = super().advance
        self._slices.run(parameters.size, lambda a, b: advance(parameters[a:b], updates[a:b], decay), self._alone_to)

    def largest(self, staged: np.ndarray) -> float:
        """Slice by slice; see Backend."""
        if staged.size <= self._alone_to:
            return self._largest(staged)
        found: list[float] = []
        self._slices.run(staged.size, lambda a, b: found.append(self._largest(staged[a:b])), self._alone_to)
        return _max_or_nan(found)

    def _largest(self, staged: np.ndarray) -> float:
        return super().largest(staged)

    def compile(self, rule: type[Rule], dtype: np.dtype) -> Kernel:  # noqa: ARG002 - the dtype is that of the operands
        """The formula, block by block."""
        alone_to = self._slices.alone_to(FORMULA)

        def kernel(
            staged: np.ndarray, slots: Sequence[np.ndarray], scalars: Sequence[np.generic], *inputs: np.ndarray
        ) -> None:
            def work(start: int, stop: int) -> None:
                for block in _blocks(start, stop):
                    _step(rule, block, staged, slots, scalars, inputs)

            self._slices.run(staged.size, work, alone_to)

        return kernel

    def compile_hosted(self, rule: type[Rule], dtype: np.dtype, place: DecayPlace) -> HostedKernel:
        """The formula, and what it does to x, block by block."""
        add_decay, advance, none = super().add_decay, super().advance, dtype.type(0)
        alone_to = self._slices.alone_to(FORMULA)

        def hosted(
            staged: np.ndarray,
            slots: Sequence[np.ndarray],
            scalars: Sequence[np.generic],
            parameters: np.ndarray,
            factor: np.floating,
            *inputs: np.ndarray,
        ) -> None:
            decay = factor if place is DecayPlace.PARAMETERS else none

            def work(start: int, stop: int) -> None:
                for block in _blocks(start, stop):
                    if place is DecayPlace.GRADIENT:
                        add_decay(staged[block], parameters[block], factor)
                    _step(rule, block, staged, slots, scalars, inputs)
                    advance(parameters[block], staged[block], decay)

            self._slices.run(staged.size, work, alone_to)

        return hosted


def _blocks(start: int, stop: int) -> Iterator[slice]:
    for low in range(start, stop, BLOCK):
        yield slice(low, min(low + BLOCK, stop))


def _step(
    rule: type[Rule],
    block: slice,
    staged: np.ndarray,
    slots: Sequence[np.ndarray],
    scalars: Sequence[np.generic],
    inputs: Sequence[np.ndarray],
) -> None:
    """One step of one block."""
    views = [staged[block], *(slot[block] for slot in slots)]
    operand_parts = (views[0], *(array[block] for array in inputs), *views[1:])
    with np.errstate(all="ignore"):
        results = rule.update(np.sqrt, *operand_parts, *scalars)
    for view, result in zip(views, results if slots else (results,), strict=True):
        view[...] = result


def _max_or_nan(magnitudes: Sequence[float]) -> float:
    """NaN if one is NaN. NumPy takes 10 µs for so few, as long as all else that a small step does with its numbers."""
    return math.nan if any(map(math.isnan, magnitudes)) else max(magnitudes)
