"""An optimizer on the server, for users: it takes gradients by name, and returns updates by name."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import numpy as np

from optserve._resources.choices import ReplyName, TransportName, WireDtype, reply_of
from optserve._resources.parameter_table import empty
from optserve._resources.stepper import Stepper
from optserve._rpc.deadline import Patience
from optserve._steps.gradients import Gradients
from optserve._steps.incremental import IncrementalGradients, StepUnderWay
from optserve._steps.shared_memory import GRADIENT, SharedBuffers
from optserve._steps.updates import Updates
from optserve._values.step_settings import StepHyperparameters, StepOptions, step_options
from optserve.errors import EtagMismatchError, InvalidArgumentError
from optserve.v1 import optimizer_pb2, steps_pb2

__all__ = ["Optimizer", "ReplyName", "StepHyperparameters", "TransportName", "WireDtype"]


class Optimizer(Stepper):
    """An optimizer on the server. It makes one step at a time, also if several threads call it.

    Attributes:
        name: The name that `create_optimizer` got.
        hosted: Whether the server holds the parameters as well.
    """

    _shared_buffers: SharedBuffers | None = None

    def _take_parameters_of(self, optimizer: optimizer_pb2.Optimizer) -> bool:
        is_continued = super()._take_parameters_of(optimizer)
        if is_continued:
            # The arrays that `buffers` has returned are ordinary memory now.
            self._shared_buffers = None
        return is_continued

    def buffers(self) -> dict[str, np.ndarray]:
        """An array for each parameter, for gradients and updates that `step` does not have to copy.

        With shared memory they are regions of the server's segment. Call this before each step: after a lost connection
        there is another segment, and the old arrays are ordinary memory.

        Example:
            >>> arrays = opt.buffers()                   # doctest: +SKIP
            ... compute_gradients(into=arrays)
            ... updates = opt.step(arrays, out=arrays)   # the same arrays
        """
        shared = self._session.stream(self._connection.patience(self._connection.config.timeout_s)).shared
        arrays: dict[str, np.ndarray] = {}
        for index, item in enumerate(self._model.parameters):
            arrays[item.name] = (
                shared.array(GRADIENT, index, item.shape, item.dtype) if shared else empty(item.shape, item.dtype)
            )
        if shared:
            shared.mark_dirty()
            buffers = list(arrays.values())
            if self._shared_buffers is None or not self._shared_buffers.consist_of(buffers):
                self._shared_buffers = SharedBuffers(buffers)
        return arrays

    def step(  # noqa: PLR0913 - each is a choice of its own, by name
        self,
        grads: Mapping[str, np.ndarray],
        *,
        curvature: Mapping[str, np.ndarray] | None = None,
        out: Mapping[str, np.ndarray] | None = None,
        reply: ReplyName = "updates",
        partial: bool = False,
        hyperparameters: StepHyperparameters | None = None,
        with_gradient_norm: bool = False,
        timeout_s: float | None = None,
    ) -> dict[str, np.ndarray]:
        """Send the gradients of one step, and receive its updates.

        The step is applied exactly once. If the connection is lost, the client connects again and sends the step under
        the same request id.

        Args:
            grads: The gradient of every parameter, in the parameter's shape and dtype.
            curvature: The diagonal of the Hessian for each gradient, in the same form, for methods that take it.
            out: Arrays for the reply, which may be the arrays of the gradients; new ones are made by default. If the
                step raises, they are unchanged; but of a reply of more than 1 MiB over gRPC, the first elements, in
                the order of the parameters, may be overwritten. The server uses arrays of `buffers` until the step
                returns.
            reply: `updates` for Δx; in hosted mode also `parameters` for the new x, or `nothing`.
            partial: Allow parameters to be absent; they and their state stay as they are.
            hyperparameters: Hyper-parameters for this step only, by name, also `weight_decay` in hosted mode: one
                mapping for all parameters; or a sequence with a mapping, or None for no change, for the parameters in
                no group, then for each group in their order. They replace the optimizer's or the group's. A schedule,
                and scaling by staleness, still change the learning rate.
            with_gradient_norm: Compute `gradient_norm`, also if clipping does not need it.
            timeout_s: Longest time to wait, `ClientConfig.step_timeout_s` by default.

        Returns:
            The reply by name: the updates Δx, to be added to the parameters, unless `reply` says otherwise.

        Raises:
            InvalidArgumentError: A name, shape, dtype or value is wrong, or a hyper-parameter is out of its range;
                nothing was changed.
            FeatureUnavailableError: The server is too old for `hyperparameters` and `with_gradient_norm`.
            EtagMismatchError: Another client has changed the groups for which `hyperparameters` has mappings. See
                `refresh`.
            WrongStepError: Another client has made a step of this optimizer; nothing was changed. See `refresh`.
            StepInDoubtError: An earlier, interrupted step was applied, or may have been. See `replay` and `refresh`.
            UnavailableError: The server accepts no step now; the message says why.
            StepInProgressError: Another connection was in the middle of a step until the time was up.
            DeadlineExceededError, StepCancelledError: There was no answer in time; the next call finds out whether
                the step was applied. It is an UnreachableError if no server was reached.
        """
        return self._step(
            self._connection.patience(timeout_s), grads, curvature=curvature, out=out, reply=reply, partial=partial,
            options=self._options(hyperparameters, with_gradient_norm=with_gradient_norm),
        )  # fmt: skip

    def _options(self, hyperparameters: StepHyperparameters | None, *, with_gradient_norm: bool) -> StepOptions | None:
        if hyperparameters is None and not with_gradient_norm:
            return None
        return step_options(hyperparameters, self._known, with_gradient_norm=with_gradient_norm)

    def _step(
        self,
        patience: Patience,
        grads: Mapping[str, np.ndarray],
        *,
        curvature: Mapping[str, np.ndarray] | None = None,
        out: Mapping[str, np.ndarray] | None = None,
        reply: ReplyName = "updates",
        partial: bool = False,
        options: StepOptions | None = None,
    ) -> dict[str, np.ndarray]:
        """Make a step within the given patience, see `step`."""
        indices = self._model.selected_indices(grads, partial=partial)
        names = self._model.names_of(indices)
        arrays = [self._model.contiguous(i, grads[name], "gradient") for i, name in zip(indices, names, strict=True)]
        diagonals = None
        if curvature is not None or self._model.takes_curvature:
            diagonals = self._model.diagonals(indices, curvature)
        if self._shared_buffers is not None:
            # Copied first, because the step will write the gradient of another parameter there.
            arrays = [
                array.copy() if self._shared_buffers.belongs_to_another(index, array) else array
                for index, array in zip(indices, arrays, strict=True)
            ]
        updates = self._updates_for(indices, out, reply)
        gradients = Gradients(
            indices, arrays, whole=len(indices) == len(self._model.parameters), wire=self._wire, curvature=diagonals
        )
        gradients.options = options
        try:
            self._session.step(gradients, updates, patience)
        except EtagMismatchError as error:
            if options is None or not self._read_settings(patience):
                raise EtagMismatchError(
                    f"Another client has changed the groups of {self.name!r}, or its kind of weight decay: call "
                    "refresh(), and give hyperparameters for the present ones.",
                    reason=error.reason,
                    metadata=error.metadata,
                ) from error
            return self._step(
                patience, grads, curvature=curvature, out=out, reply=reply, partial=partial,
                options=options._replace(etag=self._known.etag),
            )  # fmt: skip
        return self._by_name(updates)

    def _updates_for(self, indices: list[int], out: Mapping[str, np.ndarray] | None, reply: ReplyName) -> Updates:
        """The arrays for the reply of a step."""
        wanted_reply = reply_of(reply)
        wanted = indices if wanted_reply != steps_pb2.REPLY_NOTHING else []
        arrays = self._model.outputs(wanted, out)
        if out is not None and self._shared_buffers is not None:
            self._check_buffers(self._shared_buffers, wanted, arrays)
        return Updates(wanted, arrays, self._layouts, wanted_reply)

    def _check_buffers(self, buffers: SharedBuffers, indices: list[int], arrays: list[np.ndarray]) -> None:
        """Raise InvalidArgumentError for an array of `buffers` that belongs to another parameter."""
        for index, array in zip(indices, arrays, strict=True):
            if buffers.belongs_to_another(index, array):
                name = self._model.parameters[index].name
                raise InvalidArgumentError(
                    f"The array for {name!r} is in the buffer of another parameter; pass buffers()[{name!r}] itself, "
                    "or a copy.",
                    metadata={"parameter": name},
                )

    def _by_name(self, updates: Updates) -> dict[str, np.ndarray]:
        return dict(zip(self._model.names_of(updates.indices), updates.arrays, strict=True))

    @contextmanager
    def begin_step(
        self,
        names: Iterable[str] | None = None,
        *,
        out: Mapping[str, np.ndarray] | None = None,
        reply: ReplyName = "updates",
        hyperparameters: StepHyperparameters | None = None,
        with_gradient_norm: bool = False,
        timeout_s: float | None = None,
    ) -> Iterator[StepUnderWay]:
        """Make a step whose gradients are sent while others are still being computed, for the length of a with-block.

        Leaving the block commits the step and waits for the updates. Leaving it by an exception abandons the step.

        Args:
            names: Parameters that take part; all by default.
            out: As for `step`.
            reply: As for `step`.
            hyperparameters: As for `step`.
            with_gradient_norm: As for `step`.
            timeout_s: As for `step`; it includes the time in which the gradients are computed.

        Raises:
            OptserveError: As for `step`, from `send` or at the end of the block.

        Example:
            >>> with opt.begin_step() as step:                  # doctest: +SKIP
            ...     for name, gradient in backward():
            ...         step.send(name, gradient)
            ... updates = step.updates
        """
        options = self._options(hyperparameters, with_gradient_norm=with_gradient_norm)
        step = self._start_step(self._connection.patience(timeout_s), names, out=out, reply=reply, options=options)
        try:
            yield step
            step._finish()
        except BaseException:
            applied = step._abort()
            if applied:
                self._outcomes.undelivered(applied)
            raise

    def _start_step(
        self,
        patience: Patience,
        names: Iterable[str] | None = None,
        *,
        out: Mapping[str, np.ndarray] | None = None,
        reply: ReplyName = "updates",
        options: StepOptions | None = None,
    ) -> StepUnderWay:
        """Begin a step whose gradients are sent one by one; `begin_step` and `optserve.aio` use it."""
        indices = self._model.indices_of(self._model.names if names is None else names)
        gradients = IncrementalGradients(
            indices,
            whole=len(indices) == len(self._model),
            wire=self._wire,
            patience=patience,
            with_curvature=self._model.takes_curvature,
        )
        gradients.options = options
        updates = self._updates_for(indices, out, reply)

        def check(
            name: str, gradient: np.ndarray, curvature: np.ndarray | None
        ) -> tuple[int, np.ndarray, np.ndarray | None]:
            (index,) = self._model.indices_of([name])
            array = self._model.contiguous(index, gradient, "gradient")
            if self._shared_buffers is not None:
                self._check_buffers(self._shared_buffers, [index], [array])
            diagonals = self._model.diagonals([index], None if curvature is None else {name: curvature})
            return index, array, diagonals[0] if diagonals else None

        def run() -> tuple[str, dict[str, np.ndarray]]:
            request_id = self._session.step(gradients, updates, patience)
            return request_id, self._by_name(updates)

        return StepUnderWay(gradients, check, {i: self._model.parameters[i].name for i in indices}, run, patience)

    def replay(self, *, reply: ReplyName = "updates", timeout_s: float | None = None) -> dict[str, np.ndarray]:
        """Receive the reply of the last applied step once more, the same bytes.

        Call it for a step that was interrupted after the server had applied it.

        Raises:
            FailedPreconditionError: There is no such step, the interrupted step was not applied, or the server no
                longer has its reply.
        """
        updates: list[Updates] = []

        def make_updates(tensors: list[int]) -> Updates:
            updates.append(self._updates_for(tensors or list(range(len(self._model))), None, reply))
            return updates[-1]

        self._session.replay(make_updates, self._connection.patience(timeout_s))
        return self._by_name(updates[-1])
