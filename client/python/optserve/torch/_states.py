"""Between the state of a RemoteOptimizer at the server and the state_dict of the same method in torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch

from optserve._values.torch_methods import KNOWN, STEP, recognise
from optserve.algorithms import Algorithm, FedAdam, Yogi
from optserve.errors import InvalidArgumentError
from optserve.settings import Group
from optserve.state import PARAMETER, OptimizerState
from optserve.torch._layout import METHOD, Layout, plain
from optserve.torch._parameters import Parameter, real
from optserve.torch.state_dicts import from_state_dict, to_state_dict

Members = Sequence[Sequence[Parameter]]
"""The parameters of each param group."""
MASTER = "master_weight"
"""What the state of a parameter has besides, if the server holds the weights: x in float32."""
_SCALARS = frozenset({"step", "mu_product"})
"""What torch has once per parameter, on the host."""


class Entry(dict[str, Any]):
    """What `optimizer.state` has of a parameter: nothing, for the state is at the server."""

    def __missing__(self, key: str) -> Any:
        raise KeyError(
            f"{key!r}: the state of a RemoteOptimizer is at the server. optimizer.state_dict()['state'] reads it in "
            "torch's layout, optimizer.remote.export_state() under the service's names; optimizer.remote.current_step "
            "is the number of steps."
        )


def server_groups(members: Members, algorithms: Sequence[Algorithm]) -> tuple[Algorithm, list[Group]]:
    """The method, and the groups of an optimizer at the server: all param groups but the first that has parameters."""
    filled = [(own, algorithm) for own, algorithm in zip(members, algorithms, strict=True) if own]
    base = filled[0][1]
    return base, [
        Group([parameter.name for parameter in own], differences(algorithm, base)) for own, algorithm in filled[1:]
    ]


def differences(algorithm: Algorithm, base: Algorithm) -> dict[str, Any]:
    """The hyper-parameters that differ from those of another value of the same method."""
    return {key: value for key, value in asdict(algorithm).items() if value != getattr(base, key)}


def torch_entries(
    state: OptimizerState, layout: Layout, members: Members, algorithms: Sequence[Algorithm]
) -> tuple[dict[torch.Tensor, dict[str, Any]], list[Any]]:
    """What a torch optimizer has of each parameter, and the exact step counters of each group, None without.

    Args:
        state: As the server has it.
        layout: Of the groups.
        members: The parameters of each group.
        algorithms: The method of each group, with its present hyper-parameters.
    """
    base, groups = server_groups(members, algorithms)
    masters = state.hosted_parameters
    state = state.without("schedule", "clipping", "weight_decay", "consistency", "parameters")
    state = replace(state, algorithm=base, groups=groups)
    saved = _own_dict(state) if METHOD in layout.defaults else to_state_dict(state)
    flat = [parameter for own in members for parameter in own]
    entries = {
        parameter.tensor: {key: _for_torch(key, value, parameter) for key, value in saved["state"][index].items()}
        for index, parameter in enumerate(flat)
        if index in saved["state"]
    }
    for parameter in flat:
        if parameter.name in masters:
            own = _for_torch(MASTER, torch.from_numpy(np.array(masters[parameter.name])), parameter)
            entries.setdefault(parameter.tensor, {})[MASTER] = own
    exact = iter(saved["param_groups"])
    return entries, [next(exact).get(STEP) if own else None for own in members]


def state_from(
    saved: Mapping[str, Any], layout: Layout, members: Members, algorithms: Sequence[Algorithm], *, hosted: bool
) -> OptimizerState:
    """The state that the server imports for a state_dict whose param groups fit those of the optimizer.

    Args:
        saved: The state_dict.
        layout: Of the groups.
        members: The parameters of each group.
        algorithms: The method of each group.
        hosted: Whether the server holds the parameters: those of the state_dict, or else those of the model.

    Raises:
        InvalidArgumentError: The state_dict is of another method, has other names, or its tensors do not fit.
    """
    flat = [parameter for own in members for parameter in own]
    indices = [index for group in saved["param_groups"] for index in group["params"]]
    entries = {
        index: {key: _for_server(key, value, parameter) for key, value in saved["state"].get(index, {}).items()}
        for index, parameter in zip(indices, flat, strict=True)
    }
    masters = {parameter.name: entry.pop(MASTER, None) for parameter, entry in zip(flat, entries.values(), strict=True)}
    base, groups = server_groups(members, algorithms)
    if METHOD in layout.defaults:
        state = _own_state(dict(zip((parameter.name for parameter in flat), entries.values(), strict=True)), base, flat)
    else:
        kept = [_without_ours(group, layout) for group in saved["param_groups"]]
        params = {p.name: torch.empty(p.spec.shape, dtype=p.dtype, device="meta") for p in flat}
        state = from_state_dict({"state": entries, "param_groups": kept}, params, method=layout.kind)
    if hosted:
        slots = {p.name: {**state.slots[p.name], PARAMETER: _master(p, masters[p.name])} for p in flat}
        state = replace(state, slots=slots)
    return replace(state, algorithm=base, groups=groups)


def _master(parameter: Parameter, saved: torch.Tensor | None) -> np.ndarray:
    if saved is None:
        return parameter.value()
    if tuple(saved.shape) != parameter.spec.shape:
        raise InvalidArgumentError(
            f"{MASTER} of {parameter.name!r} is {list(saved.shape)}, not {list(parameter.spec.shape)}."
        )
    return np.array(saved.numpy())


def _without_ours(group: Mapping[str, Any], layout: Layout) -> dict[str, Any]:
    """A param group with what the service itself knows."""
    kept = {key: plain(value) if key in layout.hyperparameters else value for key, value in group.items()}
    kept = {key: value for key, value in kept.items() if key in KNOWN and key != "param_names"}
    kept.update({"weight_decay": 0, "maximize": False})
    return kept


def check_origin(groups: Sequence[Mapping[str, Any]], layout: Layout, members: Members) -> None:
    """Raise InvalidArgumentError for param groups of a state_dict of another method, or of other parameters."""
    for group in groups:
        method = group.get(METHOD)
        if method != layout.defaults.get(METHOD):
            theirs = f"of {method}" if method else "of one of torch's optimizers"
            raise InvalidArgumentError(f"The state_dict is {theirs}, not of {layout.kind.__name__}.")
    if METHOD not in layout.defaults:
        recognise([_without_ours(group, layout) for group in groups if group["params"]], layout.kind)
    for group, own in zip(groups, members, strict=True):
        for name, parameter in zip(group.get("param_names", ()), own, strict=False):
            if parameter.has_name and name != parameter.name:
                raise InvalidArgumentError(
                    f"The state_dict has {name!r} where this optimizer has {parameter.name!r}: it is of another model, "
                    "or its parameters have another order.",
                    metadata={"parameter": parameter.name},
                )


def _for_torch(key: str, value: torch.Tensor, parameter: Parameter) -> torch.Tensor:
    """A tensor of the server's state as torch has it: complex where the parameter is, and on its device."""
    if key in _SCALARS:
        return value
    value = torch.view_as_complex(value.contiguous()) if parameter.tensor.is_complex() else value
    return value.to(parameter.tensor.device)


def _for_server(key: str, value: Any, parameter: Parameter) -> Any:
    """The reverse of `_for_torch`; the server's state of a half float is float32."""
    if key in _SCALARS or not isinstance(value, torch.Tensor):
        return value
    return real(value).detach().cpu().to(parameter.dtype)


def _own_dict(state: OptimizerState) -> dict[str, Any]:
    """A state_dict of a method that torch does not have: the slots under their own names."""
    names = [name for group in _names(state) for name in group]
    counted = state.parameter_steps or dict.fromkeys(names, state.step)
    entries = {
        index: {slot: torch.from_numpy(np.array(array)) for slot, array in state.slots[name].items()}
        | {"step": torch.tensor(float(counted[name]))}
        for index, name in enumerate(names)
    }
    return {"state": entries, "param_groups": [{} for _ in _names(state)]}


def _names(state: OptimizerState) -> list[list[str]]:
    groups = [list(group.parameters) for group in state.settings.get("groups", ())]
    grouped = {name for group in groups for name in group}
    return [[name for name in state.parameters if name not in grouped], *groups]


def _own_state(
    entries: Mapping[str, Mapping[str, Any]], algorithm: Algorithm, parameters: Sequence[Parameter]
) -> OptimizerState:
    """The reverse of `_own_dict`."""
    slots = {key: None for entry in entries.values() for key in entry if key != "step"}
    steps = {name: int(entry.get("step", 0)) for name, entry in entries.items()}
    arrays: dict[str, dict[str, np.ndarray]] = {}
    for parameter in parameters:
        own = {}
        for slot in slots:
            tensor = entries[parameter.name].get(slot, torch.zeros(parameter.spec.shape, dtype=parameter.dtype))
            if tuple(tensor.shape) != parameter.spec.shape:
                raise InvalidArgumentError(
                    f"{slot} of {parameter.name!r} is {list(tensor.shape)}, not {list(parameter.spec.shape)}."
                )
            own[slot] = np.array(tensor.detach().cpu().to(parameter.dtype).numpy())
        arrays[parameter.name] = own
    return OptimizerState(
        max(steps.values(), default=0),
        algorithm,
        {parameter.name: parameter.spec for parameter in parameters},
        arrays,
        parameter_steps=steps if isinstance(algorithm, (Yogi, FedAdam)) else None,
    )
