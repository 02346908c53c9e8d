"""The settings of a state: they travel with it, wherever it goes, or what lacks them says so."""

import json
import queue
import struct
import subprocess
import sys
import threading

import numpy as np
import pytest

import optserve
from optserve._common import safetensors
from present import present

SHAPES = {"w": (4, 3), "b": (3,)}
SETTINGS = {
    "schedule": optserve.AtSteps(rate=0.1, milestones=(2, 5), warmup_steps=1),
    "clipping": optserve.Clipping(global_norm=1.0),
    "groups": (optserve.Group(("b",), {"learning_rate": 0.01}),),
}
HOSTED = {
    **SETTINGS,
    "groups": (optserve.Group(("b",), {"learning_rate": 0.01}, weight_decay=0.25),),
    "weight_decay": 0.125,
    "consistency": None,
}
SCHEDULES = [
    optserve.Constant(warmup_steps=4),
    optserve.InverseTime(decay=0.5),
    optserve.Exponential(rate=0.9, period_steps=3),
    optserve.Cosine(period_steps=8, floor=0.25),
    None,
]


def arrays(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape) for name, shape in SHAPES.items()}


def bits(values: dict[str, np.ndarray]) -> dict[str, bytes]:
    return {name: value.tobytes() for name, value in values.items()}


def stepped(client, name, steps: int = 3, **options) -> optserve.Optimizer:
    made = client.create_optimizer(name, optserve.Momentum(learning_rate=0.1, rho=0.5), arrays(99), **options)
    for seed in range(steps):
        made.step(arrays(seed))
    return made


def through_a_file(state: optserve.OptimizerState, folder) -> optserve.OptimizerState:
    state.save(folder / "state.safetensors")
    return optserve.OptimizerState.load(folder / "state.safetensors")


@pytest.mark.parametrize("options", [{}, SETTINGS, {**HOSTED, "hosted": True}], ids=["none", "delta", "hosted"])
def test_an_optimizer_made_from_a_state_goes_on_with_the_same_bits(client, name, tmp_path, options):
    one = stepped(client, name, **options)
    state = through_a_file(one.export_state(), tmp_path)
    assert state == one.export_state()
    two = client.create_optimizer_from_state(f"{name}-2", state)
    reply = "parameters" if one.hosted else "updates"
    assert (two.hosted, two.current_step) == (one.hosted, 3)
    for seed in range(3, 7):
        assert bits(one.step(arrays(seed), reply=reply)) == bits(two.step(arrays(seed), reply=reply))
    assert one.export_state() == two.export_state()


def test_an_import_brings_all_settings_of_the_state(client, name):
    one = stepped(client, name, **SETTINGS)
    state = one.export_state()
    plain = client.create_optimizer(f"{name}-2", state.algorithm, state.parameters)
    other = client.create_optimizer(
        f"{name}-3", optserve.Momentum(learning_rate=9.0), state.parameters,
        schedule=optserve.InverseTime(decay=1.0), clipping=optserve.Clipping(value=3.0),
        groups=[optserve.Group(["w"], {"rho": 0.1})],
    )  # fmt: skip
    for two in (plain, other):
        two.import_state(state)
        assert two.export_state() == state
    # And takes away what the state has not.
    other.import_state(stepped(client, f"{name}-4").export_state())
    assert (other.schedule, other.clipping, other.groups) == (None, None, ())


def test_what_a_state_says_nothing_of_stays(client, name):
    state = stepped(client, name, **SETTINGS).export_state()
    two = client.create_optimizer(f"{name}-2", state.algorithm, state.parameters, clipping=optserve.Clipping(value=3.0))
    two.import_state(state.without("clipping", "schedule"))
    assert (two.clipping, two.schedule, two.groups) == (optserve.Clipping(value=3.0), None, state.groups)
    made = client.create_optimizer_from_state(f"{name}-3", state.without("groups", "schedule"))
    assert (made.groups, made.schedule, made.clipping) == ((), None, state.clipping)
    by_hand = optserve.OptimizerState(5, state.algorithm, state.parameters, state.slots)
    two.import_state(by_hand)
    assert (two.clipping, two.groups, two.current_step) == (optserve.Clipping(value=3.0), state.groups, 5)
    with pytest.raises(optserve.InvalidArgumentError, match="has no 'slots'"):
        state.without("slots")


def test_parameters_can_be_left_behind_by_name(client, name):
    held = stepped(client, name, hosted=True)
    state = held.export_state()
    assert bits(state.hosted_parameters) == bits(held.pull_parameters().arrays)
    delta = client.create_optimizer_from_state(f"{name}-2", state.without("parameters"))
    assert not delta.hosted
    assert bits(delta.step(arrays(5))) == bits(held.step(arrays(5)))


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
@pytest.mark.parametrize("consistency", [None, optserve.Async(), optserve.Bounded(3), optserve.Sync(2, 1)], ids=repr)
def test_every_setting_is_in_the_file(tmp_path, schedule, consistency):
    state = optserve.OptimizerState(
        3, optserve.Adadelta(), {"x": optserve.TensorSpec((2,))},
        {"x": {slot: np.ones(2, np.float32) for slot in ("square_avg", "acc_delta", "parameter")}},
        schedule=schedule, consistency=consistency, clipping=optserve.Clipping(norm=2.0), weight_decay=0.5,
        groups=[optserve.Group(["x"], {"rho": 0.5}, weight_decay=0.0)],
    )  # fmt: skip
    assert through_a_file(state, tmp_path) == state
    unsaid = state.without("schedule", "consistency", "groups")
    assert through_a_file(unsaid, tmp_path) == unsaid


def test_a_servers_own_file_says_all_settings(tmp_path):
    with optserve.local_server(tmp_path, backend="numpy") as server, optserve.connect(server.target) as client:
        expected = []
        for name, options in (("a", {}), ("b", SETTINGS), ("c", {**HOSTED, "hosted": True})):
            opt = stepped(client, name, **options)
            opt.save_checkpoint("one")
            expected.append((name, opt.export_state()))
        shared = client.create_optimizer(
            "d", optserve.Adadelta(), arrays(0), hosted=True, consistency=optserve.Sync(2, lease_s=60.0)
        )
        shared.save_checkpoint("one")
        expected.append(("d", shared.export_state()))
    for name, state in expected:
        assert optserve.OptimizerState.load(tmp_path / f"checkpoints/{name}/one.safetensors") == state


def test_a_file_of_an_older_client_is_read_and_says_nothing_of_settings(client, name, tmp_path):
    state = stepped(client, name, **SETTINGS).export_state()
    path = tmp_path / "old.safetensors"
    state.without("schedule", "clipping", "groups", "weight_decay", "consistency").save(path)
    content = path.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    head = json.loads(content[8 : 8 + size])
    description = json.loads(head["__metadata__"]["optserve"])
    assert description["format"] == 1  # older clients read what has no settings
    assert (description.pop("settings"), description.pop("hosted")) == ([], False)
    rewrite(path, json.dumps(description))
    loaded = optserve.OptimizerState.load(path)
    assert loaded.settings == {}
    target = client.create_optimizer(f"{name}-2", state.algorithm, state.parameters, **SETTINGS)
    target.import_state(loaded)
    assert target.export_state() == state


def test_an_older_client_refuses_a_file_whose_settings_it_would_drop(client, name, tmp_path):
    path = tmp_path / "new.safetensors"
    stepped(client, name, **SETTINGS).export_state().save(path)
    with path.open("rb") as file:
        _, metadata, _ = safetensors.read_head(file)
    assert json.loads(metadata["optserve"])["format"] == 2


def rewrite(path, description: str) -> None:
    """Give a file another description, and the checksum that goes with it."""
    import zlib

    with path.open("rb") as file:
        entries, _, begin = safetensors.read_head(file)
        file.seek(begin)
        data = file.read()
    checksum = f"{zlib.crc32(data, zlib.crc32(description.encode())):08x}"
    path.write_bytes(safetensors.encode_head(entries, {"optserve": description, "crc32": checksum}) + data)


@pytest.mark.parametrize(
    "spoil",
    [
        {"groups": [{"parameters": [7], "overrides": {}}]},
        {"groups": 3},
        {"schedule": {"kind": "unheard-of"}},
        {"schedule": {"kind": "cosine", "colour": 1}},
        {"clipping": {"kind": "value"}},
        {"consistency": []},
        {"settings": ["mood"]},
        {"rule": None},
    ],
    ids=repr,
)
def test_a_damaged_description_is_refused(client, name, tmp_path, spoil):
    path = tmp_path / "state.safetensors"
    stepped(client, name, steps=0, **SETTINGS).export_state().save(path)
    with path.open("rb") as file:
        _, metadata, _ = safetensors.read_head(file)
    rewrite(path, json.dumps({**json.loads(metadata["optserve"]), **spoil}))
    with pytest.raises(optserve.InvalidArgumentError, match="is not an optimizer's state"):
        optserve.OptimizerState.load(path)


def test_a_group_of_strangers_is_not_written(client, name, tmp_path):
    state = stepped(client, name, steps=0).export_state()
    strange = optserve.OptimizerState(
        0, state.algorithm, state.parameters, state.slots, groups=[optserve.Group(["x"], {})]
    )
    with pytest.raises(optserve.InvalidArgumentError, match="A group has the parameter 'x'"):
        strange.save(tmp_path / "state.safetensors")
    assert not list(tmp_path.iterdir())


def test_another_consistency_is_imported_unless_workers_are_alive(client, name):
    one = client.create_optimizer(name, optserve.Sgd(), arrays(0), hosted=True, consistency=optserve.Async())
    state = one.export_state()
    two = client.create_optimizer(
        f"{name}-2", optserve.Sgd(), arrays(1), hosted=True, consistency=optserve.Bounded(2), weight_decay=0.5
    )
    with client.worker(f"{name}-2"):
        before = two.export_state()
        with pytest.raises(optserve.FailedPreconditionError, match="1 workers are alive"):
            two.import_state(state)
        assert two.export_state() == before
        two.import_state(state.without("consistency"))
        assert (two.consistency, two.weight_decay) == (optserve.Bounded(2), 0.0)
    two.import_state(state)
    assert two.consistency == optserve.Async()
    # That nobody has shared an optimizer is no setting which another must have.
    alone = client.create_optimizer(f"{name}-3", optserve.Sgd(), arrays(0), hosted=True)
    two.import_state(alone.export_state())
    assert two.consistency == optserve.Async()


def test_a_state_and_its_settings_survive_a_crash_together(tmp_path):
    with optserve.local_server(tmp_path, backend="numpy") as server, optserve.connect(server.target) as client:
        state = stepped(client, "one", **SETTINGS).export_state()
        client.create_optimizer("two", state.algorithm, state.parameters).import_state(state)
        server.process.kill()
        server.process.wait()
    with optserve.local_server(tmp_path, backend="numpy") as server, optserve.connect(server.target) as client:
        assert client.optimizer("two").export_state() == state


def test_a_state_that_is_refused_leaves_no_optimizer_behind(client, name):
    state = stepped(client, name, hosted=True).export_state()
    nan = {key: {slot: array.copy() for slot, array in slots.items()} for key, slots in state.slots.items()}
    nan["w"]["momentum"][0, 0] = np.nan
    with pytest.raises(optserve.InvalidArgumentError, match="momentum of 'w' is nan"):
        client.create_optimizer_from_state(
            f"{name}-2", optserve.OptimizerState(3, state.algorithm, state.parameters, nan)
        )
    assert client.create_optimizer_from_state(f"{name}-2", state).export_state() == state
    with pytest.raises(optserve.InvalidArgumentError, match="state must be something like"):
        client.create_optimizer_from_state(f"{name}-3", state.slots)


OLD_SERVER = """
import sys
from optserve.v1 import service_pb2
from optserve_server.edge import features
old = features.available() - {service_pb2.FEATURE_IMPORTED_SETTINGS, service_pb2.FEATURE_WEIGHT_DECAY_FACTORS}
features.available = lambda: old
from optserve_server.__main__ import main
main()
"""


def test_a_server_that_cannot_import_settings_is_told_none_silently():
    command = [sys.executable, "-c", OLD_SERVER, "--port", "0", "--backend", "numpy", "--announce", "--exit-on-eof"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        threading.Thread(target=lambda: lines.put(present(process.stdout).readline()), daemon=True).start()
        with optserve.connect(lines.get(timeout=60).removeprefix("ready ").strip()) as client:
            state = stepped(client, "a", **SETTINGS).export_state()
            two = client.create_optimizer("b", state.algorithm, state.parameters)
            with pytest.raises(
                optserve.FeatureUnavailableError, match="cannot import settings, and its schedule is None"
            ):
                two.import_state(state)
            two.import_state(state.without("schedule", "clipping", "groups"))
            assert two.current_step == 3
            assert client.create_optimizer_from_state("c", state).export_state() == state
            with pytest.raises(optserve.FeatureUnavailableError, match=r"too old for L2\(factor=0.5\)"):
                client.create_optimizer("d", optserve.Sgd(), arrays(0), hosted=True, weight_decay=optserve.L2(0.5))
            with pytest.raises(optserve.NotFoundError):
                client.optimizer("d")
        present(process.stdin).close()
        process.wait(30)
