"""How work on a range is divided among threads."""

import math

import numpy as np
import pytest

from optserve_server.numerics import backends
from optserve_server.numerics.backends.slices import PASS, Slices


@pytest.mark.parametrize("size", [0, 1, 15, 16, 17, 1000])
@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_every_element_is_worked_off_once(threads, size):
    parts = []
    Slices(threads).run(size, lambda start, stop: parts.append((start, stop)), 0)
    assert [element for start, stop in sorted(parts) for element in range(start, stop)] == list(range(size))


def test_a_second_thread_is_used_where_it_saves_more_than_its_wake_up():
    parts = []
    for size in (999, 1000, 1001):
        slices = Slices(2)
        slices.run(size, lambda start, stop: parts.append((start, stop)), slices.alone_to(500))
    assert parts[:2] == [(0, 999), (0, 1000)]
    assert sorted(parts[2:]) == [(0, 512), (512, 1001)]
    assert [Slices(threads).alone_to(500) for threads in (2, 6, 101)] == [1000, 600, 505]
    assert Slices(1).alone_to(500) > 1 << 60


def test_passes_over_large_arrays_find_the_same_on_all_threads():
    backend, size = backends.load("numba", 3), 2 * PASS
    source = np.random.default_rng(0).standard_normal(size).astype(np.float32)
    target = np.empty_like(source)
    assert backend.receive_large(target, source) == float(np.abs(source).max()) == backend.largest(source)
    assert target.tobytes() == source.tobytes()
    assert backend.extremes(source) == (float(source.min()), float(source.max()))
    expected = source + target
    backend.advance(target, source, np.float32(0))
    assert target.tobytes() == expected.tobytes()
    source[-1] = math.nan
    backend.copy(source, target)
    assert target.tobytes() == source.tobytes()
    assert math.isnan(backend.largest(target))
