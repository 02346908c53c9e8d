"""What users call first: `connect` and `Client`."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np

from optserve import _replies, algorithms, settings, sysv
from optserve._checkpoints import delete_checkpoint, list_checkpoints
from optserve._transport import Transport
from optserve.config import ClientConfig
from optserve.errors import InvalidArgumentError
from optserve.optimizer import Optimizer, TransportName, WireDtype
from optserve.state import Checkpoint, TensorSpec
from optserve.v1 import optimizer_pb2, service_pb2
from optserve.wire import DATA_TYPES
from optserve.worker import Worker


class ArrayLike(Protocol):
    """Anything with a shape and a dtype: arrays of NumPy above all, tensors of other libraries too."""

    @property
    def shape(self) -> tuple[int, ...]: ...  # noqa: D102
    @property
    def dtype(self) -> Any: ...  # noqa: D102


def connect(target: str = "127.0.0.1:50051", config: ClientConfig | None = None) -> Client:
    """Connect to a server.

    Args:
        target: HOST:PORT, or `unix:PATH`.
        config: Deadlines, retries and sizes.

    Returns:
        A client, to be used in a with-block or closed.

    Raises:
        UnavailableError: No server answered within `config.connect_timeout_s`.
        DeadlineExceededError: Something is there that does not answer.

    Example:
        >>> with optserve.connect("127.0.0.1:50051") as client:  # doctest: +SKIP
        ...     opt = client.create_optimizer("mlp", optserve.Adadelta(), {"w": w})
        ...     w += opt.step({"w": gradient})["w"]
    """
    return Client(target, config or ClientConfig())


class Client:
    """A connection to one server. Safe to use from several threads; not in a forked process."""

    def __init__(self, target: str, config: ClientConfig) -> None:
        self._transport = Transport(target, config)
        try:
            host_id = self.server_info(timeout_s=config.connect_timeout_s).host_id
            self._transport.same_host = bool(host_id) and host_id == sysv.host_id()
        except BaseException:
            self._transport.close()
            raise

    @property
    def target(self) -> str:
        """What this client is connected to."""
        return self._transport.target

    def server_info(self, *, timeout_s: float | None = None) -> service_pb2.GetServerInfoResponse:
        """What the server is, can do and accepts."""
        request = service_pb2.GetServerInfoRequest()
        return _replies.info(self._transport.call(self._transport.stub.GetServerInfo, request, timeout_s=timeout_s))

    @property
    def shares_memory(self) -> bool:
        """Whether tensors can travel through memory that is shared with the server."""
        return self._transport.same_host

    def create_optimizer(
        self,
        name: str,
        algorithm: algorithms.Algorithm,
        params: Mapping[str, ArrayLike | TensorSpec],
        *,
        schedule: settings.Schedule | None = None,
        clipping: settings.Clipping | None = None,
        groups: Sequence[settings.Group] = (),
        hosted: bool = False,
        weight_decay: float = 0.0,
        consistency: settings.Consistency | None = None,
    ) -> Optimizer:
        """Make an optimizer with all state at 0.

        Args:
            name: 1 to 64 of a-z, 0-9, '.', '_' and '-', beginning with a letter or digit.
            algorithm: The method.
            params: The model's parameters by name: arrays, or anything else with a shape and a dtype.
            schedule: Of the learning rate; constant by default.
            clipping: Of the gradient; none by default.
            groups: Parameters whose hyper-parameters differ.
            hosted: Let the server hold the parameters as well. They are uploaded at once where `params` are arrays of
                NumPy; otherwise `push_parameters` has to, before the first step.
            weight_decay: Per step, decoupled from the gradient, of the parameters that the server holds.
            consistency: How several workers share it, in hosted mode; see `worker`. One client at a time by default.

        Raises:
            AlreadyExistsError: The name is taken.
            InvalidArgumentError: A name, shape, dtype or hyper-parameter that cannot be used.
            ResourceExhaustedError: The model is too large for the server.
        """
        message = optimizer_pb2.Optimizer(
            algorithm=algorithm.to_message(),
            schedule=schedule.to_message() if schedule else None,
            clipping=clipping.to_message() if clipping else None,
            groups=settings.group_messages(groups, algorithm.name),
            mode=optimizer_pb2.MODE_HOSTED if hosted else optimizer_pb2.MODE_DELTA,
            weight_decay=weight_decay,
            consistency=consistency.to_message() if consistency else None,
        )
        for parameter, spec in params.items():
            message.parameters.add(name=parameter, shape=spec.shape, data_type=_data_type(parameter, spec.dtype))
        request = service_pb2.CreateOptimizerRequest(optimizer_id=name, optimizer=message, request_id=str(uuid.uuid4()))
        answer = self._transport.call(self._transport.stub.CreateOptimizer, request).optimizer
        made = _replies.made(answer, f"optimizers/{name}", message.parameters)
        optimizer = Optimizer(self._transport, made)
        arrays = {name: param for name, param in params.items() if isinstance(param, np.ndarray)}
        if hosted and len(arrays) == len(params):
            optimizer.push_parameters(arrays)
        return optimizer

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
            name: As given to `create_optimizer`.
            transport: `grpc` sends tensors over the network, `shm` through memory shared with a server on the same
                host; `auto` takes the fastest that works.
            wire_dtype: Element type of gradients and updates on the way; `native` is each parameter's own. State
                keeps its own in any case.
            error_feedback: Add to each gradient what rounding it for the wire has left out of those before, so that
                what this object's steps have applied stays within one rounding of the sum of their gradients. It
                begins anew when the state is replaced, by a restore or an import.

        Raises:
            NotFoundError: There is none of that name.
        """
        return Optimizer(
            self._transport,
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
            name: The optimizer's, as given to `create_optimizer`.
            worker: This worker's own name among them, 1 to 64 printable characters of ASCII; a random one by default.
                One that comes back under its old name goes on where it was.
            transport: As for `optimizer`.
            wire_dtype: As for `optimizer`.

        Raises:
            NotFoundError: There is no optimizer of that name.
            InvalidArgumentError: It has no `consistency`, so it has no workers.
        """
        return Worker(self._transport, self._found(name), worker, transport, wire_dtype)

    def _found(self, name: str) -> optimizer_pb2.Optimizer:
        request = service_pb2.GetOptimizerRequest(name=f"optimizers/{name}")
        answer = self._transport.call(self._transport.stub.GetOptimizer, request).optimizer
        return _replies.optimizer(answer, request.name)

    def list_optimizers(self) -> Iterator[optimizer_pb2.Optimizer]:
        """All optimizers of the server, by name, without their parameters."""
        request = service_pb2.ListOptimizersRequest()
        for page in self._transport.pages(self._transport.stub.ListOptimizers, request):
            yield from page.optimizers

    def delete_optimizer(self, name: str, *, missing_ok: bool = False, timeout_s: float | None = None) -> None:
        """Delete an optimizer and its state.

        Raises:
            NotFoundError: There is none of that name, unless `missing_ok`.
            StepInProgressError: A step on it is under way.
        """
        # A retry after a lost answer finds nothing, so whether it was there is asked for beforehand.
        if not missing_ok:
            self.optimizer(name)
        request = service_pb2.DeleteOptimizerRequest(name=f"optimizers/{name}", allow_missing=True)
        self._transport.call(self._transport.stub.DeleteOptimizer, request, timeout_s=timeout_s)

    def list_checkpoints(self, name: str) -> list[Checkpoint]:
        """All checkpoints of an optimizer, oldest first; it may have been deleted itself."""
        return list_checkpoints(self._transport, f"optimizers/{name}")

    def delete_checkpoint(self, name: str, tag: str) -> None:
        """Delete a checkpoint of an optimizer, which may have been deleted itself.

        Raises:
            NotFoundError: There is no such tag.
        """
        delete_checkpoint(self._transport, f"optimizers/{name}", tag)

    def close(self) -> None:
        """Close the connection. Steps under way on the server are discarded; its state stays."""
        self._transport.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def _data_type(name: str, dtype: Any) -> int:
    try:
        # Other libraries' dtypes are known by their names: torch.float32.
        known = np.dtype(dtype) if isinstance(dtype, str | type | np.dtype) else np.dtype(str(dtype).rpartition(".")[2])
        return DATA_TYPES[known.newbyteorder("<")]
    except (KeyError, TypeError):
        raise InvalidArgumentError(
            f"{name!r} is {dtype}; a parameter's state is float32 or float64.", metadata={"parameter": name}
        ) from None
