"""Hyper-parameters of single steps, and what the server tells of a step."""

import asyncio
import re
from dataclasses import fields
from typing import Any

import grpc
import numpy as np
import pytest

import optserve
import optserve.aio
from client.evil_server import DTYPES, SHAPES, EvilServer
from optserve.algorithms import ALGORITHMS
from optserve.v1 import algorithms_pb2, service_pb2, steps_pb2
from service.wire_client import begin, chunk, commit, create, details, refused, stream

PARAMS = {"w": np.zeros((30, 7), np.float32), "b": np.zeros(9), "v": np.zeros(5, np.float32)}
GROUPS = [optserve.Group(("b",)), optserve.Group(("v",))]
ONE = {"x": np.ones(2)}
SGD = optserve.Sgd(learning_rate=0.5)


def gradients(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(param.shape).astype(param.dtype) for name, param in PARAMS.items()}


def bits(arrays: dict[str, np.ndarray]) -> dict[str, bytes]:
    return {name: array.tobytes() for name, array in arrays.items()}


def slots(opt: optserve.Optimizer) -> list[bytes]:
    state = opt.export_state()
    return [array.tobytes() for held in state.slots.values() for array in held.values()]


def values(algorithm: optserve.Algorithm, factor: float) -> dict[str, object]:
    """All hyper-parameters of a method, the real numbers among them times a factor."""
    own = {item.name: getattr(algorithm, item.name) for item in fields(algorithm)}
    return {name: value * factor if isinstance(value, float) else value for name, value in own.items()}


# --- The same bits as with settings of the optimizer


@pytest.mark.parametrize("transport", ["grpc", "shm"])
@pytest.mark.parametrize("kind", ALGORITHMS.values(), ids=ALGORITHMS)
def test_a_step_has_the_bits_of_a_step_after_an_update(client, name, kind, transport):
    """Each hyper-parameter changes at each step, in three groups, with clipping, and a schedule if there may be one."""
    algorithm = kind()
    scheduled = hasattr(algorithm, "learning_rate")
    options = {
        "groups": GROUPS,
        "clipping": optserve.Clipping(global_norm=3.0),
        "schedule": optserve.Cosine(period_steps=9, warmup_steps=2) if scheduled else None,
        "hosted": True,
        "weight_decay": 0.01,
    }
    client.create_optimizer(name, algorithm, gradients(99), **options)
    client.create_optimizer(f"{name}-updated", algorithm, gradients(99), **options)
    opt, updated = client.optimizer(name, transport=transport), client.optimizer(f"{name}-updated")
    for turn in range(6):
        now = [values(algorithm, 1 - (turn + 5 * place) / 100) for place in range(3)]
        decays = [turn / 100, 0.0, 0.02]
        updated.update(
            weight_decay=decays[0],
            groups=[optserve.Group(("b",), now[1], decays[1]), optserve.Group(("v",), now[2], decays[2])],
            **now[0],
        )
        given = gradients(turn)
        curvature = {key: array + 2 for key, array in gradients(turn + 50).items()} if opt.takes_curvature else None
        made = opt.step(
            given, curvature=curvature, reply="parameters" if turn % 2 else "updates",
            hyperparameters=[held | {"weight_decay": decay} for held, decay in zip(now, decays, strict=True)],
        )  # fmt: skip
        expected = updated.step(given, curvature=curvature, reply="parameters" if turn % 2 else "updates")
        assert bits(made) == bits(expected)
        assert opt.last_result == updated.last_result
    assert bits(opt.pull_parameters().arrays) == bits(updated.pull_parameters().arrays)
    assert slots(opt) == slots(updated)
    # The optimizer's own settings are as they were.
    assert (opt.algorithm, opt.groups, opt.weight_decay) == (algorithm, tuple(GROUPS), 0.01)


def test_one_mapping_is_for_all_parameters_and_a_sequence_for_one_group_after_the_other(client, name):
    groups = [optserve.Group(("b",), {"learning_rate": 2.0}), optserve.Group(("v",))]
    opt = client.create_optimizer(name, SGD, PARAMS, groups=groups)
    ones = {key: np.ones_like(array) for key, array in PARAMS.items()}

    def rates(hyperparameters) -> list[float]:
        made = opt.step(ones, hyperparameters=hyperparameters)
        used = [-float(made[key].flat[0]) for key in ("w", "b", "v")]
        assert opt.last_result.learning_rates == tuple(used)
        return used

    assert rates(None) == [0.5, 2.0, 0.5]
    assert rates({}) == [0.5, 2.0, 0.5]
    assert rates({"learning_rate": 0.25}) == [0.25, 0.25, 0.25]
    assert rates([None, {"learning_rate": 4.0}, {}]) == [0.5, 4.0, 0.5]
    assert rates([{"learning_rate": 0.125}, None, {"learning_rate": 0.0}]) == [0.125, 2.0, 0.0]
    # Of that step only.
    assert rates(None) == [0.5, 2.0, 0.5]


def test_the_schedule_multiplies_the_rate_of_a_step_too(client, name):
    opt = client.create_optimizer(name, SGD, ONE, schedule=optserve.Exponential(rate=0.5))
    for turn, rate in enumerate((1.0, 3.0, 8.0)):
        made = opt.step(ONE, hyperparameters={"learning_rate": rate})
        assert opt.last_result.learning_rates == (rate * 0.5**turn,)
        assert made["x"].tolist() == [-rate * 0.5**turn] * 2


def test_staleness_divides_the_rate_of_a_step_too(client, name):
    consistency = optserve.Async(scale_by_staleness=True)
    client.create_optimizer(name, SGD, ONE, hosted=True, consistency=consistency, weight_decay=0.5)
    with client.worker(name, "fast") as fast, client.worker(name, "late") as late:
        late.pull()
        fast.pull()
        for _ in range(2):
            fast.step(ONE)
        x = fast.pull().arrays["x"]
        made = late.step(
            ONE, hyperparameters={"learning_rate": 9.0, "weight_decay": 0.75}, with_gradient_norm=True
        )  # fmt: skip
        assert made["x"].tolist() == (x - 3.0 - 0.25 * x).tolist()
        assert late.last_result == optserve.StepResult(3, (3.0,), 2**0.5, None, 2, replayed=False)


def test_steps_under_way_and_awaited_ones_have_them_too(server, client, name):
    opt = client.create_optimizer(name, SGD, PARAMS)
    ones = {key: np.ones_like(array) for key, array in PARAMS.items()}
    with opt.begin_step(hyperparameters={"learning_rate": 2.0}, with_gradient_norm=True) as step:
        for key, array in ones.items():
            step.send(key, array)
    assert step.updates["b"].tolist() == [-2.0] * 9
    size = sum(array.size for array in ones.values())
    expected = optserve.StepResult(1, (2.0,), size**0.5)
    assert (opt.last_result, opt.gradient_norm) == (expected, size**0.5)

    async def run() -> None:
        async with optserve.aio.connect(server.target) as other:
            aopt = await other.optimizer(name)
            assert aopt.last_result is None
            made = await aopt.step(ones, hyperparameters={"learning_rate": 3.0}, with_gradient_norm=True)
            assert made["v"].tolist() == [-3.0] * 5
            assert aopt.last_result == optserve.StepResult(2, (3.0,), size**0.5)
            async with aopt.begin_step(hyperparameters=[{"learning_rate": 4.0}]) as under_way:
                for key, array in ones.items():
                    under_way.send(key, array)
            assert under_way.updates["v"].tolist() == [-4.0] * 5
            assert aopt.last_result == optserve.StepResult(3, (4.0,))
            await other.create_optimizer(
                f"{name}-shared", SGD, ONE, hosted=True, consistency=optserve.Bounded(1)
            )  # fmt: skip
            async with await other.worker(f"{name}-shared") as worker:
                await worker.pull()
                x = await worker.step(ONE, hyperparameters={"learning_rate": 1.0})
                assert x["x"].tolist() == [0.0, 0.0]
                assert worker.last_result == optserve.StepResult(1, (1.0,))

    asyncio.run(run())


def test_statistics_are_of_the_step_with_its_own_rate_also_after_a_restart(tmp_path):
    for turn in range(2):
        with optserve.local_server(tmp_path) as server, optserve.connect(server.target) as client:
            if turn == 0:
                opt = client.create_optimizer("a", SGD, ONE)
                opt.step(ONE, hyperparameters={"learning_rate": 2.0})
                server.process.kill()
                server.process.wait()
                continue
            looked = client.optimizer("a").statistics(["x"], quantiles=[0.0, 1.0])
            assert set(looked.parameters["x"].rates.values()) == {2.0}


# --- What the server tells


@pytest.mark.parametrize(
    ("clipping", "norm", "clipped"),
    [
        (None, None, None),
        (optserve.Clipping(value=4.0), None, False),
        (optserve.Clipping(value=3.5), None, True),
        (optserve.Clipping(norm=5.0), 5.0, False),
        (optserve.Clipping(norm=4.5), 5.0, True),
        (optserve.Clipping(global_norm=6.0), 5.0, False),
        (optserve.Clipping(global_norm=0.1), 5.0, True),
    ],
)
@pytest.mark.parametrize("transport", ["grpc", "shm"])
def test_a_result_says_what_clipping_did(client, name, clipping, norm, clipped, transport):
    client.create_optimizer(name, SGD, ONE, clipping=clipping)
    opt = client.optimizer(name, transport=transport)
    assert opt.last_result is None
    plain = opt.step({"x": np.array([3.0, -4.0])})
    assert opt.last_result == optserve.StepResult(1, (0.5,), norm, clipped)
    assert opt.gradient_norm == norm
    asked = opt.step({"x": np.array([3.0, -4.0])}, with_gradient_norm=True)
    assert opt.last_result == optserve.StepResult(2, (0.5,), 5.0, clipped)
    assert bits(asked) == bits(plain)
    opt.step({"x": np.array([3.0, -4.0])})
    assert opt.last_result == optserve.StepResult(3, (0.5,), norm, clipped)


def test_a_bound_that_is_reached_and_not_passed_clips_nothing_in_float32(client, name):
    opt = client.create_optimizer(name, SGD, {"x": np.zeros(1, np.float32)}, clipping=optserve.Clipping(value=0.1))
    opt.step({"x": np.array([0.1], np.float32)})
    assert opt.last_result.clipped is False
    opt.step({"x": np.nextafter(np.array([0.1], np.float32), np.float32(1))})
    assert opt.last_result.clipped is True


def test_the_mean_of_workers_gradients_is_what_is_clipped(client, name):
    client.create_optimizer(
        name, SGD, ONE, hosted=True, consistency=optserve.Sync(1), clipping=optserve.Clipping(value=2.0)
    )  # fmt: skip
    with client.worker(name) as worker:
        worker.pull()
        worker.step({"x": np.array([2.0, 1.0])}, with_gradient_norm=True)
        # The magnitudes of a mean are known by a bound only, which is a little larger.
        assert worker.last_result == optserve.StepResult(1, (0.5,), 5**0.5, False)
        worker.step({"x": np.array([2.001, 1.0])})
        assert worker.last_result.clipped is True


def test_a_method_without_a_learning_rate_tells_none(client, name):
    opt = client.create_optimizer(name, optserve.Vsgd(), ONE)
    opt.step(ONE, curvature=ONE, hyperparameters={"eps": 0.5})
    assert opt.last_result == optserve.StepResult(1, ())
    with pytest.raises(optserve.InvalidArgumentError, match=r"vsgd has no 'learning_rate'"):
        opt.step(ONE, curvature=ONE, hyperparameters={"learning_rate": 1.0})


def test_of_very_many_groups_no_rates_are_told(client, name):
    for count, told in ((256, 257), (257, 0)):
        params = {f"p{i}": np.zeros(1) for i in range(count)}
        groups = [optserve.Group((key,), {"learning_rate": float(i)}) for i, key in enumerate(params)]
        opt = client.create_optimizer(f"{name}-{count}", SGD, params, groups=groups)
        opt.step(params)
        assert len(opt.last_result.learning_rates) == told
        assert opt.last_result.learning_rates == ((0.5, *map(float, range(count))) if told else ())


def test_a_replay_tells_the_same(client, name):
    opt = client.create_optimizer(name, SGD, ONE, clipping=optserve.Clipping(value=0.5))
    opt.step(ONE, hyperparameters={"learning_rate": 2.0}, with_gradient_norm=True)
    first = opt.last_result
    opt.replay()
    assert opt.last_result == optserve.StepResult(1, (2.0,), 2**0.5, True, replayed=True)
    assert first == optserve.StepResult(1, (2.0,), 2**0.5, True)


def test_a_retry_by_unary_call_tells_the_same(stub, client, name):
    """It has the settings once more, and the server ignores them."""
    client.create_optimizer(name, SGD, ONE, clipping=optserve.Clipping(value=0.5))
    request = steps_pb2.ApplyGradientsRequest(
        name=f"optimizers/{name}", request_id="retried", with_gradient_norm=True,
        gradients=[steps_pb2.Tensor(name="x", data=ONE["x"].tobytes())],
        settings=[steps_pb2.StepSettings(algorithm={"sgd": algorithms_pb2.Sgd(learning_rate=3.0)})],
    )  # fmt: skip
    made, again = stub.ApplyGradients(request), stub.ApplyGradients(request)
    assert list(made.result.learning_rates) == [3.0]
    again.result.replayed = False
    assert again == made


def test_a_retry_of_a_worker_tells_the_same(client, stub, name):
    client.create_optimizer(name, SGD, ONE, hosted=True, consistency=optserve.Async())
    with client.worker(name, "alice") as worker:
        x = worker.pull().arrays
        worker.step(x, hyperparameters={"learning_rate": 2.0}, with_gradient_norm=True)
        told = worker.last_result
        with stream(stub, f"optimizers/{name}", worker="alice", life=worker._life) as again:
            opened = stub.GetOptimizer(service_pb2.GetOptimizerRequest(name=f"optimizers/{name}")).optimizer
            again.send(begin(worker._session.life._last_request_id, reply=steps_pb2.REPLY_PARAMETERS), commit())
            _, result = again.reply()
    assert opened.step == result.step == told.step
    assert result.replayed
    assert (tuple(result.learning_rates), result.gradient_norm) == (told.learning_rates, told.gradient_norm)


def test_after_a_restart_a_replay_tells_nothing_of_it(tmp_path):
    with optserve.local_server(tmp_path) as server, optserve.connect(server.target) as client:
        opt = client.create_optimizer("a", SGD, ONE)
        made = opt.step(ONE, hyperparameters={"learning_rate": 2.0}, with_gradient_norm=True)
    with optserve.local_server(tmp_path) as server, optserve.connect(server.target) as client:
        opt = client.optimizer("a")
        assert bits(opt.replay()) == bits(made)
        assert opt.last_result == optserve.StepResult(1, replayed=True)
        opt.step(ONE)
        assert opt.last_result == optserve.StepResult(2, (0.5,))


# --- What is refused


REFUSED = [
    ([{"learning_rate": -1.0}, None], "0].algorithm.sgd.learning_rate", "-1.0, .*parameters in no group"),
    ([None, {"learning_rate": np.inf}], "0].algorithm.sgd.learning_rate", "inf, .*this step's settings of group 1"),
    ([{"learning_rate": 1.0}, {"learning_rate": 1e39}], "1].algorithm.sgd.learning_rate", "inf in float32"),
    ({"learning_rate": np.nan}, "0].algorithm.sgd.learning_rate", "nan, .*in the settings of this step"),
    ({"weight_decay": 1.0}, "0].weight_decay", r"1\.0, but must lie in \[0, 1\)"),
    ([None, {"weight_decay": -0.5}], "0].weight_decay", "-0.5, but .*group 1"),
    ({"weight_decay": 0.5}, "0].weight_decay", "in delta mode"),
]


@pytest.mark.parametrize(("hyperparameters", "field", "message"), REFUSED)
@pytest.mark.parametrize("transport", ["grpc", "shm"])
def test_a_value_out_of_range_is_refused_and_nothing_changes(client, name, hyperparameters, field, message, transport):
    params = {"w": np.zeros(2), "b": np.zeros(2, np.float32)}
    ones = {key: np.ones_like(array) for key, array in params.items()}
    client.create_optimizer(name, SGD, params, groups=[optserve.Group(("b",))])
    opt = client.optimizer(name, transport=transport)
    with pytest.raises(optserve.InvalidArgumentError, match=message) as seen:
        opt.step(ones, hyperparameters=hyperparameters)
    assert seen.value.field == f"begin.settings[{field}"
    assert opt.last_result is None
    assert opt.step(ones)["w"].tolist() == [-0.5, -0.5]
    assert opt.current_step == 1


@pytest.mark.parametrize(
    ("hyperparameters", "message"),
    [
        ({"beta1": 0.5}, "sgd has no 'beta1'; it has learning_rate"),
        ([None], "1 entries; it needs 2"),
        ([{}, {}, {}], "3 entries; it needs 2"),
        ("learning_rate", "must be a mapping"),
        (0.5, "must be a mapping"),
        ([0.5, None], "is a mapping or None, not 0.5"),
        ({"learning_rate": "high"}, "cannot be 'high'"),
        ({"weight_decay": "high"}, "cannot be 'high'"),
    ],
)
def test_what_cannot_be_sent_is_refused_by_the_client(client, name, hyperparameters, message):
    opt = client.create_optimizer(name, SGD, {"w": np.ones(1), "b": np.ones(1)}, groups=[optserve.Group(("b",))])
    with pytest.raises(optserve.InvalidArgumentError, match=message):
        opt.step({"w": np.ones(1), "b": np.ones(1)}, hyperparameters=hyperparameters)
    with pytest.raises(optserve.InvalidArgumentError, match=message), opt.begin_step(hyperparameters=hyperparameters):
        pass
    assert opt.step({"w": np.ones(1), "b": np.ones(1)})["w"].tolist() == [-0.5]


def test_a_rule_that_needs_two_values_to_fit_needs_it_for_a_step_too(client, name):
    opt = client.create_optimizer(name, optserve.SgdMomentum(nesterov=True), ONE)
    with pytest.raises(optserve.InvalidArgumentError, match="needs a positive momentum"):
        opt.step(ONE, hyperparameters={"momentum": 0.0})
    opt.step(ONE, hyperparameters={"momentum": 0.0, "nesterov": False})


def sgd(rate: float) -> algorithms_pb2.Algorithm:
    return algorithms_pb2.Algorithm(sgd=algorithms_pb2.Sgd(learning_rate=rate))


@pytest.mark.parametrize(
    ("settings", "field", "message"),
    [
        ([{"group": 1, "algorithm": sgd(1)}], "settings[0].group", "no group 1; the optimizer has 0"),
        ([{"group": 0}, {"group": 0}], "settings[1].group", "Group 0 has settings twice"),
        ([{"group": 0}, {"algorithm": sgd(1)}], "settings[1].group", "no others beside them"),
        ([{"algorithm": {"momentum": {}}}], "settings[0].algorithm", "method of a step is that of the optimizer, sgd"),
        ([{}, {}, {}, {}], "settings", "has 4 settings; .* at most 2"),
    ],
)
def test_the_server_itself_refuses_what_this_client_does_not_send(stub, name, settings, field, message):
    made = create(stub, name, {"x": (2,)})
    made.algorithm.CopyFrom(sgd(1))
    stub.DeleteOptimizer(service_pb2.DeleteOptimizerRequest(name=made.name))
    request = service_pb2.CreateOptimizerRequest(optimizer_id=name, optimizer=made)
    stub.CreateOptimizer(request)
    given = [steps_pb2.StepSettings(**setting) for setting in settings]
    data = np.ones(2, np.float32).tobytes()
    with stream(stub, made.name) as opened:
        opened.send(begin(settings=given), chunk(0, 0, data), commit())
        status = opened.error()
        assert details(status)[0] == "INVALID_FIELD"
        assert details(status)[2] == f"begin.{field}"
        assert re.search(message, status.message)
        # A second one of the stream is applied.
        opened.send(begin(), chunk(0, 0, data), commit())
        assert opened.reply()[1].step == 1


def test_workers_that_make_a_step_together_have_no_settings_of_one_of_them(client, name):
    client.create_optimizer(name, SGD, ONE, hosted=True, consistency=optserve.Sync(1))
    with client.worker(name) as worker:
        worker.pull()
        with pytest.raises(optserve.InvalidArgumentError, match="several workers make a step together") as seen:
            worker.step(ONE, hyperparameters={"learning_rate": 1.0})
        assert seen.value.field == "begin.settings"
        assert worker.step(ONE)["x"].tolist() == [0.5, 0.5]


def test_groups_that_another_client_has_changed_are_known_after_a_refresh(server, client, name):
    opt = client.create_optimizer(name, SGD, {"w": np.ones(1), "b": np.ones(1)})
    ones = {"w": np.ones(1), "b": np.ones(1)}
    with optserve.connect(server.target) as other:
        other.optimizer(name).update(groups=[optserve.Group(("b",))])
    with pytest.raises(optserve.InvalidArgumentError, match=r"call refresh\(\)"):
        opt.step(ones, hyperparameters=[None, {"learning_rate": 2.0}])
    opt.refresh()
    assert opt.step(ones, hyperparameters=[None, {"learning_rate": 2.0}])["b"].tolist() == [-2.0]
    opt.update(groups=[])
    assert opt.step(ones, hyperparameters=[{"learning_rate": 4.0}])["b"].tolist() == [-4.0]


def test_an_update_between_begin_and_commit_is_seen_by_the_commit(stub, client, name):
    params = {"w": np.zeros(2, np.float32), "b": np.zeros(2, np.float32)}
    opt = client.create_optimizer(name, SGD, params, groups=[optserve.Group(("b",))])
    data = np.ones(4, np.float32).tobytes()
    settings = [steps_pb2.StepSettings(group=1, algorithm=sgd(2.0))]
    with stream(stub, f"optimizers/{name}") as opened:
        opened.send(begin("first", settings=settings), chunk(0, 0, data))
        client.optimizer(name).update(groups=[])
        opened.send(commit())
        status = opened.error()
        assert details(status)[2] == "begin.settings[0].group"
    assert opt.step(params)["w"].tolist() == [0.0, 0.0]
    assert opt.current_step == 1


def send_one_by_one(opt: optserve.Optimizer, given: dict[str, np.ndarray], **options) -> None:
    with opt.begin_step(**options) as step:
        for key, array in given.items():
            step.send(key, array)


def test_an_older_server_is_not_sent_what_it_would_ignore():
    """This one has no `step_settings` in `opened`."""
    given = {key: np.ones(shape, DTYPES[key]) for key, shape in SHAPES.items()}
    server = EvilServer()
    try:
        with optserve.connect(server.target) as client:
            opt = client.optimizer("m")
            options: dict[str, Any]
            for options in ({"hyperparameters": {"learning_rate": 1.0}}, {"with_gradient_norm": True}):
                with pytest.raises(optserve.FeatureUnavailableError, match=r"Nothing was sent.*update\(\)"):
                    opt.step(given, **options)
                with pytest.raises(optserve.FeatureUnavailableError, match="FEATURE_STEP_SETTINGS"):
                    send_one_by_one(opt, given, **options)
            assert server.step == 0
            opt.step(given)
            assert (server.step, opt.last_result) == (1, optserve.StepResult(1))
    finally:
        server.close()


def test_the_feature_is_listed(client):
    available = [item.feature for item in client.server_info().features if item.available]
    assert service_pb2.FEATURE_STEP_SETTINGS in available


# --- Groups are named by their positions

ZERO = {key: np.zeros(2) for key in ("a", "b", "c")}
TWO = [optserve.Group(("a",), {"learning_rate": 1.0}), optserve.Group(("b",))]
RATES = [{"learning_rate": 1.0}, {"learning_rate": 2.0}, {"learning_rate": 4.0}]


@pytest.fixture
def pair(client, name):
    """Two objects of one optimizer with groups, of one client."""
    return client.create_optimizer(name, SGD, ZERO, groups=TWO), client.optimizer(name)


@pytest.mark.parametrize("transport", ["grpc", "shm"])
def test_settings_for_groups_that_another_client_has_reordered_are_refused(server, client, name, transport):
    client.create_optimizer(name, SGD, ZERO, groups=TWO)
    opt, other = client.optimizer(name, transport=transport), client.optimizer(name)
    ones = {key: np.ones(2) for key in ZERO}
    opt.step(ones, hyperparameters=RATES)
    other.update(groups=TWO[::-1])
    for call in range(2):
        with pytest.raises(optserve.EtagMismatchError, match=r"changed the groups of .*call refresh\(\)") as error:
            opt.step(ones, hyperparameters=RATES)
        assert (opt.current_step, error.value.reason) == (1, "ETAG_MISMATCH"), call
    # Without settings, and with some for all parameters, it does not matter which groups there are.
    opt.step(ones)
    opt.step(ones, hyperparameters={"learning_rate": 1.0})
    opt.refresh()
    updates = opt.step(ones, hyperparameters=RATES)
    assert [updates[key][0] for key in ZERO] == [-4.0, -2.0, -1.0]


def test_other_changes_of_another_client_disturb_no_step(pair):
    opt, other = pair
    ones = {key: np.ones(2) for key in ZERO}
    for update in ({"clipping": optserve.Clipping(value=0.5)}, {"learning_rate": 9.0}, {"groups": TWO}):
        other.update(**update)
        updates = opt.step(ones, hyperparameters=RATES)
        assert [updates[key][0] for key in ZERO] == [-1.0, -2.0, -0.5]
    other.add_parameters({"d": np.ones(1)})
    opt.step(ones, hyperparameters=RATES)


def test_one_that_is_under_way_is_refused_too_and_the_next_one_knows_what_it_was(pair):
    opt, other = pair
    other.update(groups=TWO[:1])

    def make() -> None:
        with opt.begin_step(hyperparameters=RATES) as step:
            for key in ZERO:
                step.send(key, np.ones(2))

    with pytest.raises(optserve.EtagMismatchError, match="send the step's settings for its present groups"):
        make()
    opt.refresh()
    with pytest.raises(optserve.InvalidArgumentError, match="it needs 2"):
        make()


def test_the_server_compares_an_etag_at_begin_and_at_commit_and_not_in_a_replay(stub, client, name):
    opt = client.create_optimizer(name, SGD, ONE, groups=[optserve.Group(("x",))])
    name = f"optimizers/{name}"

    def etag() -> str:
        return stub.GetOptimizer(service_pb2.GetOptimizerRequest(name=name)).optimizer.etag

    known = etag()
    settings = [steps_pb2.StepSettings(group=1)]
    with stream(stub, name) as opened:
        opened.send(begin("one", settings=settings, etag=known), chunk(0, 0, ONE["x"].tobytes()), commit())
        opened.reply()
        opt.update(learning_rate=0.25)
        opened.send(begin("two", settings=settings, etag=known))
        reason, metadata, field, _ = details(opened.error())
        assert (reason, metadata["etag"], field) == ("ETAG_MISMATCH", etag(), "begin.etag")
        opened.send(commit(), begin("one", settings=settings, etag=known), commit())
        assert opened.reply()[1].replayed
        opened.send(begin("two", settings=settings, etag=etag()), chunk(0, 0, ONE["x"].tobytes()))
        other = steps_pb2.ApplyGradientsRequest(
            name=name,
            request_id="other",
            gradients=[steps_pb2.Tensor(name="x", data=ONE["x"].tobytes())],
            etag="of no state",
        )
        refusal = ""
        # Until the step is under way, which is said before the etag.
        while "in the middle of a step" not in refusal:
            with pytest.raises(grpc.RpcError, match=r"in the middle of a step|has changed since etag") as refused_call:
                stub.ApplyGradients(other)
            refusal = str(refused_call.value)
        opt.update(learning_rate=0.125)
        opened.send(commit())
        reason, metadata, field, _ = details(opened.error())
        assert (reason, metadata["etag"], field) == ("ETAG_MISMATCH", etag(), "begin.etag")
    request = steps_pb2.ApplyGradientsRequest(
        name=name, request_id="two", gradients=[steps_pb2.Tensor(name="x", data=ONE["x"].tobytes())], etag=known
    )
    with refused(grpc.StatusCode.ABORTED, "ETAG_MISMATCH", "etag"):
        stub.ApplyGradients(request)
    request.etag = etag()
    assert stub.ApplyGradients(request).result.step == 2
