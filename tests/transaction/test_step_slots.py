"""The two kinds of step slot: that of an optimizer's client, and those of its workers."""

import threading

import numpy as np
import pytest

from optserve_server.domain.errors import OptserveError
from optserve_server.engine.step_slot import ClientSlot, StepSlot
from optserve_server.engine.transaction import NOTHING, PARAMETERS, UPDATES, Retained, Step, StepRequest
from optserve_server.engine.workers.worker_slot import WorkerSlot
from optserve_server.numerics.backends.numpy import NumpyBackend
from optserve_server.numerics.layout import ALL, Layout, Operand, Parameter, Payload
from optserve_server.numerics.rules import Sgd
from optserve_server.numerics.settings import Settings
from optserve_server.numerics.state import State

LAYOUT = Layout((Parameter("x", (4,), np.dtype("<f4")),))


def no_commit(step):
    raise AssertionError("nothing is committed here")


@pytest.fixture
def state():
    return State(LAYOUT, Settings(Sgd(), hosted=True), NumpyBackend(1))


@pytest.fixture
def client_slot(state):
    return ClientSlot("a", state, threading.RLock(), no_commit, 60.0)


@pytest.fixture
def freed():
    return []


@pytest.fixture
def worker_slot(state, freed):
    return WorkerSlot("a", state, threading.RLock(), no_commit, 60.0, freed.append)


def held_by_a_step(step_slot: StepSlot) -> Step:
    step = Step(step_slot, StepRequest("request"), Payload(LAYOUT, ALL), (Operand.GRADIENT,), replay=False)
    step_slot.holder = step
    return step


def test_a_clients_slot_always_has_its_buffer(client_slot):
    before = client_slot.staging
    step = held_by_a_step(client_slot)
    step.close()
    assert client_slot.holder is None
    assert client_slot.staging is before


def test_a_workers_slot_has_a_buffer_when_it_is_equipped(worker_slot):
    with pytest.raises(OptserveError, match="taken back"):
        _ = worker_slot.staging
    worker_slot.make_buffer()
    assert worker_slot.staging.updates[np.dtype("<f4")].size == 4
    assert worker_slot.drop_buffer()
    assert worker_slot.buffer is None


def test_a_buffer_is_not_taken_from_a_step(worker_slot, freed):
    worker_slot.make_buffer()
    step = held_by_a_step(worker_slot)
    assert not worker_slot.drop_buffer()
    step.close()
    assert freed == [worker_slot]
    assert worker_slot.drop_buffer()


def test_a_clients_slot_can_give_parameters_again_though_the_buffer_was_overwritten(client_slot):
    client_slot.retained = Retained("request", 1, ALL, intact=False)
    for reply in (PARAMETERS, NOTHING):
        assert client_slot.find_replay("request", reply) is client_slot.retained
    with pytest.raises(OptserveError, match="no longer retained"):
        client_slot.find_replay("request", UPDATES)


def test_a_workers_slot_gives_again_what_its_buffer_keeps_and_nothing_else(worker_slot):
    worker_slot.make_buffer()
    worker_slot.retained = Retained("request", 1, ALL, holds=PARAMETERS)
    for reply in (PARAMETERS, NOTHING):
        assert worker_slot.find_replay("request", reply) is worker_slot.retained
    with pytest.raises(OptserveError, match="no longer retained"):
        worker_slot.find_replay("request", UPDATES)
    worker_slot.drop_buffer()
    with pytest.raises(OptserveError, match="no longer retained"):
        worker_slot.find_replay("request", PARAMETERS)
    assert worker_slot.find_replay("request", NOTHING) is worker_slot.retained
