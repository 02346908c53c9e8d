"""Where memory runs out: which calls are ended, and when that is left alone because it does not help."""

import pytest

import optserve
from optserve_server.edge.gate.places import Places
from optserve_server.edge.gate.relief import FIRST_PAUSE_S, WAITED_S, Relief
from service.attacks import SERVICE, raw, wait_until
from service.worker_harness import config_of

STEPS = SERVICE + "StreamSteps"
MIB = 1 << 20


class Waiting(Places):
    """So many calls that wait."""

    def __init__(self, count: int) -> None:
        super().__init__("calls wait", count)
        self.count = count
        self.asked_s: list[float] = []

    def end_longest_waiting(self, waited_s: float) -> int:
        self.asked_s.append(waited_s)
        some = -(-self.count // 2)
        self.count -= some
        return some


def no_trim() -> None:
    """There is no freed memory to be given back."""


@pytest.mark.parametrize(("each", "ended"), [(10, [8, 4, 0, 0]), (0, [8, 0, 0, 0])])
def test_calls_are_ended_for_memory_as_long_as_that_helps(each, ended):
    calls, now = Waiting(16), 100.0
    used_bytes = (lambda: (900 + calls.count * each) * MIB) if each else (lambda: 990 * MIB)
    relief = Relief(1000 * MIB, [calls], used_bytes, no_trim, lambda: now)
    assert [relief.check() for _ in range(4)] == ended


@pytest.mark.parametrize(("used_mib", "waited_s"), [(990, WAITED_S), (1000, WAITED_S), (1001, 0.0)])
def test_beyond_the_whole_limit_calls_are_ended_however_short_they_have_waited(used_mib, waited_s):
    calls = Waiting(16)
    Relief(1000 * MIB, [calls], lambda: used_mib * MIB, no_trim).check()
    assert calls.asked_s == [waited_s]


def test_nobody_is_ended_where_freed_memory_can_be_given_back():
    calls, used_mib = Waiting(16), 990

    def trim() -> None:
        nonlocal used_mib
        used_mib = 500

    relief = Relief(1000 * MIB, [calls], lambda: used_mib * MIB, trim)
    assert (relief.check(), used_mib, calls.count) == (0, 500, 16)


def test_what_is_used_after_freed_memory_was_given_back_decides_who_is_ended():
    calls, used_mib = Waiting(16), 1100

    def trim() -> None:
        nonlocal used_mib
        used_mib = 990

    Relief(1000 * MIB, [calls], lambda: used_mib * MIB, trim).check()
    assert calls.asked_s == [WAITED_S]


def test_freed_memory_is_not_looked_through_again_and_again_where_that_does_not_help():
    trims, now = [], 100.0
    relief = Relief(1000 * MIB, [Waiting(0)], lambda: 990 * MIB, lambda: trims.append(now), lambda: now)
    for _ in range(2):
        assert [relief.check() for _ in range(20)] == [0] * 20
        now += FIRST_PAUSE_S
    assert trims == [100.0, 100.0 + FIRST_PAUSE_S]


def test_calls_are_ended_for_memory_again_after_pauses_or_once_it_has_grown():
    calls, now, used_mib = Waiting(1024), 100.0, 960
    relief = Relief(1000 * MIB, [calls], lambda: used_mib * MIB, no_trim, lambda: now)
    assert (relief.check(), relief.check()) == (512, 0)
    now += FIRST_PAUSE_S
    assert (relief.check(), relief.check()) == (256, 0)
    now += FIRST_PAUSE_S
    assert relief.check() == 0
    used_mib = 970
    assert (relief.check(), relief.check()) == (128, 0)
    used_mib = 900
    assert relief.check() == 0
    used_mib = 960
    assert (relief.check(), relief.check()) == (64, 0)


def test_a_server_whose_own_memory_is_beyond_the_limit_does_not_end_calls_again_and_again(tmp_path):
    options = config_of(tmp_path, memory_bytes=16 * MIB, receive_s=60)
    with optserve.local_server(backend="numpy", options=options) as server, raw(server.target) as (connection,):
        calls = [connection.call(STEPS) for _ in range(60)]

        def ended() -> int:
            return sum(call in connection.statuses for call in calls)

        wait_until(lambda: ended() > 0)
        assert "the server's memory is almost full" in next(iter(connection.statuses.values()))[1]
        # They all were ended, half of those that were left every quarter of a second.
        with pytest.raises(AssertionError, match="did not come about"):
            wait_until(lambda: ended() == len(calls), FIRST_PAUSE_S / 2)
