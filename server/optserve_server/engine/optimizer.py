"""One optimizer of the server: its id, its state, and its steps."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from optserve_server.domain import refusals
from optserve_server.domain.errors import OptserveError, Reason
from optserve_server.engine.records import ArenaValues
from optserve_server.engine.steps import Steps
from optserve_server.engine.transition import Replacement
from optserve_server.numerics.layout import Layout
from optserve_server.numerics.parameter_steps import Written
from optserve_server.numerics.rules import Rule
from optserve_server.numerics.settings import Settings
from optserve_server.numerics.state import State

_ID = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")


def is_id(text: str) -> bool:
    """Whether a text is valid as an optimizer's id or a checkpoint's tag; such a text is safe as the name of a file."""
    return _ID.fullmatch(text) is not None


@dataclass(eq=False)
class Optimizer:
    """One optimizer: its settings, its state and its steps. Hold the lock of its steps to change anything."""

    id: str
    state: State
    steps: Steps
    creation_request_id: str
    create_time: datetime
    created_lsn: int = 0

    @property
    def etag(self) -> str:
        """A text that changes with the settings and the lineage."""
        return self.steps.etag

    @property
    def update_time(self) -> datetime:
        """Time of the last change of settings or state."""
        return self.steps.update_time

    @property
    def replacements(self) -> deque[Replacement]:
        """The last restores, imports and additions of parameters."""
        return self.steps.replacements

    @property
    def settings(self) -> Settings:
        """The method with its present hyper-parameters."""
        return self.state.settings

    @property
    def rule(self) -> Rule:
        """The method."""
        return self.settings.rule

    @property
    def layout(self) -> Layout:
        """The parameters of the model."""
        return self.state.layout

    @property
    def memory_bytes(self) -> int:
        """Bytes that the optimizer occupies, with its segments."""
        return self.state.memory_bytes + self.steps.main.staging.shared_bytes + self.steps.workers.shared_bytes

    def was_replaced_by(self, request_id: str, target: str) -> bool:
        """Whether a restore, an import or an addition of that request id, which may be empty, has been made.

        Raises:
            OptserveError: REQUEST_ID_REUSED, if that call had another target.
        """
        made = next((made for made in tuple(self.replacements) if request_id and made.request_id == request_id), None)
        if made is not None and made.target not in ("", target):
            raise refusals.request_id_reused(request_id, made.target, target)
        return made is not None

    def check_is_what_is_made(self, layout: Layout, settings: Settings) -> None:
        """Raise REQUEST_ID_REUSED unless a creation describes this optimizer; settings may have changed since."""
        # Others may have been added since.
        first = self.layout.parameters[: len(layout.parameters)] if self.steps.layout_lsn else self.layout.parameters
        same = first == layout.parameters and self.settings.hosted == settings.hosted
        if not same or self.rule.name != settings.rule.name:
            made = f"an optimizer {self.id!r} of another method, mode or other parameters"
            raise refusals.request_id_reused(self.creation_request_id, made, "this one")

    def check_layout(self, layout: Layout) -> None:
        """Raise ETAG_MISMATCH unless these are the parameters; others may have been added during a transfer."""
        if layout.parameters != self.layout.parameters:
            raise OptserveError(
                Reason.ETAG_MISMATCH,
                f"Parameters were added to {self.id!r} meanwhile; read it again.",
                field="etag",
                etag=self.etag,
            )

    def check_etag(self, etag: str) -> None:
        """Raise ETAG_MISMATCH unless `etag` is empty or the present one."""
        refusals.check_etag(self.id, etag, self.etag)


@dataclass(frozen=True)
class OtherState:
    """A state that replaces the state of an optimizer.

    Attributes:
        step: The step counter.
        layout: The parameters.
        arrays: All arenas that are not empty.
        parameter_steps: Steps that each parameter has taken part in; None if not known: then all count all steps.
        placed_by: See `Steps.placed_by`.
        target: What the call asks for, in words; the same request id with another target is refused.
    """

    step: int
    layout: Layout
    arrays: Sequence[ArenaValues]
    parameter_steps: Written | None = None
    placed_by: str | None = None
    target: str = ""
