"""The server in the simulation: the real one, from the messages of its calls to the calls of its disk, without gRPC."""

from __future__ import annotations

import errno
from dataclasses import dataclass
from typing import Any

import grpc

from optserve_server.domain.config import ServerConfig
from optserve_server.edge.gate.drain_gate import DrainGate
from optserve_server.edge.service import Servicer, handlers
from optserve_server.edge.status import to_status
from optserve_server.engine.registry import Optimizers
from optserve_server.numerics import backends
from optserve_server.persistence.checkpoint_store import FolderStore
from optserve_server.persistence.checkpoints import Checkpoints
from optserve_server.persistence.data_folder import DataFolder
from optserve_server.persistence.journal import JournalError

from .clock import VirtualClock
from .disk import SimulatedDisk
from .network import Call, Network, Status
from .world import Killed, Process, World

IDLE_STEP_S = 10.0
BACKEND = backends.choose("numpy", 1)


@dataclass(frozen=True)
class _Details(grpc.HandlerCallDetails):
    method: str
    invocation_metadata: tuple[()] = ()


class Context:
    """What a method of the service asks of its call."""

    def __init__(self, call: Call) -> None:
        self.add_callback = call.add_callback
        self.time_remaining = call.time_remaining


class Server:
    """One server, which is started, killed and started again.

    Args:
        world: In which it runs.
        network: By which its calls come.
        disk: Where its folder is.
        snapshot_bytes: See ServerConfig.
        segment_bytes: See ServerConfig.

    Attributes:
        process: The present one.
        optimizers: Of the present process, once it serves.
        starts: How often it was started.
    """

    def __init__(
        self, world: World, network: Network, disk: SimulatedDisk, *, snapshot_bytes: int, segment_bytes: int
    ) -> None:
        self.world = world
        self.disk = disk
        self.process: Process | None = None
        self.optimizers: Optimizers | None = None
        self.starts = 0
        self._network = network
        self._path = disk.root / "data"
        self._config = ServerConfig(
            data_dir=str(self._path), durability="journal", idle_step_s=IDLE_STEP_S, memory_bytes=1 << 34
        )
        # Smaller than a configuration may say.
        self._snapshot_bytes, self._segment_bytes = snapshot_bytes, segment_bytes

    @property
    def is_alive(self) -> bool:
        """Whether there is a process, which may still be starting."""
        return self.process is not None and self.process.alive

    def start(self) -> None:
        """Begin a process, which recovers and then serves."""
        self.starts += 1
        self.process = self.world.process(f"server {self.starts}")
        self.process.start(self._try, "main")

    def _try(self) -> None:
        try:
            self._run()
        except (JournalError, OSError) as error:
            told, cause = str(error), error if isinstance(error, OSError) else error.__cause__
            # A server does not start on a disk that fails; on one that does not, it has to.
            if not isinstance(cause, OSError) or cause.errno not in (errno.EIO, errno.ENOSPC):
                raise
            self.world.log(lambda: f"the server does not start: {told}")
            if self.process is not None:
                self.process.kill()

    def kill(self, *, power: bool) -> None:
        """End the process, if it has not ended by itself; with `power`, what was not synced may be lost."""
        if self.process is not None and self.process.alive:
            self.process.kill()
        self.optimizers = None
        self._network.lose_all()
        self.disk.crash(power=power)

    def _run(self) -> None:
        process, config = self.process, self._config
        if process is None:
            return
        clock, disk = VirtualClock(process), self.disk
        folder = DataFolder(self._path, self._snapshot_bytes, self._segment_bytes, clock=clock, disk=disk)
        optimizers = Optimizers(BACKEND.backend, folder, config, clock)
        found = folder.recover(optimizers, lambda _done, _total: None)
        store = FolderStore(self._path / "checkpoints", check_in_place=folder.check_in_place, clock=clock, disk=disk)
        checkpoints = Checkpoints(optimizers, store, config.max_checkpoints, clock)
        servicer = Servicer(optimizers, checkpoints, DrainGate(), BACKEND, config, clock)
        service = handlers(servicer)
        folder.start_snapshots(lambda _in_place: None)
        clock.thread(lambda: self._discard_idle(optimizers), "idle steps").start()
        self.world.log(lambda: f"{process.name} serves: {found.records} records, snapshot {found.snapshot_lsn}")
        self.optimizers = optimizers
        self._network.serve = lambda call: process.start(lambda: _answer(service, call), call.method.rpartition("/")[2])

    def _discard_idle(self, optimizers: Optimizers) -> None:
        while True:
            self.world.sleep(IDLE_STEP_S / 4)
            optimizers.discard_idle_steps()


def _answer(service: grpc.GenericRpcHandler, call: Call) -> None:
    """Carry out a call, as gRPC does."""
    status = Status(grpc.StatusCode.OK, "")
    try:
        _carry_out(service, call)
    except Killed:
        raise
    except grpc.RpcError:
        # Its client has gone.
        return
    # Everything else is answered.
    except Exception as error:  # noqa: BLE001
        rich = to_status(error)
        code = next(code for code in grpc.StatusCode if code.value[0] == rich.code)
        status = Status(code, rich.message, rich)
    call.responses.put(status)


def _carry_out(service: grpc.GenericRpcHandler, call: Call) -> None:
    handler = service.service(_Details(call.method))
    if handler is None:
        raise NotImplementedError(call.method)
    messages, context = call.messages(), Context(call)
    behaviour: Any = handler.unary_unary or handler.unary_stream or handler.stream_unary or handler.stream_stream
    request = messages
    if not handler.request_streaming:
        raw = next(messages)
        request = handler.request_deserializer(raw) if handler.request_deserializer else raw
    answers = behaviour(request, context)
    if not handler.response_streaming:
        call.responses.put(handler.response_serializer(answers) if handler.response_serializer else answers)
        return
    try:
        for answer in answers:
            call.responses.put(answer)
            if not call.is_active:
                return
    finally:
        answers.close()
