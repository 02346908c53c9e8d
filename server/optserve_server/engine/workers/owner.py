"""The steps of an optimizer, as its workers see them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from optserve._common.clock import Condition
from optserve_server.engine.step_slot import ClientSlot
from optserve_server.engine.transition import WrittenStep
from optserve_server.numerics.headroom import Answers
from optserve_server.numerics.layout import Largest, Payload
from optserve_server.numerics.staging import Staging


class Owner(Protocol):
    """The optimizer's steps, as its workers see them; all of it under `lock`."""

    lock: Condition
    step: int
    main: ClientSlot

    def check_usable(self) -> None:
        """Raise what every step is refused with."""
        ...

    def check_lineage(self, lineage: str) -> None:
        """Raise STATE_REPLACED if the state is another one."""
        ...

    def prepare(
        self,
        staging: Staging,
        payload: Payload,
        largest: Largest,
        answers: Answers,
        workers: Sequence[tuple[str, str, int]],
        *,
        staleness: int = 0,
    ) -> WrittenStep:
        """Check the step that a buffer holds, and write it down."""
        ...

    def apply(self, written: WrittenStep) -> float | None:
        """Apply it; gives the norm where clipping needed it."""
        ...
