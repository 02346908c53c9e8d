"""What must be true of the steps of one client, with a method whose bits depend on all of them and on their order.

The steps that were applied, as far as they are known, are made once more by an engine without a disk and a network,
which never stops. Where it is not known which of the tries in doubt were applied, one of the possible choices has to
fit.
"""

from __future__ import annotations

from itertools import combinations, product

import numpy as np

from optserve_server.engine.durability import InMemory
from optserve_server.engine.steps import Steps
from optserve_server.engine.transaction import StepRequest
from optserve_server.numerics import backends
from optserve_server.numerics.layout import Layout, Parameter
from optserve_server.numerics.rules import Adadelta
from optserve_server.numerics.settings import Settings
from optserve_server.numerics.state import State
from optserve_server.numerics.step_settings import PLAIN, Change, StepOptions, StepSettings

from .model import MAX_ATTEMPTS, Attempt, Broken, Fate

SHAPES = {"w": ((3, 4), np.dtype("f4")), "b": ((3,), np.dtype("f8"))}

MAX_CHOICES = 32
"""More are not tried."""

Reply = dict[str, np.ndarray]


class History:
    """What a client has tried and been told.

    Attributes:
        attempts: All of its tries.
        is_lost: Whether the state may have been replaced or not.
    """

    def __init__(self) -> None:
        self.attempts: list[Attempt] = []
        self.is_lost = False
        # What was certainly applied before the last restore, and the tries since; the replies, with their steps.
        self._before: list[int] = []
        self._since: list[Attempt] = []
        self._told: dict[int, tuple[int, Reply]] = {}
        self._saved: dict[str, list[int]] = {}

    @property
    def has_room(self) -> bool:
        """Whether more may be tried."""
        return len(self.attempts) < MAX_ATTEMPTS - 8

    def begin(self, who: str) -> Attempt:
        """A new try."""
        attempt = Attempt(len(self.attempts), who)
        self.attempts.append(attempt)
        self._since.append(attempt)
        return attempt

    def gradient(self, attempt: Attempt) -> Reply:
        """That of a try."""
        rng = np.random.default_rng(attempt.number)
        return {name: rng.standard_normal(shape).astype(dtype) for name, (shape, dtype) in SHAPES.items()}

    def hyperparameters(self, attempt: Attempt) -> dict[str, float] | None:
        """The hyper-parameters of a try; None for the optimizer's own."""
        if attempt.number % 3 == 0:
            return None
        return {"learning_rate": 1.0 / attempt.number} | ({"rho": 0.5} if attempt.number % 3 == 1 else {})

    def returned(self, attempt: Attempt, step: int, reply: Reply) -> None:
        """A try has returned, as the step of that number, with these updates."""
        attempt.fate = Fate.RETURNED
        self._told[attempt.number] = step, reply

    @property
    def is_certain(self) -> bool:
        """Whether it is known of every try whether it was applied."""
        return not self.is_lost and all(attempt.fate in (Fate.RETURNED, Fate.REFUSED) for attempt in self._since)

    def _applied(self) -> list[int]:
        return self._before + [attempt.number for attempt in self._since if attempt.fate is Fate.RETURNED]

    def saved(self, tag: str) -> None:
        """A checkpoint was taken, in certainty."""
        self._saved[tag] = self._applied()

    @property
    def tags(self) -> list[str]:
        """Of the checkpoints."""
        return list(self._saved)

    def restored(self, tag: str) -> None:
        """A checkpoint was put in place."""
        self._before, self._since = list(self._saved[tag]), []

    # The end.

    def check_end(self, step: int, arrays: list[bytes]) -> None:
        """Compare the state with that of an engine that made the same steps and never stopped."""
        if self.is_lost:
            return
        choices = list(self._choices(step))
        total = int(np.prod([len(some) for some in choices], dtype=np.float64))
        if not total:
            raise Broken(f"{step} steps in the end do not fit what {len(self._since)} tries were told.")
        if total > MAX_CHOICES:
            return
        for chosen in product(*choices):
            if self._fits([number for part in chosen for number in part], arrays):
                return
        raise Broken(f"Step {step}: the state is not that of any run of these steps that was not interrupted.")

    def _choices(self, step: int) -> list[list[list[int]]]:
        """For each stretch up to a step that is known: which tries may have been applied in it."""
        found: list[list[list[int]]] = []
        at, doubts = len(self._before), list[int]()
        for attempt in self._since:
            if attempt.fate is Fate.RETURNED:
                then, _ = self._told[attempt.number]
                missing = then - 1 - at
                some = combinations(doubts, missing) if 0 <= missing <= len(doubts) else ()
                found.append([[*chosen, attempt.number] for chosen in some])
                at, doubts = then, []
            elif attempt.fate is not Fate.REFUSED:
                doubts.append(attempt.number)
        missing = step - at
        found.append([list(chosen) for chosen in combinations(doubts, missing)] if 0 <= missing <= len(doubts) else [])
        return found

    def _fits(self, applied: list[int], arrays: list[bytes]) -> bool:
        steps = Steps("again", State(_layout(), _settings(), backends.load("numpy", 1)), InMemory())
        for number in (*self._before, *applied):
            attempt = self.attempts[number]
            reply = _step(steps, number, self.gradient(attempt), self.hyperparameters(attempt))
            told = self._told.get(number)
            if told is not None and told[1]["w"].tobytes() + told[1]["b"].tobytes() != reply:
                return False
        with steps.locked_state() as state:
            return arrays_of(state) == arrays


def _layout() -> Layout:
    return Layout(tuple(Parameter(name, shape, dtype) for name, (shape, dtype) in SHAPES.items()))


def _settings() -> Settings:
    return Settings(Adadelta(rho=0.9, eps=1e-6))


def _step(steps: Steps, number: int, gradient: Reply, hyperparameters: dict[str, float] | None) -> bytes:
    options = StepOptions(StepSettings((Change(None, hyperparameters),))) if hyperparameters else PLAIN
    step = steps.begin(StepRequest(f"step-{number}", options=options))
    try:
        for tensor, array in enumerate(gradient.values()):
            step.stage(tensor, 0, array.tobytes())
        step.commit()
        return b"".join(step.reply(1 << 20, lambda piece: bytes(piece.data)))
    finally:
        step.close()


def arrays_of(state: State) -> list[bytes]:
    """All arrays of a state, in their order."""
    return [
        state.read(dtype, array, 0, size).tobytes()
        for dtype, size in state.layout.sizes.items()
        for array in range(len(state.settings.arrays))
    ]
