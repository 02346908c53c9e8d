"""A data folder that an older server has written comes back bit for bit, torn tail and all."""

import json
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest

import optserve
from golden.look import CONFIG, look, read, state, step, written
from golden.write_folder import ADDED, LARGE, METHODS, PARAMS
from optserve_server.engine.record_encoding import STEPPED
from optserve_server.persistence import snapshot
from optserve_server.persistence.journal import Reader

HERE = Path(__file__).parent
FOLDERS = [path.stem for path in sorted(HERE.glob("folder-*.json"))]
TORN = "the torn record"
ADDITION = 7
"""The kind of the record."""

DECAY = "what is taken from x is not rounded away, and is divided like the learning rate"
MENDED = {
    "vsgd": "its averages no longer cancel",
    "hosted": DECAY,
    "async": DECAY,
    "bounded": DECAY,
    "sync": DECAY,
}
"""Optimizers whose formula was mended since, and how. Steps behind the snapshot are made again by the mended one."""


def golden(name: str, where: Path) -> tuple[Path, dict]:
    """A folder, unpacked, and what is to be found in it."""
    folder = where / "data"
    with tarfile.open(HERE / f"{name}.tar.xz") as archive:
        # Debian's Python 3.11.2 has no filters yet.
        archive.extraction_filter = getattr(tarfile, "data_filter", None)
        archive.extractall(folder)  # noqa: S202 - it is our own
    return folder, json.loads((HERE / f"{name}.json").read_text())


def assert_close(now, seen) -> None:
    """The same but for the last bits of arrays."""
    if isinstance(seen, dict):
        assert now.keys() == seen.keys()
        for key in seen:
            assert_close(now[key], seen[key])
    elif isinstance(seen, str) and seen.startswith("float") and " sha256 " not in seen:
        assert np.allclose(read(now), read(seen), rtol=1e-4, atol=1e-7)
    else:
        assert now == seen


@pytest.mark.parametrize("name", FOLDERS)
def test_an_old_folder_comes_back_bit_for_bit(tmp_path, name):
    folder, expected = golden(name, tmp_path)
    verified = subprocess.run(
        [sys.executable, "-m", "optserve_server.cli.journal", "verify", folder],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (verified.returncode, "good" in verified.stdout, TORN in verified.stdout) == (0, True, True)
    # Twice: what the first start has cut and written is read again by the second.
    for _ in range(2):
        with optserve.local_server(folder, backend="numpy") as server:
            found = look(server.target)
        assert found["checkpoints"] == expected["checkpoints"]
        assert found["optimizers"].keys() == expected["optimizers"].keys()
        for optimizer, seen in expected["optimizers"].items():
            now = found["optimizers"][optimizer]
            # There may be more to be seen today.
            now["message"] = {key: now["message"].get(key) for key in seen["message"]}
            if optimizer in MENDED:
                assert_close(now, seen)
            else:
                assert now == seen, optimizer


def test_the_fourth_folder_has_additions_and_steps_with_own_settings_behind_one_another(tmp_path):
    folder, _ = golden("folder-4", tmp_path)
    (path,) = snapshot.paths(folder)
    behind, saved = snapshot.read(path)
    of = {item.header["id"]: {parameter.name for parameter in item.layout.parameters} for item in saved}
    assert ADDED.keys() <= of["added-settled"]
    assert ADDED.keys().isdisjoint(of["added-behind"])
    kinds = list[int]()
    for record in Reader(folder, behind + 1):
        own = record.kind == STEPPED and "with" in json.loads(record.meta)
        kinds += [record.kind] if record.kind == ADDITION or own else []
    assert kinds.count(ADDITION) == 5
    assert len(set(kinds[kinds.index(ADDITION) :])) == 2


@pytest.mark.parametrize("name", FOLDERS)
def test_an_old_folder_goes_on_as_its_server_would_have(tmp_path, name):
    folder, expected = golden(name, tmp_path)
    with optserve.local_server(folder, backend="numpy") as server, optserve.connect(server.target, CONFIG) as client:
        for method, updates in expected["following"].items():
            made = step(client.optimizer(method), PARAMS, 500)
            if method in MENDED:
                for key, value in made.items():
                    assert np.allclose(value, np.reshape(updates[key], value.shape), rtol=1e-4, atol=1e-7), key
            else:
                assert {key: value.tolist() for key, value in made.items()} == updates, method
        looked = client.optimizer("adadelta").statistics(["w"], indices=[0, 5])
        slots = client.optimizer("adadelta").export_state().slots["w"]
        assert looked.step == 7
        for slot, values in looked.parameters["w"].elements.slots.items():
            assert values.tolist() == slots[slot].reshape(-1)[[0, 5]].tolist()
        client.create_optimizer("gone", METHODS["adadelta"], PARAMS)
        for saved, then in expected["saved"].items():
            optimizer, tag = saved.split()
            client.optimizer(optimizer).restore_checkpoint(tag)
            assert state(client.optimizer(optimizer)) == then, saved
        # Deleted and made anew behind the snapshot: nothing of the one before is left.
        reborn = client.optimizer("reborn")
        assert written(reborn.export_state().slots["x"]["sum"]) == written(np.zeros_like(LARGE["x"]))
