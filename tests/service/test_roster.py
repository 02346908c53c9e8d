"""Which workers are remembered: all up to a limit, and beyond it those who have died last."""

import threading
from typing import Any

import pytest

from optserve_server.domain.errors import OptserveError
from optserve_server.engine.step_slot import Lane
from optserve_server.engine.transaction import Retained
from optserve_server.engine.workers import registry as roster_module
from optserve_server.engine.workers.buffer_budget import Room
from optserve_server.engine.workers.registry import Roster


def lane() -> Lane:
    # No step is made in it.
    nothing: Any = None
    return Lane("a", nothing, threading.RLock(), nothing, 60.0, lambda lane: None)


@pytest.fixture
def roster(monkeypatch) -> Roster:
    monkeypatch.setattr(roster_module, "MAX_KNOWN", 3)
    return Roster("a", lane, Room(0, 0))


def names(roster: Roster) -> list[str]:
    return [worker.name for worker in roster]


def test_one_more_than_can_be_remembered_is_refused_while_all_live(roster):
    for name in "abc":
        roster.revive(name, 60, 0)
    with pytest.raises(OptserveError) as refusal:
        roster.revive("d", 60, 0)
    assert refusal.value.reason.name == "SERVER_FULL"
    assert names(roster) == list("abc")
    # Those who are known may go on.
    assert roster.revive("a", 60, 0).alive


def test_who_has_been_dead_for_longest_is_forgotten_for_a_new_one(roster):
    for name in "abc":
        roster.revive(name, 60, 0)
    for name in "ba":
        roster.revive(name, 0, 0)
    roster.revive("d", 60, 0)
    assert names(roster) == list("acd")


def test_who_comes_anew_begins_with_the_slowest_that_lives(roster):
    fast, slow = roster.revive("fast", 60, 0), roster.revive("slow", 60, 0)
    fast.clock, slow.clock = 7, 4
    assert roster.revive("new", 60, 12).clock == 4
    # One that was behind when it died does not hold the others up.
    slow.lease_until = 0.0
    assert (roster.revive("slow", 60, 12).clock, slow.at_step) == (4, 12)
    slow.clock, slow.lease_until, fast.lease_until = 2, 0.0, 0.0
    assert roster.revive("slow", 60, 12).clock == 4


def test_who_alone_comes_back_does_not_wait_for_the_dead(roster):
    ahead, back = roster.revive("ahead", 60, 0), roster.revive("back", 60, 0)
    ahead.clock, ahead.lease_until, back.lease_until = 9, 0.0, 0.0
    assert roster.revive("back", 60, 0).clock == 9


def test_what_is_written_down_of_workers_is_what_is_read_again(roster):
    roster.revive("idle", 60, 0)
    roster.made_step("busy", Retained("request", 5, (0, 2), intact=False), clock=3)
    copy = Roster("a", lane, Room(0, 0))
    copy.from_json(roster.to_json())
    (busy,) = copy
    assert (busy.name, busy.clock, busy.lane.last_request_id, busy.alive) == ("busy", 3, "request", False)
    assert (busy.lane.retained.step, busy.lane.retained.tensors) == (5, (0, 2))
