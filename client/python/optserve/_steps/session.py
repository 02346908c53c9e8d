"""The steps of one optimizer, exactly once each, over as many connections as it takes.

A step is sent under a request id of its own until it is answered. If its call is interrupted, by a deadline or by a
cancellation, the step is unsettled: whether the server has applied it is found out before the next one is made, and as
it may even then be about to be applied, it stays unsettled until a later step is known to have taken its place.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np

from optserve._rpc.connection import Transport
from optserve._rpc.deadline import Patience, Turn
from optserve._rpc.retry import Backoff
from optserve._steps.error_feedback import ErrorFeedback
from optserve._steps.gradients import Gradients
from optserve._steps.outcomes import Outcomes
from optserve._steps.shared_memory import SharedStaging
from optserve._steps.stream import StepRefused, StepStream
from optserve._steps.streams import Streams
from optserve._steps.updates import Updates
from optserve._steps.verdict import Action, Ending, NotApplied, Verdict, judge, next_try
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
"""How long a step that was interrupted is waited for."""


class StepSession:
    """One optimizer's stream and what is known of its steps. Safe to use from several threads.

    Args:
        connection: To the server.
        streams: Those that its steps take.
        register: Makes the server know the worker once more; None where there is none.
        feedback: Adds what rounding has left out; None where nothing is rounded, or that is not wanted.

    Attributes:
        streams: Likewise.
        known: What is known of the optimizer.
        at_step: The step of the parameters that gradients are taken at, for a worker among several.
        life: Makes the request ids, and counts the steps.
        staleness: Steps of others between those parameters and the last step.
        gradient_norm: Of the last step's gradient before clipping, where the server has computed it.
        outcomes: What became of steps whose callers do not know it.
    """

    def __init__(
        self,
        connection: Transport,
        streams: Streams,
        *,
        register: Callable[[], object] | None = None,
        feedback: ErrorFeedback | None = None,
    ) -> None:
        self.known = streams.known
        self.life = streams.life
        self.at_step: int | None = None
        self.staleness = 0
        self.gradient_norm: float | None = None
        self.outcomes = Outcomes(feedback)
        self._connection = connection
        self.streams = streams
        self._is_worker = bool(streams.open_request.worker)
        self._name = streams.name
        self._register = register
        self._only_one = Turn(connection.clock)
        self._patience: Patience | None = None

    def step(self, gradients: Gradients, updates: Updates, patience: Patience) -> str:
        """Make one new step; gives its request id.

        Raises:
            OptserveError: See `Optimizer.step`.
        """
        self._begin_turn(patience)
        try:
            if self.outcomes.unsettled or self.outcomes.overtaken:
                self._raise_if_applied(patience)
            request_id = self.life.next_request_id()
            self.outcomes.begin(request_id, gradients)
            try:
                self._exchange(request_id, gradients, updates, patience)
            except NotApplied as refusal:
                self.outcomes.refused(request_id)
                # The server may have come to commit an interrupted step only after it was asked about it.
                if self.outcomes.unsettled and isinstance(refusal.error, WrongStepError):
                    self._raise_if_applied(patience)
                raise refusal.error from None
            self.outcomes.applied(request_id)
            self.life.made(request_id)
            # Cancelled at the last moment: the caller will not get the updates.
            patience.settle()
            self.outcomes.received(request_id)
            return request_id
        finally:
            self._end_turn()

    def replay(self, make_updates: Callable[[list[int]], Updates], patience: Patience) -> None:
        """Receive the reply of the last applied step once more.

        Args:
            make_updates: Given the parameters that took part in it, none for all, where the reply goes.
            patience: How long to try.

        Raises:
            OptserveError: See `Optimizer.replay`.
        """
        with self._turn(patience):
            self._raise_if_overtaken()
            opened, unsettled = self._reopened(patience).opened, self.outcomes.unsettled
            if unsettled and opened.last_request_id not in unsettled:
                raise FailedPreconditionError(
                    f"The last step of {self._name} on the server, which is at step {opened.step}, is not the "
                    "interrupted one. If nobody else steps this optimizer, that one was not applied: step again."
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

    def refresh(self, read: Callable[[], tuple[int, str]]) -> None:
        """Take the server's step and lineage, which `read` gives, for granted, and give up what was unsettled."""
        patience = self._connection.patience(self._connection.config.timeout_s)
        with self._turn(patience):
            step, lineage = read()
            state_is_another = lineage != self.known.lineage or step < self.known.step
            self.known.step = step
            if state_is_another:
                self.streams.close()
                self.known.lineage = lineage
            elif self.outcomes.errors_are_undecided:
                self.outcomes.applied(self._reopened(patience).opened.last_request_id)
            self.outcomes.forget(state_is_another=state_is_another)

    def stream(self, patience: Patience) -> StepStream:
        """The stream of the next step, opened if it is not open."""
        with self._turn(patience):
            return self.streams.get(patience)

    def cancel(self) -> None:
        """Interrupt the step that is being made, if there is one; it raises in its thread."""
        patience = self._patience
        if patience is not None:
            patience.cancel()

    def leave(self) -> None:
        """Interrupt the step that is being made, close the stream, and let no other step be made."""
        self.life.leave()
        self.cancel()
        try:
            self._only_one.take(self._connection.patience(_LEAVE_WAIT_S))
        except DeadlineExceededError as error:
            # It is reporting to a server that does not answer, and ends by itself.
            logger.debug("%s", error)
            return
        try:
            self.streams.close()
        finally:
            self._only_one.give_back()

    def close(self) -> None:
        """Close the stream; the next step opens another."""
        with self._turn(self._connection.patience(self._connection.config.timeout_s)):
            self.streams.close()

    @contextmanager
    def _turn(self, patience: Patience) -> Iterator[None]:
        """For the length of a with-block, let no other thread be in the middle of a step."""
        self._begin_turn(patience)
        try:
            yield
        finally:
            self._end_turn()

    def _begin_turn(self, patience: Patience) -> None:
        """What `_turn` does at its beginning: wait for other threads."""
        self._connection.check_usable()
        self.life.check_goes_on()
        self._only_one.take(patience)
        self._patience = patience
        try:
            # Now that it can be cancelled: `leave` ends the life first, and cancels then.
            self.life.check_goes_on()
        except OptserveError:
            self._end_turn()
            raise

    def _end_turn(self) -> None:
        """What `_turn` does at its end."""
        self._patience = None
        self._only_one.give_back()

    def _raise_if_applied(self, patience: Patience) -> None:
        """Raise StepInDoubtError unless no unsettled step has been applied so far."""
        self._raise_if_overtaken()
        opened = self._reopened(patience).opened
        if opened.last_request_id in self.outcomes.unsettled:
            self.outcomes.applied(opened.last_request_id)
            self.known.step = opened.step
            raise StepInDoubtError(
                f"The interrupted step of {self._name} had been applied. Call replay() for its updates, or refresh() "
                "to go on without them."
            )
        # What a worker has done is told worker by worker, so whatever its last step is not was not applied.
        if opened.step != self.known.step and not self._is_worker:
            raise StepInDoubtError(
                f"{self._name} is at step {opened.step}, not {self.known.step}: somebody else steps it, and whether "
                "the interrupted step was applied is no longer known. Call refresh() to go on."
            )

    def _raise_if_overtaken(self) -> None:
        if self.outcomes.overtaken:
            raise StepInDoubtError(
                f"An interrupted step of {self._name} had been applied, and others after it, so its updates are no "
                "longer to be had. Call refresh() to go on without them."
            )

    def _exchange(self, request_id: str, gradients: Gradients | None, updates: Updates, patience: Patience) -> None:
        """Send a step until it is answered; without gradients, ask for the reply of one that has been applied.

        Raises:
            NotApplied: The server has refused it at the first try, so it was certainly not applied.
            OptserveError: Anything else, after which that is open.
        """
        backoff: Backoff | None = None
        # Whether a try before the present one may have applied the step.
        in_doubt = False
        shared: SharedStaging | None = None
        while True:
            sent = False
            try:
                stream = self.streams.now or self.streams.get(patience)
                # What has been applied is only asked for again; the gradients need not travel.
                applied = stream.opened.last_request_id == request_id
                if gradients is not None and not applied:
                    self._check_intact(gradients, updates, shared)
                if shared is not None and shared is not stream.shared:
                    # That of a stream which is gone; errors with their frames may keep the object itself for long.
                    shared.release()
                updates.reset()
                sent, shared = True, stream.shared
                result = stream.step(self._begin(request_id), None if applied else gradients, updates, patience)
                self._take(result, known=in_doubt or gradients is None)
            except StepRefused as refusal:
                error, ending = refusal.error, Ending.REFUSED
                self.life.note(error)
            except OptserveError as lost:
                self.streams.close()
                error, ending = lost, Ending.LOST if sent else Ending.NOT_SENT
            # KeyboardInterrupt above all: what is still on its way must not be taken for a later step's reply.
            except BaseException:
                self.streams.close()
                raise
            else:
                # An error that is kept keeps the frames that it came through, and with them the caller's arrays.
                error = None
                return
            verdict = judge(error, ending, in_doubt=in_doubt, can_register=self._register is not None)
            in_doubt = verdict.in_doubt
            backoff = backoff or Backoff(self._connection.config, self._connection.clock)
            self._carry_out(verdict, error, patience, backoff)

    def _carry_out(self, verdict: Verdict, error: OptserveError, patience: Patience, backoff: Backoff) -> None:
        """Do what a verdict says: return for another try, or raise what the step ends with."""
        if verdict.closes_stream:
            self.streams.close()
        match verdict.action:
            case Action.NOT_APPLIED:
                raise NotApplied(error)
            case Action.IN_DOUBT:
                raise StepInDoubtError(
                    f"The connection was lost in the middle of a step of {self._name}, and then: {error.message} "
                    "Whether the step was applied is no longer known. Call refresh() to go on."
                ) from error
            case Action.RAISE:
                raise error
            case Action.RETRY | Action.REGISTER as action:
                try:
                    self._pause(patience, backoff, error, action)
                except OptserveError as ended:
                    raise ended if verdict.in_doubt else NotApplied(ended) from None

    def _pause(self, patience: Patience, backoff: Backoff, error: OptserveError, action: Action) -> None:
        """Do what is to be done before a step or a stream is tried again."""
        patience.pause(backoff.next_s(error), error)
        if action is Action.REGISTER and self._register is not None:
            self._register()

    def _take(self, result: steps_pb2.Result, *, known: bool) -> None:
        """Take a step's result; `known` if this object has sent the step before, or asks for a reply."""
        self.known.step, self.staleness = result.step, result.staleness
        self.gradient_norm = result.gradient_norm if result.HasField("gradient_norm") else None
        if result.replayed and not known:
            raise InternalError(
                f"The server says that a new step of {self._name} had been applied before, which it cannot have been."
            )

    def _begin(self, request_id: str) -> steps_pb2.StreamStepsRequest:
        """The first message of a step."""
        request = steps_pb2.StreamStepsRequest()
        begin = request.begin
        begin.request_id = request_id
        if not self._is_worker:
            begin.expected_step = self.known.step
        elif self.at_step is not None:
            begin.parameters_step = self.at_step
        return request

    def _check_intact(self, gradients: Gradients, updates: Updates, shared: SharedStaging | None) -> None:
        """Raise StepInDoubtError if an earlier try has put updates where the gradients were."""
        received = updates.begun and any(
            np.may_share_memory(gradient, update) for gradient in gradients.arrays for update in updates.arrays
        )
        if received or (shared is not None and shared.has_overwritten(self.known.step + 1, gradients.arrays)):
            raise StepInDoubtError(
                f"The connection was lost in the middle of a step of {self._name}, whose updates had begun to take the "
                "place of its gradients, and the server has lost that step. Call refresh() and step again."
            )

    def _reopened(self, patience: Patience) -> StepStream:
        """A new stream: what the server says when a stream is opened is true of that moment only."""
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
