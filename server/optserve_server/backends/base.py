"""What a backend is: it owns the arrays and executes rules on them.

Every backend compiles the same `Rule.update`; none has a formula of its own.
"""

from __future__ import annotations

import abc
import threading
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np

from optserve_server.rules import Rule

Kernel = Callable[[np.ndarray, Sequence[Any], Sequence[np.generic]], None]
"""kernel(staged, slots, scalars): `staged` holds g on entry and the update on return; `slots` change in place."""


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
        """A buffer of bytes in host memory that kernels can work on; its content is arbitrary."""

    @abc.abstractmethod
    def zeros(self, size: int, dtype: np.dtype) -> Any:
        """A slot of `size` elements, all 0, where the kernels want it."""

    @abc.abstractmethod
    def to_host(self, slot: Any) -> np.ndarray:
        """The content of a slot as a NumPy array; a view where the slot is in host memory."""

    @abc.abstractmethod
    def fill(self, slot: Any, values: np.ndarray) -> None:
        """Overwrite a slot, or a slice of one, by values from host memory."""

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
