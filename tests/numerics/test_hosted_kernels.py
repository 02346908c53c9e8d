"""The kernels that change x as well: the bits of the method's formula, of weight decay, and of a sum, one by one."""

import numpy as np
import pytest

from optserve_server.numerics.backends.base import DecayPlace
from optserve_server.numerics.rules import RULES, AdamW
from simulated_device import load

F4, F8 = np.dtype("f4"), np.dtype("f8")
FACTOR = 0.003


Operands = tuple[np.ndarray, np.ndarray, np.ndarray]
"""x, g and h."""


def operands(dtype: np.dtype, size: int) -> Operands:
    """With zeros of both signs in every combination."""
    x, g, h = np.random.default_rng(4).standard_normal((3, size)).astype(dtype)
    x[:8], g[:8] = [0, -0.0, 0, -0.0, 0, -0.0, 1, -1], [0, 0, -0.0, -0.0, 1, 1, -0.0, -0.0]
    return x, g, h


def plain(rule, given: Operands, place, steps):
    """(x, update, slots) after some steps by the formulas alone."""
    (x, g, h), dtype = given, given[0].dtype
    factor, slots, update = dtype.type(FACTOR), [np.zeros_like(x) for _ in rule.slots], g
    for step in range(1, steps + 1):
        gradient = g + x * factor if place is DecayPlace.GRADIENT else g
        with np.errstate(all="ignore"):
            made = rule.update(
                np.sqrt, gradient, *([h] if rule.takes_curvature else []), *slots, *rule.constants(dtype, step)
            )
        update, *slots = made if rule.slots else (made,)
        x = x + (update - x * factor) if place is DecayPlace.PARAMETERS else x + update
    return x, update, slots


def by_kernel(backend, rule, given: Operands, place, steps):
    (x, g, h), dtype = given, given[0].dtype
    x, slots, staged = x.copy(), [backend.zeros(x.size, dtype) for _ in rule.slots], g
    kernel = backend.hosted_kernel(type(rule), dtype, place)
    for step in range(1, steps + 1):
        staged = g.copy()
        inputs = [h] if rule.takes_curvature else []
        kernel(staged, slots, rule.constants(dtype, step), x, dtype.type(FACTOR), *inputs)
    return x, staged, [backend.to_host(slot) for slot in slots]


def bits(result) -> list[bytes]:
    x, update, slots = result
    return [array.tobytes() for array in (x, update, *slots)]


@pytest.mark.parametrize("place", DecayPlace)
@pytest.mark.parametrize("dtype", [F4, F8], ids=str)
@pytest.mark.parametrize("kind", RULES.values(), ids=RULES)
def test_a_hosted_step_has_the_bits_of_its_parts(backend, kind, dtype, place):
    given = operands(dtype, 1003)
    assert bits(by_kernel(backend, kind(), given, place, 12)) == bits(plain(kind(), given, place, 12))


@pytest.mark.parametrize("size", [0, 1, 131_073, 800_001])
@pytest.mark.parametrize("place", DecayPlace)
def test_the_split_over_threads_changes_no_bit(backend, place, size):
    x, g, h = operands(F4, max(size, 8))
    given = x[:size], g[:size], h[:size]
    expected = bits(plain(AdamW(), given, place, 2))
    for threads in (1, 2, 3):
        fresh = load(backend.name, threads)
        assert bits(by_kernel(fresh, AdamW(), given, place, 2)) == expected
