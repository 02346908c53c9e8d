"""Names, shapes and dtypes of the leaves of a JAX pytree, and the clear errors for leaves that a server cannot have."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optserve.errors import InvalidArgumentError
from optserve.state import TensorSpec

WIDE = {
    np.dtype(jnp.float32): "float32",
    np.dtype(jnp.float64): "float64",
    np.dtype(jnp.bfloat16): "float32",
    np.dtype(jnp.float16): "float32",
}
"""The dtype of the state for each dtype of a leaf: half floats are widened, which is exact."""


class Leaves(NamedTuple):
    """The leaves of a pytree.

    Attributes:
        names: Name of each leaf: its path, such as `layers/0/kernel`.
        values: The leaves: arrays, or tracers.
        structure: The tree without its leaves.
    """

    names: list[str]
    values: list[Any]
    structure: Any

    def specs(self) -> dict[str, TensorSpec]:
        """Shape and dtype of the parameter on the server for each leaf."""
        return {
            name: TensorSpec(tuple(value.shape), WIDE[np.dtype(value.dtype)])
            for name, value in zip(self.names, self.values, strict=True)
        }

    def widened(self) -> list[Any]:
        """The leaves in the dtypes of the server's state; half floats become float32."""
        return [value.astype(WIDE[np.dtype(value.dtype)]) for value in self.values]

    def rebuilt(self, values: Sequence[Any]) -> Any:
        """The pytree with other leaves, in the dtypes of these."""
        narrow = [new.astype(old.dtype) for new, old in zip(values, self.values, strict=True)]
        return jax.tree_util.tree_unflatten(self.structure, narrow)


def leaves_of(tree: Any, what: str) -> Leaves:
    """The leaves of a pytree by their paths.

    Args:
        tree: A pytree of arrays: dicts, lists, tuples, dataclasses and other registered containers. None is no leaf.
        what: What the leaves are, for errors, such as `gradient`.

    Raises:
        InvalidArgumentError: There is no leaf; a leaf is sparse, no array, or neither float32, float64, bfloat16 nor
            float16; or two leaves have the same path.
    """
    paths, structure = jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_sparse)
    names = [jax.tree_util.keystr(path, simple=True, separator="/") or "params" for path, _ in paths]
    values = [value for _, value in paths]
    if not names:
        raise InvalidArgumentError(f"There is no {what}: the pytree has no leaves.")
    if len(set(names)) < len(names):
        name = next(name for index, name in enumerate(names) if name in names[:index])
        raise InvalidArgumentError(
            f"Two leaves have the path {name!r}: a key of the pytree contains a '/'. Rename it.",
            metadata={"parameter": name},
        )
    return Leaves(names, [_array(name, value, what) for name, value in zip(names, values, strict=True)], structure)


def check_same(leaves: Leaves, reference: Leaves) -> None:
    """Raise InvalidArgumentError unless the parameters have the names and shapes of the gradients."""
    if leaves.names != reference.names:
        difference = sorted(set(leaves.names) ^ set(reference.names)) or leaves.names
        raise InvalidArgumentError(
            f"The parameters and the gradients are different pytrees; only one of them has {difference[0]!r}.",
            metadata={"parameter": difference[0]},
        )
    for name, value, gradient in zip(leaves.names, leaves.values, reference.values, strict=True):
        if value.shape != gradient.shape:
            raise InvalidArgumentError(
                f"Parameter {name!r} has shape {list(value.shape)}, its gradient {list(gradient.shape)}.",
                metadata={"parameter": name},
            )


def _is_sparse(value: object) -> bool:
    """Whether a value is a sparse array of JAX, which is a pytree of its own. By name: the import takes long."""
    return any(kind.__name__ == "JAXSparse" for kind in type(value).__mro__)


def _array(name: str, value: Any, what: str) -> Any:
    """A leaf as an array or tracer; raises InvalidArgumentError for one that a server cannot have."""
    if _is_sparse(value):
        raise InvalidArgumentError(
            f"The {what} {name!r} is sparse ({type(value).__name__}); the service takes dense arrays: value.todense().",
            metadata={"parameter": name},
        )
    if not (hasattr(value, "shape") and hasattr(value, "dtype")):
        if not isinstance(value, float):
            raise InvalidArgumentError(
                f"The {what} {name!r} is of type {type(value).__name__}, and not an array.",
                metadata={"parameter": name},
            )
        value = jnp.asarray(value)
    dtype = np.dtype(value.dtype)
    if dtype in WIDE:
        return value
    advice = "optax.masked leaves such leaves out"
    if np.issubdtype(dtype, np.complexfloating):
        advice = "optax.contrib.split_real_and_imaginary makes two real leaves of each"
    raise InvalidArgumentError(
        f"The {what} {name!r} is {dtype}; the service has float32, float64, bfloat16 and float16: {advice}.",
        metadata={"parameter": name},
    )
