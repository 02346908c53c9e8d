"""Each step of `optserve.jax.remote` is made exactly once, whatever happens to a program of JAX."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optserve
import optserve.jax
from client.proxy import proxy
from integrations.jax_networks import tree
from optserve.errors import AlreadyExistsError, InvalidArgumentError, WrongStepError


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
    resumed: Any = optserve.jax.remote(client, optserve.Adam(), name=name, if_exists="resume")
    assert int(resumed.init(tree()).count) == int(state.count) == 1


def test_if_exists_decides_about_the_optimizer_of_that_name(client, name):
    made: Any = partial(optserve.jax.remote, client, name=name)
    first: Any = made(optserve.Adam())
    first.update(tree(), first.init(tree()))
    with pytest.raises(AlreadyExistsError, match="if_exists='resume' goes on"):
        made(optserve.Adam()).init(tree())
    resumed = made(optserve.Adam(beta1=0.5), if_exists="resume", clipping=optserve.Clipping(global_norm=1.0))
    assert int(resumed.init(tree()).count) == 1
    assert client.optimizer(name).algorithm == optserve.Adam(beta1=0.5), "the settings are those given last"
    assert client.optimizer(name).clipping == optserve.Clipping(global_norm=1.0)
    with pytest.raises(InvalidArgumentError, match="adam"):
        made(optserve.Sgd(), if_exists="resume").init(tree())
    with pytest.raises(InvalidArgumentError, match="parameters of other names"):
        made(optserve.Adam(), if_exists="resume").init({"w": jnp.ones(3)})
    assert int(made(optserve.Sgd(), if_exists="replace").init({"w": jnp.ones(3)}).count) == 0
    assert client.optimizer(name).algorithm == optserve.Sgd()
    with pytest.raises(InvalidArgumentError, match="if_exists is 'error', 'resume' or 'replace', not True"):
        made(optserve.Sgd(), if_exists=True)


def test_a_checkpoint_goes_back(client, name):
    transformation: Any = optserve.jax.remote(client, optserve.Adam(), name=name, if_exists="resume")
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
    other: Any = jax.jit(optserve.jax.remote(client, optserve.Adam(), name=f"{name}-2", if_exists="resume").update)
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


def test_a_transformation_that_throws_steps_away_is_refused(client, name):
    """MultiSteps computes the step of every gradient, and uses that of the last."""
    transformation: Any = optax.MultiSteps(optserve.jax.remote(client, optserve.Adam(), name=name), every_k_schedule=4)
    params, update = tree(), jax.jit(transformation.update)
    _, state = update(params, transformation.init(params))
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"as optax\.MultiSteps does"):
        jax.block_until_ready(update(params, state))


def test_a_value_that_the_server_refuses_changes_nothing(client, name):
    transformation: Any = optserve.jax.remote(client, optserve.Adam(), name=name)
    params, update = {"w": jnp.ones(3)}, jax.jit(transformation.update)
    state = transformation.init(params)
    with pytest.raises(jax.errors.JaxRuntimeError, match="is nan at flat index 0"):
        jax.block_until_ready(update({"w": jnp.full(3, jnp.nan)}, state))
    assert isinstance(transformation.last_error, InvalidArgumentError)
    _, state = update(params, state)
    assert int(state.count) == 1


def donating(transformation: Any) -> Any:
    @partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, gradient):
        updates, state = transformation.update({"w": gradient}, state, params)
        return optax.apply_updates(params, updates), state

    return step


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_an_error_leaves_the_arrays_of_a_program_that_donates_them(client, name, decay):
    made: Any = optserve.jax.remote(client, optserve.Adam(learning_rate=0.1), name=name, weight_decay=decay)
    transformation = made.keeping_errors()
    params, step = {"w": jnp.ones(3)}, donating(transformation)
    state = transformation.init(params)
    params, state = step(params, state, jnp.ones(3))
    transformation.check()
    before = np.array(params["w"])
    params, state = step(params, state, jnp.full(3, jnp.nan))
    np.testing.assert_array_equal(params["w"], before)
    assert int(state.count) == 1
    with pytest.raises(InvalidArgumentError, match="is nan at flat index 0"):
        transformation.check()
    transformation.check()
    params, state = step(params, state, jnp.ones(3))
    transformation.check()
    assert int(state.count) == 2 == client.optimizer(name).current_step
    assert (np.array(params["w"]) < before).all()


def test_an_error_that_is_kept_is_not_passed_over(client, name):
    made: Any = optserve.jax.remote(client, optserve.Adam(), name=name)
    transformation = made.keeping_errors()
    params, step = {"w": jnp.ones(3)}, donating(transformation)
    params, state = step(params, transformation.init(params), jnp.full(3, jnp.nan))
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"check\(\) was not called.*is nan"):
        jax.block_until_ready(step(params, state, jnp.ones(3)))
    assert client.optimizer(name).current_step == 0
    # Outside of jit an error is its own.
    params = {"w": jnp.ones(3)}
    with pytest.raises(InvalidArgumentError, match="is nan"):
        transformation.update({"w": jnp.full(3, jnp.nan)}, optserve.jax.RemoteState(jnp.int32(0)), params)


def test_an_interrupted_step_of_a_donating_program_is_made_once(proxied, client, name):
    between, shaky = proxied
    made: Any = optserve.jax.remote(shaky, optserve.Adam(), name=name)
    transformation = made.keeping_errors()
    params, step = {"w": jnp.ones(3)}, donating(transformation)
    params, state = step(params, transformation.init(params), jnp.ones(3))
    transformation.check()
    between.refuse = True
    between.cut_after("down", 1)
    params, state = step(params, state, jnp.ones(3))
    with pytest.raises(optserve.UnreachableError):
        transformation.check()
    between.refuse = False
    assert client.optimizer(name).current_step == 2
    params, state = step(params, state, jnp.ones(3))
    transformation.check()
    assert int(state.count) == 2 == client.optimizer(name).current_step
