"""Workers on one optimizer, without a server: what happens between two looks of one that waits."""

import threading
import uuid
from contextlib import closing

import numpy as np
import pytest

from optserve_server import backends
from optserve_server.consistency import Consistency
from optserve_server.durability import InMemory
from optserve_server.errors import OptserveError, Reason
from optserve_server.layout import Layout, Operand, Parameter
from optserve_server.rules import Sgd
from optserve_server.settings import Settings
from optserve_server.state import State
from optserve_server.step import Reply
from optserve_server.steps import Steps
from transaction.harness import F4

ONES = np.ones(2, np.float32).tobytes()


def make_step(steps: Steps, worker: str) -> int:
    """A whole step of a worker; gives its number."""
    step = steps.begin(str(uuid.uuid4()), reply=Reply.NOTHING, worker=worker)
    try:
        step.stage(0, 0, ONES)
        return step.commit().step
    finally:
        step.close()


def shared_by(kind: str, *workers: str) -> Steps:
    """An optimizer that these workers share."""
    settings = Settings(Sgd(), hosted=True, consistency=Consistency(kind))
    state = State(Layout((Parameter("x", (2,), F4),)), settings, backends.load("numpy", 1))
    steps = Steps("test", state, InMemory())
    with closing(steps.place("upload")) as upload:
        upload.stage(0, 0, ONES, Operand.PARAMETER)
        upload.commit()
    for worker in workers:
        steps.workers.report(worker, leaving=False)
    return steps


def test_a_worker_that_is_about_to_wait_does_not_miss_what_it_would_wait_for(monkeypatch):
    steps = shared_by("bounded", "fast", "slow")
    make_step(steps, "fast")
    wait, waited = steps.workers._wait, []

    def late(worker, step, told):
        if not waited:
            waited.append(worker.name)
            # The optimizer's lock is held here, as a lock that can be taken again: this is the last moment before it.
            make_step(steps, "slow")
        wait(worker, step, told)

    monkeypatch.setattr(steps.workers, "_wait", late)
    numbers: list[int] = []
    thread = threading.Thread(target=lambda: numbers.append(make_step(steps, "fast")), daemon=True)
    thread.start()
    thread.join(5)
    assert waited == ["fast"]
    assert numbers == [3]


def test_a_replay_whose_reply_has_gone_meanwhile_applies_nothing_from_shared_memory():
    steps = shared_by("async", "w")
    segment = steps.share()
    assert segment is not None
    segment.operands[Operand.GRADIENT][F4][:2] = 1
    with closing(steps.begin("a", segment=segment, worker="w")) as step:
        step.commit()
    with closing(steps.begin("a", segment=segment, worker="w")) as replay:
        steps.workers.forget_replies()
        with pytest.raises(OptserveError, check=lambda error: error.reason is Reason.MISSING_CHUNK):
            replay.commit()
    assert steps.step == 1
