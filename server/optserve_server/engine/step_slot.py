"""The place where one client at a time makes its steps: a staging buffer, who holds it, and what was last answered.

At any time at most one `Step` holds the buffer: from its begin until the reply has been read or the step is closed. The
same request id on another connection takes the step over, because it means that the client has given the first
connection up; any other is told to come back later, unless the holder has not moved for long.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from optserve_server.domain.errors import OptserveError, Reason
from optserve_server.engine.transaction import NOTHING, PARAMETERS, Outcome, Reply, ReplyChunk, Retained, Step
from optserve_server.numerics.headroom import NATIVE
from optserve_server.numerics.layout import Operand, Run
from optserve_server.numerics.staging import Staging
from optserve_server.numerics.state import State
from optserve_server.numerics.trial import check_reply

logger = logging.getLogger(__name__)

_Used = TypeVar("_Used")


class StepSlot:
    """One such place. What it does happens under its lock; its methods without a `step` are called with it held.

    Args:
        name: The optimizer's, for messages.
        state: The optimizer's.
        lock: Guards it.
        commit: Applies a step that holds it.
        idle_step_s: After so many seconds without a move, a step is discarded.
        on_free: Of a step slot beside others: called when a step ends, with the lock held or not. None for the only
            one, which always has a buffer, and from which alone x is changed.

    Attributes:
        optimizer: Its name.
        holder: The step that has it.
        retained: The last step that was applied from here.
        worker_name: Name of the worker that has it, of a step slot beside others.
    """

    def __init__(
        self,
        name: str,
        state: State,
        lock: threading.RLock,
        commit: Callable[[Step], Outcome],
        idle_step_s: float,
        on_free: Callable[[StepSlot], None] | None = None,
    ) -> None:
        self.optimizer = name
        self._state = state
        self._idle_step_s = idle_step_s
        self.lock = lock
        self.commit = commit
        self._on_free = on_free
        self._staging = Staging(state) if on_free is None else None
        self.holder: Step | None = None
        self.retained: Retained | None = None
        self.worker_name = ""

    @property
    def staging(self) -> Staging:
        """The buffer, of a step slot that is equipped."""
        if self._staging is None:
            raise OptserveError(Reason.STEP_TAKEN_OVER, "The step's buffer was taken back.")
        return self._staging

    @property
    def equipped(self) -> bool:
        """Whether it has a buffer."""
        return self._staging is not None

    @property
    def buffer_bytes(self) -> int:
        """Bytes of a buffer."""
        return len(self._state.operand_kinds) * self._state.layout.size_bytes

    def equip(self) -> None:
        """Have a buffer. The lock need not be held: nobody else gives or takes one."""
        self._staging = Staging(self._state)

    def strip(self) -> bool:
        """Give the buffer up, with the reply that it keeps, unless a step holds it."""
        if not self.lock.acquire(blocking=False):
            return False
        try:
            if self.holder is not None:
                return False
            self._staging = None
            if self.retained:
                self.retained.intact = False
            return True
        finally:
            self.lock.release()

    @property
    def last_request_id(self) -> str:
        """Request id of the last applied step; empty if there is none."""
        return self.retained.request_id if self.retained else ""

    def repeated(self, request_id: str, reply: Reply) -> Retained | None:
        """The last step, if a request is that one once more.

        Raises:
            OptserveError: STEP_IN_PROGRESS, if another step holds the buffer; REPLY_GONE.
        """
        if self._staging is not None and self._staging.segment is not None:
            self.note_overwritten()
        repeated = self.retained if self.last_request_id == request_id else None
        if self.holder and self.holder.request_id != request_id:
            self.evict_if_idle()
        if repeated and not self._is_kept(repeated, reply):
            raise OptserveError(
                Reason.REPLY_GONE,
                f"Step {repeated.step} of {self.optimizer} was applied, but another step has been begun since, and its "
                "reply is no longer retained.",
                step=repeated.step,
            )
        return repeated

    def _is_kept(self, retained: Retained, reply: Reply) -> bool:
        if reply is NOTHING:
            return True
        if reply is PARAMETERS and self._on_free is None:
            # Still those after the step.
            return True
        return retained.intact and retained.holds is reply

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
        if time.monotonic() - holder.moved_at < self._idle_step_s:
            return False
        logger.warning("request %s on %s has not moved for long and is discarded", holder.request_id, self.optimizer)
        self.holder = None
        if self._on_free is not None:
            self._on_free(self)
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

    def overwrite(self) -> Staging:
        """The buffer, for something else than a step of this step slot; the reply that it keeps is lost."""
        if self.retained:
            self.retained.intact = False
        return self.staging

    def note_overwritten(self) -> None:
        """Look whether the client has overwritten the retained reply, which lies where it writes."""
        segment = self.staging.segment
        if segment and self.retained and self.staging.in_place and segment.dirty:
            self.retained.intact = False

    def keeps_updates(self, tensor: int) -> bool:
        """Whether the staging buffer holds the updates that the last step made of a parameter."""
        if self._staging is not None and self._staging.segment is not None:
            self.note_overwritten()
        retained = self.retained
        return retained is not None and retained.intact and tensor in retained.tensors

    def take_shared(self, step: Step) -> None:
        """Take the gradients of a step that a client has put into the memory that it shares.

        Raises:
            OptserveError: MISSING_CHUNK, NON_FINITE_VALUE, GRADIENT_OVERFLOW or STEP_TAKEN_OVER.
        """
        segment = step.segment
        if segment is None or step.replay:
            return
        self.hold(step)
        if not segment.dirty:
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
        segment.clean()
        self.staging.take_from(segment, step.payload, step.largest)
        step.taken_whole = True

    def check_replay(self, step: Step) -> None:
        """Raise REPLY_OVERFLOW unless the reply that is to be given again fits the wire, which may be another one."""
        if step.answers is not NATIVE:
            check_reply(self._state, step.payload, step.reply_source)

    def give_shared(self, step: Step, number: int) -> None:
        """Put the reply of a step, the `number`th, where a client that shares memory expects it."""
        if step.segment and step.replies is not NOTHING:
            self.staging.give_to(step.segment, step.payload, number, step.reply_source)
            if self.retained and self.staging.in_place and step.replies is PARAMETERS:
                # x has taken the place of the updates.
                self.retained.intact = False

    # What the step that holds the buffer asks for.

    def hold(self, step: Step) -> Staging:
        """Check, with the lock held, that the step still holds the buffer; gives that."""
        if self.holder is not step or self._staging is None:
            raise OptserveError(
                Reason.STEP_TAKEN_OVER,
                f"Another connection has taken request {step.request_id} over, or it had not moved for long.",
            )
        step.moved_at = time.monotonic()
        return self._staging

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
            elements = self.hold(step).give(step.reply_source, run, begin, end)
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
        if self._on_free is not None:
            self._on_free(self)
