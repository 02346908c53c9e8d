"""A state on its way out of the service and into it."""

import asyncio
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import safetensors.numpy

import optserve
import optserve.aio
from optserve._common import safetensors as ours

PARAMETERS = {"w": (40, 30), "b": (30,), "scale": (), "nothing": (0, 3)}


def gradients(seed: int, dtype: str = "float32") -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape).astype(dtype) for name, shape in PARAMETERS.items()}


@pytest.fixture
def opt(client, name):
    made = client.create_optimizer(name, optserve.Adadelta(), gradients(0))
    for seed in range(3):
        made.step(gradients(seed))
    return made


def test_what_is_exported_and_imported_goes_on_with_the_same_bits(client, name, opt, tmp_path):
    told = []
    state = opt.export_state(on_progress=lambda done, total: told.append((done, total)))
    assert state.step == 3
    assert state.slots["w"]["square_avg"].shape == (40, 30)
    assert (told[0], told[-1]) == ((0, state.size_bytes), (state.size_bytes, state.size_bytes))
    state.save(tmp_path / "state.safetensors")
    loaded = optserve.OptimizerState.load(tmp_path / "state.safetensors")
    assert loaded == state
    assert [path.name for path in tmp_path.iterdir()] == ["state.safetensors"]
    other = client.create_optimizer(f"{name}-2", loaded.algorithm, loaded.parameters)
    other.import_state(loaded)
    assert other.current_step == 3
    for seed in range(3, 6):
        assert {k: v.tobytes() for k, v in opt.step(gradients(seed)).items()} == {
            k: v.tobytes() for k, v in other.step(gradients(seed)).items()
        }


def test_a_file_is_what_the_safetensors_library_reads_and_writes(opt, tmp_path):
    state = opt.export_state()
    path = tmp_path / "state.safetensors"
    state.save(path)
    arrays = safetensors.numpy.load_file(path)
    assert set(arrays) == {f"{name}.{slot}" for name in PARAMETERS for slot in ("square_avg", "acc_delta")}
    for name, slots in state.slots.items():
        for slot, array in slots.items():
            assert np.array_equal(arrays[f"{name}.{slot}"], array)
    # And the other way about.
    safetensors.numpy.save_file(arrays, path, metadata={"some": "thing"})
    with path.open("rb") as file:
        entries, metadata, begin = ours.read_head(file)
    assert metadata == {"some": "thing"}
    content = path.read_bytes()
    for key, array in arrays.items():
        assert content[begin + entries[key].begin : begin + entries[key].end] == array.tobytes()


def test_a_checkpoint_from_a_data_folder_is_a_state_file_too(tmp_path):
    with optserve.local_server(tmp_path, backend="numpy") as server, optserve.connect(server.target) as client:
        opt = client.create_optimizer("a", optserve.Adadelta(rho=0.8), gradients(0, "float64"))
        opt.step(gradients(1, "float64"))
        opt.save_checkpoint("one")
        loaded = optserve.OptimizerState.load(tmp_path / "checkpoints/a/one.safetensors")
        assert loaded == opt.export_state()
    library = safetensors.numpy.load_file(tmp_path / "checkpoints/a/one.safetensors")
    assert np.array_equal(library["w.acc_delta"], loaded.slots["w"]["acc_delta"])


def test_a_damaged_file_is_refused(opt, tmp_path):
    path = tmp_path / "state.safetensors"
    opt.export_state().save(path)
    intact = path.read_bytes()
    head = 8 + int.from_bytes(intact[:8], "little")
    places = (*range(0, head, 5), head, len(intact) - 1)
    flipped = [intact[:at] + bytes([intact[at] ^ 4]) + intact[at + 1 :] for at in places]
    for content in (b"", b"abc", intact[:50], intact[:-1], *flipped):
        path.write_bytes(content)
        with pytest.raises(optserve.InvalidArgumentError, match="is not an optimizer's state"):
            optserve.OptimizerState.load(path)


def test_states_are_equal_where_they_are_the_same_bit_for_bit(opt):
    state = opt.export_state()
    assert state == opt.export_state()
    w = dict(state.slots["w"])
    minus_zero, nan = w["acc_delta"].copy(), w["acc_delta"].copy()
    minus_zero[0, 0], nan[0, 0] = -0.0, np.nan
    zero = minus_zero.copy()
    zero[0, 0] = 0.0
    assert changed(state, w={**w, "acc_delta": zero}) != changed(state, w={**w, "acc_delta": minus_zero})
    assert changed(state, w={**w, "acc_delta": nan}) == changed(state, w={**w, "acc_delta": nan.copy()})
    assert changed(state, w={**w, "acc_delta": w["acc_delta"].T}) != state
    for name, value in (
        ("step", 9),
        ("algorithm", optserve.Adadelta(rho=0.5)),
        ("schedule", optserve.InverseTime(decay=1.0)),
        ("clipping", optserve.Clipping(value=1.0)),
        ("groups", [optserve.Group(["w"], {"rho": 0.1})]),
        ("weight_decay", 0.5),
        ("consistency", optserve.Async()),
    ):
        assert replace(state, **{name: value}) != state, name
    assert state.without("schedule") != state  # says nothing of it, rather than that there is none
    assert replace(state, parameters=dict(reversed(state.parameters.items()))) == state
    assert state != "a state"
    with pytest.raises(TypeError, match="unhashable"):
        hash(state)


def changed(state: optserve.OptimizerState, **slots) -> optserve.OptimizerState:
    return replace(state, slots={**state.slots, **slots})


def test_states_that_do_not_fit_are_refused_and_nothing_changes(client, opt):
    state = opt.export_state()
    w = dict(state.slots["w"])
    nan = w["acc_delta"].copy()
    nan[3, 4] = np.nan
    for bad, message in (
        (optserve.OptimizerState(9, state.algorithm, state.parameters, {"w": w}), "lacks 'b'"),
        (changed(state, extra=w), "another parameter, 'extra'"),
        (changed(state, w={"square_avg": w["square_avg"]}), r"slots \['square_avg'\]; these are needed"),
        (changed(state, w={**w, "more": w["acc_delta"]}), "these are needed"),
        (
            changed(state, w={**w, "acc_delta": w["acc_delta"].T}),
            r"acc_delta of 'w' is \[30, 40\] float32, not \[40, 30\]",
        ),
        (changed(state, w={**w, "acc_delta": w["acc_delta"].astype("f8")}), "float64"),
        (changed(state, w={**w, "acc_delta": nan}), r"acc_delta of 'w' is nan at flat index 94"),
        (changed(state, w={**w, "acc_delta": -1 - w["acc_delta"]}), "is negative"),
        (optserve.OptimizerState(9, optserve.Adagrad(), state.parameters, state.slots), "of adagrad; the optimizer is"),
    ):
        with pytest.raises(optserve.InvalidArgumentError, match=message):
            opt.import_state(bad)
    assert opt.export_state() == state
    opt.step(gradients(9))  # and nobody takes the state for another one


def test_a_client_that_steps_on_is_told_of_an_import(client, name, opt):
    other = client.optimizer(name)
    other.step(gradients(7))
    opt.refresh()
    opt.import_state(opt.export_state())
    with pytest.raises(optserve.StateReplacedError):
        other.step(gradients(8))


def test_the_same_from_asyncio(server, name):
    async def run() -> None:
        async with optserve.aio.connect(server.target) as client:
            opt = await client.create_optimizer(name, optserve.Adadelta(), gradients(0))
            await opt.step(gradients(0))
            await opt.save_checkpoint("one")
            state = await opt.export_state()
            expected = await opt.step(gradients(1))
            await opt.restore_checkpoint("one")
            assert np.array_equal((await opt.step(gradients(1)))["w"], expected["w"])
            await opt.import_state(state)
            assert opt.current_step == 1
            assert [item.tag for item in await opt.list_checkpoints()] == ["one"]
            await opt.delete_checkpoint("one")
            await opt.save_checkpoint("two")
            await client.delete_checkpoint(name, "two")
            assert await client.list_checkpoints(name) == []

    asyncio.run(run())


def test_a_state_that_contradicts_itself_is_not_written(opt, tmp_path):
    state = opt.export_state()
    w = {slot: array.astype("f8") for slot, array in state.slots["w"].items()}
    with pytest.raises(optserve.InvalidArgumentError, match=r"w.square_avg is missing, or is not \[40, 30\] float32"):
        changed(state, w=w).save(tmp_path / "state.safetensors")
    assert not list(tmp_path.iterdir())


# --- Commands


def command(*arguments: object) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-c", "from optserve.cli import main; main()", *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, timeout=60, check=False)


def test_checkpoints_exports_and_imports_by_command(server, client, name, opt, tmp_path):
    target = ("--target", server.target)
    assert f"Saved one: step 3, {9.9:.0f}" in command("checkpoints", "save", name, "one", *target).stdout
    taken = command("checkpoints", "save", name, "one", *target)
    assert (taken.returncode, "already; overwrite it" in taken.stderr) == (1, True)
    opt.step(gradients(3))
    assert "one" in command("checkpoints", "list", name, *target).stdout
    assert "step 3" in command("checkpoints", "restore", name, "one", "--yes", *target).stdout
    opt.refresh()
    assert opt.current_step == 3
    file = tmp_path / "state.safetensors"
    assert f"Exported {name}: step 3" in command("optimizers", "export", name, file, *target).stdout
    exists = command("optimizers", "export", name, file, *target)
    assert (exists.returncode, "--overwrite replaces it" in exists.stderr) == (1, True)
    assert f"Imported {name}-new: step 3" in command("optimizers", "import", f"{name}-new", file, *target).stdout
    assert client.optimizer(f"{name}-new").current_step == 3
    assert command("optimizers", "import", f"{name}-new", file, "--yes", *target).returncode == 0
    client.create_optimizer(f"{name}-held", optserve.Adadelta(), {"x": np.ones(3, np.float32)}, hosted=True)
    assert command("optimizers", "export", f"{name}-held", file, "--overwrite", *target).returncode == 0
    assert command("optimizers", "import", f"{name}-held-new", file, *target).returncode == 0
    assert client.optimizer(f"{name}-held-new").pull_parameters().arrays["x"].tolist() == [1, 1, 1]
    annealed = client.create_optimizer(
        f"{name}-s", optserve.Sgd(), {"x": np.ones(3)}, schedule=optserve.InverseTime(decay=0.5)
    )
    assert command("optimizers", "export", f"{name}-s", file, "--overwrite", *target).returncode == 0
    assert command("optimizers", "import", f"{name}-s2", file, *target).returncode == 0
    assert client.optimizer(f"{name}-s2").schedule == annealed.schedule
    assert command("optimizers", "import", f"{name}-s3", file, "--without", "schedule", *target).returncode == 0
    assert client.optimizer(f"{name}-s3").schedule is None
    assert "hosted" in command("optimizers", "list", *target).stdout
    assert "Deleted one" in command("checkpoints", "delete", name, "one", "--yes", *target).stdout
    gone = command("checkpoints", "restore", name, "one", "--yes", *target)
    assert (gone.returncode, "no checkpoint 'one'" in gone.stderr) == (1, True)
    file.write_bytes(b"nothing")
    damaged = command("optimizers", "import", name, file, "--yes", *target)
    assert (damaged.returncode, "not an optimizer's state" in damaged.stderr) == (1, True)
