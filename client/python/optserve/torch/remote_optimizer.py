"""`RemoteOptimizer`: an optimizer of torch whose steps the service makes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from types import TracebackType
from typing import Any, NoReturn, Self

import numpy as np
import torch

from optserve._resources.choices import TransportName, WireDtype
from optserve._values.torch_methods import STEP
from optserve.algorithms import Algorithm
from optserve.client import Client
from optserve.errors import ClientUseError, FailedPreconditionError, InvalidArgumentError, StepInDoubtError
from optserve.optimizer import Optimizer
from optserve.settings import Clipping
from optserve.torch._layout import Layout, begins_at_zero, decays, plain
from optserve.torch._parameters import Parameter
from optserve.torch._place import Choices, IfExists, Place, Wanted, existing_method
from optserve.torch._states import check_origin, server_groups, state_from, torch_entries


class RemoteOptimizer(torch.optim.Optimizer):
    """An optimizer of torch whose state lives at the service, which makes its steps.

    `step` sends the gradients, and adds the updates Δx to the parameters in place; a parameter without a gradient stays
    as it is. The param groups have the settings, under the names, of the class of torch.optim with the same method:
    schedulers and live edits work as there, and each value counts from the next step on. A method that torch does not
    have gets `lr`, `betas`, and its own names for the others. `weight_decay` is added to the gradient, or decoupled
    (x ← x − lr λ x) with AdamW, with Lion, and where a group has `decoupled_weight_decay=True`; as in torch, it is 0.01
    for AdamW and 0 for the others by default.

    `state_dict` and `load_state_dict` have torch's own layout of the method, so a checkpoint moves between this class
    and that of torch, both ways. States of half floats are float32, those of complex numbers two real ones. `state` is
    empty: the state is at the server.

    Args:
        params: As for each optimizer of torch: parameters, `model.named_parameters()`, or param groups. The server has
            the names; without names it numbers the parameters.
        server: The server's address, a client, or an optimizer in delta mode that exists.
        algorithm: The method with its hyper-parameters, which are the defaults of all groups. By default that of the
            optimizer that exists.
        name: The optimizer's name at the server. Without a name it gets a random one, and `close` deletes it.
        if_exists: What happens if the server has an optimizer of that name: an `error`, `resume` to go on with its
            state under the settings given here, or `replace` to delete it and begin anew. To go on with the weights and
            the state of one moment, load both from a checkpoint of torch.
        clipping: Clipping by the server, after weight decay was added to the gradient.
        transport: See `Client.optimizer`.
        wire_dtype: See `Client.optimizer`.
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

    # None until the server has the optimizer.
    _place: Place | None = None

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
        **defaults: Any,
    ) -> None:
        self._layout = Layout.of(existing_method(server, algorithm, name))
        self._members: list[list[Parameter]] = []
        self._names: dict[str, Parameter] = {}
        self._loading: dict[str, Any] = {}
        self._layout.check_defaults(defaults)
        super().__init__(params, {**self._layout.defaults, **defaults})
        if not self._names:
            raise InvalidArgumentError("The param groups have no parameter.")
        self._known: list[tuple[Any, ...]] = []
        self._algorithms: list[Algorithm] = []
        self._read_settings()
        self._outputs: dict[str, np.ndarray] = {}
        self._updates: dict[str, tuple[np.ndarray, torch.Tensor]] = {}
        self._place = Place(server, Choices(name, if_exists, clipping, transport, wire_dtype), self._wanted())

    def _wanted(self) -> Wanted:
        """The optimizer that is needed at the server."""
        specs = {parameter.name: parameter.spec for parameter in self._names.values()}
        base, groups = server_groups(self._members, self._algorithms)
        if all(begins_at_zero(self._layout, group) for group in self.param_groups):
            return Wanted(base, groups, specs, None)
        begun = super().state_dict()
        return Wanted(base, groups, specs, lambda: state_from(begun, self._layout, self._members, self._algorithms))

    @property
    def remote(self) -> Optimizer:
        """The optimizer at the server."""
        if self._place is None:
            raise ClientUseError("This RemoteOptimizer has no optimizer at the server.")
        return self._place.remote

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Send the gradients, and add the updates to the parameters.

        Args:
            closure: Computes the loss once more, with its gradients, before the step.

        Returns:
            The loss of the closure; None without one.

        Raises:
            InvalidArgumentError: A gradient is sparse, not finite or cannot be read, or a setting is out of range.
                Nothing was changed. (GradScaler skips steps whose gradients are not finite.)
            StepInDoubtError: An earlier, interrupted step was applied, or may have been. See `recover`.
            OptserveError: As for `Optimizer.step`.
        """
        remote, loss = self.remote, None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        gradients = self._gradients()
        if gradients:
            self._send_settings()
            whole = len(gradients) == len(self._names)
            try:
                updates = remote.step(gradients, out=self._arrays(), partial=not whole)
            except StepInDoubtError as error:
                error.add_note("RemoteOptimizer.recover() adds the updates of the interrupted step, if it was applied.")
                raise
            self._apply(updates)
        return loss

    def _gradients(self) -> dict[str, np.ndarray]:
        """The gradients to be sent, with weight decay."""
        gradients: dict[str, np.ndarray] = {}
        for group, parameters in zip(self.param_groups, self._members, strict=True):
            tensors, maximize, (decay, _) = group["params"], bool(group.get("maximize")), decays(group)
            if len(tensors) != len(parameters):
                raise InvalidArgumentError("The parameters of a group have changed; add_param_group adds others.")
            for tensor, parameter in zip(tensors, parameters, strict=True):
                if tensor is not parameter.tensor:
                    raise InvalidArgumentError(f"Parameter {parameter.name!r} is another tensor than before.")
                if tensor.grad is not None:
                    gradients[parameter.name] = parameter.gradient(maximize=maximize, decay=decay)
        return gradients

    def _arrays(self) -> dict[str, np.ndarray] | None:
        """Arrays for the updates: the memory that is shared with the server, or arrays that serve for all steps."""
        stream = self.remote._session.streams.current
        if stream is None:
            # The step opens one, and waits for a server that is being restarted.
            return None
        if stream.shared is not None:
            return self.remote.buffers()
        if not self._outputs:
            self._outputs = {name: np.empty(p.spec.shape, p.spec.dtype) for name, p in self._names.items()}
        return self._outputs

    def _apply(self, updates: Mapping[str, np.ndarray]) -> None:
        """Change the parameters by the updates of a step, and by decoupled weight decay."""
        for group, parameters in zip(self.param_groups, self._members, strict=True):
            _, decay = decays(group)
            keep = 1.0 - plain(group["lr"]) * decay if decay else 1.0
            for parameter in parameters:
                array = updates.get(parameter.name)
                if array is not None:
                    parameter.apply(self._as_tensor(parameter.name, array), keep)

    def _as_tensor(self, name: str, array: np.ndarray) -> torch.Tensor:
        """An array as a tensor of the same memory; most arrays serve for many steps."""
        known = self._updates.get(name)
        if known is None or known[0] is not array:
            known = self._updates[name] = array, torch.from_numpy(array)
        return known[1]

    def _read_settings(self) -> bool:
        """Read the param groups. Returns whether a hyper-parameter has changed since the last time."""
        values = [self._layout.values(group) for group in self.param_groups]
        if values == self._known:
            return False
        algorithms = [self._layout.algorithm(group) for group in self.param_groups]
        changed = algorithms != self._algorithms
        self._known, self._algorithms = values, algorithms
        return changed

    def _send_settings(self) -> None:
        """Give the server the present hyper-parameters, if they have changed."""
        known, algorithms = self._known, self._algorithms
        if self._read_settings():
            base, groups = server_groups(self._members, self._algorithms)
            try:
                self.remote.update(base, groups=groups)
            except BaseException:
                self._known, self._algorithms = known, algorithms
                raise

    def recover(self) -> bool:
        """Add the updates of an interrupted step if the server has applied it; `step` works again afterwards.

        For a step that has raised StepCancelledError, DeadlineExceededError, KeyboardInterrupt or StepInDoubtError.

        Returns:
            Whether the step was applied.

        Raises:
            OptserveError: As for `Optimizer.replay`. If the server no longer has the updates, load a checkpoint.
        """
        if not self.remote._outcomes.unsettled:
            return False
        try:
            updates = self.remote.replay()
        except FailedPreconditionError:
            self.remote.refresh()
            return False
        with torch.no_grad():
            self._apply(updates)
        return True

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, as torch does.

        Raises:
            InvalidArgumentError: A parameter or a setting cannot be used; nothing was changed.
        """
        if self._place is not None:
            raise InvalidArgumentError(
                "This server takes no further parameters for an optimizer: make a RemoteOptimizer with all of them, "
                "and load the state_dict into it."
            )
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            self._layout.check_names(group)
            own = self._new_parameters(group)
        except InvalidArgumentError:
            self.param_groups.pop()
            raise
        self._members.append(own)
        self._names.update((parameter.name, parameter) for parameter in own)

    def _new_parameters(self, group: Mapping[str, Any]) -> list[Parameter]:
        names, first = group.get("param_names"), len(self._names)
        own: dict[str, Parameter] = {}
        seen: set[int] = set()
        for position, tensor in enumerate(group["params"]):
            name = str(first + position) if names is None else names[position]
            if name in own or name in self._names or id(tensor) in seen:
                raise InvalidArgumentError(f"{name!r} is twice among the parameters.", metadata={"parameter": name})
            own[name] = Parameter(name, tensor, has_name=names is not None)
            seen.add(id(tensor))
        return list(own.values())

    def state_dict(self) -> dict[str, Any]:
        """The state, read from the server, in torch's layout; see torch.optim.Optimizer.state_dict."""
        self._read_settings()
        entries, exact = torch_entries(self.remote.export_state(), self._layout, self._members, self._algorithms)
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
        saved, groups = self._loading, state["param_groups"]
        check_origin(saved["param_groups"], self._layout, self._members)
        for group in groups:
            for key, value in self._layout.defaults.items():
                if key not in self._layout.hyperparameters:
                    group.setdefault(key, value)
        algorithms = [self._layout.algorithm(group) for group in groups]
        imported = state_from(saved, self._layout, self._members, algorithms)
        self.remote.import_state(imported)
        for group in groups:
            group.pop(STEP, None)
        self._known, self._algorithms = [self._layout.values(group) for group in groups], algorithms
        super().__setstate__({**state, "state": self.state})

    def close(self) -> None:
        """Close the connection. An optimizer that got no name is deleted at the server, others stay."""
        if self._place is not None:
            self._place.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"{super().__repr__()[:-1]}\n{self._layout.kind.__name__} at the server: {self._place}\n)"

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError(
            "A RemoteOptimizer cannot be copied or serialized, because its state is at the server: save state_dict() "
            "and load it into another one."
        )


def _keep(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
    """Keep the state_dict as other hooks have left it, before torch casts its tensors to the parameters' dtypes."""
    vars(optimizer)["_loading"] = state_dict
