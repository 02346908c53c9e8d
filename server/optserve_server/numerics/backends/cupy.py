"""CuPy: state on the GPU, the rule's formula as one kernel.

The staging buffer is pinned host memory; a step moves through the device in blocks, so the device holds the slots
and two blocks, whatever the size of the model.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import cupy
import numpy as np

from optserve_server.numerics.backends import cuda_source
from optserve_server.numerics.backends.base import Backend, Kernel
from optserve_server.numerics.rules import Rule

BLOCK = 1 << 22
"""Elements per transfer; two are under way at a time."""


class CupyBackend(Backend):
    """The GPU backend, on the current CUDA device."""

    name = "cupy"

    def __init__(self, threads: int = 0) -> None:  # noqa: ARG002 - for CPU kernels
        super().__init__()
        self._device = cupy.cuda.Device()
        properties = cupy.cuda.runtime.getDeviceProperties(self._device.id)
        self._description = f"GPU {self._device.id}, {properties['name'].decode()}"
        self._probe()

    @property
    def device(self) -> str:
        """What it computes on, in words."""
        return self._description

    def _probe(self) -> None:
        """Use the device once: a driver can list a device and still not run anything on it."""
        if float(cupy.ones(8, np.float32).sum()) != 8.0:
            raise RuntimeError(f"{self._description} gives wrong sums")

    def staging(self, size_bytes: int) -> np.ndarray:
        """A pinned buffer, from and to which the device copies by itself."""
        if size_bytes == 0:
            return np.empty(0, np.uint8)
        buffer = np.frombuffer(cupy.cuda.alloc_pinned_memory(size_bytes), np.uint8, size_bytes)
        buffer.fill(0)
        return buffer

    def zeros(self, size: int, dtype: np.dtype) -> Any:
        """A slot in device memory."""
        with self._device:
            slot = cupy.zeros(size, dtype)
            # Kernels run on streams of their own, which do not wait for this one.
            cupy.cuda.Stream.null.synchronize()
            return slot

    def to_host(self, slot: Any) -> np.ndarray:
        """A copy of the slot; see Backend."""
        with self._device:
            return cupy.asnumpy(slot)

    def fill(self, slot: Any, values: np.ndarray) -> None:
        """Copy to the device."""
        with self._device:
            slot.set(values)
            # Kernels run on streams of their own, which do not wait for this one.
            cupy.cuda.Stream.null.synchronize()

    def clone(self, slot: Any) -> Any:
        """On the device; see Backend."""
        with self._device:
            copy = slot.copy()
            # Kernels run on streams of their own, which do not wait for this one.
            cupy.cuda.Stream.null.synchronize()
            return copy

    def copy_slot(self, slot: Any, target: Any) -> None:
        """On the device; see Backend."""
        with self._device:
            super().copy_slot(slot, target)
            # Kernels run on streams of their own, which do not wait for this one.
            cupy.cuda.Stream.null.synchronize()

    def extremes(self, slot: Any) -> tuple[float, float]:
        """On the device; see Backend."""
        with self._device:
            return super().extremes(slot)

    def compile(self, rule: type[Rule], dtype: np.dtype) -> Kernel:
        """One element-wise kernel; multiply-adds are not contracted, so that it agrees with the CPU's bits."""
        arrays, constants = cuda_source.operands(rule)
        element = {"float32": "float", "float64": "double"}[dtype.name]
        fused = cupy.ElementwiseKernel(
            ", ".join(f"T {name}" for name in constants),
            ", ".join(f"T {name}" for name in arrays),
            cuda_source.source(rule),
            f"optserve_{rule.name}_{element}",
            options=("--fmad=false",),
        )

        def kernel(
            staged: np.ndarray, slots: Sequence[Any], scalars: Sequence[np.generic], *inputs: np.ndarray
        ) -> None:
            operand_parts = (staged, *inputs)
            with self._device:
                streams = [cupy.cuda.Stream(non_blocking=True) for _ in range(2)]
                buffers = [[cupy.empty(min(BLOCK, staged.size), dtype) for _ in operand_parts] for _ in streams]
                for number, low in enumerate(range(0, staged.size, BLOCK)):
                    part = slice(low, min(low + BLOCK, staged.size))
                    stream = streams[number % 2]
                    blocks = [buffer[: part.stop - low] for buffer in buffers[number % 2]]
                    with stream:
                        for block, host in zip(blocks, operand_parts, strict=True):
                            block.set(host[part], stream=stream)
                        fused(*scalars, *blocks, *(slot[part] for slot in slots))
                        blocks[0].get(out=staged[part], stream=stream, blocking=False)
                for stream in streams:
                    stream.synchronize()

        return kernel
