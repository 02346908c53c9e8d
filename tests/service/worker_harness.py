"""What the tests of workers share."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

import optserve
from optserve._common.clock import Clock
from optserve.v1 import optimizer_pb2, replicas_pb2, steps_pb2
from optserve_server.app import App
from optserve_server.domain.config import ServerConfig

MODEL = {"w": np.zeros((20, 3), np.float32), "b": np.zeros(3, np.float64)}
QUICK = optserve.ClientConfig(initial_backoff_s=0.02, max_backoff_s=0.2)


@pytest.fixture(scope="module", params=["grpc", "shm"])
def over_both_transports(server, request):
    """A client whose workers come over one transport and then the other; streams that are made by hand are gRPC's."""
    with optserve.connect(server.target, optserve.ClientConfig(transport=request.param)) as connected:
        yield connected


@contextmanager
def app(clock: Clock, **settings: Any) -> Iterator[App]:
    """A server in this process, with a clock that tells when a commit waits, or whose time the test lets pass."""
    made = App(ServerConfig(port=0, backend="numpy", **settings), clock=clock)
    made.start()
    try:
        yield made
    finally:
        made.stop()


def full(value: float) -> dict[str, np.ndarray]:
    """A gradient whose elements are all the same."""
    return {name: np.full(param.shape, value, param.dtype) for name, param in MODEL.items()}


def shared(client: optserve.Client, name: str, consistency: optserve.Consistency, algorithm=None) -> optserve.Optimizer:
    algorithm = algorithm or optserve.Sgd(learning_rate=1.0)
    return client.create_optimizer(name, algorithm, MODEL, hosted=True, consistency=consistency)


def config_of(tmp_path, **settings) -> list[str]:
    config = tmp_path / "optserve.toml"
    config.write_text("".join(f"{name} = {value}\n" for name, value in settings.items()))
    return ["--config", str(config)]


def run_all(jobs) -> None:
    """Run functions side by side, and raise what one of them has raised."""
    failures: list[BaseException] = []

    def run(job) -> None:
        try:
            job()
        except BaseException as error:  # noqa: BLE001 - raised below
            failures.append(error)

    threads = [threading.Thread(target=run, args=(job,)) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    if failures:
        raise failures[0]


def report(stub, name: str, worker: str, state=replicas_pb2.WORKER_STATE_ALIVE):
    return stub.ReportWorker(replicas_pb2.ReportWorkerRequest(name=name, worker=worker, state=state))


def place(stub, name: str, x: np.ndarray) -> None:
    messages = [
        replicas_pb2.PushParametersRequest(name=name, request_id="push"),
        replicas_pb2.PushParametersRequest(chunk=steps_pb2.Chunk(), data=x.tobytes(), commit=steps_pb2.Commit()),
    ]
    stub.PushParameters(iter(messages))


ASYNC = optserve.Async().to_message()
HOSTED = {"mode": optimizer_pb2.MODE_HOSTED, "consistency": ASYNC}
X = np.zeros(2, np.float32)
