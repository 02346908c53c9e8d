"""Which threads a server starts: those of its calls, and none for their messages."""

import threading

import grpc
import pytest

from optserve.v1 import service_pb2_grpc
from optserve_server.app import App
from optserve_server.domain.config import ServerConfig
from service.wire_client import begin, chunk, commit, create, stream


@pytest.fixture
def app():
    """In this process, so that the start of a thread can be seen however soon it ends."""
    app = App(ServerConfig(port=0, backend="numpy"))
    app.start()
    try:
        yield app
    finally:
        app.stop()


def test_no_thread_is_started_for_a_message_of_a_stream(app, monkeypatch):
    started: list[str] = []
    real = threading.Thread.start

    def start(thread: threading.Thread) -> None:
        started.append(thread.name)
        real(thread)

    with grpc.insecure_channel(app.target) as channel:
        stub = service_pb2_grpc.OptimizerServiceStub(channel)
        name = create(stub, "a", {"x": (100,)}).name
        with stream(stub, name) as steps:
            steps.send(begin("first"), chunk(0, 0, bytes(400)), commit())
            assert steps.reply()[1].step == 1
            monkeypatch.setattr(threading.Thread, "start", start)
            for number in range(3):
                chunks = [chunk(0, 4 * element, bytes(4)) for element in range(100)]
                steps.send(begin(f"step-{number}"), *chunks, commit())
                assert steps.reply()[1].step == number + 2
            assert not started
