import datetime

from google.protobuf import timestamp_pb2 as _timestamp_pb2
from google.rpc import status_pb2 as _status_pb2
from optserve.v1 import algorithms_pb2 as _algorithms_pb2
from optserve.v1 import optimizer_pb2 as _optimizer_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Transport(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    TRANSPORT_UNSPECIFIED: _ClassVar[Transport]
    TRANSPORT_STREAM: _ClassVar[Transport]
    TRANSPORT_SHARED_MEMORY: _ClassVar[Transport]

class Reply(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    REPLY_UNSPECIFIED: _ClassVar[Reply]
    REPLY_UPDATES: _ClassVar[Reply]
    REPLY_PARAMETERS: _ClassVar[Reply]
    REPLY_NOTHING: _ClassVar[Reply]

class Operand(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    OPERAND_UNSPECIFIED: _ClassVar[Operand]
    OPERAND_GRADIENT: _ClassVar[Operand]
    OPERAND_CURVATURE: _ClassVar[Operand]
TRANSPORT_UNSPECIFIED: Transport
TRANSPORT_STREAM: Transport
TRANSPORT_SHARED_MEMORY: Transport
REPLY_UNSPECIFIED: Reply
REPLY_UPDATES: Reply
REPLY_PARAMETERS: Reply
REPLY_NOTHING: Reply
OPERAND_UNSPECIFIED: Operand
OPERAND_GRADIENT: Operand
OPERAND_CURVATURE: Operand

class ApplyGradientsRequest(_message.Message):
    __slots__ = ("name", "request_id", "expected_step", "gradients", "worker", "reply", "parameters_step", "lineage", "life", "last_request_id", "settings", "with_gradient_norm", "etag")
    NAME_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_STEP_FIELD_NUMBER: _ClassVar[int]
    GRADIENTS_FIELD_NUMBER: _ClassVar[int]
    WORKER_FIELD_NUMBER: _ClassVar[int]
    REPLY_FIELD_NUMBER: _ClassVar[int]
    PARAMETERS_STEP_FIELD_NUMBER: _ClassVar[int]
    LINEAGE_FIELD_NUMBER: _ClassVar[int]
    LIFE_FIELD_NUMBER: _ClassVar[int]
    LAST_REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    SETTINGS_FIELD_NUMBER: _ClassVar[int]
    WITH_GRADIENT_NORM_FIELD_NUMBER: _ClassVar[int]
    ETAG_FIELD_NUMBER: _ClassVar[int]
    name: str
    request_id: str
    expected_step: int
    gradients: _containers.RepeatedCompositeFieldContainer[Tensor]
    worker: str
    reply: Reply
    parameters_step: int
    lineage: str
    life: int
    last_request_id: str
    settings: _containers.RepeatedCompositeFieldContainer[StepSettings]
    with_gradient_norm: bool
    etag: str
    def __init__(self, name: _Optional[str] = ..., request_id: _Optional[str] = ..., expected_step: _Optional[int] = ..., gradients: _Optional[_Iterable[_Union[Tensor, _Mapping]]] = ..., worker: _Optional[str] = ..., reply: _Optional[_Union[Reply, str]] = ..., parameters_step: _Optional[int] = ..., lineage: _Optional[str] = ..., life: _Optional[int] = ..., last_request_id: _Optional[str] = ..., settings: _Optional[_Iterable[_Union[StepSettings, _Mapping]]] = ..., with_gradient_norm: bool = ..., etag: _Optional[str] = ...) -> None: ...

class ApplyGradientsResponse(_message.Message):
    __slots__ = ("result", "updates")
    RESULT_FIELD_NUMBER: _ClassVar[int]
    UPDATES_FIELD_NUMBER: _ClassVar[int]
    result: Result
    updates: _containers.RepeatedCompositeFieldContainer[Tensor]
    def __init__(self, result: _Optional[_Union[Result, _Mapping]] = ..., updates: _Optional[_Iterable[_Union[Tensor, _Mapping]]] = ...) -> None: ...

class Tensor(_message.Message):
    __slots__ = ("name", "shape", "data_type", "data", "curvature")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    DATA_TYPE_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    CURVATURE_FIELD_NUMBER: _ClassVar[int]
    name: str
    shape: _containers.RepeatedScalarFieldContainer[int]
    data_type: _optimizer_pb2.DataType
    data: bytes
    curvature: bytes
    def __init__(self, name: _Optional[str] = ..., shape: _Optional[_Iterable[int]] = ..., data_type: _Optional[_Union[_optimizer_pb2.DataType, str]] = ..., data: _Optional[bytes] = ..., curvature: _Optional[bytes] = ...) -> None: ...

class StreamStepsRequest(_message.Message):
    __slots__ = ("open", "begin", "chunk", "commit", "abort", "data")
    OPEN_FIELD_NUMBER: _ClassVar[int]
    BEGIN_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    COMMIT_FIELD_NUMBER: _ClassVar[int]
    ABORT_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    open: Open
    begin: Begin
    chunk: Chunk
    commit: Commit
    abort: Abort
    data: bytes
    def __init__(self, open: _Optional[_Union[Open, _Mapping]] = ..., begin: _Optional[_Union[Begin, _Mapping]] = ..., chunk: _Optional[_Union[Chunk, _Mapping]] = ..., commit: _Optional[_Union[Commit, _Mapping]] = ..., abort: _Optional[_Union[Abort, _Mapping]] = ..., data: _Optional[bytes] = ...) -> None: ...

class StreamStepsResponse(_message.Message):
    __slots__ = ("opened", "chunk", "result", "error", "data")
    OPENED_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    RESULT_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    opened: Opened
    chunk: Chunk
    result: Result
    error: StepError
    data: bytes
    def __init__(self, opened: _Optional[_Union[Opened, _Mapping]] = ..., chunk: _Optional[_Union[Chunk, _Mapping]] = ..., result: _Optional[_Union[Result, _Mapping]] = ..., error: _Optional[_Union[StepError, _Mapping]] = ..., data: _Optional[bytes] = ...) -> None: ...

class Open(_message.Message):
    __slots__ = ("name", "wire_type", "transport", "worker", "max_chunk_bytes", "etag", "life", "parameter_count")
    NAME_FIELD_NUMBER: _ClassVar[int]
    WIRE_TYPE_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    WORKER_FIELD_NUMBER: _ClassVar[int]
    MAX_CHUNK_BYTES_FIELD_NUMBER: _ClassVar[int]
    ETAG_FIELD_NUMBER: _ClassVar[int]
    LIFE_FIELD_NUMBER: _ClassVar[int]
    PARAMETER_COUNT_FIELD_NUMBER: _ClassVar[int]
    name: str
    wire_type: _optimizer_pb2.DataType
    transport: Transport
    worker: str
    max_chunk_bytes: int
    etag: str
    life: int
    parameter_count: int
    def __init__(self, name: _Optional[str] = ..., wire_type: _Optional[_Union[_optimizer_pb2.DataType, str]] = ..., transport: _Optional[_Union[Transport, str]] = ..., worker: _Optional[str] = ..., max_chunk_bytes: _Optional[int] = ..., etag: _Optional[str] = ..., life: _Optional[int] = ..., parameter_count: _Optional[int] = ...) -> None: ...

class Opened(_message.Message):
    __slots__ = ("step", "last_request_id", "limits", "etag", "last_tensors", "lineage", "create_time", "step_settings", "shared_memory")
    STEP_FIELD_NUMBER: _ClassVar[int]
    LAST_REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    LIMITS_FIELD_NUMBER: _ClassVar[int]
    ETAG_FIELD_NUMBER: _ClassVar[int]
    LAST_TENSORS_FIELD_NUMBER: _ClassVar[int]
    LINEAGE_FIELD_NUMBER: _ClassVar[int]
    CREATE_TIME_FIELD_NUMBER: _ClassVar[int]
    STEP_SETTINGS_FIELD_NUMBER: _ClassVar[int]
    SHARED_MEMORY_FIELD_NUMBER: _ClassVar[int]
    step: int
    last_request_id: str
    limits: ServerLimits
    etag: str
    last_tensors: _containers.RepeatedScalarFieldContainer[int]
    lineage: str
    create_time: _timestamp_pb2.Timestamp
    step_settings: bool
    shared_memory: SharedMemory
    def __init__(self, step: _Optional[int] = ..., last_request_id: _Optional[str] = ..., limits: _Optional[_Union[ServerLimits, _Mapping]] = ..., etag: _Optional[str] = ..., last_tensors: _Optional[_Iterable[int]] = ..., lineage: _Optional[str] = ..., create_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., step_settings: bool = ..., shared_memory: _Optional[_Union[SharedMemory, _Mapping]] = ...) -> None: ...

class SharedMemory(_message.Message):
    __slots__ = ("segment", "size_bytes", "nonce_offset", "offsets", "curvature_offsets", "dirty_offset", "replied_offset", "control_socket")
    SEGMENT_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    NONCE_OFFSET_FIELD_NUMBER: _ClassVar[int]
    OFFSETS_FIELD_NUMBER: _ClassVar[int]
    CURVATURE_OFFSETS_FIELD_NUMBER: _ClassVar[int]
    DIRTY_OFFSET_FIELD_NUMBER: _ClassVar[int]
    REPLIED_OFFSET_FIELD_NUMBER: _ClassVar[int]
    CONTROL_SOCKET_FIELD_NUMBER: _ClassVar[int]
    segment: str
    size_bytes: int
    nonce_offset: int
    offsets: _containers.RepeatedScalarFieldContainer[int]
    curvature_offsets: _containers.RepeatedScalarFieldContainer[int]
    dirty_offset: int
    replied_offset: int
    control_socket: str
    def __init__(self, segment: _Optional[str] = ..., size_bytes: _Optional[int] = ..., nonce_offset: _Optional[int] = ..., offsets: _Optional[_Iterable[int]] = ..., curvature_offsets: _Optional[_Iterable[int]] = ..., dirty_offset: _Optional[int] = ..., replied_offset: _Optional[int] = ..., control_socket: _Optional[str] = ...) -> None: ...

class ServerLimits(_message.Message):
    __slots__ = ("max_chunk_bytes", "max_message_bytes", "preferred_chunk_bytes", "max_parameter_bytes", "max_parameters", "max_streams", "max_optimizers", "max_state_bytes")
    MAX_CHUNK_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_MESSAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    PREFERRED_CHUNK_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_PARAMETER_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    MAX_STREAMS_FIELD_NUMBER: _ClassVar[int]
    MAX_OPTIMIZERS_FIELD_NUMBER: _ClassVar[int]
    MAX_STATE_BYTES_FIELD_NUMBER: _ClassVar[int]
    max_chunk_bytes: int
    max_message_bytes: int
    preferred_chunk_bytes: int
    max_parameter_bytes: int
    max_parameters: int
    max_streams: int
    max_optimizers: int
    max_state_bytes: int
    def __init__(self, max_chunk_bytes: _Optional[int] = ..., max_message_bytes: _Optional[int] = ..., preferred_chunk_bytes: _Optional[int] = ..., max_parameter_bytes: _Optional[int] = ..., max_parameters: _Optional[int] = ..., max_streams: _Optional[int] = ..., max_optimizers: _Optional[int] = ..., max_state_bytes: _Optional[int] = ...) -> None: ...

class Begin(_message.Message):
    __slots__ = ("request_id", "expected_step", "tensors", "with_curvature", "reply", "shared_memory_nonce", "parameters_step", "settings", "with_gradient_norm", "etag")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_STEP_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    WITH_CURVATURE_FIELD_NUMBER: _ClassVar[int]
    REPLY_FIELD_NUMBER: _ClassVar[int]
    SHARED_MEMORY_NONCE_FIELD_NUMBER: _ClassVar[int]
    PARAMETERS_STEP_FIELD_NUMBER: _ClassVar[int]
    SETTINGS_FIELD_NUMBER: _ClassVar[int]
    WITH_GRADIENT_NORM_FIELD_NUMBER: _ClassVar[int]
    ETAG_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    expected_step: int
    tensors: _containers.RepeatedScalarFieldContainer[int]
    with_curvature: bool
    reply: Reply
    shared_memory_nonce: bytes
    parameters_step: int
    settings: _containers.RepeatedCompositeFieldContainer[StepSettings]
    with_gradient_norm: bool
    etag: str
    def __init__(self, request_id: _Optional[str] = ..., expected_step: _Optional[int] = ..., tensors: _Optional[_Iterable[int]] = ..., with_curvature: bool = ..., reply: _Optional[_Union[Reply, str]] = ..., shared_memory_nonce: _Optional[bytes] = ..., parameters_step: _Optional[int] = ..., settings: _Optional[_Iterable[_Union[StepSettings, _Mapping]]] = ..., with_gradient_norm: bool = ..., etag: _Optional[str] = ...) -> None: ...

class StepSettings(_message.Message):
    __slots__ = ("group", "algorithm", "weight_decay", "weight_decay_factor")
    GROUP_FIELD_NUMBER: _ClassVar[int]
    ALGORITHM_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_DECAY_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_DECAY_FACTOR_FIELD_NUMBER: _ClassVar[int]
    group: int
    algorithm: _algorithms_pb2.Algorithm
    weight_decay: float
    weight_decay_factor: float
    def __init__(self, group: _Optional[int] = ..., algorithm: _Optional[_Union[_algorithms_pb2.Algorithm, _Mapping]] = ..., weight_decay: _Optional[float] = ..., weight_decay_factor: _Optional[float] = ...) -> None: ...

class Chunk(_message.Message):
    __slots__ = ("tensor", "offset", "operand")
    TENSOR_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    OPERAND_FIELD_NUMBER: _ClassVar[int]
    tensor: int
    offset: int
    operand: Operand
    def __init__(self, tensor: _Optional[int] = ..., offset: _Optional[int] = ..., operand: _Optional[_Union[Operand, str]] = ...) -> None: ...

class Commit(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Abort(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Result(_message.Message):
    __slots__ = ("request_id", "step", "replayed", "gradient_norm", "staleness", "learning_rates", "clipped")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    REPLAYED_FIELD_NUMBER: _ClassVar[int]
    GRADIENT_NORM_FIELD_NUMBER: _ClassVar[int]
    STALENESS_FIELD_NUMBER: _ClassVar[int]
    LEARNING_RATES_FIELD_NUMBER: _ClassVar[int]
    CLIPPED_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    step: int
    replayed: bool
    gradient_norm: float
    staleness: int
    learning_rates: _containers.RepeatedScalarFieldContainer[float]
    clipped: bool
    def __init__(self, request_id: _Optional[str] = ..., step: _Optional[int] = ..., replayed: bool = ..., gradient_norm: _Optional[float] = ..., staleness: _Optional[int] = ..., learning_rates: _Optional[_Iterable[float]] = ..., clipped: bool = ...) -> None: ...

class StepError(_message.Message):
    __slots__ = ("request_id", "status")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    status: _status_pb2.Status
    def __init__(self, request_id: _Optional[str] = ..., status: _Optional[_Union[_status_pb2.Status, _Mapping]] = ...) -> None: ...
