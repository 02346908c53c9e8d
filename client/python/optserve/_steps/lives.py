"""Who makes steps: their request ids, and, for a worker, whether its life under that name goes on.

Every step has a request id that no other step has, whoever makes it. A worker's also says how many steps have been made
under its name, so that a later life can count on. What `step-` is followed by alone is of an older version.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Callable

from optserve import _reasons
from optserve.errors import ClientUseError, OptserveError, StepInDoubtError, WorkerReplacedError

_WORKER_STEP = re.compile(r"step-(\d{1,19})(?:-.*)?")


def steps_made_by(request_id: str) -> int:
    """Steps that had been made under a worker's name with that one; 0 if it does not say."""
    match = _WORKER_STEP.fullmatch(request_id)
    return int(match[1]) if match else 0


class Life:
    """One life of a worker, or the only one of a client without a name.

    Args:
        worker: Its name; empty if it has none.

    Attributes:
        steps_made: By this object; for a worker, by all that have borne its name.
    """

    def __init__(self, worker: str) -> None:
        self._worker = worker
        # 64 random bits; with both numbers a request id has at most 64 characters.
        self._id = uuid.uuid4().hex[:16]
        self._begun = 0
        self._last_request_id = ""
        self._ended: Callable[[], OptserveError] | None = None
        self.steps_made = 0

    def next_request_id(self) -> str:
        """The request id of a step that begins now."""
        self._begun += 1
        own = f"{self._id}-{self._begun}"
        return f"step-{self.steps_made + 1}-{own}" if self._worker else own

    def made(self, request_id: str) -> None:
        """A step was applied."""
        self._last_request_id = request_id
        self.steps_made = steps_made_by(request_id) if self._worker else self.steps_made + 1

    def go_on_after(self, last_request_id: str) -> None:
        """Take it for granted that this was the last step under the worker's name; empty if there was none."""
        self._last_request_id = last_request_id
        self.steps_made = steps_made_by(last_request_id)

    def check_last(self, last_request_id: str) -> None:
        """Look at what the server says was the last step under the worker's name.

        Raises:
            StepInDoubtError: It is one of another life that this one does not know of. What this life has made before
                that can no longer be seen.
        """
        if not self._worker:
            return
        known = last_request_id in ("", self._last_request_id)
        if not known and f"-{self._id}-" not in last_request_id:
            raise StepInDoubtError(
                f"Another life of worker {self._worker!r} has made step {steps_made_by(last_request_id)} since this "
                "one last looked. This gradient was not sent; whether one that was interrupted before was applied is "
                "no longer known. Call refresh() and pull() to go on."
            )
        self.go_on_after(last_request_id)

    # Its end.

    def check_goes_on(self) -> None:
        """Raise what it has ended with."""
        if self._ended is not None:
            raise self._ended()

    def note(self, error: OptserveError) -> None:
        """Look whether an error says that this life is over, which it stays whatever a server says later."""
        if isinstance(error, WorkerReplacedError):
            message, metadata = error.message, error.metadata
            self._ended = lambda: WorkerReplacedError(message, reason=_reasons.WORKER_REPLACED, metadata=metadata)

    def leave(self) -> None:
        """It makes no steps any more."""
        if self._ended is None:
            message = (
                f"Worker {self._worker!r} has left; enter it anew to make steps."
                if self._worker
                else "This object was closed for good; get the optimizer anew from the client to make steps."
            )
            self._ended = lambda: ClientUseError(message)
