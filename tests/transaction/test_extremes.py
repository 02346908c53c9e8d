"""Finite input never makes a state, a mean or a reply NaN or infinite: it is applied rightly, or refused whole."""

import threading
from contextlib import closing

import numpy as np
import pytest

from optserve_server import backends
from optserve_server.clipping import Clipping
from optserve_server.consistency import Consistency
from optserve_server.durability import InMemory
from optserve_server.errors import OptserveError
from optserve_server.layout import Layout, Operand, Parameter
from optserve_server.rules import Adadelta, Sgd
from optserve_server.settings import Settings
from optserve_server.state import State
from optserve_server.step import Reply
from optserve_server.steps import Steps
from transaction.harness import F4, F8, run_step


def optimizer(settings: Settings, *parameters: Parameter) -> Steps:
    """An optimizer; where it is hosted, x is 0."""
    state = State(Layout(parameters or (Parameter("w", (2,), F4),)), settings, backends.load("numpy", 1))
    steps = Steps("test", state, InMemory())
    if settings.hosted:
        with closing(steps.place("upload")) as upload:
            upload.stage(0, 0, bytes(upload.payload.size_bytes), Operand.PARAMETER)
            upload.commit()
    return steps


def together(steps: Steps, **gradients: np.ndarray) -> list[OptserveError]:
    """A step of a worker each, at the same time; what they are refused with."""
    refused: list[OptserveError] = []

    def work(worker: str, gradient: np.ndarray) -> None:
        with closing(steps.begin(f"{worker}-{steps.step}", reply=Reply.NOTHING, worker=worker)) as step:
            step.stage(0, 0, gradient.tobytes())
            try:
                step.commit()
            except OptserveError as error:
                refused.append(error)

    for worker in gradients:
        steps.workers.report(worker, leaving=False)
    threads = [threading.Thread(target=work, args=item, daemon=True) for item in gradients.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    return refused


@pytest.mark.parametrize("dtype", [F4, F8], ids=str)
def test_the_mean_of_two_workers_largest_gradients_is_applied(dtype):
    sync = Consistency("sync", workers=2)
    steps = optimizer(Settings(Sgd(learning_rate=0.5), hosted=True, consistency=sync), Parameter("w", (3,), dtype))
    most = np.finfo(dtype).max
    gradient = np.array([most, -most, most], dtype)
    assert not together(steps, a=gradient, b=gradient * np.array([1, 1, -1], dtype))
    assert steps._state.parameters[dtype].tolist() == [-most / 2, most / 2, 0]


@pytest.mark.parametrize("kind", ["value", "norm", "global_norm"])
def test_a_gradient_that_clipping_brings_down_may_be_of_any_size(kind):
    steps = optimizer(Settings(Adadelta(), clipping=Clipping(kind, 1.0)))
    reply = np.frombuffer(run_step(steps, "a", [(0, 0, np.array([1e20, 0], F4).tobytes())]), F4)
    alone = optimizer(Settings(Adadelta()))
    assert reply.tobytes() == run_step(alone, "a", [(0, 0, np.array([1, 0], F4).tobytes())])
