"""The part of an optimizer's steps that the code of its workers uses."""

from __future__ import annotations

from typing import Protocol

from optserve._common.clock import Condition
from optserve_server.engine.committer import Committer
from optserve_server.engine.step_slot import ClientSlot


class Owner(Protocol):
    """The part of an optimizer's steps that its workers use. Hold `lock` for every use."""

    lock: Condition
    step: int
    main: ClientSlot
    committer: Committer

    def check_usable(self) -> None:
        """Raise the error of a deleted or lost optimizer."""
        ...

    def check_lineage(self, lineage: str) -> None:
        """Raise STATE_REPLACED if the lineage is not the present one."""
        ...
