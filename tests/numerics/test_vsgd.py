"""vSGD where its averages are nearly equal, very different in size, or at their limits."""

import itertools
from typing import Any

import numpy as np
import pytest

import optserve
from optserve_server.numerics.rules import Vsgd

SETTINGS = list(
    itertools.product(
        (1e-9, 1e-6, 1e-2, 1.0),  # eps
        (1.0, 2.0, 10.0, 100.0, 1e4),  # initial_overestimate
        (2, 10, 37),  # initial_steps
        (0.01, 0.5, 10.0, 1e3),  # curvature of the quadratic
    )
)
STEPS = 400


def _settings() -> tuple[np.ndarray, ...]:
    eps, overestimate, initial_steps, curvature = (
        np.array(column, np.float64) for column in zip(*SETTINGS, strict=True)
    )
    return eps, overestimate, initial_steps, curvature


def _by_the_server(dtype: np.dtype, noise: np.ndarray) -> np.ndarray:
    """|x| after each step of x² h / 2 from x = 1, with gradients h (x - noise), one column a setting."""
    eps, overestimate, initial_steps, h = (column.astype(dtype) for column in _settings())
    slots = [np.zeros_like(h) for _ in Vsgd.slots]
    constants = Vsgd().constants(dtype, 1)[3:]
    x, path = np.ones_like(h), []
    rule: Any = Vsgd.update
    for row in noise.astype(dtype):
        update, *slots = rule(
            np.sqrt, h * (x - row), h, *slots, eps, overestimate - dtype.type(1), initial_steps, *constants
        )
        x = x + update
        assert (slots[3] <= 0).any() or (slots[3] >= 1).all()
        path.append(np.abs(x))
    return np.array(path)


def _by_the_equations(noise: np.ndarray) -> np.ndarray:
    """The same in float64, with the slow start as a case of its own."""
    eps, overestimate, initial_steps, h = _settings()
    x = np.ones_like(h)
    g_mean, v_mean, h_mean, tau = (np.zeros_like(h) for _ in range(4))
    path = []
    for turn, row in enumerate(noise, 1):
        g = h * (x - row)
        starting = turn <= initial_steps
        window = np.where(starting, turn, np.maximum(tau, 1))
        g_mean, v_mean, h_mean = (
            (1 - 1 / window) * mean + new / window for mean, new in ((g_mean, g), (v_mean, g * g), (h_mean, h))
        )
        last = turn == initial_steps
        v_mean, h_mean = np.where(last, overestimate * v_mean, v_mean), np.where(last, overestimate * h_mean, h_mean)
        with np.errstate(invalid="ignore"):
            signal = np.where(v_mean > 0, np.minimum(g_mean**2 / v_mean, 1), 0)
        x = np.where(starting, x, x - signal / (h_mean + eps) * g)
        tau = np.where(last, initial_steps, np.where(starting, 0, (1 - signal) * tau + 1))
        path.append(np.abs(x))
    return np.array(path)


@pytest.mark.parametrize("dtype", [np.dtype("f4"), np.dtype("f8")], ids=str)
@pytest.mark.parametrize("spread", [0.0, 1e-3, 0.3])
def test_240_settings_converge_on_quadratics_as_the_equations_do(dtype, spread):
    assert len(SETTINGS) == 240
    noise = spread * np.random.default_rng(1206).standard_normal((STEPS, len(SETTINGS)))
    actual, expected = _by_the_server(dtype, noise), _by_the_equations(noise)
    assert np.isfinite(actual).all()
    assert actual.max() <= 1 + 5 * spread
    # Within the noise rounding decides which way a step goes, so not element by element.
    floor = 1e-6 if dtype == np.dtype("f4") else 1e-14
    assert (actual[-50:].mean(axis=0) <= 1.2 * expected[-50:].mean(axis=0) + floor + spread / 2).all()


@pytest.mark.parametrize("backend", ["numpy", "numba"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_quiet_gradients_after_constant_ones_make_small_updates(backend, dtype):
    with optserve.local_server(backend=backend) as server, optserve.connect(server.target) as client:
        opt, update = client.create_optimizer("quiet", optserve.Vsgd(), {"w": np.zeros(1, dtype)}), 0.0
        for g in [1.0] * 120 + [1e-4] * 4:
            update = opt.step({"w": np.full(1, g, dtype)}, curvature={"w": np.full(1, 0.5, dtype)})["w"][0]
    # With a window of one step and a signal of 1: -g / (h + eps).
    assert update == pytest.approx(-1e-4 / 0.51, rel=1e-2)


@pytest.mark.parametrize(
    ("dtype", "value"),
    [
        *((dtype, value) for dtype in (np.float32, np.float64) for value in (1e-3, 0.999, -2.5, -1e6, -(2.0**24))),
        (np.float32, 2.0**24 + 2),
        (np.float32, 1e30),
        (np.float64, 2.0**53 + 2),
    ],
)
def test_a_window_that_no_step_leaves_behind_is_not_imported(client, name, dtype, value):
    opt = client.create_optimizer(name, optserve.Vsgd(), {"w": np.zeros(3, dtype)})
    state = opt.export_state()
    state.slots["w"]["tau"][1] = value
    with pytest.raises(optserve.InvalidArgumentError, match=r"tau of 'w' is .* at flat index 1"):
        opt.import_state(state)
    for good in (-999_999.0, -3.0, 0.0, 1.0, 7.25, 2.0**24 if dtype is np.float32 else 2.0**53):
        state.slots["w"]["tau"][1] = good
        opt.import_state(state)
