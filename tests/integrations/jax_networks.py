"""A small network of JAX, and its training loop."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

STEPS = 300


def tree(dtype=jnp.float32) -> dict:
    """Parameters in nested containers."""
    keys = jax.random.split(jax.random.key(7), 3)
    return {
        "layers": [
            {"kernel": jax.random.normal(keys[0], (5, 8), dtype), "bias": jnp.zeros(8, dtype)},
            {"kernel": jax.random.normal(keys[1], (8, 3), dtype), "bias": jnp.zeros(3, dtype)},
        ],
        "scale": jnp.ones((), dtype),
    }


def loss(params, x):
    hidden = jnp.tanh(x @ params["layers"][0]["kernel"] + params["layers"][0]["bias"])
    out = hidden @ params["layers"][1]["kernel"] + params["layers"][1]["bias"]
    return jnp.mean((params["scale"] * out - jnp.sin(3 * x[:, :3])) ** 2)


def batches(dtype=jnp.float32):
    return jax.random.normal(jax.random.key(1), (STEPS, 16, 5), dtype)


def train(transformation: Any, params, steps: int = STEPS, dtype=jnp.float32):
    """The parameters and the state after some steps, each a jitted program."""

    @jax.jit
    def step(params, state, x):
        updates, state = transformation.update(jax.grad(loss)(params, x), state, params)
        return optax.apply_updates(params, updates), state

    state = jax.jit(transformation.init)(params)
    for x in batches(dtype)[:steps]:
        params, state = step(params, state, x)
    return params, state


def assert_close(ours, theirs, tolerance: float):
    """Each leaf is as near as rounding allows, relative to the largest element."""
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for mine, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert (mine.shape, mine.dtype) == (other.shape, other.dtype)
        expected = np.asarray(other, np.float64)
        assert np.abs(np.asarray(mine, np.float64) - expected).max() <= tolerance * max(np.abs(expected).max(), 1e-3)
