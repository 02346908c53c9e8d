"""Optimizers by name: listed as values, found or made."""

import asyncio
import copy

import grpc
import numpy as np
import pytest

import optserve
import optserve.aio
from optserve.v1 import optimizer_pb2
from optserve_server.app import App
from optserve_server.domain.config import ServerConfig

PARAMS = {"w": np.ones((3, 2)), "b": np.ones(2)}
OPTIONS = {
    "schedule": optserve.Cosine(period_steps=9),
    "clipping": optserve.Clipping(global_norm=2.0),
    "groups": [optserve.Group(["b"], {"learning_rate": 0.5}, weight_decay=0.25)],
    "hosted": True,
    "weight_decay": 0.125,
    "consistency": optserve.Bounded(3),
}


def info(client, name) -> optserve.OptimizerInfo:
    (found,) = [item for item in client.list_optimizers() if item.name == name]
    return found


def test_a_list_says_what_is_set(client, name):
    client.create_optimizer(name, optserve.Adagrad(learning_rate=0.25), PARAMS, **OPTIONS)
    found = info(client, name)
    assert found.algorithm == optserve.Adagrad(learning_rate=0.25)
    assert {key: getattr(found, key) for key in OPTIONS} == {**OPTIONS, "groups": tuple(OPTIONS["groups"])}
    assert (found.step, found.memory_bytes) == (0, 3 * 64)
    assert repr(found) == f"OptimizerInfo(name={name!r}, hosted=True, step=0, memory_bytes=192)"
    assert found == info(client, name) == copy.copy(found)


def test_what_was_read_of_the_message_can_be_read_still(client, name):
    client.create_optimizer(name, optserve.Sgd(), PARAMS)
    found = info(client, name)
    assert found.mode == optimizer_pb2.MODE_DELTA
    assert found.create_time.ToDatetime().year > 2000
    assert (found.backend, list(found.slots)) == (found.message.backend, [])
    assert found.name.removeprefix("optimizers/") == name
    with pytest.raises(AttributeError, match="'OptimizerInfo' has no attribute 'colour'"):
        _ = found.colour


@pytest.mark.parametrize("prefix", ["", "optimizers/"])
def test_every_call_takes_the_name_from_the_list(client, name, prefix):
    client.create_optimizer(prefix + name, optserve.Sgd(), PARAMS, hosted=True, consistency=optserve.Async())
    listed = prefix + info(client, name).name
    opt = client.optimizer(listed)
    assert opt.name == name
    with client.worker(listed) as worker:
        worker.pull()
    opt.save_checkpoint("one")
    assert [item.tag for item in client.list_checkpoints(listed)] == ["one"]
    client.delete_checkpoint(listed, "one")
    client.get_or_create_optimizer(listed, optserve.Sgd(), PARAMS, hosted=True, consistency=optserve.Async())
    client.delete_optimizer(listed)
    assert name not in [item.name for item in client.list_optimizers()]


def test_an_optimizer_is_made_once_and_found_from_then_on(client, name):
    made = client.get_or_create_optimizer(name, optserve.Adadelta(rho=0.5), PARAMS, **OPTIONS)
    with client.worker(name) as worker:
        x = worker.pull().arrays
        worker.step(PARAMS, reply="nothing")
    found = client.get_or_create_optimizer(name, optserve.Adadelta(rho=0.5), PARAMS, **OPTIONS)
    made.refresh()
    assert (found.current_step, made.current_step) == (1, 1)
    pulled = found.pull_parameters()
    assert (pulled.step, pulled.arrays["w"].tolist() != x["w"].tolist()) == (1, True), "x was not uploaded again"


@pytest.mark.parametrize(
    ("algorithm", "params", "options", "message"),
    [
        (optserve.Sgd(), PARAMS, {}, "its algorithm is Adadelta"),
        (optserve.Adadelta(rho=0.5), PARAMS, {}, r"its algorithm is Adadelta\(rho=0.95"),
        (optserve.Adadelta(), {"w": PARAMS["w"]}, {}, "it has other parameters"),
        (optserve.Adadelta(), {**PARAMS, "b": np.ones(2, np.float32)}, {}, "it has other parameters"),
        (optserve.Adadelta(), PARAMS, {"hosted": True}, "does not hold its parameters"),
        (optserve.Adadelta(), PARAMS, {"schedule": optserve.Constant()}, "its schedule is None, not Constant"),
        (optserve.Adadelta(), PARAMS, {"groups": [optserve.Group(["b"], {})]}, r"its groups is \(\), not \(Group"),
    ],
)
def test_one_that_differs_is_no_substitute(client, name, algorithm, params, options, message):
    client.create_optimizer(name, optserve.Adadelta(), PARAMS)
    with pytest.raises(optserve.InvalidArgumentError, match=f"An optimizer {name!r} exists already, and .*{message}"):
        client.get_or_create_optimizer(name, algorithm, params, **options)


def test_parameters_that_nobody_has_uploaded_are_uploaded(client, name):
    specs = {key: optserve.TensorSpec(x.shape, x.dtype) for key, x in PARAMS.items()}
    client.get_or_create_optimizer(name, optserve.Sgd(), specs, hosted=True)
    client.get_or_create_optimizer(name, optserve.Sgd(), specs, hosted=True)
    found = client.get_or_create_optimizer(name, optserve.Sgd(), PARAMS, hosted=True)
    assert found.pull_parameters().arrays["w"].tolist() == PARAMS["w"].tolist()


def test_several_programs_that_start_at_once_get_the_same_one(server, name):
    async def run() -> None:
        async with optserve.aio.connect(server.target) as client:
            calls = [
                client.get_or_create_optimizer(name, optserve.Sgd(learning_rate=1.0), PARAMS, hosted=True)
                for _ in range(8)
            ]
            found = await asyncio.gather(*calls)
            await found[0].step(PARAMS)
            assert {opt.name for opt in found} == {name}
            for opt in found:
                assert (await opt.pull_parameters()).step == 1
            twin = await client.create_optimizer_from_state(f"{name}-2", await found[0].export_state())
            await twin.update(learning_rate=0.5)
            assert (await twin.step(PARAMS))["b"].tolist() == [-0.5, -0.5]
            assert name in [item.name for item in await client.list_optimizers()]

    asyncio.run(run())


# --- The norm of the gradient


@pytest.mark.parametrize("transport", ["shm", "grpc"])
def test_the_norm_that_clipping_has_seen_is_told(client, name, transport):
    client.create_optimizer(name, optserve.Sgd(), {"x": np.ones(2)}, clipping=optserve.Clipping(global_norm=1.0))
    opt = client.optimizer(name, transport=transport)
    assert opt.gradient_norm is None
    opt.step({"x": np.array([3.0, 4.0])})
    assert opt.gradient_norm == 5.0
    opt.update(clipping=optserve.Clipping(value=1.0))
    opt.step({"x": np.array([3.0, 4.0])})
    assert opt.gradient_norm is None


def test_workers_are_told_it_too(server, client, name):
    client.create_optimizer(
        name, optserve.Sgd(), {"x": np.ones(2)}, clipping=optserve.Clipping(norm=1.0), hosted=True,
        consistency=optserve.Async(),
    )  # fmt: skip
    with client.worker(name) as worker:
        worker.pull()
        worker.step({"x": np.array([3.0, 4.0])})
        assert worker.gradient_norm == 5.0

    async def run() -> None:
        async with optserve.aio.connect(server.target) as other, await other.worker(name) as worker:
            await worker.pull()
            await worker.step({"x": np.array([6.0, 8.0])})
            assert worker.gradient_norm == 10.0

    asyncio.run(run())


class Making(grpc.ServerInterceptor):
    """Somebody else is making each optimizer, and never comes to an end."""

    def intercept_service(self, continuation, handler_call_details):
        if handler_call_details.method.endswith("/CreateOptimizer"):
            return grpc.unary_unary_rpc_method_handler(
                lambda _request, context: context.abort(grpc.StatusCode.ALREADY_EXISTS, "somebody is making it")
            )
        return continuation(handler_call_details)


def test_who_waits_in_vain_for_anothers_creation_is_told_so_and_not_that_no_server_was_reached(name):
    app = App(ServerConfig(port=0, backend="numpy"), interceptors=[Making()])
    app.start()
    try:
        with (
            optserve.connect(app.target, optserve.ClientConfig(timeout_s=1.0)) as client,
            pytest.raises(optserve.DeadlineExceededError, match="Another client is creating or deleting") as late,
        ):
            client.get_or_create_optimizer(name, optserve.Sgd(), PARAMS)
    finally:
        app.stop()
    assert not isinstance(late.value, optserve.UnreachableError)
