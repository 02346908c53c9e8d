"""Our methods against those of optax, in float64, where the formulas agree; and how far apart they are where not."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optserve

STEPS = 300
SIZE = 1003


@dataclass(frozen=True)
class Row:
    """A method of the service, and the optax transformation with the same formula.

    Attributes:
        algorithm: Ours.
        theirs: Makes theirs.
        begin: Value of all slots before the first step, where optax does not begin at 0.
    """

    algorithm: optserve.Algorithm
    theirs: Callable[[], optax.GradientTransformation]
    begin: float = 0.0


ROWS = {
    "adadelta": Row(optserve.Adadelta(rho=0.9, eps=1e-4), lambda: optax.adadelta(1.0, rho=0.9, eps=1e-4)),
    "adadelta-rate": Row(
        optserve.Adadelta(learning_rate=0.3), lambda: optax.adadelta(0.3, rho=0.95, eps=1e-6, weight_decay=0.0)
    ),
    # optax has eps inside the root, so they agree only where it has no effect.
    "adagrad": Row(
        optserve.Adagrad(learning_rate=0.1, eps=1e-150),
        lambda: optax.adagrad(0.1, initial_accumulator_value=0.0, eps=0.0),
    ),
    "adagrad-begin": Row(
        optserve.Adagrad(learning_rate=0.1, eps=1e-150), lambda: optax.adagrad(0.1, eps=0.0), begin=0.1
    ),
    "sgd": Row(optserve.Sgd(learning_rate=0.05), lambda: optax.sgd(0.05)),
    "sgd-momentum": Row(optserve.SgdMomentum(learning_rate=0.05), lambda: optax.sgd(0.05, momentum=0.9)),
    "momentum": Row(optserve.Momentum(learning_rate=0.05, rho=0.8), lambda: optax.sgd(0.05, momentum=0.8)),
    "sgd-nesterov": Row(
        optserve.SgdMomentum(learning_rate=0.05, momentum=0.8, nesterov=True),
        lambda: optax.sgd(0.05, momentum=0.8, nesterov=True),
    ),
    "adam": Row(optserve.Adam(), lambda: optax.adam(1e-3)),
    "adam-other": Row(
        optserve.Adam(learning_rate=0.05, beta1=0.5, beta2=0.9, eps=1e-3),
        lambda: optax.adam(0.05, b1=0.5, b2=0.9, eps=1e-3),
    ),
    "adamw": Row(optserve.AdamW(learning_rate=0.01), lambda: optax.adamw(0.01, weight_decay=0.0)),
    "fed-adam": Row(optserve.FedAdam(bias_correction=True), lambda: optax.adam(0.1, b1=0.9, b2=0.99, eps=1e-3)),
    # Nesterov's momentum is constant in optax; so is ours when its warm-up is over at once.
    "nadam": Row(optserve.Nadam(momentum_decay=1e6), lambda: optax.nadam(2e-3)),
    "nadamw": Row(
        optserve.Nadam(learning_rate=0.05, beta1=0.8, beta2=0.9, eps=1e-4, momentum_decay=1e6),
        lambda: optax.nadamw(0.05, b1=0.8, b2=0.9, eps=1e-4, weight_decay=0.0),
    ),
    "rmsprop": Row(
        optserve.Rmsprop(learning_rate=0.003, rho=0.9, eps=1e-6, momentum=0.8),
        lambda: optax.rmsprop(0.003, decay=0.9, eps=1e-6, eps_in_sqrt=False, momentum=0.8),
    ),
    "rmsprop-eps-outside": Row(
        optserve.WindowedRms(learning_rate=0.01, rho=0.9, eps=0.0, outer_eps=1e-3),
        lambda: optax.rmsprop(0.01, decay=0.9, eps=1e-3, eps_in_sqrt=False),
    ),
    "rmsprop-eps-inside": Row(
        optserve.WindowedRms(learning_rate=0.01, rho=0.9, eps=1e-6),
        lambda: optax.rmsprop(0.01, decay=0.9, eps=1e-6),
    ),
    # E[g²] − E[g]² cancels in the first steps, where small differences of rounding become large without a large eps.
    "centered-rmsprop": Row(
        optserve.CenteredRmsprop(learning_rate=0.01, rho=0.9, eps=1e-3, momentum=0.5),
        lambda: optax.rmsprop(0.01, decay=0.9, eps=1e-3, centered=True, eps_in_sqrt=False, momentum=0.5),
    ),
    "lion": Row(optserve.Lion(), lambda: optax.lion(1e-4, weight_decay=0.0)),
    "lion-other": Row(
        optserve.Lion(learning_rate=0.1, beta1=0.5, beta2=0.8),
        lambda: optax.lion(0.1, b1=0.5, b2=0.8, weight_decay=0.0),
    ),
    "yogi": Row(optserve.Yogi(bias_correction=True), lambda: optax.yogi(0.01), begin=1e-6),
    "yogi-other": Row(
        optserve.Yogi(learning_rate=0.1, beta1=0.5, beta2=0.9, eps=1e-5, bias_correction=True),
        lambda: optax.yogi(0.1, b1=0.5, b2=0.9, eps=1e-5),
        begin=1e-6,
    ),
}


@pytest.fixture(autouse=True)
def _float64():
    """Float64 in JAX, for these tests alone."""
    with jax.enable_x64(True):
        yield


def gradients() -> list[np.ndarray]:
    """Random gradients whose size differs by four orders of magnitude between dimensions; one of them always 0."""
    rng = np.random.default_rng(20121222)
    scale = np.logspace(-2, 2, SIZE)
    scale[SIZE // 2] = 0
    return [rng.standard_normal(SIZE) * scale for _ in range(STEPS)]


def ours(client: optserve.Client, name: str, row: Row, x: np.ndarray) -> np.ndarray:
    """The parameter after all steps of the service."""
    opt = client.create_optimizer(name, row.algorithm, {"x": x})
    if row.begin:
        state = opt.export_state()
        slots = {"x": {slot: np.full(SIZE, row.begin) for slot in state.slots["x"]}}
        opt.import_state(replace(state, slots=slots))
    for gradient in gradients():
        x = x + opt.step({"x": gradient})["x"]
    client.delete_optimizer(name)
    return x


def theirs(transformation: optax.GradientTransformation, x: np.ndarray) -> np.ndarray:
    """The parameter after all steps of optax."""

    @jax.jit
    def step(x, state, gradient):
        updates, state = transformation.update(gradient, state, x)
        return optax.apply_updates(x, updates), state

    now, state = jnp.asarray(x), transformation.init(jnp.asarray(x))
    for gradient in gradients():
        now, state = step(now, state, gradient)
    return np.asarray(now)


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_three_hundred_steps_agree_with_optax(client, name, row):
    x = np.zeros(SIZE)
    expected = theirs(row.theirs(), x)
    assert expected.dtype == np.float64
    np.testing.assert_allclose(ours(client, name, row, x), expected, rtol=1e-10, atol=1e-12 * np.abs(expected).max())


def test_a_hosted_adamw_decays_as_that_of_optax(client, name):
    x = np.linspace(-1, 1, SIZE)
    expected = theirs(optax.adamw(0.01, weight_decay=0.1), x)
    opt = client.create_optimizer(
        name, optserve.AdamW(learning_rate=0.01), {"x": x}, hosted=True, weight_decay=0.01 * 0.1
    )
    for gradient in gradients():
        opt.step({"x": gradient}, reply="nothing")
    pulled = opt.pull_parameters()
    assert pulled is not None
    np.testing.assert_allclose(pulled.arrays["x"], expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("algorithm", "transformation"),
    [
        pytest.param(optserve.Adagrad(learning_rate=0.1, eps=1e-2), optax.adagrad(0.1, eps=1e-2), id="adagrad"),
        pytest.param(optserve.Nadam(), optax.nadam(2e-3), id="nadam"),
        pytest.param(optserve.Yogi(), optax.yogi(0.01), id="yogi"),
        pytest.param(optserve.Rmsprop(rho=0.9, eps=1e-2), optax.rmsprop(0.01, eps=1e-2), id="rmsprop"),
    ],
)
def test_where_the_documentation_says_that_optax_differs_it_does(client, name, algorithm, transformation):
    x = np.zeros(SIZE)
    expected = theirs(transformation, x)
    assert np.abs(ours(client, name, Row(algorithm, lambda: transformation), x) - expected).max() > 1e-5
