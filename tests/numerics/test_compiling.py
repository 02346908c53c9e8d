"""What the first steps of many streams need is compiled once, however many of them come at the same moment."""

import importlib.util
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from numba.core import event

from optserve_server.numerics import backends, rules
from optserve_server.numerics.backends import numba_loops

THREADS = 16


@pytest.fixture
def loops():
    """The module as it is in a process in which nothing has been compiled yet."""
    spec = importlib.util.spec_from_file_location("fresh_loops", numba_loops.__file__)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def compilations(call) -> int:
    """How often Numba compiles a loop while many threads make one and the same call."""
    barrier = threading.Barrier(THREADS)

    def work(_: int):
        barrier.wait()
        return call()

    with event.install_recorder("numba:compile") as recorder, ThreadPoolExecutor(THREADS) as pool:
        assert all(pool.map(work, range(THREADS)))
    # Numba compiles what a loop calls as well.
    return sum(made.is_start and made.data["dispatcher"].__name__ == "loop" for _, made in recorder.buffer)


@pytest.mark.parametrize("dtype", ["f4", "f8"])
def test_a_copy_is_compiled_once(loops, dtype):
    sent = np.frombuffer(np.ones(8, dtype).tobytes(), dtype)
    assert compilations(lambda: loops.receive(np.empty(8, dtype), sent)) == 1
    assert compilations(lambda: loops.receive(np.empty(8, dtype), sent)) == 0


def test_conversions_and_checks_are_compiled_once(loops):
    ones = np.ones(8, np.float32)
    half = np.frombuffer(loops.to_bfloat16(ones).tobytes(), np.uint16)
    assert compilations(lambda: loops.largest(ones)) == 1
    assert compilations(lambda: loops.receive_bfloat16(np.empty(8, np.float32), half)) == 1


def test_a_rule_is_compiled_once():
    backend = backends.load("numba")
    assert compilations(lambda: backend.kernel(rules.Sgd, np.dtype("f4"))) == 1
    assert compilations(lambda: backend.kernel(rules.Sgd, np.dtype("f4"))) == 0
