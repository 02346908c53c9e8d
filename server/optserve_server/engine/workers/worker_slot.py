"""Where a worker makes its steps: its buffer is given by a budget, and taken back when others need the room."""

from __future__ import annotations

from collections.abc import Callable

from optserve._common.clock import SYSTEM, Clock, Lock
from optserve_server.domain.errors import OptserveError, Reason
from optserve_server.engine.step_slot import StepSlot
from optserve_server.engine.transaction import Outcome, Reply, Retained, Step
from optserve_server.numerics.staging import Staging
from optserve_server.numerics.state import State


class WorkerSlot(StepSlot):
    """That of one worker: equipped with a buffer before a step, and stripped of it when the room is needed.

    Args:
        name: See StepSlot.
        state: See StepSlot.
        lock: See StepSlot.
        commit: See StepSlot.
        idle_step_s: See StepSlot.
        on_free: Called when a step ends, with the lock held or not.
        clock: The time.

    Attributes:
        worker_name: Name of the worker whose step has it.
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
        self._staging: Staging | None = None
        self.worker_name = ""

    @property
    def staging(self) -> Staging:
        """The buffer of one that is equipped; otherwise raises STEP_TAKEN_OVER."""
        if self._staging is None:
            raise OptserveError(Reason.STEP_TAKEN_OVER, "The step's buffer was taken back.")
        return self._staging

    def _keeps(self, retained: Retained, reply: Reply) -> bool:
        # x goes on by the steps of others, so what was answered is only in the buffer.
        return retained.intact and retained.holds is reply

    def _became_free(self) -> None:
        self._on_free(self)

    def stage_apart(self) -> None:
        """See StepSlot. No client writes into a worker's buffer: what it shares is copied from beside it."""

    def look_for_overwriting(self) -> None:
        """See StepSlot. For the same reason nobody does."""

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
        """Give the buffer up, with the reply that it keeps; gives False where a step holds it, or somebody looks."""
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
