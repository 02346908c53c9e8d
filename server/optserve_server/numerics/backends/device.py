"""What the backend for devices needs of a device: memory, copies and kernels."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np


class Device(Protocol):
    """What the backend needs of a device. Streams are sequences of copies and launches."""

    @property
    def description(self) -> str:
        """The device, in words."""
        ...

    def pinned(self, size_bytes: int) -> np.ndarray:
        """Bytes of host memory, all 0, that kernels reach. Raises MemoryError."""
        ...

    def pin(self, memory: np.ndarray) -> np.ndarray:
        """The same host memory, so that kernels reach it, until the array that is returned and its views are gone."""
        ...

    def host_address(self, array: np.ndarray) -> int | None:
        """The address of an array in host memory for kernels; None if they cannot reach it."""
        ...

    def zeros(self, size: int, dtype: np.dtype) -> Any:
        """An array in the memory of the device. Raises MemoryError."""
        ...

    def address(self, array: Any) -> int:
        """The address of an array in the memory of the device."""
        ...

    def to_host(self, array: Any) -> np.ndarray:
        """A copy of an array."""
        ...

    def fill(self, array: Any, values: np.ndarray) -> None:
        """Copy from host memory into an array."""
        ...

    def copy(self, source: Any, target: Any) -> None:
        """Copy an array into another one of its size."""
        ...

    def bit_extremes(self, array: Any) -> tuple[int, int, int, int]:
        """The least and the largest element of an array, its bits taken as signed and as unsigned integers."""
        ...

    def load(self, source: str, name: str) -> Any:
        """Compile and load a kernel."""
        ...

    def new_stream(self) -> Any:
        """A stream."""
        ...

    def copy_bytes(self, target: int, source: int, size_bytes: int, stream: Any) -> None:
        """Copy between host memory and the memory of the device, later, on the stream."""
        ...

    def launch(self, function: Any, blocks: int, argument: bytes, stream: Any) -> None:
        """Run a kernel, later, on the stream. The argument is copied at once."""
        ...

    def wait(self, stream: Any) -> None:
        """Return when the stream is done."""
        ...
