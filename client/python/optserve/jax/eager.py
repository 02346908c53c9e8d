"""Pytrees for an `optserve.Optimizer`, outside of jit."""

from __future__ import annotations

from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from optserve.errors import InvalidArgumentError
from optserve.jax.pytrees import leaves_of
from optserve.optimizer import Optimizer
from optserve.state import TensorSpec


def specs(params: Any) -> dict[str, TensorSpec]:
    """Names, shapes and dtypes of the leaves of a pytree, for `Client.create_optimizer`.

    Args:
        params: A pytree of arrays, or of jax.ShapeDtypeStruct. A leaf's name is its path. Half floats get a float32
            parameter.

    Raises:
        InvalidArgumentError: A leaf is no dense array of float32, float64, bfloat16 or float16.

    Example:
        >>> specs({"dense": [jnp.zeros((3, 2)), jnp.zeros(2, jnp.bfloat16)]})
        {'dense/0': TensorSpec(shape=(3, 2), dtype='float32'), 'dense/1': TensorSpec(shape=(2,), dtype='float32')}
    """
    return leaves_of(params, "parameter").specs()


def step(opt: Optimizer, grads: Any, *, timeout_s: float | None = None) -> Any:
    """Make one step with a pytree of gradients, outside of jit.

    Args:
        opt: An optimizer whose parameters are `specs(params)`.
        grads: A pytree of gradients, like the parameters.
        timeout_s: As for `Optimizer.step`.

    Returns:
        The updates Δx: a pytree of arrays in the shapes and dtypes of the gradients, for `optax.apply_updates`.

    Raises:
        InvalidArgumentError: This was called inside jit; or a leaf is wrong, as for `specs`.
        OptserveError: As for `Optimizer.step`.

    Example:
        >>> opt = client.create_optimizer("mlp", optserve.Adam(), optserve.jax.specs(params))   # doctest: +SKIP
        ... params = optax.apply_updates(params, optserve.jax.step(opt, grads))
    """
    leaves = leaves_of(grads, "gradient")
    if any(isinstance(value, jax.core.Tracer) for value in leaves.values):
        raise InvalidArgumentError(
            "optserve.jax.step was called inside jax.jit or another transformation; there use optserve.jax.remote."
        )
    wide = {name: np.asarray(leaf) for name, leaf in zip(leaves.names, leaves.widened(), strict=True)}
    updates = opt.step(wide, timeout_s=timeout_s)
    return leaves.rebuilt([jnp.asarray(updates[name]) for name in leaves.names])
