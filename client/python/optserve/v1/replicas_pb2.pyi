import datetime

from google.protobuf import duration_pb2 as _duration_pb2
from optserve.v1 import optimizer_pb2 as _optimizer_pb2
from optserve.v1 import steps_pb2 as _steps_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class WorkerState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    WORKER_STATE_UNSPECIFIED: _ClassVar[WorkerState]
    WORKER_STATE_ALIVE: _ClassVar[WorkerState]
    WORKER_STATE_LEAVING: _ClassVar[WorkerState]
WORKER_STATE_UNSPECIFIED: WorkerState
WORKER_STATE_ALIVE: WorkerState
WORKER_STATE_LEAVING: WorkerState

class PullParametersRequest(_message.Message):
    __slots__ = ("name", "newer_than_step", "wire_type", "tensors", "worker", "life")
    NAME_FIELD_NUMBER: _ClassVar[int]
    NEWER_THAN_STEP_FIELD_NUMBER: _ClassVar[int]
    WIRE_TYPE_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    WORKER_FIELD_NUMBER: _ClassVar[int]
    LIFE_FIELD_NUMBER: _ClassVar[int]
    name: str
    newer_than_step: int
    wire_type: _optimizer_pb2.DataType
    tensors: _containers.RepeatedScalarFieldContainer[int]
    worker: str
    life: int
    def __init__(self, name: _Optional[str] = ..., newer_than_step: _Optional[int] = ..., wire_type: _Optional[_Union[_optimizer_pb2.DataType, str]] = ..., tensors: _Optional[_Iterable[int]] = ..., worker: _Optional[str] = ..., life: _Optional[int] = ...) -> None: ...

class PullParametersResponse(_message.Message):
    __slots__ = ("step", "not_modified", "chunk", "data")
    STEP_FIELD_NUMBER: _ClassVar[int]
    NOT_MODIFIED_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    step: int
    not_modified: bool
    chunk: _steps_pb2.Chunk
    data: bytes
    def __init__(self, step: _Optional[int] = ..., not_modified: bool = ..., chunk: _Optional[_Union[_steps_pb2.Chunk, _Mapping]] = ..., data: _Optional[bytes] = ...) -> None: ...

class PushParametersRequest(_message.Message):
    __slots__ = ("name", "wire_type", "chunk", "commit", "request_id", "data")
    NAME_FIELD_NUMBER: _ClassVar[int]
    WIRE_TYPE_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    COMMIT_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    name: str
    wire_type: _optimizer_pb2.DataType
    chunk: _steps_pb2.Chunk
    commit: _steps_pb2.Commit
    request_id: str
    data: bytes
    def __init__(self, name: _Optional[str] = ..., wire_type: _Optional[_Union[_optimizer_pb2.DataType, str]] = ..., chunk: _Optional[_Union[_steps_pb2.Chunk, _Mapping]] = ..., commit: _Optional[_Union[_steps_pb2.Commit, _Mapping]] = ..., request_id: _Optional[str] = ..., data: _Optional[bytes] = ...) -> None: ...

class PushParametersResponse(_message.Message):
    __slots__ = ("step",)
    STEP_FIELD_NUMBER: _ClassVar[int]
    step: int
    def __init__(self, step: _Optional[int] = ...) -> None: ...

class ReportWorkerRequest(_message.Message):
    __slots__ = ("name", "worker", "state", "life")
    NAME_FIELD_NUMBER: _ClassVar[int]
    WORKER_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    LIFE_FIELD_NUMBER: _ClassVar[int]
    name: str
    worker: str
    state: WorkerState
    life: int
    def __init__(self, name: _Optional[str] = ..., worker: _Optional[str] = ..., state: _Optional[_Union[WorkerState, str]] = ..., life: _Optional[int] = ...) -> None: ...

class ReportWorkerResponse(_message.Message):
    __slots__ = ("lease", "live_workers", "step", "last_request_id", "life")
    LEASE_FIELD_NUMBER: _ClassVar[int]
    LIVE_WORKERS_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    LAST_REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    LIFE_FIELD_NUMBER: _ClassVar[int]
    lease: _duration_pb2.Duration
    live_workers: int
    step: int
    last_request_id: str
    life: int
    def __init__(self, lease: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., live_workers: _Optional[int] = ..., step: _Optional[int] = ..., last_request_id: _Optional[str] = ..., life: _Optional[int] = ...) -> None: ...
