"""What a rule says of its own results holds for all operands and slots within bounds, whatever their size."""

import itertools

import numpy as np
import pytest

from extremes import SIZES, any_rule, any_values, pick
from optserve_server.numerics.headroom import SLACK
from optserve_server.numerics.rules import RULES, DiagonalHessian
from optserve_server.numerics.rules.base import NUMBERS, Given
from optserve_server.numerics.schedule import SCHEDULES

F4, F8 = np.dtype("f4"), np.dtype("f8")
SIZE = 64


def slots_of(rng, kind, rule, dtype) -> list[np.ndarray]:
    """Slots such as steps leave behind."""
    slots = [np.abs(any_values(rng, dtype, SIZE)) for _ in kind.slots]
    for position, name in enumerate(kind.slots):
        if name == "tau":
            started = rng.random(SIZE) < pick(rng, (0, 0.5, 1))
            slots[position] = np.where(started, rng.integers(1, 50, SIZE), -rng.integers(0, 10, SIZE)).astype(dtype)
        elif name in kind.signed_slots:
            slots[position] *= rng.choice((-1, 1), SIZE).astype(dtype)
    return slots


@pytest.mark.parametrize("dtype", [F4, F8], ids=str)
@pytest.mark.parametrize("kind", RULES.values(), ids=RULES)
def test_no_step_leaves_the_bounds(kind, dtype):
    rng = np.random.default_rng(8)
    numbers, useful = NUMBERS[dtype], 0
    for _ in range(400):
        rule = any_rule(rng, kind, {dtype})
        scalars = tuple(rule.constants(dtype, 1))
        slots = slots_of(rng, kind, rule, dtype)
        limit = rule.gradient_limit(dtype)
        operands = [np.clip(any_values(rng, dtype, SIZE), -limit, limit) for _ in range(1 + kind.takes_curvature)]
        steps = int(pick(rng, (1, 1, 8, 64)))
        gradient, curvature = (float(np.abs(operand).max()) for operand in [*operands, np.zeros(1)][:2])
        intervals = [(float(slot.min()), float(slot.max())) for slot in slots]
        given = Given(numbers, gradient, curvature, intervals, steps)
        update, intervals = kind.bounds(given, tuple(map(float, scalars)))
        if not all(abs(end) <= numbers.most for end in (update, *itertools.chain(*intervals))):
            continue
        useful += 1
        slack = SLACK**steps
        with np.errstate(all="ignore"):
            for step in range(steps):
                if kind.counts_steps:
                    scalars = tuple(rule.constants(dtype, 1 + step * int(rng.integers(1, 1000))))
                made = kind.update(np.sqrt, *operands, *slots, *scalars)
                first, *slots = made if kind.slots else (made,)
                assert np.abs(first).max() <= update * slack + numbers.tiny, rule
                for slot, (low, high) in zip(slots, intervals, strict=True):
                    assert slot.max() <= high * slack + numbers.tiny, (rule, kind.slots)
                    assert slot.min() >= (low if low >= 0 else low * slack - numbers.tiny), (rule, kind.slots)
                operands = [rng.permutation(operand) for operand in operands]
    # Bounds that are never finite would hold as well.
    assert useful > 50


@pytest.mark.parametrize("kind", SCHEDULES.values(), ids=SCHEDULES)
def test_no_schedule_makes_a_learning_rate_larger(kind):
    # Bounds are those of the rate without a schedule.
    values = {
        "decay": (1e-9, 3.0),
        "rate": (1e-9, 1.0),
        "period_steps": (1, 7),
        "floor": (0.0, 1.0),
        "milestones": ((1, 4),) * 2,
    }
    for turn in (0, 1):
        for warmup in (0, 1, 5):
            schedule = kind(
                warmup_steps=warmup, **{name: values[name][turn] for name in kind.__annotations__ if name in values}
            )
            assert all(0 <= schedule.factor(t) <= 1 for t in range(30))


@pytest.mark.parametrize("dtype", [F4, F8], ids=str)
@pytest.mark.parametrize("rate", [1.0, 1.5, 2.0, 10.0, 1e3, 1e9])
def test_the_unit_of_the_diagonal_hessian_changes_no_bit(dtype, rate):
    rng = np.random.default_rng(5)
    g, h = rng.standard_normal((2, 10_000)).astype(dtype)
    rule = DiagonalHessian(learning_rate=rate, mu=1e-3)
    made = DiagonalHessian.update(np.sqrt, g, h, *rule.constants(dtype, 1))
    plain = dtype.type(-rate) * g / (np.abs(h) + dtype.type(1e-3))
    assert made.tobytes() == plain.tobytes()


@pytest.mark.parametrize("dtype", [F4, F8], ids=str)
def test_the_quotient_of_the_diagonal_hessian_is_that_of_exact_arithmetic(dtype):
    most = float(np.finfo(dtype).max)
    rule = DiagonalHessian(learning_rate=1e3, mu=1.0)
    made = DiagonalHessian.update(
        np.sqrt,
        np.array([most, most / 2], dtype),
        np.array([most, -most], dtype),
        *rule.constants(dtype, 1),
    )
    np.testing.assert_allclose(made, [-1e3, -5e2], rtol=1e-6)


def test_the_sizes_are_finite():
    for dtype, sizes in SIZES.items():
        assert all(np.isfinite(dtype.type(size)) for size in sizes)
