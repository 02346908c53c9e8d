"""Every algorithm on every backend and dtype against the equations, against torch, and against each other."""

from dataclasses import asdict

import numpy as np
import pytest
import torch

from optserve_server.numerics import backends
from optserve_server.numerics.layout import ALL, Layout, Operand, Parameter, Payload
from optserve_server.numerics.rules import RULES, Adadelta
from optserve_server.numerics.settings import Settings
from optserve_server.numerics.staging import Staging
from optserve_server.numerics.state import State
from oracle import ROWS
from simulated_device import load

STEPS = 300
SIZE = 1003  # neither a multiple of a vector register nor of anything else

TOLERANCE = {np.dtype("f4"): 1e-5, np.dtype("f8"): 1e-12}
"""Relative error of the accumulated x, as max |x - oracle| / max |oracle|."""


def gradients(dtype: np.dtype, steps: int = STEPS, size: int = SIZE) -> list[np.ndarray]:
    """Random gradients whose size differs by four orders of magnitude between dimensions; one of them always 0."""
    rng = np.random.default_rng(20121222)
    scale = np.logspace(-2, 2, size)
    scale[size // 2] = 0
    return [(rng.standard_normal(size) * scale).astype(dtype) for _ in range(steps)]


def curvatures(dtype: np.dtype, steps: int = STEPS, size: int = SIZE) -> list[np.ndarray]:
    """Random curvatures of either sign and very different sizes; some are always 0."""
    rng = np.random.default_rng(1988)
    scale = np.logspace(2, -6, size)
    scale[:: size // 10 + 1] = 0
    return [(rng.standard_normal(size) * scale).astype(dtype) for _ in range(steps)]


def accumulate(backend: backends.Backend, rule, given: list[np.ndarray]) -> tuple[np.ndarray, list[np.ndarray]]:
    """The sum of all updates, in float64, and the slots at the end."""
    diagonals = curvatures(given[0].dtype, len(given), given[0].size)
    dtype = given[0].dtype
    layout = Layout((Parameter("x", given[0].shape, dtype),))
    state = State(layout, Settings(rule), backend)
    staging, payload = Staging(state), Payload(layout, ALL)
    x = np.zeros(given[0].shape)
    for step, (g, h) in enumerate(zip(given, diagonals, strict=True)):
        staging.stage(payload, Operand.GRADIENT, 0, g.tobytes(), {})
        if rule.takes_curvature:
            staging.stage(payload, Operand.CURVATURE, 0, h.tobytes(), {})
        state.apply(staging.operands, payload.runs, step)
        state.count(ALL)
        x += staging.updates[dtype]
    return x, [np.array(state.slot(0, slot)) for slot in range(len(rule.slots))]


@pytest.mark.parametrize("dtype", [np.dtype("f4"), np.dtype("f8")], ids=str)
@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_three_hundred_steps_agree_with_the_equations(backend, row, dtype):
    given = gradients(dtype)
    operands = [given, curvatures(dtype)] if row.rule.takes_curvature else [given]
    wide = ([array.astype(np.float64) for array in operand] for operand in operands)
    expected = row.oracle(*wide, **asdict(row.rule))
    actual, _ = accumulate(backend, row.rule, given)
    assert np.abs(actual - expected).max() <= TOLERANCE[dtype] * np.abs(expected).max()


@pytest.fixture
def doubles():
    """torch's own counters and products in float64."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("doubles")
@pytest.mark.parametrize("row", [row for row in ROWS.values() if row.torch_optimizer], ids=lambda row: str(row.rule))
def test_three_hundred_steps_agree_with_torch(backend, row):
    given = gradients(np.dtype("f8"))
    parameter = torch.nn.Parameter(torch.zeros(SIZE, dtype=torch.float64))
    optimizer = row.torch_optimizer([parameter])
    for g in given:
        parameter.grad = torch.from_numpy(g)
        optimizer.step()
    expected = parameter.detach().numpy()
    actual, slots = accumulate(backend, row.rule, given)
    np.testing.assert_allclose(actual, expected, rtol=1e-10, atol=1e-12 * np.abs(expected).max())
    # The slots have torch's names and, but for momentum, torch's values.
    for name, slot in zip(row.rule.slots, slots, strict=True):
        theirs = row.torch_names.get(name, name)
        if theirs and name != "momentum":
            its = optimizer.state[parameter][theirs]
            np.testing.assert_allclose(slot, its.numpy(), rtol=1e-10, atol=1e-300)


@pytest.mark.parametrize("dtype", [np.dtype("f4"), np.dtype("f8")], ids=str)
@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_backends_agree_bit_for_bit(backend, row, dtype):
    given = gradients(dtype, steps=50)
    x, slots = accumulate(backend, row.rule, given)
    reference_x, reference_slots = accumulate(backends.load("numpy"), row.rule, given)
    assert x.tobytes() == reference_x.tobytes()
    assert [slot.tobytes() for slot in slots] == [slot.tobytes() for slot in reference_slots]


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_every_rule_has_a_row(rule):
    assert any(type(row.rule) is rule for row in ROWS.values())


def test_the_numerator_of_adadelta_lags_by_one_step(backend):
    # Algorithm 1 on one dimension, two steps, by hand: RMS[dx]_0 = sqrt(eps).
    rho, eps = 0.5, 0.25
    x, (square_avg, acc_delta) = accumulate(backend, Adadelta(rho=rho, eps=eps), [np.array([2.0]), np.array([1.0])])
    first = -np.sqrt(0.25) / np.sqrt(0.5 * 4 + 0.25) * 2
    second = -np.sqrt(0.5 * first**2 + 0.25) / np.sqrt(0.5 * (0.5 * 4) + 0.5 * 1 + 0.25) * 1
    assert x[0] == pytest.approx(first + second, rel=1e-15)
    assert square_avg[0] == pytest.approx(1.5, rel=1e-15)
    assert acc_delta[0] == pytest.approx(0.5 * 0.5 * first**2 + 0.5 * second**2, rel=1e-15)


def test_the_learning_rate_of_adadelta_leaves_the_state_alone(backend):
    given = gradients(np.dtype("f4"), steps=5)
    whole, slots = accumulate(backend, Adadelta(), given)
    half, half_slots = accumulate(backend, Adadelta(learning_rate=0.5), given)
    assert np.array_equal(half, whole / 2)
    assert all(np.array_equal(a, b) for a, b in zip(slots, half_slots, strict=True))


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_a_gradient_of_zero_from_the_start_moves_nothing(backend, row):
    x, slots = accumulate(backend, row.rule, [np.zeros(5, np.float32)] * 30)
    assert not x.any()
    assert all(np.isfinite(slot).all() for slot in slots)
    if not row.rule.takes_curvature:
        assert not any(slot.any() for slot in slots)


@pytest.mark.parametrize("size", [0, 1, 131_073, 786_431, 786_433, 1_000_003])
def test_the_split_over_threads_changes_no_bit(backend, size):
    rule = ROWS["adadelta"].rule
    dtype = np.dtype("f4")
    g = np.random.default_rng(1).standard_normal(size).astype(dtype)
    results = []
    for threads in (1, 2, 3):
        fresh = load(backend.name, threads)
        staged, slots = g.copy(), [fresh.zeros(size, dtype) for _ in rule.slots]
        for _ in range(2):
            fresh.kernel(type(rule), dtype)(staged, slots, rule.constants(dtype, 1))
        results.append((staged.tobytes(), *(fresh.to_host(slot).tobytes() for slot in slots)))
    assert results[0] == results[1] == results[2]
