"""Which workers are remembered: all up to a limit, and beyond it those who have died last."""

import threading
from typing import Any

import pytest

from optserve_server.domain.errors import OptserveError
from optserve_server.engine.transaction import Retained
from optserve_server.engine.workers import registry as roster_module
from optserve_server.engine.workers.buffer_budget import BufferBudget
from optserve_server.engine.workers.registry import WorkerRegistry
from optserve_server.engine.workers.worker_slot import WorkerSlot
from optserve_server.numerics.layout import Selection
from present import present


def step_slot() -> WorkerSlot:
    # No step is made in it.
    nothing: Any = None
    return WorkerSlot("a", nothing, threading.RLock(), nothing, 60.0, lambda step_slot: None)


@pytest.fixture
def registry(monkeypatch) -> WorkerRegistry:
    monkeypatch.setattr(roster_module, "MAX_KNOWN", 3)
    return WorkerRegistry("a", step_slot, BufferBudget(0, 0))


def names(registry: WorkerRegistry) -> list[str]:
    return [worker.name for worker in registry]


def test_one_more_than_can_be_remembered_is_refused_while_all_live(registry):
    for name in "abc":
        registry.revive(name, 60, 0)
    with pytest.raises(OptserveError) as refusal:
        registry.revive("d", 60, 0)
    assert refusal.value.reason.name == "SERVER_FULL"
    assert names(registry) == list("abc")
    # Those who are known may go on.
    assert registry.revive("a", 60, 0).alive


def test_who_has_been_dead_for_longest_is_forgotten_for_a_new_one(registry):
    for name in "abc":
        registry.revive(name, 60, 0)
    for name in "ba":
        registry.revive(name, 0, 0)
    registry.revive("d", 60, 0)
    assert names(registry) == list("acd")


def test_who_comes_anew_begins_with_the_slowest_that_lives(registry):
    fast, slow = registry.revive("fast", 60, 0), registry.revive("slow", 60, 0)
    fast.clock, slow.clock = 7, 4
    assert registry.revive("new", 60, 12).clock == 4
    # One that was behind when it died does not hold the others up.
    slow.lease_until = 0.0
    assert (registry.revive("slow", 60, 12).clock, slow.at_step) == (4, 12)
    slow.clock, slow.lease_until, fast.lease_until = 2, 0.0, 0.0
    assert registry.revive("slow", 60, 12).clock == 4


def test_who_alone_comes_back_does_not_wait_for_the_dead(registry):
    ahead, back = registry.revive("ahead", 60, 0), registry.revive("back", 60, 0)
    ahead.clock, ahead.lease_until, back.lease_until = 9, 0.0, 0.0
    assert registry.revive("back", 60, 0).clock == 9


def test_what_is_written_down_of_workers_is_what_is_read_again(registry):
    registry.revive("idle", 60, 0)
    registry.made_step("busy", Retained("request", 5, Selection((0, 2)), intact=False), clock=3)
    copy = WorkerRegistry("a", step_slot, BufferBudget(0, 0))
    copy.from_json(registry.to_json())
    (busy,) = copy
    assert (busy.name, busy.clock, busy.step_slot.last_request_id, busy.alive) == ("busy", 3, "request", False)
    assert (present(busy.step_slot.retained).step, present(busy.step_slot.retained).selection) == (5, Selection((0, 2)))
