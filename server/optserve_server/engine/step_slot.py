"""A step slot: a staging buffer, the step that holds it, and the last reply.

There are two kinds: the `ClientSlot` of an optimizer, and the `WorkerSlot` of each worker (`workers/worker_slot.py`).

At most one `Step` holds the buffer, from its begin until its reply was read or the step is closed. The same request id
on another connection takes the step over: the client has abandoned the first connection. Another request is refused
with STEP_IN_PROGRESS, unless the holder has made no progress for long.
"""

from __future__ import annotations

import abc
import logging
from collections.abc import Callable
from typing import TypeVar

from optserve._common.clock import SYSTEM, Clock, Lock
from optserve_server.domain.errors import OptserveError, Reason
from optserve_server.engine.transaction import NOTHING, PARAMETERS, Outcome, Reply, ReplyChunk, Retained, Step
from optserve_server.numerics.headroom import NATIVE
from optserve_server.numerics.layout import Operand, Run
from optserve_server.numerics.shared_segment import Segment
from optserve_server.numerics.staging import Staging
from optserve_server.numerics.state import State
from optserve_server.numerics.trial import check_reply

logger = logging.getLogger(__name__)

_Used = TypeVar("_Used")


class StepSlot(abc.ABC):
    """The base of both kinds. Methods with a `step` take the lock; the others are called with the lock held.

    Args:
        name: The optimizer's name, for messages.
        state: The optimizer's state.
        lock: Guards the slot.
        commit: Applies a step that holds the buffer.
        idle_step_s: Seconds without progress after which a step is discarded.
        clock: The time.

    Attributes:
        optimizer: The optimizer's name.
        buffer: The staging buffer; None if there is none at the moment.
        holder: The step that holds the buffer; None if it is free.
        retained: The last step that was applied from this slot.
    """

    def __init__(
        self,
        name: str,
        state: State,
        lock: Lock,
        commit: Callable[[Step], Outcome],
        idle_step_s: float,
        clock: Clock = SYSTEM,
    ) -> None:
        self.optimizer = name
        self.monotonic = clock.monotonic
        self._state = state
        self._idle_step_s = idle_step_s
        self.lock = lock
        self.commit = commit
        self.buffer: Staging | None = None
        self.holder: Step | None = None
        self.retained: Retained | None = None

    @property
    @abc.abstractmethod
    def staging(self) -> Staging:
        """`buffer`; raises STEP_TAKEN_OVER if there is none at the moment."""

    @abc.abstractmethod
    def _has_reply(self, retained: Retained, reply: Reply) -> bool:
        """Whether the slot still has this reply of the last step."""

    @abc.abstractmethod
    def _became_free(self) -> None:
        """The step that held the buffer has ended; called with the lock held or not."""

    @abc.abstractmethod
    def leave_segment(self) -> None:
        """Move the buffer out of a client's segment, because a step is about to stage chunks in it."""

    @abc.abstractmethod
    def check_overwritten(self) -> None:
        """Find out whether a client has overwritten the retained reply."""

    @property
    def last_request_id(self) -> str:
        """Request id of the last applied step; empty if there is none."""
        return self.retained.request_id if self.retained else ""

    def find_replay(self, request_id: str, reply: Reply) -> Retained | None:
        """The last step, if the request is a retry of it; else None.

        Raises:
            OptserveError: STEP_IN_PROGRESS, if another step holds the buffer; REPLY_GONE.
        """
        self.check_overwritten()
        retained = self.retained
        replayed = retained if retained is not None and retained.request_id == request_id else None
        if self.holder and self.holder.request_id != request_id:
            self.evict_if_idle()
        if replayed and reply is not NOTHING and not self._has_reply(replayed, reply):
            raise OptserveError(
                Reason.REPLY_GONE,
                f"Step {replayed.step} of {self.optimizer} was applied, but another step has been begun since, and its "
                "reply is no longer retained.",
                step=replayed.step,
            )
        return replayed

    def evict_if_idle(self) -> None:
        """Discard the step that holds the buffer, or raise STEP_IN_PROGRESS if it has made progress lately."""
        if self.holder and not self._discard_if_idle(self.holder):
            raise self.in_progress()

    def inherit_progress(self, step: Step, holder: Step) -> None:
        """Give a new step the progress time of the holder that it replaces.

        A takeover is no progress: otherwise two connections could hold the buffer for ever without sending a byte.
        """
        if not step.replay:
            step.last_progress_at = holder.last_progress_at

    def in_progress(self) -> OptserveError:
        """The error for a call that would disturb the step that holds the buffer."""
        return OptserveError(
            Reason.STEP_IN_PROGRESS,
            f"Another connection is in the middle of a step on {self.optimizer}; try again when it has ended.",
        )

    def _discard_if_idle(self, holder: Step) -> bool:
        if self.monotonic() - holder.last_progress_at < self._idle_step_s:
            return False
        logger.warning(
            "request %s on %s has made no progress for long; it is discarded", holder.request_id, self.optimizer
        )
        self.holder = None
        self._became_free()
        return True

    def discard_idle(self) -> None:
        """Discard the step under way if it has made no progress for long."""
        # If the lock is taken, there is progress.
        if self.lock.acquire(blocking=False):
            try:
                # A committed step is not discarded: only its reply is still being read.
                if self.holder and not self.holder.committed:
                    self._discard_if_idle(self.holder)
            finally:
                self.lock.release()

    def take_shared_gradients(self, step: Step, segment: Segment) -> None:
        """Take the gradients of a step out of its client's segment.

        Raises:
            OptserveError: MISSING_CHUNK, NON_FINITE_VALUE, GRADIENT_OVERFLOW or STEP_TAKEN_OVER.
        """
        if step.replay:
            return
        staging = self.check_holds(step)
        if not segment.is_dirty:
            # Otherwise the last reply, or the last gradient, would be taken for a new gradient.
            raise OptserveError(
                Reason.MISSING_CHUNK,
                "The dirty word of the shared memory has not been set since gradients were last taken from there, so "
                "this step has brought none. Set it, write all gradients of the step, and send begin and commit again.",
                field="commit",
            )
        if self.retained:
            self.retained.intact = False
        # Cleared, so that the same gradients are not taken twice.
        segment.clear_dirty()
        staging.take_gradients(segment, step.payload, step.largest)
        step.gradients_taken = True

    def check_replay(self, step: Step) -> None:
        """Raise REPLY_OVERFLOW unless the reply fits the wire dtype of the replay, which may be another one."""
        if step.reply_wires is not NATIVE:
            check_reply(self._state, step.payload, step.reply_source)

    def write_shared_reply(self, step: Step, number: int) -> None:
        """Write the reply of step `number` into the client's segment, if there is one."""
        if step.segment and step.replies is not NOTHING:
            self.staging.write_reply(step.segment, step.payload, number, step.reply_source)

    # Calls of the step that holds the buffer.

    def check_holds(self, step: Step) -> Staging:
        """Check, with the lock held, that the step still holds the buffer; returns the buffer."""
        staging = self.buffer
        if self.holder is not step or staging is None:
            raise OptserveError(
                Reason.STEP_TAKEN_OVER,
                f"Another connection has taken request {step.request_id} over, or it had made no progress for long.",
            )
        step.last_progress_at = self.monotonic()
        return staging

    def stage(self, step: Step, position: int, data: memoryview | bytes, operand: Operand) -> None:
        """See Holder."""
        with self.lock:
            last_progress_at = step.last_progress_at
            staging = self.check_holds(step)
            step.coverage[operand].add(position, position + len(data))
            if not len(data):
                # An empty chunk is no progress: otherwise empty chunks could hold the buffer for ever.
                step.last_progress_at = last_progress_at
            if self.retained:
                self.retained.intact = False
            staging.stage(step.payload, operand, position, data, step.largest)

    def read(self, step: Step, run: Run, begin: int, end: int, use: Callable[[ReplyChunk], _Used]) -> _Used:
        """See Holder."""
        with self.lock:
            elements = self.check_holds(step).to_wire(step.reply_source, run, begin, end)
            tensor, offset = step.payload.locate(begin)
            # Under the lock, so that nobody overwrites the reply meanwhile.
            return use(ReplyChunk(tensor, offset, elements.data.cast("B"), end == step.payload.size_bytes))

    def whole(self, step: Step, tensor: int) -> bytes:
        """See Holder."""
        with self.lock:
            self.check_holds(step)
            parameter, start = self._state.layout.parameters[tensor], self._state.layout.starts[tensor]
            return step.reply_source[parameter.dtype][start : start + parameter.size].tobytes()

    def close(self, step: Step) -> None:
        """See Holder."""
        with self.lock:
            if self.holder is not step:
                return
            self.holder = None
        self._became_free()


class ClientSlot(StepSlot):
    """The step slot of an optimizer. It always has its buffer, which a client on the same host may share.

    Attributes:
        on_free: Called when a step has ended, as long as somebody waits for that; see `ChangeQueue`.
    """

    def __init__(
        self,
        name: str,
        state: State,
        lock: Lock,
        commit: Callable[[Step], Outcome],
        idle_step_s: float,
        clock: Clock = SYSTEM,
    ) -> None:
        super().__init__(name, state, lock, commit, idle_step_s, clock)
        self.buffer = self._staging = Staging(state)
        self.on_free: Callable[[], object] | None = None

    @property
    def staging(self) -> Staging:
        """The buffer."""
        return self._staging

    def _has_reply(self, retained: Retained, reply: Reply) -> bool:
        # Nobody else changes x, so it is still the x after that step.
        return reply is PARAMETERS or (retained.intact and retained.holds is reply)

    def _became_free(self) -> None:
        if self.on_free is not None:
            self.on_free()

    def leave_segment(self) -> None:
        """See StepSlot. A client can write into its segment at any time, also during another client's step."""
        if self._staging.segment is not None:
            self._staging.leave_segment()

    def check_overwritten(self) -> None:
        """See StepSlot. If the buffer is the segment, the client can overwrite the reply."""
        segment = self._staging.segment
        if segment and self.retained and self._staging.in_place and segment.is_dirty:
            self.retained.intact = False

    def share(self, *, may_be_in_place: bool) -> Segment | None:
        """Share memory with a client on this host; None if another client has the segment, or there is no memory.

        Args:
            may_be_in_place: Whether the buffer may move into the segment; it does if no step holds it.
        """
        if self._staging.segment is not None:
            return None
        try:
            return self._staging.share(in_place=may_be_in_place and self.holder is None)
        except OSError as error:
            logger.warning("%s is not shared: %s", self.optimizer, error)
            return None

    def unshare(self, segment: Segment) -> None:
        """The client of the segment is gone."""
        if self._staging.segment is segment:
            self.check_overwritten()
            self._staging.unshare()

    def reuse_staging(self) -> Staging:
        """The buffer, for the mean of workers' gradients; its reply is lost."""
        if self.retained:
            self.retained.intact = False
        return self._staging

    def keeps_updates(self, tensor: int) -> bool:
        """Whether the buffer holds the updates that the last step made of a parameter."""
        self.check_overwritten()
        retained = self.retained
        return retained is not None and retained.intact and tensor in retained.selection

    def write_shared_reply(self, step: Step, number: int) -> None:
        """See StepSlot."""
        super().write_shared_reply(step, number)
        if step.segment and self.retained and self._staging.in_place and step.replies is PARAMETERS:
            # x has overwritten the updates.
            self.retained.intact = False
