"""A start takes as long as there is to be read, however many groups, pieces and parameters that is in."""

import time

import numpy as np
import pytest

from durability.folder import F4, MIB, BusyDisk, Server, fingerprint
from optserve_server.engine.transaction import StepRequest
from optserve_server.numerics.layout import Layout, Parameter, Selection
from optserve_server.numerics.rules import Sgd
from optserve_server.numerics.settings import Group, Settings
from optserve_server.persistence import snapshot

MOST = 10.0
"""Times as long for four times as much. What is quadratic takes 16 times as long, and what is linear 4."""


def step(item, index: int, tensors: tuple[int, ...]) -> None:
    under_way = item.steps.begin(StepRequest(f"r{index}", selection=Selection(tensors)))
    for tensor in under_way.payload.tensors:
        under_way.stage(tensor, 0, np.full(16, 0.5 + tensor, "f4").tobytes())
    under_way.commit()
    b"".join(under_way.reply(MIB, lambda piece: bytes(piece.data)))
    under_way.close()


def start_s(folder, count: int, monkeypatch) -> float:
    """Seconds of processor time of a start, after a step of every other parameter during a snapshot of many pieces."""
    monkeypatch.setattr(snapshot, "PIECE_BYTES", 64)
    disk = BusyDisk()
    server = Server(folder, disk=disk)
    layout = Layout(tuple(Parameter(f"p{index}", (16,), F4) for index in range(count)))
    groups = tuple(Group((index,), {"learning_rate": 0.1 + index}) for index in range(0, count, 2))
    item = server.optimizers.create("a", layout, Settings(Sgd(), groups=groups))

    def act(number: int) -> None:
        if number == count // 2:
            for index in range(2):
                step(item, index, tuple(range(0, count, 2)))

    disk.act = act
    path = server.folder.snapshot()
    _, (saved,) = snapshot.read(path)
    assert len(saved.pieces) == count
    before = fingerprint(item)
    server.die()
    start = time.process_time()
    again = Server(folder)
    seconds = time.process_time() - start
    assert again.recovered.steps == 2
    assert fingerprint(again.optimizers.get("a")) == before
    again.die()
    return seconds


@pytest.mark.timeout(300)
def test_a_start_is_linear_in_groups_parameters_and_pieces(tmp_path, monkeypatch):
    start_s(tmp_path / "warm", 100, monkeypatch)
    few = min(start_s(tmp_path / f"few-{turn}", 1000, monkeypatch) for turn in range(2))
    many = min(start_s(tmp_path / f"many-{turn}", 4000, monkeypatch) for turn in range(2))
    assert many < MOST * few
