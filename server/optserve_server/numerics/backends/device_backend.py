"""A backend for a device with memory of its own: slots are there, gradients and x in host memory.

The passes over host memory on the way of a gradient are those of a CPU backend. Kept apart from CUDA, so that all of it
can be run on any machine, on a device that a test makes of host memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from optserve_server.numerics.backends.base import Backend, Decay, DecayPlace, HostedKernel, Kernel, Stretch
from optserve_server.numerics.backends.cuda_source import KernelSource
from optserve_server.numerics.backends.device import Device
from optserve_server.numerics.backends.device_steps import DeviceSteps, Program
from optserve_server.numerics.rules import Rule


class DeviceBackend(Backend):
    """Executes rules on a device.

    Args:
        device: The device.
        host: Makes the passes over host memory.

    Attributes:
        steps: Launches the kernels.

    Raises:
        MemoryError: The device has no memory for the windows.
    """

    def __init__(self, device: Device, host: Backend) -> None:
        super().__init__()
        self._device = device
        self._host = host
        self._programs: dict[tuple[type[Rule], np.dtype, bool], Program] = {}
        self.steps = DeviceSteps(device)

    @property
    def device(self) -> str:
        """The device, and what makes the passes over host memory, in words."""
        return f"{self._device.description}; host memory: {self._host.name} on {self._host.device}"

    # Memory.

    def staging(self, size_bytes: int) -> np.ndarray:
        """A pinned buffer."""
        return self._device.pinned(size_bytes) if size_bytes else np.empty(0, np.uint8)

    def pin(self, memory: np.ndarray) -> np.ndarray:
        """See Backend."""
        return self._device.pin(memory)

    def zeros(self, size: int, dtype: np.dtype) -> Any:
        """A slot in the memory of the device."""
        return self._device.zeros(size, dtype)

    def to_host(self, slot: Any) -> np.ndarray:
        """A copy of the slot; see Backend."""
        return slot if isinstance(slot, np.ndarray) else self._device.to_host(slot)

    def fill(self, slot: Any, values: np.ndarray) -> None:
        """Copy to the device."""
        if slot.size:
            self._device.fill(slot, values)

    def clone(self, slot: Any) -> Any:
        """On the device; see Backend."""
        copy = self._device.zeros(slot.size, slot.dtype)
        if slot.size:
            self._device.copy(slot, copy)
        return copy

    def copy_slot(self, slot: Any, target: Any) -> None:
        """On the device; see Backend."""
        if slot.size:
            self._device.copy(slot, target[: slot.size])

    def extremes(self, slot: Any) -> tuple[float, float]:
        """Where the array is; see Backend.

        Bits are compared, not numbers, because libraries for devices take the smallest numbers for 0.
        """
        if isinstance(slot, np.ndarray):
            return self._host.extremes(slot)
        return _extremes_of(slot.dtype, self._device.bit_extremes(slot)) if slot.size else (0.0, 0.0)

    # Passes over host memory.

    def receive(self, staged: np.ndarray, elements: np.ndarray) -> float:
        """See Backend."""
        return self._host.receive(staged, elements)

    def receive_large(self, staged: np.ndarray, elements: np.ndarray) -> float:
        """See Backend."""
        return self._host.receive_large(staged, elements)

    def copy(self, source: np.ndarray, target: np.ndarray) -> None:
        """See Backend."""
        self._host.copy(source, target)

    def advance(self, parameters: np.ndarray, updates: np.ndarray, decay: np.floating) -> None:
        """See Backend."""
        self._host.advance(parameters, updates, decay)

    def largest(self, staged: np.ndarray) -> float:
        """See Backend."""
        return self._host.largest(staged)

    def to_wire(self, staged: np.ndarray, wire: np.dtype) -> np.ndarray:
        """See Backend."""
        return self._host.to_wire(staged, wire)

    # Steps.

    def compile(self, rule: type[Rule], dtype: np.dtype) -> Kernel:
        """Compile the kernel; see Backend."""
        program = self.program(rule, dtype, hosted=False)

        def kernel(
            staged: np.ndarray, slots: Sequence[Any], scalars: Sequence[np.generic], *inputs: np.ndarray
        ) -> None:
            whole = Stretch(slice(0, staged.size), scalars, None)
            self.steps.make(program, [staged, *inputs], slots, None, [whole])

        return kernel

    def compile_hosted(self, rule: type[Rule], dtype: np.dtype, place: DecayPlace) -> HostedKernel:
        """Compile the kernel, which is the same for all places; see Backend."""
        program = self.program(rule, dtype, hosted=True)

        def hosted(
            staged: np.ndarray,
            slots: Sequence[Any],
            scalars: Sequence[np.generic],
            parameters: np.ndarray,
            factor: np.floating,
            *inputs: np.ndarray,
        ) -> None:
            whole = Stretch(slice(0, staged.size), scalars, Decay(place, factor))
            self.steps.make(program, [staged, *inputs], slots, parameters, [whole])

        return hosted

    def make_steps(
        self,
        rule: type[Rule],
        operands: Sequence[np.ndarray],
        slots: Sequence[Any],
        parameters: np.ndarray | None,
        stretches: Sequence[Stretch],
    ) -> None:
        """All stretches at once; see Backend."""
        program = self.program(rule, operands[0].dtype, hosted=parameters is not None)
        self.steps.make(program, operands, slots, parameters, stretches)

    def program(self, rule: type[Rule], dtype: np.dtype, *, hosted: bool) -> Program:
        """The kernel of a rule for one dtype, which changes x if it is `hosted`; compiled once."""
        key = (rule, dtype, hosted)
        program = self._programs.get(key)
        if program is None:
            with self._compiling:
                if key not in self._programs:
                    source = KernelSource(rule, dtype, hosted=hosted)
                    self._programs[key] = Program(source, self._device.load(source.text, source.name))
                program = self._programs[key]
        return program


def _extremes_of(dtype: np.dtype, found: tuple[int, int, int, int]) -> tuple[float, float]:
    """The extremes of an array from those of its bits; NaN for both if an element is NaN.

    As signed integers, bits are in the order of the numbers that are not negative, with infinity and NaN at the end. As
    unsigned ones, negative numbers come after all others, the one with the largest magnitude last.
    """
    least, most, first, last = found
    sign = 1 << (8 * dtype.itemsize - 1)
    low = last if last >= sign else least
    high = most if most >= 0 else first
    values = np.array([low, high], f"<u{dtype.itemsize}").view(dtype)
    return (np.nan, np.nan) if np.isnan(values).any() else (float(values[0]), float(values[1]))
