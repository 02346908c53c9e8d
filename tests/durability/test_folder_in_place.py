"""A data folder that is deleted, moved or replaced while a server runs; and folders that no server can use."""

import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

import optserve
from durability.folder import Server, fingerprint, step
from optserve_server.domain.errors import OptserveError, Reason
from optserve_server.persistence import folder_lock, journal

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
# Its first pause is longer than its time-outs, so it says why it was refused once.
ONE_TRY = optserve.ClientConfig(timeout_s=30, step_timeout_s=30, initial_backoff_s=60, max_backoff_s=60)
ONES = {"w": np.ones(5, np.float32)}


@contextmanager
def watched(target: str) -> Iterator[Iterator[int]]:
    """The health of a server: what it is now, and then what it becomes."""
    with grpc.insecure_channel(target) as channel:
        call = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(), timeout=60)
        yield (message.status for message in call)
        call.cancel()


def refused(opt: optserve.Optimizer) -> None:
    with pytest.raises(optserve.UnavailableError, match="data folder was deleted, moved or replaced") as caught:
        opt.step(ONES)
    assert caught.value.reason == "NOT_DURABLE"


def test_nothing_is_acknowledged_while_the_folder_is_elsewhere(tmp_path):
    """Another server may take the path meanwhile, and neither writes into the other's folder."""
    folder, elsewhere = tmp_path / "data", tmp_path / "elsewhere"
    with (
        optserve.local_server(folder, backend="numpy") as server,
        optserve.connect(server.target, ONE_TRY) as client,
        watched(server.target) as health,
    ):
        opt = client.create_optimizer("a", optserve.Momentum(), ONES)
        opt.step(ONES)
        assert next(health) == SERVING
        folder.rename(elsewhere)
        refused(opt)
        assert next(health) == NOT_SERVING
        assert "data folder" in client.server_info().durability_problem
        with optserve.local_server(folder, backend="numpy") as other, optserve.connect(other.target) as second:
            assert not list(second.list_optimizers())
            second.create_optimizer("b", optserve.Sgd(), ONES)
            refused(opt)
            with pytest.raises(optserve.UnavailableError):
                opt.save_checkpoint("t")
        before = sorted(path.name for path in folder.rglob("*"))
        refused(opt)
        assert sorted(path.name for path in folder.rglob("*")) == before
        # Put back, everything goes on.
        folder.rename(tmp_path / "other")
        elsewhere.rename(folder)
        assert next(health) == SERVING
        last = opt.step(ONES)["w"].tobytes()
        assert not client.server_info().durability_problem
    with optserve.local_server(folder, backend="numpy") as server, optserve.connect(server.target) as client:
        assert client.optimizer("a").current_step == 2
        assert client.optimizer("a").replay()["w"].tobytes() == last


def test_a_folder_that_was_deleted_is_not_made_anew(tmp_path):
    folder = tmp_path / "data"
    with (
        optserve.local_server(folder, backend="numpy") as server,
        optserve.connect(server.target, ONE_TRY) as client,
        watched(server.target) as health,
    ):
        opt = client.create_optimizer("a", optserve.Momentum(), ONES)
        opt.step(ONES)
        assert next(health) == SERVING
        shutil.rmtree(folder)
        # Also where nobody steps.
        assert next(health) == NOT_SERVING
        refused(opt)
    assert not folder.exists()


@pytest.mark.parametrize("tensors", [(1,), ()], ids=["that would go into them", "that would go into the next"])
def test_a_journal_whose_files_are_deleted_takes_no_step(tmp_path, tensors):
    server = Server(tmp_path)
    item = server.create()
    step(item, 0)
    for path in journal.segment_paths(tmp_path):
        path.unlink()
    with pytest.raises(OptserveError, match="journal was deleted") as caught:
        step(item, 1, tensors)
    assert caught.value.reason is Reason.NOT_DURABLE
    assert item.steps.step == 1
    # All is in memory still, and a snapshot keeps it; one is taken at once in a server that runs.
    assert server.folder._upkeep.is_snapshot_due(grown=False)
    server.folder.snapshot()
    step(item, 1)
    before = fingerprint(item)
    server.die()
    again = Server(tmp_path)
    assert fingerprint(again.optimizers.get("a")) == before
    again.die()


def serve(folder: Path) -> subprocess.CompletedProcess[str]:
    """A server that is expected not to start."""
    command = [sys.executable, "-m", "optserve_server", "--port", "0", "--backend", "numpy", "--data-dir", str(folder)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def tool(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "optserve_server.cli.journal", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def in_a_sentence(done: subprocess.CompletedProcess[str], *words: str) -> None:
    assert done.returncode in (1, 2)
    assert "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    for word in words:
        assert word in last


@pytest.fixture
def kept(tmp_path) -> Path:
    """A folder with a snapshot, two segments and a checkpoint folder."""
    server = Server(tmp_path / "data")
    item = server.create()
    step(item, 0)
    server.folder.snapshot()
    for index in range(1, 4):
        step(item, index)
    server.die()
    return tmp_path / "data"


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: next(folder.glob("snapshot-*/0000.safetensors")).unlink(), ["0000.safetensors"]),
        (lambda folder: next(folder.glob("snapshot-*/manifest.json")).unlink(), ["manifest.json"]),
        (lambda folder: journal.segment_paths(folder)[-1].unlink(), ["newest file of the journal is missing"]),
        (lambda folder: journal.segment_paths(folder)[1].unlink(), ["are missing"]),
        (lambda folder: (folder / "NEWEST_SEGMENT").write_text("?"), ["NEWEST_SEGMENT"]),
        (lambda folder: make_folder_of(journal.segment_paths(folder)[-1]), [".journal", "cannot be read"]),
        (lambda folder: make_folder_of(folder / "LOCK"), ["cannot be used"]),
    ],
    ids=["array", "manifest", "newest", "second", "note", "folder", "lock"],
)
def test_a_folder_that_cannot_be_read_is_a_sentence(kept, damage, words):
    damage(kept)
    with pytest.raises(journal.JournalError) as caught:
        Server(kept)
    assert "\n" not in str(caught.value)
    for word in (str(kept), *words):
        assert word in str(caught.value)


def test_the_sentence_goes_to_standard_error_with_an_exit_code(kept):
    next(kept.glob("snapshot-*/0000.safetensors")).unlink()
    in_a_sentence(serve(kept), "optserve serve:", "0000.safetensors")
    in_a_sentence(tool("verify", kept), "optserve journal:", "0000.safetensors")


def make_folder_of(path: Path) -> None:
    path.unlink()
    path.mkdir()


def test_other_files_in_a_folder_are_left_alone(kept):
    for name in ("notes.journal", "snapshot-of-monday", "00000.journal"):
        (kept / name).write_text("somebody else's")
    server = Server(kept)
    assert server.optimizers.get("a").steps.step == 4
    server.folder.close()
    assert {"notes.journal", "snapshot-of-monday", "00000.journal"} <= {path.name for path in kept.iterdir()}


def test_a_newest_file_that_is_missing_can_be_given_up(kept):
    *_, newest = journal.segment_paths(kept)
    newest.unlink()
    in_a_sentence(tool("verify", kept), f"optserve journal repair {kept}")
    assert tool("repair", kept, "--yes").returncode == 0
    server = Server(kept)
    assert server.optimizers.get("a").steps.step == 3
    server.die()


def test_verify_says_good_of_data_folders_only_and_writes_nothing(kept, tmp_path):
    wrong = tmp_path / "wrong"
    (wrong / "deeper").mkdir(parents=True)
    for command in ("verify", "stats", "repair"):
        in_a_sentence(tool(command, wrong), "is not a data folder")
    assert [path.name for path in wrong.iterdir()] == ["deeper"]
    # A copy that nobody has used and nobody may write to.
    copy = shutil.copytree(kept, tmp_path / "copy", ignore=shutil.ignore_patterns(folder_lock.LOCK))
    for path in (copy, *copy.rglob("*")):
        path.chmod(0o500 if path.is_dir() else 0o400)
    before = sorted(copy.rglob("*"))
    assert "good" in tool("verify", copy).stdout
    assert sorted(copy.rglob("*")) == before
    # Two may look at the same time, and none while a server runs.
    with folder_lock.reading(kept):
        assert "good" in tool("verify", kept).stdout
        with pytest.raises(journal.JournalError, match="Another server uses"):
            folder_lock.FolderLock(kept)
    for path in (copy, *copy.rglob("*")):
        path.chmod(0o700)
