"""Folders of a newer server, whose settings say more than this one knows: refused, with the name of what it is."""

import pytest

from durability.folder import PARAMETERS, Server, step
from optserve_server.domain.errors import OptserveError, Reason
from optserve_server.engine.step_record import StepRecord
from optserve_server.numerics.clipping import Clipping
from optserve_server.numerics.consistency import SyncConsistency
from optserve_server.numerics.layout import Layout
from optserve_server.numerics.rules import Momentum
from optserve_server.numerics.schedule import AtSteps
from optserve_server.numerics.settings import Group, Settings, UnknownSettingError
from optserve_server.persistence.checkpoint_store import FolderStore
from optserve_server.persistence.checkpoints import Checkpoints
from optserve_server.persistence.journal import JournalError

SETTINGS = Settings(
    Momentum(),
    AtSteps(rate=0.5, milestones=(3, 5)),
    Clipping("norm", 1.0),
    (Group((0,), {"learning_rate": 0.5}),),
    hosted=True,
    weight_decay=0.1,
    consistency=SyncConsistency(workers=2),
)

NEWER = [
    (lambda told: told["rule"].update(nesterov=True), "know 'nesterov' of momentum"),
    (lambda told: told["rule"].update(name="muon"), "know the method 'muon'"),
    (lambda told: told["schedule"].update(cycles=2), "know 'cycles' of the step schedule"),
    (lambda told: told["schedule"].update(kind="linear"), "know the schedule 'linear'"),
    (lambda told: told["clipping"].update(floor=0.1), "know 'floor' of clipping"),
    (lambda told: told["clipping"].update(kind="quantile"), "know the clipping 'quantile'"),
    (lambda told: told["groups"][0].update(frozen=True), "know 'frozen' of group"),
    (lambda told: told["groups"][0]["overrides"].update(nesterov=True), "know 'nesterov' of momentum in a group"),
    (lambda told: told["consistency"].update(quorum=3), "know 'quorum' of consistency"),
    (lambda told: told["consistency"].update(kind="diloco"), "know the consistency 'diloco'"),
]


@pytest.mark.parametrize(("add", "message"), NEWER)
def test_what_is_not_known_within_a_setting_is_refused_by_its_name(add, message):
    told = SETTINGS.to_json()
    assert Settings.from_json(told | {"optimizer": "a", "etag": "of its caller"}) == SETTINGS
    add(told)
    with pytest.raises(UnknownSettingError, match=message):
        Settings.from_json(told)


def test_settings_have_the_keys_that_their_readers_look_for():
    """Others beside them would be left out by older servers without a word: they take new format numbers."""
    known = {"rule", "schedule", "clipping", "groups", "hosted", "weight_decay", "consistency"}
    assert SETTINGS.to_json().keys() == known


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"settings": [[0, {"rho": 0.5}, None]], "masks": [1]}, "know 'masks' of a step"),
        ({"settings": [[0, {"rho": 0.5}, None, "later"]]}, "too many values to unpack"),
        ({"settings": [[0, {"nesterov": True}, None]]}, "nesterov"),
        ({"settings": [[1, {"rho": 0.5}, None]]}, "There is no group 1"),
        ({"settings": [[0, {"rho": 2.0}, None]]}, r"rho is 2\.0, but must lie in"),
    ],
)
def test_a_step_of_a_newer_server_is_refused(tmp_path, monkeypatch, content, message):
    """As one whose steps may have more in their settings than this server knows."""
    real = StepRecord.encode

    def encode(record):
        kind, told, operands = real(record)
        told["with"] = {"tensors": told.pop("tensors"), **content}
        return kind, told, operands

    server = Server(tmp_path)
    item = server.optimizers.create("a", Layout(PARAMETERS), Settings(Momentum()), "creation")
    with monkeypatch.context() as patch:
        patch.setattr(StepRecord, "encode", encode)
        step(item, 0)
    server.die()
    with pytest.raises(JournalError, match=message) as seen:
        Server(tmp_path)
    assert "Use the server that wrote it, or a newer one" in str(seen.value)


@pytest.fixture
def newer(monkeypatch):
    """While it is on, settings are written as by a server whose Momentum knows more."""
    real = Settings.to_json

    def to_json(settings):
        told = real(settings)
        told["rule"]["nesterov"] = True
        return told

    with monkeypatch.context() as patch:
        patch.setattr(Settings, "to_json", to_json)
        yield patch


@pytest.mark.parametrize("kept_in", ["journal", "snapshot"])
def test_a_folder_of_a_newer_server_is_refused_and_left_as_it_is(tmp_path, newer, kept_in):
    server = Server(tmp_path)
    item = server.optimizers.create("a", Layout(PARAMETERS), Settings(Momentum()), "creation")
    step(item, 0)
    if kept_in == "snapshot":
        server.folder.snapshot()
    server.die()
    newer.undo()
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(JournalError, match=r"know 'nesterov' of momentum.* the server that wrote it, or") as seen:
        Server(tmp_path)
    assert kept_in in str(seen.value)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_checkpoint_of_a_newer_server_is_refused_and_changes_nothing(tmp_path, newer):
    server = Server(tmp_path)
    item = server.optimizers.create("a", Layout(PARAMETERS), Settings(Momentum()), "creation")
    checkpoints = Checkpoints(server.optimizers, FolderStore(tmp_path / "checkpoints"), max_checkpoints=3)
    step(item, 0)
    checkpoints.save("a", "one")
    newer.undo()
    step(item, 1)
    with pytest.raises(OptserveError, match="know 'nesterov' of momentum") as seen:
        checkpoints.restore("a", "one")
    assert seen.value.reason is Reason.CHECKPOINT_DAMAGED
    assert item.steps.step == 2
    server.die()
