"""What a step is of: which parameters, where they are on the wire and in their arenas, and how they are listed."""

import numpy as np
import pytest

from optserve_server.domain.errors import OptserveError, Reason
from optserve_server.numerics.layout import ALL, Layout, Parameter, Payload, Payloads, Run, Selection

F4, F8, F2 = np.dtype("<f4"), np.dtype("<f8"), np.dtype("<f2")
LAYOUT = Layout(
    (
        Parameter("a", (2,), F4),
        Parameter("wide", (3,), F8),
        Parameter("b", (2, 2), F4),
        Parameter("none", (0,), F4),
        Parameter("c", (), F4),
    )
)


def test_all_is_listed_as_nothing():
    assert (ALL.is_all, ALL.listed, ALL.tensors(LAYOUT)) == (True, (), (0, 1, 2, 3, 4))
    assert all(tensor in ALL for tensor in range(5))


def test_some_are_those_that_are_listed_in_that_order():
    some = Selection((4, 1))
    assert (some.is_all, some.listed, some.tensors(LAYOUT)) == (False, (4, 1), (4, 1))
    assert [tensor for tensor in range(5) if tensor in some] == [1, 4]


def test_each_in_their_own_order_is_all_and_in_another_it_is_not():
    assert Selection((0, 1, 2, 3, 4)).normalized(LAYOUT) is ALL
    shuffled = Selection((4, 0, 1, 2, 3))
    assert shuffled.normalized(LAYOUT) is shuffled
    assert Payloads(LAYOUT).payload_for(Selection((0, 1, 2, 3, 4)), None).selection is ALL


@pytest.mark.parametrize(("listed", "reason"), [((5,), Reason.UNKNOWN_PARAMETER), ((1, 1), Reason.DUPLICATE_PARAMETER)])
def test_what_the_model_has_not_is_refused(listed, reason):
    with pytest.raises(OptserveError) as refused:
        Payloads(LAYOUT).payload_for(Selection(listed), None)
    assert (refused.value.reason, refused.value.field) == (reason, "tensors")


def test_runs_are_behind_one_another_on_the_wire_and_each_in_its_arena():
    assert list(Selection((4, 1)).runs(LAYOUT, None)) == [Run(0, 4, F4, F4, 6, 7), Run(4, 28, F8, F8, 0, 3)]
    assert list(Selection((1, 0)).runs(LAYOUT, F2)) == [Run(0, 6, F8, F2, 0, 3), Run(6, 10, F4, F2, 0, 2)]


def test_a_payload_joins_neighbours_and_leaves_empty_ones_out():
    payload = Payload(LAYOUT, Selection((2, 3, 4, 1)))
    assert payload.runs == (Run(0, 20, F4, F4, 2, 7), Run(20, 44, F8, F8, 0, 3))
    assert (payload.begins, payload.size_bytes, payload.narrow_wire) == ([0, 16, 16, 20], 44, None)
    assert Payload(LAYOUT, Selection((3,))).runs == ()
    assert Payload(LAYOUT, Selection((0, 1)), F4).narrow_wire == F4
