"""The messages of a step: a step that fits into one is the same message, whichever way it is made."""

import numpy as np
from hypothesis import example, given
from hypothesis import strategies as st

from optserve._steps.gradients import ANNOUNCED_BYTES, Gradients
from optserve.v1 import steps_pb2

SHAPES = st.lists(st.lists(st.integers(0, 5), max_size=3), min_size=1, max_size=5)


def request() -> steps_pb2.StreamStepsRequest:
    return steps_pb2.StreamStepsRequest(begin=steps_pb2.Begin(request_id="r", expected_step=3))


@given(SHAPES, st.integers(256, 2000), st.booleans(), st.integers(0, 3))
@example([[ANNOUNCED_BYTES // 4]], 1 << 20, True, 0)
@example([[ANNOUNCED_BYTES // 4 - 1]], 1 << 20, True, 0)
@example([[0], [2]], 1024, False, 1)
def test_a_step_of_one_message_is_the_message_that_is_made_chunk_by_chunk(shapes, max_chunk_bytes, announce, first):
    arrays = [np.arange(np.prod(shape), dtype=np.float32).reshape(shape) for shape in shapes]
    gradients = Gradients(range(first, first + len(arrays)), arrays, whole=False)
    made = request()
    single = gradients.single_message(made, max_chunk_bytes, announce=announce)
    each = list(gradients.messages(request(), max_chunk_bytes, announce=announce))
    if single is None:
        assert len(each) > 1
        assert made == request()
    else:
        assert each == [single]


def test_a_step_whose_gradients_are_converted_or_have_curvature_is_made_chunk_by_chunk():
    one = [np.ones(2, np.float32)]
    for gradients in (
        Gradients([0], one, whole=True, wire=np.dtype(np.float16)),
        Gradients([0], one, whole=True, curvature=one),
    ):
        assert gradients.single_message(request(), 1024, announce=False) is None
