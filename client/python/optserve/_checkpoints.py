"""The checkpoints of an optimizer, which may be gone itself."""

from __future__ import annotations

from optserve._transport import Transport, is_retryable
from optserve.errors import OptserveError
from optserve.state import Checkpoint
from optserve.v1 import checkpoints_pb2


def list_checkpoints(connection: Transport, optimizer: str) -> list[Checkpoint]:
    """All checkpoints of the optimizer with that resource name, oldest first."""
    found: list[Checkpoint] = []
    token = ""
    while True:
        request = checkpoints_pb2.ListCheckpointsRequest(parent=optimizer, page_token=token)
        page = connection.call(connection.stub.ListCheckpoints, request)
        found.extend(checkpoint_from(item) for item in page.checkpoints)
        token = page.next_page_token
        if not token:
            return found


def delete_checkpoint(connection: Transport, optimizer: str, tag: str) -> None:
    """Delete a checkpoint.

    Raises:
        NotFoundError: There is no such tag.
    """
    # A retry after a lost answer finds nothing, so whether it was there is found out by a first call without retries.
    request = checkpoints_pb2.DeleteCheckpointRequest(name=f"{optimizer}/checkpoints/{tag}")
    try:
        connection.call_once(connection.stub.DeleteCheckpoint, request)
    except OptserveError as error:
        if not is_retryable(error):
            raise
        request.allow_missing = True
        connection.call(connection.stub.DeleteCheckpoint, request)


def checkpoint_from(message: checkpoints_pb2.Checkpoint) -> Checkpoint:
    """A checkpoint as users see it."""
    tag = message.name.rpartition("/")[2]
    return Checkpoint(tag, message.step, message.size_bytes, message.create_time.ToNanoseconds() / 1e9)
