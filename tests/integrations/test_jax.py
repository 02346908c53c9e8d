"""`optserve.jax`: optax transformations whose steps a server makes, inside jit and outside."""

import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
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
from client.proxy import proxy
from optserve.errors import AlreadyExistsError, InvalidArgumentError, WrongStepError

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


@dataclass(frozen=True)
class Row:
    """Ours and theirs, with the same formula."""

    ours: Callable[..., optax.GradientTransformation]
    theirs: optax.GradientTransformation


def remote(algorithm: optserve.Algorithm, **settings):
    return partial(optserve.jax.remote, algorithm=algorithm, **settings)


def is_fourth(step: Any, **_extra: Any) -> Any:
    return step % 4 == 3


def is_matrix(params):
    return jax.tree.map(lambda leaf: leaf.ndim == 2, params)


ROWS = {
    "adadelta": Row(remote(optserve.Adadelta()), optax.adadelta(1.0, rho=0.95, eps=1e-6)),
    "adam": Row(remote(optserve.Adam()), optax.adam(1e-3)),
    "adam-rate": Row(remote(optserve.Adam(), learning_rate=0.01), optax.adam(0.01)),
    "adamw": Row(remote(optserve.AdamW(learning_rate=0.01), weight_decay=0.1), optax.adamw(0.01, weight_decay=0.1)),
    "adamw-mask": Row(
        remote(optserve.AdamW(learning_rate=0.01), weight_decay=0.1, mask=is_matrix),
        optax.adamw(0.01, weight_decay=0.1, mask=is_matrix),
    ),
    "sgd-momentum": Row(remote(optserve.SgdMomentum(learning_rate=0.05)), optax.sgd(0.05, momentum=0.9)),
    "nesterov": Row(
        remote(optserve.SgdMomentum(learning_rate=0.05, nesterov=True)), optax.sgd(0.05, momentum=0.9, nesterov=True)
    ),
    "lion": Row(remote(optserve.Lion(learning_rate=1e-3), weight_decay=0.1), optax.lion(1e-3, weight_decay=0.1)),
    "schedule": Row(
        remote(optserve.Adam(), learning_rate=optax.warmup_cosine_decay_schedule(0.0, 0.05, 20, 300)),
        optax.adam(optax.warmup_cosine_decay_schedule(0.0, 0.05, 20, 300)),
    ),
    "schedule-decay": Row(
        remote(optserve.AdamW(), learning_rate=optax.linear_schedule(0.05, 1e-3, 300), weight_decay=0.1),
        optax.adamw(optax.linear_schedule(0.05, 1e-3, 300), weight_decay=0.1),
    ),
    "rmsprop": Row(
        remote(optserve.Rmsprop(momentum=0.5)), optax.rmsprop(0.01, decay=0.99, eps_in_sqrt=False, momentum=0.5)
    ),
}


def assert_close(ours, theirs, tolerance: float):
    """Each leaf is as near as rounding allows, relative to the largest element."""
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for mine, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert (mine.shape, mine.dtype) == (other.shape, other.dtype)
        expected = np.asarray(other, np.float64)
        assert np.abs(np.asarray(mine, np.float64) - expected).max() <= tolerance * max(np.abs(expected).max(), 1e-3)


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_three_hundred_steps_inside_jit_are_those_of_optax(client, name, row):
    with jax.enable_x64(True):
        transformation = row.ours(client, name=name)
        ours, state = train(transformation, tree(jnp.float64), dtype=jnp.float64)
        theirs, _ = train(row.theirs, tree(jnp.float64), dtype=jnp.float64)
        assert_close(ours, theirs, 1e-9)
        assert int(state.count) == STEPS == transformation.optimizer.current_step


@pytest.mark.parametrize("row", [ROWS["adam"], ROWS["adamw"]], ids=["adam", "adamw"])
def test_float32_is_that_of_optax_but_for_rounding(client, name, row):
    ours, _ = train(row.ours(client, name=name), tree(), 100)
    theirs, _ = train(row.theirs, tree(), 100)
    assert_close(ours, theirs, 2e-5)


def test_a_chain_clips_and_decays_as_that_of_optax(client, name):
    def chain(last):
        return optax.chain(optax.clip_by_global_norm(0.1), optax.add_decayed_weights(1e-2), last)

    ours, _ = train(chain(optserve.jax.remote(client, optserve.Adam(), name=name)), tree(), 100)
    theirs, _ = train(chain(optax.adam(1e-3)), tree(), 100)
    assert_close(ours, theirs, 2e-5)


def test_a_scan_makes_all_its_steps(client, name):
    transformation: Any = optserve.jax.remote(client, optserve.SgdMomentum(learning_rate=0.05), name=name)

    @jax.jit
    def epoch(params, state, xs):
        def step(carry, x):
            params, state = carry
            updates, state = transformation.update(jax.grad(loss)(params, x), state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, state), xs)[0]

    ours, state = epoch(tree(), transformation.init(tree()), batches()[:20])
    theirs, _ = train(optax.sgd(0.05, momentum=0.9), tree(), 20)
    assert_close(ours, theirs, 1e-5)
    assert int(state.count) == 20 == client.optimizer(name).current_step


def test_accumulation_makes_one_step_for_several_gradients(client, name):
    ours, _ = train(
        optax.chain(
            optax.apply_every(4),
            optax.scale(1 / 4),
            optax.transforms.conditionally_mask(optserve.jax.remote(client, optserve.Adam(), name=name), is_fourth),
        ),
        tree(),
        40,
    )
    theirs, _ = train(optax.MultiSteps(optax.adam(1e-3), every_k_schedule=4).gradient_transformation(), tree(), 40)
    assert_close(ours, theirs, 1e-5)
    assert client.optimizer(name).current_step == 10


def test_a_transformation_that_throws_steps_away_is_refused(client, name):
    """MultiSteps computes the step of every gradient, and uses that of the last."""
    transformation: Any = optax.MultiSteps(optserve.jax.remote(client, optserve.Adam(), name=name), every_k_schedule=4)
    params, update = tree(), jax.jit(transformation.update)
    _, state = update(params, transformation.init(params))
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"as optax\.MultiSteps does"):
        jax.block_until_ready(update(params, state))


def test_a_gradient_that_is_not_finite_can_be_passed_over(client, name):
    transformation: Any = optax.apply_if_finite(optserve.jax.remote(client, optserve.Adam(), name=name), 5)
    params = tree()
    state = transformation.init(params)
    update = jax.jit(transformation.update)
    bad = jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.nan), params)
    updates, state = update(bad, state, params)
    assert all(not leaf.any() for leaf in jax.tree.leaves(updates))
    assert client.optimizer(name).current_step == 0
    update(params, state, params)
    assert client.optimizer(name).current_step == 1


def test_parts_of_a_model_have_optimizers_of_their_own(client, name):
    def labels(params):
        return jax.tree.map(lambda leaf: "matrix" if leaf.ndim == 2 else "rest", params)

    ours, _ = train(
        optax.multi_transform(
            {
                "matrix": optserve.jax.remote(client, optserve.Adam(), name=f"{name}-a"),
                "rest": optserve.jax.remote(client, optserve.Sgd(), name=f"{name}-b"),
            },
            labels,
        ),
        tree(),
        50,
    )
    theirs, _ = train(optax.multi_transform({"matrix": optax.adam(1e-3), "rest": optax.sgd(0.01)}, labels), tree(), 50)
    assert_close(ours, theirs, 1e-5)


def test_a_learning_rate_is_injected(client, name):
    def made(factory, **settings):
        return optax.inject_hyperparams(factory)(
            **settings, learning_rate=0.1, weight_decay=optax.linear_schedule(0.0, 0.5, 5)
        )

    pairs: Any = (
        made(optserve.jax.remote, target=client, algorithm=optserve.AdamW(), name=name),
        made(optax.adamw),
    )
    ends = []
    for transformation in pairs:
        params, state = tree(), transformation.init(tree())
        update = jax.jit(transformation.update)
        for step in range(10):
            # As a plateau scheduler does it.
            state.hyperparams["learning_rate"] = jnp.float32(0.1 / (step + 1))
            updates, state = update(jax.grad(loss)(params, batches()[step]), state, params)
            params: Any = optax.apply_updates(params, updates)
        ends.append(params)
    assert_close(ends[0], ends[1], 2e-5)
    assert client.optimizer(name).current_step == 10


def test_other_hyperparameters_change_from_step_to_step(client, name):
    transformation: Any = optserve.jax.remote(
        client, optserve.Momentum(learning_rate=1.0), name=name,
        hyperparameters={"rho": lambda count: jnp.where(count < 2, 0.0, 0.5)},
    )  # fmt: skip
    state, update, seen = transformation.init(jnp.zeros(1)), jax.jit(transformation.update), []
    for _ in range(4):
        updates, state = update(jnp.ones(1), state)
        seen.append(float(updates[0]))
    assert seen == [-1.0, -1.0, -1.5, -1.75]
    bad: Any = optserve.jax.remote(client, optserve.Sgd(), name=f"{name}-2", learning_rate=lambda count: -1.0)
    with pytest.raises(InvalidArgumentError, match="learning_rate"):
        bad.update(jnp.ones(1), bad.init(jnp.zeros(1)))


def test_the_server_clips(client, name):
    transformation: Any = optserve.jax.remote(
        client, optserve.Sgd(learning_rate=1.0), name=name, clipping=optserve.Clipping(global_norm=1.0)
    )
    params = {"w": jnp.zeros(2)}
    updates, _ = transformation.update({"w": jnp.array([30.0, 40.0])}, transformation.init(params))
    np.testing.assert_allclose(updates["w"], [-0.6, -0.8], rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_floats_have_their_state_in_float32(client, name, dtype):
    transformation: Any = optserve.jax.remote(client, optserve.Adam(), name=name)
    params = {"w": jnp.ones(3, dtype), "b": jnp.ones(2)}
    state = transformation.init(params)
    updates, state = jax.jit(transformation.update)(params, state, params)
    assert (updates["w"].dtype, updates["b"].dtype) == (dtype, jnp.float32)
    np.testing.assert_array_equal(updates["w"], jnp.full(3, -1e-3, dtype))
    assert {str(slot.dtype) for slot in transformation.optimizer.export_state().slots["w"].values()} == {"float32"}


def test_bfloat16_on_the_wire_changes_no_bit(client, name):
    params = tree(jnp.bfloat16)
    native, _ = train(optserve.jax.remote(client, optserve.Adam(), name=f"{name}-a"), params, 30, jnp.bfloat16)
    halved, _ = train(
        optserve.jax.remote(client, optserve.Adam(), name=f"{name}-b", wire_dtype="bfloat16"), params, 30, jnp.bfloat16
    )
    for mine, other in zip(jax.tree.leaves(native), jax.tree.leaves(halved), strict=True):
        np.testing.assert_array_equal(mine, other)


def test_names_are_the_paths_of_the_leaves(client, name):
    transformation: Any = optserve.jax.remote(client, optserve.Sgd(), name=name)
    transformation.init(tree())
    assert set(transformation.optimizer.export_state().parameters) == {
        "layers/0/bias", "layers/0/kernel", "layers/1/bias", "layers/1/kernel", "scale",
    }  # fmt: skip


def test_a_single_array_is_a_pytree_too(client, name):
    transformation: Any = optserve.jax.remote(client, optserve.Sgd(learning_rate=0.5), name=name)
    state = transformation.init(jnp.zeros(3))
    updates, _ = jax.jit(transformation.update)(jnp.ones(3), state)
    np.testing.assert_array_equal(updates, np.full(3, -0.5, np.float32))


def test_the_eager_helper_steps_any_optimizer(client, name):
    params = {"a": [jnp.ones(3)], "b": jnp.ones(2, jnp.bfloat16)}
    opt = client.create_optimizer(name, optserve.Sgd(learning_rate=0.5), optserve.jax.specs(params))
    updates = optserve.jax.step(opt, params)
    moved: Any = optax.apply_updates(params, updates)
    np.testing.assert_array_equal(moved["a"][0], np.full(3, 0.5))
    assert updates["b"].dtype == jnp.bfloat16
    with pytest.raises(InvalidArgumentError, match=r"there use optserve\.jax\.remote"):
        jax.jit(partial(optserve.jax.step, opt))(params)


def test_the_documentation_is_right(client, name):
    text = (Path(__file__).parents[2] / "docs" / "jax.md").read_text()
    shown, accumulating = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    scope: dict[str, Any] = {}
    exec(shown, scope)  # noqa: S102
    assert int(scope["state"].count) == 100
    assert scope["value"] < 0.26
    scope["tx"] = optserve.jax.remote(client, optserve.Adam(), name=name)
    exec(accumulating, scope)  # noqa: S102
    params, update = tree(), jax.jit(scope["accumulating"].update)
    state = scope["accumulating"].init(params)
    for _ in range(4):
        _, state = update(params, state)
    assert client.optimizer(name).current_step == 1


# Exactly once.


def test_tracing_makes_no_optimizer_and_no_step(client, name):
    transformation: Any = optserve.jax.remote(client, optserve.Adam(), name=name)
    jax.eval_shape(transformation.init, tree())
    with pytest.raises(optserve.NotFoundError):
        client.optimizer(name)
    state = transformation.init(tree())
    jax.jit(transformation.update).lower(tree(), state, tree()).compile()
    assert client.optimizer(name).current_step == 0


def test_a_state_serves_one_step(client, name):
    transformation: Any = optserve.jax.remote(client, optserve.Adam(), name=name)
    params, update = tree(), jax.jit(transformation.update)
    state = transformation.init(params)
    _, newer = update(params, state)
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"state is of step 0, and .* has made 1 steps"):
        jax.block_until_ready(update(params, state))
    assert isinstance(transformation.last_error, WrongStepError)
    # Outside of jit the error is itself.
    with pytest.raises(WrongStepError, match="restore a checkpoint"):
        transformation.update(params, state)
    # An error does no harm to later programs.
    jax.block_until_ready(update(params, newer))
    assert transformation.last_error is None
    assert client.optimizer(name).current_step == 2


def test_training_does_not_begin_with_old_slots(client, name):
    transformation: Any = optserve.jax.remote(client, optserve.Adam(), name=name)
    _, state = transformation.update(tree(), transformation.init(tree()))
    with pytest.raises(AlreadyExistsError):
        transformation.init(tree())
    with pytest.raises(AlreadyExistsError):
        optserve.jax.remote(client, optserve.Adam(), name=name).init(tree())
    resumed: Any = optserve.jax.remote(client, optserve.Adam(), name=name, resume=True)
    assert int(resumed.init(tree()).count) == int(state.count) == 1
    with pytest.raises(InvalidArgumentError, match="beta1"):
        optserve.jax.remote(client, optserve.Adam(beta1=0.5), name=name, resume=True).init(tree())


def test_a_checkpoint_goes_back(client, name):
    transformation: Any = optserve.jax.remote(client, optserve.Adam(), name=name, resume=True)
    params, update = tree(), jax.jit(transformation.update)
    _, state = update(params, transformation.init(params))
    transformation.optimizer.save_checkpoint("one")
    first, newer = update(params, state)
    jax.block_until_ready(update(params, newer))
    transformation.optimizer.restore_checkpoint("one")
    second, _ = update(params, transformation.init(params))
    for mine, other in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_array_equal(mine, other)


def test_a_state_goes_on_in_another_process(server, client, name):
    params = tree()
    transformation: Any = optserve.jax.remote(client, optserve.Adam(), name=name)
    _, state = transformation.update(params, transformation.init(params))
    with optserve.connect(server.target) as another:
        elsewhere = optserve.jax.remote(another, optserve.Adam(), name=name)
        _, state = jax.jit(elsewhere.update)(params, optserve.jax.RemoteState(jnp.asarray(np.asarray(state.count))))
        assert int(state.count) == 2


def test_an_address_will_do(server, name):
    transformation: Any = optserve.jax.remote(server.target, optserve.Adam(), name=name)
    _, state = transformation.update(tree(), transformation.init(tree()))
    assert int(state.count) == 1


@pytest.fixture
def proxied(server, client, name):
    """A proxy, and a client that gives a step 3 seconds."""
    # The server compiles the method at its first step.
    transformation: Any = optserve.jax.remote(client, optserve.Adam(), name=f"{name}-first")
    transformation.update(tree(), transformation.init(tree()))
    config = optserve.ClientConfig(step_timeout_s=3.0, transport="grpc")
    with proxy(server.target) as between, optserve.connect(between.target, config) as connected:
        yield between, connected


def interrupted(proxied, name):
    """A transformation whose second step was applied, and its reply lost; with that step's arguments."""
    between, client = proxied
    transformation: Any = optserve.jax.remote(client, optserve.Adam(), name=name)
    params, update = tree(), jax.jit(transformation.update)
    _, state = jax.block_until_ready(update(params, transformation.init(params)))
    between.refuse = True
    between.cut_after("down", 1)
    with pytest.raises(jax.errors.JaxRuntimeError, match="UnreachableError"):
        jax.block_until_ready(update(params, state))
    between.refuse = False
    assert isinstance(transformation.last_error, optserve.UnreachableError)
    return transformation, update, params, state


def test_an_interrupted_step_is_made_once_when_it_is_run_once_more(proxied, client, name):
    transformation, update, params, state = interrupted(proxied, name)
    assert client.optimizer(name).current_step == 2
    updates, state = update(params, state)
    assert int(state.count) == 2 == client.optimizer(name).current_step
    assert transformation.last_error is None
    other: Any = jax.jit(optserve.jax.remote(client, optserve.Adam(), name=f"{name}-2", resume=True).update)
    begin: Any = optserve.jax.remote(client, optserve.Adam(), name=f"{name}-2").init
    expected, state = other(params, other(params, begin(params))[1])
    for mine, theirs in zip(jax.tree.leaves(updates), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_an_interrupted_step_is_not_taken_for_one_with_other_gradients(proxied, client, name):
    transformation, update, params, state = interrupted(proxied, name)
    other = jax.tree.map(lambda leaf: leaf + 1, params)
    for _ in range(2):
        with pytest.raises(jax.errors.JaxRuntimeError):
            jax.block_until_ready(update(other, state))
        assert isinstance(transformation.last_error, optserve.StepInDoubtError | WrongStepError)
    assert client.optimizer(name).current_step == 2
    # Its own gradients get its own reply.
    _, state = update(params, state)
    assert int(state.count) == 2 == client.optimizer(name).current_step


# Errors at trace time, before anything is sent.


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


def test_a_value_that_the_server_refuses_changes_nothing(client, name):
    transformation: Any = optserve.jax.remote(client, optserve.Adam(), name=name)
    params, update = {"w": jnp.ones(3)}, jax.jit(transformation.update)
    state = transformation.init(params)
    with pytest.raises(jax.errors.JaxRuntimeError, match="is nan at flat index 0"):
        jax.block_until_ready(update({"w": jnp.full(3, jnp.nan)}, state))
    assert isinstance(transformation.last_error, InvalidArgumentError)
    _, state = update(params, state)
    assert int(state.count) == 1
