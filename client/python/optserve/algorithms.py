"""The methods that an optimizer can use, with their hyper-parameters. What they compute is on the server.

Equation numbers are those of M. D. Zeiler, "ADADELTA: An Adaptive Learning Rate Method", arXiv:1212.5701. Ranges
are checked by the server, whose `InvalidArgumentError` names the field.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import ClassVar

from optserve.v1 import algorithms_pb2


@dataclass(frozen=True)
class Algorithm:
    """One method with its hyper-parameters. Use a subclass."""

    name: ClassVar[str]
    takes_curvature: ClassVar[bool] = False

    def to_message(self) -> algorithms_pb2.Algorithm:
        """The contract's form."""
        message = algorithms_pb2.Algorithm()
        settings = getattr(message, self.name)
        settings.SetInParent()
        for field, value in asdict(self).items():
            setattr(settings, field, value)
        return message


@dataclass(frozen=True)
class Adadelta(Algorithm):
    """ADADELTA, Algorithm 1: Δx = −(RMS[Δx] / RMS[g]) g. Slots `square_avg` and `acc_delta`.

    Args:
        rho: Decay constant, in [0, 1).
        eps: Conditioning constant inside both roots, positive.
        learning_rate: Factor on the update, not negative.

    Example:
        >>> Adadelta(rho=0.95, eps=1e-6)
        Adadelta(rho=0.95, eps=1e-06, learning_rate=1.0)
    """

    name = "adadelta"

    rho: float = 0.95
    eps: float = 1e-6
    learning_rate: float = 1.0


@dataclass(frozen=True)
class Sgd(Algorithm):
    """Plain gradient descent, equation 2: Δx = −η g. No slots.

    Args:
        learning_rate: η, not negative.
    """

    name = "sgd"

    learning_rate: float = 0.01


@dataclass(frozen=True)
class Momentum(Algorithm):
    """Gradient descent with momentum, equation 4: Δx_t = ρ Δx_{t−1} − η g_t. Slot `momentum`.

    Args:
        learning_rate: η, not negative.
        rho: Decay of the previous update, in [0, 1).
    """

    name = "momentum"

    learning_rate: float = 0.01
    rho: float = 0.9


@dataclass(frozen=True)
class Adagrad(Algorithm):
    """ADAGRAD, equation 5: Δx = −η g / (√(Σ g²) + ε). Slot `sum`.

    Args:
        learning_rate: η, not negative.
        eps: Keeps the quotient finite while the sum is 0, positive.
    """

    name = "adagrad"

    learning_rate: float = 0.01
    eps: float = 1e-10


@dataclass(frozen=True)
class WindowedRms(Algorithm):
    """A decaying window of squared gradients, equations 8 to 10: Δx = −η g / (√(E[g²] + ε) + ε_outer).

    Slot `square_avg`. The paper has ε alone; with eps=0 and an outer_eps it is torch's RMSprop.

    Args:
        learning_rate: η, not negative.
        rho: Decay constant, in [0, 1).
        eps: Conditioning constant inside the root, not negative.
        outer_eps: Conditioning constant outside the root, not negative; one of the two must be positive.
    """

    name = "windowed_rms"

    learning_rate: float = 0.01
    rho: float = 0.9
    eps: float = 1e-6
    outer_eps: float = 0.0


@dataclass(frozen=True)
class DiagonalHessian(Algorithm):
    """The diagonal Hessian method of Becker and LeCun, equation 6: Δx = −η g / (|h| + μ). No slots.

    Each step brings the curvature h = diag(H), which may have either sign.

    Args:
        mu: Keeps the quotient finite where the curvature is 0, positive.
        learning_rate: η, not negative.
    """

    name = "diagonal_hessian"
    takes_curvature = True

    mu: float = 3.0
    learning_rate: float = 1.0


@dataclass(frozen=True)
class Vsgd(Algorithm):
    """vSGD of Schaul, Zhang and LeCun, equation 7: Δx = −(1 / E[|h|]) (E[g]² / E[g²]) g. It has no learning rate.

    Each step brings the curvature h = diag(H), which may have either sign. Slots `grad_avg`, `square_avg`,
    `curvature_avg` and `tau`.

    Args:
        eps: Conditioning constant added to E[|h|], positive.
        initial_overestimate: Factor on the first estimates of E[g²] and E[|h|], 1 to 1e6.
        initial_steps: Steps in which nothing moves and the first estimates are made, 2 to 1e6.
    """

    name = "vsgd"
    takes_curvature = True

    eps: float = 1e-2
    initial_overestimate: float = 100.0
    initial_steps: int = 10


ALGORITHMS: dict[str, type[Algorithm]] = {
    kind.name: kind for kind in (Adadelta, Sgd, Momentum, Adagrad, WindowedRms, DiagonalHessian, Vsgd)
}
"""Every method by its name in the contract."""


def from_message(message: algorithms_pb2.Algorithm) -> Algorithm:
    """The method that a message holds."""
    name = message.WhichOneof("method")
    if name not in ALGORITHMS:
        raise ValueError(f"This client does not know the method {name!r}; a newer one may.")
    kind = ALGORITHMS[name]
    settings = getattr(message, name)
    return kind(**{field.name: getattr(settings, field.name) for field in fields(kind)})
