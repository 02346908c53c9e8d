"""Workers that wait for others: for whom, how long, and what lets them go."""

import re
import signal
import threading
import time
from contextlib import ExitStack, suppress

import numpy as np
import pytest

import optserve
from service.worker_harness import full, over_both_transports, run_all, shared

client = over_both_transports


def test_nobody_waits_for_a_worker_that_is_dead(client, name):
    shared(client, name, optserve.Bounded(0, lease_s=1.0))
    dead = client.worker(name, "dead")
    dead._register()
    with client.worker(name, "alive") as alive:
        alive.pull()
        begun = time.monotonic()
        for _ in range(3):
            alive.step(full(-1), timeout_s=20)
        assert time.monotonic() - begun < 10
        assert alive.current_step == 3


def test_with_too_few_workers_alive_a_step_is_refused_and_made_when_another_comes(client, name):
    shared(client, name, optserve.Sync(2))
    with client.worker(name, "one") as one:
        one.pull()
        with pytest.raises(optserve.UnavailableError, match="takes 2 workers, of which 1 are alive"):
            one.step(full(-1), timeout_s=0.5)

        def second() -> None:
            with client.worker(name, "two") as two:
                two.pull()
                two.step(full(-3))

        run_all([lambda: one.step(full(-1)), second])
        assert np.all(one.pull().arrays["b"] == 2)


def test_who_waits_alone_is_told_after_seconds_who_is_there(client, name, caplog):
    shared(client, name, optserve.Sync(2))
    with client.worker(name, "gone"):
        pass
    with client.worker(name, "one") as one:
        one.pull()
        there = r"takes 2 workers, of which 1 are alive \('one'\)\. No longer alive: 'gone'\."
        raised: optserve.OptserveError | None = None
        # On a busy machine a deadline may fall into one of the tries, and then says nothing of the pauses between them.
        for _ in range(5):
            caplog.clear()
            with pytest.raises((optserve.TooFewWorkersError, optserve.DeadlineExceededError)) as caught:
                one.step(full(-1), timeout_s=3.5)
            raised = caught.value
            if isinstance(raised, optserve.TooFewWorkersError):
                break
        assert isinstance(raised, optserve.TooFewWorkersError)
        assert re.search(there, raised.message)
        assert [record.levelname for record in caplog.records if re.search(there, record.getMessage())] == ["WARNING"]
        caplog.clear()
        # One that is there and slow is waited for, without a word.
        with client.worker(name, "slow"):
            with pytest.raises(optserve.DeadlineExceededError):
                one.step(full(-1), timeout_s=2.5)
            assert not caplog.records


def waits(worker: optserve.Worker) -> threading.Event:
    """Is set once a step of that worker is being made."""
    waiting = threading.Event()

    def look() -> None:
        while worker._optimizer._session._patience is None:
            time.sleep(0.001)
        waiting.set()

    threading.Thread(target=look, daemon=True).start()
    return waiting


@pytest.mark.parametrize("alone", [False, True])
def test_leaving_the_block_interrupts_a_step_that_waits_and_takes_the_leave_at_once(client, name, alone):
    opt = shared(client, name, optserve.Sync(2))
    raised: list[BaseException] = []
    threads: list[threading.Thread] = []
    begun = 0.0

    def step(worker: optserve.Worker) -> None:
        try:
            worker.step(full(-1))
        except optserve.OptserveError as error:
            raised.append(error)

    with ExitStack() as others:
        if not alone:
            others.enter_context(client.worker(name, "other"))
        with suppress(KeyboardInterrupt), client.worker(name, "w") as worker:
            worker.pull()
            waiting = waits(worker)
            threads = [threading.Thread(target=step, args=(worker,)) for _ in range(3)]
            for thread in threads:
                thread.start()
            assert waiting.wait(30)
            begun = time.monotonic()
            # As when somebody presses Ctrl-C while this thread waits for the others.
            raise KeyboardInterrupt
        assert time.monotonic() - begun < 10
        for thread in threads:
            thread.join(10)
            assert not thread.is_alive()
        assert {type(error) for error in raised} <= {optserve.StepCancelledError, optserve.ClientUseError}
        assert len(raised) == 3
        with client.worker(name, "looks") as looks:
            assert looks.live_workers == (1 if alone else 2)
        with pytest.raises(optserve.ClientUseError, match="has left"):
            worker.step(full(-1))
    assert opt.pull_parameters().step == 0


def test_a_step_that_waits_is_let_go_when_its_client_is_gone_or_the_server_stops():
    with optserve.local_server() as server, optserve.connect(server.target) as client:
        shared(client, "a", optserve.Sync(2))
        with client.worker("a", "other"), client.worker("a", "w") as worker:
            worker.pull()
            with pytest.raises(optserve.DeadlineExceededError):
                worker.step(full(-1), timeout_s=0.3)

            def wait() -> None:
                with suppress(optserve.OptserveError):
                    worker.step(full(-1))

            waiting = threading.Thread(target=wait)
            waiting.start()
            while worker._optimizer._session._patience is None:
                time.sleep(0.001)
            begun = time.monotonic()
            server.process.send_signal(signal.SIGTERM)
            assert server.process.wait(15) == 0
            assert time.monotonic() - begun < 8
            client.close()
            waiting.join(20)
            assert not waiting.is_alive()
