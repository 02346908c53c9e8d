"""Weight decay of the parameters that the server holds: its kinds, and which values they may have."""

from __future__ import annotations

import math
from enum import Enum
from typing import TYPE_CHECKING

from optserve_server.domain.errors import OptserveError, Reason
from optserve_server.numerics.rules import Rule

if TYPE_CHECKING:
    from optserve_server.numerics.settings import Settings

_MOST = 1e30
"""An L2 decay beyond it would only ever make infinite gradients in float32."""


class DecayKind(Enum):
    """What a weight decay w does in a step. The values are the names on disk."""

    FIXED = "fixed"
    """x ← x + (Δx − w x)."""
    TIMES_LEARNING_RATE = "times_learning_rate"
    """x ← x + (Δx − η w x), with the learning rate η of the step, as AdamW."""
    L2 = "l2"
    """g ← g + w x, after clipping."""


def check_decay(settings: Settings, decay: float, rule: Rule, field: str, whose: str = "") -> None:
    """Refuse a weight decay that is impossible.

    Args:
        settings: Those of the optimizer.
        decay: w.
        rule: The rule of its parameters, with the largest learning rate.
        field: Path of the field that has it, for the error.
        whose: Whose decay it is, as the end of a sentence.

    Raises:
        OptserveError: HYPERPARAMETER_OUT_OF_RANGE or INVALID_FIELD.
    """
    kind = settings.decay_kind
    most = 1.0 if kind is DecayKind.FIXED else math.inf
    if not 0 <= decay < most:
        raise _out_of_range(f"is {decay!r}, but must lie in [0, {most:g}){whose}", field)
    if decay and not settings.hosted:
        raise OptserveError(
            Reason.INVALID_FIELD,
            "weight_decay needs parameters that the server holds; in delta mode add it to the gradient.",
            field=field,
        )
    if kind is DecayKind.L2 and decay > _MOST:
        raise _out_of_range(f"is {decay!r}; added to the gradient it is at most {_MOST:g}{whose}", field)
    if kind is DecayKind.TIMES_LEARNING_RATE:
        rate = getattr(rule, "learning_rate", None)
        if rate is None:
            raise OptserveError(
                Reason.INVALID_FIELD,
                f"{rule.name} has no learning rate by which its weight decay could be multiplied.",
                field=field,
            )
        if not rate * decay < 1:
            raise _out_of_range(
                f"is {decay!r}; times the learning rate {rate!r} it is {rate * decay:g}, "
                f"but must be less than 1{whose}",
                field,
            )


def _out_of_range(what: str, field: str) -> OptserveError:
    return OptserveError(Reason.HYPERPARAMETER_OUT_OF_RANGE, f"weight_decay {what}.", field=field)
