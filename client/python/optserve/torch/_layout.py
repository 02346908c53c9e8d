"""The settings in torch's param groups for a method of the service, and back."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Self

import torch

from optserve._values.torch_methods import KNOWN, NEUTRAL, STEP, kind_of
from optserve.algorithms import Adagrad, AdamW, Algorithm, Lion, WindowedRms
from optserve.errors import InvalidArgumentError

DECOUPLED = "decoupled_weight_decay"
METHOD = "method"
"""Key in the groups of a method that torch does not have: the name of the method."""

_OURS = frozenset({"weight_decay", "maximize", DECOUPLED})
"""Settings that `RemoteOptimizer` carries out itself, on the gradient and on x."""
_HARMLESS = frozenset({"foreach", "fused", "initial_accumulator_value"})
"""Settings of how torch computes, and of the state with which it begins."""
_ANYWHERE = frozenset({"params", "param_names", STEP, DECOUPLED, "capturable", "foreach", "fused"})
"""Keys that a group of each method may have."""
_REASONS = {
    "capturable": "a step leaves the process, so a CUDA graph cannot capture it",
    "differentiable": "a step leaves the process, so autograd cannot follow it",
    "lr_decay": "torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1 / (1 + t * lr_decay)) does the same",
    "amsgrad": "no method here keeps the maximum of the averages",
    "centered": "CenteredRmsprop is centered, and no other method is",
    "momentum": "SgdMomentum and Rmsprop have momentum",
    "dampening": "SgdMomentum has dampening",
    "nesterov": "SgdMomentum has nesterov",
    METHOD: "an optimizer cannot change its method",
}


@dataclass(frozen=True)
class Layout:
    """Which settings the param groups of one method have.

    Attributes:
        kind: The method.
        defaults: The settings of a group, with their default values.
        hyperparameters: Those of them that are hyper-parameters of the method.
    """

    kind: type[Algorithm]
    defaults: Mapping[str, Any]
    hyperparameters: tuple[str, ...]

    @classmethod
    def of(cls, algorithm: Algorithm) -> Self:
        """The layout of a method, with its present hyper-parameters as defaults.

        It is that of the class of torch.optim with the same method, if there is one.

        Raises:
            InvalidArgumentError: The method needs the diagonal of the Hessian, which torch does not compute.
        """
        if algorithm.takes_curvature:
            raise InvalidArgumentError(
                f"{type(algorithm).__name__} takes the diagonal of the Hessian with each gradient, which backward() "
                "does not compute: create it with client.create_optimizer, and call step(grads, curvature=…)."
            )
        if _is_torch(algorithm):
            kind = kind_of(algorithm)
            own = kind.group(algorithm)
            rest = {**NEUTRAL, **kind.neutral}
        else:
            own = _generic(algorithm)
            rest = {**NEUTRAL, METHOD: algorithm.name, DECOUPLED: isinstance(algorithm, Lion)}
        rest["weight_decay"] = 0.01 if isinstance(algorithm, AdamW) else 0.0
        return cls(type(algorithm), {**own, **rest}, tuple(own))

    def algorithm(self, group: Mapping[str, Any]) -> Algorithm:
        """The method with the hyper-parameters of a group.

        Raises:
            InvalidArgumentError: The service lacks a setting of the group, or a value is no number.
        """
        for key, only in self.defaults.items():
            if key not in self.hyperparameters and key not in _OURS | _HARMLESS and group.get(key, only) != only:
                raise _refused(key, group[key], self.kind)
        try:
            own = {key: plain(group[key]) for key in self.hyperparameters}
            decay = plain(group.get("weight_decay", 0.0))
            made = self._made(own)
        except KeyError as error:
            raise InvalidArgumentError(f"The param group has no {error}.") from None
        except InvalidArgumentError:
            raise
        except (TypeError, ValueError, IndexError) as error:
            raise InvalidArgumentError(f"A setting of the param group cannot be used: {error}") from error
        for field in fields(made):
            if not isinstance(value := getattr(made, field.name), (float, int)):
                raise InvalidArgumentError(f"{field.name} of a param group must be a number, not {value!r}.")
        if not (isinstance(decay, (float, int)) and math.isfinite(decay) and decay >= 0):
            raise InvalidArgumentError(f"weight_decay must be finite and not negative; it is {decay!r}.")
        expected = self._own(made)
        for key, value in own.items():
            if value != expected[key]:
                raise _refused(key, value, self.kind)
        return made

    def values(self, group: Mapping[str, Any]) -> tuple[Any, ...]:
        """The values of a group from which `algorithm` makes the method, to see whether they have changed."""
        return tuple(plain(group.get(key)) for key in self.defaults)

    def check_names(self, group: Mapping[str, Any]) -> None:
        """Raise InvalidArgumentError for settings that the method does not have; keys of users and schedulers may be.

        A setting with the service's name is one that torch's schedulers do not know. One of another method of torch
        would make the state_dict one of that method.
        """
        for key in group:
            if key in self.defaults or key in _ANYWHERE:
                continue
            if key in KNOWN:
                raise self._unknown(key)
            if key in {field.name for field in fields(self.kind)}:
                raise InvalidArgumentError(
                    f"Param groups have torch's names: {', '.join(self.hyperparameters)}, not {key}."
                )

    def _unknown(self, key: str) -> InvalidArgumentError:
        return InvalidArgumentError(f"{self.kind.__name__} has no setting {key!r}; it has {', '.join(self.defaults)}.")

    def check_defaults(self, given: Mapping[str, Any]) -> None:
        """Raise InvalidArgumentError for a default that no group of the method has."""
        self.check_names(given)
        for key in given:
            if key not in {*self.defaults, DECOUPLED, "capturable", "fused"}:
                raise self._unknown(key)

    def _made(self, own: Mapping[str, Any]) -> Algorithm:
        if METHOD not in self.defaults:
            return kind_of(self._sample()).algorithm(own)
        values = dict(own)
        if "lr" in values:
            values["learning_rate"] = values.pop("lr")
        if "betas" in values:
            values["beta1"], values["beta2"] = values.pop("betas")
        return self.kind(**values)

    def _own(self, algorithm: Algorithm) -> dict[str, Any]:
        return _generic(algorithm) if METHOD in self.defaults else kind_of(algorithm).group(algorithm)

    def _sample(self) -> Algorithm:
        # eps=0 is the form that torch has.
        return WindowedRms(eps=0.0, outer_eps=1.0) if self.kind is WindowedRms else self.kind()


def initial_sum(group: Mapping[str, Any]) -> float:
    """The value with which torch's Adagrad begins its sums."""
    return float(group.get("initial_accumulator_value", 0))


def begins_at_zero(layout: Layout, group: Mapping[str, Any]) -> bool:
    """Whether the state of a new parameter is 0 everywhere."""
    return layout.kind is not Adagrad or initial_sum(group) == 0


def decays(group: Mapping[str, Any]) -> tuple[float, float]:
    """(weight decay that is added to the gradient, weight decay that is decoupled) of a param group."""
    decay = plain(group["weight_decay"])
    return (0.0, decay) if group.get(DECOUPLED) else (decay, 0.0)


def plain(value: Any) -> Any:
    """A number, or a tuple of numbers, of a setting; torch also takes tensors of one element.

    Raises:
        InvalidArgumentError: It is something else.
    """
    if isinstance(value, (float, int, str)) or value is None:
        return value
    if isinstance(value, (tuple, list)):
        return tuple(map(plain, value))
    try:
        return value.item() if isinstance(value, torch.Tensor) else float(value)
    except (RuntimeError, TypeError, ValueError) as error:
        raise InvalidArgumentError(f"A setting of a param group must be a number, not {value!r}.") from error


def _is_torch(algorithm: Algorithm) -> bool:
    try:
        kind_of(algorithm)
    except InvalidArgumentError:
        return False
    return True


def _generic(algorithm: Algorithm) -> dict[str, Any]:
    """The hyper-parameters of a method that torch does not have, under torch's names as far as there are any."""
    own = {field.name: getattr(algorithm, field.name) for field in fields(algorithm)}
    group: dict[str, Any] = {}
    if "learning_rate" in own:
        group["lr"] = own.pop("learning_rate")
    if "beta1" in own and "beta2" in own:
        group["betas"] = (own.pop("beta1"), own.pop("beta2"))
    return {**group, **own}


def _refused(key: str, value: Any, kind: type[Algorithm]) -> InvalidArgumentError:
    reason = f": {_REASONS[key]}" if key in _REASONS else ""
    return InvalidArgumentError(f"{kind.__name__} does not take {key}={value!r}{reason}.", metadata={"setting": key})
