"""The optimizer at the server that makes the steps of a RemoteOptimizer: found, created, deleted."""

from __future__ import annotations

import uuid
from contextlib import suppress
from dataclasses import dataclass

from optserve._adapters.named import IfExists, Wanted, adopt, check_if_exists, create_or_adopt
from optserve._resources.choices import TransportName, WireDtype
from optserve.algorithms import Algorithm
from optserve.client import Client, connect
from optserve.errors import ClientUseError, InvalidArgumentError
from optserve.optimizer import Optimizer
from optserve.torch._unnamed import DELETE_TIMEOUT_S, Unnamed, delete_abandoned, keep


@dataclass(frozen=True)
class Choices:
    """What the user chooses beside the method; see `RemoteOptimizer`."""

    name: str | None
    if_exists: IfExists
    transport: TransportName
    wire_dtype: WireDtype


class Place:
    """The optimizer at the server, and who closes what.

    Args:
        server: An address, a client or an optimizer.
        choices: See Choices; they do not count for an optimizer that exists.
        wanted: What it has to be.

    Attributes:
        existed: Whether the server had it before.

    Raises:
        OptserveError: See `RemoteOptimizer`.
    """

    def __init__(self, server: str | Client | Optimizer, choices: Choices, wanted: Wanted) -> None:
        check_if_exists(choices.if_exists)
        delete_abandoned()
        self._closed = False
        self.existed = isinstance(server, Optimizer)
        self._own_client: Client | None = None
        self._unnamed: Unnamed | None = None
        if isinstance(server, Optimizer):
            adopt(server, wanted)
            self._remote = server
            return
        if isinstance(server, str):
            server = self._own_client = connect(server)
        try:
            name = choices.name or f"torch-{uuid.uuid4().hex[:12]}"
            self.existed = create_or_adopt(server, name, choices.if_exists, wanted)
            self._remote = server.optimizer(name, transport=choices.transport, wire_dtype=choices.wire_dtype)
        except BaseException:
            if self._own_client is not None:
                self._own_client.close()
            raise
        if choices.name is None:
            self._unnamed = Unnamed(name, server, owns_client=self._own_client is not None)
            keep(self, self._unnamed)

    @property
    def remote(self) -> Optimizer:
        """The optimizer, or raise ClientUseError after `close`."""
        if self._closed:
            raise ClientUseError("This RemoteOptimizer is closed.")
        return self._remote

    def __repr__(self) -> str:
        return "closed" if self._closed else repr(self._remote)

    def close(self, *, timeout_s: float = DELETE_TIMEOUT_S, for_good: bool = False) -> None:
        """Close the stream, and the connection that `server` has opened; delete an optimizer that got no name.

        If no server answers in time, there is a warning with the name of the optimizer that stays there.

        Args:
            timeout_s: How long to wait for the server to delete it.
            for_good: Interrupt the step that another thread is making, instead of waiting for it.
        """
        if self._closed:
            return
        self._closed = True
        try:
            # A client that is closed has closed the stream; one that a fork has inherited has none.
            with suppress(ClientUseError):
                self._remote.close(for_good=for_good)
        finally:
            if self._unnamed is not None:
                self._unnamed.delete(timeout_s)
            elif self._own_client is not None:
                self._own_client.close()


def existing_method(server: object, algorithm: object, name: str | None) -> Algorithm:
    """The method: the one that was given, or that of an optimizer that exists; raises InvalidArgumentError."""
    if isinstance(server, Optimizer):
        if name is not None:
            raise InvalidArgumentError("An optimizer that exists has a name; leave out `name`.")
        if algorithm is None and server.groups:
            raise InvalidArgumentError(f"{server.name!r} has groups; pass its algorithm, and param groups.")
        algorithm = algorithm or server.algorithm
    elif not isinstance(server, (str, Client)):
        raise InvalidArgumentError(
            f"server must be an address such as '127.0.0.1:50051', a client or an optimizer, not {server!r}."
        )
    if not isinstance(algorithm, Algorithm):
        raise InvalidArgumentError(f"algorithm must be something like optserve.AdamW(1e-3), not {algorithm!r}.")
    return algorithm
