"""The param groups of a RemoteOptimizer: their parameters, what the server knows of their settings, their steps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import repeat
from typing import Any

import numpy as np
import torch

from optserve._values.step_settings import KnownSettings
from optserve.algorithms import Algorithm
from optserve.errors import EtagMismatchError, InvalidArgumentError
from optserve.torch._advice import whereabouts
from optserve.torch._layout import Layout, begins_at_zero, decays, plain
from optserve.torch._overlap import Overlap
from optserve.torch._parameters import Parameter
from optserve.torch._states import differences
from optserve.torch._step_memory import Region

ParamGroups = Sequence[Mapping[str, Any]]
"""torch's param groups."""


class Groups:
    """What is known of the param groups; torch keeps the groups themselves, which users may edit.

    Args:
        layout: The settings that groups have.
        holds_x: Whether the server holds the parameters.

    Attributes:
        layout: As above.
        holds_x: As above.
        members: The parameters of each group.
        names: All parameters by name, in the order of the groups.
        algorithms: The method of each group with its hyper-parameters, as `read` has found them.
        at_server: The same as the server has them between steps.
    """

    def __init__(self, layout: Layout, *, holds_x: bool) -> None:
        self.layout, self.holds_x = layout, holds_x
        self.members: list[list[Parameter]] = []
        self.names: dict[str, Parameter] = {}
        self.algorithms: list[Algorithm] = []
        self.at_server: list[Algorithm] = []
        self._values: list[tuple[Any, ...]] = []
        # The settings whose groups were compared with the param groups.
        self._known: KnownSettings | None = None
        self._tensors: dict[str, tuple[np.ndarray, torch.Tensor]] = {}

    def add(self, group: Mapping[str, Any]) -> None:
        """Add a group; raises InvalidArgumentError, and then nothing has changed."""
        self.layout.check_names(group)
        algorithm = self.layout.algorithm(group)
        own = self._parameters(group)
        self.members.append(list(own.values()))
        self.names.update(own)
        self.at_server = [*self.at_server, algorithm]

    def drop(self) -> None:
        """Take the last group away, which the server has refused."""
        for parameter in self.members.pop():
            del self.names[parameter.name]
        self.at_server = self.at_server[:-1]

    def _parameters(self, group: Mapping[str, Any]) -> dict[str, Parameter]:
        names, first = group.get("param_names"), len(self.names)
        own: dict[str, Parameter] = {}
        seen: set[int] = set()
        for position, tensor in enumerate(group["params"]):
            name = str(first + position) if names is None else names[position]
            if name in own or name in self.names or id(tensor) in seen:
                raise InvalidArgumentError(f"{name!r} is twice among the parameters.", metadata={"parameter": name})
            try:
                own[name] = Parameter(name, tensor, has_name=names is not None)
            except InvalidArgumentError as error:
                if names is None:
                    error.add_note(whereabouts(name, tuple(tensor.shape)))
                raise
            seen.add(id(tensor))
        return own

    def read(self, groups: ParamGroups) -> list[Algorithm]:
        """The method of each group with its present hyper-parameters; raises InvalidArgumentError."""
        self._check_count(groups)
        values = [self.layout.values(group) for group in groups]
        if values != self._values:
            self.algorithms = [self.layout.algorithm(group) for group in groups]
            self._values = values
        return self.algorithms

    def _check_count(self, groups: ParamGroups) -> None:
        if len(groups) != len(self.members):
            raise InvalidArgumentError(
                f"There are {len(groups)} param groups, and were {len(self.members)}: add_param_group adds some. To "
                "step parameters no longer, set requires_grad to False, or the gradient to None; do not remove them."
            )

    def changes(self, groups: ParamGroups, known: KnownSettings) -> list[dict[str, Any]] | None:
        """The settings of the next step that differ from those at the server, by group; None if none does.

        Args:
            groups: torch's param groups.
            known: The settings at the server; their groups are named by position.
        """
        algorithms = self.read(groups)
        if algorithms == self.at_server and not self.holds_x:
            return None
        self._check_groups_at_server(known)
        changes = []
        for group, algorithm, at_server, own in zip(groups, algorithms, self.at_server, self.members, strict=True):
            if own:
                changes.append(differences(algorithm, at_server))
                _, decay = decays(group)
                if self.holds_x and decay:
                    changes[-1]["weight_decay"] = plain(group["lr"]) * decay
        return changes

    def _check_groups_at_server(self, known: KnownSettings) -> None:
        """Raise EtagMismatchError unless the server's groups are these: the first has the optimizer's own settings."""
        if known is self._known:
            return
        own = tuple(tuple(parameter.name for parameter in members) for members in self.members if members)
        if known.groups != own[1:]:
            raise EtagMismatchError(
                "Another client has changed the groups of parameters at the server; they are not the param groups any "
                "more. Change them back, or make a new RemoteOptimizer."
            )
        self._known = known

    def gradients(self, groups: ParamGroups, regions: Mapping[str, Region], overlap: Overlap) -> dict[str, np.ndarray]:
        """The gradients to be sent, with the weight decay that is added to them.

        Args:
            groups: The param groups.
            regions: Where the gradients go, by name; those of other parameters stay where they are, if they can.
            overlap: Has those that were taken while backward ran.

        Raises:
            InvalidArgumentError: A gradient cannot be used, or the groups have other parameters than before.
        """
        self._check_count(groups)
        gradients: dict[str, np.ndarray] = {}
        for group, own in zip(groups, self.members, strict=True):
            tensors, maximize, (decay, _) = group["params"], bool(group.get("maximize")), decays(group)
            if len(tensors) != len(own):
                raise InvalidArgumentError("The parameters of a group have changed; add_param_group adds others.")
            for tensor, parameter in zip(tensors, own, strict=True):
                if tensor is not parameter.tensor:
                    raise InvalidArgumentError(f"Parameter {parameter.name!r} is another tensor than before.")
                if tensor.grad is None:
                    continue
                parameter.check_unchanged()
                if self.holds_x and parameter.has_changed:
                    raise InvalidArgumentError(
                        f"{parameter.name!r} was changed, but the server holds it: call upload_parameters() first."
                    )
                array = overlap.gradient(parameter.name, tensor.grad, maximize=maximize, decay=decay)
                if array is None:
                    array = parameter.gradient(regions.get(parameter.name), maximize=maximize, decay=decay)
                gradients[parameter.name] = array
        return gradients

    def apply(self, groups: ParamGroups, replies: Mapping[str, np.ndarray], rates: Sequence[float]) -> None:
        """Change the parameters as a step says, and by decoupled weight decay.

        Args:
            groups: The param groups.
            replies: Updates, or the new parameters if the server holds them, by name.
            rates: The learning rate that the step had for each group with parameters; empty if that is not known.
        """
        used: Iterator[float | None] = iter(rates) if rates else repeat(None)
        for group, own in zip(groups, self.members, strict=True):
            if not own:
                continue
            rate, (_, decay) = next(used), decays(group)
            keep = 1.0 - (plain(group["lr"]) if rate is None else rate) * decay if decay else 1.0
            for parameter in own:
                array = replies.get(parameter.name)
                if array is None:
                    continue
                if self.holds_x:
                    parameter.put(self._tensor(parameter.name, array))
                else:
                    parameter.apply(self._tensor(parameter.name, array), keep)

    def _tensor(self, name: str, array: np.ndarray) -> torch.Tensor:
        """An array as a tensor of the same memory; most arrays serve for many steps."""
        known = self._tensors.get(name)
        if known is None or known[0] is not array:
            known = self._tensors[name] = array, torch.from_numpy(array)
        return known[1]

    def values(self) -> dict[str, np.ndarray]:
        """The present parameters x by name."""
        return {name: parameter.value() for name, parameter in self.names.items()}

    def put(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Change the parameters to those that the server holds."""
        for name, array in arrays.items():
            self.names[name].put(torch.from_numpy(array))

    def all_begin_at_zero(self, groups: ParamGroups) -> bool:
        """Whether the state of each parameter begins at 0."""
        return all(begins_at_zero(self.layout, group) for group in groups)
