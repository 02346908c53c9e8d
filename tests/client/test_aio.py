"""The asyncio client: the same calls, awaited."""

import asyncio
import inspect

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
            while opt.current_step < 2 or opt._optimizer._outcomes.unsettled:
                pass  # the loop is busy
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            with pytest.raises(optserve.StepInDoubtError, match="had been applied"):
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
            await asyncio.sleep(0.005)
            second = asyncio.create_task(opt.step(big))
            await asyncio.sleep(0.005)
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


@pytest.mark.parametrize(
    ("sync", "asynchronous"),
    [
        (optserve.Client, optserve.aio.AsyncClient),
        (optserve.Optimizer, optserve.aio.AsyncOptimizer),
        (optserve.Worker, optserve.aio.AsyncWorker),
    ],
)
def test_every_call_of_the_synchronous_client_can_be_awaited(sync, asynchronous):
    left_out = {"close", "target", "cancel", "algorithm", "begin_step"}
    for name, member in inspect.getmembers(sync, inspect.isfunction):
        if name.startswith("_") or name in left_out:
            continue
        twin = getattr(asynchronous, name)
        assert inspect.iscoroutinefunction(twin), name
        assert list(inspect.signature(twin).parameters) == [
            parameter for parameter in inspect.signature(member).parameters if parameter != "timeout_s"
        ] or list(inspect.signature(twin).parameters) == list(inspect.signature(member).parameters)
