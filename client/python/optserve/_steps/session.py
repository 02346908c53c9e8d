"""The steps of one optimizer: each is applied exactly once, over as many streams as it takes.

A step has a request id, and is sent under it until the server answers. If a deadline or a cancellation interrupts the
call, the step is unsettled. Before the next step the client asks the server whether it was applied. The server may
apply it even after that, so it stays unsettled until a later step was applied.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np

from optserve._rpc.connection import Connection
from optserve._rpc.deadline import CallLock, Patience
from optserve._rpc.retry import Backoff
from optserve._steps.error_feedback import ErrorFeedback
from optserve._steps.gradients import Gradients
from optserve._steps.outcomes import Outcomes
from optserve._steps.shared_memory import SharedStaging
from optserve._steps.stream import StepRefused, StepStream
from optserve._steps.streams import Streams
from optserve._steps.updates import Updates
from optserve._steps.verdict import Action, Ending, NotApplied, Verdict, is_never_known, judge, never_known, next_try
from optserve.errors import (
    DeadlineExceededError,
    FailedPreconditionError,
    InternalError,
    OptserveError,
    StepInDoubtError,
    WrongStepError,
)
from optserve.v1 import steps_pb2

logger = logging.getLogger(__name__)

_LEAVE_WAIT_S = 2.0
"""How long `leave` waits for the step that it has interrupted."""


class StepSession:
    """Makes the steps of one optimizer object, one at a time. Safe to use from several threads.

    Args:
        connection: To the server.
        streams: Opens the streams on which steps are sent.
        register: Registers the worker with the server once more, within so many seconds; None for a client that is no
            worker.
        feedback: Adds rounding errors to the next gradients; None without error feedback.

    Attributes:
        streams: As above.
        known: The state of the optimizer, as far as this client knows it.
        at_step: The step of the parameters at which a worker takes its gradients; None for other clients.
        life: Makes the request ids, and counts the steps.
        last_result: The server's result of the last step; None before the first one.
        outcomes: The unsettled steps.
    """

    def __init__(
        self,
        connection: Connection,
        streams: Streams,
        *,
        register: Callable[[float], object] | None = None,
        feedback: ErrorFeedback | None = None,
    ) -> None:
        self.known = streams.known
        self.life = streams.life
        self.at_step: int | None = None
        self.last_result: steps_pb2.Result | None = None
        self.outcomes = Outcomes(feedback)
        self._connection = connection
        self.streams = streams
        self._is_worker = bool(streams.open_request.worker)
        self._name = streams.name
        self._register = register
        self._call_lock = CallLock(connection.clock)
        self._patience: Patience | None = None

    def step(self, gradients: Gradients, updates: Updates, patience: Patience) -> str:
        """Make one new step. Returns its request id.

        Raises:
            OptserveError: See `Optimizer.step`.
        """
        self._acquire(patience)
        try:
            if self.outcomes.unsettled or self.outcomes.overtaken:
                self._raise_if_applied(patience)
            request_id = self.life.next_request_id()
            self.outcomes.begin(request_id, gradients)
            try:
                self._exchange(request_id, gradients, updates, patience)
            except NotApplied as refusal:
                self.outcomes.refused(request_id)
                # The server may have applied the interrupted step after the client asked about it.
                if self.outcomes.unsettled and isinstance(refusal.error, WrongStepError):
                    self._raise_if_applied(patience)
                raise refusal.error from None
            self.outcomes.applied(request_id)
            self.life.record_step(request_id)
            # Raises if the call was cancelled meanwhile: the caller does not get the updates then.
            patience.settle()
            self.outcomes.received(request_id)
            return request_id
        finally:
            self._release()

    def replay(self, make_updates: Callable[[list[int]], Updates], patience: Patience) -> None:
        """Receive the reply of the last applied step once more.

        Args:
            make_updates: Makes the arrays for the reply, from the indices of the parameters in it; no index means all.
            patience: How long to try.

        Raises:
            OptserveError: See `Optimizer.replay`.
        """
        with self.locked(patience):
            self._raise_if_overtaken()
            opened, unsettled = self._reopen(patience).opened, self.outcomes.unsettled
            if unsettled and opened.last_request_id not in unsettled:
                raise FailedPreconditionError(
                    f"The last step of {self._name} on the server, which is at step {opened.step}, is not the "
                    "interrupted one. If no other client steps this optimizer, the interrupted step was not applied: "
                    "send it with step()."
                )
            if not opened.last_request_id:
                raise FailedPreconditionError(f"{self._name} has not been stepped, so there is nothing to replay.")
            updates = make_updates(list(opened.last_tensors))
            try:
                self._exchange(opened.last_request_id, None, updates, patience)
            except NotApplied as refusal:
                raise refusal.error from None
            self.outcomes.applied(opened.last_request_id)
            self.outcomes.received(opened.last_request_id)

    def refresh(self, read: Callable[[], tuple[int, str]], patience: Patience) -> None:
        """Adopt the server's step and lineage, which `read` returns, and forget the unsettled steps."""
        with self.locked(patience):
            step, lineage = read()
            state_is_another = lineage != self.known.lineage or step < self.known.step
            self.known.step = step
            if state_is_another:
                self.streams.close()
                self.known.lineage = lineage
            elif self.outcomes.errors_are_undecided:
                self.outcomes.applied(self._reopen(patience).opened.last_request_id)
            self.outcomes.forget(state_is_another=state_is_another)

    def stream(self, patience: Patience) -> StepStream:
        """The stream of the next step, opened if it is not open."""
        # Not `locked`: `Optimizer.buffers` calls this before each step.
        self._acquire(patience)
        try:
            return self.streams.current or self.streams.get(patience)
        finally:
            self._release()

    def cancel(self) -> None:
        """Interrupt the present step, if there is one; it raises StepCancelledError in its own thread."""
        patience = self._patience
        if patience is not None:
            patience.cancel()

    def leave(self) -> None:
        """Interrupt the present step, close the stream, and refuse every later step."""
        self.life.leave()
        self.cancel()
        try:
            self._call_lock.acquire(self._connection.patience(_LEAVE_WAIT_S))
        except DeadlineExceededError as error:
            # The step waits for a report to a server that does not answer. It ends by itself.
            logger.debug("%s", error)
            return
        try:
            self.streams.close()
        finally:
            self._call_lock.release()

    def close(self) -> None:
        """Close the stream; the next step opens another."""
        with self.locked(self._connection.patience(self._connection.config.timeout_s)):
            self.streams.close()

    @contextmanager
    def locked(self, patience: Patience) -> Iterator[None]:
        """Hold the call lock for the length of a with-block."""
        self._acquire(patience)
        try:
            yield
        finally:
            self._release()

    def _acquire(self, patience: Patience) -> None:
        """Wait for the calls of other threads, and take the call lock."""
        self._connection.check_usable()
        self.life.check_active()
        self._call_lock.acquire(patience)
        self._patience = patience
        # Checked once more, now that this call can be cancelled: `leave` first ends the life, then cancels.
        if self.life.ended is not None:
            self._release()
            self.life.check_active()

    def _release(self) -> None:
        """Give the call lock back."""
        self._patience = None
        self._call_lock.release()

    def _raise_if_applied(self, patience: Patience) -> None:
        """Raise StepInDoubtError if an unsettled step was applied, or if that cannot be found out."""
        self._raise_if_overtaken()
        opened = self._reopen(patience).opened
        if opened.last_request_id in self.outcomes.unsettled:
            self.outcomes.applied(opened.last_request_id)
            self.known.step = opened.step
            raise StepInDoubtError(
                f"The interrupted step of {self._name} was applied. Call replay() for its updates, or refresh() to go "
                "on without them."
            )
        # The server reports the last step of each worker by itself, so an unsettled step of this worker that is not its
        # last one was not applied.
        if opened.step != self.known.step and not self._is_worker:
            raise StepInDoubtError(
                f"{self._name} is at step {opened.step}, not {self.known.step}: another client steps it. Whether the "
                "interrupted step was applied is no longer known. Call refresh() to go on."
            )

    def _raise_if_overtaken(self) -> None:
        if self.outcomes.overtaken:
            raise StepInDoubtError(
                f"An interrupted step of {self._name} was applied, and others after it; the server no longer has its "
                "updates. Call refresh() to go on without them."
            )

    def _exchange(self, request_id: str, gradients: Gradients | None, updates: Updates, patience: Patience) -> None:
        """Send a step until the server answers; without gradients, ask for the reply of an applied step.

        Raises:
            NotApplied: The server has refused the first try, so the step was certainly not applied.
            OptserveError: Any other failure; the step may have been applied.
        """
        backoff: Backoff | None = None
        # Whether an earlier try may have applied the step.
        in_doubt = False
        shared: SharedStaging | None = None
        while True:
            sent = False
            try:
                stream = self.streams.current or self.streams.get(patience)
                # An earlier try was applied: ask for its reply, without sending the gradients.
                applied = stream.opened.last_request_id == request_id
                if gradients is not None and not applied:
                    if gradients.options is not None:
                        stream.check_step_settings()
                    self._check_intact(gradients, updates, shared)
                if shared is not None and shared is not stream.shared:
                    # The segment belongs to a closed stream. Errors keep their frames, and so this object, for long.
                    shared.release()
                if backoff is not None:
                    updates.reset()
                sent, shared = True, stream.shared
                result = stream.step(
                    self.streams.begin(request_id, self.at_step), None if applied else gradients, updates, patience
                )
                self._record_result(result, known=in_doubt or gradients is None)
            except StepRefused as refusal:
                error, ending = refusal.error, Ending.REFUSED
                self.life.note_error(error)
            except OptserveError as lost:
                self.streams.close()
                error, ending = lost, Ending.LOST if sent else Ending.NOT_SENT
            # For example KeyboardInterrupt. The reply of this step must not be taken for that of a later one.
            except BaseException:
                self.streams.close()
                raise
            else:
                # A variable that keeps an error also keeps its frames, and with them the caller's arrays.
                error = None
                return
            verdict = judge(error, ending, in_doubt=in_doubt, can_register=self._register is not None)
            in_doubt = verdict.in_doubt
            backoff = backoff or Backoff(self._connection.config, self._connection.clock)
            self._carry_out(verdict, error, patience, backoff)

    def _carry_out(self, verdict: Verdict, error: OptserveError, patience: Patience, backoff: Backoff) -> None:
        """Do what a verdict says: return for another try, or raise the step's error."""
        if verdict.closes_stream:
            self.streams.close()
        match verdict.action:
            case Action.NOT_APPLIED:
                raise NotApplied(error)
            case Action.IN_DOUBT:
                raise never_known(self._name, error) from error
            case Action.RAISE:
                raise error
            case Action.RETRY | Action.REGISTER as action:
                try:
                    self._pause(patience, backoff, error, action)
                except OptserveError as ended:
                    if not verdict.in_doubt:
                        raise NotApplied(ended) from None
                    # The worker may have been replaced while it registers: that says nothing of a try before.
                    if is_never_known(ended):
                        raise never_known(self._name, ended) from ended
                    raise ended from None

    def _pause(self, patience: Patience, backoff: Backoff, error: OptserveError, action: Action) -> None:
        """Wait before the next try, and register the worker if that is needed."""
        patience.pause(backoff.next_pause_s(error), error)
        if action is Action.REGISTER and self._register is not None:
            self._register(max(patience.left_s, 0.001))

    def _record_result(self, result: steps_pb2.Result, *, known: bool) -> None:
        """Record a step's result; `known` if the step was sent before, so that a replay is a right answer."""
        self.known.step, self.last_result = result.step, result
        if result.replayed and not known:
            raise InternalError(
                f"The server answers a new step of {self._name} with a replay, although it was sent once only."
            )

    def _check_intact(self, gradients: Gradients, updates: Updates, shared: SharedStaging | None) -> None:
        """Raise StepInDoubtError if an earlier try has overwritten the gradients by updates."""
        received = updates.begun and any(
            np.may_share_memory(gradient, update) for gradient in gradients.arrays for update in updates.arrays
        )
        if received or (shared is not None and shared.has_overwritten(self.known.step + 1, gradients.arrays)):
            raise StepInDoubtError(
                f"The connection was lost in the middle of a step of {self._name}. The reply has overwritten some of "
                "its gradients, and the server has lost the step. Call refresh(), and compute the gradients anew."
            )

    def _reopen(self, patience: Patience) -> StepStream:
        """Open a new stream: `opened` says what the server's last step is at this moment."""
        backoff = Backoff(self._connection.config, self._connection.clock)
        while True:
            self.streams.close()
            try:
                return self.streams.get(patience)
            except OptserveError as error:
                action = next_try(error, can_register=self._register is not None)
                if action is None:
                    raise
                self._pause(patience, backoff, error, action)
