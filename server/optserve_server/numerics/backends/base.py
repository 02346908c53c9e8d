"""What a backend is: it owns the arrays and executes rules on them.

Every backend compiles the same `Rule.update`; none has a formula of its own.
"""

from __future__ import annotations

import abc
import threading
from collections.abc import Sequence
from typing import Any, ClassVar, Protocol

import numpy as np

from optserve._common import half_floats
from optserve_server.numerics.rules import Rule


class Kernel(Protocol):
    """A rule compiled for one dtype."""

    def __call__(
        self, staged: np.ndarray, slots: Sequence[Any], scalars: Sequence[np.generic], *inputs: np.ndarray
    ) -> None:
        """Make one step.

        Args:
            staged: Holds g on entry and the update on return.
            slots: Change in place.
            scalars: The rule's, in that dtype.
            inputs: What the rule takes besides g, in host memory: the curvature, or nothing.
        """
        ...


DECAY_BLOCK = 1 << 16
"""Elements of x that are decayed at a time, so that the memory for it stays small and in the cache."""


class Backend(abc.ABC):
    """Executes rules on flat arrays of float32 or float64. Safe to use from several threads."""

    name: ClassVar[str]

    def __init__(self) -> None:
        self._kernels: dict[tuple[type[Rule], np.dtype], Kernel] = {}
        self._compiling = threading.Lock()

    @property
    @abc.abstractmethod
    def device(self) -> str:
        """What it computes on, in words."""

    @abc.abstractmethod
    def staging(self, size_bytes: int) -> np.ndarray:
        """A buffer of bytes in host memory, all 0, that kernels can work on."""

    @abc.abstractmethod
    def zeros(self, size: int, dtype: np.dtype) -> Any:
        """A slot of `size` elements, all 0, where the kernels want it."""

    @abc.abstractmethod
    def to_host(self, slot: Any) -> np.ndarray:
        """The content of a slot as a NumPy array; a view where the slot is in host memory."""

    @abc.abstractmethod
    def fill(self, slot: Any, values: np.ndarray) -> None:
        """Overwrite a slot, or a slice of one, by values from host memory."""

    def clone(self, slot: Any) -> Any:
        """A copy of a slot, or of a slice of one, where the kernels want it."""
        return slot.copy()

    def extremes(self, slot: Any) -> tuple[float, float]:
        """The least and the largest element of a slot; NaN where there is one, 0 where the slot is empty."""
        return (float(slot.min()), float(slot.max())) if slot.size else (0.0, 0.0)

    def take(self, staged: np.ndarray, elements: np.ndarray) -> float:
        """Copy what came over the wire into the staging buffer, and look at it on the way.

        Args:
            staged: A stretch of the staging buffer.
            elements: As many in a wire dtype.

        Returns:
            The largest magnitude of what is staged then; NaN if one is NaN, 0 if there are none.
        """
        half_floats.convert(elements, staged)
        return self.largest(staged)

    def take_all(self, staged: np.ndarray, elements: np.ndarray) -> float:
        """`take` for large arrays in memory, over as many threads as there are."""
        return self.take(staged, elements)

    def copy(self, source: np.ndarray, target: np.ndarray) -> None:
        """Copy large arrays in memory, over as many threads as there are."""
        target[...] = source

    def advance(self, parameters: np.ndarray, updates: np.ndarray, decay: np.floating) -> None:
        """Apply updates to hosted parameters: x <- x + (Δx - λ x).

        Not (1 - λ) x + Δx: in float32 1 - λ is 1 for a λ of 1e-8, and has 1.3 % too much of one of 1e-6. What is taken
        from x is small like Δx, and is rounded once with it.

        Args:
            parameters: x, in host memory.
            updates: Δx.
            decay: λ.
        """
        with np.errstate(all="ignore"):
            if decay == 0:
                parameters += updates
                return
            for start in range(0, parameters.size, DECAY_BLOCK):
                block = slice(start, start + DECAY_BLOCK)
                change = parameters[block] * decay
                np.subtract(updates[block], change, out=change)
                parameters[block] += change

    def largest(self, staged: np.ndarray) -> float:
        """The largest magnitude in a stretch of host memory; NaN if one is NaN, 0 if it is empty."""
        if staged.size == 0:
            return 0.0
        # NaN wins every max and min of an array, and loses every comparison.
        high, low = float(staged.max()), -float(staged.min())
        return high if high >= low else low

    def give(self, staged: np.ndarray, wire: np.dtype) -> np.ndarray:
        """Elements of the staging buffer in a wire dtype; the elements themselves where that is their own."""
        if wire == staged.dtype:
            return staged
        elements = np.empty(staged.size, wire)
        half_floats.convert(staged, elements)
        return elements

    @abc.abstractmethod
    def compile(self, rule: type[Rule], dtype: np.dtype) -> Kernel:
        """Build the kernel of a rule for one dtype."""

    def kernel(self, rule: type[Rule], dtype: np.dtype) -> Kernel:
        """The kernel of a rule for one dtype, compiled once."""
        key = (rule, dtype)
        kernel = self._kernels.get(key)
        if kernel is None:
            with self._compiling:
                kernel = self._kernels.get(key) or self._kernels.setdefault(key, self.compile(rule, dtype))
        return kernel
