"""What the shared tests do not say of Adam and its relatives: exact signs, and constants at steps of every size."""

import math

import numpy as np
import pytest

from optserve_server.numerics import backends
from optserve_server.numerics.rules import (
    Adam,
    AdamW,
    CenteredRmsprop,
    FedAdam,
    Lion,
    Nadam,
    Rule,
    SgdMomentum,
    Yogi,
)
from optserve_server.numerics.rules.base import NUMBERS, Given

F4, F8 = np.dtype("f4"), np.dtype("f8")
FAR = 1 << 62
"""More steps than a counter comes to in practice."""


def step(backend: backends.Backend, rule: Rule, gradient: np.ndarray, *slots: np.ndarray, counter: int = 1):
    """One step of the kernel: (update, slots)."""
    staged, dtype = gradient.copy(), gradient.dtype
    made = [backend.zeros(slot.size, dtype) for slot in slots]
    for target, values in zip(made, slots, strict=True):
        backend.fill(target, values)
    backend.kernel(type(rule), dtype)(staged, made, rule.constants(dtype, counter))
    return staged, [backend.to_host(slot) for slot in made]


@pytest.mark.parametrize("dtype", [F4, F8], ids=str)
def test_the_sign_of_lion_is_exact_for_the_smallest_and_the_largest(backend, dtype):
    numbers = np.finfo(dtype)
    least, tiny = float(numbers.smallest_subnormal), float(numbers.tiny)
    edges = [least, 2 * least, 3 * least, tiny - least, tiny, tiny + least, 2 * tiny, tiny / numbers.eps]
    sizes = np.array([0, *edges, 1e-45, 1e-38, 1e-30, 1e-8, 1, 1e30, numbers.max], dtype)
    every_power = np.ldexp(dtype.type(1), np.arange(numbers.minexp - numbers.nmant, numbers.maxexp))
    sizes = np.concatenate([sizes, every_power.astype(dtype)])
    gradient = np.concatenate([sizes, -sizes])
    update, _ = step(backend, Lion(learning_rate=0.5, beta1=0.0), gradient, np.zeros_like(gradient))
    assert update.tolist() == (-0.5 * np.sign(gradient)).tolist()


@pytest.mark.parametrize("dtype", [F4, F8], ids=str)
def test_the_sign_of_yogi_is_exact_where_squares_differ_by_one_digit(backend, dtype):
    least_root = math.sqrt(np.finfo(dtype).smallest_subnormal)
    g = np.array([0, least_root, 3 * least_root, 1e3 * least_root, 1e-18, 1e-9, 1.0, 3.0, 1e9, 1e18], dtype)
    for v in (np.nextafter(g * g, dtype.type(0)), g * g, np.nextafter(g * g, dtype.type(np.inf))):
        _, (_, made) = step(backend, Yogi(beta2=0.75), g, np.zeros_like(g), v)
        np.testing.assert_array_equal(made, v - dtype.type(0.25) * (np.sign(v - g * g) * (g * g)))


def test_a_variance_that_rounding_leaves_below_zero_counts_as_zero(backend):
    # As after very many steps with the same gradient.
    g = np.array([0.1, 0.1], F4)
    square_avg = np.nextafter(g * g, F4.type(0)) * F4.type(1 - 1e-6)
    rule = CenteredRmsprop(learning_rate=1.0, eps=0.25)
    update, slots = step(backend, rule, g, square_avg, np.zeros_like(g), g)
    assert (slots[0] - slots[2] ** 2 < 0).all()
    np.testing.assert_allclose(update, -g / 0.25, rtol=1e-6)


def test_a_first_gradient_is_the_buffer_whatever_was_there(backend):
    rule = SgdMomentum(learning_rate=1.0, dampening=0.5)
    update, (buffer,) = step(backend, rule, np.array([2.0]), np.array([7.0]))
    assert (update.tolist(), buffer.tolist()) == ([-2.0], [2.0])
    update, (buffer,) = step(backend, rule, np.array([2.0]), buffer, counter=2)
    assert buffer.tolist() == [0.9 * 2 + 0.5 * 2]


@pytest.mark.parametrize("decay", [0.0, 1e-9, 1e-4, 0.004, 0.1, 0.4, 3.0, 1e30])
@pytest.mark.parametrize("beta1", [0.0, 0.5, 0.9, 0.999, 1 - 1e-9])
def test_the_product_of_nadam_is_that_of_its_factors_at_every_step(decay, beta1):
    rule, product = Nadam(beta1=beta1, momentum_decay=decay), 1.0
    for turn in range(1, 6000):
        product *= rule.momentum_at(turn)
        assert math.isclose(rule.momentum_product(turn), product, rel_tol=1e-11, abs_tol=2.0**-54), turn
    assert rule.momentum_product(FAR) == 0.0


def test_the_product_does_not_depend_on_the_steps_that_were_asked_for_before():
    rule = Nadam(momentum_decay=0.1234)
    late_first = [rule.scalars(turn) for turn in range(3000, 0, -7)]
    assert [rule.scalars(turn) for turn in sorted(range(3000, 0, -7))] == late_first[::-1]


@pytest.mark.parametrize("rule", [Adam(), Nadam(), FedAdam(bias_correction=True), Yogi(bias_correction=True)], ids=str)
def test_very_late_steps_have_no_correction(rule):
    assert rule.scalars(FAR) == rule.scalars(10**9)
    assert rule.corrections(FAR) == (1.0, 1.0)
    assert all(map(math.isfinite, rule.scalars(FAR)))


@pytest.mark.parametrize("kind", [FedAdam, Yogi])
def test_without_correction_all_steps_are_alike(kind):
    assert kind().scalars(1) == kind().scalars(1000)
    assert kind(bias_correction=True).scalars(1) != kind(bias_correction=True).scalars(1000)


def test_the_bounds_of_yogi_hold_for_the_smallest_squares(backend):
    """They said 3e291 for float64 where the kernel made an infinite update, with signs between 0 and 1."""
    rule, gradient = Yogi(learning_rate=1e290, eps=1e-110), np.array([1e-60, 8e-60])
    scalars = tuple(map(float, rule.constants(F8, 1)))
    bound, _ = Yogi.bounds(Given(NUMBERS[F8], 8e-60, 0.0, ((0.0, 0.0), (0.0, 0.0)), 1), scalars)
    with np.errstate(all="ignore"):
        update, _ = step(backend, rule, gradient, np.zeros(2), np.zeros(2))
    assert np.abs(update).max() <= bound < np.inf


@pytest.mark.parametrize("rule", [Adam, AdamW, FedAdam, Nadam, Yogi, CenteredRmsprop])
def test_an_average_whose_square_is_infinite_is_one_that_no_step_leaves(rule):
    values = np.array([0, 1.8e19, 3e38, -3e38], F4)
    assert rule().unreachable_values("grad_avg", values).tolist() == [False, False, True, True]
    assert rule().unreachable_values("square_avg", values) is None
