"""A client of the contract as plain as it can be: generated messages, nothing of ours."""

import queue
import uuid
from contextlib import contextmanager
from typing import Any

import grpc
import numpy as np
import pytest
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from optserve.v1 import algorithms_pb2, optimizer_pb2, service_pb2, steps_pb2
from optserve.v1.steps_pb2 import StreamStepsRequest as Request
from optserve.v1.steps_pb2 import StreamStepsResponse as Response


def create(stub, optimizer_id: str, shapes: dict[str, tuple[int, ...]], **settings: Any) -> optimizer_pb2.Optimizer:
    """An ADADELTA optimizer of float32 parameters."""
    optimizer = optimizer_pb2.Optimizer(
        algorithm=algorithms_pb2.Algorithm(adadelta=algorithms_pb2.Adadelta()),
        parameters=[optimizer_pb2.Parameter(name=name, shape=shape) for name, shape in shapes.items()],
        **settings,
    )
    return stub.CreateOptimizer(
        service_pb2.CreateOptimizerRequest(optimizer_id=optimizer_id, optimizer=optimizer)
    ).optimizer


def gradients(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


class Stream:
    """A StreamSteps call, message by message."""

    def __init__(self, stub) -> None:
        self._outgoing: queue.SimpleQueue[Request | None] = queue.SimpleQueue()
        self.call = stub.StreamSteps(iter(self._outgoing.get, None), timeout=30)

    def send(self, *requests: Request) -> None:
        for request in requests:
            self._outgoing.put(request)

    def half_close(self) -> None:
        self._outgoing.put(None)

    def receive(self) -> Response:
        return next(self.call)

    def open(self, name: str, **options: Any) -> steps_pb2.Opened:
        self.send(Request(open=steps_pb2.Open(name=name, **options)))
        return self.receive().opened

    def step_when_free(self, *requests: Request) -> tuple[bytes, steps_pb2.Result]:
        """`reply` to a step that is sent until the one before, by another stream, has ended.

        It has not quite when its reply has arrived; clients are told to try again.
        """
        while True:
            self.send(*requests)
            response = self.receive()
            if not response.HasField("error") or details(response.error.status)[0] != "STEP_IN_PROGRESS":
                return self.reply(response)

    def reply(self, first: Response | None = None) -> tuple[bytes, steps_pb2.Result]:
        """The payload of a step's reply, of which `first` may have been received, and its result."""
        payload = b""
        while True:
            response, first = first or self.receive(), None
            assert not response.HasField("error"), response.error
            payload += response.data
            if response.HasField("result"):
                return payload, response.result

    def error(self) -> status_pb2.Status:
        response = self.receive()
        assert response.HasField("error"), response
        return response.error.status


@contextmanager
def stream(stub, name: str = "", **options: Any):
    """An open stream, cancelled at the end."""
    opened = Stream(stub)
    if name:
        opened.open(name, **options)
    try:
        yield opened
    finally:
        opened.half_close()
        opened.call.cancel()


def begin(request_id: str = "", **options: Any) -> Request:
    return Request(begin=steps_pb2.Begin(request_id=request_id or str(uuid.uuid4()), **options))


def chunk(tensor: int, offset: int, data: bytes) -> Request:
    return Request(chunk=steps_pb2.Chunk(tensor=tensor, offset=offset), data=data)


def commit() -> Request:
    return Request(commit=steps_pb2.Commit())


def details(status: status_pb2.Status) -> tuple[str, dict[str, str], str, float | None]:
    """(reason, metadata, field path, seconds to wait before a retry) of a status."""
    info, bad, retry = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest(), error_details_pb2.RetryInfo()
    retry_s = None
    for detail in status.details:
        detail.Unpack(info)
        detail.Unpack(bad)
        if detail.Unpack(retry):
            retry_s = retry.retry_delay.ToTimedelta().total_seconds()
    assert info.domain == "optserve.v1"
    return info.reason, dict(info.metadata), bad.field_violations[0].field if bad.field_violations else "", retry_s


@contextmanager
def refused(code: grpc.StatusCode, reason: str, field: str | None = None):
    """The block's call fails with that status, reason and, if given, field path."""
    seen: dict[str, Any] = {}
    with pytest.raises(grpc.RpcError) as caught:
        yield seen
    call: Any = caught.value
    status = rpc_status.from_call(call)
    assert status is not None, f"no google.rpc.Status: {call}"
    actual_reason, metadata, actual_field, retry_s = details(status)
    assert (call.code(), actual_reason) == (code, reason), status
    assert field is None or actual_field == field
    seen.update(metadata=metadata, message=status.message, retry_s=retry_s)
