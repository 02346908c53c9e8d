"""asyncio: calls are cancelled at random moments, 2,000 times; sums are those of a calm run, and nothing is left."""

import asyncio
import gc
import random
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import optserve
import optserve.aio

CANCELLATIONS = 2000
STREAMS = 24
SIZE = 300
PARAMS = {"x": np.zeros(SIZE), "y": np.zeros((3, 2))}
OPTIONS = {"algorithm": optserve.Sgd(learning_rate=1.0), "params": PARAMS}


def gradient(number: int) -> dict[str, np.ndarray]:
    """Small whole numbers, and others for each step, so that every sum is exact and every step shows in it."""
    return {key: 2.0 * np.arange(1, array.size + 1).reshape(array.shape) + 16 * number for key, array in PARAMS.items()}


def total(count: int) -> dict[str, np.ndarray]:
    """The sum of the first gradients."""
    return {key: np.sum([gradient(number)[key] for number in range(count)], axis=0) for key in PARAMS}


def same(left: dict[str, np.ndarray], right: dict[str, np.ndarray]) -> bool:
    return left.keys() == right.keys() and all(np.array_equal(left[key], right[key]) for key in left)


class Storm:
    """Cancels calls at random moments.

    Attributes:
        cancelled: How often, by the name of the call.
    """

    def __init__(self, seed: int) -> None:
        self.cancelled: Counter[str] = Counter()
        self._random = random.Random(seed)
        # How long calls take, so that cancellations fall into all of their parts.
        self._takes_s: dict[str, float] = {}

    @property
    def is_over(self) -> bool:
        return self.cancelled.total() >= CANCELLATIONS

    def choose(self, *options: Any) -> Any:
        return self._random.choice(options)

    async def call(self, name: str, make: Callable[[], Awaitable[Any]]) -> tuple[bool, Any]:
        """(whether it came to its end, what it gave); errors are raised."""
        task = asyncio.ensure_future(make())
        started = asyncio.get_running_loop().time()
        if not self.is_over and self._random.random() < 0.75:
            pause_s = self._random.uniform(0, 1.2) * self._takes_s.get(name, 0.001)
            kind = self._random.random()
            if kind < 0.7:
                await asyncio.wait([task], timeout=pause_s)
            # Some while the loop is busy, so that nobody has looked at an answer that is there; some before they begin.
            elif kind < 0.95:
                await asyncio.sleep(0)
                # Not awaited: the loop is what is kept busy.
                time.sleep(min(pause_s, 0.01))
            if task.cancel():
                self.cancelled[name] += 1
        try:
            result = await task
        except asyncio.CancelledError:
            current = asyncio.current_task()
            # The test itself may be at its end.
            if current is not None and current.cancelling():
                raise
            return False, None
        takes_s = asyncio.get_running_loop().time() - started
        self._takes_s[name] = 0.8 * self._takes_s.get(name, takes_s) + 0.2 * takes_s
        return True, result

    async def insist(self, name: str, make: Callable[[], Awaitable[Any]]) -> Any:
        """Call until it comes to its end."""
        while True:
            done, result = await self.call(name, make)
            if done:
                return result


async def in_a_block(opt: optserve.aio.AsyncOptimizer, number: int) -> dict[str, np.ndarray]:
    async with opt.begin_step() as step:
        for key, array in gradient(number).items():
            step.send(key, array)
            await asyncio.sleep(0)
    return step.updates


async def steps_of_one_client(storm: Storm, opt: optserve.aio.AsyncOptimizer, count: int) -> None:
    """Each gradient is applied once, and its updates arrive once."""
    x = {key: array.copy() for key, array in PARAMS.items()}
    out = {key: np.empty_like(array) for key, array in PARAMS.items()}
    number = 0
    while number < count:
        make, name = storm.choose(
            (partial(opt.step, gradient(number)), "step"),
            (partial(opt.step, gradient(number), out=out), "step(out)"),
            (partial(in_a_block, opt, number), "begin_step"),
        )
        try:
            done, updates = await storm.call(name, make)
        except optserve.StepInDoubtError:
            if storm.choose(True, True, False):
                done, updates = True, await storm.insist("replay", opt.replay)
            else:
                # Given up: what they were is known here.
                before = opt.current_step
                await storm.insist("refresh", opt.refresh)
                assert opt.current_step == before == number + 1
                done, updates = True, {key: -array for key, array in gradient(number).items()}
        if done:
            assert same(updates, {key: -array for key, array in gradient(number).items()})
            for key in x:
                x[key] += updates[key]
            for array in out.values():
                array.fill(np.nan)
            number += 1
            assert opt.current_step == number
        others = ("buffers", "transport", "statistics", "export_state", "list_checkpoints", "close", "replay")
        lent = False
        for name in (storm.choose(*others), storm.choose(*others)):
            # Whoever has been given the shared memory may write there, so the reply that was in it is gone.
            if done and storm.choose(True, False, False, False) and not (lent and name == "replay"):
                await storm.insist(name, getattr(opt, name))
                lent = lent or name == "buffers"
    assert same(x, {key: -array for key, array in total(count).items()})


async def steps_of_workers(storm: Storm, client: optserve.aio.AsyncClient, name: str, who: str, count: int) -> None:
    """Each worker's gradients are applied once, over several lives of it."""
    number = 0
    while number < count:

        async def live() -> None:
            nonlocal number
            async with await client.worker(name, who) as worker:
                last = min(count, number + 12)
                await storm.insist("worker.pull", worker.pull)
                while number < last:
                    try:
                        done, x = await storm.call("worker.step", partial(worker.step, gradient(number)))
                    except optserve.StepInDoubtError:
                        await storm.insist("worker.refresh", worker.refresh)
                        done, x = True, None
                    if x is None:
                        await storm.insist("worker.pull", worker.pull)
                    number += done
                if storm.choose(True, False):
                    await storm.insist("worker.transport", worker.transport)

        await live()
        # Entries and exits, in which nothing is stepped.
        for _ in range(4):
            with suppress(optserve.OptserveError):
                await storm.call("worker block", lambda: in_and_out(client, name, f"{who}-passing"))


async def in_and_out(client: optserve.aio.AsyncClient, name: str, who: str) -> None:
    async with await client.worker(name, who):
        await asyncio.sleep(0)


async def states(storm: Storm, client: optserve.aio.AsyncClient, name: str) -> None:
    """Whatever changes a state has changed it as a whole when it was insisted on."""
    opt = await storm.insist("optimizer", lambda: client.optimizer(name))
    number = 0
    while not storm.is_over:
        opt = await storm.insist("optimizer", lambda: client.optimizer(name))
        await opt.step(gradient(number))
        number += 1
        await storm.insist("save_checkpoint", partial(opt.save_checkpoint, "a", overwrite=True))
        state = await storm.insist("export_state", opt.export_state)
        await opt.step(gradient(number))
        if storm.choose(True, False):
            await storm.insist("restore_checkpoint", partial(opt.restore_checkpoint, "a"))
        else:
            await storm.insist("import_state", partial(opt.import_state, state))
        # Insisting has told this object of the state that it has brought about, however often it was brought about.
        assert opt.current_step == number
        found = await storm.insist("pull_parameters", opt.pull_parameters)
        assert found.step == number
        assert same(found.arrays, {key: -array for key, array in total(number).items()})
        await storm.insist("update", partial(opt.update, optserve.Sgd(learning_rate=1.0)))
        await storm.insist("delete_checkpoint", partial(without_checkpoint, opt, "a"))
        await opt.close()


async def without_checkpoint(opt: optserve.aio.AsyncOptimizer, tag: str) -> None:
    with suppress(optserve.NotFoundError):
        await opt.delete_checkpoint(tag)


async def clients(storm: Storm, client: optserve.aio.AsyncClient, target: str, name: str) -> None:
    """Clients and optimizers come and go."""

    async def come_and_go() -> None:
        async with optserve.aio.connect(target) as other:
            await (await other.optimizer(name)).refresh()

    async def create() -> None:
        with suppress(optserve.AlreadyExistsError):
            await client.create_optimizer(f"{name}-new", **OPTIONS, hosted=True)

    async def push() -> None:
        try:
            await (await client.optimizer(f"{name}-new")).push_parameters(PARAMS)
        except optserve.FailedPreconditionError as error:
            assert error.reason == "PARAMETERS_IN_PLACE"  # noqa: PT017

    while not storm.is_over:
        await storm.call("client block", come_and_go)
        if storm.choose(True, False):
            await storm.call("create_optimizer", create)
            make = partial(client.get_or_create_optimizer, f"{name}-new", **OPTIONS, hosted=True)
            await storm.insist("get_or_create_optimizer", make)
        else:
            await storm.insist("create_optimizer", create)
            await storm.insist("push_parameters", push)
        found = await (await client.optimizer(f"{name}-new")).pull_parameters()
        assert same(found.arrays, PARAMS)
        assert f"{name}-new" in {item.name for item in await storm.insist("list_optimizers", client.list_optimizers)}
        await storm.insist("server_info", client.server_info)
        await storm.insist("client.list_checkpoints", lambda: client.list_checkpoints(name))
        await storm.insist("delete_optimizer", lambda: client.delete_optimizer(f"{name}-new", missing_ok=True))


def left_over(server: optserve.LocalServer) -> Counter[str]:
    """What could be left behind, in this process and in the server."""
    gc.collect()
    process = Path(f"/proc/{server.process.pid}")
    counts = {
        "threads here": threading.active_count(),
        "descriptors here": len(list(Path("/proc/self/fd").iterdir())),
        "descriptors there": len(list((process / "fd").iterdir())),
        "segments there": (process / "maps").read_text().count("/SYSV"),
    }
    return Counter(counts)


@pytest.mark.parametrize("transport", ["grpc", "shm"])
def test_2000_random_cancellations(transport, tmp_path):
    storm = Storm(seed=13)
    config = optserve.ClientConfig(transport=transport)

    async def train(target: str) -> None:
        async with asyncio.timeout(50), optserve.aio.connect(target, config) as client:
            own = [await client.create_optimizer(f"own-{i}", **OPTIONS) for i in range(2)]
            await client.create_optimizer("state", **OPTIONS, hosted=True)
            kinds = {"async": optserve.Async(), "bounded": optserve.Bounded(2), "sync": optserve.Sync(2)}
            for name, consistency in kinds.items():
                await client.create_optimizer(name, **OPTIONS, hosted=True, consistency=consistency)
            async with asyncio.TaskGroup() as group:
                for opt in own:
                    group.create_task(steps_of_one_client(storm, opt, 100))
                for name in kinds:
                    for who in "ab":
                        group.create_task(steps_of_workers(storm, client, name, who, 36))
                group.create_task(states(storm, client, "state"))
                group.create_task(clients(storm, client, target, "async"))
            for name in kinds:
                opt = await client.optimizer(name)
                x = (await opt.pull_parameters()).arrays
                times = 1 if name == "sync" else 2
                assert same(x, {key: -times * array for key, array in total(36).items()}), name
                async with await client.worker(name, "last") as worker:
                    assert worker.live_workers == 1
            for item in await client.list_optimizers():
                await client.delete_optimizer(item.name)
        assert asyncio.all_tasks() == {asyncio.current_task()}

    settings = tmp_path / "optserve.toml"
    settings.write_text(f"max_streams = {STREAMS}\n")
    with optserve.local_server(backend="numpy", options=["--config", str(settings)]) as server:
        asyncio.run(calm(server.target, config))
        before = left_over(server)
        asyncio.run(train(server.target))
        # The server may not have noticed yet that streams are gone.
        until = time.monotonic() + 20
        while (more := left_over(server) - before) and time.monotonic() < until:
            time.sleep(0.05)
        assert not more
        asyncio.run(calm(server.target, config))
    assert len(storm.cancelled) >= 24, storm.cancelled


async def calm(target: str, config: optserve.ClientConfig) -> None:
    """As many streams at a time as the server takes: none of its places is lost."""
    async with optserve.aio.connect(target, config) as client:
        opts = [await client.create_optimizer(f"calm-{i}", **OPTIONS) for i in range(STREAMS)]
        await asyncio.gather(*(opt.step(gradient(0), timeout_s=20) for opt in opts))
        for opt in opts:
            await client.delete_optimizer(opt.name)
