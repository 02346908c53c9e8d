"""The base of all rules. A rule is the formula of one method, per dimension. It does not depend on devices or wires."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

import numpy as np

from optserve_server.domain.errors import OptserveError, Reason

Interval = tuple[float, float]
"""The least and the largest value that something may have."""

Scalars = tuple[float, ...]
"""The constants of a rule, rounded to a dtype."""


_KEPT = 1.0 - 2e-6
"""What rounding leaves of a number of float32, at least, in the operations of a rule."""


class Numbers(NamedTuple):
    """The numbers of a dtype.

    Attributes:
        most: A little less than the largest number, because rounding may exceed a bound a little.
        tiny: The smallest number with all its digits.
        least: The smallest number; rounding may add half of it to a product.
    """

    most: float
    tiny: float
    least: float

    def steepest(self, floor: float) -> float:
        """The largest possible |g| / (√(g²) + floor). It is 1, or more if small squares vanish."""
        return max(1.0, math.sqrt(self.tiny) / floor)

    def remaining(self, least: float, decay: float, steps: int) -> float:
        """The least that rounding leaves of a number of at least `least` after `steps` multiplications by `decay`."""
        left = least * (decay * _KEPT) ** steps
        return left if left >= self.tiny else 0.0


NUMBERS = {
    np.dtype(code): Numbers(
        0.999 * float(np.finfo(code).max), float(np.finfo(code).tiny), float(np.finfo(code).smallest_subnormal)
    )
    for code in ("<f4", "<f8")
}


class Given(NamedTuple):
    """What the bounds of a rule are computed from, beside its constants.

    Attributes:
        numbers: The numbers of the dtype.
        gradient: The largest magnitude of g.
        curvature: The largest magnitude of h; 0 without curvature.
        slots: The interval of each slot.
        steps: The largest number of steps.
    """

    numbers: Numbers
    gradient: float
    curvature: float
    slots: Sequence[Interval]
    steps: int


@dataclass(frozen=True)
class Range:
    """An interval of float64 in the usual notation: `[0, 1)`, `(0, inf)`."""

    text: str

    @cached_property
    def low(self) -> float:
        """The lower end."""
        return float(self.text[1:-1].split(",")[0])

    @cached_property
    def high(self) -> float:
        """The upper end."""
        return float(self.text[1:-1].split(",")[1])

    def __contains__(self, value: float) -> bool:
        """Whether `value` lies in the interval; NaN lies in none."""
        above = value >= self.low if self.text[0] == "[" else value > self.low
        below = value <= self.high if self.text[-1] == "]" else value < self.high
        return above and below


def hyperparameter(default: Any, interval: str) -> Any:
    """A dataclass field with a default and the interval in which its values must lie."""
    return field(default=default, metadata={"range": Range(interval)})


def flag(*, default: bool) -> Any:
    """A dataclass field that is true or false, with a default."""
    return field(default=default, metadata={"flag": True})


def squares_overflow(values: np.ndarray) -> np.ndarray:
    """A mask of the values whose squares are infinite."""
    with np.errstate(over="ignore"):
        return np.isinf(values * values)


@dataclass(frozen=True)
class Rule:
    """One method with its hyper-parameters. `rules.contract` has these from the contract; each formula has a file.

    Attributes:
        name: The method's field in `optserve.v1.Algorithm`.
        slots: Names of the state tensors, all starting at 0.
        signed_slots: The slots that may be negative; the others are averages or sums of squares.
        counts_steps: Whether `scalars` uses the step counter.
        needs_tiny: Whether the last constant of `update` is `Numbers.tiny` of the dtype, which is not one of `scalars`.
        takes_curvature: Whether each step brings the diagonal of the Hessian as well.
        squares_gradient: Whether g² enters the state, so that a gradient whose square overflows would poison it.
        gradient_square_slot, update_square_slot: The slots that hold E[g²] and E[Δx²]; None if there are none.
        eps_in_root: Whether `eps` is added to these before the square root.
        update: The formula: (sqrt, g, *slots, *scalars) -> (update, *slots), or the update alone without slots; with
            curvature (sqrt, g, h, *slots, *scalars). Plain arithmetic, and abs, on whatever the backend passes:
            numbers in a compiled loop, arrays otherwise.
    """

    name: ClassVar[str]
    slots: ClassVar[tuple[str, ...]]
    signed_slots: ClassVar[tuple[str, ...]] = ()
    counts_steps: ClassVar[bool] = False
    needs_tiny: ClassVar[bool] = False
    takes_curvature: ClassVar[bool] = False
    squares_gradient: ClassVar[bool]
    gradient_square_slot: ClassVar[str | None] = None
    update_square_slot: ClassVar[str | None] = None
    eps_in_root: ClassVar[bool] = True
    update: ClassVar[Callable[..., Any]]

    @classmethod
    def range_of(cls, name: str) -> Range:
        """The range of a hyper-parameter that is a number."""
        return cls.__dataclass_fields__[name].metadata["range"]

    def scalars(self, step: int) -> tuple[float, ...]:
        """The constants of `update`, computed in float64; see `constants`.

        Args:
            step: Number of steps that the parameter has taken part in, this one included; 1 in the first step. Only
                for a rule with `counts_steps`.
        """
        raise NotImplementedError

    def constants(self, dtype: np.dtype, step: int) -> list[np.generic]:
        """The constants of `update` for one dtype: `scalars`, each rounded once, then the dtype's own if it is needed.

        Args:
            dtype: The tensor's dtype.
            step: See `scalars`.
        """
        own = (NUMBERS[dtype].tiny,) if self.needs_tiny else ()
        return [dtype.type(scalar) for scalar in (*self.scalars(step), *own)]

    @classmethod
    def bounds(
        cls,
        given: Given,  # noqa: ARG003
        scalars: Scalars,  # noqa: ARG003
    ) -> tuple[float, Sequence[Interval]] | None:
        """Bounds of the results of some steps, for all operands and slots within what is given, up to rounding.

        Args:
            given: What is known before the steps.
            scalars: See `constants`. For a rule with `counts_steps` those of the first step; the bounds hold for all.

        Returns:
            The largest magnitude of an update, and the interval of each slot. The magnitude is infinite if an update
            may be infinite, or a number on the way to an update or a slot. None if no bounds are known: then every
            step needs a trial, which takes twice the time.
        """
        return None

    def effective_rate(self, slots: Mapping[str, np.ndarray], update: np.ndarray | None, step: int) -> Any:  # noqa: ARG002
        """The factor on −g that the last step used, in float64; None if it does not follow from the slots.

        Of a method that averages gradients, it is the factor on minus the average.

        Args:
            slots: The slots after that step, in float64.
            update: The update of that step, in float64; None if it is no longer known.
            step: See `scalars`; that of the last step that the parameter took part in.
        """
        return None

    @property
    def rate_needs_update(self) -> bool:
        """Whether `effective_rate` needs the update to be exact."""
        return False

    def unreachable_values(self, slot: str, values: np.ndarray) -> np.ndarray | None:  # noqa: ARG002
        """A mask of the values that no step can leave in a slot, beside negative values of unsigned slots; or None."""
        return None

    def check(self, dtype: np.dtype) -> None:
        """Refuse hyper-parameters that are out of range, also after rounding to `dtype`.

        Raises:
            OptserveError: HYPERPARAMETER_OUT_OF_RANGE, with the field's path.
        """
        for item in fields(self):
            value = getattr(self, item.name)
            if item.metadata.get("flag"):
                if not isinstance(value, bool):
                    raise self.out_of_range(item.name, f"is {value!r}, but must be true or false")
                continue
            interval = self.range_of(item.name)
            if value not in interval or not math.isfinite(value):
                raise self.out_of_range(item.name, f"is {value!r}, but must lie in {interval.text}")
            with np.errstate(over="ignore", under="ignore"):
                rounded = float(dtype.type(value))
            if rounded not in interval or not math.isfinite(rounded):
                raise self.out_of_range(
                    item.name,
                    f"is {value!r}, which is {rounded!r} in {dtype.name} and so no longer in {interval.text}",
                )

    def out_of_range(self, name: str, what: str) -> OptserveError:
        """The error for a hyper-parameter, of which `what` goes on with the sentence."""
        return OptserveError(
            Reason.HYPERPARAMETER_OUT_OF_RANGE,
            f"{self.name}.{name} {what}.",
            field=f"optimizer.algorithm.{self.name}.{name}",
        )

    def is_bounded_by(self, other: Rule) -> bool:
        """Whether bounds for `other` hold for this rule too: it is the same, or has a smaller learning rate."""
        others = vars(other)
        return all(
            value == others[name] or (name == "learning_rate" and value <= others[name])
            for name, value in vars(self).items()
        )

    def gradient_limit(self, dtype: np.dtype) -> float:
        """The largest magnitude of an element of the gradient, and of the curvature, that keeps the state finite.

        If the rule squares gradients, it is about the root of the largest number of `dtype`.
        """
        largest = float(np.finfo(dtype).max)
        # Rounded towards 0 in the dtype itself, so that limit * limit does not overflow there.
        return float(np.nextafter(dtype.type(math.sqrt(largest)), dtype.type(0))) if self.squares_gradient else largest
