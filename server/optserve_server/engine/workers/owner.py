"""The steps of an optimizer, as its workers see them."""

from __future__ import annotations

from typing import Protocol

from optserve._common.clock import Condition
from optserve_server.engine.committer import Committer
from optserve_server.engine.step_slot import ClientSlot


class Owner(Protocol):
    """The optimizer's steps, as its workers see them; all of it under `lock`."""

    lock: Condition
    step: int
    main: ClientSlot
    committer: Committer

    def check_usable(self) -> None:
        """Raise what every step is refused with."""
        ...

    def check_lineage(self, lineage: str) -> None:
        """Raise STATE_REPLACED if the state is another one."""
        ...
