"""Turns arrays and tensors of any library into NumPy arrays of the same dtype, or raises a clear error."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from optserve.errors import InvalidArgumentError

_NAMES = {name: np.dtype(name) for name in ("float16", "float32", "float64")}
# Names of tinygrad, with bytes per element: NumPy uses the name `float` for 8 bytes.
_C_NAMES = {("half", 2): np.dtype("float16"), ("float", 4): np.dtype("float32"), ("double", 8): np.dtype("float64")}


def known_dtype(dtype: Any) -> np.dtype | None:
    """The little-endian NumPy dtype that equals a library's own dtype; None if there is none."""
    if hasattr(dtype, "as_numpy_dtype"):
        dtype = dtype.as_numpy_dtype
    if isinstance(dtype, str | type | np.dtype):
        try:
            return np.dtype(dtype).newbyteorder("<")
        except TypeError:
            return None
    # torch.float32, mlx.core.float32; dtypes.float.
    name = str(dtype).rpartition(".")[2]
    return _NAMES.get(name) or _C_NAMES.get((name, getattr(dtype, "itemsize", 0)))


def has_values(value: Any) -> bool:
    """Whether `value` has numbers, and not only a shape and a dtype, as a TensorSpec or a meta tensor has."""
    return (hasattr(value, "__array__") or hasattr(value, "numpy")) and not getattr(value, "is_meta", False)


def host_array(value: Any, what: str) -> np.ndarray:
    """The values of an array or tensor as a NumPy array, without a copy if the library allows that.

    Args:
        value: An array or tensor of any library. One on a device is copied to the host.
        what: What the value is, for errors.

    Raises:
        InvalidArgumentError: The value is None or masked, cannot be read, or has a dtype that NumPy does not have.
    """
    # The usual case first, because a step has many arrays.
    if type(value) is np.ndarray:
        return value
    if value is None:
        raise InvalidArgumentError(f"{what} is None.")
    if isinstance(value, np.ma.MaskedArray):
        raise InvalidArgumentError(f"{what} is a masked array, whose mask would be lost; fill it with .filled(0).")
    dtype = getattr(value, "dtype", None)
    if dtype is not None and not isinstance(value, np.ndarray | np.generic) and known_dtype(dtype) is None:
        raise InvalidArgumentError(f"{what} is {dtype}, which is neither float32 nor float64; convert it.")
    try:
        for step in ("detach", "cpu", "numpy"):
            # torch refuses to convert a tensor that requires a gradient, or is on a device; tinygrad has no __array__.
            value = getattr(value, step)() if hasattr(value, step) else value
        array = np.asarray(value)
    except Exception as error:
        raise InvalidArgumentError(f"{what} cannot be read as an array: {error}") from error
    if dtype is not None and (expected := known_dtype(dtype)) != array.dtype.newbyteorder("<"):
        raise InvalidArgumentError(f"{what} is {dtype}, and became {array.dtype} instead of {expected}; convert it.")
    return array


def check_mapping(value: Any, what: str, example: str) -> None:
    """Raise InvalidArgumentError unless `value` maps names to something."""
    if type(value) is not dict and not isinstance(value, Mapping):
        kind = type(value).__name__
        raise InvalidArgumentError(f"{what} must be a mapping by name, such as {example}, not of type {kind}.")


def check_kind(value: Any, kind: type, what: str, example: str) -> None:
    """Raise InvalidArgumentError unless `value` is an object of a class, rather than the class or something else."""
    if isinstance(value, kind):
        return
    if isinstance(value, type) and issubclass(value, kind):
        raise InvalidArgumentError(f"{what} is the class {value.__name__} itself; pass {value.__name__}(…).")
    raise InvalidArgumentError(f"{what} must be something like {example}, not {value!r}.")
