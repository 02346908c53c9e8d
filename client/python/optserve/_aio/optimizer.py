"""The optimizer object of the client for asyncio."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial as bound
from types import EllipsisType
from typing import overload

import numpy as np

from optserve import algorithms, settings
from optserve import client as sync
from optserve._aio.awaiting import CallQueue, Threads, completion, wait_until_done
from optserve._aio.worker import LEAVE_S, SETTLE_S
from optserve._resources.new_optimizer import ArrayLike
from optserve._steps.incremental import StepUnderWay
from optserve.config import ClientConfig
from optserve.optimizer import ReplyName, StepHyperparameters
from optserve.state import Checkpoint, HostedParameters, OptimizerState, Progress, TensorSpec, no_progress
from optserve.statistics import QUANTILES, Statistics
from optserve.step_result import StepResult


class AsyncOptimizer:
    """See `optserve.Optimizer`. Every method is a coroutine, and so is every property that calls the server.

    The object makes one step after the other, also for several tasks.
    """

    def __init__(self, optimizer: sync.Optimizer, threads: Threads) -> None:
        self._optimizer = optimizer
        self._threads = threads
        self._queue = CallQueue(self._optimizer, threads)

    @property
    def _config(self) -> ClientConfig:
        return self._optimizer._connection.config

    @property
    def name(self) -> str:
        """The name that `create_optimizer` got."""
        return self._optimizer.name

    @property
    def hosted(self) -> bool:
        """Whether the server holds the parameters as well."""
        return self._optimizer.hosted

    @property
    def current_step(self) -> int:
        """Steps that the server has applied, as far as this object knows."""
        return self._optimizer.current_step

    @property
    def steps_made(self) -> int:
        """See `optserve.Optimizer.steps_made`."""
        return self._optimizer.steps_made

    @property
    def gradient_norm(self) -> float | None:
        """See `optserve.Optimizer.gradient_norm`."""
        return self._optimizer.gradient_norm

    @property
    def last_result(self) -> StepResult | None:
        """See `optserve.Optimizer.last_result`."""
        return self._optimizer.last_result

    @property
    def takes_curvature(self) -> bool:
        """See `optserve.Optimizer.takes_curvature`."""
        return self._optimizer.takes_curvature

    def __repr__(self) -> str:
        return f"Async{self._optimizer!r}"

    async def transport(self) -> tuple[str, str]:
        """See `optserve.Optimizer.transport`."""
        return await self._queue.run(lambda _: self._optimizer.transport, self._config.timeout_s)

    async def buffers(self) -> dict[str, np.ndarray]:
        """See `optserve.Optimizer.buffers`."""
        return await self._queue.run(lambda _: self._optimizer.buffers(), self._config.timeout_s)

    async def step(  # noqa: PLR0913 - each is a choice of its own, by name
        self,
        grads: Mapping[str, np.ndarray],
        *,
        curvature: Mapping[str, np.ndarray] | None = None,
        out: Mapping[str, np.ndarray] | None = None,
        reply: ReplyName = "updates",
        partial: bool = False,
        hyperparameters: StepHyperparameters | None = None,
        with_gradient_norm: bool = False,
        timeout_s: float | None = None,
    ) -> dict[str, np.ndarray]:
        """See `optserve.Optimizer.step`."""
        step = bound(
            self._optimizer.step, grads, curvature=curvature, out=out, reply=reply, partial=partial,
            hyperparameters=hyperparameters, with_gradient_norm=with_gradient_norm,
        )  # fmt: skip
        return await self._queue.run(lambda left_s: step(timeout_s=left_s), timeout_s, is_step=True)

    @asynccontextmanager
    async def begin_step(
        self,
        names: Iterable[str] | None = None,
        *,
        out: Mapping[str, np.ndarray] | None = None,
        reply: ReplyName = "updates",
        hyperparameters: StepHyperparameters | None = None,
        with_gradient_norm: bool = False,
        timeout_s: float | None = None,
    ) -> AsyncIterator[StepUnderWay]:
        """See `optserve.Optimizer.begin_step`; its `send` does not wait and need not be awaited."""
        options = self._optimizer._options(hyperparameters, with_gradient_norm=with_gradient_norm)
        patience = self._optimizer._connection.patience(timeout_s)
        async with self._queue.exclusive(patience):
            step = self._optimizer._start_step(patience, names, out=out, reply=reply, options=options)
            try:
                yield step
                step._complete()
                await completion(step._ended)
                step._raise_failure()
            except BaseException:
                step._cancel()
                await wait_until_done(step._ended)
                if step._request_id:
                    self._optimizer._outcomes.undelivered(step._request_id)
                raise

    async def replay(self, *, reply: ReplyName = "updates", timeout_s: float | None = None) -> dict[str, np.ndarray]:
        """See `optserve.Optimizer.replay`."""
        return await self._queue.run(lambda left_s: self._optimizer.replay(reply=reply, timeout_s=left_s), timeout_s)

    async def refresh(self) -> None:
        """See `optserve.Optimizer.refresh`."""
        await self._queue.run(lambda _: self._optimizer.refresh(), self._config.timeout_s)

    async def add_parameters(
        self,
        params: Mapping[str, ArrayLike | TensorSpec],
        *,
        groups: Sequence[settings.Group] = (),
        timeout_s: float | None = None,
    ) -> None:
        """See `optserve.Optimizer.add_parameters`."""
        add = bound(self._optimizer.add_parameters, params, groups=groups)
        await self._queue.run(lambda left_s: add(timeout_s=left_s), timeout_s, grace_s=SETTLE_S)

    async def update(
        self,
        algorithm: algorithms.Algorithm | None = None,
        *,
        schedule: settings.Schedule | EllipsisType | None = ...,
        clipping: settings.Clipping | EllipsisType | None = ...,
        groups: Sequence[settings.Group] | EllipsisType = ...,
        weight_decay: float | settings.WeightDecay | None = None,
        consistency: settings.Consistency | EllipsisType | None = ...,
        **hyperparameters: float,
    ) -> None:
        """See `optserve.Optimizer.update`."""
        update = bound(
            self._optimizer.update, algorithm, schedule=schedule, clipping=clipping, groups=groups,
            weight_decay=weight_decay, consistency=consistency, **hyperparameters,
        )  # fmt: skip
        await self._threads.run(update, grace_s=SETTLE_S)

    async def algorithm(self) -> algorithms.Algorithm:
        """See `optserve.Optimizer.algorithm`."""
        return await self._threads.run(lambda: self._optimizer.algorithm)

    async def schedule(self) -> settings.Schedule | None:
        """See `optserve.Optimizer.schedule`."""
        return await self._threads.run(lambda: self._optimizer.schedule)

    async def clipping(self) -> settings.Clipping | None:
        """See `optserve.Optimizer.clipping`."""
        return await self._threads.run(lambda: self._optimizer.clipping)

    async def groups(self) -> tuple[settings.Group, ...]:
        """See `optserve.Optimizer.groups`."""
        return await self._threads.run(lambda: self._optimizer.groups)

    async def weight_decay(self) -> float | settings.WeightDecay:
        """See `optserve.Optimizer.weight_decay`."""
        return await self._threads.run(lambda: self._optimizer.weight_decay)

    async def consistency(self) -> settings.Consistency | None:
        """See `optserve.Optimizer.consistency`."""
        return await self._threads.run(lambda: self._optimizer.consistency)

    async def push_parameters(self, params: Mapping[str, np.ndarray]) -> None:
        """See `optserve.Optimizer.push_parameters`."""
        await self._threads.run(bound(self._optimizer.push_parameters, params), grace_s=SETTLE_S)

    @overload
    async def pull_parameters(
        self, names: Sequence[str] = (), *, newer_than: None = None, out: Mapping[str, np.ndarray] | None = None
    ) -> HostedParameters: ...

    @overload
    async def pull_parameters(
        self, names: Sequence[str] = (), *, newer_than: int | None, out: Mapping[str, np.ndarray] | None = None
    ) -> HostedParameters | None: ...

    async def pull_parameters(
        self,
        names: Sequence[str] = (),
        *,
        newer_than: int | None = None,
        out: Mapping[str, np.ndarray] | None = None,
    ) -> HostedParameters | None:
        """See `optserve.Optimizer.pull_parameters`."""
        return await self._threads.run(bound(self._optimizer.pull_parameters, names, newer_than=newer_than, out=out))

    async def statistics(
        self,
        names: Sequence[str] = (),
        *,
        quantiles: Sequence[float] = QUANTILES,
        indices: Sequence[int] = (),
        random_indices: int = 0,
        seed: int = 0,
    ) -> Statistics:
        """See `optserve.Optimizer.statistics`."""
        look = bound(
            self._optimizer.statistics, names, quantiles=quantiles, indices=indices, random_indices=random_indices,
            seed=seed,
        )  # fmt: skip
        return await self._threads.run(look)

    async def save_checkpoint(self, tag: str, *, overwrite: bool = False) -> Checkpoint:
        """See `optserve.Optimizer.save_checkpoint`."""
        return await self._threads.run(
            bound(self._optimizer.save_checkpoint, tag, overwrite=overwrite), grace_s=SETTLE_S
        )

    async def list_checkpoints(self) -> list[Checkpoint]:
        """See `optserve.Optimizer.list_checkpoints`."""
        return await self._threads.run(self._optimizer.list_checkpoints)

    async def restore_checkpoint(self, tag: str) -> None:
        """See `optserve.Optimizer.restore_checkpoint`."""
        await self._queue.run(lambda _: self._optimizer.restore_checkpoint(tag), grace_s=SETTLE_S)

    async def delete_checkpoint(self, tag: str) -> None:
        """See `optserve.Optimizer.delete_checkpoint`."""
        await self._threads.run(bound(self._optimizer.delete_checkpoint, tag), grace_s=SETTLE_S)

    async def export_state(self, *, on_progress: Progress = no_progress) -> OptimizerState:
        """See `optserve.Optimizer.export_state`; `on_progress` is called in another thread."""
        return await self._threads.run(bound(self._optimizer.export_state, on_progress=on_progress))

    async def import_state(self, state: OptimizerState, *, on_progress: Progress = no_progress) -> None:
        """See `optserve.Optimizer.import_state`; `on_progress` is called in another thread."""
        load = bound(self._optimizer.import_state, state, on_progress=on_progress)
        await self._queue.run(lambda _: load(), grace_s=SETTLE_S)

    async def close(self, *, for_good: bool = False) -> None:
        """See `optserve.Optimizer.close`."""
        if for_good:
            # In a thread of its own, and not in the queue, because it ends the call that runs now.
            close = bound(self._optimizer.close, for_good=True)
            await self._threads.run(close, own=True, grace_s=LEAVE_S)
        else:
            await self._queue.run(lambda _: self._optimizer.close(), self._config.timeout_s)
