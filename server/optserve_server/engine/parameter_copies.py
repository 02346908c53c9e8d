"""Copies of hosted parameters that the server is sending, each of one step. Calls for the same step share a copy."""

from __future__ import annotations

import weakref
from dataclasses import dataclass

from optserve._common.clock import SYSTEM, Clock
from optserve_server.domain.errors import OptserveError, Reason
from optserve_server.engine.optimizer import Optimizer
from optserve_server.numerics.layout import Arenas, Layout

WAIT_S = 5.0
"""Seconds that a call waits for memory before it is refused with REPLIES_FULL."""


@dataclass(eq=False)
class Copy:
    """The parameters x of one step, as long as some call uses it."""

    step: int
    lineage: str
    layout: Layout
    arenas: Arenas


class Copies:
    """Makes the copies of one server. All together stay within `max_bytes`; a single copy may be larger."""

    def __init__(self, max_bytes: int, clock: Clock = SYSTEM) -> None:
        self._max_bytes = max_bytes
        self._bytes = 0
        # Reentrant, because the garbage collector may release a copy in any thread at any moment.
        self._room = clock.condition(clock.rlock())
        self._newest: weakref.WeakKeyDictionary[Optimizer, weakref.ref[Copy]] = weakref.WeakKeyDictionary()

    def of(self, optimizer: Optimizer, newer_than: int | None = None) -> tuple[int, Copy | None]:
        """(number of steps applied, x of that moment); no x if the number is at most `newer_than`.

        Raises:
            OptserveError: NOT_HOSTED, PARAMETERS_MISSING, REPLIES_FULL, or see `Steps.check_usable`.
        """
        steps, size = optimizer.steps, optimizer.layout.size_bytes
        with steps.locked_state():
            steps.check_usable()
            steps.check_placed()
            if newer_than is not None and steps.step <= newer_than:
                return steps.step, None
            known = self._known(optimizer)
        if known is None:
            self._reserve(size)
            made = None
            try:
                with steps.locked_state():
                    # Another call may have made the copy meanwhile.
                    known = self._known(optimizer)
                    if known is None:
                        known = made = self._make(optimizer)
            finally:
                if made is None:
                    self._release(size)
            if made is not None:
                weakref.finalize(made, self._release, size)
        return known.step, known

    def _known(self, optimizer: Optimizer) -> Copy | None:
        """A copy of the present step that another call has made; None if there is none."""
        reference = self._newest.get(optimizer)
        known = reference() if reference is not None else None
        # Parameters may have been added since, without a step.
        present = (optimizer.steps.step, optimizer.steps.lineage, optimizer.layout)
        return known if known is not None and (known.step, known.lineage, known.layout) == present else None

    def _make(self, optimizer: Optimizer) -> Copy:
        with optimizer.steps.locked_state() as state:
            optimizer.steps.check_usable()
            made = Copy(optimizer.steps.step, optimizer.steps.lineage, state.layout, state.copy_of_parameters())
            self._newest[optimizer] = weakref.ref(made)
            return made

    def _reserve(self, size: int) -> None:
        with self._room:
            if not self._room.wait_for(lambda: not self._bytes or self._bytes + size <= self._max_bytes, WAIT_S):
                raise OptserveError(
                    Reason.REPLIES_FULL,
                    f"{self._bytes} bytes of parameters are on their way to clients; this server allows at most "
                    f"{self._max_bytes}. Try again later.",
                    limit_bytes=self._max_bytes,
                )
            self._bytes += size

    def _release(self, size: int) -> None:
        with self._room:
            self._bytes -= size
            self._room.notify_all()
