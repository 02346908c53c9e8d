"""One of several workers that train one model, whose parameters the server holds."""

from __future__ import annotations

import logging
import threading
import uuid
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Self

import numpy as np

from optserve import _replies
from optserve._patience import Patience
from optserve._transport import Transport
from optserve.errors import OptserveError, StepInDoubtError
from optserve.optimizer import Optimizer, ReplyName, TransportName, WireDtype
from optserve.state import HostedParameters
from optserve.v1 import optimizer_pb2, replicas_pb2

logger = logging.getLogger(__name__)

BEATS_PER_LEASE = 3
MAX_BEAT_S = 3600.0
"""A longer lease is renewed as often as one of three hours."""


class Worker:
    """A worker, for the length of a with-block: registered, kept alive in the background, and gone at the end.

    Attributes:
        name: Its own among the optimizer's workers.
        live_workers: How many the server counted when it last heard of this one.

    Example:
        >>> with client.worker("mlp") as worker:              # doctest: +SKIP
        ...     x = worker.pull().arrays
        ...     for batch in batches:
        ...         x = worker.step(gradients(x, batch))
    """

    def __init__(
        self,
        connection: Transport,
        message: optimizer_pb2.Optimizer,
        name: str,
        transport: TransportName = "auto",
        wire_dtype: WireDtype = "native",
    ) -> None:
        self.name = name or f"worker-{uuid.uuid4().hex[:12]}"
        self.live_workers = 0
        self._connection = connection
        self._resource = message.name
        self._optimizer = Optimizer(
            connection, message, transport=transport, wire_dtype=wire_dtype, worker=self.name, register=self._register
        )
        self._done = threading.Event()
        self._beating = threading.Thread(target=self._beat, name=f"optserve {self.name}", daemon=True)
        self._beat_s = 10.0

    def __enter__(self) -> Self:
        self._optimizer.count_from(self._register().last_request_id)
        self._beating.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._done.set()
        self._beating.join()
        try:
            self._optimizer.close()
            self._report(replicas_pb2.WORKER_STATE_LEAVING)
        except OptserveError as failure:
            # Its lease runs out without that; and an error of the block says more.
            logger.warning("%s could not take its leave: %s", self.name, failure)

    @property
    def at_step(self) -> int | None:
        """The step of the parameters that this worker has; None before it has pulled."""
        return self._optimizer.at_step

    @property
    def steps_made(self) -> int:
        """Steps that were applied under this worker's name, those of earlier lives of it included."""
        return self._optimizer.steps_made

    @property
    def staleness(self) -> int:
        """Steps that had been applied between the parameters of this worker's last gradient and that gradient."""
        return self._optimizer.staleness

    @property
    def transport(self) -> tuple[str, str]:
        """See `Optimizer.transport`."""
        return self._optimizer.transport

    @property
    def current_step(self) -> int:
        """Steps that the server has applied, as far as this worker knows."""
        return self._optimizer.current_step

    def pull(
        self,
        names: Sequence[str] = (),
        *,
        newer_than: int | None = None,
        out: Mapping[str, np.ndarray] | None = None,
    ) -> HostedParameters | None:
        """The parameters, all of one step, from which the next gradient is to be computed.

        See `Optimizer.pull_parameters`.
        """
        found = self._optimizer.pull_parameters(names, newer_than=newer_than, out=out)
        if found is not None:
            self._optimizer.at_step = found.step
        return found

    def refresh(self) -> None:
        """Take the server's word for what this worker has done, after an error that says so. Then pull."""
        self._optimizer.refresh()
        self._optimizer.count_from(self._register().last_request_id)

    def cancel(self) -> None:
        """Interrupt the step that another thread is in the middle of, if there is one; it raises there."""
        self._optimizer.cancel()

    def step(
        self,
        grads: Mapping[str, np.ndarray],
        *,
        curvature: Mapping[str, np.ndarray] | None = None,
        out: Mapping[str, np.ndarray] | None = None,
        reply: ReplyName = "parameters",
        partial: bool = False,
        timeout_s: float | None = None,
    ) -> dict[str, np.ndarray]:
        """Send the gradients that this worker has computed; see `Optimizer.step`.

        It returns when they have been applied: at once, when this worker may go on, or with those of the others,
        according to the optimizer's consistency.

        Raises:
            GradientLateError: The step has gone on without this gradient; pull, and compute another.
            OptserveError: As for `Optimizer.step`.
        """
        patience = self._connection.patience(timeout_s)
        try:
            arrays = self._optimizer.step_patiently(
                patience, grads, curvature=curvature, out=out, reply=reply, partial=partial
            )
        except StepInDoubtError as error:
            if reply != "parameters" or getattr(error.__cause__, "reason", "") != "REPLY_GONE":
                raise
            # Applied, but the server has died since and no longer has the reply; newer parameters are as good.
            return self._newer(patience, list(grads), out)
        if reply == "parameters":
            self._optimizer.at_step = self.current_step
        return arrays

    def _newer(
        self, patience: Patience, names: Sequence[str], out: Mapping[str, np.ndarray] | None
    ) -> dict[str, np.ndarray]:
        patience.check()
        self.refresh()
        found = self.pull(names, out=out)
        return found.arrays if found else {}

    def _register(self) -> replicas_pb2.ReportWorkerResponse:
        response = self._report(replicas_pb2.WORKER_STATE_ALIVE)
        lease_s = _replies.seconds(response.lease)
        if not lease_s:
            raise _replies.broken("a worker's lease is 0 s")
        self._beat_s = min(max(0.1, lease_s / BEATS_PER_LEASE), MAX_BEAT_S)
        return response

    def _report(self, state: replicas_pb2.WorkerState) -> replicas_pb2.ReportWorkerResponse:
        request = replicas_pb2.ReportWorkerRequest(name=self._resource, worker=self.name, state=state)
        response = self._connection.call(self._connection.stub.ReportWorker, request)
        self.live_workers = response.live_workers
        return response

    def _beat(self) -> None:
        while not self._done.wait(self._beat_s):
            try:
                self._register()
            except OptserveError as error:
                logger.warning("%s could not report: %s", self.name, error)
