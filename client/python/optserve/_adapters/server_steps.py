"""The optimizer behind an adapter: makes each step exactly once, also when a jitted program runs once more."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

from optserve._values.arrays import check_kind
from optserve.client import Client, connect
from optserve.errors import FailedPreconditionError, NotFoundError, OptserveError, StepInDoubtError, WrongStepError
from optserve.optimizer import Optimizer

_AMBIGUOUS = b"ambiguous"


class ServerSteps:
    """The optimizer behind an adapter. Its methods run on the host, also in the middle of a jitted program.

    Args:
        name: The optimizer's name.

    Attributes:
        name: As above.
        partial: Whether a step may leave parameters out.
        optimizer: The optimizer; None before it is found.
        error: The error of the last call; None if it succeeded.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.partial = False
        self.optimizer: Optimizer | None = None
        self.error: OptserveError | None = None
        # The digest of the step whose call was interrupted.
        self._interrupted = b""
        self._kept: OptserveError | None = None

    def begin(self, find: Callable[[], Optimizer]) -> np.int32:
        """Create or find the optimizer. Returns the steps that it has made."""
        with self._noting_error():
            self.optimizer = find()
        self._interrupted = b""
        return np.int32(self.optimizer.current_step)

    def step(
        self, find: Callable[[], Optimizer], names: Sequence[str], count: Any, rates: Mapping[str, Any], leaves: Any
    ) -> tuple[np.int32, list[np.ndarray]]:
        """Make one step, exactly once for the state with this count.

        Args:
            find: Finds the optimizer.
            names: Names of the parameters that have a gradient.
            count: Steps that the optimizer has made before: an int of no dimension.
            rates: Hyper-parameters of this step: floats of no dimension.
            leaves: A gradient for each name, in the parameter's shape and dtype.

        Returns:
            The new count, and the update of each name.

        Raises:
            WrongStepError: The optimizer is at another step.
            OptserveError: As for `Optimizer.step`.
        """
        at_step = int(count)
        grads = {name: np.asarray(leaf) for name, leaf in zip(names, leaves, strict=True)}
        values = {name: float(value) for name, value in rates.items()}
        with self._noting_error():
            if self.optimizer is None:
                # The state comes from another process, for example from a file.
                self.optimizer = self._found(find)
            updates = self._step(self.optimizer, at_step, grads, values)
        return np.int32(at_step + 1), [updates[name] for name in names]

    def step_or_keep_error(
        self, find: Callable[[], Optimizer], names: Sequence[str], count: Any, rates: Mapping[str, Any], leaves: Any
    ) -> tuple[np.int32, list[np.ndarray]]:
        """As `step`, but an error is kept for `check`: the count stays, and the updates are 0.

        Raises:
            FailedPreconditionError: The error of an earlier step was not checked. No step is made.
        """
        if self._kept is not None:
            kept, self._kept = self._kept, None
            raise FailedPreconditionError(
                f"An earlier step has failed, and check() was not called after its program: {kept}"
            ) from kept
        try:
            return self.step(find, names, count, rates, leaves)
        except OptserveError as error:
            self._kept = error
            return np.int32(count), [np.zeros_like(leaf) for leaf in leaves]

    def check(self) -> None:
        """Raise the error that is kept, if there is one, and forget it."""
        kept, self._kept = self._kept, None
        if kept is not None:
            raise kept

    def _found(self, find: Callable[[], Optimizer]) -> Optimizer:
        try:
            return find()
        except NotFoundError as error:
            raise NotFoundError(
                f"The server has no optimizer {self.name!r}: init creates it, before the first update. If it was there "
                "before, the server was restarted and has lost its state, or somebody has deleted it.",
                reason=error.reason,
                metadata=error.metadata,
            ) from error

    @contextmanager
    def _noting_error(self) -> Iterator[None]:
        self.error = None
        try:
            yield
        except OptserveError as error:
            self.error = error
            raise

    def _step(
        self, opt: Optimizer, at_step: int, grads: dict[str, np.ndarray], values: dict[str, float]
    ) -> dict[str, np.ndarray]:
        unsettled = bool(self._interrupted and opt._outcomes.unsettled)
        digest = _digest(at_step, grads, values) if unsettled else b""
        is_retry = unsettled and digest == self._interrupted
        if opt.current_step != at_step and not is_retry:
            raise WrongStepError(
                f"This training state is of step {at_step}, and {self.name!r} has made {opt.current_step} steps. The "
                "slots are on the server, so each state serves one step, and only the newest state is of use. It was "
                "used before, or a step was thrown away, as optax.MultiSteps does. To go back, restore a checkpoint of "
                "the server.",
                metadata={"current_step": str(opt.current_step)},
            )
        try:
            updates = opt.step(grads, partial=self.partial, hyperparameters=values)
        except StepInDoubtError:
            if not is_retry:
                raise
            # The interrupted step was applied, and it had these very gradients.
            updates = opt.replay()
        except BaseException:
            digest = digest or _digest(at_step, grads, values)
            # With two unsettled steps it is not known whose reply a replay would bring.
            self._interrupted = digest if is_retry or not unsettled else _AMBIGUOUS
            raise
        self._interrupted = b""
        return updates


def _digest(at_step: int, grads: Mapping[str, np.ndarray], values: Mapping[str, float]) -> bytes:
    """A digest by which a step is recognised."""
    digest = hashlib.blake2b(repr((at_step, sorted(values.items()))).encode())
    for name in grads:
        digest.update(grads[name].tobytes())
    return digest.digest()


_clients: dict[str, Client] = {}
_steps: WeakKeyDictionary[Client, dict[str, ServerSteps]] = WeakKeyDictionary()


def client_of(target: Client | str) -> Client:
    """The client for a target; each address has one, which stays open until the process ends.

    Raises:
        InvalidArgumentError: The target is neither an address nor a client.
        UnreachableError, DeadlineExceededError: As for `connect`.
    """
    if isinstance(target, str):
        if target not in _clients:
            _clients[target] = connect(target)
        return _clients[target]
    check_kind(target, Client, "target", 'optserve.connect("127.0.0.1:50051")')
    return target


def steps_of(client: Client, name: str) -> ServerSteps:
    """The steps of an optimizer: one object for each client and name, because optax may make a transformation often."""
    return _steps.setdefault(client, {}).setdefault(name, ServerSteps(name))
