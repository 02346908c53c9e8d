"""A network between clients and one server: messages are late, connections break, and what was sent may come later.

Within a call messages keep their order; calls do not wait for one another. What was sent before a connection broke may
arrive for long after that, while its client goes on by another one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import grpc
from google.rpc import status_pb2

from .world import Task, World

DETAILS_KEY = "grpc-status-details-bin"

HALF_CLOSE, RESET = object(), object()


@dataclass
class Weather:
    """How the network behaves at the moment.

    Attributes:
        slowest_s: Longest time that a message takes, as long as its connection holds.
        breaking: How often a connection breaks at a message.
        lingering_s: Longest time that messages of a broken connection come after that.
        twice: How often a unary call is carried out twice.
    """

    slowest_s: float = 0.005
    breaking: float = 0.0
    lingering_s: float = 0.0
    twice: float = 0.0


class Status(Exception):
    """How a call has ended, with its code, its words and, from the service, its details."""

    def __init__(self, code: grpc.StatusCode, details: str, rich: status_pb2.Status | None = None) -> None:
        super().__init__(details)
        self.code, self.details, self.rich = code, details, rich


class CallError(grpc.RpcError, grpc.Call):
    """What a client's call raises."""

    def __init__(self, status: Status) -> None:
        super().__init__(status.details)
        self._status = status

    def code(self) -> grpc.StatusCode:
        return self._status.code

    def details(self) -> str:
        return self._status.details

    def trailing_metadata(self) -> tuple[Any, ...]:
        rich = self._status.rich
        return () if rich is None else (_Metadatum(DETAILS_KEY, rich.SerializeToString()),)

    def initial_metadata(self) -> tuple[Any, ...]:
        return ()

    def is_active(self) -> bool:
        return False

    def time_remaining(self) -> float:
        return 0.0

    def cancel(self) -> bool:
        return False

    def add_callback(self, callback: Callable[[], object]) -> bool:
        return False


@dataclass(frozen=True)
class _Metadatum:
    key: str
    value: bytes


class Pipe:
    """One direction of a call: what is put in at one end comes out at the other, later and in that order."""

    def __init__(self, world: World, weather: Weather, on_reset: Callable[[], object] = lambda: None) -> None:
        self._world = world
        self._weather = weather
        self._on_reset = on_reset
        self._under_way: deque[tuple[list[Any], Any]] = deque()
        self._arrived: deque[Any] = deque()
        self._waiting: list[Task] = []
        self._last_at = 0.0
        self._is_cut = False

    def put(self, item: Any) -> None:
        if not self._is_cut:
            self._send(item, self._world.random.uniform(0, self._weather.slowest_s))

    def _send(self, item: Any, after_s: float) -> None:
        self._last_at = max(self._last_at, self._world.now + after_s)
        self._under_way.append((self._world.at(self._last_at, self._arrive), item))

    def _arrive(self) -> None:
        _, item = self._under_way.popleft()
        if item is RESET:
            self._on_reset()
            # What has arrived and was not read is not read any more.
            self._arrived.clear()
        self._arrived.append(item)
        self._world.wake_all(self._waiting)

    def cut(self, lingering_s: float) -> None:
        """Lose what is under way, some of it at least; the rest, and the end, come late."""
        if self._is_cut:
            return
        self._is_cut = True
        kept = self._world.random.randint(0, len(self._under_way))
        items = [item for _, item in self._under_way][:kept]
        for timer, _ in self._under_way:
            timer.clear()
        self._under_way.clear()
        self._last_at = self._world.now
        for item in (*items, RESET):
            self._send(item, self._world.random.uniform(0, lingering_s))

    def get(self, what: str) -> Any:
        """The next that arrives; after the end, the end again."""
        while not self._arrived:
            self._world.wait(self._waiting, what)
        return self._arrived[0] if self._arrived[0] is RESET else self._arrived.popleft()


class Connections(Protocol):
    """What a call knows of its client: its connections, one after the other."""

    calls: dict[Call, None]

    def stress(self) -> None:
        """A message is sent, at which the connection may break."""
        ...

    def lose(self) -> None:
        """The connection breaks, with all calls on it."""
        ...


class Nobody:
    """Who waits for no answer."""

    def __init__(self) -> None:
        self.calls: dict[Call, None] = {}

    def stress(self) -> None:
        """Nothing happens."""

    def lose(self) -> None:
        """Nothing happens."""


class Call:
    """One call, as its client and its server see it.

    Attributes:
        requests: Bytes to the server.
        responses: Bytes to the client; at the end a Status.
        deadline: When it ends anyway.
    """

    def __init__(self, network: Network, channel: Connections, method: str) -> None:
        self.network = network
        self.method = method
        self.requests = Pipe(network.world, network.weather, self._end_at_server)
        self.responses = Pipe(network.world, network.weather)
        self.is_active = True
        self.deadline: float | None = None
        self._channel = channel
        self._callbacks: list[Callable[[], object]] = []
        self._ending: Status | None = None

    # The server's side.

    def _end_at_server(self) -> None:
        self.is_active = False
        callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            callback()

    def add_callback(self, callback: Callable[[], object]) -> bool:
        """See grpc.ServicerContext."""
        if self.is_active:
            self._callbacks.append(callback)
        return self.is_active

    def time_remaining(self) -> float | None:
        """See grpc.ServicerContext."""
        return None if self.deadline is None else max(self.deadline - self.network.world.now, 0.0)

    def messages(self) -> Iterator[bytes]:
        """What the client sends, up to its half-close.

        Raises:
            grpc.RpcError: The call has ended otherwise.
        """
        while (item := self.requests.get(f"a message of {self.method}")) is not HALF_CLOSE:
            if item is RESET:
                raise grpc.RpcError
            yield item

    # The client's side.

    def send(self, item: Any) -> None:
        """Send a message, or the half-close; the connection may break at it."""
        self.requests.put(item)
        self._channel.stress()

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> Any:
        item = self._ending or self.responses.get(f"the answer of {self.method}")
        if item is RESET:
            item = Status(grpc.StatusCode.UNAVAILABLE, "the connection was lost")
        if not isinstance(item, Status):
            return self._decode(item)
        self._ending = self._ending or item
        if self._ending.code is grpc.StatusCode.OK:
            raise StopIteration
        raise CallError(self._ending)

    _decode: Callable[[bytes], Any] = staticmethod(lambda raw: raw)

    def decoded_by(self, decode: Callable[[bytes], Any] | None) -> Call:
        """The same, whose messages are read by that."""
        if decode is not None:
            self._decode = decode
        return self

    def cancel(self) -> bool:
        """End it; its server hears of that later."""
        self._end(Status(grpc.StatusCode.CANCELLED, "cancelled"))
        return True

    def expire(self) -> None:
        """Its deadline has passed."""
        self._end(Status(grpc.StatusCode.DEADLINE_EXCEEDED, "Deadline Exceeded"))

    def _end(self, status: Status) -> None:
        if self._ending is None:
            self._ending = status
            self.requests.cut(self.network.weather.lingering_s)
            self.responses.cut(0.0)
        self._channel.calls.pop(self, None)


class Network:
    """What is between the clients and their server.

    Attributes:
        weather: How it behaves.
        serve: Takes a call; None while there is no server.
        channels: Of all clients.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self.weather = Weather()
        self.serve: Callable[[Call], object] | None = None
        self.channels: list[Connections] = []

    def begin(self, call: Call) -> None:
        """A call has been made; the server hears of it, if there is one."""

        def arrive() -> None:
            if self.serve is None:
                call.responses.put(Status(grpc.StatusCode.UNAVAILABLE, "connection refused"))
            elif call.is_active:
                self.serve(call)

        self.world.at(self.world.now + self.world.random.uniform(0, self.weather.slowest_s), arrive)

    def repeat_later(self, method: str, raw: bytes) -> None:
        """Let the server have a call once more, whose answer nobody hears."""
        repeated = Call(self, Nobody(), method)
        after_s = self.world.random.uniform(0, self.weather.lingering_s)

        def begin() -> None:
            self.begin(repeated)
            repeated.requests.put(raw)
            repeated.requests.put(HALF_CLOSE)

        self.world.at(self.world.now + after_s, begin)

    def lose_all(self) -> None:
        """The server is gone, and with it every connection."""
        self.serve = None
        for channel in self.channels:
            channel.lose()
