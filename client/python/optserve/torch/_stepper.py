"""The part of a RemoteOptimizer that makes steps."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch

from optserve._resources.choices import ReplyName
from optserve.errors import ClientUseError, FailedPreconditionError, StepsLostError
from optserve.optimizer import Optimizer
from optserve.torch._advice import advice
from optserve.torch._groups import Groups
from optserve.torch._overlap import Overlap
from optserve.torch._place import Place
from optserve.torch._step_memory import StepMemory


class Stepper(torch.optim.Optimizer):
    """An optimizer of torch whose steps the service makes.

    Args:
        params: As for each optimizer of torch.
        defaults: The settings of a group.
        groups: What is known of the groups.
        overlap: Whether gradients are sent while backward runs.
    """

    # None until the server has the optimizer.
    _place: Place | None = None

    def __init__(self, params: Any, defaults: dict[str, Any], groups: Groups, *, overlap: bool) -> None:
        self._groups = groups
        self._memory = StepMemory()
        self._overlap = Overlap(self, enabled=overlap)
        super().__init__(params, defaults)

    @property
    def remote(self) -> Optimizer:
        """The optimizer at the server."""
        self._overlap.discard("`remote`, or the state, was used between backward() and step()")
        return self._at_server

    @property
    def _at_server(self) -> Optimizer:
        if self._place is None:
            raise ClientUseError("This RemoteOptimizer has no optimizer at the server.")
        return self._place.remote

    @property
    def _reply(self) -> ReplyName:
        return "parameters" if self._groups.holds_x else "updates"

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Send the gradients, and add the updates to the parameters.

        Args:
            closure: Computes the loss once more, with its gradients, before the step.

        Returns:
            The loss of the closure; None without one.

        Raises:
            InvalidArgumentError: A gradient is sparse, not finite or cannot be read, or a setting is out of range.
                Nothing was changed. (GradScaler skips steps whose gradients are not finite.)
            StepInDoubtError: An earlier, interrupted step was applied, or may have been. See `recover`.
            OptserveError: As for `Optimizer.step`.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with advice(self._groups.names):
            gradients = self._groups.gradients(self.param_groups, self._memory.regions(self._at_server), self._overlap)
            if not gradients:
                return loss
            replies = self._replies(gradients)
        self._apply(replies)
        return loss

    def _replies(self, gradients: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Make a step with these gradients."""
        remote = self._at_server
        changes = self._groups.changes(self.param_groups, remote._known)
        replies = self._overlap.finish(gradients, changes)
        if replies is not None:
            return replies
        out, whole = self._memory.outputs(remote), len(gradients) == len(remote._model)
        return remote.step(gradients, out=out, reply=self._reply, partial=not whole, hyperparameters=changes)

    def _apply(self, replies: dict[str, np.ndarray]) -> None:
        # Without rates if the server was restarted while the step was made.
        result = self._at_server.last_result
        self._groups.apply(self.param_groups, replies, result.learning_rates if result is not None else ())

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients, as torch.optim.Optimizer does."""
        self._overlap.discard()
        super().zero_grad(set_to_none)

    def accumulating(self) -> AbstractContextManager[None]:
        """A with-block for the backward passes of a step before its last one: with `overlap` they send nothing."""
        return self._overlap.paused()

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """What GradScaler asks for before each step; it has changed the gradients, or will."""
        self._overlap.discard("a GradScaler changes the gradients after backward()")
        return False

    @torch.no_grad()
    def recover(self) -> bool:
        """Add the updates of an interrupted step if the server has applied it; `step` works again afterwards.

        For a step that has raised StepCancelledError, DeadlineExceededError, KeyboardInterrupt or StepInDoubtError.

        Returns:
            Whether the step was applied.

        Raises:
            StepsLostError: The server was restarted and has lost its state. Load a checkpoint.
            OptserveError: As for `Optimizer.replay`. If the server no longer has the updates, load a checkpoint.
        """
        if not self.remote._outcomes.unsettled:
            return False
        with advice(self._groups.names):
            try:
                replies = self.remote.replay(reply=self._reply)
            except StepsLostError:
                raise
            except FailedPreconditionError:
                self.remote.refresh()
                return False
        self._apply(replies)
        return True
