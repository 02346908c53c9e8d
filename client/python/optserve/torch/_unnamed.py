"""Optimizers that got no name: deleted by `close`, or else when the next one is made, or when Python ends."""

from __future__ import annotations

import atexit
import os
import warnings
import weakref
from collections import deque
from dataclasses import dataclass, field, replace
from typing import Protocol

from optserve._common.clock import SYSTEM
from optserve.client import Client, connect
from optserve.errors import ClientUseError, OptserveError

DELETE_TIMEOUT_S = 2.0
"""How long to wait for servers that are to delete optimizers: for all of them together."""


class Owner(Protocol):
    """What uses an optimizer without a name."""

    def close(self, *, timeout_s: float, for_good: bool) -> None:
        """Close the stream, interrupting a step of another thread, and delete the optimizer."""
        ...


@dataclass(frozen=True)
class Unnamed:
    """An optimizer at the server that only its owner uses.

    Attributes:
        name: Its random name.
        client: The client with which it was created.
        owns_client: Whether the client is closed with it.
        pid: The process that has created it: another one, which has inherited this object by a fork, never deletes it.
    """

    name: str
    client: Client
    owns_client: bool
    pid: int = field(default_factory=os.getpid)

    def delete(self, timeout_s: float) -> None:
        """Delete it at the server, with a RuntimeWarning if that fails."""
        _kept.pop(self.name, None)
        if os.getpid() != self.pid:
            return
        try:
            try:
                self.client.delete_optimizer(self.name, missing_ok=True, timeout_s=timeout_s)
            except ClientUseError:
                # The user has closed the client.
                config = replace(self.client._connection.config, connect_timeout_s=max(timeout_s, 0.001))
                with connect(self.client.target, config) as another:
                    another.delete_optimizer(self.name, missing_ok=True, timeout_s=timeout_s)
        except OptserveError as error:
            # At the end of a with-block an error would replace the one that has ended it.
            warnings.warn(
                f"{self.name!r} may stay at the server, because it could not be deleted: {error} "
                f"`optserve optimizers delete {self.name}` deletes it.",
                RuntimeWarning,
                stacklevel=4,
            )
        finally:
            if self.owns_client:
                self.client.close()


_kept: dict[str, tuple[weakref.ref[Owner], Unnamed]] = {}
"""All that are not deleted yet, with their owners."""
_abandoned: deque[str] = deque()
"""Names of those whose owners are gone. The garbage collector may run in the middle of a call of gRPC, so it makes no
call itself."""


def keep(owner: Owner, unnamed: Unnamed) -> None:
    """Delete an optimizer at the latest when its owner is gone and the next one is made, or when Python ends."""
    name = unnamed.name
    _kept[name] = weakref.ref(owner, lambda _: _abandoned.append(name)), unnamed


def delete_abandoned() -> None:
    """Delete those whose owners are gone."""
    deadline = SYSTEM.monotonic() + DELETE_TIMEOUT_S
    while _abandoned:
        _, unnamed = _kept.get(_abandoned.popleft(), (None, None))
        if unnamed is not None:
            unnamed.delete(max(deadline - SYSTEM.monotonic(), 0.0))


@atexit.register
def _delete_all() -> None:
    """Delete all, before the process ends."""
    deadline = SYSTEM.monotonic() + DELETE_TIMEOUT_S
    for reference, unnamed in list(_kept.values()):
        owner, left_s = reference(), max(deadline - SYSTEM.monotonic(), 0.0)
        if owner is not None:
            # Its stream first: a step under way would keep the optimizer.
            owner.close(timeout_s=left_s, for_good=True)
        else:
            unnamed.delete(left_s)
