"""A device that is made of host memory: its arrays are closed to NumPy, its kernels are the CUDA source compiled as C.

So all that a step on a GPU does, but for CUDA itself, runs on any machine.
"""

import ctypes
import shutil
import subprocess
import tempfile
import threading
import weakref
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from optserve_server.numerics import backends
from optserve_server.numerics.backends.device_backend import DeviceBackend

# What CUDA and its runtime define. A thread of the kernel after the other runs.
C = """
#include <math.h>
#define KERNEL static void
#define ARGUMENT(T) const T *argument
#define launch (*argument)
#define INLINE static inline
#define VECTOR struct __attribute__((aligned(16))) Vector
static __thread struct { unsigned x; } blockIdx, threadIdx;
"""

RUN = """
void run(int blocks, ARGUMENT(Launch)) {
    for (blockIdx.x = 0; blockIdx.x < blocks; blockIdx.x++)
        for (threadIdx.x = 0; threadIdx.x < THREADS; threadIdx.x++) %s(argument);
}
int argument_bytes(void) { return sizeof(Launch); }
"""

# -ffp-contract=off is what --fmad=false is to nvcc. A vector and its elements have different types.
OPTIONS = ["-O2", "-shared", "-fPIC", "-ffp-contract=off", "-fno-math-errno", "-fno-strict-aliasing"]


@cache
def compiled(source: str, name: str) -> ctypes.CDLL:
    """A kernel, compiled once in a test run."""
    with tempfile.TemporaryDirectory() as folder:
        text, library = Path(folder) / f"{name}.c", Path(folder) / f"{name}.so"
        text.write_text(C + source + RUN % name)
        subprocess.run([shutil.which("cc") or "gcc", *OPTIONS, text, "-o", library, "-lm"], check=True)
        return ctypes.CDLL(str(library))


class DeviceArray:
    """An array in the memory of the device. NumPy cannot read it."""

    def __init__(self, memory: np.ndarray) -> None:
        self._memory = memory
        self.size = memory.size
        self.dtype = memory.dtype

    def __getitem__(self, where: slice | np.ndarray) -> "DeviceArray":
        return DeviceArray(self._memory[where])

    def __array__(self, *_: Any, **__: Any) -> np.ndarray:
        raise TypeError("An array on the device was read as if it were in host memory.")

    def __len__(self) -> int:
        raise TypeError("An array on the device was read as if it were in host memory.")


class SimulatedDevice:
    """See `optserve_server.numerics.backends.device.Device`.

    Attributes:
        launches: Number of launches so far.
        free_bytes: Bytes of its memory that are not in use.
    """

    description = "simulated device"

    def __init__(self, free_bytes: int = 1 << 32) -> None:
        self.launches = 0
        self.free_bytes = free_bytes
        # An array may be collected, and so released, at any moment.
        self._lock = threading.RLock()
        self._reached: dict[int, int] = {}

    def pinned(self, size_bytes: int) -> np.ndarray:
        return self.pin(np.zeros(size_bytes, np.uint8))

    def pin(self, memory: np.ndarray) -> np.ndarray:
        address = memory.ctypes.data
        owner = _Owner(memory)
        with self._lock:
            self._reached[address] = address + memory.nbytes
        weakref.finalize(owner, self._reached.pop, address)
        return np.asarray(owner)

    def host_address(self, array: np.ndarray) -> int | None:
        first, end = array.ctypes.data, array.ctypes.data + array.nbytes
        with self._lock:
            reached = any(low <= first and end <= high for low, high in list(self._reached.items()))
        return first if reached else None

    def zeros(self, size: int, dtype: np.dtype) -> DeviceArray:
        size_bytes = size * dtype.itemsize
        with self._lock:
            if size_bytes > self.free_bytes:
                raise MemoryError(f"the device has {self.free_bytes} bytes, not {size_bytes}")
            self.free_bytes -= size_bytes
        memory = np.zeros(size_bytes + 16, np.uint8)
        begin = -memory.ctypes.data % 16
        array = DeviceArray(memory[begin : begin + size_bytes].view(dtype))
        weakref.finalize(memory, self._release, size_bytes)
        return array

    def _release(self, size_bytes: int) -> None:
        with self._lock:
            self.free_bytes += size_bytes

    def address(self, array: DeviceArray) -> int:
        return array._memory.ctypes.data

    def to_host(self, array: DeviceArray) -> np.ndarray:
        return array._memory.copy()

    def fill(self, array: DeviceArray, values: np.ndarray) -> None:
        array._memory[...] = values

    def copy(self, source: DeviceArray, target: DeviceArray) -> None:
        target._memory[...] = source._memory

    def bit_extremes(self, array: DeviceArray) -> tuple[int, int, int, int]:
        signed, unsigned = (array._memory.view(f"{kind}{array.dtype.itemsize}") for kind in "iu")
        return int(signed.min()), int(signed.max()), int(unsigned.min()), int(unsigned.max())

    def load(self, source: str, name: str) -> ctypes.CDLL:
        return compiled(source, name)

    def new_stream(self) -> None:
        """Nothing is done later, so there is nothing to wait for."""

    def copy_bytes(self, target: int, source: int, size_bytes: int, stream: None) -> None:
        ctypes.memmove(target, source, size_bytes)

    def launch(self, function: ctypes.CDLL, blocks: int, argument: bytes, stream: None) -> None:
        assert function.argument_bytes() == len(argument)
        function.run(blocks, argument)
        self.launches += 1

    def wait(self, stream: None) -> None:
        pass


class _Owner:
    def __init__(self, memory: np.ndarray) -> None:
        self._memory = memory
        self.__array_interface__ = memory.__array_interface__


class SimulatedBackend(DeviceBackend):
    """The backend of a GPU, on a simulated device.

    Attributes:
        simulated: The device.
    """

    name = "simulated"

    def __init__(self, free_bytes: int = 1 << 32) -> None:
        self.simulated = SimulatedDevice(free_bytes)
        super().__init__(self.simulated, backends.load("numpy", 1))


def _cuda_device_count() -> int:
    try:
        import cupy  # pyright: ignore[reportMissingImports]

        return cupy.cuda.runtime.getDeviceCount()
    # No CuPy, no driver, no device: each fails in its own way.
    except Exception:  # noqa: BLE001
        return 0


GPU = pytest.param("cupy", marks=pytest.mark.skipif(_cuda_device_count() == 0, reason="there is no CUDA device"))
"""The CuPy backend, for tests that are left out only where there is no device."""


@cache
def load(name: str, threads: int = 0) -> backends.Backend:
    """The backend of that name, which may be `simulated`; one for all tests, because each compiles its kernels anew."""
    return SimulatedBackend() if name == "simulated" else backends.load(name, threads)
