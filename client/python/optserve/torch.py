"""States to and from torch.optim, so that a run can leave or enter the service in mid-training.

    state = opt.export_state()
    torch_optimizer.load_state_dict(optserve.torch.to_state_dict(state))

    state = optserve.torch.from_state_dict(torch_optimizer.state_dict(), dict(model.named_parameters()))
    opt = client.create_optimizer("mlp", state.algorithm, state.parameters)
    opt.import_state(state)

| torch.optim | here | note |
|---|---|---|
| Adadelta | Adadelta | slots as they are |
| Adagrad | Adagrad | slots as they are |
| RMSprop | WindowedRms with eps=0 and outer_eps | torch adds eps outside the root, equation 9 inside |
| SGD with momentum | Momentum | torch's buffer is Δx / −η |
| SGD | Sgd | no slots |

What torch can do and the service cannot, such as nesterov or amsgrad, is refused; nothing is left out silently.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from optserve.algorithms import Adadelta, Adagrad, Algorithm, Momentum, Sgd, WindowedRms
from optserve.errors import InvalidArgumentError
from optserve.state import OptimizerState, TensorSpec


@dataclass(frozen=True)
class _Kind:
    """How one of torch's optimizers corresponds to one of the service's methods.

    Attributes:
        slots: Our slots with torch's names for them.
        group: Our method as torch's hyper-parameters.
        algorithm: The reverse.
        neutral: Further hyper-parameters of torch, with the only value that the service has too.
        counts_steps: Whether torch keeps a step counter per parameter.
    """

    slots: Mapping[str, str]
    group: Callable[[Any], dict[str, Any]]
    algorithm: Callable[[Mapping[str, Any]], Algorithm]
    neutral: Mapping[str, Any]
    counts_steps: bool = True


_NEUTRAL = {"weight_decay": 0, "maximize": False, "differentiable": False, "foreach": None}

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

# Settings of how torch computes, not of what.
_IMPLEMENTATION = frozenset({"foreach", "fused", "capturable"})


def to_state_dict(state: OptimizerState) -> dict[str, Any]:
    """A state_dict for the torch optimizer of the same method, over the parameters in the state's order.

    Raises:
        InvalidArgumentError: torch has no such method: a WindowedRms with eps inside the root, or a Momentum whose
            learning rate of 0 does not tell the buffer.
    """
    algorithm = state.algorithm
    if isinstance(algorithm, WindowedRms) and algorithm.eps != 0:
        raise InvalidArgumentError(
            "torch.optim.RMSprop adds eps outside the root; only a WindowedRms(eps=0, outer_eps=…) can continue there."
        )
    kind = _KINDS[type(algorithm)]
    entries: dict[int, dict[str, Any]] = {}
    for index, slots in enumerate(state.slots.values()):
        arrays = {
            theirs: torch.from_numpy(np.array(_to_torch(algorithm, slots[own]))) for own, theirs in kind.slots.items()
        }
        if kind.counts_steps:
            arrays["step"] = torch.tensor(float(state.step))
        if arrays:
            entries[index] = arrays
    group = {**_NEUTRAL, **kind.neutral, **kind.group(algorithm), "params": list(range(len(state.slots)))}
    return {"state": entries, "param_groups": [group]}


def from_state_dict(state_dict: Mapping[str, Any], params: Mapping[str, torch.Tensor]) -> OptimizerState:
    """The state that a torch optimizer's state_dict holds.

    Args:
        state_dict: Of Adadelta, Adagrad, RMSprop or SGD.
        params: The parameters by name, in the order in which the torch optimizer got them, such as
            dict(model.named_parameters()).

    Raises:
        InvalidArgumentError: The service lacks something that it uses, or it does not fit `params`.
    """
    group = _one_group(state_dict["param_groups"])
    kind, algorithm = _recognise(group)
    if len(group["params"]) != len(params):
        raise InvalidArgumentError(f"The state_dict is of {len(group['params'])} parameters, not {len(params)}.")
    for name, parameter in params.items():
        if parameter.dtype not in (torch.float32, torch.float64):
            raise InvalidArgumentError(f"{name!r} is {parameter.dtype}; optimizers' state is float32 or float64.")
    steps = {0}
    slots: dict[str, dict[str, np.ndarray]] = {}
    for index, (name, parameter) in zip(group["params"], params.items(), strict=True):
        entry = state_dict["state"].get(index, {})
        steps.add(int(entry.get("step", 0)))
        slots[name] = {
            own: _array(algorithm, entry.get(theirs), parameter, f"{theirs} of {name!r}")
            for own, theirs in kind.slots.items()
        }
    specs = {name: TensorSpec(tuple(item.shape), str(item.dtype).rpartition(".")[2]) for name, item in params.items()}
    return OptimizerState(max(steps), algorithm, specs, slots)


def _to_torch(algorithm: Algorithm, array: np.ndarray) -> np.ndarray:
    if not isinstance(algorithm, Momentum):
        return array
    if algorithm.learning_rate == 0:
        raise InvalidArgumentError("torch's momentum buffer is Δx / −η, which a learning rate of 0 does not tell.")
    return (array / -algorithm.learning_rate).astype(array.dtype)


def _array(algorithm: Algorithm, tensor: torch.Tensor | None, parameter: torch.Tensor, what: str) -> np.ndarray:
    """One of torch's state tensors as ours; one that is not there yet is 0."""
    if tensor is None:
        return np.zeros(tuple(parameter.shape), str(parameter.dtype).rpartition(".")[2])
    if tensor.shape != parameter.shape or tensor.dtype != parameter.dtype:
        raise InvalidArgumentError(
            f"{what} is {list(tensor.shape)} {tensor.dtype}; its parameter is {list(parameter.shape)} "
            f"{parameter.dtype}."
        )
    array = np.array(tensor.detach().cpu().numpy())
    if isinstance(algorithm, Momentum) and algorithm.learning_rate == 0 and array.any():
        raise InvalidArgumentError("torch's momentum buffer is Δx / −η, which says nothing where the rate is 0.")
    return (array * -algorithm.learning_rate).astype(array.dtype) if isinstance(algorithm, Momentum) else array


def _one_group(groups: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """All groups as one, if they have the same settings."""
    if not groups:
        raise InvalidArgumentError("The state_dict has no parameter group.")
    settings = [
        {key: value for key, value in group.items() if key not in ("params", "param_names")} for group in groups
    ]
    if any(other != settings[0] for other in settings[1:]):
        raise InvalidArgumentError("The parameter groups have different settings, which this server does not have.")
    return settings[0] | {"params": [index for group in groups for index in group["params"]]}


def _recognise(group: Mapping[str, Any]) -> tuple[_Kind, Algorithm]:
    """The method of a parameter group, which torch's state_dict does not name, by its settings."""
    if "rho" in group:
        kind = _KINDS[Adadelta]
    elif "lr_decay" in group:
        kind = _KINDS[Adagrad]
    elif "alpha" in group and "centered" in group:
        kind = _KINDS[WindowedRms]
    elif "dampening" in group:
        kind = _KINDS[Momentum if group["momentum"] else Sgd]
    else:
        raise InvalidArgumentError(
            f"A state_dict with the settings {sorted(group)} is of none of Adadelta, Adagrad, RMSprop and SGD."
        )
    algorithm = kind.algorithm({key: float(value) if key == "lr" else value for key, value in group.items()})
    neutral = {**_NEUTRAL, **kind.neutral}
    own = kind.group(algorithm)
    for name, value in group.items():
        known = name in own or name in _IMPLEMENTATION or name == "params"
        if not known and (name not in neutral or value != neutral[name]):
            raise InvalidArgumentError(f"The service has no {name}; it is {value!r} in the state_dict.")
    return kind, algorithm
