"""The asyncio client: the same calls, awaited."""

import asyncio
import inspect
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import wait
from dataclasses import replace
from typing import get_type_hints

import numpy as np
import pytest

import optserve
import optserve.aio


def run(coroutine):
    return asyncio.run(coroutine)


G = {"x": np.arange(1, 4, dtype=np.float32)}


def test_steps_give_the_bits_of_the_synchronous_client(server, client, name):
    async def train():
        async with optserve.aio.connect(server.target) as aclient:
            opt = await aclient.create_optimizer(name, optserve.Adadelta(), G)
            updates = [await opt.step(G) for _ in range(3)]
            again = await opt.replay()
            return updates, again, opt.current_step

    updates, again, step = run(train())
    reference = client.create_optimizer(f"{name}-sync", optserve.Adadelta(), G)
    for update in updates:
        assert np.array_equal(update["x"], reference.step(G)["x"])
    assert np.array_equal(again["x"], updates[-1]["x"])
    assert step == 3


def test_several_optimizers_step_at_once_from_one_loop(server, name):
    async def train():
        async with optserve.aio.connect(server.target) as client:
            opts = [await client.create_optimizer(f"{name}-{i}", optserve.Sgd(), G) for i in range(8)]
            await asyncio.gather(*(opt.step(G) for opt in opts for _ in range(1)))
            return [opt.current_step for opt in opts]

    assert run(train()) == [1] * 8


def test_a_client_works_in_one_loop_after_another(server, name):
    for index in range(2):

        async def step(index=index):
            async with optserve.aio.connect(server.target) as client:
                opt = await client.create_optimizer(f"{name}-{index}", optserve.Sgd(), G)
                await opt.step(G)

        run(step())


def test_a_cancelled_step_is_applied_once_or_not_at_all_and_the_next_one_finds_out(server, name):
    """Momentum would show an update that was lost or applied twice."""

    async def train() -> int:
        async with optserve.aio.connect(server.target) as client:
            big = {"x": np.ones(4_000_000, np.float32)}
            opt = await client.create_optimizer(name, optserve.Momentum(learning_rate=1.0, rho=0.5), big)
            total, applied = np.zeros_like(big["x"]), 0
            for turn in range(8):
                task = asyncio.create_task(opt.step(big))
                # Each time in another part of the step.
                await asyncio.sleep(0.004 * turn)
                task.cancel()
                try:
                    total += (await task)["x"]
                    applied += 1
                except asyncio.CancelledError:
                    try:
                        total += (await opt.step(big))["x"]
                    except optserve.StepInDoubtError:
                        total += (await opt.replay())["x"]
                    applied += 1
            assert opt.current_step == applied
            expected, dx = 0.0, 0.0
            for _ in range(applied):
                dx = 0.5 * dx - 1.0
                expected += dx
            assert np.all(total == np.float32(expected))
            return applied

    assert run(train()) == 8


def test_updates_that_arrive_too_late_for_their_caller_are_not_lost(server, name):
    """The step has succeeded in its thread, but the loop was busy, and the task is cancelled before it looks."""

    async def train() -> int:
        async with optserve.aio.connect(server.target) as client:
            opt = await client.create_optimizer(name, optserve.Sgd(), G)
            await opt.step(G)
            task = asyncio.create_task(opt.step(G))
            await asyncio.sleep(0)
            # The loop is busy until then.
            wait(list(opt._threads._under_way))
            assert opt.current_step == 2
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            with pytest.raises(optserve.StepInDoubtError, match="was applied"):
                await opt.step(G)
            assert np.array_equal((await opt.replay())["x"], np.float32(-0.01) * G["x"])
            await opt.step(G)
            return opt.current_step

    assert run(train()) == 3


def test_cancelling_a_step_that_waits_for_its_turn_leaves_the_other_alone(server, name):
    async def train() -> int:
        async with optserve.aio.connect(server.target) as client:
            big = {"x": np.ones(4_000_000, np.float32)}
            opt = await client.create_optimizer(name, optserve.Sgd(), big)
            first = asyncio.create_task(opt.step(big))
            second = asyncio.create_task(opt.step(big))
            # Both begin: the first in its thread, so that the second waits.
            await asyncio.sleep(0)
            second.cancel()
            with pytest.raises(asyncio.CancelledError):
                await second
            await first
            await opt.step(big)
            return opt.current_step

    assert run(train()) == 2


def test_errors_are_the_same(server, name):
    async def fail():
        async with optserve.aio.connect(server.target) as client:
            await client.optimizer(f"{name}-none")

    with pytest.raises(optserve.NotFoundError):
        run(fail())
    with pytest.raises(optserve.ClientUseError, match="async with"):
        run(optserve.aio.connect(server.target).server_info())


def test_workers_can_be_awaited(server, name):
    params = {"x": np.zeros(3, np.float32)}

    async def work(number: int) -> None:
        async with optserve.aio.connect(server.target) as client, await client.worker(name, f"w{number}") as worker:
            assert (await worker.pull()).step >= 0
            for _ in range(5):
                await worker.step({"x": -np.ones(3, np.float32)})
            assert (worker.name, worker.steps_made) == (f"w{number}", 5)

    async def train() -> None:
        async with optserve.aio.connect(server.target) as client:
            opt = await client.create_optimizer(
                name, optserve.Sgd(learning_rate=1.0), params, hosted=True, consistency=optserve.Async()
            )
            await asyncio.gather(*map(work, range(3)))
            assert (await opt.pull_parameters()).arrays["x"].tolist() == [15, 15, 15]

    run(train())


TWINS = {
    optserve.Client: optserve.aio.AsyncClient,
    optserve.Optimizer: optserve.aio.AsyncOptimizer,
    optserve.Worker: optserve.aio.AsyncWorker,
}
WITHOUT_TWIN = {
    "Client.close": "an `async with` closes it",
    "Optimizer.cancel": "tasks are cancelled",
    "Worker.cancel": "tasks are cancelled",
}
ASK_THE_SERVER = {
    "algorithm", "clipping", "consistency", "groups", "schedule", "transport", "weight_decay",
}  # fmt: skip
"""Properties whose twins are awaited."""

SAME_TYPES = {
    **TWINS,
    Iterator[optserve.OptimizerInfo]: list[optserve.OptimizerInfo],
    Iterator[optserve.StepUnderWay]: AsyncIterator[optserve.StepUnderWay],
}
"""What a call gives, and what its twin gives; the same for all that are not named here."""


def public(kind: type) -> dict[str, object]:
    return {name: member for name, member in inspect.getmembers(kind) if not name.startswith("_")}


@pytest.mark.parametrize(("sync", "asynchronous"), TWINS.items())
def test_every_public_name_has_its_twin_and_no_twin_is_alone(sync, asynchronous):
    left_out = {name for name in public(sync) if f"{sync.__name__}.{name}" in WITHOUT_TWIN}
    # Attributes of instances are properties of their twins.
    attributes = {"Optimizer": {"hosted", "name"}, "Worker": {"live_workers", "name"}}.get(sync.__name__, set())
    assert (set(public(sync)) | attributes) - left_out == set(public(asynchronous))


@pytest.mark.parametrize(("sync", "asynchronous"), TWINS.items())
def test_twins_have_the_same_parameters_and_give_the_same(sync, asynchronous):
    for name, twin in public(asynchronous).items():
        if isinstance(twin, property):
            # An attribute of the instance has no annotation to be compared with.
            member = getattr(sync, name, None)
            assert name not in ASK_THE_SERVER
            assert member is None or hints(twin.fget) == hints(member.fget), name
            continue
        member = getattr(sync, name)
        is_block = name == "begin_step"
        assert is_block or inspect.iscoroutinefunction(twin), name
        assert isinstance(member, property) == (name in ASK_THE_SERVER), name
        call = member.fget if isinstance(member, property) else member
        assert [(p.name, p.kind, p.default) for p in parameters(twin)] == [
            (p.name, p.kind, p.default) for p in parameters(call)
        ], name
        expected = hints(call)
        expected["return"] = SAME_TYPES.get(expected["return"], expected["return"])
        assert hints(twin) == expected, name


def parameters(call) -> list[inspect.Parameter]:
    return list(inspect.signature(call).parameters.values())


def hints(call) -> dict[str, object]:
    return get_type_hints(inspect.unwrap(call))


def test_twins_say_the_same(server, client, name):
    """Whatever can be asked, both are asked; dataclasses are compared as a whole."""
    client.create_optimizer(
        name, optserve.Adadelta(rho=0.5), G, hosted=True, weight_decay=0.25, schedule=optserve.InverseTime(decay=0.5),
        clipping=optserve.Clipping(norm=1.0), groups=[optserve.Group(("x",), {"rho": 0.25})],
    )  # fmt: skip
    shared = client.create_optimizer(f"{name}-2", optserve.Sgd(), G, hosted=True, consistency=optserve.Async())
    # Memory is shared with one of them at a time.
    opt = client.optimizer(name, transport="grpc")
    opt.step(G)

    async def compare() -> None:
        async with optserve.aio.connect(server.target) as aclient:
            twin = await aclient.optimizer(name, transport="grpc")
            assert twin.steps_made == 0
            await twin.refresh()
            await twin.step(G)
            assert twin.steps_made == opt.steps_made == 1
            opt.refresh()
            # That of the step that each has made itself.
            rate = 1 / 1.5
            assert opt.last_result is not None
            assert twin.last_result == replace(opt.last_result, step=2, learning_rates=(rate, rate))
            for attribute in sorted(public(optserve.aio.AsyncOptimizer).keys() - {"last_result"}):
                said = getattr(twin, attribute)
                if attribute in ASK_THE_SERVER:
                    assert await said() == getattr(opt, attribute), attribute
                elif not callable(said):
                    assert said == getattr(opt, attribute), attribute
            assert await (await aclient.optimizer(shared.name)).consistency() == shared.consistency
            assert (aclient.target, aclient.shares_memory) == (client.target, client.shares_memory)
            assert (await aclient.server_info(timeout_s=10)).version == client.server_info().version
            assert await aclient.list_optimizers() == list(client.list_optimizers())
            assert repr(await twin.statistics()) == repr(opt.statistics())
            assert await twin.save_checkpoint("tag") == opt.list_checkpoints()[0]
            assert await twin.list_checkpoints() == opt.list_checkpoints()
            assert await twin.export_state() == opt.export_state()
            pulled = await twin.pull_parameters()
            assert type(pulled) is optserve.HostedParameters
            assert pulled.step == opt.pull_parameters().step
            async with await aclient.worker(shared.name, "w") as worker:
                await worker.pull()
                await worker.step(G)
                assert (worker.at_step, worker.current_step, worker.live_workers) == (1, 1, 1)
                assert (worker.staleness, worker.steps_made) == (0, 1)

    run(compare())


def test_an_object_that_is_closed_for_good_does_not_wait_for_its_step(server, name):
    async def train() -> None:
        async with optserve.aio.connect(server.target) as client:
            opt = await client.create_optimizer(name, optserve.Sgd(), G)

            async def close_within_a_step() -> None:
                async with opt.begin_step() as step:
                    step.send("x", G["x"])
                    await opt.close(for_good=True)

            # The second where the step has not begun yet.
            with pytest.raises((optserve.StepCancelledError, optserve.ClientUseError)):
                await close_within_a_step()
            with pytest.raises(optserve.ClientUseError, match="closed for good"):
                await opt.step(G)

    run(train())
