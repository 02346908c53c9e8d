"""CuPy: the CUDA device of the DeviceBackend."""

# pyright: reportMissingImports=false

from __future__ import annotations

import logging
import sys
import threading
from typing import Any

import cupy
import numpy as np
from cupy.cuda import nvrtc, runtime

from optserve_server.numerics.backends import cuda_source, numpy
from optserve_server.numerics.backends.base import Backend
from optserve_server.numerics.backends.cuda_source import THREADS
from optserve_server.numerics.backends.device_backend import DeviceBackend

logger = logging.getLogger(__name__)

_MAPPED = 1 | 2
"""cudaHostRegisterPortable and cudaHostRegisterMapped: for all contexts, and for kernels."""


class _Pinned:
    """Host memory that was pinned, until no array of it exists any more."""

    def __init__(self, memory: np.ndarray) -> None:
        address = memory.ctypes.data
        runtime.hostRegister(address, memory.nbytes, _MAPPED)
        # Freed after it was unregistered.
        self._memory = memory
        self._address = address
        self._unregister = runtime.hostUnregister
        self.__array_interface__ = memory.__array_interface__

    def __del__(self) -> None:
        if hasattr(self, "_unregister"):
            try:
                self._unregister(self._address)
            except runtime.CUDARuntimeError:
                # At the end of the process, the driver may be gone already.
                if not sys.is_finalizing():
                    logger.exception("memory at %#x stays pinned", self._address)


class CudaDevice:
    """The current CUDA device; see `device.Device`.

    Raises:
        RuntimeError: The device cannot do what the backend needs.
    """

    def __init__(self) -> None:
        self._device = cupy.cuda.Device()
        properties = runtime.getDeviceProperties(self._device.id)
        self.description = f"GPU {self._device.id}, {properties['name'].decode()}"
        for name in ("CanMapHostMemory", "UnifiedAddressing"):
            if not runtime.deviceGetAttribute(getattr(runtime, f"cudaDevAttr{name}"), self._device.id):
                raise RuntimeError(f"{self.description} cannot read host memory (cudaDevAttr{name})")
        self._bound = threading.local()
        self._architecture = f"sm_{self._device.compute_capability}"

    def pinned(self, size_bytes: int) -> np.ndarray:
        """Not from CuPy's pool, which rounds up to powers of two and keeps what was freed; see Device."""
        with self._device:
            try:
                memory = cupy.cuda.PinnedMemory(size_bytes, runtime.hostAllocPortable | runtime.hostAllocMapped)
            except runtime.CUDARuntimeError as error:
                raise MemoryError(f"{size_bytes} bytes of pinned memory: {error}") from error
        buffer = np.frombuffer(cupy.cuda.PinnedMemoryPointer(memory, 0), np.uint8, size_bytes)
        buffer.fill(0)
        return buffer

    def pin(self, memory: np.ndarray) -> np.ndarray:
        """Steps on memory that cannot be pinned go through windows; see Device."""
        with self._device:
            try:
                return np.asarray(_Pinned(memory))
            except runtime.CUDARuntimeError as error:
                logger.warning("%d bytes of a segment cannot be pinned, steps are slower: %s", memory.nbytes, error)
                return memory

    def host_address(self, array: np.ndarray) -> int | None:
        """See Device."""
        with self._device:
            self._bind()
            attributes = runtime.pointerGetAttributes(array.ctypes.data)
        # 0 for memory that the device does not reach.
        return attributes.devicePointer or None if attributes.type == runtime.memoryTypeHost else None

    def _bind(self) -> None:
        """Make the device's context that of this thread; before, host memory has no address on the device."""
        if not hasattr(self._bound, "done"):
            runtime.setDevice(self._device.id)
            # Any call that needs the context.
            runtime.memGetInfo()
            self._bound.done = True

    def zeros(self, size: int, dtype: np.dtype) -> Any:
        """See Device."""
        with self._device:
            array = cupy.zeros(size, dtype)
            # Kernels run on streams of their own, which do not wait for this one.
            cupy.cuda.Stream.null.synchronize()
            return array

    def address(self, array: Any) -> int:
        """See Device."""
        return array.data.ptr

    def to_host(self, array: Any) -> np.ndarray:
        """See Device."""
        with self._device:
            return cupy.asnumpy(array)

    def fill(self, array: Any, values: np.ndarray) -> None:
        """See Device."""
        with self._device:
            array.set(values)
            cupy.cuda.Stream.null.synchronize()

    def copy(self, source: Any, target: Any) -> None:
        """See Device."""
        with self._device:
            target[...] = source
            cupy.cuda.Stream.null.synchronize()

    def bit_extremes(self, array: Any) -> tuple[int, int, int, int]:
        """See Device."""
        with self._device:
            signed, unsigned = (array.view(f"{kind}{array.dtype.itemsize}") for kind in "iu")
            return int(signed.min()), int(signed.max()), int(unsigned.min()), int(unsigned.max())

    def load(self, source: str, name: str) -> Any:
        """See Device."""
        with self._device:
            module = cupy.cuda.function.Module()
            module.load(_compiled(cuda_source.CUDA + source, name, self._architecture))
            return module.get_function(name)

    def new_stream(self) -> Any:
        """See Device."""
        with self._device:
            return cupy.cuda.Stream(non_blocking=True)

    def copy_bytes(self, target: int, source: int, size_bytes: int, stream: Any) -> None:
        """See Device."""
        with self._device:
            runtime.memcpyAsync(target, source, size_bytes, runtime.memcpyDefault, stream.ptr)

    def launch(self, function: Any, blocks: int, argument: bytes, stream: Any) -> None:
        """See Device."""
        with self._device:
            # CuPy passes arrays of one element by value.
            value = np.frombuffer(argument, f"V{len(argument)}")
            function((blocks,), (THREADS,), (value,), stream=stream)

    def wait(self, stream: Any) -> None:
        """See Device."""
        stream.synchronize()


def _compiled(source: str, name: str, architecture: str) -> bytes:
    """The machine code of a kernel.

    CuPy's own compiler adds `-ftz=true` to all options, which makes 0 of the smallest numbers.

    Raises:
        RuntimeError: The source does not compile.
    """
    program = nvrtc.createProgram(source, f"{name}.cu", (), ())
    try:
        nvrtc.compileProgram(program, (*cuda_source.OPTIONS, f"--gpu-architecture={architecture}"))
        return nvrtc.getCUBIN(program)
    except nvrtc.NVRTCError as error:
        raise RuntimeError(f"{name} does not compile for {architecture}: {nvrtc.getProgramLog(program)}") from error
    finally:
        nvrtc.destroyProgram(program)


class CupyBackend(DeviceBackend):
    """The GPU backend, on the current CUDA device.

    Args:
        threads: Threads of the passes over host memory; 0 for one per core.

    Raises:
        RuntimeError: The device does not work, or has no memory.
    """

    name = "cupy"

    def __init__(self, threads: int = 0) -> None:
        device = CudaDevice()
        try:
            super().__init__(device, _host_backend(threads))
            self._probe()
        except MemoryError as error:
            raise RuntimeError(f"{device.description} has too little free memory") from error

    def _probe(self) -> None:
        """Use the device once: a driver can list a device and still not run anything on it."""
        ones = self.zeros(8, np.dtype(np.float32))
        self.fill(ones, np.ones(8, np.float32))
        if self.to_host(ones).sum() != 8.0:
            raise RuntimeError(f"{self.device} gives wrong sums")


def _host_backend(threads: int) -> Backend:
    """Numba's passes over host memory, if it is installed, else NumPy's."""
    try:
        from optserve_server.numerics.backends.numba import NumbaBackend
    except ImportError:
        logger.warning("Numba is not installed, so NumPy makes the passes over host memory, which is slower")
        return numpy.NumpyBackend(threads)
    return NumbaBackend(threads)
