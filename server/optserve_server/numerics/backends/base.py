"""The base of all backends. A backend makes the arrays and executes rules on them.

Every backend compiles the same `Rule.update`; none has a formula of its own.
"""

from __future__ import annotations

import abc
import threading
from collections.abc import Collection, Sequence
from enum import Enum
from typing import Any, ClassVar, NamedTuple, Protocol

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
            scalars: The rule's constants, in that dtype.
            inputs: The rule's other operands, in host memory: the curvature, or nothing.
        """
        ...


class DecayPlace(Enum):
    """Where a step takes λ x off."""

    NOWHERE = 0
    PARAMETERS = 1
    """x ← x + (Δx − λ x)."""
    GRADIENT = 2
    """g ← g + λ x, before the method."""


class Decay(NamedTuple):
    """The weight decay of a step.

    Attributes:
        place: Where it is taken off; nowhere if λ is 0.
        factor: λ, in the dtype of x.
    """

    place: DecayPlace
    factor: Any


class Stretch(NamedTuple):
    """A part of an arena that has one row of constants.

    Attributes:
        where: The part.
        scalars: The rule's constants, in the dtype of the arena.
        decay: The weight decay of x; None if the server does not hold x.
    """

    where: slice
    scalars: Sequence[np.generic]
    decay: Decay | None


class HostedKernel(Protocol):
    """A rule compiled for one dtype, with the parameters that the server holds."""

    def __call__(
        self,
        staged: np.ndarray,
        slots: Sequence[Any],
        scalars: Sequence[np.generic],
        parameters: np.ndarray,
        factor: np.floating,
        *inputs: np.ndarray,
    ) -> None:
        """Make one step, and apply it to x.

        Args:
            staged: See Kernel.
            slots: See Kernel.
            scalars: See Kernel.
            parameters: x, in host memory. Changes in place.
            factor: λ of the weight decay, if there is one.
            inputs: See Kernel.
        """
        ...


DECAY_BLOCK = 1 << 16
"""Elements of x that are decayed at once, so that temporaries stay in the cache."""


class Backend(abc.ABC):
    """Executes rules on flat arrays of float32 or float64. Safe to use from several threads."""

    name: ClassVar[str]

    def __init__(self) -> None:
        self._kernels: dict[tuple[type[Rule], np.dtype], Kernel] = {}
        self._hosted_kernels: dict[tuple[type[Rule], np.dtype, DecayPlace], HostedKernel] = {}
        # A hosted kernel may be made of the other one.
        self._compiling = threading.RLock()

    @property
    @abc.abstractmethod
    def device(self) -> str:
        """The device, in words."""

    @abc.abstractmethod
    def staging(self, size_bytes: int) -> np.ndarray:
        """A buffer of bytes in host memory, all 0, that kernels can work on."""

    def pin(self, memory: np.ndarray) -> np.ndarray:
        """The same host memory, prepared for kernels, as long as the array that is returned and its views exist."""
        return memory

    @abc.abstractmethod
    def zeros(self, size: int, dtype: np.dtype) -> Any:
        """A slot of `size` elements, all 0, in the memory that the kernels use."""

    @abc.abstractmethod
    def to_host(self, slot: Any) -> np.ndarray:
        """The content of a slot as a NumPy array; a view where the slot is in host memory.

        Arrays in host memory are returned as they are: of a step's results, the slots are in the memory that the
        kernels use, the update and x are not.
        """

    @abc.abstractmethod
    def fill(self, slot: Any, values: np.ndarray) -> None:
        """Overwrite a slot, or a slice of one, by values from host memory."""

    def clone(self, slot: Any) -> Any:
        """A copy of a slot, or of a slice of one, in the memory that the kernels use."""
        return slot.copy()

    def copy_slot(self, slot: Any, target: Any) -> None:
        """Copy a slot to the beginning of a larger one."""
        target[: slot.size] = slot

    def extremes(self, slot: Any) -> tuple[float, float]:
        """The least and the largest element of a slot; NaN where there is one, 0 where the slot is empty."""
        return (float(slot.min()), float(slot.max())) if slot.size else (0.0, 0.0)

    def receive(self, staged: np.ndarray, elements: np.ndarray) -> float:
        """Copy received elements into the staging buffer, and find their largest magnitude.

        Args:
            staged: A stretch of the staging buffer.
            elements: The same number of elements, in a wire dtype.

        Returns:
            The largest magnitude of the staged elements; NaN if one is NaN, 0 if there are none.
        """
        half_floats.convert(elements, staged)
        return self.largest(staged)

    def receive_large(self, staged: np.ndarray, elements: np.ndarray) -> float:
        """`receive` for large arrays in memory, on all threads of the backend."""
        return self.receive(staged, elements)

    def copy(self, source: np.ndarray, target: np.ndarray) -> None:
        """Copy large arrays in memory, on all threads of the backend."""
        target[...] = source

    def advance(self, parameters: np.ndarray, updates: np.ndarray, decay: np.floating) -> None:
        """Apply updates to hosted parameters: x <- x + (Δx - λ x).

        Not (1 - λ) x + Δx: in float32, 1 - λ is 1 for λ = 1e-8, and takes 1.3 % too much for λ = 1e-6. λ x is as small
        as Δx, and is rounded once together with it.

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

    def add_decay(self, gradient: np.ndarray, parameters: np.ndarray, decay: np.floating) -> None:
        """Add weight decay to a gradient: g <- g + λ x.

        Args:
            gradient: g, in host memory.
            parameters: x, in host memory.
            decay: λ.
        """
        with np.errstate(all="ignore"):
            for start in range(0, parameters.size, DECAY_BLOCK):
                block = slice(start, start + DECAY_BLOCK)
                gradient[block] += parameters[block] * decay

    def largest(self, staged: np.ndarray) -> float:
        """The largest magnitude in a stretch of host memory; NaN if one is NaN, 0 if it is empty."""
        if staged.size == 0:
            return 0.0
        # NaN wins every max and min of an array, and loses every comparison.
        high, low = float(staged.max()), -float(staged.min())
        return high if high >= low else low

    def to_wire(self, staged: np.ndarray, wire: np.dtype) -> np.ndarray:
        """Elements of the staging buffer in a wire dtype; the same array if the dtype is the same."""
        if wire == staged.dtype:
            return staged
        elements = np.empty(staged.size, wire)
        half_floats.convert(staged, elements)
        return elements

    @abc.abstractmethod
    def compile(self, rule: type[Rule], dtype: np.dtype) -> Kernel:
        """Build the kernel of a rule for one dtype."""

    def compile_hosted(self, rule: type[Rule], dtype: np.dtype, place: DecayPlace) -> HostedKernel:
        """Build the kernel of a rule for one dtype that applies the update to x as well."""
        kernel, none = self.kernel(rule, dtype), dtype.type(0)

        def hosted(
            staged: np.ndarray,
            slots: Sequence[Any],
            scalars: Sequence[np.generic],
            parameters: np.ndarray,
            factor: np.floating,
            *inputs: np.ndarray,
        ) -> None:
            if place is DecayPlace.GRADIENT:
                self.add_decay(staged, parameters, factor)
            kernel(staged, slots, scalars, *inputs)
            self.advance(parameters, staged, factor if place is DecayPlace.PARAMETERS else none)

        return hosted

    def kernel(self, rule: type[Rule], dtype: np.dtype) -> Kernel:
        """The kernel of a rule for one dtype, compiled once."""
        key = (rule, dtype)
        kernel = self._kernels.get(key)
        if kernel is None:
            with self._compiling:
                kernel = self._kernels.get(key) or self._kernels.setdefault(key, self.compile(rule, dtype))
        return kernel

    def compile_ahead(self, rule: type[Rule], dtype: np.dtype, places: Collection[DecayPlace]) -> None:
        """Compile what steps will call, so that no step waits for it.

        Args:
            rule: The method.
            dtype: Of the tensors.
            places: Where steps decay the parameters that the server holds; empty if it holds none.
        """
        for place in places:
            self.hosted_kernel(rule, dtype, place)
        if not places:
            self.kernel(rule, dtype)

    def hosted_kernel(self, rule: type[Rule], dtype: np.dtype, place: DecayPlace) -> HostedKernel:
        """The kernel of a rule for one dtype, which applies the update to x as well; compiled once."""
        key = (rule, dtype, place)
        kernel = self._hosted_kernels.get(key)
        if kernel is None:
            with self._compiling:
                kernel = self._hosted_kernels.get(key) or self._hosted_kernels.setdefault(
                    key, self.compile_hosted(rule, dtype, place)
                )
        return kernel

    def make_step(
        self,
        rule: type[Rule],
        operands: Sequence[np.ndarray],
        slots: Sequence[Any],
        scalars: Sequence[np.generic],
        parameters: np.ndarray | None,
        decay: Decay | None,
    ) -> None:
        """Change arrays of one dtype by one step.

        Args:
            rule: The method.
            operands: The gradient, which becomes the update, and the other operands.
            slots: See Kernel.
            scalars: See Kernel.
            parameters: x, if the server holds it.
            decay: The weight decay of x.
        """
        staged, *inputs = operands
        if parameters is None or decay is None:
            self.kernel(rule, staged.dtype)(staged, slots, scalars, *inputs)
        else:
            kernel = self.hosted_kernel(rule, staged.dtype, decay.place)
            kernel(staged, slots, scalars, parameters, decay.factor, *inputs)

    def make_steps(
        self,
        rule: type[Rule],
        operands: Sequence[np.ndarray],
        slots: Sequence[Any],
        parameters: np.ndarray | None,
        stretches: Sequence[Stretch],
    ) -> None:
        """Change stretches of the arenas of one dtype by one step.

        Args:
            rule: The method.
            operands: The arenas of the gradient, which becomes the update, and of the other operands.
            slots: The arenas of the slots.
            parameters: The arena of x, if the server holds it.
            stretches: Do not overlap.
        """
        for where, scalars, decay in stretches:
            given, changed = [operand[where] for operand in operands], [slot[where] for slot in slots]
            self.make_step(rule, given, changed, scalars, None if parameters is None else parameters[where], decay)
