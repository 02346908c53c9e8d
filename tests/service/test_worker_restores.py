"""A state that is replaced while workers share it."""

import os
import signal

import numpy as np
import pytest

import optserve
from service.worker_harness import MODEL, full, over_both_transports, shared

client = over_both_transports


def test_a_restore_in_the_middle_of_a_workers_step_refuses_it_and_the_worker_can_go_on(client, name):
    opt = shared(client, name, optserve.Async(scale_by_staleness=True))
    opt.save_checkpoint("start")
    with client.worker(name, "w") as worker:
        worker.pull()
        worker.step(full(-1))
        # Raised at the end of the block, or by the second gradient, if the client has been told by then.
        with pytest.raises(optserve.StateReplacedError), worker._optimizer.begin_step() as step:  # noqa: PT012
            step.send("w", full(-1)["w"])
            opt.restore_checkpoint("start")
            step.send("b", full(-1)["b"])
        found = opt.pull_parameters()
        assert found.step == 0
        assert np.all(found.arrays["b"] == 0)
        worker.refresh()
        worker.pull()
        worker.step(full(-1))
        assert np.all(worker.pull().arrays["b"] == 1)


def test_a_restore_leaves_the_consistency_as_it_is(client, name):
    opt = client.create_optimizer(name, optserve.Sgd(), MODEL, hosted=True)
    opt.save_checkpoint("alone")
    opt.update(consistency=optserve.Async())
    with client.worker(name, "w") as worker:
        opt.restore_checkpoint("alone")
        worker.refresh()
        worker.pull()
        worker.step(full(-1))
    assert opt.consistency == optserve.Async()


def test_a_restore_and_steps_of_workers_survive_a_crash(tmp_path):
    with optserve.local_server(tmp_path) as server, optserve.connect(server.target) as client:
        opt = shared(client, "a", optserve.Async())
        with client.worker("a", "w") as worker:
            worker.pull()
            worker.step(full(-1))
            opt.save_checkpoint("one")
            worker.step(full(-1))
            opt.restore_checkpoint("one")
            worker.refresh()
            worker.pull()
            worker.step(full(-10))
        os.kill(server.process.pid, signal.SIGKILL)
        server.process.wait()
    with optserve.local_server(tmp_path) as server, optserve.connect(server.target) as client:
        with client.worker("a", "w") as worker:
            assert np.all(worker.pull().arrays["b"] == 11)
            worker.step(full(-1))
        assert client.optimizer("a").pull_parameters().step == 3
