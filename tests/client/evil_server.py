"""A server in the test process that answers well, until it is told to answer garbage.

It keeps one optimizer "m": SGD with a learning rate of 1, so that an update is the gradient with its sign changed.
"""

from __future__ import annotations

import itertools
import re
import socket
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import grpc
import numpy as np

from optserve._common import sysv
from optserve.v1 import (
    additions_pb2,
    checkpoints_pb2,
    optimizer_pb2,
    replicas_pb2,
    service_pb2,
    statistics_pb2,
    steps_pb2,
)

NAME = "optimizers/m"
SHAPES = {"w": (4,), "none": (0, 2), "b": (3,)}
DTYPES = {"w": np.dtype("<f4"), "none": np.dtype("<f4"), "b": np.dtype("<f8")}
SIZES = {name: int(np.prod(shape)) * DTYPES[name].itemsize for name, shape in SHAPES.items()}
SIZE = sum(SIZES.values())
NONCE, DIRTY, REPLIED, FIRST = 0, 64, 128, 192
TAG = f"{NAME}/checkpoints/good"

Answers = Iterable[Any]
"""Messages or their bytes; End and Refusal end the call; None waits until the client gives up."""


class Refusal(Exception):
    """Ends a call with a status."""

    def __init__(self, code: object, details: str = "no", trailers: tuple = ()) -> None:
        super().__init__(details)
        self.code, self.details, self.trailers = code, details, trailers


class End(Exception):
    """Ends a call well."""


class EvilServer:
    """The server.

    Attributes:
        target: Where clients connect.
        twist: (method, what the answers become); for steps the method is `open` or `step`.
        streams: How many streams of steps are open.
    """

    def __init__(self) -> None:
        self.twist: tuple[str, Callable[[list], Answers]] | None = None
        self.streams = 0
        self._changed = threading.Condition()
        self.reset()
        self._pool = ThreadPoolExecutor(64)
        self._server = grpc.server(self._pool, handlers=[_Handler(self)], options=[("grpc.so_reuseport", 0)])
        self.target = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        self._server.start()
        self.closing = threading.Event()

    def reset(self) -> None:
        """As at the start."""
        self.step, self.last_request_id, self.reply = 0, "", b""
        self.twist = None
        self.offer: steps_pb2.SharedMemory | None = None
        self.memory = np.empty(0, np.uint8)
        self.host_id = ""

    def close(self) -> None:
        self.closing.set()
        self._server.stop(0).wait()
        self._pool.shutdown()

    def answers(self, method: str, requests: Iterator[bytes]) -> Answers:
        if method == "StreamSteps":
            return self._stream(requests)
        answer = getattr(self, re.sub("(?<!^)([A-Z])", r"_\1", method).lower())(requests)
        return self.twisted(method, answer if isinstance(answer, list) else [answer])

    def _stream(self, requests: Iterator[bytes]) -> Iterator:
        self._count(1)
        try:
            yield from itertools.chain.from_iterable(map(self.answer_step, requests))
        finally:
            self._count(-1)

    def _count(self, change: int) -> None:
        with self._changed:
            self.streams += change
            self._changed.notify_all()

    def wait_for_streams(self, number: int) -> bool:
        """Whether no more than that many streams are open soon."""
        with self._changed:
            return self._changed.wait_for(lambda: self.streams <= number, 10)

    def twisted(self, method: str, answers: list) -> Answers:
        if self.twist is not None and self.twist[0] == method:
            return self.twist[1](answers)
        return answers

    def answer_step(self, raw: bytes) -> Answers:
        request = steps_pb2.StreamStepsRequest.FromString(raw)
        if request.HasField("open"):
            return self.twisted("open", [steps_pb2.StreamStepsResponse(opened=self.opened(request.open))])
        if not request.HasField("commit"):
            return []
        replayed = request.begin.request_id == self.last_request_id
        shared = self.memory[FIRST : FIRST + SIZE] if self.memory.size else None
        if not replayed:
            gradients = shared.tobytes() if shared is not None else request.data
            split = SIZES["w"]
            self.reply = (-np.frombuffer(gradients[:split], "<f4")).tobytes()
            self.reply += (-np.frombuffer(gradients[split:], "<f8")).tobytes()
            self.step, self.last_request_id = self.step + 1, request.begin.request_id
        result = steps_pb2.Result(request_id=self.last_request_id, step=self.step, replayed=replayed)
        if shared is not None:
            shared[:] = np.frombuffer(self.reply, np.uint8)
            return self.twisted("step", [steps_pb2.StreamStepsResponse(result=result)])
        chunks = [chunk(0, 0, self.reply[: SIZES["w"]]), chunk(2, 0, self.reply[SIZES["w"] :])]
        chunks[-1].result.CopyFrom(result)
        return self.twisted("step", chunks)

    def opened(self, request: steps_pb2.Open) -> steps_pb2.Opened:
        shared = self.offer if request.transport == steps_pb2.TRANSPORT_SHARED_MEMORY else None
        limits = steps_pb2.ServerLimits(max_chunk_bytes=1 << 20, preferred_chunk_bytes=1 << 20)
        return steps_pb2.Opened(
            step=self.step,
            last_request_id=self.last_request_id,
            limits=limits,
            lineage="l",
            shared_memory=shared,
        )

    def share(self, control: str = "") -> None:
        """Offer a segment from now on."""
        size = FIRST + 2 * SIZE
        number, self.memory = sysv.create(size)
        self.host_id = sysv.host_id()
        self.offer = steps_pb2.SharedMemory(
            segment=f"sysv:{number}",
            size_bytes=size,
            nonce_offset=NONCE,
            offsets=[FIRST, FIRST + SIZES["w"], FIRST + SIZES["w"]],
            dirty_offset=DIRTY,
            replied_offset=REPLIED,
            control_socket=control,
        )

    def optimizer(self) -> optimizer_pb2.Optimizer:
        message = optimizer_pb2.Optimizer(name=NAME, step=self.step, lineage="l", slots=["momentum"])
        message.algorithm.momentum.SetInParent()
        message.mode = optimizer_pb2.MODE_HOSTED
        for name, shape in SHAPES.items():
            kind = optimizer_pb2.DATA_TYPE_FLOAT32 if DTYPES[name].itemsize == 4 else optimizer_pb2.DATA_TYPE_FLOAT64
            message.parameters.add(name=name, shape=shape, data_type=kind)
        return message

    def get_server_info(self, requests):
        info = service_pb2.GetServerInfoResponse(version="0", host_id=self.host_id)
        info.features.add(feature=service_pb2.FEATURE_ADDED_PARAMETERS, available=True)
        return info

    def get_optimizer(self, requests):
        return service_pb2.GetOptimizerResponse(optimizer=self.optimizer())

    def create_optimizer(self, requests):
        return service_pb2.CreateOptimizerResponse(optimizer=self.optimizer())

    def update_optimizer(self, requests):
        return service_pb2.UpdateOptimizerResponse(optimizer=self.optimizer())

    def delete_optimizer(self, requests):
        return service_pb2.DeleteOptimizerResponse()

    def list_optimizers(self, requests):
        return service_pb2.ListOptimizersResponse(optimizers=[self.optimizer()])

    def report_worker(self, requests):
        request = replicas_pb2.ReportWorkerRequest.FromString(next(requests))
        response = replicas_pb2.ReportWorkerResponse(live_workers=1, step=self.step)
        response.life = request.life or 1
        response.lease.seconds = 30
        return response

    def checkpoint(self) -> checkpoints_pb2.Checkpoint:
        message = checkpoints_pb2.Checkpoint(name=TAG, step=self.step, size_bytes=1)
        message.create_time.seconds = 1
        return message

    def save_checkpoint(self, requests):
        return checkpoints_pb2.SaveCheckpointResponse(checkpoint=self.checkpoint())

    def list_checkpoints(self, requests):
        return checkpoints_pb2.ListCheckpointsResponse(checkpoints=[self.checkpoint()])

    def restore_checkpoint(self, requests):
        return checkpoints_pb2.RestoreCheckpointResponse(optimizer=self.optimizer())

    def delete_checkpoint(self, requests):
        return checkpoints_pb2.DeleteCheckpointResponse()

    def import_state(self, requests):
        list(requests)
        return checkpoints_pb2.ImportStateResponse(optimizer=self.optimizer())

    def add_parameters(self, requests):
        first = additions_pb2.AddParametersRequest.FromString(next(requests))
        list(requests)
        message = self.optimizer()
        message.parameters.extend(first.parameters)
        return additions_pb2.AddParametersResponse(optimizer=message)

    def push_parameters(self, requests):
        list(requests)
        return replicas_pb2.PushParametersResponse(step=self.step)

    def pull_parameters(self, requests):
        first = replicas_pb2.PullParametersResponse(step=self.step)
        return [first, pulled(0, 0, bytes(SIZES["w"])), pulled(2, 0, bytes(SIZES["b"]))]

    def export_state(self, requests):
        first = checkpoints_pb2.ExportStateResponse(optimizer=self.optimizer())
        return [first, *(exported(tensor, array) for tensor in (0, 2) for array in (0, None))]

    def get_statistics(self, requests):
        message = statistics_pb2.GetStatisticsResponse(step=self.step)
        for tensor in (0, 1, 2):
            one = message.tensors.add(tensor=tensor, effective_rate_quantiles=[1.0] * 5)
            one.elements.add(index=0, slots=[0.0])
        return message


def chunk(tensor: int, offset: int, data: bytes) -> steps_pb2.StreamStepsResponse:
    return steps_pb2.StreamStepsResponse(chunk=steps_pb2.Chunk(tensor=tensor, offset=offset), data=data)


def pulled(tensor: int, offset: int, data: bytes) -> replicas_pb2.PullParametersResponse:
    return replicas_pb2.PullParametersResponse(chunk=steps_pb2.Chunk(tensor=tensor, offset=offset), data=data)


def exported(tensor: int, array: int | None, offset: int = 0, size: int = -1) -> checkpoints_pb2.ExportStateResponse:
    """A chunk of a slot, or of the parameter itself."""
    name = list(SHAPES)[tensor] if tensor < len(SHAPES) else "w"
    place = checkpoints_pb2.SlotChunk(tensor=tensor, offset=offset)
    if array is None:
        place.parameter = True
    else:
        place.slot = array
    return checkpoints_pb2.ExportStateResponse(chunk=place, data=bytes(SIZES[name] if size < 0 else size))


class _Handler(grpc.GenericRpcHandler):
    """Takes every method, of whatever kind, as a stream of bytes both ways."""

    def __init__(self, server: EvilServer) -> None:
        self._server = server

    def service(self, handler_call_details):
        method = handler_call_details.method.rpartition("/")[2]

        def behaviour(requests, context):
            try:
                for answer in self._server.answers(method, requests):
                    if answer is None:
                        gone = threading.Event()
                        if not context.add_callback(gone.set):
                            return
                        while not gone.wait(0.05) and not self._server.closing.is_set():
                            pass
                        return
                    if isinstance(answer, Exception):
                        raise answer
                    yield answer if isinstance(answer, bytes) else answer.SerializeToString()
            except End:
                return
            except Refusal as refusal:
                context.set_trailing_metadata(refusal.trailers)
                context.abort(refusal.code, refusal.details)

        return grpc.stream_stream_rpc_method_handler(behaviour)


class EvilSocket:
    """A control socket that answers each packet by what `answers` makes of it; None closes the connection."""

    def __init__(self, answers: Callable[[bytes], Iterable[bytes | None]]) -> None:
        self._answers = answers
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.name = f"optserve-evil-{id(self)}"
        self._listener.bind(f"\0{self.name}")
        self._listener.listen()
        threading.Thread(target=self._serve, daemon=True).start()

    def close(self) -> None:
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _serve(self) -> None:
        while True:
            try:
                end, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._talk, args=(end,), daemon=True).start()

    def _talk(self, end: socket.socket) -> None:
        with end, suppress(OSError):
            end.recv(64)
            while packet := end.recv(1 << 17):
                for answer in self._answers(packet):
                    if answer is None:
                        return
                    end.send(answer)
