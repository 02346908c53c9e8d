"""The parameters of an optimizer, and the checks of what users pass for them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from optserve._common.wire import DTYPES
from optserve._values.arrays import check_mapping, host_array
from optserve.errors import InvalidArgumentError, ResourceExhaustedError
from optserve.v1 import optimizer_pb2


def empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """A new array; raises ResourceExhaustedError if this process has no memory for it."""
    try:
        return np.empty(shape, dtype)
    # ValueError: the array would be too large for any process.
    except (MemoryError, ValueError) as error:
        raise ResourceExhaustedError(
            f"There is no memory here for an array of {list(shape)} {dtype}, as the server describes it: {error}"
        ) from error


class Parameter(NamedTuple):
    """One tensor."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype


class ParameterTable:
    """The parameters of an optimizer, in the order of their indices.

    Args:
        name: The optimizer's name, for messages.
        messages: The messages of the parameters.
        takes_curvature: Whether the method takes the diagonal of the Hessian.

    Attributes:
        parameters: All parameters.
        names: Their names.
        sizes: (bytes, bytes of an element) of each parameter.
    """

    def __init__(self, name: str, messages: Sequence[optimizer_pb2.Parameter], *, takes_curvature: bool) -> None:
        self._name = name
        self.takes_curvature = takes_curvature
        self.parameters = [Parameter(item.name, tuple(item.shape), DTYPES[item.data_type]) for item in messages]
        self._indices = {parameter.name: index for index, parameter in enumerate(self.parameters)}
        self.names = list(self._indices)
        self.sizes = [(math.prod(p.shape) * p.dtype.itemsize, p.dtype.itemsize) for p in self.parameters]
        self._all = list(self._indices.values())

    def is_continued_by(self, other: ParameterTable) -> bool:
        """Whether the other table has these parameters, and more behind them."""
        return len(other) > len(self) and other.parameters[: len(self)] == self.parameters

    def __len__(self) -> int:
        """The number of parameters."""
        return len(self.parameters)

    def names_of(self, indices: Sequence[int]) -> list[str]:
        """Names of the parameters with these indices."""
        return self.names if indices is self._all else [self.parameters[index].name for index in indices]

    def selected_indices(self, grads: Mapping[str, object], *, partial: bool, what: str = "gradient") -> list[int]:
        """Indices, ascending, of the parameters that have a gradient; all must, unless `partial`.

        With `partial`, a gradient that is None counts as absent, as for torch's parameters that took no part.
        """
        if type(grads) is not dict:
            check_mapping(grads, f"{what}s", "{'w': array}")
        if grads.keys() == self._indices.keys() and not partial:
            return self._all
        for name in grads:
            self._check_known(name)
        given = [name for name in grads if not (partial and grads[name] is None)]
        if not given:
            raise InvalidArgumentError("A step needs at least one gradient.")
        indices = self.indices_of(given)
        if not partial and len(indices) < len(self):
            missing = next(name for name in self.names if name not in grads)
            advice = "; pass partial=True to leave parameters out of a step" if what == "gradient" else ""
            raise InvalidArgumentError(f"There is no {what} for {missing!r}{advice}.", metadata={"parameter": missing})
        return indices if len(indices) < len(self) else self._all

    def indices_of(self, names: Iterable[str]) -> list[int]:
        """Indices, ascending, of the parameters with these names."""
        if isinstance(names, str) and len(names) > 1 and names in self._indices:
            raise InvalidArgumentError(f"Pass a sequence of names, such as [{names!r}].")
        wanted = set()
        for name in names:
            self._check_known(name)
            wanted.add(self._indices[name])
        if not wanted:
            raise InvalidArgumentError("Name at least one parameter.")
        return sorted(wanted)

    def _check_known(self, name: str) -> None:
        if name not in self._indices:
            raise InvalidArgumentError(f"{self._name!r} has no parameter {name!r}.", metadata={"parameter": name})

    def diagonals(self, indices: list[int], curvature: Mapping[str, np.ndarray] | None) -> list[np.ndarray] | None:
        """The diagonals of the Hessian for the gradients; None if the method does not take them."""
        if (curvature is not None) != self.takes_curvature:
            raise InvalidArgumentError(
                f"The method of {self._name!r} takes the diagonal of the Hessian: pass `curvature`."
                if self.takes_curvature
                else f"The method of {self._name!r} takes no curvature."
            )
        if curvature is None:
            return None
        check_mapping(curvature, "curvature", "{'w': array}")
        arrays = []
        for index in indices:
            name = self.parameters[index].name
            if name not in curvature:
                raise InvalidArgumentError(f"There is no curvature for {name!r}.", metadata={"parameter": name})
            arrays.append(self.contiguous(index, curvature[name], "curvature"))
        return arrays

    def contiguous(self, index: int, array: Any, what: str) -> np.ndarray:
        """`array`, checked against the parameter; a copy if it is not contiguous, or not in the host's byte order."""
        if type(array) is not np.ndarray:
            array = self._on_host(index, array, what)
        if not array.dtype.isnative and array.dtype.newbyteorder("=") == self.parameters[index].dtype:
            array = array.astype(self.parameters[index].dtype)
        array = self._checked(index, array, what)
        return array if array.flags.c_contiguous else np.ascontiguousarray(array)

    def _on_host(self, index: int, array: Any, what: str) -> np.ndarray:
        """The values of an array of another library than NumPy."""
        name = self.parameters[index].name
        if array is None and what == "gradient":
            raise InvalidArgumentError(
                f"The gradient of {name!r} is None. To leave such parameters out of a step, pass partial=True to "
                "`step`, or name the others to `begin_step`.",
                metadata={"parameter": name},
            )
        return host_array(array, f"The {what} of {name!r}")

    def _checked(self, index: int, array: np.ndarray, what: str) -> np.ndarray:
        """`array`, after a check of its shape and dtype against the parameter."""
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
        if type(out) is not dict:
            check_mapping(out, "out", "{'w': array}")
        arrays = []
        for index in indices:
            name = self.parameters[index].name
            if name not in out:
                raise InvalidArgumentError(f"`out` has no array for {name!r}.", metadata={"parameter": name})
            if not isinstance(out[name], np.ndarray):
                kind = type(out[name]).__name__
                raise InvalidArgumentError(
                    f"The output of {name!r} must be an array of NumPy, not of type {kind}; a tensor of torch on the "
                    "CPU shares its memory as tensor.detach().numpy().",
                    metadata={"parameter": name},
                )
            array = self._checked(index, out[name], "output")
            if not (array.flags.c_contiguous and array.flags.writeable):
                raise InvalidArgumentError(
                    f"The output of {name!r} must be a writeable, C-contiguous array.", metadata={"parameter": name}
                )
            arrays.append(array)
        return arrays
