"""Converts states to and from the state_dicts of torch.optim. The package's docstring has the table of methods."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch

from optserve._values.torch_methods import COUNTED, NEUTRAL, STEP, kind_of, momentum_product, recognise, torch_slots
from optserve.algorithms import Adagrad, Algorithm, Momentum, Nadam, SgdMomentum
from optserve.errors import InvalidArgumentError
from optserve.settings import Constant, Group, WeightDecay
from optserve.state import OptimizerState, TensorSpec


def param_groups(state: OptimizerState, params: Mapping[str, torch.Tensor]) -> list[dict[str, list[torch.Tensor]]]:
    """The param groups for a torch optimizer that is to load `to_state_dict(state)`.

    Args:
        state: A state, with groups or without.
        params: The parameters by name.

    Raises:
        InvalidArgumentError: `params` lacks a parameter of the state, or a group has a parameter that the state lacks.

    Example:
        >>> groups = optserve.torch.param_groups(state, dict(model.named_parameters()))     # doctest: +SKIP
        >>> optimizer = torch.optim.SGD(groups, lr=0.1)                                     # doctest: +SKIP
        >>> optimizer.load_state_dict(optserve.torch.to_state_dict(state))                  # doctest: +SKIP
    """
    missing = [name for name in state.parameters if name not in params]
    if missing:
        raise InvalidArgumentError(f"There is no parameter {missing[0]!r}.", metadata={"parameter": missing[0]})
    return [{"params": [params[name] for name in names]} for _, names in _groups_of(state)]


def to_state_dict(state: OptimizerState) -> dict[str, Any]:
    """A state_dict for the torch optimizer of the same method.

    It has one param group for the parameters in no group, in the state's order, and one for each of the state's groups;
    `param_groups` gives the parameters in that order.

    Raises:
        InvalidArgumentError: torch has no such method: vSGD, the diagonal Hessian, a WindowedRms with eps inside the
            root, or a Momentum with learning rate 0, from which the buffer cannot be computed. Or the state has a
            setting that a state_dict cannot hold.
    """
    _check_no_setting_is_lost(state)
    groups = _groups_of(state)
    entries: dict[int, dict[str, Any]] = {}
    made: list[dict[str, Any]] = []
    for algorithm, names in groups:
        kind = kind_of(algorithm)
        first = sum(len(group["params"]) for group in made)
        steps = [_step_in(state, algorithm, name) for name in names]
        for index, (name, step) in enumerate(zip(names, steps, strict=True), first):
            entry = _entry(state, algorithm, name, step)
            if entry:
                entries[index] = entry
        group = {**NEUTRAL, **kind.neutral, **kind.group(algorithm), "params": list(range(first, first + len(names)))}
        if len(groups) > 1:
            # The order of the parameters is no longer that of the state.
            group["param_names"] = list(names)
        if kind.counts_steps and any(int(_counter(step)) != step for step in steps):
            group[STEP] = steps if len(set(steps)) > 1 else steps[0]
        made.append(group)
    return {"state": entries, "param_groups": made}


def from_state_dict(
    state_dict: Mapping[str, Any],
    params: Mapping[str, torch.Tensor],
    *,
    step: int | None = None,
    method: type[Algorithm] | None = None,
) -> OptimizerState:
    """The state that a torch optimizer's state_dict holds.

    Param groups whose hyper-parameters differ from those of the first become groups of the state. The state leaves out
    schedule, clipping, weight decay and consistency.

    Args:
        state_dict: A state_dict of Adadelta, Adagrad, RMSprop, SGD, Adam, AdamW or NAdam.
        params: The parameters by name, such as dict(model.named_parameters()). If the torch optimizer has their names,
            they are matched by name. Otherwise they must be in the order in which the torch optimizer got them, group
            by group.
        step: Number of steps, for SGD, which does not count them; 0 by default.
        method: The service's method, if torch's settings fit several, such as SgdMomentum for SGD with momentum. The
            simplest by default.

    Raises:
        InvalidArgumentError: The service lacks a setting of the state_dict, or the state_dict does not fit `params`.
    """
    _check_mapping(params)
    groups = _all_groups(state_dict)
    _check_dtypes(params)
    algorithms = recognise(groups, method)
    names_of = _names_of(groups, list(params))
    steps = {0} if step is None else {step}
    slots: dict[str, dict[str, np.ndarray]] = {}
    counters: dict[str, int] = {}
    for group, algorithm, names in zip(groups, algorithms, names_of, strict=True):
        for position, (index, name) in enumerate(zip(group["params"], names, strict=True)):
            entry = state_dict["state"].get(index, {})
            counted = _step_of(entry, group, position)
            if counted is not None and step is None:
                steps.add(counted)
            counters[name] = _counted_by_buffer(entry, step) if isinstance(algorithm, SgdMomentum) else counted or 0
            _check_product(algorithm, entry, counters[name], name)
            slots[name] = _slots_in(entry, group, algorithm, name, params[name])
    specs = {name: TensorSpec(tuple(item.shape), str(item.dtype).rpartition(".")[2]) for name, item in params.items()}
    base = algorithms[0]
    differing = tuple(
        Group(names, {key: value for key, value in asdict(algorithm).items() if value != getattr(base, key)})
        for algorithm, names in zip(algorithms, names_of, strict=True)
        if algorithm != base
    )
    return OptimizerState(
        max(steps), base, specs, {name: slots[name] for name in params}, groups=differing,
        parameter_steps={name: counters[name] for name in params} if isinstance(base, COUNTED) else None,
    )  # fmt: skip


def _check_mapping(params: object) -> None:
    if not isinstance(params, Mapping):
        raise InvalidArgumentError(
            f"params must be a mapping by name, such as dict(model.named_parameters()), not {type(params)}."
        )


def _check_dtypes(params: Mapping[str, torch.Tensor]) -> None:
    for name, parameter in params.items():
        if parameter.dtype not in (torch.float32, torch.float64):
            raise InvalidArgumentError(f"{name!r} is {parameter.dtype}; optimizers' state is float32 or float64.")


def _slots_in(
    entry: Mapping[str, Any], group: Mapping[str, Any], algorithm: Algorithm, name: str, parameter: torch.Tensor
) -> dict[str, np.ndarray]:
    """The slots of a parameter, from torch's entry for it."""
    names = dict.fromkeys(kind_of(algorithm).slots, "") | torch_slots(algorithm)
    return {
        own: _array(group, algorithm, entry.get(theirs), parameter, f"{theirs} of {name!r}")
        for own, theirs in names.items()
    }


def _step_dtype() -> torch.dtype:
    """The dtype of torch's own step counters, also if torch's default dtype is a half float."""
    return torch.float64 if torch.get_default_dtype() is torch.float64 else torch.float32


def _counter(step: int) -> torch.Tensor:
    """A step as torch.optim has it."""
    return torch.tensor(float(step), dtype=_step_dtype())


def _step_in(state: OptimizerState, algorithm: Algorithm, name: str) -> int:
    """The steps of a parameter: its own where the method uses them, else those of the optimizer."""
    counted = state.parameter_steps if isinstance(algorithm, COUNTED) else None
    return state.step if counted is None else counted[name]


def _entry(state: OptimizerState, algorithm: Algorithm, name: str, step: int) -> dict[str, Any]:
    """What torch has of a parameter."""
    if isinstance(algorithm, SgdMomentum) and step == 0:
        # Its first gradient is to become the buffer.
        return {}
    entry = {
        theirs: torch.from_numpy(np.array(_to_torch(algorithm, state.slots[name][own])))
        for own, theirs in torch_slots(algorithm).items()
    }
    if isinstance(algorithm, Nadam):
        entry["mu_product"] = torch.tensor(momentum_product(algorithm, step), dtype=_step_dtype())
    if kind_of(algorithm).counts_steps:
        entry["step"] = _counter(step)
    return entry


def _check_product(algorithm: Algorithm, entry: Mapping[str, Any], step: int, name: str) -> None:
    """Raise InvalidArgumentError where NAdam's product is not the one that follows from its step and settings."""
    if isinstance(algorithm, Nadam) and "mu_product" in entry:
        product, expected = float(entry["mu_product"]), momentum_product(algorithm, step)
        # torch has rounded it in each step, to halves at worst; when it is small, it no longer matters.
        if abs(product - expected) > 0.01 * expected + 1e-4:
            raise InvalidArgumentError(
                f"mu_product of {name!r} is {product:g}, and would be {expected:g} at step {step} with these betas and "
                "this momentum_decay: they have changed, which the service does not know."
            )


def _counted_by_buffer(entry: Mapping[str, Any], step: int | None) -> int:
    """The steps of a parameter of torch's SGD, which has a buffer after the first."""
    return 0 if entry.get("momentum_buffer") is None else max(step or 0, 1)


def _step_of(entry: Mapping[str, Any], group: Mapping[str, Any], position: int) -> int | None:
    """The step that torch has counted for a parameter at a position in its group; None if torch counts none."""
    if "step" not in entry:
        return None
    counted, exact = torch.as_tensor(entry["step"]), group.get(STEP)
    if isinstance(exact, Sequence):
        exact = exact[position]
    if exact is not None and torch.equal(torch.tensor(float(exact), dtype=counted.dtype), counted.cpu()):
        return int(exact)
    return int(counted)


def _check_no_setting_is_lost(state: OptimizerState) -> None:
    """Raise InvalidArgumentError for a setting that a state_dict cannot hold."""
    said = state.settings
    schedule = said.get("schedule")
    decay = said.get("weight_decay", 0.0)
    own = decay.factor if isinstance(decay, WeightDecay) else decay
    decays = [own, *(group.weight_decay for group in said.get("groups", ()))]
    lost = {
        "schedule": (
            schedule if schedule != Constant() else None,
            "make a scheduler of torch for it, such as LambdaLR",
        ),
        "clipping": (said.get("clipping"), "in torch the training loop clips, with torch.nn.utils.clip_grad_norm_"),
        "weight_decay": (any(decays) and max(filter(None, decays)), "torch adds its own weight decay to the gradient"),
        "consistency": (said.get("consistency"), "a torch optimizer has no workers"),
        "parameters": (state.hosted, "copy them from state.hosted_parameters into the model"),
    }
    for name, (value, instead) in lost.items():
        if value:
            what = "the parameters themselves" if name == "parameters" else f"the {name} {value}"
            raise InvalidArgumentError(
                f"The state has {what}, which a state_dict of torch.optim cannot hold: {instead}. "
                f'state.without("{name}") leaves it out.'
            )


def _groups_of(state: OptimizerState) -> list[tuple[Algorithm, list[str]]]:
    """The method and the names of each group of parameters; first those of the parameters in no group."""
    groups = state.settings.get("groups", ())
    for group in groups:
        for name in group.parameters:
            if name not in state.parameters:
                raise InvalidArgumentError(f"A group has the parameter {name!r}, which the state does not have.")
    grouped = {name for group in groups for name in group.parameters}
    rest = [name for name in state.parameters if name not in grouped]
    all_of_them = [(state.algorithm, rest)] if rest or not groups else []
    return all_of_them + [(replace(state.algorithm, **group.overrides), list(group.parameters)) for group in groups]


def _to_torch(algorithm: Algorithm, array: np.ndarray) -> np.ndarray:
    if not isinstance(algorithm, Momentum):
        return array
    if algorithm.learning_rate == 0:
        raise InvalidArgumentError(
            "torch's momentum buffer is Δx / −η, which cannot be computed for a learning rate of 0."
        )
    return (array / -algorithm.learning_rate).astype(array.dtype)


def _array(
    group: Mapping[str, Any], algorithm: Algorithm, tensor: torch.Tensor | None, parameter: torch.Tensor, what: str
) -> np.ndarray:
    """One of torch's state tensors as a slot; a missing tensor gives the value with which torch would begin."""
    if tensor is None:
        begin = float(group.get("initial_accumulator_value", 0)) if isinstance(algorithm, Adagrad) else 0.0
        return np.full(tuple(parameter.shape), begin, str(parameter.dtype).rpartition(".")[2])
    if tensor.shape != parameter.shape or tensor.dtype != parameter.dtype:
        raise InvalidArgumentError(
            f"{what} is {list(tensor.shape)} {tensor.dtype}; its parameter is {list(parameter.shape)} "
            f"{parameter.dtype}."
        )
    array = np.array(tensor.detach().cpu().numpy())
    if isinstance(algorithm, Momentum) and algorithm.learning_rate == 0 and array.any():
        raise InvalidArgumentError(
            "torch's momentum buffer is Δx / −η, so Δx cannot be computed for a learning rate of 0."
        )
    return (array * -algorithm.learning_rate).astype(array.dtype) if isinstance(algorithm, Momentum) else array


def _all_groups(state_dict: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The param groups that have parameters."""
    if not isinstance(state_dict, Mapping) or not {"state", "param_groups"} <= state_dict.keys():
        raise InvalidArgumentError(
            "This is not a state_dict of a torch optimizer: it has no `state` and `param_groups`."
        )
    groups = [dict(group) for group in state_dict["param_groups"] if group["params"]]
    if not groups:
        raise InvalidArgumentError("The state_dict has no parameter group.")
    return groups


def _names_of(groups: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[list[str]]:
    """The names of the parameters of each group: from the state_dict, or from `names` in their order."""
    count = sum(len(group["params"]) for group in groups)
    if count != len(names):
        raise InvalidArgumentError(f"The state_dict has {count} parameters, not {len(names)}.")
    if not any("param_names" in group for group in groups):
        rest = iter(names)
        return [[next(rest) for _ in group["params"]] for group in groups]
    known = [list(group.get("param_names", ())) for group in groups]
    flat = [name for own in known for name in own]
    fits = all(len(own) == len(group["params"]) for own, group in zip(known, groups, strict=True))
    if not fits or sorted(flat) != sorted(names):
        strangers = sorted(set(flat).symmetric_difference(names)) or flat
        raise InvalidArgumentError(
            f"The names in the state_dict are not those of `params`: {strangers[0]!r} is in one of the two only."
        )
    return known
