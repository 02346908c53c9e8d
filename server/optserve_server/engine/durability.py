"""The interface of what keeps changes beyond the life of the process, and the class that keeps nothing.

Each change gets a number in one sequence, so that a snapshot can say which changes it contains.
"""

from __future__ import annotations

from typing import Protocol

from optserve_server.engine.records import Change


class Durability(Protocol):
    """Gets a record of every change before the change is made.

    Attributes:
        reads_staging: Whether `write` reads the gradients of a step in the staging buffer; then no client may overwrite
            them meanwhile. If it does not, the caller need not write steps.
    """

    reads_staging: bool

    @property
    def problem(self) -> str:
        """Why changes cannot be made durable at the moment, in words; empty if they can."""
        ...

    def write(self, record: Change) -> int:
        """Make a change durable that is about to be made. If this raises, the caller must not make the change.

        Args:
            record: The change. The gradients of a step are still in the staging buffer.

        Returns:
            The number of the change, once the change is durable.
        """
        ...

    def remove_refused(self) -> None:
        """Remove the records of refused changes that are still on disk.

        Raises:
            OptserveError: NOT_DURABLE, `in_doubt`: a record cannot be removed, and the next start may make its change.
        """
        ...


class InMemory:
    """Keeps nothing: the state ends with the process. Changes get no numbers."""

    reads_staging = False
    problem = ""

    def write(self, record: Change) -> int:  # noqa: ARG002 - see Durability
        """Do nothing."""
        return 0

    def remove_refused(self) -> None:
        """Do nothing."""
