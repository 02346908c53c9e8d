"""Turns protobuf messages into objects of the domain and back, and checks what the message alone can show."""

from __future__ import annotations

import base64
import binascii
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence, Sized
from typing import TypeVar

import numpy as np
from google.protobuf.message import DecodeError, Message
from google.protobuf.timestamp_pb2 import Timestamp

from optserve._common import wire
from optserve.v1 import checkpoints_pb2, optimizer_pb2, statistics_pb2, steps_pb2
from optserve_server.domain.config import ServerConfig
from optserve_server.domain.errors import OptserveError, Reason
from optserve_server.edge.settings_messages import set_settings
from optserve_server.engine.optimizer import Optimizer, is_id
from optserve_server.engine.statistics import TensorStatistics
from optserve_server.engine.transaction import Reply
from optserve_server.numerics.layout import Layout, Operand, Parameter
from optserve_server.numerics.settings import Settings
from optserve_server.numerics.shared_segment import DIRTY_OFFSET, NONCE_OFFSET, REPLIED_OFFSET, Segment
from optserve_server.persistence.checkpoints import Checkpoint

_Frame = TypeVar("_Frame")

_PREFIX = "optimizers/"
_CHECKPOINTS = "/checkpoints/"

_REPLIES: dict[int, Reply] = {
    steps_pb2.REPLY_UNSPECIFIED: Reply.UPDATES,
    steps_pb2.REPLY_UPDATES: Reply.UPDATES,
    steps_pb2.REPLY_PARAMETERS: Reply.PARAMETERS,
    steps_pb2.REPLY_NOTHING: Reply.NOTHING,
}

MAX_PAGE_SIZE = 1000
STATUS_BYTES = 1024
"""Most bytes that an optimizer's name, counters, times and tokens take in its message."""

MAX_RANK = 32
"""Most extents of a parameter's shape; NumPy allows 64."""


def optimizer_id(name: str, field: str = "name") -> str:
    """The id in a resource name, or raise INVALID_FIELD."""
    identifier = name.removeprefix(_PREFIX)
    if identifier == name or not is_id(identifier):
        raise OptserveError(
            Reason.INVALID_FIELD, f"{field} must be of the form optimizers/ID, not {name[:100]!r}.", field=field
        )
    return identifier


def checkpoint_id(name: str) -> tuple[str, str]:
    """(optimizer id, tag) in a resource name, or raise INVALID_FIELD."""
    parent, separator, tag = name.partition(_CHECKPOINTS)
    identifier = parent.removeprefix(_PREFIX)
    if not separator or identifier == parent or not is_id(identifier) or not is_id(tag):
        raise OptserveError(
            Reason.INVALID_FIELD,
            f"name must be of the form optimizers/ID/checkpoints/TAG, not {name[:200]!r}.",
            field="name",
        )
    return identifier, tag


def layout(given: Sequence[optimizer_pb2.Parameter], field: str = "optimizer.parameters") -> Layout:
    """The parameters that messages describe, or raise INVALID_FIELD, DUPLICATE_PARAMETER or WRONG_DATA_TYPE."""
    if not given:
        raise OptserveError(Reason.INVALID_FIELD, "An optimizer needs at least one parameter.", field=field)
    parameters: list[Parameter] = []
    seen: set[str] = set()
    for index, item in enumerate(given):
        path = f"{field}[{index}]"
        if not (1 <= len(item.name) <= 256 and item.name.isprintable()):
            raise OptserveError(
                Reason.INVALID_FIELD,
                f"A parameter's name must be 1 to 256 printable characters, not {item.name[:100]!r}.",
                field=f"{path}.name",
            )
        if item.name in seen:
            raise OptserveError(
                Reason.DUPLICATE_PARAMETER,
                f"There are two parameters named {item.name!r}.",
                field=f"{path}.name",
                parameter=item.name,
            )
        seen.add(item.name)
        if len(item.shape) > MAX_RANK:
            raise OptserveError(
                Reason.INVALID_FIELD,
                f"{item.name!r} has {len(item.shape)} extents; at most {MAX_RANK} are allowed.",
                field=f"{path}.shape",
            )
        dtype = wire.DTYPES.get(item.data_type or optimizer_pb2.DATA_TYPE_FLOAT32)
        if dtype is None:
            raise OptserveError(
                Reason.WRONG_DATA_TYPE,
                f"The state of {item.name!r} must be DATA_TYPE_FLOAT32 or DATA_TYPE_FLOAT64.",
                field=f"{path}.data_type",
                parameter=item.name,
            )
        parameters.append(Parameter(item.name, tuple(item.shape), dtype))
    return Layout(tuple(parameters))


def check_known(message: Message, field: str, path: str) -> None:
    """Raise INVALID_FIELD if an enum field holds a value that this server's contract does not have."""
    value = getattr(message, field)
    kind = message.DESCRIPTOR.fields_by_name[field].enum_type
    if kind is None or value not in kind.values_by_number:
        raise OptserveError(
            Reason.INVALID_FIELD,
            f"This server does not know the value {value} of {field}.",
            field=f"{path}.{field}",
        )


def check_tensor_count(tensors: Sized, layout: Layout, field: str) -> None:
    """Raise DUPLICATE_PARAMETER if a list names more tensors than the model has, before the list is processed."""
    if len(tensors) > len(layout.parameters):
        raise OptserveError(
            Reason.DUPLICATE_PARAMETER,
            f"The request names {len(tensors)} tensors, but the model has {len(layout.parameters)}; name each once.",
            field=field,
        )


def wire_dtype(data_type: int, field: str) -> np.dtype | None:
    """The dtype on the wire; None for each parameter's own dtype. Raises WRONG_DATA_TYPE."""
    if data_type == optimizer_pb2.DATA_TYPE_UNSPECIFIED:
        return None
    dtype = wire.WIRE_DTYPES.get(data_type)
    if dtype is None:
        raise OptserveError(
            Reason.WRONG_DATA_TYPE, f"This server does not know the data type {data_type}.", field=field
        )
    return dtype


def check_worker(name: str) -> None:
    """Raise INVALID_FIELD unless `name` is valid as a worker's name."""
    if not (1 <= len(name) <= 64 and name.isascii() and name.isprintable()):
        raise OptserveError(
            Reason.INVALID_FIELD, "A worker's name is 1 to 64 printable ASCII characters.", field="worker"
        )


def check_life(life: int, field: str) -> None:
    """Raise INVALID_FIELD unless `life` is small enough for the number of a life that others can follow."""
    if life >= 1 << 63:
        raise OptserveError(Reason.INVALID_FIELD, f"{field} must be less than 2^63.", field=field)


def reply(value: int, field: str) -> Reply:
    """What a reply carries, or raise INVALID_FIELD."""
    if value not in _REPLIES:
        raise OptserveError(Reason.INVALID_FIELD, f"This server does not know the value {value} of Reply.", field=field)
    return _REPLIES[value]


_OPERANDS: dict[int, Operand] = {
    steps_pb2.OPERAND_UNSPECIFIED: Operand.GRADIENT,
    steps_pb2.OPERAND_GRADIENT: Operand.GRADIENT,
    steps_pb2.OPERAND_CURVATURE: Operand.CURVATURE,
}


def operand(value: int, field: str) -> Operand:
    """What a chunk carries, or raise INVALID_FIELD."""
    if value not in _OPERANDS:
        raise OptserveError(
            Reason.INVALID_FIELD, f"This server does not know the value {value} of Operand.", field=field
        )
    return _OPERANDS[value]


def optimizer(item: Optimizer, *, with_parameters: bool = True) -> optimizer_pb2.Optimizer:
    """The message of an optimizer; all its values are of the same moment."""
    with item.steps.locked_state():
        settings, layout = item.settings, item.layout
        message = optimizer_pb2.Optimizer(
            name=_PREFIX + item.id,
            mode=optimizer_pb2.MODE_HOSTED if settings.hosted else optimizer_pb2.MODE_DELTA,
            step=item.steps.step,
            etag=item.etag,
            create_time=timestamp(item.create_time.timestamp()),
            update_time=timestamp(item.update_time.timestamp()),
            backend=item.state.backend_name,
            memory_bytes=item.memory_bytes,
            slots=item.rule.slots,
            lineage=item.steps.lineage,
        )
    # The rest takes long for thousands of parameters, and needs no lock, so steps go on meanwhile.
    set_settings(message, settings, layout)
    if with_parameters:
        message.MergeFromString(serialized_parameters.of(layout))
    return message


class _Parameters:
    """A cache of serialized parameters, by model: thousands of parameters take long to serialize."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._known: OrderedDict[Layout, bytes] = OrderedDict()
        self._bytes = 0

    def of(self, layout: Layout) -> bytes:
        """The parameters of a model, as a serialized Optimizer message without other fields."""
        with self._lock:
            if (known := self._known.get(layout)) is not None:
                self._known.move_to_end(layout)
                return known
            message = optimizer_pb2.Optimizer()
            for item in layout.parameters:
                message.parameters.add(name=item.name, shape=item.shape, data_type=wire.DATA_TYPES[item.dtype])
            made = self._known[layout] = message.SerializeToString()
            self._bytes += len(made)
            while self._bytes > self._max_bytes and len(self._known) > 1:
                self._bytes -= len(self._known.popitem(last=False)[1])
            return made


serialized_parameters = _Parameters(8 << 20)


def check_showable(layout: Layout, settings: Settings, max_message_bytes: int) -> None:
    """Raise MODEL_TOO_LARGE if the message of an optimizer would be too large, so that no call could show it."""
    message = optimizer_pb2.Optimizer()
    set_settings(message, settings, layout)
    size = message.ByteSize() + len(serialized_parameters.of(layout)) + STATUS_BYTES
    if size > max_message_bytes:
        raise OptserveError(
            Reason.MODEL_TOO_LARGE,
            f"The names, shapes and settings of the parameters take {size} bytes; this server shows an optimizer in at "
            f"most {max_message_bytes} (max_message_bytes). Use shorter names, or fewer groups.",
            field="optimizer.parameters",
            limit=max_message_bytes,
            actual=size,
        )


def checkpoint(item: Checkpoint) -> checkpoints_pb2.Checkpoint:
    """The message of a checkpoint."""
    return checkpoints_pb2.Checkpoint(
        name=f"{_PREFIX}{item.optimizer}{_CHECKPOINTS}{item.tag}",
        step=item.step,
        size_bytes=item.size_bytes,
        create_time=timestamp(item.create_time.timestamp()),
    )


def statistics(item: TensorStatistics) -> statistics_pb2.TensorStatistics:
    """The message of one tensor's statistics."""
    message = statistics_pb2.TensorStatistics(
        tensor=item.tensor,
        rms_gradient=item.rms_gradient,
        rms_update=item.rms_update,
        effective_rate_quantiles=item.rate_quantiles,
        rates_count_last_update=item.rates_count_last_update,
    )
    for position, index in enumerate(item.indices):
        message.elements.add(
            index=int(index),
            effective_rate=None if item.rates is None else item.rates[position],
            update=None if item.updates is None else item.updates[position],
            slots=[slot[position] for slot in item.slots],
        )
    return message


def decode(decoder: Callable[[bytes], _Frame], raw: bytes) -> _Frame:
    """Decode the bytes of a message with one of the decoders of `wire`.

    Raises:
        OptserveError: INVALID_FIELD, if the bytes are not a message.
    """
    try:
        return decoder(raw)
    except DecodeError as error:
        raise OptserveError(Reason.INVALID_FIELD, "These bytes are not a message of this method.") from error


def shared_memory(segment: Segment, control_socket: str, count: int) -> steps_pb2.SharedMemory:
    """The message that offers a segment, for the first `count` parameters, and the control socket beside it."""
    return steps_pb2.SharedMemory(
        segment=segment.name,
        size_bytes=segment.size_bytes,
        nonce_offset=NONCE_OFFSET,
        offsets=segment.offsets[Operand.GRADIENT][:count],
        curvature_offsets=segment.offsets.get(Operand.CURVATURE, [])[:count],
        dirty_offset=DIRTY_OFFSET,
        replied_offset=REPLIED_OFFSET,
        control_socket=control_socket,
    )


def limits(config: ServerConfig, preferred_chunk_bytes: int) -> steps_pb2.ServerLimits:
    """The limits of the server, and the size of chunks that it prefers."""
    return steps_pb2.ServerLimits(
        max_chunk_bytes=config.max_chunk_bytes,
        max_message_bytes=config.max_message_bytes,
        preferred_chunk_bytes=preferred_chunk_bytes,
        max_parameter_bytes=config.max_parameter_bytes,
        max_parameters=config.max_parameters,
        max_streams=config.max_streams,
        max_optimizers=config.max_optimizers,
        max_state_bytes=config.max_state_bytes,
    )


def timestamp(seconds: float) -> Timestamp:
    """The message of a time in seconds since 1970; equal times give equal messages."""
    stamp = Timestamp()
    stamp.FromNanoseconds(int(seconds * 1e9))
    return stamp


def page_size(wanted: int) -> int:
    """The number of entries of a page; raises INVALID_FIELD."""
    if wanted > MAX_PAGE_SIZE:
        raise OptserveError(Reason.INVALID_FIELD, f"page_size must be at most {MAX_PAGE_SIZE}.", field="page_size")
    return wanted or 100


def page_token(last_id: str) -> str:
    """The token of the page after `last_id`."""
    return base64.urlsafe_b64encode(last_id.encode()).decode()


def last_id(token: str) -> str:
    """The id in a page token, empty for the first page; or raise INVALID_PAGE_TOKEN."""
    try:
        return base64.b64decode(token.encode("ascii"), altchars=b"-_", validate=True).decode("ascii")
    except (binascii.Error, UnicodeError) as error:
        raise OptserveError(
            Reason.INVALID_PAGE_TOKEN, "page_token must come from the previous page's reply.", field="page_token"
        ) from error
