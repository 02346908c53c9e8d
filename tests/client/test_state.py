"""A state on its way out of the service and into it, and between the service and torch."""

import asyncio
import re
import subprocess
import sys

import numpy as np
import pytest
import safetensors.numpy
import torch

import optserve
import optserve.aio
import optserve.torch
from optserve import safetensors as ours

PARAMETERS = {"w": (40, 30), "b": (30,), "scale": (), "nothing": (0, 3)}
METHODS = [
    optserve.Adadelta(rho=0.9, eps=1e-5, learning_rate=0.7),
    optserve.Adagrad(learning_rate=0.05),
    optserve.Momentum(learning_rate=0.03, rho=0.8),
    optserve.WindowedRms(learning_rate=0.002, rho=0.95, eps=0.0, outer_eps=1e-7),
    optserve.Sgd(learning_rate=0.2),
]


def gradients(seed: int, dtype: str = "float32") -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape).astype(dtype) for name, shape in PARAMETERS.items()}


@pytest.fixture
def opt(client, name):
    made = client.create_optimizer(name, optserve.Adadelta(), gradients(0))
    for seed in range(3):
        made.step(gradients(seed))
    return made


def same(one: optserve.OptimizerState, other: optserve.OptimizerState) -> bool:
    def content(state: optserve.OptimizerState):
        arrays = {name: {slot: a.tobytes() for slot, a in slots.items()} for name, slots in state.slots.items()}
        return state.step, state.algorithm, dict(state.parameters), arrays

    return content(one) == content(other)


def test_what_is_exported_and_imported_goes_on_with_the_same_bits(client, name, opt, tmp_path):
    told = []
    state = opt.export_state(on_progress=lambda done, total: told.append((done, total)))
    assert state.step == 3
    assert state.slots["w"]["square_avg"].shape == (40, 30)
    assert (told[0], told[-1]) == ((0, state.size_bytes), (state.size_bytes, state.size_bytes))
    state.save(tmp_path / "state.safetensors")
    loaded = optserve.OptimizerState.load(tmp_path / "state.safetensors")
    assert same(loaded, state)
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
        assert same(loaded, opt.export_state())
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


def changed(state: optserve.OptimizerState, **slots) -> optserve.OptimizerState:
    return optserve.OptimizerState(state.step, state.algorithm, state.parameters, {**state.slots, **slots})


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
    assert same(opt.export_state(), state)
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


# --- torch


def torch_optimizer(method: optserve.Algorithm, parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    match method:
        case optserve.Adadelta():
            return torch.optim.Adadelta(parameters, lr=method.learning_rate, rho=method.rho, eps=method.eps)
        case optserve.Adagrad():
            return torch.optim.Adagrad(parameters, lr=method.learning_rate, eps=method.eps)
        case optserve.Momentum():
            return torch.optim.SGD(parameters, lr=method.learning_rate, momentum=method.rho)
        case optserve.WindowedRms():
            return torch.optim.RMSprop(parameters, lr=method.learning_rate, alpha=method.rho, eps=method.outer_eps)
    return torch.optim.SGD(parameters, lr=method.learning_rate)


class TorchRun:
    def __init__(self, method: optserve.Algorithm, values: dict[str, np.ndarray]) -> None:
        self.parameters = {
            name: torch.nn.Parameter(torch.from_numpy(np.array(value))) for name, value in values.items()
        }
        self.optimizer = torch_optimizer(method, list(self.parameters.values()))

    def step(self, given: dict[str, np.ndarray]) -> None:
        for name, parameter in self.parameters.items():
            parameter.grad = torch.from_numpy(np.array(given[name]))
        self.optimizer.step()

    def values(self) -> dict[str, np.ndarray]:
        return {name: parameter.detach().numpy().copy() for name, parameter in self.parameters.items()}


def close(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    for name, value in one.items():
        np.testing.assert_allclose(value, other[name], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_a_torch_run_enters_the_service_and_leaves_it_again(client, name, method):
    start = gradients(99, "float64")
    whole = TorchRun(method, start)
    for seed in range(12):
        whole.step(gradients(seed, "float64"))
    first = TorchRun(method, start)
    for seed in range(4):
        first.step(gradients(seed, "float64"))
    state = optserve.torch.from_state_dict(first.optimizer.state_dict(), first.parameters)
    assert state.algorithm == method
    opt = client.create_optimizer(name, state.algorithm, state.parameters)
    opt.import_state(state)
    x = first.values()
    for seed in range(4, 8):
        for key, update in opt.step(gradients(seed, "float64")).items():
            x[key] = x[key] + update
    last = TorchRun(method, x)
    exported = opt.export_state()
    assert exported.step == (8 if method.name not in ("sgd", "momentum") else 4)  # torch's SGD counts no steps
    last.optimizer.load_state_dict(optserve.torch.to_state_dict(exported))
    for seed in range(8, 12):
        last.step(gradients(seed, "float64"))
    close(last.values(), whole.values())


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_a_state_dict_has_torchs_keys_and_settings(client, name, method):
    run = TorchRun(method, gradients(0))
    run.step(gradients(1))
    expected = run.optimizer.state_dict()
    opt = client.create_optimizer(name, method, gradients(0))
    opt.step(gradients(1))
    actual = optserve.torch.to_state_dict(opt.export_state())
    names = {key for entry in expected["state"].values() for key in entry}
    assert {key for entry in actual["state"].values() for key in entry} == names - (
        {"momentum_buffer"} if method.name == "sgd" else set()
    )
    assert set(actual["param_groups"][0]) <= set(expected["param_groups"][0])
    for key, value in actual["param_groups"][0].items():
        assert value == expected["param_groups"][0][key], key
    again = optserve.torch.from_state_dict(actual, run.parameters)
    assert again.algorithm == method
    for parameter, slots in opt.export_state().slots.items():
        for slot, array in slots.items():
            np.testing.assert_allclose(again.slots[parameter][slot], array, rtol=1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: torch.optim.Adadelta(p, weight_decay=0.1), "no weight_decay; it is 0.1"),
        (lambda p: torch.optim.Adadelta(p, maximize=True), "no maximize"),
        (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True), "no nesterov"),
        (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, dampening=0.5), "no dampening"),
        (lambda p: torch.optim.RMSprop(p, centered=True), "no centered"),
        (lambda p: torch.optim.RMSprop(p, momentum=0.5), "no momentum"),
        (lambda p: torch.optim.Adagrad(p, lr_decay=0.1), "no lr_decay"),
        (torch.optim.Adam, "none of Adadelta, Adagrad, RMSprop and SGD"),
        (lambda p: torch.optim.SGD([{"params": p[:1]}, {"params": p[1:], "lr": 0.5}], lr=0.1), "different settings"),
        (lambda p: torch.optim.Adadelta(p[:2]), "of 2 parameters, not 4"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_the_service_cannot_continue_is_refused(make, message):
    parameters = {name: torch.nn.Parameter(torch.ones(shape)) for name, shape in PARAMETERS.items()}
    with pytest.raises(optserve.InvalidArgumentError, match=message):
        optserve.torch.from_state_dict(make(list(parameters.values())).state_dict(), parameters)


def test_what_torch_cannot_continue_is_refused(client, name):
    inside = client.create_optimizer(name, optserve.WindowedRms(), gradients(0))
    with pytest.raises(optserve.InvalidArgumentError, match=re.escape("WindowedRms(eps=0, outer_eps=…)")):
        optserve.torch.to_state_dict(inside.export_state())
    still = client.create_optimizer(f"{name}-2", optserve.Momentum(learning_rate=0.0), gradients(0))
    with pytest.raises(optserve.InvalidArgumentError, match="learning rate of 0"):
        optserve.torch.to_state_dict(still.export_state())


def test_state_dicts_that_cannot_be_understood_are_refused():
    parameters = {name: torch.nn.Parameter(torch.ones(shape)) for name, shape in PARAMETERS.items()}
    good = torch.optim.SGD(list(parameters.values()), lr=0.1, momentum=0.9).state_dict()
    for spoil, message in (
        (lambda s: s["param_groups"].clear(), "no parameter group"),
        (lambda s: s["param_groups"][0].update(trust_coefficient=0.1), "no trust_coefficient; it is 0.1"),
        (lambda s: s["state"].update({0: {"momentum_buffer": torch.ones(3)}}), "momentum_buffer of 'w' is"),
        (
            lambda s: (
                s["param_groups"][0].update(lr=0.0),
                s["state"].update({0: {"momentum_buffer": torch.ones(PARAMETERS["w"])}}),
            ),
            "says nothing where the rate is 0",
        ),
    ):
        spoilt = {"state": dict(good["state"]), "param_groups": [dict(group) for group in good["param_groups"]]}
        spoil(spoilt)
        with pytest.raises(optserve.InvalidArgumentError, match=message):
            optserve.torch.from_state_dict(spoilt, parameters)
    halves = {"w": torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))}
    with pytest.raises(optserve.InvalidArgumentError, match=r"'w' is torch\.bfloat16"):
        optserve.torch.from_state_dict(torch.optim.SGD(list(halves.values()), lr=0.1).state_dict(), halves)


def test_a_state_that_contradicts_itself_is_not_written(opt, tmp_path):
    state = opt.export_state()
    w = {slot: array.astype("f8") for slot, array in state.slots["w"].items()}
    with pytest.raises(optserve.InvalidArgumentError, match=r"w.square_avg is not there, or not \[40, 30\] float32"):
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
    assert "hosted" in command("optimizers", "list", *target).stdout
    assert "Deleted one" in command("checkpoints", "delete", name, "one", "--yes", *target).stdout
    gone = command("checkpoints", "restore", name, "one", "--yes", *target)
    assert (gone.returncode, "no checkpoint 'one'" in gone.stderr) == (1, True)
    file.write_bytes(b"nothing")
    damaged = command("optimizers", "import", name, file, "--yes", *target)
    assert (damaged.returncode, "not an optimizer's state" in damaged.stderr) == (1, True)
