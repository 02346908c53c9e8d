"""The place where one client at a time makes its steps: a staging buffer, who holds it, and what was last answered.

There are two kinds: the `ClientSlot` of an optimizer, and the `WorkerSlot` of each worker that shares it, see
`workers/worker_slot.py`.

At any time at most one `Step` holds the buffer: from its begin until the reply has been read or the step is closed. The
same request id on another connection takes the step over, because it means that the client has given the first
connection up; any other is told to come back later, unless the holder has not moved for long.
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
    """What both kinds share. What it does happens under its lock; methods without a `step` are called with it held.

    Args:
        name: The optimizer's, for messages.
        state: The optimizer's.
        lock: Guards it.
        commit: Applies a step that holds it.
        idle_step_s: After so many seconds without a move, a step is discarded.
        clock: The time.

    Attributes:
        optimizer: Its name.
        holder: The step that has it.
        retained: The last step that was applied from here.
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
        self.holder: Step | None = None
        self.retained: Retained | None = None

    @property
    @abc.abstractmethod
    def staging(self) -> Staging:
        """The buffer; raises STEP_TAKEN_OVER where there is none at the moment."""

    @abc.abstractmethod
    def _keeps(self, retained: Retained, reply: Reply) -> bool:
        """Whether the reply of the last step can still be given."""

    @abc.abstractmethod
    def _became_free(self) -> None:
        """The step that held the buffer has ended; called with the lock held or not."""

    @abc.abstractmethod
    def stage_apart(self) -> None:
        """A step is about to stage chunks, where no other client may write."""

    @abc.abstractmethod
    def look_for_overwriting(self) -> None:
        """Look whether a client has overwritten the retained reply."""

    @property
    def last_request_id(self) -> str:
        """Request id of the last applied step; empty if there is none."""
        return self.retained.request_id if self.retained else ""

    def repeated(self, request_id: str, reply: Reply) -> Retained | None:
        """The last step, if a request is that one once more.

        Raises:
            OptserveError: STEP_IN_PROGRESS, if another step holds the buffer; REPLY_GONE.
        """
        self.look_for_overwriting()
        repeated = self.retained if self.last_request_id == request_id else None
        if self.holder and self.holder.request_id != request_id:
            self.evict_if_idle()
        if repeated and reply is not NOTHING and not self._keeps(repeated, reply):
            raise OptserveError(
                Reason.REPLY_GONE,
                f"Step {repeated.step} of {self.optimizer} was applied, but another step has been begun since, and its "
                "reply is no longer retained.",
                step=repeated.step,
            )
        return repeated

    def evict_if_idle(self) -> None:
        """Discard the step that holds the buffer, or raise STEP_IN_PROGRESS if it has moved lately."""
        if self.holder and not self._discard_if_idle(self.holder):
            raise self.in_progress()

    def take_over(self, step: Step) -> None:
        """A step is about to take the place of the one that holds the buffer, if one does.

        That is no move: two connections could keep it from all others by turns, without a byte.
        """
        if self.holder is not None and not step.replay:
            step.moved_at = self.holder.moved_at

    def in_progress(self) -> OptserveError:
        """The error for who would disturb the step that holds the buffer."""
        return OptserveError(
            Reason.STEP_IN_PROGRESS,
            f"Another connection is in the middle of a step on {self.optimizer}; try again when it has ended.",
        )

    def _discard_if_idle(self, holder: Step) -> bool:
        if self.monotonic() - holder.moved_at < self._idle_step_s:
            return False
        logger.warning("request %s on %s has not moved for long and is discarded", holder.request_id, self.optimizer)
        self.holder = None
        self._became_free()
        return True

    def discard_idle(self) -> None:
        """Discard the step under way if it has not moved for long, though nobody wants its place."""
        # Where the lock is taken, something moves.
        if self.lock.acquire(blocking=False):
            try:
                # One that is committed has only its reply left to be read.
                if self.holder and not self.holder.committed:
                    self._discard_if_idle(self.holder)
            finally:
                self.lock.release()

    def take_shared(self, step: Step) -> None:
        """Take the gradients of a step that a client has put into the memory that it shares.

        Raises:
            OptserveError: MISSING_CHUNK, NON_FINITE_VALUE, GRADIENT_OVERFLOW or STEP_TAKEN_OVER.
        """
        segment = step.segment
        if segment is None or step.replay:
            return
        self.hold(step)
        if not segment.is_dirty:
            # Else the last reply would be taken for a gradient, or the last gradient once more.
            raise OptserveError(
                Reason.MISSING_CHUNK,
                "The dirty word of the shared memory has not been set since gradients were last taken from there, so "
                "this step has brought none. Set it, write all gradients of the step, and send begin and commit again.",
                field="commit",
            )
        if self.retained:
            self.retained.intact = False
        # Taken once: whoever does not write again has nothing more to be taken.
        segment.clear_dirty()
        self.staging.take_gradients(segment, step.payload, step.largest)
        step.taken_whole = True

    def check_replay(self, step: Step) -> None:
        """Raise REPLY_OVERFLOW unless the reply that is to be given again fits the wire, which may be another one."""
        if step.reply_wires is not NATIVE:
            check_reply(self._state, step.payload, step.reply_source)

    def give_shared(self, step: Step, number: int) -> None:
        """Put the reply of a step, the `number`th, where a client that shares memory expects it."""
        if step.segment and step.replies is not NOTHING:
            self.staging.write_reply(step.segment, step.payload, number, step.reply_source)

    # What the step that holds the buffer asks for.

    def hold(self, step: Step) -> Staging:
        """Check, with the lock held, that the step still holds the buffer; gives that."""
        if self.holder is not step:
            raise OptserveError(
                Reason.STEP_TAKEN_OVER,
                f"Another connection has taken request {step.request_id} over, or it had not moved for long.",
            )
        step.moved_at = self.monotonic()
        return self.staging

    def stage(self, step: Step, position: int, data: memoryview | bytes, operand: Operand) -> None:
        """See Holder."""
        with self.lock:
            moved_at = step.moved_at
            staging = self.hold(step)
            step.coverage[operand].add(position, position + len(data))
            if not len(data):
                # Only what was missing is a move: empty chunks would hold the buffer for as long as they come.
                step.moved_at = moved_at
            if self.retained:
                self.retained.intact = False
            staging.stage(step.payload, operand, position, data, step.largest)

    def read(self, step: Step, run: Run, begin: int, end: int, use: Callable[[ReplyChunk], _Used]) -> _Used:
        """See Holder."""
        with self.lock:
            elements = self.hold(step).to_wire(step.reply_source, run, begin, end)
            tensor, offset = step.payload.locate(begin)
            # Used under the lock: nobody writes there meanwhile.
            return use(ReplyChunk(tensor, offset, elements.data.cast("B"), end == step.payload.size_bytes))

    def whole(self, step: Step, tensor: int) -> bytes:
        """See Holder."""
        with self.lock:
            self.hold(step)
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
    """That of an optimizer: it always has its buffer, and from here alone x is changed.

    A client on the same host may share memory with it.
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
        self._staging = Staging(state)

    @property
    def staging(self) -> Staging:
        """The buffer."""
        return self._staging

    def _keeps(self, retained: Retained, reply: Reply) -> bool:
        # x is still that after the step.
        return reply is PARAMETERS or (retained.intact and retained.holds is reply)

    def _became_free(self) -> None:
        """Nobody waits for it."""

    def stage_apart(self) -> None:
        """See StepSlot. What a client shares it writes as it likes, while others step as well."""
        if self._staging.segment is not None:
            self._staging.leave_segment()

    def look_for_overwriting(self) -> None:
        """See StepSlot. Where the buffer is the segment, a reply lies where the client writes."""
        segment = self._staging.segment
        if segment and self.retained and self._staging.in_place and segment.is_dirty:
            self.retained.intact = False

    def share(self, *, may_be_in_place: bool) -> Segment | None:
        """Share memory with a client on this host; None if another one has that, or there is no room for it.

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
        """The client of that segment has gone."""
        if self._staging.segment is segment:
            self.look_for_overwriting()
            self._staging.unshare()

    def overwrite(self) -> Staging:
        """The buffer, for something else than a step from here; the reply that it keeps is lost."""
        if self.retained:
            self.retained.intact = False
        return self._staging

    def keeps_updates(self, tensor: int) -> bool:
        """Whether the buffer holds the updates that the last step made of a parameter."""
        self.look_for_overwriting()
        retained = self.retained
        return retained is not None and retained.intact and tensor in retained.selection

    def give_shared(self, step: Step, number: int) -> None:
        """See StepSlot."""
        super().give_shared(step, number)
        if step.segment and self.retained and self._staging.in_place and step.replies is PARAMETERS:
            # x has taken the place of the updates.
            self.retained.intact = False
