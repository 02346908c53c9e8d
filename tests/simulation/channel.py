"""A client's channel over the simulated network, which gRPC's stubs and the client's code take for one of gRPC's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import grpc

from .network import HALF_CLOSE, Call, Network
from .world import Process


class Channel(grpc.Channel):
    """A client's connections to the server, one after the other."""

    def __init__(self, network: Network, process: Process) -> None:
        self.calls: dict[Call, None] = {}
        self._network = network
        self._world = network.world
        self.process = process
        self._closed = False
        network.channels.append(self)

    def stress(self) -> None:
        """A message is sent, at which the connection may break."""
        if self._world.chance(self._network.weather.breaking):
            self.lose()

    def lose(self) -> None:
        """The connection breaks, with all calls on it."""
        if not self.calls:
            return
        self._world.log(lambda: f"the connection of {self.process.name} breaks, with {len(self.calls)} calls")
        calls, self.calls = self.calls, {}
        for call in calls:
            call.requests.cut(self._network.weather.lingering_s)
            call.responses.cut(min(1.0, self._network.weather.lingering_s))

    def _call(self, method: str, timeout_s: float | None) -> Call:
        if self._closed:
            raise ValueError("Cannot invoke RPC on closed channel!")
        call = Call(self._network, self, method)
        if timeout_s is not None:
            call.deadline = self._world.now + timeout_s
            self._world.at(call.deadline, call.expire)
        self.calls[call] = None
        self._network.begin(call)
        return call

    def _send_all(self, call: Call, messages: Iterator[bytes]) -> None:
        """What gRPC's own thread does."""

        def send() -> None:
            for message in messages:
                call.send(message)
            call.send(HALF_CLOSE)

        self.process.start(send, f"sends {call.method}")

    def _answer(self, call: Call, decode: Callable[[bytes], Any]) -> Any:
        call.decoded_by(decode)
        try:
            answer = next(call)
            # Its status.
            next(call, None)
        finally:
            self.calls.pop(call, None)
        return answer

    def unary_unary(
        self, method: str, request_serializer: Any = None, response_deserializer: Any = None, **_: Any
    ) -> Any:
        def make(request: Any, timeout: float | None = None) -> Any:
            call = self._call(method, timeout)
            raw = request_serializer(request)
            if self._world.chance(self._network.weather.twice):
                self._network.repeat_later(method, raw)
            call.send(raw)
            call.send(HALF_CLOSE)
            return self._answer(call, response_deserializer)

        return make

    def unary_stream(
        self, method: str, request_serializer: Any = None, response_deserializer: Any = None, **_: Any
    ) -> Any:
        def make(request: Any, timeout: float | None = None) -> Call:
            call = self._call(method, timeout)
            call.send(request_serializer(request))
            call.send(HALF_CLOSE)
            return call.decoded_by(response_deserializer)

        return make

    def stream_unary(
        self, method: str, request_serializer: Any = None, response_deserializer: Any = None, **_: Any
    ) -> Any:
        def make(messages: Iterator[bytes], timeout: float | None = None) -> Any:
            call = self._call(method, timeout)
            self._send_all(call, messages)
            return self._answer(call, response_deserializer)

        return make

    def stream_stream(
        self, method: str, request_serializer: Any = None, response_deserializer: Any = None, **_: Any
    ) -> Any:
        def make(messages: Iterator[bytes], timeout: float | None = None) -> Call:
            call = self._call(method, timeout)
            self._send_all(call, messages)
            return call.decoded_by(response_deserializer)

        return make

    def close(self) -> None:
        self._closed = True
        for call in list(self.calls):
            call.cancel()

    def subscribe(self, callback: Any, try_to_connect: bool = False) -> None:
        # What is lost here are messages and calls; a client always has a connection to lose them on.
        callback(grpc.ChannelConnectivity.READY)

    def unsubscribe(self, callback: Any) -> None:
        pass

    def __enter__(self) -> Channel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
