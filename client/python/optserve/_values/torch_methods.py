"""Which of torch's optimizers corresponds to which method of the service, and torch's names of their settings."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from optserve.algorithms import (
    Adadelta,
    Adagrad,
    Adam,
    AdamW,
    Algorithm,
    CenteredRmsprop,
    Momentum,
    Nadam,
    Rmsprop,
    Sgd,
    SgdMomentum,
    WindowedRms,
)
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


_MOMENTS = {"grad_avg": "exp_avg", "square_avg": "exp_avg_sq"}


def _adam(kind: type[Adam] | type[AdamW]) -> _Kind:
    """Adam, or AdamW without its decay: one class of torch's has both."""
    return _Kind(
        _MOMENTS,
        lambda own: {"lr": own.learning_rate, "betas": (own.beta1, own.beta2), "eps": own.eps},
        lambda group: kind(
            learning_rate=group["lr"],
            beta1=float(group["betas"][0]),
            beta2=float(group["betas"][1]),
            eps=group["eps"],
        ),
        {"amsgrad": False, "capturable": False, "fused": None, "decoupled_weight_decay": kind is AdamW},
    )


def _rmsprop(kind: type[Rmsprop] | type[CenteredRmsprop], slots: Mapping[str, str]) -> _Kind:
    return _Kind(
        slots,
        lambda own: {"lr": own.learning_rate, "alpha": own.rho, "eps": own.eps, "momentum": own.momentum},
        lambda group: kind(learning_rate=group["lr"], rho=group["alpha"], eps=group["eps"], momentum=group["momentum"]),
        {"centered": kind is CenteredRmsprop, "capturable": False},
    )


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
    SgdMomentum: _Kind(
        {"momentum_buffer": "momentum_buffer"},
        lambda own: {
            "lr": own.learning_rate,
            "momentum": own.momentum,
            "dampening": own.dampening,
            "nesterov": own.nesterov,
        },
        lambda group: SgdMomentum(
            learning_rate=group["lr"],
            momentum=group["momentum"],
            dampening=group["dampening"],
            nesterov=bool(group["nesterov"]),
        ),
        {"fused": None},
        counts_steps=False,
    ),
    Rmsprop: _rmsprop(Rmsprop, {name: name for name in ("square_avg", "momentum_buffer")}),
    CenteredRmsprop: _rmsprop(CenteredRmsprop, {name: name for name in ("square_avg", "momentum_buffer", "grad_avg")}),
    Adam: _adam(Adam),
    AdamW: _adam(AdamW),
    Nadam: _Kind(
        _MOMENTS,
        lambda own: {
            "lr": own.learning_rate,
            "betas": (own.beta1, own.beta2),
            "eps": own.eps,
            "momentum_decay": own.momentum_decay,
        },
        lambda group: Nadam(
            learning_rate=group["lr"],
            beta1=float(group["betas"][0]),
            beta2=float(group["betas"][1]),
            eps=group["eps"],
            momentum_decay=group["momentum_decay"],
        ),
        {"capturable": False, "decoupled_weight_decay": False},
    ),
}

COUNTED = (Adam, AdamW, Nadam, SgdMomentum)
"""The methods of the service that use the step counters of the parameters."""

_ALSO: dict[type[Algorithm], tuple[type[Algorithm], ...]] = {
    Momentum: (Sgd,),
    SgdMomentum: (Sgd, Momentum),
    Rmsprop: (WindowedRms,),
    Adam: (AdamW,),
    AdamW: (Adam,),
}
"""For a method, the other methods whose settings in torch are settings of this method too."""

# Settings of how torch computes. They do not change the result.
_IMPLEMENTATION = frozenset({"foreach", "fused", "capturable"})

# What torch's schedulers write into the groups for themselves; `lr` and `momentum` have the present values.
_SCHEDULERS = frozenset(
    {"initial_lr", "max_lr", "min_lr", "base_lr", "swa_lr", "initial_momentum", "max_momentum", "base_momentum"}
)

STEP = "optserve_step"
"""Key of the step counter in a group, for numbers that torch's own counter cannot hold exactly.

A list if the parameters of the group have different counters.
"""

KNOWN = frozenset({"params", "param_names", STEP, "initial_accumulator_value", "decoupled_weight_decay"}).union(
    _IMPLEMENTATION,
    NEUTRAL,
    *(kind.neutral for kind in _KINDS.values()),
    *(kind.group(method()) for method, kind in _KINDS.items()),
)
"""Every key of a param group that belongs to one of torch's optimizers, and not to a scheduler or a user."""


def kind_of(algorithm: Algorithm) -> _Kind:
    if type(algorithm) not in _KINDS:
        raise InvalidArgumentError(f"torch.optim has no {type(algorithm).__name__}.")
    if isinstance(algorithm, WindowedRms) and algorithm.eps != 0:
        raise InvalidArgumentError(
            "torch.optim.RMSprop adds eps outside the root; only a WindowedRms(eps=0, outer_eps=…) can continue there."
        )
    return _KINDS[type(algorithm)]


def torch_slots(algorithm: Algorithm) -> dict[str, str]:
    """Our slots with torch's names for them, as far as torch has them: without momentum it has no buffer."""
    slots = dict(kind_of(algorithm).slots)
    if getattr(algorithm, "momentum", 1) == 0:
        del slots["momentum_buffer"]
    return slots


def momentum_product(algorithm: Nadam, step: int) -> float:
    """The mu_product that torch's NAdam has after so many steps."""
    product, i = algorithm.beta1**step, 1
    while i <= step and product > 0:
        factor = 1.0 - 0.5 * 0.96 ** (i * algorithm.momentum_decay)
        if factor == 1.0:
            break
        product *= factor
        i += 1
    return product


def recognise(groups: Sequence[Mapping[str, Any]], method: type[Algorithm] | None) -> list[Algorithm]:
    """The method of each param group; it is the same for all.

    Args:
        groups: Of a state_dict.
        method: One that the groups have to be of; None for the simplest that all are of.
    """
    found = [_method_in(group) for group in groups]
    wanted = [method] if method else [*dict.fromkeys(found)]
    # One group of SGD with momentum makes those without it, whose momentum is 0, groups of the same method.
    fitting = [kind for kind in wanted if all(one is kind or one in _ALSO.get(kind, ()) for one in found)]
    if not fitting and method:
        others = ", ".join(kind.__name__ for kind in dict.fromkeys(found))
        raise InvalidArgumentError(f"The state_dict is of {others}, not of {method.__name__}.")
    if not fitting:
        raise InvalidArgumentError("The parameter groups are of different methods.")
    return [_algorithm_in(group, _KINDS[fitting[0]]) for group in groups]


def _method_in(group: Mapping[str, Any]) -> type[Algorithm]:
    """The method of a param group, which torch's state_dict does not name, by its settings."""
    for keys, choose in _SIGNS:
        if keys <= group.keys():
            return choose(group)
    raise InvalidArgumentError(
        f"A state_dict with the settings {sorted(group)} does not belong to Adadelta, Adagrad, RMSprop, SGD, Adam, "
        "AdamW or NAdam."
    )


def _sgd_in(group: Mapping[str, Any]) -> type[Algorithm]:
    if group["nesterov"] or group["dampening"]:
        return SgdMomentum
    return Momentum if group["momentum"] else Sgd


def _rmsprop_in(group: Mapping[str, Any]) -> type[Algorithm]:
    if group["centered"]:
        return CenteredRmsprop
    return Rmsprop if group["momentum"] else WindowedRms


_SIGNS: tuple[tuple[set[str], Callable[[Mapping[str, Any]], type[Algorithm]]], ...] = (
    ({"rho", "eps", "lr"}, lambda _: Adadelta),
    ({"lr_decay", "eps", "lr"}, lambda _: Adagrad),
    ({"alpha", "centered", "momentum", "eps", "lr"}, _rmsprop_in),
    ({"dampening", "nesterov", "momentum", "lr"}, _sgd_in),
    ({"betas", "momentum_decay", "eps", "lr"}, lambda _: Nadam),
    ({"betas", "amsgrad", "eps", "lr"}, lambda group: AdamW if group.get("decoupled_weight_decay") else Adam),
)
"""Settings of which a param group has all, with the method that it is of then."""


def _algorithm_in(group: Mapping[str, Any], kind: _Kind) -> Algorithm:
    """The service's method with the settings of a param group; raises InvalidArgumentError for an unknown setting."""
    algorithm = kind.algorithm({key: float(value) if key == "lr" else value for key, value in group.items()})
    neutral = {**NEUTRAL, **kind.neutral}
    # How it decays says nothing where it does not.
    own = {*kind.group(algorithm), *_IMPLEMENTATION, *_SCHEDULERS, "params", "param_names", STEP}
    own.add("decoupled_weight_decay")
    if isinstance(algorithm, Adagrad):
        # The sums begin with this value, so they contain it.
        own.add("initial_accumulator_value")
    for name, value in group.items():
        if name not in own and (name not in neutral or value != neutral[name]):
            is_decoupled = name == "weight_decay" and group.get("decoupled_weight_decay")
            instead = (
                " An optimizer that holds x has a weight_decay of its own, lr times torch's." if is_decoupled else ""
            )
            raise InvalidArgumentError(f"The service has no {name}; it is {value!r} in the state_dict.{instead}")
    return algorithm
