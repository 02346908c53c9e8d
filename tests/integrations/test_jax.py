"""`optserve.jax.remote` computes what optax does, in jit, scan, chains and with schedules."""

import re
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

import optserve
import optserve.jax
from integrations.jax_networks import STEPS, assert_close, batches, loss, train, tree
from optserve.errors import InvalidArgumentError


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
    shown, accumulating, donating = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    scope: dict[str, Any] = {}
    exec(shown, scope)  # noqa: S102
    assert int(scope["state"].count) == 100
    assert scope["value"] < 0.26
    scope.update(client=client, params=jax.tree.map(jnp.copy, scope["params"]))
    exec(donating, scope)  # noqa: S102
    assert int(scope["state"].count) == 1
    client.delete_optimizer("donating")
    scope["tx"] = optserve.jax.remote(client, optserve.Adam(), name=name)
    exec(accumulating, scope)  # noqa: S102
    params, update = tree(), jax.jit(scope["accumulating"].update)
    state = scope["accumulating"].init(params)
    for _ in range(4):
        _, state = update(params, state)
    assert client.optimizer(name).current_step == 1
