"""Request ids of steps, and whether a worker's life goes on.

Every step has a request id of its own. A worker's request id is `step-N-LIFE-COUNT`: the step is the Nth under the
worker's name, so that a later life can count on from it. Older versions wrote `step-N`.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Callable

from optserve import _reasons
from optserve.errors import ClientUseError, OptserveError, StepInDoubtError, WorkerReplacedError

_WORKER_STEP = re.compile(r"step-(\d{1,19})(?:-.*)?")


def steps_made_by(request_id: str) -> int:
    """How many steps a worker's name had made with the step of that request id; 0 if the id does not say."""
    match = _WORKER_STEP.fullmatch(request_id)
    return int(match[1]) if match else 0


class Life:
    """One life of a worker; a client that is no worker has one life only.

    Args:
        worker: The worker's name; empty for a client that is no worker.

    Attributes:
        steps_made: Steps that this object has made; for a worker, all steps under its name.
        ended: Makes the error that has ended this life; None while it goes on.
    """

    def __init__(self, worker: str) -> None:
        self._worker = worker
        # 64 random bits; with both numbers a request id has at most 64 characters.
        self._id = uuid.uuid4().hex[:16]
        self._begun = 0
        self._last_request_id = ""
        self.ended: Callable[[], OptserveError] | None = None
        self.steps_made = 0

    def next_request_id(self) -> str:
        """A request id for a new step."""
        self._begun += 1
        own = f"{self._id}-{self._begun}"
        return f"step-{self.steps_made + 1}-{own}" if self._worker else own

    def record_step(self, request_id: str) -> None:
        """Count a step that was applied."""
        self._last_request_id = request_id
        self.steps_made = steps_made_by(request_id) if self._worker else self.steps_made + 1

    def continue_after(self, last_request_id: str) -> None:
        """Take this for the last step under the worker's name; empty if there was none."""
        self._last_request_id = last_request_id
        self.steps_made = steps_made_by(last_request_id)

    def check_last(self, last_request_id: str) -> None:
        """Compare the last step under the worker's name, as the server reports it, with the one that is known.

        Raises:
            StepInDoubtError: Another life has made it. Whether this life's last step was applied is no longer known.
        """
        if not self._worker:
            return
        known = last_request_id in ("", self._last_request_id)
        if not known and f"-{self._id}-" not in last_request_id:
            raise StepInDoubtError(
                f"Another life of worker {self._worker!r} has made step {steps_made_by(last_request_id)}. This "
                "gradient was not sent. Whether an interrupted step of this life was applied is no longer known. Call "
                "refresh() and pull() to go on."
            )
        self.continue_after(last_request_id)

    def check_active(self) -> None:
        """Raise the error that has ended this life, if one has."""
        if self.ended is not None:
            raise self.ended()

    def note_error(self, error: OptserveError) -> None:
        """End this life if the error says that another has replaced it; no later answer brings it back."""
        if isinstance(error, WorkerReplacedError):
            message, metadata = error.message, error.metadata
            self.ended = lambda: WorkerReplacedError(message, reason=_reasons.WORKER_REPLACED, metadata=metadata)

    def leave(self) -> None:
        """End this life: it makes no more steps."""
        if self.ended is None:
            message = (
                f"Worker {self._worker!r} has left. Enter a new worker to make steps."
                if self._worker
                else "This object was closed for good. Get a new one from client.optimizer() to make steps."
            )
            self.ended = lambda: ClientUseError(message)
