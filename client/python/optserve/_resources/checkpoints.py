"""The checkpoints of an optimizer. The optimizer itself may be deleted."""

from __future__ import annotations

from optserve._resources import replies
from optserve._rpc.connection import Connection
from optserve._rpc.retry import is_retryable
from optserve.errors import DeadlineExceededError, OptserveError
from optserve.state import Checkpoint
from optserve.v1 import checkpoints_pb2

ALL_OPTIMIZERS = "optimizers/-"
"""Stands for the resource names of all optimizers, deleted ones included, in the order of their names."""


def list_checkpoints(connection: Connection, optimizer: str) -> list[Checkpoint]:
    """All checkpoints of the optimizer with that resource name, oldest first; see `ALL_OPTIMIZERS`."""
    request = checkpoints_pb2.ListCheckpointsRequest(parent=optimizer)
    pages = connection.pages(connection.stub.ListCheckpoints, request)
    return [checkpoint_from(item, optimizer) for page in pages for item in page.checkpoints]


def delete_checkpoint(connection: Connection, optimizer: str, tag: str) -> None:
    """Delete a checkpoint.

    Raises:
        NotFoundError: There is no such tag.
    """
    # A retry after a lost answer finds no checkpoint. So a first call without retries finds out whether there is one.
    request = checkpoints_pb2.DeleteCheckpointRequest(name=f"{optimizer}/checkpoints/{tag}")
    try:
        connection.call_once(connection.stub.DeleteCheckpoint, request)
    except OptserveError as error:
        # Nor after a deadline, which has used up the time of this call.
        if not is_retryable(error) or isinstance(error, DeadlineExceededError):
            raise
        request.allow_missing = True
        connection.call(connection.stub.DeleteCheckpoint, request)


def checkpoint_from(message: checkpoints_pb2.Checkpoint, optimizer: str, tag: str = "") -> Checkpoint:
    """The value object of a checkpoint.

    Raises:
        InternalError: The checkpoint is not of that optimizer, or does not have the tag, if one is given.
    """
    of, separator, found = message.name.rpartition("/checkpoints/")
    known = bool(separator and found) and of.startswith("optimizers/") and optimizer in (of, ALL_OPTIMIZERS)
    if not known or (tag and found != tag):
        raise replies.invalid_reply(f"{message.name[:200]!r} is not the checkpoint {optimizer}/checkpoints/{tag}")
    created = replies.seconds(message.create_time)
    return Checkpoint(found, message.step, message.size_bytes, created, of.removeprefix("optimizers/"))
