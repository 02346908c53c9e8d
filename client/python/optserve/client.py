"""The entry points of the package: `connect` and `Client`."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from types import TracebackType
from typing import Self

from optserve import algorithms, settings
from optserve._common import sysv
from optserve._resources import replies
from optserve._resources.checkpoints import ALL_OPTIMIZERS, delete_checkpoint, list_checkpoints
from optserve._resources.features import check_weight_decay
from optserve._resources.new_optimizer import ArrayLike, NewSettings, new_optimizer, values_of
from optserve._rpc.connection import Connection
from optserve._rpc.retry import Backoff
from optserve._values.arrays import check_kind
from optserve.config import ClientConfig
from optserve.errors import (
    AlreadyExistsError,
    DeadlineExceededError,
    InvalidArgumentError,
    NotFoundError,
    OptserveError,
    ResourceExhaustedError,
    UnavailableError,
)
from optserve.optimizer import Optimizer, TransportName, WireDtype
from optserve.optimizer_info import PREFIX, OptimizerInfo, info_from, resource_name
from optserve.state import Checkpoint, OptimizerState, Progress, TensorSpec, no_progress
from optserve.v1 import optimizer_pb2, service_pb2
from optserve.worker import Worker


def connect(target: str = "127.0.0.1:50051", config: ClientConfig | None = None) -> Client:
    """Connect to a server.

    Args:
        target: HOST:PORT, [IPV6]:PORT or `unix:PATH`. Another text, such as a URL, is an InvalidArgumentError.
        config: Deadlines, retries and sizes.

    Returns:
        A client. Use it in a with-block, or close it.

    Raises:
        UnreachableError: No server was reached within `config.connect_timeout_s`.
        DeadlineExceededError: A server accepted the connection, but did not answer in time.

    Example:
        >>> with optserve.connect("127.0.0.1:50051") as client:  # doctest: +SKIP
        ...     opt = client.create_optimizer("mlp", optserve.Adadelta(), {"w": w})
        ...     w += opt.step({"w": gradient})["w"]
    """
    return Client(target, config or ClientConfig())


class Client:
    """A connection to one server. Safe to use from several threads; not in a forked process.

    Args:
        target: The server.
        config: The settings of the client.
        connection: The connection to the server; a new one by default.
    """

    def __init__(self, target: str, config: ClientConfig, connection: Connection | None = None) -> None:
        self._connection = connection or Connection(target, config)
        try:
            host_id = self.server_info(timeout_s=config.connect_timeout_s).host_id
            self._connection.same_host = bool(host_id) and host_id == sysv.host_id()
        except BaseException:
            self._connection.close()
            raise

    def __repr__(self) -> str:
        return f"Client({self.target!r})"

    @property
    def target(self) -> str:
        """The server that this client is connected to."""
        return self._connection.target

    def server_info(self, *, timeout_s: float | None = None) -> service_pb2.GetServerInfoResponse:
        """The version, the backend, the features and the limits of the server."""
        request = service_pb2.GetServerInfoRequest()
        return replies.info(self._connection.call(self._connection.stub.GetServerInfo, request, timeout_s=timeout_s))

    @property
    def shares_memory(self) -> bool:
        """Whether tensors can travel through memory that is shared with the server."""
        return self._connection.same_host

    def create_optimizer(  # noqa: PLR0913 - settings, by their names
        self,
        name: str,
        algorithm: algorithms.Algorithm,
        params: Mapping[str, ArrayLike | TensorSpec],
        *,
        schedule: settings.Schedule | None = None,
        clipping: settings.Clipping | None = None,
        groups: Sequence[settings.Group] = (),
        hosted: bool = False,
        weight_decay: float | settings.WeightDecay = 0.0,
        consistency: settings.Consistency | None = None,
    ) -> Optimizer:
        """Create an optimizer. Its state is 0 everywhere.

        Args:
            name: 1 to 64 of a-z, 0-9, '.', '_' and '-', beginning with a letter or digit.
            algorithm: The method.
            params: The model's parameters by name: arrays, tensors, or anything else with a shape and a dtype.
            schedule: Schedule of the learning rate; a constant rate by default.
            clipping: Clipping of the gradient; none by default.
            groups: Groups of parameters whose hyper-parameters differ.
            hosted: Let the server hold the parameters as well. If `params` have values, this call uploads them. If they
                are `TensorSpec`s, call `push_parameters` before the first step.
            weight_decay: Decay of the parameters x that the server holds. A number λ is the part of x that each step
                takes off; `TimesLearningRate(λ)` is that of AdamW, `L2(λ)` adds λ x to the gradient.
            consistency: Lets several workers share the optimizer, in hosted mode; see `worker`. By default one client
                makes all steps.

        Raises:
            AlreadyExistsError: The name is taken.
            InvalidArgumentError: A name, shape, dtype, value or hyper-parameter is wrong. No optimizer was created.
            ResourceExhaustedError: The model is too large for the server. No optimizer was created.
        """
        check_weight_decay(self._connection, weight_decay)
        new_settings = NewSettings(schedule, clipping, groups, hosted, weight_decay, consistency)
        wanted = new_optimizer(name, algorithm, params, new_settings)
        values = values_of(params) if hosted else {}
        created = self._create(name, wanted)
        if values:
            with self._deleting_if_refused(created):
                created.push_parameters(values)
        return created

    def create_optimizer_from_state(
        self, name: str, state: OptimizerState, *, on_progress: Progress = no_progress
    ) -> Optimizer:
        """Create an optimizer that continues from a state: with its settings, its arrays and its step.

        Settings that the state does not have get their defaults; see `OptimizerState.without`.

        Args:
            name: As for `create_optimizer`.
            state: From `export_state`, a file, or `optserve.torch`. If it has the parameters, the optimizer is hosted.
            on_progress: Called with (bytes sent, all bytes).

        Raises:
            AlreadyExistsError: The name is taken; `Optimizer.import_state` replaces the state of that optimizer.
            InvalidArgumentError: The state is invalid. No optimizer was created.
            ResourceExhaustedError: The state is too large for the server. No optimizer was created.
        """
        check_kind(state, OptimizerState, "state", "opt.export_state()")
        said = state.settings
        new_settings = NewSettings(
            said.get("schedule"),
            said.get("clipping"),
            said.get("groups", ()),
            state.hosted,
            said.get("weight_decay", 0.0),
            said.get("consistency"),
        )
        check_weight_decay(self._connection, new_settings.weight_decay)
        wanted = new_optimizer(name, state.algorithm, state.parameters, new_settings)
        created = self._create(name, wanted)
        with self._deleting_if_refused(created):
            created.import_state(state, on_progress=on_progress)
        return created

    def get_or_create_optimizer(  # noqa: PLR0913 - settings, by their names
        self,
        name: str,
        algorithm: algorithms.Algorithm,
        params: Mapping[str, ArrayLike | TensorSpec],
        *,
        schedule: settings.Schedule | None = None,
        clipping: settings.Clipping | None = None,
        groups: Sequence[settings.Group] = (),
        hosted: bool = False,
        weight_decay: float | settings.WeightDecay = 0.0,
        consistency: settings.Consistency | None = None,
    ) -> Optimizer:
        """Find the optimizer of that name, or create it. For programs that are restarted, or that run several times.

        If it exists, its state and its parameters stay as they are. The call uploads parameters only if no client has.
        For the arguments see `create_optimizer`.

        Raises:
            InvalidArgumentError: The optimizer exists with other parameters or other settings; or as for
                `create_optimizer`.
            DeadlineExceededError: Another client was still creating or deleting it when the time was up.
        """
        check_weight_decay(self._connection, weight_decay)
        new_settings = NewSettings(schedule, clipping, groups, hosted, weight_decay, consistency)
        wanted = new_optimizer(name, algorithm, params, new_settings)
        values = values_of(params) if hosted else {}
        patience = self._connection.patience(self._connection.config.timeout_s)
        backoff = Backoff(self._connection.config, self._connection.clock)
        while (found := self._find_or_create(name, wanted)) is None:
            # Another client is creating it, and may fail.
            taken = UnavailableError(f"Another client is creating or deleting {name!r}.")
            # An UnavailableError without a reason would say, at the deadline, that no server was reached.
            patience.pause(backoff.next_pause_s(taken), DeadlineExceededError(taken.message))
        found, is_new = found
        if not is_new:
            found._check_same(wanted)
        with self._deleting_if_refused(found) if is_new else nullcontext():
            if values:
                found._push_parameters_if_missing(values)
        return found

    def _find_or_create(self, name: str, wanted: optimizer_pb2.Optimizer) -> tuple[Optimizer, bool] | None:
        """(an optimizer, whether this call created it); None if it does not exist, and its name is taken."""
        try:
            return self.optimizer(name), False
        except NotFoundError:
            try:
                return self._create(name, wanted), True
            except AlreadyExistsError:
                return None

    def _create(self, name: str, wanted: optimizer_pb2.Optimizer) -> Optimizer:
        request = service_pb2.CreateOptimizerRequest(
            optimizer_id=resource_name(name).removeprefix(PREFIX), optimizer=wanted, request_id=str(uuid.uuid4())
        )
        answer = self._connection.call(self._connection.stub.CreateOptimizer, request).optimizer
        return Optimizer(self._connection, replies.created(answer, resource_name(name), wanted.parameters))

    @contextmanager
    def _deleting_if_refused(self, created: Optimizer) -> Iterator[None]:
        """Delete the new optimizer if the server refuses its parameters or state, so that it can be created anew."""
        try:
            yield
        except (InvalidArgumentError, ResourceExhaustedError) as refusal:
            try:
                self.delete_optimizer(created.name, missing_ok=True)
            except OptserveError as error:
                refusal.add_note(f"{created.name!r} was created and could not be deleted: {error}")
            raise
        except BaseException as error:
            # Not deleted: the upload may have arrived, and another client may use the optimizer.
            error.add_note(f"{created.name!r} was created; it is not known whether the upload arrived.")
            raise

    def optimizer(
        self,
        name: str,
        *,
        transport: TransportName = "auto",
        wire_dtype: WireDtype = "native",
        error_feedback: bool = False,
    ) -> Optimizer:
        """Find an existing optimizer.

        Args:
            name: The name that `create_optimizer` got.
            transport: `grpc` sends tensors over the network, `shm` through memory shared with a server on the same
                host; `auto` chooses the fastest that works.
            wire_dtype: Dtype of gradients and updates on the wire; `native` is each parameter's own. The dtype of the
                state does not change.
            error_feedback: Add the rounding errors of earlier gradients, which the wire dtype causes, to the next
                gradient. Then the sum of the applied gradients stays within one rounding of the sum of the gradients.
                The client drops the errors when a restore or an import replaces the state.

        Raises:
            NotFoundError: There is no optimizer of that name.
        """
        return Optimizer(
            self._connection,
            self._found(name),
            transport=transport,
            wire_dtype=wire_dtype,
            error_feedback=error_feedback,
        )

    def worker(
        self,
        name: str,
        worker: str = "",
        *,
        transport: TransportName = "auto",
        wire_dtype: WireDtype = "native",
    ) -> Worker:
        """Become one of several workers on an existing optimizer, in a with-block.

        Args:
            name: The optimizer's name, as `create_optimizer` got it.
            worker: The worker's name, 1 to 64 printable characters of ASCII; a random name by default. A worker that
                enters under its old name continues where it was.
            transport: As for `optimizer`.
            wire_dtype: As for `optimizer`.

        Raises:
            NotFoundError: There is no optimizer of that name.
            InvalidArgumentError: The optimizer has no `consistency`, so it takes no workers.
        """
        return Worker(self._connection, self._found(name), worker, transport, wire_dtype)

    def _found(self, name: str) -> optimizer_pb2.Optimizer:
        request = service_pb2.GetOptimizerRequest(name=resource_name(name))
        answer = self._connection.call(self._connection.stub.GetOptimizer, request).optimizer
        return replies.optimizer(answer, request.name)

    def list_optimizers(self) -> Iterator[OptimizerInfo]:
        """All optimizers of the server, in the order of their names."""
        request = service_pb2.ListOptimizersRequest()
        for page in self._connection.pages(self._connection.stub.ListOptimizers, request):
            yield from map(info_from, page.optimizers)

    def delete_optimizer(self, name: str, *, missing_ok: bool = False, timeout_s: float | None = None) -> None:
        """Delete an optimizer and its state.

        Raises:
            NotFoundError: There is no optimizer of that name, unless `missing_ok`.
            StepInProgressError: A step on it is under way.
        """
        # Looked up before the call, because a retry after a lost answer would find no optimizer.
        if not missing_ok:
            self.optimizer(name)
        request = service_pb2.DeleteOptimizerRequest(name=resource_name(name), allow_missing=True)
        self._connection.call(self._connection.stub.DeleteOptimizer, request, timeout_s=timeout_s)

    def list_checkpoints(self, name: str | None = None) -> list[Checkpoint]:
        """All checkpoints of an optimizer, oldest first. The optimizer itself may be deleted.

        Args:
            name: The name that `create_optimizer` got; None for the checkpoints of all optimizers, by name.
        """
        return list_checkpoints(self._connection, ALL_OPTIMIZERS if name is None else resource_name(name))

    def delete_checkpoint(self, name: str, tag: str) -> None:
        """Delete a checkpoint of an optimizer. The optimizer itself may be deleted.

        Raises:
            NotFoundError: There is no such tag.
        """
        delete_checkpoint(self._connection, resource_name(name), tag)

    def close(self) -> None:
        """Close the connection. The server discards this client's steps under way, and keeps its state."""
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()
