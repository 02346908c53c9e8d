"""What the server tells of a step, beside its reply."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class StepResult:
    """The result of a step.

    If the client had to resume the step, `replayed` is true. The other values are those of the first reply, unless the
    server was restarted since: then `learning_rates` is empty, `gradient_norm` and `clipped` are None, and `staleness`
    is 0.

    Attributes:
        step: Number of steps applied, this one included.
        learning_rates: The learning rates of the step: first that of the parameters in no group, then that of each
            group. Schedule and staleness are in them; rounding to a parameter's dtype is not. Empty if the method has
            no learning rate, for more than 256 groups, and from servers without FEATURE_STEP_SETTINGS.
        gradient_norm: The Euclidean norm of the gradient over all tensors, before clipping. None unless the step asked
            for it by `with_gradient_norm`, or the optimizer clips by `norm` or `global_norm`.
        clipped: Whether clipping has changed the gradient; None if the optimizer does not clip.
        staleness: Steps that were applied between the parameters of the gradient and this step, if several workers
            share the optimizer.
        replayed: Whether the reply is that of a step that had been applied before.
    """

    step: int
    learning_rates: tuple[float, ...] = ()
    gradient_norm: float | None = None
    clipped: bool | None = None
    staleness: int = 0
    replayed: bool = False
