"""A step on a device, all of it but CUDA: how its launches cover the stretches of arenas, and where these may be."""

from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np
import pytest

from optserve_server.domain.config import ServerConfig
from optserve_server.domain.errors import OptserveError
from optserve_server.engine.durability import InMemory
from optserve_server.engine.registry import Optimizers
from optserve_server.numerics import backends
from optserve_server.numerics.backends.base import Decay, DecayPlace, Stretch
from optserve_server.numerics.backends.cuda_source import PLACE, THREADS, KernelSource
from optserve_server.numerics.backends.device_steps import WINDOW_BYTES, WINDOWS
from optserve_server.numerics.layout import Layout, Parameter
from optserve_server.numerics.rules import RULES, Adadelta, AdamW, DiagonalHessian, Sgd
from optserve_server.numerics.settings import Settings
from simulated_device import GPU, SimulatedBackend, compiled, load

F4, F8 = np.dtype("f4"), np.dtype("f8")
REFERENCE = backends.load("numpy", 1)
RNG = np.random.default_rng(17)


@pytest.fixture
def simulated() -> SimulatedBackend:
    return SimulatedBackend()


@pytest.fixture(scope="session", params=["simulated", GPU])
def device(request) -> backends.Backend:
    return load(request.param)


def stretches_of(rule, dtype, borders, *, hosted=True):
    """Stretches between pairs of borders, each with constants and a decay of its own."""
    places = list(DecayPlace)
    rows = [rule.constants(dtype, 1 + number) for number in range(3)]
    factors = [dtype.type(factor) for factor in (0.01, 0.5, 0.1)]
    return [
        Stretch(
            slice(*border),
            [constant * dtype.type(1 + number / 64) for constant in rows[number % 3]],
            Decay(places[number % 3], factors[number // 3 % 3]) if hosted else None,
        )
        for number, border in enumerate(borders)
    ]


def steps(backend, rule, arrays, stretches, pin=lambda array: array, rounds=2):
    """The bytes of all arrays after some steps of the stretches."""
    dtype = arrays[0].dtype
    given, x = [pin(array) for array in arrays[:-1]], pin(arrays[-1])
    slots = [backend.zeros(x.size, dtype) for _ in rule.slots]
    parameters = x if stretches[0].decay else None
    for _ in range(rounds):
        with np.errstate(all="ignore"):
            backend.make_steps(type(rule), given, slots, parameters, stretches)
    return [array.tobytes() for array in (*given, x, *map(backend.to_host, slots))]


def arrays_of(rule, dtype, size):
    """The gradient, the curvature if the rule takes it, x."""
    return [RNG.standard_normal(size).astype(dtype) for _ in range(3 if rule.takes_curvature else 2)]


def check(device, rule, dtype, size, borders, *, hosted=True, offset=0):
    """Compare the device with the reference: pinned arrays, arrays elsewhere."""
    stretches = stretches_of(rule, dtype, borders, hosted=hosted)
    arrays = arrays_of(rule, dtype, size)
    expected = steps(REFERENCE, rule, [array.copy() for array in arrays], stretches)

    def pinned(array):
        there = device.staging(array.nbytes + offset)[offset:].view(dtype)
        there[...] = array
        return there

    assert steps(device, rule, arrays, stretches, pinned) == expected
    assert steps(device, rule, [array.copy() for array in arrays], stretches) == expected


@pytest.mark.parametrize("hosted", [False, True])
@pytest.mark.parametrize("dtype", [F4, F8], ids=str)
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_each_method_changes_the_stretches_alone_bit_for_bit(device, rule, dtype, hosted):
    borders = [(0, 1), (1, 6), (6, 8), (12, 1037), (1040, 1040), (1041, 3000)]
    check(device, rule(), dtype, 3003, borders, hosted=hosted)


@pytest.mark.parametrize("seed", range(25))
def test_any_stretches_in_any_order(device, seed):
    rng = np.random.default_rng(seed)
    size = int(rng.integers(1, 40_000))
    points = np.sort(rng.integers(0, size + 1, 2 * int(rng.integers(1, 300)))).tolist()
    borders = list(zip(points[::2], points[1::2], strict=True))
    rng.shuffle(borders)
    check(device, AdamW(), F4 if seed % 2 else F8, size, borders, hosted=seed % 3 > 0, offset=8 * (seed % 4))


def test_a_thread_that_has_not_used_the_device_makes_a_step(device):
    staged = device.staging(64).view(F4)
    staged[:] = 3
    with ThreadPoolExecutor(1) as pool:
        pool.submit(device.kernel(Sgd, F4), staged, [], Sgd(learning_rate=2.0).constants(F4, 1)).result()
    assert (staged == -6).all()


def test_arrays_larger_than_the_windows(device):
    per_window = WINDOW_BYTES // 8
    size = (WINDOWS + 1) * per_window + 77
    borders = [(5, per_window - 3), (per_window - 3, 2 * per_window + 1), (2 * per_window + 100, size - 1)]
    check(device, DiagonalHessian(), F8, size, borders)


def test_windows_without_a_stretch_are_left_out(device):
    per_window = WINDOW_BYTES // 4
    check(device, Adadelta(), F4, 3 * per_window, [(2 * per_window + 8, 3 * per_window)])


@pytest.mark.parametrize("dtype", [F4, F8], ids=str)
def test_slots_that_begin_between_vectors(device, dtype):
    rule, size = Adadelta(), 1003
    gradient = RNG.standard_normal(size).astype(dtype)
    expected, slots = gradient.copy(), [np.zeros(size, dtype) for _ in rule.slots]
    REFERENCE.make_step(Adadelta, [expected], slots, rule.constants(dtype, 1), None, None)
    staged = device.staging(gradient.nbytes).view(dtype)
    staged[...] = gradient
    given = [device.zeros(size + 1, dtype)[1:] for _ in rule.slots]
    device.make_step(Adadelta, [staged], given, rule.constants(dtype, 1), None, None)
    found = [staged, *map(device.to_host, given)]
    assert [array.tobytes() for array in found] == [array.tobytes() for array in (expected, *slots)]


def test_only_arenas_that_begin_at_vectors_are_read_where_they_are(simulated):
    sgd, size = Sgd(learning_rate=1.0), 3 * (WINDOW_BYTES // 4)
    for offset, launches in ((0, 1), (16, 1), (8, 3)):
        staged = simulated.staging(4 * size + 16)[offset : offset + 4 * size].view(F4)
        before = simulated.simulated.launches
        simulated.kernel(Sgd, F4)(staged, [], sgd.constants(F4, 1))
        assert simulated.simulated.launches - before == launches


def test_a_step_is_one_launch(simulated):
    rule, size = AdamW(), 100_000
    capacity = KernelSource(AdamW, F4, hosted=True).capacity
    assert capacity >= 32
    for count in (1, capacity, capacity + 1):
        ends = np.linspace(0, size, count + 1).astype(int).tolist()
        stretches = stretches_of(rule, F4, list(pairwise(ends)))
        before = simulated.simulated.launches
        pinned = [simulated.staging(4 * size).view(F4) for _ in range(2)]
        simulated.make_steps(AdamW, pinned[:1], [simulated.zeros(size, F4) for _ in rule.slots], pinned[1], stretches)
        assert simulated.simulated.launches - before == -(-count // capacity)


@pytest.mark.parametrize("dtype", [F4, F8], ids=str)
def test_elements_beyond_two_to_the_31st(dtype):
    """Their addresses are where they would be if the arenas began far below the arrays."""
    source, rule, size = KernelSource(Adadelta, dtype, hosted=False), Adadelta(), 2 * THREADS * 4 + 5
    first = (1 << 33) + 3
    buffers = [np.zeros(size * dtype.itemsize + 64, np.uint8) for _ in range(3)]
    # The alignment is that of the first element of the arena.
    begins = [(3 * dtype.itemsize - buffer.ctypes.data) % 16 for buffer in buffers]
    arrays = [
        buffer[begin : begin + size * dtype.itemsize].view(dtype) for buffer, begin in zip(buffers, begins, strict=True)
    ]
    arrays[0][:] = RNG.standard_normal(size)
    expected = [array.copy() for array in arrays]
    REFERENCE.make_step(Adadelta, expected[:1], expected[1:], rule.constants(dtype, 1), None, None)
    addresses = [(array.ctypes.data - first * dtype.itemsize) % (1 << 64) for array in arrays]
    argument = source.header.pack(*addresses, 1, True) + PLACE.pack(first, first + size, 0, 0)
    argument += source.constants.pack(0, *rule.constants(dtype, 1))
    blocks = size // source.width // THREADS + 1
    compiled(source.text, source.name).run(blocks, argument.ljust(source.argument_bytes, b"\0"))
    assert [array.tobytes() for array in arrays] == [array.tobytes() for array in expected]


@pytest.mark.parametrize("dtype", [F4, F8], ids=str)
@pytest.mark.parametrize(
    "values",
    [
        [1, 2],
        [-1, -3, -2],
        [-1, 0.5],
        [0.0, -0.0],
        [-0.0, 1e-40],
        [-1e-310, 1e-310],
        [np.inf, 1],
        [-np.inf, 1],
        [np.nan, 1],
        [-np.nan, -1],
        [3, np.nan, -np.inf],
        [],
    ],
)
def test_extremes_on_the_device_are_those_of_the_numbers(device, dtype, values):
    host = np.array(values, dtype)
    slot = device.zeros(host.size, dtype)
    device.fill(slot, host)
    np.testing.assert_array_equal(device.extremes(slot), REFERENCE.extremes(host))


def test_an_array_on_the_device_is_not_read_as_one_in_host_memory(simulated):
    for read in (np.asarray, np.isfinite, len, np.sum):
        with pytest.raises(TypeError):
            read(simulated.zeros(3, F4))


def test_the_device_is_full():
    """The optimizer that does not fit is refused by name, and takes no memory; those that are there go on."""
    small, large = Layout((Parameter("x", (4,), F4),)), Layout((Parameter("x", (1 << 20,), F4),))
    device = SimulatedBackend(free_bytes=WINDOWS * 3 * WINDOW_BYTES + (6 << 20))
    optimizers = Optimizers(device, InMemory(), ServerConfig())
    optimizers.create("small", small, Settings(Adadelta()))
    free = device.simulated.free_bytes
    with pytest.raises(OptserveError, match="no memory for the state of 'large'") as caught:
        optimizers.create("large", large, Settings(AdamW()))
    assert caught.value.code.name == "RESOURCE_EXHAUSTED"
    assert device.simulated.free_bytes == free
    assert optimizers.get("small").steps.step == 0


def test_a_device_that_is_too_small_is_refused():
    with pytest.raises(MemoryError):
        SimulatedBackend(free_bytes=WINDOW_BYTES)
