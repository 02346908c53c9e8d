"""Which of torch's optimizers corresponds to which method of the service, and torch's names of their settings."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from optserve.algorithms import Adadelta, Adagrad, Algorithm, Momentum, Sgd, WindowedRms
from optserve.errors import InvalidArgumentError


@dataclass(frozen=True)
class _Kind:
    """How one of torch's optimizers corresponds to one of the service's methods.

    Attributes:
        slots: Torch's names of the slots, by the service's names.
        group: Makes torch's hyper-parameters from the service's method.
        algorithm: Makes the service's method from torch's hyper-parameters.
        neutral: Further hyper-parameters of torch, each with the only value that the service supports.
        counts_steps: Whether torch keeps a step counter per parameter.
    """

    slots: Mapping[str, str]
    group: Callable[[Any], dict[str, Any]]
    algorithm: Callable[[Mapping[str, Any]], Algorithm]
    neutral: Mapping[str, Any]
    counts_steps: bool = True


NEUTRAL = {"weight_decay": 0, "maximize": False, "differentiable": False, "foreach": None}

_KINDS: dict[type[Algorithm], _Kind] = {
    Adadelta: _Kind(
        {"square_avg": "square_avg", "acc_delta": "acc_delta"},
        lambda own: {"lr": own.learning_rate, "rho": own.rho, "eps": own.eps},
        lambda group: Adadelta(rho=group["rho"], eps=group["eps"], learning_rate=group["lr"]),
        {"capturable": False},
    ),
    Adagrad: _Kind(
        {"sum": "sum"},
        lambda own: {"lr": own.learning_rate, "eps": own.eps},
        lambda group: Adagrad(learning_rate=group["lr"], eps=group["eps"]),
        {"lr_decay": 0, "initial_accumulator_value": 0, "fused": None},
    ),
    WindowedRms: _Kind(
        {"square_avg": "square_avg"},
        lambda own: {"lr": own.learning_rate, "alpha": own.rho, "eps": own.outer_eps},
        lambda group: WindowedRms(learning_rate=group["lr"], rho=group["alpha"], eps=0.0, outer_eps=group["eps"]),
        {"momentum": 0, "centered": False, "capturable": False},
    ),
    Momentum: _Kind(
        {"momentum": "momentum_buffer"},
        lambda own: {"lr": own.learning_rate, "momentum": own.rho},
        lambda group: Momentum(learning_rate=group["lr"], rho=group["momentum"]),
        {"dampening": 0, "nesterov": False, "fused": None},
        counts_steps=False,
    ),
    Sgd: _Kind(
        {},
        lambda own: {"lr": own.learning_rate, "momentum": 0},
        lambda group: Sgd(learning_rate=group["lr"]),
        {"dampening": 0, "nesterov": False, "fused": None},
        counts_steps=False,
    ),
}

# Settings of how torch computes. They do not change the result.
_IMPLEMENTATION = frozenset({"foreach", "fused", "capturable"})

# What torch's schedulers write into the groups for themselves; `lr` and `momentum` have the present values.
_SCHEDULERS = frozenset(
    {"initial_lr", "max_lr", "min_lr", "base_lr", "swa_lr", "initial_momentum", "max_momentum", "base_momentum"}
)

STEP = "optserve_step"
"""Key of the step counter in a group, for numbers that torch's own counter cannot hold exactly."""


def kind_of(algorithm: Algorithm) -> _Kind:
    if type(algorithm) not in _KINDS:
        raise InvalidArgumentError(f"torch.optim has no {type(algorithm).__name__}.")
    if isinstance(algorithm, WindowedRms) and algorithm.eps != 0:
        raise InvalidArgumentError(
            "torch.optim.RMSprop adds eps outside the root; only a WindowedRms(eps=0, outer_eps=…) can continue there."
        )
    return _KINDS[type(algorithm)]


def recognise(groups: Sequence[Mapping[str, Any]]) -> list[Algorithm]:
    """The method of each param group; it is the same for all."""
    kinds = [_kind_in(group) for group in groups]
    if _KINDS[Momentum] in kinds:
        # A group with momentum 0 is a group of SGD with momentum too.
        kinds = [_KINDS[Momentum] if kind is _KINDS[Sgd] else kind for kind in kinds]
    if any(kind is not kinds[0] for kind in kinds):
        raise InvalidArgumentError("The parameter groups are of different methods.")
    return [_algorithm_in(group, kind) for group, kind in zip(groups, kinds, strict=True)]


def _kind_in(group: Mapping[str, Any]) -> _Kind:
    """The method of a param group, which torch's state_dict does not name, by its settings."""
    if {"rho", "eps", "lr"} <= group.keys():
        return _KINDS[Adadelta]
    if {"lr_decay", "eps", "lr"} <= group.keys():
        return _KINDS[Adagrad]
    if {"alpha", "centered", "eps", "lr"} <= group.keys():
        return _KINDS[WindowedRms]
    if {"dampening", "momentum", "lr"} <= group.keys():
        return _KINDS[Momentum if group["momentum"] else Sgd]
    raise InvalidArgumentError(
        f"A state_dict with the settings {sorted(group)} does not belong to Adadelta, Adagrad, RMSprop or SGD."
    )


def _algorithm_in(group: Mapping[str, Any], kind: _Kind) -> Algorithm:
    """The service's method with the settings of a param group; raises InvalidArgumentError for an unknown setting."""
    algorithm = kind.algorithm({key: float(value) if key == "lr" else value for key, value in group.items()})
    neutral = {**NEUTRAL, **kind.neutral}
    own = {*kind.group(algorithm), *_IMPLEMENTATION, *_SCHEDULERS, "params", "param_names", STEP}
    if isinstance(algorithm, Adagrad):
        # The sums begin with this value, so they contain it.
        own.add("initial_accumulator_value")
    for name, value in group.items():
        if name not in own and (name not in neutral or value != neutral[name]):
            raise InvalidArgumentError(f"The service has no {name}; it is {value!r} in the state_dict.")
    return algorithm
