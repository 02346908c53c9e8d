"""`Optimizer.add_parameters`: the optimizer is as if it had been created with them, whatever the connection does."""

import asyncio
import threading
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

import optserve
from backend_under_test import BACKENDS
from client.proxy import proxy
from optserve import aio
from optserve.v1 import service_pb2

OLD = {"w": ((40, 30), "float32"), "b": ((7,), "float64"), "empty": ((0, 3), "float32")}
NEW = {"head.w": ((30, 5), "float32"), "none": ((0,), "float64"), "head.b": ((5,), "float64")}
GROUPS = (optserve.Group(["head.b"], {"learning_rate": 0.25}),)
METHODS: dict[str, optserve.Algorithm] = {
    "adadelta": optserve.Adadelta(), "adamw": optserve.AdamW(learning_rate=0.1), "nadam": optserve.Nadam(),
    "sgd_momentum": optserve.SgdMomentum(learning_rate=0.1, momentum=0.9), "lion": optserve.Lion(),
}  # fmt: skip
FAST = optserve.ClientConfig(initial_backoff_s=0.01, max_backoff_s=0.05, step_timeout_s=30)


def arrays(seed: int, *models: dict[str, tuple[tuple[int, ...], str]]) -> dict[str, np.ndarray]:
    return {
        name: np.random.default_rng([seed, *name.encode()]).standard_normal(shape).astype(dtype)
        for model in models
        for name, (shape, dtype) in model.items()
    }


def bits(values: Mapping[str, np.ndarray]) -> dict[str, bytes]:
    return {name: value.tobytes() for name, value in values.items()}


def state_bits(opt: optserve.Optimizer) -> tuple:
    """Everything of a state; `replay` and settings are compared elsewhere."""
    state = opt.export_state()
    return state.step, state.parameter_steps, {name: bits(slots) for name, slots in state.slots.items()}


@pytest.fixture(scope="module", params=BACKENDS)
def backend_client(request, tmp_path_factory):
    """A client of a server with a journal, on each backend."""
    with (
        optserve.local_server(tmp_path_factory.mktemp("data"), backend=request.param) as server,
        optserve.connect(server.target) as client,
    ):
        yield client


@pytest.mark.parametrize("transport", ["grpc", "shm"])
@pytest.mark.parametrize("hosted", [False, True], ids=["delta", "hosted"])
@pytest.mark.parametrize("method", METHODS)
def test_it_equals_one_that_was_created_with_them_and_left_them_out(backend_client, name, method, hosted, transport):
    client, algorithm = backend_client, METHODS[method]
    options: Any = {"hosted": hosted, "weight_decay": 0.1 if hosted else 0.0, "clipping": optserve.Clipping(norm=2.0)}
    client.create_optimizer(name, algorithm, arrays(0, OLD), **options)
    whole = client.create_optimizer(f"{name}-whole", algorithm, arrays(0, OLD, NEW), groups=GROUPS, **options)
    opt = client.optimizer(name, transport=transport)
    reply: Any = "parameters" if hosted else "updates"
    got: dict[str, np.ndarray] = {}
    for step in range(3):
        got = opt.step(arrays(step, OLD), reply=reply)
        assert bits(got) == bits(whole.step(arrays(step, OLD), partial=True, reply=reply))
    opt.add_parameters(arrays(0, NEW), groups=GROUPS)
    assert opt.groups == whole.groups
    assert bits(opt.replay(reply=reply)) == bits(got)
    for step in range(3, 6):
        if step == 4:
            # Gradients where the next step wants them.
            buffers = opt.buffers()
            assert set(buffers) == OLD.keys() | NEW.keys()
            for key, array in arrays(step, OLD, NEW).items():
                buffers[key][...] = array
            got = opt.step(buffers, out=buffers, reply=reply)
        else:
            got = opt.step(arrays(step, OLD, NEW), reply=reply)
        assert bits(got) == bits(whole.step(arrays(step, OLD, NEW), reply=reply))
    with opt.begin_step(["head.b", "w"], reply=reply) as under_way:
        for key in ("head.b", "w"):
            under_way.send(key, arrays(6, OLD, NEW)[key])
    partial = {key: arrays(6, OLD, NEW)[key] for key in ("head.b", "w")}
    assert bits(under_way.updates) == bits(whole.step(partial, partial=True, reply=reply))
    assert state_bits(opt) == state_bits(whole)
    assert opt.transport[0] == transport


def test_methods_with_curvature_take_it_for_the_new_ones_too(backend_client, name):
    client, algorithm = backend_client, optserve.DiagonalHessian()
    opt = client.create_optimizer(name, algorithm, arrays(0, OLD))
    whole = client.create_optimizer(f"{name}-whole", algorithm, arrays(0, OLD, NEW))
    h = {name: np.abs(array) for name, array in arrays(9, OLD, NEW).items()}
    for step in range(4):
        if step == 2:
            opt.add_parameters(arrays(0, NEW))
        models = (OLD, NEW) if step >= 2 else (OLD,)
        grads = arrays(step, *models)
        curvature = {name: h[name] for name in grads}
        got = opt.step(grads, curvature=curvature)
        assert bits(got) == bits(whole.step(grads, curvature=curvature, partial=True))


def test_another_object_goes_on_with_its_own_until_it_is_refreshed(client, name):
    opt = client.create_optimizer(name, optserve.Momentum(learning_rate=1.0), arrays(0, OLD), hosted=True)
    whole = client.create_optimizer(f"{name}-b", optserve.Momentum(learning_rate=1.0), arrays(0, OLD, NEW), hosted=True)
    other = client.optimizer(name)
    other.step(arrays(0, OLD))
    whole.step(arrays(0, OLD), partial=True)
    opt.refresh()
    opt.add_parameters(arrays(0, NEW))
    # On the stream that is open, and on another one.
    for step in (1, 2):
        assert bits(other.step(arrays(step, OLD))) == bits(whole.step(arrays(step, OLD), partial=True))
        assert bits(other.replay()) == bits(whole.replay())
        assert set(other.pull_parameters().arrays) == OLD.keys()
        assert set(other.statistics().parameters) == OLD.keys()
        other.close()
    with pytest.raises(optserve.InvalidArgumentError, match=r"no parameter 'head\.w'"):
        other.step(arrays(3, OLD, NEW))
    assert set(other.export_state().parameters) == OLD.keys() | NEW.keys()
    other.refresh()
    assert bits(other.step(arrays(3, OLD, NEW))) == bits(whole.step(arrays(3, OLD, NEW)))
    assert bits(other.pull_parameters().arrays) == bits(whole.pull_parameters().arrays)
    # The first has the new ones, but not the steps.
    with pytest.raises(optserve.WrongStepError):
        opt.step(arrays(4, OLD, NEW))


def test_several_additions_by_several_objects_end_up_behind_one_another(client, name):
    one = client.create_optimizer(name, optserve.Sgd(learning_rate=1.0), {"a": np.ones(2)})
    two = client.optimizer(name)
    one.add_parameters({"b": np.ones(3)})
    two.add_parameters({"c": np.ones(1)})
    assert list(two.export_state().parameters) == ["a", "b", "c"]
    assert set(two.step({"a": np.ones(2), "b": np.ones(3), "c": np.ones(1)})) == {"a", "b", "c"}
    one.add_parameters({"d": optserve.TensorSpec((2, 2), "float32")})
    one.refresh()
    assert set(one.step({key: np.ones(shape, dtype) for key, shape, dtype in (
        ("a", 2, "f8"), ("b", 3, "f8"), ("c", 1, "f8"), ("d", (2, 2), "f4"))})) == {"a", "b", "c", "d"}  # fmt: skip


@pytest.mark.parametrize("direction", ["up", "down"])
def test_they_are_added_once_however_the_connection_breaks(server, client, name, direction):
    x = {"w": np.random.default_rng(0).standard_normal(100_000)}
    with proxy(server.target) as wire, optserve.connect(wire.target, FAST) as shaky:
        opt = shaky.create_optimizer(name, optserve.Momentum(learning_rate=1.0), {"a": np.ones(2)}, hosted=True)
        opt.step({"a": np.ones(2)})
        total = 0
        rng = np.random.default_rng(7)
        while wire.cuts < 6:
            # Anywhere: before, within and after x, and within the answer.
            wire.cut_after(direction, int(rng.integers(0, 1_000_000 if direction == "up" else 1500)))
            opt.add_parameters({f"w{total}": x["w"] + total})
            total += 1
        pulled = client.optimizer(name).pull_parameters().arrays
        assert list(pulled) == ["a", *(f"w{number}" for number in range(total))]
        assert all(np.array_equal(pulled[f"w{number}"], x["w"] + number) for number in range(total))
        assert opt.step({key: np.ones_like(array) for key, array in pulled.items()})["a"][0] == -1.9


def test_an_answer_that_comes_too_late_leaves_refresh_to_find_out(server, client, name):
    with proxy(server.target) as wire, optserve.connect(wire.target, FAST) as shaky:
        opt = shaky.create_optimizer(name, optserve.Sgd(learning_rate=1.0), {"a": np.ones(2)})
        opt.step({"a": np.ones(2)})
        for made in (False, True):
            wire.stall()
            if made:
                client.optimizer(name).add_parameters({"b": np.ones(3)})
            with pytest.raises(optserve.DeadlineExceededError):
                opt.add_parameters({"b": np.ones(3)}, timeout_s=0.5)
            wire.flow()
            opt.refresh()
            assert set(opt.statistics().parameters) == ({"a", "b"} if made else {"a"})
        opt.step({"a": np.ones(2), "b": np.ones(3)})


CASES: dict[str, tuple[Any, dict[str, Any], str]] = {
    "no parameter": ({}, {}, "at least one"),
    "no mapping": ([np.ones(2)], {}, "params"),
    "no array": ({"c": 1.0}, {}, "no shape and dtype"),
    "another dtype": ({"c": np.ones(2, np.int64)}, {}, "float32 or float64"),
    "a name that is taken": ({"a": np.ones(2)}, {}, "has a parameter 'a' already"),
    "no values": ({"c": optserve.TensorSpec((2,), "float32")}, {}, "with their values"),
    "values of some": ({"c": np.ones(2), "d": optserve.TensorSpec((2,), "float32")}, {}, "no values"),
    "NaN": ({"c": np.array([1.0, np.nan])}, {}, "flat index 1"),
    "a group of an old one": ({"c": np.ones(2)}, {"groups": [optserve.Group(["a"], {})]}, "'a' is not new"),
    "a group of another method": (
        {"c": np.ones(2)}, {"groups": [optserve.Group(["c"], {"rho": 0.5})]}, "rho",
    ),
    "a group that is none": ({"c": np.ones(2)}, {"groups": optserve.Group(["c"], {})}, "sequence"),
    "a rate out of range": (
        {"c": np.ones(2)}, {"groups": [optserve.Group(["c"], {"learning_rate": -1.0})]}, "learning_rate",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("params", "options", "message"), CASES.values(), ids=list(CASES))
def test_a_wrong_argument_is_said_and_changes_nothing(client, name, params, options, message):
    opt = client.create_optimizer(name, optserve.Sgd(), {"a": np.ones(2)}, hosted=True)
    with pytest.raises(optserve.InvalidArgumentError, match=message):
        opt.add_parameters(params, **options)
    assert set(opt.step({"a": np.ones(2)})) == {"a"}
    assert list(client.optimizer(name).export_state().parameters) == ["a"]


def test_a_replaced_state_is_said(client, name):
    opt = client.create_optimizer(name, optserve.Sgd(), {"a": np.ones(2)})
    other = client.optimizer(name)
    other.import_state(other.export_state())
    with pytest.raises(optserve.StateReplacedError):
        opt.add_parameters({"b": np.ones(2)})
    opt.refresh()
    opt.add_parameters({"b": np.ones(2)})


def test_an_older_server_is_said_to_be_too_old(client, name, monkeypatch):
    opt = client.create_optimizer(name, optserve.Sgd(), {"a": np.ones(2)})
    answer = client.server_info()
    for item in answer.features:
        item.available = item.feature != service_pb2.FEATURE_ADDED_PARAMETERS
    monkeypatch.setattr(opt._connection.stub, "GetServerInfo", lambda *_arguments, **_options: answer)
    with pytest.raises(optserve.FeatureUnavailableError, match="too old"):
        opt.add_parameters({"b": np.ones(2)})


def test_a_checkpoint_from_before_is_refused_and_one_from_after_restores_everywhere(tmp_path):
    with optserve.local_server(tmp_path) as server, optserve.connect(server.target) as client:
        opt = client.create_optimizer("a", optserve.Adam(), arrays(0, OLD), hosted=True)
        opt.step(arrays(0, OLD))
        opt.save_checkpoint("before")
        opt.add_parameters(arrays(0, NEW), groups=GROUPS)
        opt.step(arrays(1, OLD, NEW))
        opt.save_checkpoint("after")
        saved = state_bits(opt)
        opt.step(arrays(2, OLD, NEW))
        with pytest.raises(optserve.FailedPreconditionError, match="is of 3 parameters, not of 6") as error:
            opt.restore_checkpoint("before")
        assert error.value.reason == "CHECKPOINT_MISMATCH"
        opt.restore_checkpoint("after")
        assert state_bits(opt) == saved
        assert opt.groups == GROUPS
        again = client.create_optimizer_from_state("b", opt.export_state())
        assert state_bits(again) == saved
        assert bits(again.step(arrays(3, OLD, NEW))) == bits(opt.step(arrays(3, OLD, NEW)))


def test_threads_may_step_while_one_adds(client, name):
    """Each step is of the parameters that were known when it began, all or none of the new ones."""
    opt = client.create_optimizer(name, optserve.Momentum(learning_rate=1.0), {"p0": np.ones(2)})
    failures: list[BaseException] = []

    def step() -> None:
        try:
            for _ in range(50):
                opt.step({"p0": np.ones(2)}, partial=True)
        except BaseException as error:  # noqa: BLE001 - the test shows it
            failures.append(error)

    threads = [threading.Thread(target=step) for _ in range(3)]
    for thread in threads:
        thread.start()
    for number in range(1, 12):
        opt.add_parameters({f"p{number}": np.ones(2)})
    for thread in threads:
        thread.join(30)
    assert not failures
    assert opt.current_step == 150
    assert set(opt.step({f"p{number}": np.ones(2) for number in range(12)})) == {f"p{number}" for number in range(12)}


def test_the_asyncio_client_adds_them_too(server, name):
    async def run() -> None:
        async with aio.connect(server.target) as client:
            opt = await client.create_optimizer(name, optserve.Sgd(learning_rate=1.0), {"a": np.ones(2)})
            await opt.step({"a": np.ones(2)})
            await opt.add_parameters({"b": np.ones(3)}, groups=[optserve.Group(["b"], {"learning_rate": 0.5})])
            updates = await opt.step({"a": np.ones(2), "b": np.ones(3)})
            assert np.array_equal(updates["b"], np.full(3, -0.5))

    asyncio.run(run())
