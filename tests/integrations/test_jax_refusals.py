"""What `optserve.jax.remote` refuses while JAX traces, before anything is sent."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental import sparse

import optserve
import optserve.jax
from optserve.errors import InvalidArgumentError


def refusing(client, name, call, message, error=InvalidArgumentError):
    """The call raises inside a trace, and no step is made."""
    transformation: Any = optserve.jax.remote(client, optserve.Adam(), name=name)
    params = {"w": jnp.ones(3)}
    state = transformation.init(params)
    with pytest.raises(error, match=message):
        call(transformation, params, state)
    assert client.optimizer(name).current_step == 0


def test_vmap_is_refused(client, name):
    def call(transformation, params, state):
        mapped = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), params)
        jax.jit(jax.vmap(lambda grads: transformation.update(grads, state)))(mapped)

    refusing(client, name, call, "vmap cannot map a step")
    refusing(
        client,
        f"{name}-eager",
        lambda transformation, params, state: jax.vmap(lambda g: transformation.update({"w": g}, state)[0])(
            jnp.ones((2, 3))
        ),
        "vmap cannot map a step",
    )


def test_grad_is_refused(client, name):
    def call(transformation, params, state):
        jax.jit(jax.grad(lambda grads: transformation.update(grads, state)[0]["w"].sum()))(params)

    refusing(client, name, call, "has no derivative")
    refusing(
        client,
        f"{name}-eager",
        lambda transformation, params, state: jax.grad(lambda g: transformation.update(g, state)[0]["w"].sum())(params),
        "has no derivative",
    )


def test_programs_for_several_devices_are_refused(server, name):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", Path(__file__).with_name("several_devices.py"), server.target, name],
        capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    *refused, before, after = done.stdout.splitlines()
    assert [line.split()[0] for line in refused] == ["pmap", "shard_map", "sharded"]
    assert all("cannot be part of a program for several devices" in line for line in refused), refused
    assert (before, after) == ("0", "1")


def test_grad_beside_a_step_is_no_matter(client, name):
    transformation: Any = optserve.jax.remote(client, optserve.Sgd(learning_rate=1.0), name=name)
    state = transformation.init(jnp.zeros(3))

    @jax.jit
    def call(x):
        def value(x):
            updates, _ = transformation.update(jnp.ones(3), state)
            return (x * updates).sum()

        return jax.grad(value)(x)

    np.testing.assert_array_equal(call(jnp.ones(3)), -np.ones(3))


def test_sparse_gradients_are_refused(client, name):
    def call(transformation, params, state):
        jax.jit(lambda g: transformation.update({"w": sparse.BCOO.fromdense(g, nse=3)}, state))(params["w"])

    refusing(client, name, call, "'w' is sparse")


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.complex64, jnp.float8_e4m3fn, jnp.bool_])
def test_other_dtypes_are_refused(client, name, dtype):
    advice = "split_real_and_imaginary" if dtype == jnp.complex64 else "masked"

    def call(transformation, params, state):
        jax.jit(transformation.update)({"w": jnp.ones(3, dtype)}, state)

    refusing(client, name, call, advice)
    with pytest.raises(InvalidArgumentError, match=advice):
        optserve.jax.remote(client, optserve.Adam(), name=f"{name}-2").init({"w": jnp.ones(3, dtype)})


def test_complex_parameters_go_as_two_real_ones(client, name):
    transformation: Any = optax.contrib.split_real_and_imaginary(
        optserve.jax.remote(client, optserve.Sgd(learning_rate=1.0), name=name)
    )
    params = {"w": jnp.ones(3, jnp.complex64)}
    updates, _ = jax.jit(transformation.update)({"w": params["w"] * (1 + 2j)}, transformation.init(params))
    np.testing.assert_array_equal(updates["w"], np.full(3, -1 - 2j, np.complex64))


def test_other_gradients_than_parameters_are_refused(client, name):
    refusing(
        client,
        name,
        lambda transformation, params, state: transformation.update({"v": jnp.ones(3)}, state),
        "no parameter 'v'",
    )
    decayed: Any = optserve.jax.remote(client, optserve.Adam(), name=f"{name}-2", weight_decay=0.1)
    state = decayed.init({"w": jnp.ones(3)})
    with pytest.raises(InvalidArgumentError, match="needs the parameters"):
        jax.jit(decayed.update)({"w": jnp.ones(3)}, state)
    with pytest.raises(InvalidArgumentError, match="different pytrees"):
        jax.jit(decayed.update)({"w": jnp.ones(3)}, state, {"v": jnp.ones(3)})
    with pytest.raises(InvalidArgumentError, match="has shape"):
        jax.jit(decayed.update)({"w": jnp.ones(3)}, state, {"w": jnp.ones(4)})


def test_settings_are_checked(client, name):
    with pytest.raises(InvalidArgumentError, match="takes the diagonal of the Hessian"):
        optserve.jax.remote(client, optserve.Vsgd(), name=name)
    with pytest.raises(InvalidArgumentError, match="Adam itself"):
        optserve.jax.remote(client, optserve.Adam, name=name)  # pyright: ignore[reportArgumentType]
    with pytest.raises(InvalidArgumentError, match="no hyper-parameter 'rho'; it has"):
        optserve.jax.remote(client, optserve.Adam(), name=name, hyperparameters={"rho": 0.5})
    with pytest.raises(InvalidArgumentError, match="no leaves"):
        optserve.jax.remote(client, optserve.Adam(), name=name).init({})
    with pytest.raises(InvalidArgumentError, match="Two leaves have the path 'a/b'"):
        optserve.jax.remote(client, optserve.Adam(), name=name).init({"a/b": jnp.ones(1), "a": {"b": jnp.ones(1)}})
    with pytest.raises(optserve.FailedPreconditionError, match="call init first"):
        _ = optserve.jax.remote(client, optserve.Adam(), name=name).optimizer


def test_an_update_before_init_says_so(client, name):
    transformation: Any = optserve.jax.remote(client, optserve.Adam(), name=name)
    with pytest.raises(optserve.NotFoundError, match="init creates it, before the first update"):
        transformation.update({"w": jnp.ones(3)}, optserve.jax.RemoteState(jnp.int32(0)))
