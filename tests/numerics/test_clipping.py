"""Clipping keeps every finite gradient within its bound: also where a dtype does not hold its norm, or the factor."""

import math

import numpy as np
import pytest

from optserve_server.numerics.clipping import Clipping
from optserve_server.numerics.gradient_mean import mean
from optserve_server.numerics.layout import ALL, Layout, Parameter, Payload

F4, F8 = np.dtype("f4"), np.dtype("f8")


def clip(kind: str, bound: float, *gradients: np.ndarray) -> tuple[list[np.ndarray], float | None]:
    """The clipped gradients, each a tensor of its own, and the norm."""
    parameters = tuple(Parameter(str(i), g.shape, g.dtype) for i, g in enumerate(gradients))
    layout = Layout(parameters)
    payload = Payload(layout, ALL)
    arenas = {dtype: np.zeros(size, dtype) for dtype, size in layout.sizes.items()}
    views = []
    for parameter, start, gradient in zip(parameters, layout.starts, gradients, strict=True):
        views.append(arenas[parameter.dtype][start : start + parameter.size])
        views[-1][...] = gradient
    parts = payload.parts(arenas)
    found = Clipping(kind, bound).measure(payload, parts)
    for turn, part in enumerate(parts):
        found.apply(turn, 0, part)
    return views, found.norm


HUGE = {F4: 3e38, F8: 1.7e308}


@pytest.mark.parametrize("kind", ["norm", "global_norm"])
@pytest.mark.parametrize("dtype", [F4, F8], ids=str)
@pytest.mark.parametrize("bound", [1e-30, 1.0, 1e30])
def test_a_norm_beyond_the_dtype_is_brought_to_the_bound(kind, dtype, bound):
    size = 5
    gradients = [np.full(size, HUGE[dtype], dtype), np.full(size, -HUGE[dtype], dtype)]
    clipped, norm = clip(kind, bound, *gradients)
    element = bound / math.sqrt(size * (1 if kind == "norm" else 2))
    for sign, tensor in zip((1, -1), clipped, strict=True):
        np.testing.assert_allclose(tensor, sign * element, rtol=1e-6)
    assert norm is not None
    # What a double does not hold is told as the largest double.
    exact = HUGE[dtype] * math.sqrt(2 * size)
    assert norm == (pytest.approx(exact) if math.isfinite(exact) else np.finfo(F8).max)


@pytest.mark.parametrize("kind", ["norm", "global_norm"])
@pytest.mark.parametrize("dtype", [F4, F8], ids=str)
def test_a_factor_below_the_dtype_does_not_clip_to_zero(kind, dtype):
    bound = {F4: 1e-20, F8: 1e-300}[dtype]
    clipped, _ = clip(kind, bound, np.array([HUGE[dtype], 0, -HUGE[dtype]], dtype))
    np.testing.assert_allclose(clipped[0], np.array([1, 0, -1]) * bound / math.sqrt(2), rtol=1e-6)


def test_the_smallest_bound_and_the_smallest_norm():
    bound = float(np.finfo(F4).smallest_subnormal)
    Clipping("norm", bound).check()
    clipped, _ = clip("norm", bound, np.array([3e-200, -4e-200]), np.array([1e-30, 0], F4), np.zeros(2))
    assert [tensor.tolist() for tensor in clipped] == [[3e-200, -4e-200], [bound, 0], [0, 0]]


def test_values_are_clipped_in_a_dtype_that_does_not_hold_the_bound():
    clipped, norm = clip("value", 1e300, np.array([3e38, -3e38], F4), np.array([1e301, -5.0]))
    assert clipped[0].tolist() == np.array([3e38, -3e38], F4).tolist()
    assert clipped[1].tolist() == [1e300, -5.0]
    assert norm is None
    Clipping("value", 1e300).check()


@pytest.mark.parametrize("kind", ["value", "norm", "global_norm"])
def test_parts_of_a_step_are_clipped_as_they_are_in_the_whole_step(kind):
    rng = np.random.default_rng(5)
    sizes = (7, 1, 30, 4, 16)
    # The middle tensor is within the bound, and two runs are of another dtype.
    parameters = tuple(Parameter(str(i), (n,), F8 if i == 3 else F4) for i, n in enumerate(sizes))
    layout = Layout(parameters)
    payload = Payload(layout, ALL)
    arenas = {dtype: rng.standard_normal(size).astype(dtype) for dtype, size in layout.sizes.items()}
    arenas[F4][8:38] *= 0.01
    found = Clipping(kind, 0.5).measure(payload, payload.parts(arenas))
    whole = [part.copy() for part in payload.parts(arenas)]
    for turn, part in enumerate(whole):
        found.apply(turn, 0, part)
    for _ in range(200):
        turns = sorted(rng.integers(len(whole), size=rng.integers(1, 5)).tolist())
        parts = [(turn, *sorted(rng.integers(0, whole[turn].size + 1, size=2).tolist())) for turn in turns]
        within = found.for_parts(parts)
        for place, (turn, start, stop) in enumerate(parts):
            part = payload.parts(arenas)[turn][start:stop].copy()
            within.apply(place, 0, part)
            assert part.tobytes() == whole[turn][start:stop].tobytes()


@pytest.mark.parametrize("workers", [1, 2, 3, 7, 64])
@pytest.mark.parametrize("dtype", [F4, F8], ids=str)
def test_the_mean_of_the_largest_numbers_is_the_largest_number(dtype, workers):
    largest = float(np.finfo(dtype).max)
    parts = [np.array([largest, -largest, largest * (-1) ** i, 1.0], dtype) for i in range(workers)]
    target = np.empty(4, dtype)
    mean(parts, target, largest)
    np.testing.assert_allclose(target[:2], [largest, -largest], rtol=1e-6)
    assert np.isfinite(target).all()
    np.testing.assert_allclose(target[2], largest / workers if workers % 2 else 0, rtol=1e-6)
    assert target[3] == 1.0


def test_the_mean_in_a_smaller_unit_has_the_bits_of_the_plain_one():
    rng = np.random.default_rng(4)
    for workers in (2, 3, 5, 12):
        parts = [rng.standard_normal(1000).astype(F4) for _ in range(workers)]
        plain, scaled = np.empty(1000, F4), np.empty(1000, F4)
        mean(parts, plain, max(float(np.abs(part).max()) for part in parts))
        mean(parts, scaled, float(np.finfo(F4).max))
        assert plain.tobytes() == scaled.tobytes()
