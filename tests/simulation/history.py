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
from optserve_server.numerics.layout import Layout, Selection
from optserve_server.numerics.rules import Adadelta
from optserve_server.numerics.settings import Settings
from optserve_server.numerics.state import State
from optserve_server.numerics.step_settings import PLAIN, Change, StepOptions, StepSettings

from .model import MAX_ATTEMPTS, Attempt, Broken, Fate

SHAPES = {"w": ((3, 4), np.dtype("f4")), "b": ((3,), np.dtype("f8"))}

ADDED = ((2,), np.dtype("f8"))
"""Shape and dtype of a parameter that is added."""

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
        # What was applied, and the parameters that the client knew.
        self._saved: dict[str, tuple[list[int], tuple[str, ...]]] = {}

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
        model = SHAPES | dict.fromkeys(attempt.added, ADDED)
        return {name: rng.standard_normal(shape).astype(dtype) for name, (shape, dtype) in model.items()}

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

    def saved(self, tag: str, known: tuple[str, ...]) -> None:
        """A checkpoint was taken, in certainty, by a client that knew these parameters."""
        self._saved[tag] = self._applied(), known

    def tags(self, known: tuple[str, ...]) -> list[str]:
        """Of the checkpoints with these parameters."""
        return [tag for tag, (_, names) in self._saved.items() if names == known]

    def restored(self, tag: str) -> None:
        """A checkpoint was put in place."""
        self._before, self._since = list(self._saved[tag][0]), []

    # The end.

    def check_end(self, step: int, layout: Layout, arrays: list[bytes]) -> None:
        """Compare the state with that of an engine that made the same steps and never stopped.

        That engine has had all parameters from the beginning, and its steps leave those out that came later.
        """
        if self.is_lost:
            return
        choices = list(self._choices(step))
        total = int(np.prod([len(some) for some in choices], dtype=np.float64))
        if not total:
            raise Broken(f"{step} steps in the end do not fit what {len(self._since)} tries were told.")
        if total > MAX_CHOICES:
            return
        for chosen in product(*choices):
            if self._fits([number for part in chosen for number in part], layout, arrays):
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

    def _fits(self, applied: list[int], layout: Layout, arrays: list[bytes]) -> bool:
        steps = Steps("again", State(layout, _settings(), backends.load("numpy", 1)), InMemory())
        for number in (*self._before, *applied):
            attempt = self.attempts[number]
            gradient = self.gradient(attempt)
            if not gradient.keys() <= layout.indices.keys():
                return False
            reply = _step(steps, attempt, layout, gradient, self.hyperparameters(attempt))
            told = self._told.get(number)
            if told is not None and b"".join(told[1][name].tobytes() for name in gradient) != reply:
                return False
        with steps.locked_state() as state:
            return arrays_of(state) == arrays


def _settings() -> Settings:
    return Settings(Adadelta(rho=0.9, eps=1e-6))


def _step(
    steps: Steps, attempt: Attempt, layout: Layout, gradient: Reply, hyperparameters: dict[str, float] | None
) -> bytes:
    options = StepOptions(StepSettings((Change(None, hyperparameters),))) if hyperparameters else PLAIN
    tensors = tuple(layout.indices[name] for name in gradient)
    step = steps.begin(StepRequest(f"step-{attempt.number}", selection=Selection(tensors), options=options))
    try:
        for tensor, array in zip(tensors, gradient.values(), strict=True):
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
