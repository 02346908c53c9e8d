"""`RemoteOptimizer`: an optimizer of torch whose steps the service makes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace
from functools import cache, partial
from types import TracebackType
from typing import Any, NoReturn, Self

import torch

from optserve._adapters.named import IfExists, Wanted
from optserve._resources.choices import TransportName, WireDtype
from optserve._values.torch_methods import STEP
from optserve.algorithms import Algorithm
from optserve.client import Client
from optserve.errors import (
    InvalidArgumentError,
)
from optserve.optimizer import Optimizer
from optserve.settings import Clipping, Group
from optserve.state import PARAMETER, OptimizerState
from optserve.torch._advice import advice
from optserve.torch._groups import Groups
from optserve.torch._layout import Layout
from optserve.torch._place import Choices, Place, existing_method
from optserve.torch._states import Entry, check_origin, differences, server_groups, state_from, torch_entries
from optserve.torch._stepper import Stepper


class RemoteOptimizer(Stepper):
    """An optimizer of torch whose state lives at the service, which makes its steps.

    `step` sends the gradients, and adds the updates Δx to the parameters in place; a parameter without a gradient stays
    as it is. The param groups have the settings, under the names, of the class of torch.optim with the same method:
    schedulers and live edits work as there, and travel with each step, at no call of their own. A method that torch
    does not have gets `lr`, `betas`, and its own names for the others. `weight_decay` is added to the gradient, or
    decoupled (x ← x − lr λ x) with AdamW, with Lion, and where a group has `decoupled_weight_decay=True`; as in torch,
    it is 0.01 for AdamW and 0 for the others by default.

    `state_dict` and `load_state_dict` have torch's own layout of the method, so a checkpoint moves between this class
    and that of torch, both ways. States of half floats are float32, those of complex numbers two real ones. `state` is
    empty: the state is at the server.

    Args:
        params: As for each optimizer of torch: parameters, `model.named_parameters()`, or param groups. The server has
            the names; without names it numbers the parameters.
        server: The server's address, a client, or an optimizer in delta mode that exists.
        algorithm: The method with its hyper-parameters, which are the defaults of all groups. By default that of the
            optimizer that exists.
        name: The optimizer's name at the server. Without a name it gets a random one, and is deleted by `close`, or
            when Python ends.
        if_exists: What happens if the server has an optimizer of that name: an `error`, `resume` to go on with its
            state under the settings given here, or `replace` to delete it and begin anew. To go on with the weights and
            the state of one moment, load both from a checkpoint of torch.
        clipping: Clipping by the server, after weight decay was added to the gradient.
        transport: See `Client.optimizer`.
        wire_dtype: See `Client.optimizer`. For a model in half floats, that dtype loses nothing of gradients and x.
        master_weights: Let the server hold the parameters x, in float32, and round them to the dtype of the model after
            each step. If the optimizer exists, the model gets the server's x.
        overlap: Send gradients over gRPC as soon as backward() has computed them. For training loops that change no
            gradient between the last backward() and step(): no clipping by torch, no GradScaler, no
            DistributedDataParallel. It gains time if client and server have cores to spare.
        defaults: Further settings of all groups under torch's names, such as weight_decay, maximize, lr or betas.

    Attributes:
        remote: The optimizer at the server, for checkpoints, statistics, `current_step` or `gradient_norm`.

    Raises:
        AlreadyExistsError: The name is taken, and `if_exists` is `error`.
        InvalidArgumentError: A parameter, a setting or a value cannot be used. No optimizer was created.
        OptserveError: The optimizer cannot be created, see `Client.create_optimizer`.

    Example:
        >>> optimizer = optserve.torch.RemoteOptimizer(                                   # doctest: +SKIP
        ...     model.named_parameters(), "127.0.0.1:50051", optserve.AdamW(1e-3), name="mlp"
        ... )
        >>> scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10_000)     # doctest: +SKIP
        >>> loss.backward(); optimizer.step(); scheduler.step(); optimizer.zero_grad()    # doctest: +SKIP
    """

    def __init__(  # noqa: PLR0913 - settings, by their names
        self,
        params: Iterable[Any],
        server: str | Client | Optimizer,
        algorithm: Algorithm | None = None,
        *,
        name: str | None = None,
        if_exists: IfExists = "error",
        clipping: Clipping | None = None,
        transport: TransportName = "auto",
        wire_dtype: WireDtype = "native",
        master_weights: bool = False,
        overlap: bool = False,
        **defaults: Any,
    ) -> None:
        layout = Layout.of(existing_method(server, algorithm, name))
        layout.check_defaults(defaults)
        self._loading: dict[str, Any] = {}
        groups = Groups(layout, holds_x=master_weights)
        super().__init__(params, {**layout.defaults, **defaults}, groups, overlap=overlap)
        _run_eagerly(type(self))
        self.state = defaultdict(Entry)
        if not self._groups.names:
            raise InvalidArgumentError("The param groups have no parameter.")
        self._groups.read(self.param_groups)
        self._place = Place(server, Choices(name, if_exists, transport, wire_dtype), self._wanted(clipping))
        if master_weights and self._place.existed:
            self._pull()
        for group, members in enumerate(self._groups.members):
            self._overlap.watch(members, group)

    def _wanted(self, clipping: Clipping | None) -> Wanted:
        """The optimizer that is needed at the server."""
        groups = self._groups
        specs = {parameter.name: parameter.spec for parameter in groups.names.values()}
        base, others = server_groups(groups.members, groups.algorithms)
        begin = None
        if not groups.all_begin_at_zero(self.param_groups):
            begin = partial(self._state_from, super().state_dict(), groups.algorithms)
        return Wanted(base, specs, others, clipping, begin, groups.values if groups.holds_x else None)

    def _state_from(self, saved: dict[str, Any], algorithms: list[Algorithm]) -> OptimizerState:
        groups = self._groups
        return state_from(saved, groups.layout, groups.members, algorithms, hosted=groups.holds_x)

    def upload_parameters(self) -> None:
        """With `master_weights`: give the server the parameters of the model, after they were changed by hand.

        Raises:
            InvalidArgumentError: The server does not hold the parameters, or a value is not finite.
        """
        if not self._groups.holds_x:
            raise InvalidArgumentError("The server holds no parameters; that needs master_weights=True.")
        state, values = self.remote.export_state(), self._groups.values()
        slots = {name: {**arrays, PARAMETER: values[name]} for name, arrays in state.slots.items()}
        self.remote.import_state(replace(state, slots=slots))
        self._pull()

    @torch.no_grad()
    def _pull(self) -> None:
        self._groups.put(self.remote.pull_parameters().arrays)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, as torch does; their state begins at 0.

        Raises:
            InvalidArgumentError: A parameter or a setting cannot be used; nothing was changed.
            OptserveError: As for `Optimizer.add_parameters`.
        """
        super().add_param_group(param_group)
        groups = self._groups
        try:
            groups.add(self.param_groups[-1])
            try:
                self._add_at_server()
            except BaseException:
                groups.drop()
                raise
        except BaseException:
            self.param_groups.pop()
            raise

    def _add_at_server(self) -> None:
        """Give the last group to the server, unless the optimizer is still to be created."""
        groups, own = self._groups, self._groups.members[-1]
        if self._place is None or not own:
            return
        if not groups.all_begin_at_zero(self.param_groups[-1:]):
            raise InvalidArgumentError(
                "The state of parameters that are added begins at 0: initial_accumulator_value=0."
            )
        base = next(algorithm for algorithm, others in zip(groups.at_server, groups.members, strict=True) if others)
        group = Group([parameter.name for parameter in own], differences(groups.at_server[-1], base))
        added = {parameter.name: parameter.value() if groups.holds_x else parameter.spec for parameter in own}
        with advice(groups.names):
            self.remote.add_parameters(added, groups=[group])
        self._overlap.watch(own, len(groups.members) - 1)

    def state_dict(self) -> dict[str, Any]:
        """The state, read from the server, in torch's layout; see torch.optim.Optimizer.state_dict."""
        groups = self._groups
        algorithms = groups.read(self.param_groups)
        with advice(groups.names):
            state = self.remote.export_state()
        entries, exact = torch_entries(state, groups.layout, groups.members, algorithms)
        self.state.update(entries)
        for group, steps in zip(self.param_groups, exact, strict=True):
            group.update({} if steps is None else {STEP: steps})
        try:
            return super().state_dict()
        finally:
            self.state.clear()
            for group in self.param_groups:
                group.pop(STEP, None)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Send a state to the server, from this class or from the class of torch with the same method.

        Raises:
            InvalidArgumentError: It is of another method, of other parameters, or has a setting that the service lacks.
            ValueError: It has other groups. In all cases nothing was changed.
        """
        handle = self.register_load_state_dict_pre_hook(_keep)
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
            self._loading = {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take what `load_state_dict` has read, once the server has it."""
        saved, groups, layout = self._loading, state["param_groups"], self._groups.layout
        check_origin(saved["param_groups"], layout, self._groups.members)
        for group in groups:
            for key, value in layout.defaults.items():
                if key not in layout.hyperparameters:
                    group.setdefault(key, value)
        algorithms = [layout.algorithm(group) for group in groups]
        with advice(self._groups.names):
            self.remote.import_state(self._state_from(saved, algorithms))
        for group in groups:
            group.pop(STEP, None)
        self._groups.at_server = algorithms
        super().__setstate__({**state, "state": self.state})
        if self._groups.holds_x:
            self._pull()

    def close(self) -> None:
        """Close the connection. An optimizer that got no name is deleted at the server, others stay.

        If no server answers within 2 seconds, there is a RuntimeWarning, and the optimizer may stay.
        """
        self._overlap.close()
        if self._place is not None:
            self._place.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"{super().__repr__()[:-1]}\n{self._groups.layout.kind.__name__} at the server: {self._place}\n)"

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError(
            "A RemoteOptimizer cannot be copied or serialized, because its state is at the server: save state_dict() "
            "and load it into another one."
        )


@cache
def _run_eagerly(kind: type[RemoteOptimizer]) -> None:
    """Keep torch.compile from tracing into the client. Not by decorators: torch loads its compiler for that, slowly."""
    for name in (
        "step",
        "zero_grad",
        "recover",
        "upload_parameters",
        "add_param_group",
        "state_dict",
        "load_state_dict",
        "close",
    ):
        setattr(kind, name, torch.compiler.disable(getattr(kind, name)))


def _keep(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
    """Keep the state_dict as other hooks have left it, before torch casts its tensors to the parameters' dtypes."""
    vars(optimizer)["_loading"] = state_dict
