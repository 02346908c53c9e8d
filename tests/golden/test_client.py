"""What a client of an older version has sent is answered by today's server, and understood by that client."""

import base64
import json
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import pytest
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2

import optserve
from optserve.v1 import optimizer_pb2, service_pb2, service_pb2_grpc, steps_pb2
from service.wire_client import Stream

HERE = Path(__file__).parent
CLIENTS = [path.stem for path in sorted(HERE.glob("client-*.json"))]
BUSY_S = 20.0
OTHERS = {"createTime", "updateTime", "etag", "lineage", "memoryBytes", "stateBytes"}
"""Fields that have another value on each server."""
SETTINGS = {"limits", "GetServerInfo"}
"""What tells of the server itself: older clients want its fields, whatever their values are today."""


class Exchange(NamedTuple):
    """What an older client has sent in a stream until it waited, the number of the last message, and its answers."""

    number: int
    requests: list[steps_pb2.StreamStepsRequest]
    answers: list[steps_pb2.StreamStepsResponse]


def messages(call: dict[str, Any], kind: str) -> list[bytes]:
    return [base64.b64decode(data) for _, each, data in call["messages"] if each == kind]


def reason(status: status_pb2.Status) -> str:
    found = error_details_pb2.ErrorInfo()
    assert any(detail.Unpack(found) for detail in status.details), status
    return found.reason


def assert_has(now: Any, then: Any, *, same: bool = True) -> None:
    """What an older server has said is said today; `same` if the values count, and not only that there are any."""
    if isinstance(then, dict):
        for key in then.keys() - OTHERS:
            assert key in now, key
            assert_has(now[key], then[key], same=same and key not in SETTINGS)
    elif isinstance(then, list) and same:
        assert len(now) == len(then)
        for one, other in zip(now, then, strict=True):
            assert_has(one, other)
    elif same:
        assert now == then


def assert_says(now: Message, then: Message, method: str = "") -> None:
    assert_has(MessageToDict(now), MessageToDict(then), same=method not in SETTINGS)


def unary(stub: service_pb2_grpc.OptimizerServiceStub, call: dict[str, Any]) -> bool:
    """Make a unary call again; it makes no step."""
    method = call["method"].rpartition("/")[2]
    (sent,) = messages(call, "sent")
    request, response = getattr(service_pb2, f"{method}Request"), getattr(service_pb2, f"{method}Response")
    if call["code"] == "OK":
        (received,) = messages(call, "received")
        assert_says(getattr(stub, method)(request.FromString(sent)), response.FromString(received), method)
        return False
    with pytest.raises(grpc.RpcError) as caught:
        getattr(stub, method)(request.FromString(sent))
    error: Any = caught.value
    now = dict(error.trailing_metadata())["grpc-status-details-bin"]
    then = base64.b64decode(call["status"])
    assert error.code().name == call["code"]
    assert reason(status_pb2.Status.FromString(now)) == reason(status_pb2.Status.FromString(then))
    return False


def exchanges(call: dict[str, Any]) -> Iterator[Exchange]:
    """A stream's exchanges: its opening, then step after step."""
    answers = iter([steps_pb2.StreamStepsResponse.FromString(data) for data in messages(call, "received")])
    group = []
    for number, kind, data in call["messages"]:
        if kind == "sent":
            group.append(steps_pb2.StreamStepsRequest.FromString(base64.b64decode(data)))
            if group[-1].HasField("open") or group[-1].HasField("commit"):
                answered = []
                while not answered or not is_last(answered[-1]):
                    answered.append(next(answers))
                yield Exchange(number, group, answered)
                group = []


def is_last(answer: steps_pb2.StreamStepsResponse) -> bool:
    return any(answer.HasField(field) for field in ("opened", "result", "error"))


def placed(answers: list[steps_pb2.StreamStepsResponse], sizes: dict[int, int]) -> bytes:
    """The updates of a reply, where an older client puts them.

    It takes a chunk to begin at an offset of its tensor and to go on in those behind it, and counts all bytes.

    Args:
        answers: The reply.
        sizes: Bytes of each parameter that takes part in the step.
    """
    begins, total = {}, 0
    for tensor, size in sizes.items():
        begins[tensor] = total
        total += size
    data, seen = bytearray(total), Counter()
    for answer in answers:
        if answer.HasField("chunk"):
            start = begins[answer.chunk.tensor] + answer.chunk.offset
            data[start : start + len(answer.data)] = answer.data
            seen.update(range(start, start + len(answer.data)))
    assert seen == Counter(range(total))
    return bytes(data)


class Steps:
    """A stream whose steps are made again.

    Args:
        stub: Of today's server.
        sizes: Bytes of each parameter, by the optimizer's name.
    """

    def __init__(self, stub: service_pb2_grpc.OptimizerServiceStub, sizes: dict[str, list[int]]) -> None:
        self._stream = Stream(stub)
        self._sizes = sizes
        self._name, self._last_tensors = "", []

    def make(self, exchange: Exchange) -> bool:
        """Send the requests of one step, or open the stream; gives whether a step was applied."""
        now = self._answers(exchange)
        until = time.monotonic() + BUSY_S
        # The step of another stream, whose reply is here, may not be put away yet: the older client tries again.
        while now[-1].HasField("error") and reason(now[-1].error.status) == "STEP_IN_PROGRESS":
            assert time.monotonic() < until
            time.sleep(0.02)
            now = self._answers(exchange)
        first, end, then = exchange.requests[0], now[-1], exchange.answers[-1]
        if then.HasField("opened"):
            self._name, self._last_tensors = first.open.name, list(end.opened.last_tensors)
            assert_says(end, then)
            return False
        if then.HasField("error"):
            assert end.error.request_id in ("", first.begin.request_id)
            assert reason(end.error.status) == reason(then.error.status)
            return False
        assert_says(end.result, then.result)
        assert end.result.replayed == then.result.replayed
        # A reply is asked for by the request id of its step alone, without tensors.
        named = list(first.begin.tensors) or (self._last_tensors if end.result.replayed else [])
        sizes = {index: size for index, size in enumerate(self._sizes[self._name]) if not named or index in named}
        assert placed(now, sizes) == placed(exchange.answers, sizes)
        return not end.result.replayed

    def _answers(self, exchange: Exchange) -> list[steps_pb2.StreamStepsResponse]:
        self._stream.send(*exchange.requests)
        answers = [self._stream.receive()]
        while not is_last(answers[-1]):
            answers.append(self._stream.receive())
        return answers

    def close(self) -> None:
        self._stream.half_close()
        self._stream.call.cancel()


def sizes_of(optimizer: optimizer_pb2.Optimizer) -> list[int]:
    """Bytes of each parameter."""
    float64 = optimizer_pb2.DATA_TYPE_FLOAT64
    return [
        math.prod(parameter.shape) * (8 if parameter.data_type == float64 else 4) for parameter in optimizer.parameters
    ]


@pytest.mark.parametrize("name", CLIENTS)
def test_an_older_client_is_answered_as_its_own_server_has_answered(name):
    sizes: dict[str, list[int]] = {}
    steps = 0
    with (
        optserve.local_server(backend="numpy") as server,
        grpc.insecure_channel(server.target) as channel,
        ExitStack() as stack,
    ):
        stub = service_pb2_grpc.OptimizerServiceStub(channel)
        # Calls that were made while a stream was open are made between its steps again.
        todo: list[tuple[int, Callable[[], bool]]] = []
        for call in json.loads((HERE / f"{name}.json").read_text()):
            if call["method"].endswith("/StreamSteps"):
                stream = Steps(stub, sizes)
                stack.callback(stream.close)
                todo += [(exchange.number, partial(stream.make, exchange)) for exchange in exchanges(call)]
                continue
            if call["method"].endswith("/CreateOptimizer"):
                request = service_pb2.CreateOptimizerRequest.FromString(messages(call, "sent")[0])
                # The first of a name is the one that is made.
                sizes.setdefault(f"optimizers/{request.optimizer_id}", sizes_of(request.optimizer))
            todo.append((call["messages"][0][0], partial(unary, stub, call)))
        for _, make in sorted(todo, key=lambda item: item[0]):
            steps += make()
    assert steps > 10
