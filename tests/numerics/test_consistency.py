"""How the gradients of workers come together: what each strategy decides, and the form in which it is written down."""

import numpy as np
import pytest

from optserve_server.domain.config import ServerConfig
from optserve_server.domain.errors import OptserveError, Reason
from optserve_server.numerics.backends.numpy import NumpyBackend
from optserve_server.numerics.consistency import (
    CONSISTENCIES,
    AsyncConsistency,
    BoundedConsistency,
    Consistency,
    SyncConsistency,
)
from optserve_server.numerics.gradient_mean import Gradient
from optserve_server.numerics.layout import ALL, Layout, Operand, Parameter, Payload
from optserve_server.numerics.rules import Sgd
from optserve_server.numerics.settings import Settings
from optserve_server.numerics.staging import Staging
from optserve_server.numerics.state import State

F4 = np.dtype("<f4")
LAYOUT = Layout((Parameter("x", (2,), F4),))


class Clocks:
    """Workers that have made so many steps."""

    def __init__(self, *clocks):
        self.clocks = clocks

    def slowest(self, default):
        return min(self.clocks, default=default)


@pytest.mark.parametrize(
    ("consistency", "clock", "arrived", "clocks", "expected"),
    [
        (AsyncConsistency(), 9, 1, (9, 0), True),
        (BoundedConsistency(staleness=2), 2, 1, (2, 0), True),
        (BoundedConsistency(staleness=2), 3, 1, (3, 0), False),
        (BoundedConsistency(staleness=0), 3, 1, (), True),
        (SyncConsistency(workers=3), 0, 2, (0, 0, 0), False),
        (SyncConsistency(workers=3), 0, 3, (0, 0, 0), True),
    ],
)
def test_a_step_may_be_applied(consistency, clock, arrived, clocks, expected):
    assert consistency.may_apply(clock, arrived, Clocks(*clocks)) is expected


@pytest.mark.parametrize(
    ("consistency", "clocks", "expected"),
    [
        (AsyncConsistency(), (1, 0), False),
        (BoundedConsistency(), (1, 0), False),
        (BoundedConsistency(), (1, 1), True),
        (SyncConsistency(workers=2), (1, 0), True),
    ],
)
def test_others_are_told_only_of_steps_that_they_may_wait_for(consistency, clocks, expected):
    assert consistency.may_wake_others(1, Clocks(*clocks)) is expected


def test_only_sync_takes_several_gradients_and_only_of_the_present_x():
    one_by_one, sync = AsyncConsistency(), SyncConsistency(workers=2)
    assert (list(one_by_one.contributors("b", ["a", "b"])), list(sync.contributors("b", ["a", "b"]))) == (
        ["b"],
        ["a", "b"],
    )
    one_by_one.check_gradient("a", 3, 5)
    sync.check_gradient("a", 5, 5)
    with pytest.raises(OptserveError) as late:
        sync.check_gradient("a", 3, 5)
    assert late.value.reason is Reason.GRADIENT_LATE


def test_sync_merges_by_the_mean_and_the_others_take_the_gradient_as_it_is():
    state = State(LAYOUT, Settings(Sgd()), NumpyBackend(1))
    given = []
    for value in (1.0, 4.0):
        staging = Staging(state)
        staging.updates[F4][:] = value
        given.append(Gradient(staging, {(Operand.GRADIENT, F4): value}))
    payload = Payload(LAYOUT, ALL)
    target = Staging(state)
    assert AsyncConsistency().merge(payload, given[:1], lambda: target) is given[0]
    merged = SyncConsistency(workers=2).merge(payload, given, lambda: target)
    assert merged.staging is target
    assert target.updates[F4].tolist() == [2.5, 2.5]
    assert merged.largest[Operand.GRADIENT, F4] >= 2.5


def test_sync_needs_as_many_workers_as_can_be_connected_and_have_room():
    config = ServerConfig(max_streams=4, max_optimizer_staged_bytes=100)
    SyncConsistency(workers=2, backup_workers=1).check_capacity(50, config)
    for consistency, size in ((SyncConsistency(workers=2), 51), (SyncConsistency(workers=2, backup_workers=2), 1)):
        with pytest.raises(OptserveError) as refused:
            consistency.check_capacity(size, config)
        assert refused.value.reason is Reason.INVALID_FIELD


WRITTEN: list[tuple[Consistency, dict]] = [
    (AsyncConsistency(lease_s=5.0), {"kind": "async", "staleness": 0, "workers": 0, "backup_workers": 0}),
    (BoundedConsistency(staleness=3), {"kind": "bounded", "staleness": 3, "workers": 0, "backup_workers": 0}),
    (SyncConsistency(workers=3, backup_workers=1), {"kind": "sync", "staleness": 0, "workers": 3, "backup_workers": 1}),
]


@pytest.mark.parametrize(("consistency", "written"), WRITTEN)
def test_what_is_written_down_has_the_fields_of_all_kinds_as_earlier_servers_read_them(consistency, written):
    written |= {"lease_s": consistency.lease_s, "scale_by_staleness": False}
    assert list(consistency.to_json().items()) == list(written.items())
    assert CONSISTENCIES[written["kind"]].from_json(written) == consistency
