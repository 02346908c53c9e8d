"""Sends the gradients of a RemoteOptimizer while backward still runs, from hooks of the parameters.

The hooks begin a step, and send gradients as they come. `RemoteOptimizer.step` commits it if nothing has changed since.
If something has, the step is abandoned, and another one sends the present gradients. Where memory is shared with the
server the hooks do nothing: a copy into it takes as long in a hook as in `step`.
"""

from __future__ import annotations

import logging
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from optserve._common.clock import SYSTEM
from optserve._steps.incremental import StepUnderWay
from optserve.errors import OptserveError, StepCancelledError
from optserve.torch._layout import decays
from optserve.torch._parameters import Parameter
from optserve.torch._step_memory import shared_with

if TYPE_CHECKING:
    from optserve.torch._stepper import Stepper

logger = logging.getLogger(__name__)

SENT_FROM_BYTES = 2 << 20
"""Gradients wait for others until they have so many bytes together, and are sent early if as many are still to come. On
a machine whose cores are all busy with the backward pass, messages of 600 KB cost it more time than they save."""

_SAMPLES = 64
"""So many elements of a gradient are compared, because changes through `.data` or NumPy leave no other trace."""


class Taken:
    """A gradient that was sent early, or waits for others to be sent.

    Args:
        grad: The parameter's `grad`.
        array: What is sent: the gradient itself, or a copy.
        maximize: Whether the copy has the other sign.
    """

    def __init__(self, grad: torch.Tensor, array: np.ndarray, *, maximize: bool) -> None:
        # Weak, because a gradient may be large, and zero_grad would not free it.
        self._grad = weakref.ref(grad)
        self._version = grad._version
        self._sample = _sample(grad)
        self._maximize = maximize
        self.array = array

    def is_of(self, grad: torch.Tensor | None) -> bool:
        """Whether it was taken from this very tensor."""
        return self._grad() is grad

    def is_present(self, grad: torch.Tensor, *, maximize: bool, decay: float) -> bool:
        """Whether the gradient is what it was then, as far as that can be seen."""
        return (
            self.is_of(grad)
            and grad._version == self._version
            and maximize == self._maximize
            and not decay
            and torch.equal(_sample(grad), self._sample)
        )


def _bytes(gradients: Mapping[str, np.ndarray]) -> int:
    return sum(array.nbytes for array in gradients.values())


def _sample(grad: torch.Tensor) -> torch.Tensor:
    """A few elements, evenly spread."""
    flat = grad.detach().reshape(-1)
    return flat[:: max(1, flat.numel() // _SAMPLES)].clone()


class _Waiting:
    """Gradients that wait for others, with their bytes, which are counted as they come: there may be thousands."""

    def __init__(self) -> None:
        self.arrays: dict[str, np.ndarray] = {}
        self.bytes = 0

    def add(self, name: str, array: np.ndarray) -> None:
        """Add a gradient, in place of an earlier one of that parameter."""
        before = self.arrays.get(name)
        self.bytes += array.nbytes - (0 if before is None else before.nbytes)
        self.arrays[name] = array


class _EarlyStep:
    """A step that the hooks have begun.

    Args:
        optimizer: Makes the step.
        expected: The parameters that are expected to get gradients.
    """

    def __init__(self, optimizer: Stepper, expected: frozenset[str]) -> None:
        self.expected = expected
        remote = optimizer._at_server
        self.settings = optimizer._groups.changes(optimizer.param_groups, remote._known)
        self._context: AbstractContextManager[StepUnderWay] = remote.begin_step(
            expected, out=optimizer._memory.outputs(remote), reply=optimizer._reply, hyperparameters=self.settings
        )
        self._step = self._context.__enter__()
        self.sent: set[str] = set()
        self.sent_bytes = 0

    @property
    def has_failed(self) -> bool:
        """Whether the step cannot be finished any more."""
        return self._step._has_ended

    def send(self, gradients: Mapping[str, np.ndarray]) -> None:
        """Send some gradients."""
        self._step._send_all(gradients)
        self.sent.update(gradients)
        self.sent_bytes += _bytes(gradients)

    def finish(self, gradients: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Send the rest of the gradients, and wait for the updates."""
        try:
            self._step._send_all({name: array for name, array in gradients.items() if name not in self.sent}, last=True)
        except BaseException as error:
            self.abandon(error)
            raise
        self._context.__exit__(None, None, None)
        return self._step.updates

    def abandon(self, error: BaseException) -> None:
        """Abandon the step; the server forgets it."""
        self._context.__exit__(type(error), error, error.__traceback__)


class Overlap:
    """What the hooks of one RemoteOptimizer have taken since its last step.

    Args:
        optimizer: The optimizer.
        enabled: Whether hooks take any.
    """

    def __init__(self, optimizer: Stepper, *, enabled: bool) -> None:
        self._optimizer = weakref.ref(optimizer)
        # Reentrant: hooks run in the threads of a backward pass, and a garbage collection may end another optimizer.
        self._lock = SYSTEM.rlock()
        self._handles: list[Any] = []
        self._taken: dict[str, Taken] = {}
        self._waiting = _Waiting()
        self._step: _EarlyStep | None = None
        # Whether everything is left to the next step.
        self._is_blocked = False
        # Which parameters the last step had, and how many bytes; None before the first one.
        self._last: frozenset[str] | None = None
        self._last_bytes = 0
        self._paused = False
        self._has_warned = False
        self._enabled = enabled

    def watch(self, parameters: Iterable[Parameter], group: int) -> None:
        """Take the gradients of these parameters, which belong to the param group of that number."""
        for parameter in parameters:
            # torch allows no hook of a frozen parameter; if it is unfrozen later, `step` sends its gradient.
            if self._enabled and parameter.tensor.requires_grad:
                hook = _hook(weakref.ref(self), parameter, group)
                self._handles.append(parameter.tensor.register_post_accumulate_grad_hook(hook))

    def close(self) -> None:
        """Remove the hooks, and abandon a step that they have begun."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.discard()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Take no gradients in a with-block."""
        self._paused, before = True, self._paused
        try:
            yield
        finally:
            self._paused = before

    def arrived(self, parameter: Parameter, group: int) -> None:
        """A backward pass has accumulated the gradient of a parameter."""
        optimizer, grad = self._optimizer(), parameter.tensor.grad
        if optimizer is None or grad is None or self._paused:
            return
        settings = optimizer.param_groups[group]
        decay, maximize = decays(settings)[0], bool(settings.get("maximize"))
        # x may change until the step.
        if decay:
            return
        with self._lock, suppress(OptserveError):
            # An error would end the backward pass; `step` finds the same, and raises it.
            if shared_with(optimizer._at_server) is not None or self._is_repeated(parameter.name, grad):
                return
            array = parameter.gradient(maximize=maximize, decay=0.0)
            if self._send(optimizer, parameter.name, array):
                self._taken[parameter.name] = Taken(grad, array, maximize=maximize)

    def _is_repeated(self, name: str, grad: torch.Tensor) -> bool:
        """Whether a backward pass accumulates a gradient that was taken before, so that it cannot be sent early."""
        before = self._taken.pop(name, None)
        if before is not None and not before.is_of(grad):
            # The pass before has failed, or its gradients were dropped.
            self.discard()
        elif before is not None and self._step is not None:
            self._abandon("backward() has run more than once since the last step(); use accumulating()")
            self._is_blocked = True
        return self._is_blocked

    def _send(self, optimizer: Stepper, name: str, array: np.ndarray) -> bool:
        """Send a gradient in messages, now or with others; returns whether it was taken."""
        remote, last = optimizer._at_server, self._last
        if last is None or name not in last or (self._step is not None and self._step.has_failed):
            return False
        self._waiting.add(name, array)
        waiting_bytes, sent_bytes = self._waiting.bytes, 0 if self._step is None else self._step.sent_bytes
        # The last ones are sent with the commit.
        if min(waiting_bytes, self._last_bytes - sent_bytes - waiting_bytes) < SENT_FROM_BYTES:
            return True
        if self._step is None:
            # Otherwise `step` says what is wrong, or waits for the server.
            if remote._session.streams.current is None or remote._outcomes.unsettled or remote._outcomes.overtaken:
                self._is_blocked = True
                return False
            self._step = _EarlyStep(optimizer, last)
        self._step.send(self._waiting.arrays)
        self._waiting = _Waiting()
        return True

    def gradient(self, name: str, grad: torch.Tensor, *, maximize: bool, decay: float) -> np.ndarray | None:
        """The gradient that was taken, if it has not changed since."""
        taken = self._taken.get(name)
        if taken is None or taken.is_present(grad, maximize=maximize, decay=decay):
            return None if taken is None else taken.array
        del self._taken[name]
        self._abandon(f"the gradient of {name!r} was changed after backward()")
        return None

    def finish(
        self, gradients: Mapping[str, np.ndarray], settings: list[dict[str, Any]] | None
    ) -> dict[str, np.ndarray] | None:
        """Commit the step that the hooks have begun, and return its updates; None if there is none of use."""
        with self._lock:
            self._taken.clear()
            self._waiting = _Waiting()
            self._is_blocked = False
            self._last, self._last_bytes = frozenset(gradients), _bytes(gradients)
            step = self._step
            if step is None:
                return None
            if step.has_failed:
                # If what is wrong lasts, the step that follows raises it.
                logger.warning("a step that was begun while backward ran has failed; its gradients are sent once more")
                self._abandon("")
            elif step.expected != self._last:
                self._abandon("other parameters had gradients than in the step before")
            elif step.settings != settings:
                self._abandon("a setting of the param groups was changed after backward()")
            else:
                self._step = None
                return step.finish(gradients)
        return None

    def discard(self, reason: str = "") -> None:
        """Forget what was taken; a step that was begun is abandoned. With a reason, say once why."""
        with self._lock:
            if self._taken or self._step:
                self._taken.clear()
                self._abandon(reason)
            self._is_blocked = False

    def _abandon(self, reason: str) -> None:
        step, self._step = self._step, None
        self._waiting = _Waiting()
        if step is not None:
            step.abandon(StepCancelledError("The step was abandoned before step() was called."))
        if reason and not self._has_warned:
            self._has_warned = True
            warnings.warn(
                f"overlap=True gains nothing here, because {reason}: step() sends the gradients as they are then.",
                RuntimeWarning,
                stacklevel=2,
            )


def _hook(overlap: weakref.ref[Overlap], parameter: Parameter, group: int) -> Callable[[torch.Tensor], None]:
    """The hook of one parameter, which does not keep the optimizer alive."""

    def hook(_tensor: torch.Tensor) -> None:
        known = overlap()
        if known is not None:
            known.arrived(parameter, group)

    return hook
