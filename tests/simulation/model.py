"""What must be true of a run, whatever went wrong in it.

Each step that an actor tries has a gradient of its own: 1 at one element of `w` and 0 elsewhere. Gradient descent with
a rate of 1 changes x by −1 there, so x says of each try how often it was applied: −1 once, −2 twice, −1/W as one of W
gradients of a mean. All of it is exact.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, auto

import numpy as np

MAX_ATTEMPTS = 96


class Broken(AssertionError):
    """A promise was broken."""


class Fate(Enum):
    """What an actor knows of a try."""

    UNDER_WAY = auto()
    RETURNED = auto()
    """It was applied, once."""
    REFUSED = auto()
    """It was not, and never will be."""
    IN_DOUBT = auto()
    """Either."""


@dataclass
class Attempt:
    """One try of a step.

    Attributes:
        number: Its element of `w`.
        who: Whose it is.
        fate: What is known of it.
        added: The parameters of the step that were added.
    """

    number: int
    who: str
    fate: Fate = Fate.UNDER_WAY
    added: tuple[str, ...] = ()


@dataclass
class Added:
    """A parameter that somebody has tried to add to the optimizer.

    Attributes:
        name: Its name.
        value: Its x.
        fate: What is known of it.
    """

    name: str
    value: np.ndarray
    fate: Fate = Fate.UNDER_WAY


@dataclass
class Model:
    """What actors have tried and been told.

    Args:
        workers: Of whose gradients each step is the mean.
        has_own_rates: Whether every second step has a learning rate of its own, half of the optimizer's. Its gradient
            is twice as large, so x is the same.
    """

    workers: int = 1
    has_own_rates: bool = False
    attempts: list[Attempt] = field(default_factory=list)
    _seen: dict[int, np.ndarray] = field(default_factory=dict)

    def begin(self, who: str) -> Attempt:
        """A new try."""
        attempt = Attempt(len(self.attempts), who)
        self.attempts.append(attempt)
        return attempt

    @property
    def has_room(self) -> bool:
        """Whether there are elements for more tries."""
        return len(self.attempts) < MAX_ATTEMPTS - 8

    def gradient(self, attempt: Attempt) -> dict[str, np.ndarray]:
        """That of a try."""
        unit = 2.0 if self.hyperparameters(attempt) else 1.0
        w = np.zeros(MAX_ATTEMPTS)
        w[attempt.number] = unit
        return {"w": w, "b": np.array([unit, unit * attempt.number], np.float32)}

    def hyperparameters(self, attempt: Attempt) -> dict[str, float] | None:
        """The hyper-parameters of a try; None for the optimizer's own."""
        return {"learning_rate": 0.5} if self.has_own_rates and attempt.number % 2 else None

    def returned(self, attempt: Attempt, step: int, x: dict[str, np.ndarray]) -> None:
        """A try has returned, as the step of that number, with these parameters."""
        attempt.fate = Fate.RETURNED
        self.look(step, x, f"the reply of try {attempt.number} of {attempt.who}")
        if not self._applied(x["w"])[attempt.number]:
            raise Broken(f"Try {attempt.number} of {attempt.who} has returned without its gradient, at step {step}.")
        # A later step has taken the place of what this actor was not sure of.
        for earlier in self.attempts[: attempt.number]:
            if earlier.who == attempt.who and earlier.fate in (Fate.IN_DOUBT, Fate.UNDER_WAY):
                earlier.fate = Fate.RETURNED if self._applied(x["w"])[earlier.number] else Fate.REFUSED

    def look(self, step: int, x: dict[str, np.ndarray], where: str) -> None:
        """Somebody has been told x after so many steps."""
        units = self._units(x["w"], where)
        if units.sum() != step * self.workers:
            raise Broken(f"{where}: {units.sum()} gradients are in x after {step} steps of {self.workers} each.")
        expected = np.array([units.sum(), units @ np.arange(MAX_ATTEMPTS)], np.float64) / self.workers
        if not np.array_equal(-x["b"].astype(np.float64), expected):
            raise Broken(f"{where}: w and b are not of the same steps: {-x['b']}, not {expected}.")
        known = self._seen.setdefault(step, units)
        if not np.array_equal(known, units):
            raise Broken(f"{where}: x after {step} steps is another one than somebody else was told.")
        earlier = max((other for other in self._seen if other < step), default=None)
        later = min((other for other in self._seen if other > step), default=None)
        for before, after in ((earlier, step), (step, later)):
            if before is not None and after is not None and (self._seen[before] > self._seen[after]).any():
                raise Broken(f"{where}: a gradient that was in x after {before} steps is not there after {after}.")

    def check_end(self, step: int, x: dict[str, np.ndarray]) -> None:
        """At the end, when everything has settled: compare x with all that anybody was told."""
        self.look(step, x, "the end")
        applied = self._applied(x["w"])
        for attempt in self.attempts:
            if attempt.fate is Fate.RETURNED and not applied[attempt.number]:
                raise Broken(f"Try {attempt.number} of {attempt.who} has returned and was not applied.")
            if attempt.fate is Fate.REFUSED and applied[attempt.number]:
                raise Broken(f"Try {attempt.number} of {attempt.who} was refused and was applied.")

    def _units(self, w: np.ndarray, where: str) -> np.ndarray:
        """How often each try is in x."""
        units = -w * self.workers
        wrong = np.flatnonzero((units != 0) & (units != 1))
        if wrong.size:
            attempt = self.attempts[wrong[0]] if wrong[0] < len(self.attempts) else None
            whose = f"of {attempt.who}, {attempt.fate.name}" if attempt else "of nobody"
            raise Broken(f"{where}: try {wrong[0]} {whose} was applied {units[wrong[0]]:g} times.")
        return units

    def _applied(self, w: np.ndarray) -> np.ndarray:
        return w != 0
