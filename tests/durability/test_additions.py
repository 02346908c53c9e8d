"""Parameters that a live optimizer has got outlive the process, with every bit of what came before and after."""

import json
from collections.abc import Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path
from queue import SimpleQueue

import numpy as np
import pytest

from backend_under_test import IN_PROCESS
from durability.folder import F4, F8, MIB, PARAMETERS, BusyDisk, Server, step
from optserve_server.domain.errors import OptserveError, Reason
from optserve_server.engine.addition import NewParameters, addition
from optserve_server.engine.transaction import StepRequest
from optserve_server.numerics.clipping import Clipping
from optserve_server.numerics.layout import Layout, Operand, Parameter
from optserve_server.numerics.rules import Adadelta, Adam
from optserve_server.numerics.settings import Group, Settings
from optserve_server.numerics.step_settings import Change, StepSettings
from optserve_server.persistence import snapshot
from optserve_server.persistence.disk import Buffer, Disk
from optserve_server.persistence.journal import Journal, JournalError, Reader

ADDED = (Parameter("head", (90, 1000), F4), Parameter("none too", (0, 2), F4), Parameter("bias", (6,), F8))
"""The first needs more than one piece of a snapshot."""
ADDITION = 7
"""The kind of the record."""
GROUP = Group((2,), {"learning_rate": 0.25})


def add(server: Server, item, parameters=ADDED, groups=(GROUP,), request_id: str = "added") -> None:
    """Add parameters; in hosted mode with values that their names give."""
    new = NewParameters(Layout(tuple(parameters)), tuple(groups), request_id)
    with addition(server.optimizers, item, new, lambda _layout, _settings: None) as under_way:
        for tensor, parameter in enumerate(parameters if item.settings.hosted else ()):
            under_way.stage(tensor, 0, values_of(parameter), Operand.PARAMETER)
        under_way.commit()


def values_of(parameter: Parameter) -> bytes:
    rng = np.random.default_rng(list(parameter.name.encode()))
    return rng.standard_normal(parameter.size).astype(parameter.dtype).tobytes()


def create(server: Server, settings: Settings, parameters=PARAMETERS):
    item = server.optimizers.create("a", Layout(tuple(parameters)), settings, "creation")
    if settings.hosted:
        upload = item.steps.begin_placement("upload")
        for tensor, parameter in enumerate(parameters):
            upload.stage(tensor, 0, values_of(parameter), Operand.PARAMETER)
        upload.commit()
        upload.close()
    return item


def own(item, index: int) -> StepSettings | None:
    """Settings of a step of its own, of every second one: for all parameters, or for the last group by its position."""
    if index % 2 == 0:
        return None
    decay = 0.25 if item.settings.hosted else None
    if index % 4 == 1:
        return StepSettings((Change(None, {"learning_rate": 1.0 / index}, decay),))
    last = len(item.settings.groups)
    return StepSettings((Change(0, {"learning_rate": 0.5}), *([Change(last, {"eps": 0.125}, decay)] if last else [])))


def all_of(item) -> dict:
    """Everything of an optimizer that has to be there again, by name of the parameter where it is of one."""
    steps, layout = item.steps, item.layout
    arrays = {
        (parameter.name, array): item.state.read(
            parameter.dtype, array, layout.starts[index], layout.starts[index] + parameter.size
        ).tobytes()
        for index, parameter in enumerate(layout.parameters)
        if parameter.size
        for array in range(len(item.settings.arrays))
    }
    return {
        "parameters": layout.parameters, "settings": item.settings, "step": steps.step, "lineage": steps.lineage,
        "etag": item.etag, "update_time": item.update_time, "replacements": list(item.replacements),
        "placed_by": steps.placed_by, "retained": replace(steps.main.retained) if steps.main.retained else None,
        "counters": item.state.written_parameter_steps, "arrays": arrays,
    }  # fmt: skip


def replay(item) -> bytes:
    """The reply of the last step once more."""
    under_way = item.steps.begin(StepRequest(item.steps.main.last_request_id))
    try:
        under_way.commit()
        return b"".join(under_way.reply(MIB, lambda piece: bytes(piece.data)))
    finally:
        under_way.close()


METHODS = {
    "delta": Settings(Adadelta()),
    "counters, clipped": Settings(Adam(learning_rate=0.1), clipping=Clipping("global_norm", 0.5)),
    "hosted": Settings(Adam(learning_rate=0.1), groups=(Group((1,), {}, 0.5),), hosted=True, weight_decay=0.1),
}


@pytest.mark.parametrize("backend", IN_PROCESS)
@pytest.mark.parametrize("settings", METHODS.values(), ids=list(METHODS))
def test_it_is_as_if_it_had_been_created_with_them_and_every_step_had_left_them_out(tmp_path, settings, backend):
    server, other = Server(tmp_path / "later", backend=backend), Server(tmp_path / "created", backend=backend)
    item = create(server, settings)
    shifted = Group(tuple(index + len(PARAMETERS) for index in GROUP.parameters), GROUP.overrides)
    whole = Settings(
        settings.rule, None, settings.clipping, (*settings.groups, shifted), settings.hosted, settings.weight_decay
    )
    twin = create(other, whole, (*PARAMETERS, *ADDED))
    old = tuple(range(len(PARAMETERS)))
    for index in range(3):
        settings_of_step = StepSettings((Change(None, {"learning_rate": 0.5}),)) if index else None
        assert step(item, index, (), settings_of_step) == step(twin, index, old, settings_of_step)
    add(server, item)
    assert replay(item) == replay(twin)
    for index, tensors in ((3, ()), (4, (3, 0)), (5, old), (6, (5,)), (7, ())):
        assert step(item, index, tensors, own(item, index)) == step(twin, index, tensors, own(twin, index))
    same = ("parameters", "settings", "step", "counters", "arrays")
    mine, theirs = all_of(item), all_of(twin)
    assert {key: mine[key] for key in same} == {key: theirs[key] for key in same}
    server.die()
    other.die()


@pytest.mark.parametrize("backend", IN_PROCESS)
@pytest.mark.parametrize("settings", METHODS.values(), ids=list(METHODS))
@pytest.mark.parametrize("snapshots_at", [(), (3,), (2, 6), (9,)], ids=["no snapshot", "at it", "around it", "after"])
def test_a_killed_server_goes_on_where_it_was(tmp_path, settings, backend, snapshots_at):
    server, calm = Server(tmp_path / "killed", backend=backend), Server(tmp_path / "calm", backend=backend)
    item, twin = create(server, settings), create(calm, settings)
    for index in range(9):
        if index in snapshots_at:
            server.folder.snapshot()
        if index in (3, 5):
            for folder, one in ((server, item), (calm, twin)):
                new = ADDED if index == 3 else (Parameter("last", (7,), F4),)
                add(folder, one, new, (GROUP,) if index == 3 else (), f"added at {index}")
        tensors = ((), (0,))[index // 2 % 2]
        assert step(item, index, tensors, own(item, index)) == step(twin, index, tensors, own(twin, index))
    if 9 in snapshots_at:
        server.folder.snapshot()
    before, reply = all_of(item), replay(item)
    server.die()
    again = Server(tmp_path / "killed", backend=backend)
    item = again.optimizers.get("a")
    assert all_of(item) == before
    assert replay(item) == reply
    for index, tensors in ((20, ()), (21, (4, 1)), (23, ())):
        assert step(item, index, tensors, own(item, index)) == step(twin, index, tensors, own(twin, index))
    again.die()
    calm.die()


@pytest.mark.parametrize("settings", METHODS.values(), ids=list(METHODS))
def test_an_addition_at_any_moment_of_a_snapshot_is_there_again(tmp_path, settings):
    """Before, between and after its pieces, with steps before and after it; the journal brings them to one state."""
    # The head of the file, and each array and the updates in five pieces.
    for moment in range(0, 1 + 5 * (len(settings.arrays) + 1), 3):
        disk = BusyDisk()
        server = Server(tmp_path / str(moment), disk=disk)
        item = create(server, settings)
        step(item, 0)
        turn = count(1)

        def act(number: int, server=server, item=item, turn=turn, moment=moment) -> None:
            index = next(turn)
            step(item, index, (0,) if number % 2 else (), own(item, index))
            if number == moment:
                add(server, item)
                index = next(turn)
                step(item, index, (1, 3), own(item, index))

        disk.act = act
        path = server.folder.snapshot()
        disk.act = None
        _, (saved,) = snapshot.read(path)
        assert len(saved.layout.parameters) == len(PARAMETERS)
        assert len(item.layout.parameters) == len(PARAMETERS) + len(ADDED), moment
        reply = step(item, next(turn), (2, 3, 4, 5))
        before = all_of(item)
        server.die()
        again = Server(tmp_path / str(moment))
        item = again.optimizers.get("a")
        assert all_of(item) == before
        assert replay(item) == reply
        again.die()


def test_an_addition_while_another_optimizer_is_written_is_in_the_snapshot(tmp_path):
    """The snapshot describes each optimizer when it comes to it. Steps of fewer parameters are older than that."""
    disk = BusyDisk()
    server = Server(tmp_path, disk=disk)
    step(server.create("a"), 0)
    item = server.create("b")

    def act(number: int) -> None:
        if number == 0:
            step(item, 1)
            add(server, item)
            step(item, 2)

    disk.act = act
    _, saved = snapshot.read(server.folder.snapshot())
    assert len(saved[1].layout.parameters) == len(PARAMETERS) + len(ADDED)
    before, reply = all_of(item), replay(item)
    server.die()
    again = Server(tmp_path)
    assert all_of(again.optimizers.get("b")) == before
    assert replay(again.optimizers.get("b")) == reply
    again.die()


def test_without_a_journal_a_snapshot_has_them(tmp_path):
    server = Server(tmp_path, interval_s=3600.0)
    item = create(server, METHODS["hosted"])
    step(item, 0)
    add(server, item)
    step(item, 1)
    before = all_of(item)
    server.folder.close()
    again = Server(tmp_path, interval_s=3600.0)
    assert all_of(again.optimizers.get("a")) == before
    again.die()


class Watched(Disk):
    """A disk that says when a snapshot has its name."""

    def __init__(self) -> None:
        self.named: SimpleQueue[Path] = SimpleQueue()

    def rename(self, path: Path, to: Path) -> None:
        super().rename(path, to)
        if to.name.startswith("snapshot-"):
            self.named.put(to)


def test_without_a_journal_a_snapshot_is_written_at_once(tmp_path):
    disk = Watched()
    server = Server(tmp_path, interval_s=3600.0, disk=disk)
    item = server.create()
    server.folder.start_snapshots(lambda _in_place: None)
    disk.named.get(timeout=30)
    add(server, item)
    _, (saved,) = snapshot.read(disk.named.get(timeout=30))
    assert saved.layout.parameters == (*PARAMETERS, *ADDED)
    server.die()


def test_the_same_request_adds_once_also_after_a_restart_and_another_under_its_id_is_refused(tmp_path):
    server = Server(tmp_path)
    item = create(server, METHODS["hosted"])
    add(server, item)
    step(item, 0)
    before = all_of(item)
    for restart in ("none", "from the journal", "from a snapshot"):
        if restart == "from a snapshot":
            server.folder.snapshot()
        if restart != "none":
            server.die()
            server = Server(tmp_path)
            item = server.optimizers.get("a")
        add(server, item)
        assert all_of(item) == before, restart
        others = ((*ADDED, Parameter("more", (1,), F4)), (Parameter("head", (90, 999), F4), *ADDED[1:]))
        for parameters in others:
            with pytest.raises(OptserveError, match="was used for an addition of 'head', 'none too', 'bias'") as error:
                add(server, item, parameters, ())
            assert error.value.reason is Reason.REQUEST_ID_REUSED
        assert all_of(item) == before, restart
    server.die()


def test_a_creation_that_is_tried_again_after_an_addition_finds_its_optimizer(tmp_path):
    server = Server(tmp_path)
    item = server.create()
    add(server, item)
    assert server.create() is item
    with pytest.raises(OptserveError) as error:
        server.optimizers.create("a", Layout(PARAMETERS[:1] + ADDED), Settings(Adadelta()), "creation")
    assert error.value.reason is Reason.REQUEST_ID_REUSED
    server.die()


class FullDisk(Disk):
    """A disk that is full at some point, until there is room again.

    Attributes:
        full_at: What it refuses: to `allocate` a segment, to `write` more than the first 100,000 bytes, or to `sync`.
    """

    full_at = ""

    def _refuse(self, call: str) -> None:
        if self.full_at == call:
            raise OSError(28, "No space left on device")

    def allocate(self, descriptor: int, size_bytes: int) -> None:
        self._refuse("allocate")
        super().allocate(descriptor, size_bytes)

    def write(self, descriptor: int, parts: Sequence[Buffer], position: int) -> int:
        if self.full_at == "write":
            whole = b"".join(parts)
            if len(whole) > 100_000:
                return super().write(descriptor, [whole[:100_000]], position)
        self._refuse("write")
        return super().write(descriptor, parts, position)

    def sync_data(self, descriptor: int) -> None:
        self._refuse("sync")
        super().sync_data(descriptor)


@pytest.mark.parametrize("call", ["allocate", "write", "sync"])
def test_a_disk_that_is_full_in_the_middle_of_it_changes_nothing_until_there_is_room(tmp_path, call):
    disk = FullDisk()
    server = Server(tmp_path, disk=disk)
    item = create(server, METHODS["hosted"])
    # The journal needs another segment for the next record.
    for index in range(3):
        step(item, index)
    before, memory = all_of(item), server.optimizers.memory_bytes
    disk.full_at = call
    for _ in range(2):
        with pytest.raises(OptserveError) as error:
            add(server, item)
        assert error.value.reason is Reason.NOT_DURABLE
        assert (all_of(item), server.optimizers.memory_bytes) == (before, memory)
    disk.full_at = ""
    add(server, item)
    step(item, 3)
    after = all_of(item)
    server.die()
    again = Server(tmp_path)
    assert all_of(again.optimizers.get("a")) == after
    again.die()


def test_a_torn_record_was_never_an_addition(tmp_path):
    server = Server(tmp_path)
    item = create(server, METHODS["hosted"])
    step(item, 0)
    before = all_of(item)
    add(server, item)
    server.die()
    path, offset = next((record.path, record.offset) for record in Reader(tmp_path, 0) if record.kind == ADDITION)
    with path.open("r+b") as file:
        file.truncate(offset + 5000)
    again = Server(tmp_path)
    assert again.recovered.torn_tail is not None
    assert all_of(again.optimizers.get("a")) == before
    again.die()


def test_servers_that_do_not_know_the_record_refuse_the_folder(tmp_path):
    """Older ones look for the name of the optimizer under a key that it does not have; this one refuses such kinds."""
    server = Server(tmp_path)
    add(server, server.create())
    server.die()
    reader = Reader(tmp_path, 0)
    written = [(record.kind, json.loads(record.meta)) for record in reader]
    assert [kind for kind, _ in written] == [1, ADDITION]
    assert ["optimizer" in message for _, message in written] == [True, False]
    journal = Journal(tmp_path, reader.next_lsn, MIB)
    journal.append(99, json.dumps({"optimizer": "a"}).encode(), [])
    journal.close()
    with pytest.raises(JournalError, match=r"kind 99 is unknown.*or a newer one"):
        Server(tmp_path)
