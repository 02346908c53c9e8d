"""Clocks that a test gives to server or client: time that stands still, and conditions that tell of who waits."""

import threading
from typing import Any

from optserve._common.clock import Clock


class StoppedClock(Clock):
    """Time that passes when it is told to.

    Attributes:
        seconds: The present time.
    """

    def __init__(self) -> None:
        self.seconds = 1000.0

    def monotonic(self) -> float:
        return self.seconds


class TellingClock(Clock):
    """The machine's own, which tells when somebody waits for a condition, as a commit does for other workers.

    Attributes:
        somebody_waits: Set from then on. Whoever has the condition's lock after it comes behind the one that waits.
    """

    def __init__(self) -> None:
        self.somebody_waits = threading.Event()

    def condition(self, lock: Any = None) -> threading.Condition:
        return _TellingCondition(self.somebody_waits, lock)


class _TellingCondition(threading.Condition):
    def __init__(self, somebody_waits: threading.Event, lock: Any) -> None:
        super().__init__(lock)
        self._somebody_waits = somebody_waits

    def wait(self, timeout: float | None = None) -> bool:
        self._somebody_waits.set()
        return super().wait(timeout)
