"""The files of checkpoints: damaged ones, others' formats, a full disk, and leftovers."""

import errno
import os
import threading

import numpy as np
import pytest

from durability.folder import F4, MIB, PARAMETERS, Server, fingerprint, step
from optserve_server.domain.errors import OptserveError, Reason
from optserve_server.engine.transaction import StepRequest
from optserve_server.numerics.layout import Layout, Parameter
from optserve_server.numerics.rules import Adadelta, Momentum
from optserve_server.numerics.settings import Settings
from optserve_server.persistence.checkpoint_store import FolderStore, TemporaryStore
from optserve_server.persistence.checkpoints import Checkpoints


def test_a_damaged_file_is_said_and_restores_nothing(tmp_path, folder):
    server, checkpoints = folder
    item = server.create()
    step(item, 0)
    checkpoints.save("a", "one")
    path = tmp_path / "checkpoints/a/one.safetensors"
    intact = path.read_bytes()
    before = fingerprint(item)
    head = 8 + int.from_bytes(intact[:8], "little")
    damages = [
        intact[:at] + bytes([intact[at] ^ 1]) + intact[at + 1 :] for at in (*range(0, head, 7), head, len(intact) - 1)
    ]
    for content in [*damages, intact[:-1], intact[:100], b"", b"{}"]:
        path.write_bytes(content)
        with pytest.raises(OptserveError) as caught:
            checkpoints.restore("a", "one")
        assert caught.value.reason in (Reason.CHECKPOINT_DAMAGED, Reason.CHECKPOINT_MISMATCH)
        assert fingerprint(item) == before
    assert checkpoints.page("a", 10, "")[0] == []
    path.write_bytes(intact)
    checkpoints.restore("a", "one")


def test_a_damaged_file_can_be_replaced_and_deleted(tmp_path, folder):
    server, checkpoints = folder
    server.create()
    checkpoints.save("a", "one")
    path = tmp_path / "checkpoints/a/one.safetensors"
    path.write_bytes(b"damage")
    checkpoints.save("a", "one", overwrite=True, request_id="x")
    checkpoints.restore("a", "one")
    path.write_bytes(b"damage")
    checkpoints.delete("a", "one")
    assert not path.exists()


def test_a_checkpoint_of_a_newer_format_is_refused(folder, monkeypatch):
    server, checkpoints = folder
    server.create()
    with monkeypatch.context() as patch:
        patch.setattr("optserve_server.persistence.state_file.FORMAT_VERSION", 2)
        checkpoints.save("a", "one")
    with pytest.raises(OptserveError, match="it has format 2"):
        checkpoints.restore("a", "one")


def test_a_checkpoint_from_before_a_hyperparameter_is_restored_with_its_default(folder, monkeypatch):
    server, checkpoints = folder
    item = server.create()
    step(item, 0)
    before = {"rule": {"name": "adadelta", "rho": 0.5}}
    assert item.settings.to_json() != before
    with monkeypatch.context() as patch:
        patch.setattr(Settings, "to_json", lambda _settings: before)
        checkpoints.save("a", "old")
    checkpoints.restore("a", "old")
    assert item.rule == Adadelta(rho=0.5)


@pytest.mark.parametrize("call", ["posix_fallocate", "pwrite", "fsync"])
def test_a_full_disk_refuses_a_checkpoint_and_leaves_nothing(tmp_path, folder, monkeypatch, call):
    server, checkpoints = folder
    item = server.create()
    step(item, 0)
    before = fingerprint(item)

    def full(*_arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, call, full)
        with pytest.raises(OptserveError, match="No space left") as caught:
            checkpoints.save("a", "one")
    assert caught.value.reason is Reason.NOT_DURABLE
    assert not [path for path in (tmp_path / "checkpoints").rglob("*") if path.is_file()]
    assert fingerprint(item) == before
    checkpoints.save("a", "one")
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwritev", full)
        with pytest.raises(OptserveError, match="No space left"):
            checkpoints.restore("a", "one")
    assert fingerprint(item) == before


def test_names_that_look_like_leftovers_are_no_leftovers(tmp_path):
    for name in ("model.tmp", "a"):
        server = Server(tmp_path)
        checkpoints = Checkpoints(server.optimizers, FolderStore(tmp_path / "checkpoints"), 9)
        server.create(name)
        checkpoints.save(name, "x.tmp")
        assert [item.tag for item in checkpoints.page("model.tmp", 9, "")[0]] == ["x.tmp"]
        (tmp_path / "checkpoints" / ".new-abc").write_text("of a dead server")
        server.die()
    FolderStore(tmp_path / "checkpoints")
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["a", "model.tmp"]


def test_temporary_checkpoints_leave_no_file(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    server = Server(tmp_path / "data")
    item = server.create()
    checkpoints = Checkpoints(server.optimizers, TemporaryStore(), 3)
    step(item, 0)
    checkpoints.save("a", "one")
    assert not list((tmp_path / "tmp").iterdir())
    threads = [threading.Thread(target=checkpoints.page, args=("a", 10, "")) for _ in range(8)]
    for thread in threads:
        thread.start()
    checkpoints.restore("a", "one")
    for thread in threads:
        thread.join()
    assert not list((tmp_path / "tmp").iterdir())
    checkpoints.delete("a", "one")
    assert checkpoints.page("a", 10, "") == ([], "")
    server.die()


def test_optimizers_of_any_rule_and_layout_can_be_saved(folder):
    server, checkpoints = folder
    for position, (rule, parameters) in enumerate(
        [
            (Momentum(), PARAMETERS),
            (Adadelta(), (Parameter("odd", (3,), F4), Parameter("b", (5,), np.dtype("f8")))),
            (Adadelta(), (Parameter("nothing", (0, 4), F4),)),
            (Adadelta(), (Parameter("ä.b c", (), F4), Parameter("ä.b", (), F4))),
        ]
    ):
        name = f"o{position}"
        item = server.optimizers.create(name, Layout(parameters), Settings(rule))
        under_way = item.steps.begin(StepRequest("request"))
        for tensor, parameter in enumerate(parameters):
            under_way.stage(tensor, 0, np.full(parameter.size, 0.5, parameter.dtype).tobytes())
        under_way.commit()
        b"".join(under_way.reply(MIB, lambda piece: bytes(piece.data)))
        under_way.close()
        checkpoints.save(name, "x")
        slots = fingerprint(item)[-1]
        checkpoints.restore(name, "x")
        assert fingerprint(item)[-1] == slots
