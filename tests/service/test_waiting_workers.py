"""Steps that wait for other workers are let go when their client or their server goes.

For whom they wait, and how long, is played in virtual time in `simulation/test_waiting.py`.
"""

import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress

import pytest

import optserve
from clocks import TellingClock
from service.worker_harness import app, full, shared


def step_that_fails(worker: optserve.Worker) -> type[optserve.OptserveError]:
    with pytest.raises(optserve.OptserveError) as caught:
        worker.step(full(-1))
    return type(caught.value)


@pytest.mark.parametrize("transport", ["grpc", "shm"])
@pytest.mark.parametrize("ended_by", ["leave", "close"])
def test_a_step_that_waits_for_others_is_interrupted_by_its_own_process(transport, ended_by):
    clock = TellingClock()
    config = optserve.ClientConfig(transport=transport)
    with app(clock) as served, optserve.connect(served.target, config) as client, ThreadPoolExecutor(3) as threads:
        opt = shared(client, "a", optserve.Sync(2))
        begun, steps = 0.0, list[Future[type[optserve.OptserveError]]]()
        with optserve.connect(served.target) as elsewhere, elsewhere.worker("a", "other"):
            with suppress(KeyboardInterrupt), client.worker("a", "w") as worker:
                worker.pull()
                steps = [threads.submit(step_that_fails, worker) for _ in range(3)]
                assert clock.somebody_waits.wait(30)
                begun = time.monotonic()
                if ended_by == "close":
                    client.close()
                # As when somebody presses Ctrl-C while this thread waits for the others.
                raise KeyboardInterrupt
            assert time.monotonic() - begun < 10
            raised = [step.result(10) for step in steps]
            assert set(raised) <= {optserve.StepCancelledError, optserve.ClientUseError}
            if ended_by == "leave":
                # The one that waited; the others waited for their turns.
                assert optserve.StepCancelledError in raised
                with elsewhere.worker("a", "looks") as looks:
                    assert looks.live_workers == 2
                with pytest.raises(optserve.ClientUseError, match="has left"):
                    worker.step(full(-1))
            assert elsewhere.optimizer("a").pull_parameters().step == opt.current_step == 0


@pytest.mark.parametrize("transport", ["grpc", "shm"])
def test_a_step_that_waits_for_others_is_let_go_when_the_server_stops(transport):
    clock = TellingClock()
    # The client tries again as long as this: the server that it waits for does not come back.
    config = optserve.ClientConfig(transport=transport, step_timeout_s=20)
    with app(clock) as served, optserve.connect(served.target, config) as client, ThreadPoolExecutor(1) as threads:
        shared(client, "a", optserve.Sync(2))
        with client.worker("a", "other"), client.worker("a", "w") as worker:
            worker.pull()
            step = threads.submit(step_that_fails, worker)
            assert clock.somebody_waits.wait(30)
            begun = time.monotonic()
            assert served.stop()
            assert time.monotonic() - begun < 8
            client.close()
            assert step.result(20) in {optserve.ClientUseError, optserve.StepInDoubtError}
