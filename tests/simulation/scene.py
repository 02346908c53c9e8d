"""A server, and clients that a test lets act on it: a few moves in virtual time, in the orders that a seed chooses."""

import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import numpy as np

import optserve
from optserve._rpc.connection import Connection

from .actors import CONFIG
from .channel import Channel
from .clock import VirtualClock
from .disk import SimulatedDisk
from .network import Network
from .run import deterministic
from .service import Server
from .world import Task, World

T = TypeVar("T")

X = {"w": np.zeros(4)}
LIMIT_S = 300.0


class KeepingDisk(SimulatedDisk):
    """One that may be made to keep what is written, and to refuse to sync it and to cut it.

    Attributes:
        refuses: Whether it does.
    """

    refuses = False

    def truncate(self, descriptor: int, size_bytes: int) -> None:
        self._refuse()
        super().truncate(descriptor, size_bytes)

    def sync(self, descriptor: int) -> None:
        self._refuse()
        super().sync(descriptor)

    def sync_data(self, descriptor: int) -> None:
        self._refuse()
        super().sync_data(descriptor)

    def _refuse(self) -> None:
        if self.refuses:
            raise OSError(errno.EIO, "Input/output error")


class Scene:
    """A server, and whoever a test lets call it."""

    def __init__(self, seed: int, root: Path, snapshot_bytes: int) -> None:
        self.world = World(seed)
        self.network = Network(self.world)
        self.disk = KeepingDisk(self.world, root)
        self.server = Server(self.world, self.network, self.disk, snapshot_bytes=snapshot_bytes, segment_bytes=8192)
        self.server.start()
        self.channels: dict[str, Channel] = {}

    def let(self, name: str, act: Callable[[optserve.Client], object]) -> Task:
        """Let a client act, in a process of its own."""
        process = self.world.process(name)
        channel = self.channels[name] = Channel(self.network, process)

        def run() -> None:
            self.world.sleep(self.world.random.uniform(0.0, 0.5))
            with optserve.Client("sim", CONFIG, Connection("sim", CONFIG, VirtualClock(process), channel)) as client:
                act(client)

        return process.start(run, "main")

    def play(self, *tasks: Task) -> None:
        """Until all of them have ended."""
        self.world.run(lambda: all(task.ended for task in tasks), LIMIT_S)

    def silence(self) -> None:
        """Nothing arrives any more, for minutes."""
        self.network.weather.slowest_s = LIMIT_S

    def restart(self, *, power: bool) -> None:
        """The server is killed, and started again."""
        self.server.kill(power=power)
        self.server.start()


@contextmanager
def scene(seed: int, folder: Path, snapshot_bytes: int = 4096) -> Iterator[Scene]:
    root = folder / str(seed)
    root.mkdir()
    with deterministic(seed):
        yield Scene(seed, root, snapshot_bytes)


def persistently(there: Scene, call: Callable[[], T]) -> T:
    """Make a call until it gets through."""
    while True:
        try:
            return call()
        except (optserve.UnavailableError, optserve.DeadlineExceededError):
            there.world.sleep(0.1)


def hosted(client: optserve.Client, consistency: optserve.Consistency | None = None) -> optserve.Optimizer:
    wanted = consistency or optserve.Async(lease_s=2.0)
    return client.get_or_create_optimizer("a", optserve.Sgd(learning_rate=1.0), X, hosted=True, consistency=wanted)
