"""One of several workers that train one model. The server holds the parameters."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Self, overload

import numpy as np

from optserve import _reasons
from optserve._resources import replies
from optserve._rpc.connection import Connection
from optserve._rpc.deadline import Patience
from optserve.errors import (
    ClientUseError,
    OptserveError,
    StepInDoubtError,
    WorkerReplacedError,
)
from optserve.optimizer import Optimizer, ReplyName, StepHyperparameters, TransportName, WireDtype
from optserve.state import HostedParameters
from optserve.step_result import StepResult
from optserve.v1 import optimizer_pb2, replicas_pb2

logger = logging.getLogger(__name__)

RENEWALS_PER_LEASE = 3
MAX_RENEWAL_S = 3600.0
"""Longest pause between two renewals of a lease."""
LEAVE_TIMEOUT_S = 5.0
"""Seconds that a worker tries to report that it leaves. If it fails, its lease runs out."""

_LEAVE_WAIT_S = 1.0


class Worker:
    """A worker, for the length of a with-block. A thread renews its lease; at the end of the block it leaves.

    Entering the block begins a life of the worker's name. It ends earlier lives that other processes may still have
    under this name: their steps raise WorkerReplacedError. Leaving the block interrupts a step of another thread.

    Attributes:
        name: The worker's name. No other worker of the optimizer may use it.
        live_workers: How many workers were alive at this worker's last report.

    Example:
        >>> with client.worker("mlp") as worker:              # doctest: +SKIP
        ...     x = worker.pull().arrays
        ...     for batch in batches:
        ...         x = worker.step(gradients(x, batch))
    """

    def __init__(
        self,
        connection: Connection,
        message: optimizer_pb2.Optimizer,
        name: str,
        transport: TransportName = "auto",
        wire_dtype: WireDtype = "native",
    ) -> None:
        self.name = name or f"worker-{uuid.uuid4().hex[:12]}"
        self.live_workers = 0
        self._life = 0
        self._connection = connection
        self._resource = message.name
        self._optimizer = Optimizer(
            connection, message, transport=transport, wire_dtype=wire_dtype, worker=self.name, register=self._register
        )
        self._session = self._optimizer._session
        self._done = connection.clock.event()
        self._renewing = connection.clock.thread(self._renew_lease, f"optserve {self.name}")
        self._renew_every_s = 10.0

    def __repr__(self) -> str:
        return f"Worker({self.name!r} of {self._optimizer.name!r}, {self.steps_made} steps made)"

    def __enter__(self) -> Self:
        # Only the second report, with the number of the new life, ends other lives. So a retry of the first is safe.
        self._life = self._report(replicas_pb2.WORKER_STATE_ALIVE).life
        self._continue_after(self._register().last_request_id)
        self._renewing.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._done.set()
        try:
            self._optimizer.close(for_good=True)
            # The renewing thread may wait for a server that does not answer; it ends by itself.
            self._renewing.join(_LEAVE_WAIT_S)
            self._report(
                replicas_pb2.WORKER_STATE_LEAVING, timeout_s=min(LEAVE_TIMEOUT_S, self._connection.config.timeout_s)
            )
        except WorkerReplacedError as failure:
            # Another life has the name, and continues.
            logger.debug("%s", failure)
        except OptserveError as failure:
            # Not raised: the lease runs out, and an error of the block is more important.
            logger.warning("%s could not report that it leaves: %s", self.name, failure)

    @property
    def at_step(self) -> int | None:
        """The step of this worker's parameters; None before its first pull."""
        return self._session.at_step

    @property
    def steps_made(self) -> int:
        """Steps that were applied under this worker's name, in this life and earlier ones."""
        return self._session.life.steps_made

    @property
    def staleness(self) -> int:
        """Steps that were applied between the parameters of this worker's last gradient and that gradient."""
        result = self._session.last_result
        return result.staleness if result is not None else 0

    @property
    def gradient_norm(self) -> float | None:
        """See `Optimizer.gradient_norm`."""
        return self._optimizer.gradient_norm

    @property
    def last_result(self) -> StepResult | None:
        """See `Optimizer.last_result`."""
        return self._optimizer.last_result

    @property
    def transport(self) -> tuple[str, str]:
        """See `Optimizer.transport`."""
        return self._optimizer.transport

    @property
    def current_step(self) -> int:
        """Steps that the server has applied, as far as this worker knows."""
        return self._optimizer.current_step

    @overload
    def pull(
        self, names: Sequence[str] = (), *, newer_than: None = None, out: Mapping[str, np.ndarray] | None = None
    ) -> HostedParameters: ...

    @overload
    def pull(
        self, names: Sequence[str] = (), *, newer_than: int | None, out: Mapping[str, np.ndarray] | None = None
    ) -> HostedParameters | None: ...

    def pull(
        self,
        names: Sequence[str] = (),
        *,
        newer_than: int | None = None,
        out: Mapping[str, np.ndarray] | None = None,
    ) -> HostedParameters | None:
        """Read the parameters, all of one step. Compute the next gradient at these.

        See `Optimizer.pull_parameters`.
        """
        found = self._optimizer.pull_parameters(names, newer_than=newer_than, out=out)
        if found is not None:
            self._session.at_step = found.step
        return found

    def refresh(self) -> None:
        """Read from the server which step was the last one under this worker's name. Call `pull` next.

        Raises:
            WorkerReplacedError: This life of the worker is over.
        """
        self._optimizer.refresh()
        self._continue_after(self._register().last_request_id)

    def cancel(self) -> None:
        """Interrupt the step that another thread is making, if there is one; it raises StepCancelledError there."""
        self._optimizer.cancel()

    def step(  # noqa: PLR0913 - each is a choice of its own, by name
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
        """Send the gradients that this worker has computed; see `Optimizer.step`.

        It returns when the server has applied them. The optimizer's consistency decides whether that is at once, later,
        or together with the gradients of other workers. With Sync consistency a step cannot have hyper-parameters of
        its own, because several workers make it together.

        Raises:
            GradientLateError: The step was applied without this gradient; pull, and compute another gradient.
            WorkerReplacedError: Another life has begun under this worker's name; this gradient was not applied.
            TooFewWorkersError: Too few workers were alive until the deadline. After 2 s, and then every 30 s, a warning
                in the log names the live workers.
            OptserveError: As for `Optimizer.step`.
        """
        patience = self._connection.patience(timeout_s)
        try:
            options = self._optimizer._options(hyperparameters, with_gradient_norm=with_gradient_norm)
            arrays = self._optimizer._step(
                patience, grads, curvature=curvature, out=out, reply=reply, partial=partial, options=options
            )
        except StepInDoubtError as error:
            if reply != "parameters" or getattr(error.__cause__, "reason", "") != _reasons.REPLY_GONE:
                raise
            # The step was applied, but the server was restarted and has lost the reply. Newer parameters replace it.
            try:
                return self._pull_newer(patience, list(grads), out)
            except OptserveError as failed:
                # By itself this would say that the step was not applied, or may not have been.
                raise error from failed
        if reply == "parameters":
            self._session.at_step = self.current_step
        return arrays

    def _pull_newer(
        self, patience: Patience, names: Sequence[str], out: Mapping[str, np.ndarray] | None
    ) -> dict[str, np.ndarray]:
        patience.check()
        self._optimizer._refresh(patience)
        self._continue_after(self._register(max(patience.left_s, 0.001)).last_request_id)
        found = self._optimizer._pull_parameters(names, None, out, max(patience.left_s, 0.001))
        if found is None:
            return {}
        self._session.at_step = found.step
        return found.arrays

    def _continue_after(self, last_request_id: str) -> None:
        """Continue after the last step under this worker's name, in the present life."""
        self._session.streams.open_request.life = self._life
        self._session.life.continue_after(last_request_id)

    def _register(self, timeout_s: float | None = None) -> replicas_pb2.ReportWorkerResponse:
        response = self._report(replicas_pb2.WORKER_STATE_ALIVE, timeout_s=timeout_s)
        lease_s = replies.seconds(response.lease)
        if not lease_s:
            raise replies.invalid_reply("a worker's lease is 0 s")
        self._renew_every_s = min(max(0.1, lease_s / RENEWALS_PER_LEASE), MAX_RENEWAL_S)
        return response

    def _report(
        self, state: replicas_pb2.WorkerState, *, timeout_s: float | None = None
    ) -> replicas_pb2.ReportWorkerResponse:
        request = replicas_pb2.ReportWorkerRequest(name=self._resource, worker=self.name, state=state, life=self._life)
        response = self._connection.call(self._connection.stub.ReportWorker, request, timeout_s=timeout_s)
        self.live_workers = response.live_workers
        return response

    def _renew_lease(self) -> None:
        while not self._done.wait(self._renew_every_s):
            try:
                self._register()
            except (WorkerReplacedError, ClientUseError) as error:
                # Another life has the name, or the client was closed during the block.
                logger.warning("the lease of %s is not renewed any more: %s", self.name, error)
                return
            # Catches any error, also of an interceptor: without this thread the worker would soon count as dead.
            except Exception as error:  # noqa: BLE001
                logger.warning("the lease of %s could not be renewed: %s", self.name, error)
