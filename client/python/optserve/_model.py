"""The parameters of an optimizer, and the checks of what users pass for them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from optserve.errors import InvalidArgumentError, ResourceExhaustedError
from optserve.v1 import optimizer_pb2
from optserve.wire import DTYPES


def empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """A new array, or raise ResourceExhaustedError where this process has no memory for it."""
    try:
        return np.empty(shape, dtype)
    # ValueError: no process could have it.
    except (MemoryError, ValueError) as error:
        raise ResourceExhaustedError(
            f"There is no memory here for an array of {list(shape)} {dtype}, as the server describes it: {error}"
        ) from error


class Parameter(NamedTuple):
    """One tensor."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype


class Model:
    """The parameters of an optimizer, in the order of their indices.

    Args:
        name: The optimizer's, for messages.
        messages: As the contract shows them.
        takes_curvature: Whether the method takes the diagonal of the Hessian.

    Attributes:
        parameters: All of them.
        names: Theirs.
        sizes: (bytes, bytes of an element) of each.
    """

    def __init__(self, name: str, messages: Sequence[optimizer_pb2.Parameter], *, takes_curvature: bool) -> None:
        self._name = name
        self.takes_curvature = takes_curvature
        self.parameters = [Parameter(item.name, tuple(item.shape), DTYPES[item.data_type]) for item in messages]
        self._indices = {parameter.name: index for index, parameter in enumerate(self.parameters)}
        self.names = list(self._indices)
        self.sizes = [(math.prod(p.shape) * p.dtype.itemsize, p.dtype.itemsize) for p in self.parameters]
        self._all = list(self._indices.values())

    def __len__(self) -> int:
        """How many there are."""
        return len(self.parameters)

    def names_of(self, indices: Sequence[int]) -> list[str]:
        """Names of parameters."""
        return self.names if indices is self._all else [self.parameters[index].name for index in indices]

    def taking_part(self, grads: Mapping[str, object], *, partial: bool) -> list[int]:
        """Indices, ascending, of the parameters that have a gradient; all must, unless `partial`."""
        if grads.keys() == self._indices.keys():
            return self._all
        for name in grads:
            if name not in self._indices:
                raise InvalidArgumentError(f"{self._name!r} has no parameter {name!r}.", metadata={"parameter": name})
        missing = [name for name in self._indices if name not in grads]
        if missing and not partial:
            raise InvalidArgumentError(
                f"There is no gradient for {missing[0]!r}; pass partial=True to leave parameters out of a step.",
                metadata={"parameter": missing[0]},
            )
        if not grads:
            raise InvalidArgumentError("A step needs at least one gradient.")
        return sorted(self._indices[name] for name in grads)

    def diagonals(self, indices: list[int], curvature: Mapping[str, np.ndarray] | None) -> list[np.ndarray] | None:
        """The diagonals of the Hessian that go with the gradients, if the method takes them."""
        if (curvature is not None) != self.takes_curvature:
            raise InvalidArgumentError(
                f"The method of {self._name!r} takes the diagonal of the Hessian: pass `curvature`."
                if self.takes_curvature
                else f"The method of {self._name!r} takes no curvature."
            )
        if curvature is None:
            return None
        arrays = []
        for index in indices:
            name = self.parameters[index].name
            if name not in curvature:
                raise InvalidArgumentError(f"There is no curvature for {name!r}.", metadata={"parameter": name})
            arrays.append(self.contiguous(index, curvature[name], "curvature"))
        return arrays

    def contiguous(self, index: int, array: np.ndarray, what: str) -> np.ndarray:
        """`array`, if it has the parameter's shape and dtype, or a copy in one piece."""
        array = self._checked(index, np.asarray(array), what)
        return array if array.flags.c_contiguous else np.ascontiguousarray(array)

    def _checked(self, index: int, array: np.ndarray, what: str) -> np.ndarray:
        """`array`, if it has the parameter's shape and dtype."""
        parameter = self.parameters[index]
        if array.shape != parameter.shape:
            raise InvalidArgumentError(
                f"The {what} of {parameter.name!r} has shape {list(array.shape)}, not {list(parameter.shape)}.",
                metadata={"parameter": parameter.name},
            )
        if array.dtype != parameter.dtype:
            raise InvalidArgumentError(
                f"The {what} of {parameter.name!r} is {array.dtype}, not {parameter.dtype}; convert it with .astype.",
                metadata={"parameter": parameter.name},
            )
        return array

    def outputs(self, indices: list[int], out: Mapping[str, np.ndarray] | None) -> list[np.ndarray]:
        """Arrays for the updates: those of `out`, checked, or new ones."""
        if out is None:
            parameters = [self.parameters[index] for index in indices]
            return [empty(item.shape, item.dtype) for item in parameters]
        arrays = []
        for index in indices:
            name = self.parameters[index].name
            if name not in out:
                raise InvalidArgumentError(f"`out` has no array for {name!r}.", metadata={"parameter": name})
            array = self._checked(index, out[name], "output")
            if not (array.flags.c_contiguous and array.flags.writeable):
                raise InvalidArgumentError(
                    f"The output of {name!r} must be a writeable, C-contiguous array.", metadata={"parameter": name}
                )
            arrays.append(array)
        return arrays
