"""asyncio: whoever is cancelled ends, undoes or marks exactly its own call."""

import asyncio
import random
import subprocess
import sys
import threading
from concurrent.futures import wait

import numpy as np
import pytest

import optserve
import optserve.aio
from clocks import TellingClock
from present import present
from service.worker_harness import app

G = {"x": np.arange(1, 5, dtype=np.float32)}
SHARED = {"hosted": True, "consistency": optserve.Sync(2)}
PARAMS = {"x": np.zeros(4, np.float32)}


def run(coroutine):
    return asyncio.run(coroutine)


async def somebody_waits(clock: TellingClock) -> None:
    """Until a step waits for another worker, as nobody has done since the last time."""
    await asyncio.to_thread(clock.somebody_waits.wait, 30)
    assert clock.somebody_waits.is_set()
    clock.somebody_waits.clear()


async def cancelled(task: asyncio.Task) -> None:
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


def threads_of(name: str) -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if name in thread.name]


def test_a_step_that_is_cancelled_while_its_block_is_left_is_delivered_or_said(server, name):
    size, chance = 100_000, random.Random(1)

    async def train() -> None:
        async with optserve.aio.connect(server.target) as client:
            opt = await client.create_optimizer(name, optserve.Sgd(1.0), {"w": np.zeros(size)})
            received = 0.0

            async def one() -> None:
                nonlocal received
                async with opt.begin_step() as step:
                    step.send("w", np.ones(size))
                received += step.updates["w"][-1]

            for turn in range(80):
                task = asyncio.create_task(one())
                if turn % 8:
                    # Into any part of the step.
                    await asyncio.sleep(chance.uniform(0, 0.006))
                    task.cancel()
                try:
                    await task
                except asyncio.CancelledError:
                    pass
                except optserve.StepInDoubtError:
                    received += (await opt.replay())["w"][-1]
            try:
                await one()
            except optserve.StepInDoubtError:
                received += (await opt.replay())["w"][-1]
            assert -received == opt.current_step

    run(train())


def test_a_block_that_is_left_by_an_exception_applies_nothing_though_all_gradients_were_sent(client, name):
    opt = client.create_optimizer(name, optserve.Sgd(), G)
    for transport in ("grpc", "shm"):
        opt = client.optimizer(name, transport=transport)
        with pytest.raises(ZeroDivisionError), opt.begin_step() as step:  # noqa: PT012
            step.send("x", G["x"])
            with pytest.raises(TimeoutError):
                # Long enough for a step that does not wait for the end of its block.
                step._ended.result(timeout=0.2)
            raise ZeroDivisionError
        opt.refresh()
        assert opt.current_step == 0
        opt.close()


def test_a_replay_whose_updates_do_not_arrive_can_be_made_again(server, name):
    """The replay has succeeded in its thread, but the loop was busy, and the task is cancelled before it looks."""

    async def train() -> None:
        async with optserve.aio.connect(server.target) as client:
            opt = await client.create_optimizer(name, optserve.Sgd(1.0), G)
            for make in (lambda: opt.step(G), opt.replay, opt.refresh, opt.replay):
                outcomes = opt._optimizer._outcomes
                before = outcomes.unsettled
                task = asyncio.create_task(make())
                await asyncio.sleep(0)
                # The loop is busy until then.
                wait(list(opt._threads._under_way))
                await cancelled(task)
                assert outcomes.unsettled >= before
                with pytest.raises(optserve.StepInDoubtError, match="was applied"):
                    await opt.step(G)
            assert np.array_equal((await opt.replay())["x"], -G["x"])
            await opt.step(G)
            assert opt.current_step == 2

    run(train())


def test_a_cancelled_replay_of_a_step_that_was_delivered_changes_nothing(server, name):
    async def train() -> None:
        async with optserve.aio.connect(server.target) as client:
            opt = await client.create_optimizer(name, optserve.Sgd(1.0), G)
            await opt.step(G)
            for pause_s in (0, 0.0003, 0.001, 0.003):
                task = asyncio.create_task(opt.replay())
                # Into each part of the replay.
                await asyncio.sleep(pause_s)
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
            await opt.step(G)
            assert opt.current_step == 2

    run(train())


def test_of_two_steps_of_one_worker_the_cancelled_one_is_ended(name):
    """Both wait: one for another worker, one for its turn. Either can be cancelled without touching the other."""
    clock = TellingClock()

    async def train(target: str) -> None:
        async with (
            optserve.aio.connect(target) as aclient,
            await aclient.worker(name, "a") as one,
            await aclient.worker(name, "b") as two,
        ):
            await asyncio.gather(one.pull(), two.pull())
            first = asyncio.create_task(one.step({"x": np.full(4, 2, np.float32)}))
            second = asyncio.create_task(one.step({"x": np.full(4, 8, np.float32)}))
            await somebody_waits(clock)
            await cancelled(second)
            assert not first.done()
            await two.step({"x": np.full(4, 4, np.float32)})
            assert (await first)["x"].tolist() == [-3] * 4

            first = asyncio.create_task(one.step({"x": np.full(4, 2, np.float32)}))
            second = asyncio.create_task(one.step({"x": np.full(4, 8, np.float32)}))
            await somebody_waits(clock)
            await cancelled(first)
            other = asyncio.create_task(two.step({"x": np.full(4, 4, np.float32)}))
            try:
                assert (await second)["x"].tolist() == [-9] * 4
            except optserve.StepInDoubtError:
                # The server had taken the first one for good just before.
                assert (await other)["x"].tolist() == [-6] * 4
            await other

    with app(clock) as served:
        with optserve.connect(served.target) as client:
            client.create_optimizer(name, optserve.Sgd(1.0), PARAMS, **SHARED)
        run(train(served.target))


def test_leaving_a_block_is_carried_out_however_early_it_is_cancelled(server, client, name):
    client.create_optimizer(name, optserve.Sgd(1.0), PARAMS, hosted=True, consistency=optserve.Async(lease_s=30))

    async def train() -> None:
        async with optserve.aio.connect(server.target) as aclient, await aclient.worker(name, "stays") as stays:
            for number in range(12):
                worker = await (await aclient.worker(name, f"leaves-{number}")).__aenter__()
                task = asyncio.create_task(worker.__aexit__(None, None, None))
                await asyncio.sleep(0)
                await cancelled(task)
            assert not threads_of("leaves-")
            await stays.refresh()
            assert stays.live_workers == 1

    run(train())


def test_leaving_a_block_ends_a_step_of_it_that_waits(name):
    clock = TellingClock()

    async def train(target: str) -> None:
        async with optserve.aio.connect(target) as aclient, await aclient.worker(name, "stays") as stays:
            async with asyncio.timeout(20), await aclient.worker(name, "leaves") as worker:
                await worker.pull()
                steps = [asyncio.create_task(worker.step(G)) for _ in range(2)]
                await somebody_waits(clock)
                assert not any(step.done() for step in steps)
            ends = await asyncio.wait_for(asyncio.gather(*steps, return_exceptions=True), 20)
            assert all(isinstance(end, optserve.OptserveError) for end in ends), ends
            # The one that waited; the other waited for its turn.
            assert any(isinstance(end, optserve.StepCancelledError) for end in ends), ends
            await stays.refresh()
            assert stays.live_workers == 1

    with app(clock) as served:
        with optserve.connect(served.target) as client:
            client.create_optimizer(name, optserve.Sgd(1.0), PARAMS, **SHARED)
        run(train(served.target))


def test_a_cancelled_entry_of_a_worker_leaves_nobody_behind(server, client, name):
    client.create_optimizer(name, optserve.Sgd(1.0), PARAMS, hosted=True, consistency=optserve.Bounded(0, lease_s=30))

    async def train() -> None:
        async with optserve.aio.connect(server.target) as aclient:

            async def block(number: int) -> None:
                async with await aclient.worker(name, f"cancelled-{number}"):
                    pass

            for number in range(25):
                task = asyncio.create_task(block(number))
                # Into each part of the entry.
                await asyncio.sleep(0.0003 * number)
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
            assert not threads_of("cancelled-")
            # At once, and not when leases have run out.
            async with await aclient.worker(name, "alive") as worker:
                assert worker.live_workers == 1
                await worker.pull()
                for _ in range(3):
                    await worker.step(PARAMS, timeout_s=20)

    run(train())


def test_nothing_is_written_to_the_arrays_of_a_cancelled_call(server, client, name):
    size = 2_000_000
    client.create_optimizer(name, optserve.Sgd(1.0), {"x": np.zeros(size, np.float32)}, hosted=True)
    grads, out = {"x": np.ones(size, np.float32)}, {"x": np.zeros(size, np.float32)}

    async def train() -> None:
        async with optserve.aio.connect(server.target, optserve.ClientConfig(transport="grpc")) as aclient:
            opt = await aclient.optimizer(name)
            for turn in range(24):
                task = asyncio.create_task(opt.step(grads, out=out) if turn % 2 else opt.pull_parameters(out=out))
                # Into each part of the call; then time for what still might write.
                await asyncio.sleep(0.0015 * turn)
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
                out["x"].fill(7)
                await asyncio.sleep(0.02)
                assert np.all(out["x"] == 7)
                await opt.refresh()

    run(train())


def test_a_call_that_waits_for_a_server_that_is_gone_is_ended_at_once(name):
    async def train() -> None:
        with optserve.local_server(backend="numpy") as server:
            config = optserve.ClientConfig(timeout_s=60, connect_timeout_s=60)
            async with optserve.aio.connect(server.target, config) as client:
                opt = await client.create_optimizer(name, optserve.Sgd(1.0), G, hosted=True)
                await opt.step(G)
                server.process.kill()
                server.process.wait()
                calls = (
                    client.server_info(),
                    client.list_optimizers(),
                    client.create_optimizer(f"{name}-2", optserve.Sgd(), G),
                    opt.step(G),
                    opt.replay(),
                    opt.pull_parameters(),
                    opt.export_state(),
                    opt.save_checkpoint("a"),
                    optserve.aio.connect(server.target, config).__aenter__(),
                )
                tasks = [asyncio.create_task(call) for call in calls]
                # Nothing happens by which to see that they all wait.
                await asyncio.sleep(0.3)
                assert not any(task.done() for task in tasks)
                for task in tasks:
                    task.cancel()
                async with asyncio.timeout(10):
                    ends = await asyncio.gather(*tasks, return_exceptions=True)
                assert all(isinstance(end, asyncio.CancelledError) for end in ends), ends
                # Their threads are through with them, too.
                assert not present(client._threads)._under_way
            assert not threads_of("optserve-aio")

    run(train())


def test_more_workers_than_threads_wait_for_one_another(server, client, name):
    count = optserve.aio.MAX_CONCURRENT_CALLS + 8
    consistency = optserve.Sync(count)
    client.create_optimizer(name, optserve.Sgd(1.0), PARAMS, hosted=True, consistency=consistency)

    async def train() -> None:
        async with optserve.aio.connect(server.target, optserve.ClientConfig(step_timeout_s=60)) as aclient:
            workers = [await aclient.worker(name, f"w{number:02}") for number in range(count)]
            await asyncio.gather(*(worker.__aenter__() for worker in workers))
            await asyncio.gather(*(worker.pull() for worker in workers))
            # Steps on one object beyond its first have no thread, so others are not kept from theirs.
            steps = [worker.step(G) for worker in workers[1:]]
            steps += [workers[0].step(G) for _ in range(1)]
            assert all((x["x"] == -G["x"]).all() for x in await asyncio.gather(*steps))
            waiting = [asyncio.create_task(workers[0].step(G)) for _ in range(count)]
            # All of them begin; the first is in its thread, and the others wait for it.
            await asyncio.sleep(0)
            assert (await workers[1].pull()).step == 1
            for task in waiting:
                task.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)
            await asyncio.gather(*(worker.__aexit__(None, None, None) for worker in workers))

    run(train())


def test_a_forked_process_is_told_that_its_client_is_not_its_own(server, client, name):
    """As the synchronous client does."""
    program = """
import os
import asyncio, sys, warnings
import numpy as np, optserve, optserve.aio
warnings.simplefilter("ignore")
G = {"x": np.ones(4, np.float32)}

async def inherited(client, opt):
    async def begun():
        async with opt.begin_step() as step:
            step.send("x", G["x"])

    caught = 0
    for call in (opt.step(G), client.server_info(), begun(), opt.replay(), opt.pull_parameters(), opt.close()):
        try:
            async with asyncio.timeout(5):
                await call
        except optserve.ClientUseError as error:
            caught += "forked" in str(error)
    await client.__aexit__(None, None, None)
    return caught

async def main():
    async with optserve.aio.connect(sys.argv[1]) as client:
        opt = await client.optimizer(sys.argv[2])
        await opt.step(G)
        child = os.fork()
        if child == 0:
            os._exit(asyncio.run(inherited(client, opt)))
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert status == 6, status
        await opt.step(G)

asyncio.run(main())
"""
    client.create_optimizer(name, optserve.Sgd(), PARAMS)
    subprocess.run([sys.executable, "-c", program, server.target, name], check=True, timeout=60)
