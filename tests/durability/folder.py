"""What a server keeps, without its network, and steps on it."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from optserve_server.domain.config import ServerConfig
from optserve_server.engine.registry import Optimizers
from optserve_server.engine.transaction import StepRequest
from optserve_server.numerics.layout import Layout, Parameter, Selection
from optserve_server.numerics.rules import Adadelta
from optserve_server.numerics.settings import Settings
from optserve_server.numerics.step_settings import StepOptions, StepSettings
from optserve_server.persistence.data_folder import DataFolder
from optserve_server.persistence.disk import SYSTEM_DISK, Buffer, Disk
from simulated_device import load

F4, F8 = np.dtype("f4"), np.dtype("f8")
PARAMETERS = (Parameter("w", (700, 300), F4), Parameter("b", (11,), F8), Parameter("none", (0,), F4))
MIB = 1 << 20


class BusyDisk(Disk):
    """A disk that lets something else happen while a snapshot is being written, such as steps.

    Attributes:
        act: Called after each write of a snapshot's arrays, with the number of those before it: 0 after the head of
            the first file, then one for each array of each piece. None for nothing.
    """

    def __init__(self) -> None:
        self.act: Callable[[int], object] | None = None
        self._writes = 0

    def write(self, descriptor: int, parts: Sequence[Buffer], position: int) -> int:
        written = super().write(descriptor, parts, position)
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        if self.act is not None and (path.parent.name, path.suffix) == ("snapshot.tmp", ".safetensors"):
            self._writes += 1
            self.act(self._writes - 1)
        return written


class Server:
    """What a server keeps, without its network."""

    def __init__(
        self,
        path: Path,
        interval_s: float = 0.0,
        backend: str = "numpy",
        snapshot_bytes: int = 1 << 40,
        disk: Disk = SYSTEM_DISK,
    ) -> None:
        self.folder = DataFolder(path, snapshot_bytes, segment_bytes=MIB, interval_s=interval_s, disk=disk)
        self.optimizers = Optimizers(load(backend), self.folder, ServerConfig(data_dir=str(path)))
        self._dead = False
        self.recovered = self.folder.recover(self.optimizers, lambda _done, _total: None)

    def create(self, name: str = "a"):
        return self.optimizers.create(name, Layout(PARAMETERS), Settings(Adadelta()), "creation")

    def die(self) -> None:
        """Let go of the folder as a killed process does: without a last snapshot. May be called more than once."""
        if not self._dead:
            self._dead = True
            self.folder.close(snapshot=False)


def step(item, index: int, tensors: tuple[int, ...] = (), settings: StepSettings | None = None) -> bytes:
    rng = np.random.default_rng(index)
    options = StepOptions(settings)
    under_way = item.steps.begin(StepRequest(f"request-{index}", item.steps.step, Selection(tensors), options=options))
    try:
        for tensor in under_way.payload.tensors:
            parameter = item.layout.parameters[tensor]
            under_way.stage(tensor, 0, rng.standard_normal(parameter.size).astype(parameter.dtype).tobytes())
        under_way.commit()
        return b"".join(under_way.reply(MIB, lambda piece: bytes(piece.data)))
    finally:
        under_way.close()


def fingerprint(item) -> tuple:
    slots = [item.state.backend.to_host(slot).tobytes() for arena in item.state.slots.values() for slot in arena]
    retained = replace(item.steps.main.retained) if item.steps.main.retained else None
    return (
        item.steps.step, retained, item.steps.lineage, item.etag, item.rule, item.create_time, item.update_time,
        list(item.replacements), slots,
    )  # fmt: skip
