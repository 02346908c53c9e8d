"""Step counters of parameters outlive the process, and travel with a state."""

import json
from datetime import UTC, datetime

import numpy as np
import pytest

from backend_under_test import IN_PROCESS
from durability.folder import F4, F8, PARAMETERS, BusyDisk, Server, step
from optserve_server.domain.errors import OptserveError, Reason
from optserve_server.engine.optimizer import OtherState
from optserve_server.engine.records import ArenaValues, ReplacementRecord
from optserve_server.numerics import rules
from optserve_server.numerics.layout import Layout
from optserve_server.numerics.parameter_steps import MAX_STEP
from optserve_server.numerics.rules import Adadelta
from optserve_server.numerics.settings import Settings
from optserve_server.persistence import snapshot
from optserve_server.persistence.checkpoint_store import FolderStore
from optserve_server.persistence.checkpoints import Checkpoints
from optserve_server.persistence.state_import import StateImport
from toy import SignDescent

LAYOUT = Layout(PARAMETERS)


@pytest.fixture(autouse=True)
def known(monkeypatch):
    """The server knows the toy method, as from one more file of rules."""
    monkeypatch.setitem(rules.RULES, SignDescent.name, SignDescent)


def create(server: Server, name: str = "a"):
    return server.optimizers.create(name, LAYOUT, Settings(SignDescent()), "creation")


def checkpoints_of(server: Server, path) -> Checkpoints:
    return Checkpoints(server.optimizers, FolderStore(path / "checkpoints"), max_checkpoints=9)


def steps_of(item) -> list[int]:
    return item.state.parameter_steps.tolist()


def bits(item) -> list[bytes]:
    return [item.state.backend.to_host(slot).tobytes() for arenas in item.state.slots.values() for slot in arenas]


def all_of(item) -> tuple:
    return item.steps.step, steps_of(item), bits(item)


def skipping(item, first: int) -> None:
    """Some steps, in most of which not all parameters take part."""
    for turn, tensors in enumerate([(), (0,), (1, 2), (1,), (0,)], first):
        step(item, turn, tensors)


@pytest.mark.parametrize("backend", IN_PROCESS)
@pytest.mark.parametrize("kept", ["journal", "snapshot", "snapshot, then journal"])
def test_a_killed_server_goes_on_where_it_was(tmp_path, kept, backend):
    server = Server(tmp_path / "killed", backend=backend)
    item = create(server)
    skipping(item, 0)
    if kept.startswith("snapshot"):
        server.folder.snapshot()
    if kept.endswith("journal"):
        skipping(item, 5)
    before = all_of(item)
    assert before[1] == ([6, 6, 4] if kept.endswith("journal") else [3, 3, 2])
    server.die()
    again = Server(tmp_path / "killed", backend=backend)
    item = again.optimizers.get("a")
    assert all_of(item) == before
    # The next steps have the rates of a server that never stopped.
    undisturbed = Server(tmp_path / "undisturbed", backend=backend)
    twin = create(undisturbed)
    skipping(twin, 0)
    if kept.endswith("journal"):
        skipping(twin, 5)
    for turn, tensors in ((20, ()), (21, (1,))):
        assert step(item, turn, tensors) == step(twin, turn, tensors)
    assert all_of(item) == all_of(twin)
    again.die()
    undisturbed.die()


def test_a_snapshot_whose_pieces_are_of_different_steps_comes_back_to_the_last_one(tmp_path):
    disk = BusyDisk()
    server = Server(tmp_path, disk=disk)
    item = create(server)
    skipping(item, 0)
    turn = iter(range(5, 100))
    disk.act = lambda number: step(item, next(turn), ((0,), (1, 0), ())[number % 3])
    path = server.folder.snapshot()
    _, (saved,) = snapshot.read(path)
    assert len({piece.lsn for piece in saved.pieces}) > 3  # otherwise this shows nothing
    before = all_of(item)
    server.die()
    again = Server(tmp_path)
    assert all_of(again.optimizers.get("a")) == before
    again.die()


def test_a_restore_brings_them_back_across_a_kill(tmp_path):
    server = Server(tmp_path)
    item, checkpoints = create(server), checkpoints_of(server, tmp_path)
    skipping(item, 0)
    saved = all_of(item)
    checkpoints.save("a", "one")
    skipping(item, 5)
    assert steps_of(item) != saved[1]
    checkpoints.restore("a", "one")
    assert all_of(item) == saved
    step(item, 10, (0,))
    before = all_of(item)
    server.die()
    for _ in ("from the journal", "from a snapshot"):
        again = Server(tmp_path)
        assert all_of(again.optimizers.get("a")) == before
        again.folder.snapshot()
        again.die()


def test_an_import_takes_those_that_are_given_and_else_the_steps_of_the_optimizer(tmp_path):
    server = Server(tmp_path)
    item, checkpoints = create(server), checkpoints_of(server, tmp_path)
    arrays = [(tensor, parameter) for tensor, parameter in enumerate(PARAMETERS) if parameter.size]
    for given, expected in (([3, 1, 2], [3, 1, 2]), ([], [7, 7, 7])):
        with checkpoints.staging(item) as staged:
            state = StateImport(checkpoints, item, staged, lambda present, _layout: present)
            for tensor, parameter in arrays:
                state.stage(tensor, 0, 0, np.full(parameter.size, 0.5, parameter.dtype).tobytes())
            state.commit(7, parameter_steps=given)
        assert (item.steps.step, steps_of(item)) == (7, expected)
    server.die()


def test_counters_that_begin_at_the_most_that_an_import_may_bring_go_on(tmp_path):
    server = Server(tmp_path)
    item, checkpoints = create(server), checkpoints_of(server, tmp_path)
    with checkpoints.staging(item) as staged:
        state = StateImport(checkpoints, item, staged, lambda present, _layout: present)
        for tensor, parameter in enumerate(PARAMETERS):
            state.stage(tensor, 0, 0, bytes(parameter.size * parameter.dtype.itemsize))
        state.commit(7, parameter_steps=[MAX_STEP, 1, 0])
    step(item, 0)
    before = all_of(item)
    assert before[1] == [MAX_STEP + 1, 2, 1]
    checkpoints.save("a", "one")
    server.folder.snapshot()
    server.die()
    again = Server(tmp_path)
    item = again.optimizers.get("a")
    assert all_of(item) == before
    step(item, 1)
    checkpoints_of(again, tmp_path).restore("a", "one")
    assert all_of(item) == before
    again.die()


@pytest.mark.parametrize(
    ("rule", "given", "message"),
    [
        (SignDescent(), [1, 2, MAX_STEP + 1], "not 4611686018427387905"),
        (SignDescent(), [1, 2], "of 2 parameters, not of 3"),
        (SignDescent(), [1, 2, 1 << 63], "not 9223372036854775808"),
        (Adadelta(), [1, 2, 3], "adadelta does not use the step counters of parameters"),
    ],
)
def test_an_import_of_other_counters_is_refused_and_changes_nothing(tmp_path, rule, given, message):
    server = Server(tmp_path)
    item = server.optimizers.create("a", LAYOUT, Settings(rule), "creation")
    checkpoints, before = checkpoints_of(server, tmp_path), all_of(item)
    with checkpoints.staging(item) as staged:
        state = StateImport(checkpoints, item, staged, lambda present, _layout: present)
        with pytest.raises(OptserveError, match=message) as refused:
            state.commit(7, parameter_steps=given)
    assert (refused.value.reason, refused.value.field) == (Reason.INVALID_FIELD, "parameter_steps")
    assert all_of(item) == before
    server.die()


def test_what_an_earlier_version_wrote_has_taken_part_in_all_steps(tmp_path, monkeypatch):
    """Its journal, snapshots and checkpoints say nothing of counters."""

    class Earlier(SignDescent):
        counts_steps = False

    server = Server(tmp_path)
    with monkeypatch.context() as patch:
        patch.setitem(rules.RULES, SignDescent.name, Earlier)
        patch.setattr(Earlier, "scalars", lambda rule, _step: SignDescent.scalars(rule, 1))
        item = server.optimizers.create("a", LAYOUT, Settings(Earlier()), "creation")
        skipping(item, 0)
        checkpoints_of(server, tmp_path).save("a", "one")
        server.folder.snapshot()
        server.die()
    again = Server(tmp_path)
    item = again.optimizers.get("a")
    assert (item.steps.step, steps_of(item)) == (5, [5, 5, 5])
    step(item, 5, (1,))
    checkpoints_of(again, tmp_path).restore("a", "one")
    assert (item.steps.step, steps_of(item)) == (5, [5, 5, 5])
    again.die()


def test_the_encoding_of_counters_in_a_record():
    arrays = [ArenaValues(dtype, 0, np.zeros(size, dtype)) for dtype, size in ((F8, 11), (F4, 210_000))]
    given = OtherState(7, LAYOUT, arrays, [3, 1, 2])
    record = ReplacementRecord(
        "a", given.step, Settings(SignDescent()), "", "", "", datetime(2026, 1, 2, tzinfo=UTC), given.arrays,
        parameter_steps=given.parameter_steps,
    )  # fmt: skip
    _, message, _ = record.encode()
    assert json.loads(json.dumps(message))["parameter_steps"] == [3, 1, 2]
    _, message, _ = ReplacementRecord(
        "a", 7, Settings(Adadelta()), "", "", "", datetime(2026, 1, 2, tzinfo=UTC), arrays
    ).encode()  # fmt: skip
    assert "parameter_steps" not in message
