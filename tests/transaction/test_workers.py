"""Workers on one optimizer, without a server: what happens between two looks of one that waits."""

import threading
import uuid

import numpy as np

from optserve_server import backends
from optserve_server.consistency import Consistency
from optserve_server.durability import InMemory
from optserve_server.layout import Layout, Parameter
from optserve_server.rules import Sgd
from optserve_server.settings import Settings
from optserve_server.state import State
from optserve_server.step import Reply
from optserve_server.steps import Steps

ONES = np.ones(2, np.float32).tobytes()


def make_step(steps: Steps, worker: str) -> int:
    """A whole step of a worker; gives its number."""
    step = steps.begin(str(uuid.uuid4()), reply=Reply.NOTHING, worker=worker)
    try:
        step.stage(0, 0, ONES)
        return step.commit().step
    finally:
        step.close()


def test_a_worker_that_is_about_to_wait_does_not_miss_what_it_would_wait_for(monkeypatch):
    settings = Settings(Sgd(), hosted=True, consistency=Consistency("bounded"))
    state = State(Layout((Parameter("x", (2,), np.dtype("f4")),)), settings, backends.load("numpy", 1))
    steps = Steps("test", state, InMemory())
    upload = steps.place("upload")
    upload.stage(0, 0, ONES, next(iter(upload.coverage)))
    upload.commit()
    upload.close()
    for worker in ("fast", "slow"):
        steps.workers.report(worker, leaving=False)
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
