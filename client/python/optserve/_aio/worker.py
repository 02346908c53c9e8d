"""The worker of `optserve.aio`."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from functools import partial as bound
from types import TracebackType
from typing import Self, overload

import numpy as np

from optserve._aio.awaiting import CallQueue, Threads
from optserve.optimizer import ReplyName, StepHyperparameters
from optserve.state import HostedParameters
from optserve.step_result import StepResult
from optserve.worker import Worker

SETTLE_S = 1.0
"""Seconds that a cancelled call which changes something may still take, so that it changes nothing later. Steps and
calls that only read are interrupted at once; the next step finds out whether the last one was applied."""

LEAVE_S = 5.0
"""Seconds that leaving a worker's block may still take after its task was cancelled. Then its lease runs out."""


class AsyncWorker:
    """See `optserve.Worker`. Every method is a coroutine."""

    def __init__(self, worker: Worker, threads: Threads) -> None:
        self._worker = worker
        self._optimizer = worker._optimizer
        self._threads = threads
        self._queue = CallQueue(self._optimizer, threads)

    async def __aenter__(self) -> Self:
        entered: list[Worker] = []
        try:
            await self._threads.run(self._worker.__enter__, own=True, grace_s=SETTLE_S, undelivered=entered.append)
        except asyncio.CancelledError:
            if entered:
                await self._leave()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self._leave()

    async def _leave(self) -> None:
        # In a thread of its own, and not in the queue, because it ends a step that may wait for other workers.
        leave = bound(self._worker.__exit__, None, None, None)
        await self._threads.run(leave, own=True, grace_s=LEAVE_S)

    @property
    def name(self) -> str:
        """The worker's name. No other worker of the optimizer may use it."""
        return self._worker.name

    @property
    def live_workers(self) -> int:
        """How many workers were alive at this worker's last report."""
        return self._worker.live_workers

    @property
    def at_step(self) -> int | None:
        """See `optserve.Worker.at_step`."""
        return self._worker.at_step

    @property
    def current_step(self) -> int:
        """See `optserve.Worker.current_step`."""
        return self._worker.current_step

    @property
    def steps_made(self) -> int:
        """See `optserve.Worker.steps_made`."""
        return self._worker.steps_made

    @property
    def staleness(self) -> int:
        """See `optserve.Worker.staleness`."""
        return self._worker.staleness

    @property
    def gradient_norm(self) -> float | None:
        """See `optserve.Worker.gradient_norm`."""
        return self._worker.gradient_norm

    @property
    def last_result(self) -> StepResult | None:
        """See `optserve.Worker.last_result`."""
        return self._worker.last_result

    def __repr__(self) -> str:
        return f"Async{self._worker!r}"

    async def transport(self) -> tuple[str, str]:
        """See `optserve.Worker.transport`."""
        return await self._queue.run(lambda _: self._worker.transport)

    @overload
    async def pull(
        self, names: Sequence[str] = (), *, newer_than: None = None, out: Mapping[str, np.ndarray] | None = None
    ) -> HostedParameters: ...

    @overload
    async def pull(
        self, names: Sequence[str] = (), *, newer_than: int | None, out: Mapping[str, np.ndarray] | None = None
    ) -> HostedParameters | None: ...

    async def pull(
        self,
        names: Sequence[str] = (),
        *,
        newer_than: int | None = None,
        out: Mapping[str, np.ndarray] | None = None,
    ) -> HostedParameters | None:
        """See `optserve.Worker.pull`."""
        # Set only after the parameters have reached this task: the next gradient is computed at them.
        found = await self._threads.run(bound(self._optimizer.pull_parameters, names, newer_than=newer_than, out=out))
        if found is not None:
            self._worker._session.at_step = found.step
        return found

    async def refresh(self) -> None:
        """See `optserve.Worker.refresh`."""
        await self._queue.run(lambda _: self._worker.refresh())

    async def step(  # noqa: PLR0913 - each is a choice of its own, by name
        self,
        grads: Mapping[str, np.ndarray],
        *,
        curvature: Mapping[str, np.ndarray] | None = None,
        out: Mapping[str, np.ndarray] | None = None,
        reply: ReplyName = "parameters",
        partial: bool = False,
        hyperparameters: StepHyperparameters | None = None,
        with_gradient_norm: bool = False,
        timeout_s: float | None = None,
    ) -> dict[str, np.ndarray]:
        """See `optserve.Worker.step`."""
        step = bound(
            self._worker.step, grads, curvature=curvature, out=out, reply=reply, partial=partial,
            hyperparameters=hyperparameters, with_gradient_norm=with_gradient_norm,
        )  # fmt: skip
        return await self._queue.run(lambda left_s: step(timeout_s=left_s), timeout_s, is_step=True)
