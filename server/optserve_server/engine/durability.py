"""What keeps state beyond the life of the process: the interface, and the setting that keeps nothing.

Everything that is told gets a number in one sequence, so that a snapshot can say up to which it knows.
"""

from __future__ import annotations

from typing import Protocol

from optserve_server.engine.records import Change


class Durability(Protocol):
    """Told of every change before it is made.

    Attributes:
        reads_staging: Whether it reads the staging buffer, in which nobody else may write meanwhile. One that does not
            need not be told of steps.
    """

    reads_staging: bool

    @property
    def problem(self) -> str:
        """What keeps changes from being made durable at the moment, in words; empty while nothing does."""
        ...

    def write(self, record: Change) -> int:
        """Keep a change that is about to be made; if that raises, nothing is to change.

        Args:
            record: The change. The gradients of a step are still in the staging buffer.

        Returns:
            Its number, once it will survive.
        """
        ...

    def remove_refused(self) -> None:
        """Remove the records of refused changes that are still on disk.

        Raises:
            OptserveError: NOT_DURABLE, `in_doubt`: one cannot be removed, and the next start may make its change.
        """
        ...


class InMemory:
    """State ends with the process. Nothing is kept, and nothing numbered."""

    reads_staging = False
    problem = ""

    def write(self, record: Change) -> int:  # noqa: ARG002 - see Durability
        """Nothing to keep."""
        return 0

    def remove_refused(self) -> None:
        """Nothing outlives the process."""
