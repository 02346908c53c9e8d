"""All checkpoints together are limited, those of deleted optimizers included, and all of them can be found."""

import json
import subprocess
import sys
from contextlib import ExitStack, suppress
from types import SimpleNamespace

import numpy as np
import pytest

import optserve
from durability.folder import F4, Server
from optserve._common import safetensors
from optserve_server.domain.errors import OptserveError, Reason
from optserve_server.numerics.layout import Layout, Parameter
from optserve_server.numerics.rules import Sgd
from optserve_server.numerics.settings import Settings
from optserve_server.persistence import checkpoints as module
from optserve_server.persistence.checkpoint_store import MAX_TEMPORARY, FolderStore, Limits, TemporaryStore
from optserve_server.persistence.checkpoints import MAX_TRANSFERS, Checkpoints

ONE = Layout((Parameter("w", (100,), F4),))


@pytest.fixture(params=["folder", "temporary"])
def kept(request, tmp_path):
    """A server, and a maker of its checkpoints with limits."""
    server = Server(tmp_path / "data")
    stores = []

    def checkpoints(**limits) -> Checkpoints:
        limit = Limits(**limits)
        stores.append(TemporaryStore(limit) if request.param == "temporary" else FolderStore(tmp_path / "kept", limit))
        return Checkpoints(server.optimizers, stores[-1], 1000)

    yield SimpleNamespace(server=server, checkpoints=checkpoints)
    for store in stores:
        for key in list(store.keys()):
            with suppress(FileNotFoundError):
                store.remove(*key)
    server.die()


def refusal(call) -> OptserveError:
    with pytest.raises(OptserveError) as caught:
        call()
    return caught.value


def test_their_number_is_limited_over_all_optimizers(kept):
    """Also where each is of an optimizer that was deleted, so that none has many."""
    checkpoints = kept.checkpoints(max_files=3)
    for turn in range(3):
        kept.server.optimizers.create(f"o{turn}", ONE, Settings(Sgd()))
        checkpoints.save(f"o{turn}", "t")
        kept.server.optimizers.delete(f"o{turn}")
    kept.server.optimizers.create("a", ONE, Settings(Sgd()))
    error = refusal(lambda: checkpoints.save("a", "t"))
    # Final: nothing gets better by itself.
    assert (error.reason, error.retry_after_s, error.metadata["limit"]) == (Reason.SERVER_FULL, None, "3")
    assert "deleted optimizers" in error.message
    # They are found, and deleted, though no list of optimizers has them.
    assert [(item.optimizer, item.tag) for item in checkpoints.page_of_all(9, "")[0]] == [
        ("o0", "t"), ("o1", "t"), ("o2", "t"),
    ]  # fmt: skip
    checkpoints.delete("o1", "t")
    checkpoints.save("a", "t")
    checkpoints.save("a", "t", overwrite=True)


def test_their_bytes_are_limited_before_anything_is_written(kept, monkeypatch):
    item = kept.server.optimizers.create("a", Layout((Parameter("w", (5000,), F4),)), Settings(Sgd()), "r")
    size = kept.checkpoints().save("a", "t").size_bytes
    checkpoints = kept.checkpoints(max_bytes=2 * size + 100)
    checkpoints.save("a", "t", overwrite=True)
    checkpoints.save("a", "u")
    monkeypatch.setattr(module.StateFile, "fill", lambda *_given: pytest.fail("it was written"))
    error = refusal(lambda: checkpoints.save("a", "v"))
    assert (error.reason, error.metadata["limit"]) == (Reason.SERVER_FULL, str(2 * size + 100))
    monkeypatch.undo()
    # In the place of another there is room.
    checkpoints.save("a", "u", overwrite=True)
    assert item.steps.step == 0


def test_files_that_were_removed_by_hand_count_no_more(tmp_path):
    server = Server(tmp_path / "data")
    server.optimizers.create("a", ONE, Settings(Sgd()))
    checkpoints = Checkpoints(server.optimizers, FolderStore(tmp_path / "kept", Limits(max_files=1)), 9)
    checkpoints.save("a", "t")
    (tmp_path / "kept" / "a" / "t.safetensors").unlink()
    checkpoints.save("a", "u")
    # And a server that starts knows of those that are there.
    again = Checkpoints(server.optimizers, FolderStore(tmp_path / "kept", Limits(max_files=1)), 9)
    assert refusal(lambda: again.save("a", "v")).reason is Reason.SERVER_FULL
    server.die()


def test_pages_of_all_checkpoints_meet_each_once(kept):
    checkpoints = kept.checkpoints()
    names = ["a", "a.b", "a-b", "b"]
    for name in names:
        kept.server.optimizers.create(name, ONE, Settings(Sgd()))
        for tag in ("x", "x.y"):
            checkpoints.save(name, tag)
    found, after = [], ""
    while True:
        items, after = checkpoints.page_of_all(3, after)
        found += [(item.optimizer, item.tag) for item in items]
        if not after:
            break
    assert found == sorted((name, tag) for name in names for tag in ("x", "x.y"))


def test_without_a_data_folder_there_are_two_hundred_and_the_next_is_refused_for_good(client, name):
    opt = client.create_optimizer(name, optserve.Sgd(), {"w": np.zeros(1, np.float32)})
    before = len(client.list_checkpoints())
    tags = [f"t{turn}" for turn in range(MAX_TEMPORARY - before)]
    try:
        for tag in tags:
            opt.save_checkpoint(tag)
        with pytest.raises(optserve.ResourceExhaustedError, match=f"keeps; delete|{MAX_TEMPORARY}") as caught:
            opt.save_checkpoint("more")
        assert caught.value.reason == "SERVER_FULL"
    finally:
        for tag in tags:
            opt.delete_checkpoint(tag)


def test_a_checkpoint_that_nobody_could_read_is_not_taken(kept, monkeypatch):
    """The limit of safetensors is 100 MB of names, shapes and settings; here it is a little less."""
    kept.server.optimizers.create("a", ONE, Settings(Sgd()))
    checkpoints = kept.checkpoints()
    # Of a method without slots, a file is its header.
    size = checkpoints.save("a", "t").size_bytes - safetensors.LENGTH_BYTES
    monkeypatch.setattr(safetensors, "MAX_HEADER_BYTES", size)
    checkpoints.save("a", "u")
    checkpoints.restore("a", "u")
    monkeypatch.setattr(safetensors, "MAX_HEADER_BYTES", size - 1)
    error = refusal(lambda: checkpoints.save("a", "v"))
    assert (error.reason, error.retry_after_s) == (Reason.MODEL_TOO_LARGE, None)


def test_checkpoints_of_deleted_optimizers_are_listed_and_deleted_from_outside(tmp_path):
    with optserve.local_server(tmp_path, backend="numpy") as server, optserve.connect(server.target) as client:
        for name in ("gone", "here"):
            client.create_optimizer(name, optserve.Sgd(), {"w": np.zeros(3, np.float32)}).save_checkpoint("t")
        client.delete_optimizer("gone")
        assert [(item.optimizer, item.tag) for item in client.list_checkpoints()] == [("gone", "t"), ("here", "t")]
        command = [sys.executable, "-c", "from optserve.cli import main; main()", "checkpoints"]
        target = ["--target", server.target]
        listed = subprocess.run([*command, "list", "--json", *target], capture_output=True, check=True).stdout
        assert [(item["optimizer"], item["tag"]) for item in json.loads(listed)] == [("gone", "t"), ("here", "t")]
        subprocess.run([*command, "delete", "gone", "t", "--yes", *target], capture_output=True, check=True)
        assert [item.optimizer for item in client.list_checkpoints()] == ["here"]


def test_a_limit_from_the_configuration_is_kept(tmp_path):
    (tmp_path / "optserve.toml").write_text("max_total_checkpoints = 1\n")
    options = ["--config", str(tmp_path / "optserve.toml")]
    with (
        optserve.local_server(tmp_path / "data", backend="numpy", options=options) as server,
        optserve.connect(server.target) as client,
    ):
        opt = client.create_optimizer("a", optserve.Sgd(), {"w": np.zeros(3, np.float32)})
        opt.save_checkpoint("t")
        with pytest.raises(optserve.ResourceExhaustedError, match="delete some"):
            opt.save_checkpoint("u")


def test_only_a_few_states_are_under_way_at_a_time(folder):
    server, checkpoints = folder
    item = server.create()
    with ExitStack() as stack:
        for turn in range(MAX_TRANSFERS):
            stack.enter_context(checkpoints.exported(item) if turn % 2 else checkpoints.staging(item))
        with pytest.raises(OptserveError) as caught:
            checkpoints.save("a", "one")
        assert caught.value.reason is Reason.TOO_MANY_STREAMS
        assert caught.value.retry_after_s
    checkpoints.save("a", "one")


def test_their_number_is_bounded(folder):
    server, checkpoints = folder
    server.create()
    for tag in "abc":
        checkpoints.save("a", tag)
    with pytest.raises(OptserveError) as caught:
        checkpoints.save("a", "d")
    assert caught.value.reason is Reason.SERVER_FULL
    checkpoints.save("a", "c", overwrite=True)
    assert [item.tag for item in checkpoints.page("a", 2, "")[0]] == ["a", "b"]
    assert checkpoints.page("a", 2, "")[1]
    (rest,), more = checkpoints.page("a", 2, checkpoints.page("a", 2, "")[0][-1].sort_key)
    assert (rest.tag, more) == ("c", "")
