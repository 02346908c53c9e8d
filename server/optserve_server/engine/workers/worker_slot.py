"""The step slot of a worker. A budget gives it its buffer, and takes it back when other workers need the memory."""

from __future__ import annotations

from collections.abc import Callable

from optserve._common.clock import SYSTEM, Clock, Lock
from optserve_server.domain.errors import OptserveError, Reason
from optserve_server.engine.step_slot import StepSlot
from optserve_server.engine.transaction import Outcome, Reply, Retained, Step
from optserve_server.numerics.staging import Staging
from optserve_server.numerics.state import State


class WorkerSlot(StepSlot):
    """The step slot of one worker. It has a buffer during a step, and afterwards until the memory is needed.

    Args:
        name: See StepSlot.
        state: See StepSlot.
        lock: See StepSlot.
        commit: See StepSlot.
        idle_step_s: See StepSlot.
        on_free: Called when a step ends, with the lock held or not.
        clock: The time.

    Attributes:
        worker_name: Name of the worker whose step holds the slot, or held it last.
    """

    def __init__(
        self,
        name: str,
        state: State,
        lock: Lock,
        commit: Callable[[Step], Outcome],
        idle_step_s: float,
        on_free: Callable[[WorkerSlot], None],
        clock: Clock = SYSTEM,
    ) -> None:
        super().__init__(name, state, lock, commit, idle_step_s, clock)
        self._on_free = on_free
        self.worker_name = ""

    @property
    def staging(self) -> Staging:
        """The buffer; raises STEP_TAKEN_OVER if there is none."""
        buffer = self.buffer
        if buffer is None:
            raise OptserveError(Reason.STEP_TAKEN_OVER, "The step's buffer was taken back.")
        return buffer

    def _has_reply(self, retained: Retained, reply: Reply) -> bool:
        # Other workers change x, so only the buffer still has the reply.
        return retained.intact and retained.holds is reply

    def _became_free(self) -> None:
        self._on_free(self)

    def leave_segment(self) -> None:
        """See StepSlot. Nothing to do: a worker's segment is never its buffer."""

    def check_overwritten(self) -> None:
        """See StepSlot. Nothing to do: no client can write into this buffer."""

    @property
    def buffer_bytes(self) -> int:
        """Bytes of the buffer, or of the next one if there is none."""
        buffer = self.buffer
        layout = self._state.layout if buffer is None else buffer.layout
        return len(self._state.operand_kinds) * layout.size_bytes

    @property
    def is_outgrown(self) -> bool:
        """Whether parameters were added since the buffer was made."""
        return self.buffer is not None and self.buffer.layout is not self._state.layout

    def make_buffer(self) -> None:
        """Make a buffer. Without the lock: only the budget makes and drops buffers."""
        self.buffer = Staging(self._state)

    def drop_buffer(self) -> bool:
        """Drop the buffer with its reply. Returns False if a step holds it, or the lock is taken."""
        if not self.lock.acquire(blocking=False):
            return False
        try:
            if self.holder is not None:
                return False
            self.buffer = None
            if self.retained:
                self.retained.intact = False
            return True
        finally:
            self.lock.release()
