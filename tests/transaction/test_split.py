"""However a gradient is cut and in whatever order it comes: the same bits as in one piece."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optserve_server.engine.byte_coverage import Coverage, Overlap
from optserve_server.numerics.layout import Parameter, Selection
from transaction.harness import F4, F8, fingerprint, make_steps, run_step

shapes = st.one_of(
    st.just(()),
    st.lists(st.integers(0, 5), min_size=1, max_size=3).map(tuple),
    st.integers(1000, 3000).map(lambda extent: (extent,)),
)
models = st.lists(st.tuples(shapes, st.sampled_from([F4, F8])), min_size=1, max_size=6)


def gradients(parameters, seed):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(parameter.shape).astype(parameter.dtype).tobytes() for parameter in parameters]


def cut(data, sizes, parameters):
    """Cut the payload at element boundaries into pieces of about `sizes` bytes, as (tensor, offset, bytes)."""
    boundaries = [0]
    places = {}
    position = 0
    for index, parameter in enumerate(parameters):
        for element in range(parameter.size):
            places.setdefault(position, (index, element * parameter.dtype.itemsize))
            position += parameter.dtype.itemsize
            boundaries.append(position)
    edges, turn = [0], 0
    for boundary in boundaries[1:]:
        if boundary - edges[-1] >= sizes[turn % len(sizes)] or boundary == position:
            edges.append(boundary)
            turn += 1
    payload = b"".join(data)
    return [(*places[begin], payload[begin:end]) for begin, end in pairwise(edges)]


@settings(max_examples=150, deadline=None)
@given(
    model=models,
    sizes=st.lists(st.integers(1, 4000), min_size=1, max_size=5),
    order=st.randoms(),
    seed=st.integers(0, 9),
)
def test_any_split_in_any_order_gives_the_same_bits(model, sizes, order, seed):
    parameters = [Parameter(f"p{index}", shape, dtype) for index, (shape, dtype) in enumerate(model)]
    whole, split = make_steps(*parameters), make_steps(*parameters)
    for turn in range(2):
        data = gradients(parameters, seed + turn)
        expected = run_step(whole, f"{turn}", [(index, 0, piece) for index, piece in enumerate(data)])
        pieces = cut(data, sizes, parameters)
        order.shuffle(pieces)
        assert run_step(split, f"{turn}", pieces) == expected
        assert fingerprint(split) == fingerprint(whole)


@settings(max_examples=60, deadline=None)
@given(model=models, order=st.randoms(), seed=st.integers(0, 9))
def test_any_order_of_the_tensors_gives_the_same_bits(model, order, seed):
    parameters = [Parameter(f"p{index}", shape, dtype) for index, (shape, dtype) in enumerate(model)]
    indices = list(range(len(parameters)))
    data = gradients(parameters, seed)
    straight, shuffled = make_steps(*parameters), make_steps(*parameters)
    run_step(straight, "a", [(index, 0, data[index]) for index in indices])
    order.shuffle(indices)
    payload = b"".join(data[index] for index in indices)
    reply = run_step(shuffled, "a", [(indices[0], 0, payload)], selection=Selection(tuple(indices)))
    assert fingerprint(shuffled) == fingerprint(straight)
    assert len(reply) == len(payload)


def test_a_large_tensor_in_chunks_gives_the_same_bits_as_in_one():
    size = 3_000_001
    whole, split = (make_steps(Parameter("x", (size,), F4)) for _ in range(2))
    data = np.random.default_rng(5).standard_normal(size).astype(np.float32).tobytes()
    chunk = 1 << 20
    pieces = [(0, begin, data[begin : begin + chunk]) for begin in range(0, len(data), chunk)]
    assert run_step(split, "a", pieces[::-1]) == run_step(whole, "a", [(0, 0, data)])
    assert fingerprint(split) == fingerprint(whole)


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(0, 12)), max_size=30))
def test_coverage_agrees_with_a_set_of_bytes(intervals):
    coverage, covered = Coverage(), set()
    for begin, length in intervals:
        interval = set(range(begin, begin + length))
        if interval & covered:
            with pytest.raises(Overlap) as caught:
                coverage.add(begin, begin + length)
            assert caught.value.position == min(interval & covered)
        else:
            coverage.add(begin, begin + length)
            covered |= interval
    total = 72
    gaps = [position for position in range(total) if position not in covered]
    assert coverage.first_gap(total) == (gaps[0] if gaps else None)
