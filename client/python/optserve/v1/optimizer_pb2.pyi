import datetime

from google.protobuf import duration_pb2 as _duration_pb2
from google.protobuf import timestamp_pb2 as _timestamp_pb2
from optserve.v1 import algorithms_pb2 as _algorithms_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class WeightDecayKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    WEIGHT_DECAY_KIND_UNSPECIFIED: _ClassVar[WeightDecayKind]
    WEIGHT_DECAY_KIND_FIXED: _ClassVar[WeightDecayKind]
    WEIGHT_DECAY_KIND_TIMES_LEARNING_RATE: _ClassVar[WeightDecayKind]
    WEIGHT_DECAY_KIND_L2: _ClassVar[WeightDecayKind]

class DataType(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DATA_TYPE_UNSPECIFIED: _ClassVar[DataType]
    DATA_TYPE_FLOAT32: _ClassVar[DataType]
    DATA_TYPE_FLOAT64: _ClassVar[DataType]
    DATA_TYPE_FLOAT16: _ClassVar[DataType]
    DATA_TYPE_BFLOAT16: _ClassVar[DataType]

class Mode(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    MODE_UNSPECIFIED: _ClassVar[Mode]
    MODE_DELTA: _ClassVar[Mode]
    MODE_HOSTED: _ClassVar[Mode]
WEIGHT_DECAY_KIND_UNSPECIFIED: WeightDecayKind
WEIGHT_DECAY_KIND_FIXED: WeightDecayKind
WEIGHT_DECAY_KIND_TIMES_LEARNING_RATE: WeightDecayKind
WEIGHT_DECAY_KIND_L2: WeightDecayKind
DATA_TYPE_UNSPECIFIED: DataType
DATA_TYPE_FLOAT32: DataType
DATA_TYPE_FLOAT64: DataType
DATA_TYPE_FLOAT16: DataType
DATA_TYPE_BFLOAT16: DataType
MODE_UNSPECIFIED: Mode
MODE_DELTA: Mode
MODE_HOSTED: Mode

class Optimizer(_message.Message):
    __slots__ = ("name", "algorithm", "parameters", "groups", "schedule", "clipping", "weight_decay", "mode", "consistency", "weight_decay_kind", "weight_decay_factor", "step", "etag", "create_time", "update_time", "backend", "memory_bytes", "slots", "lineage")
    NAME_FIELD_NUMBER: _ClassVar[int]
    ALGORITHM_FIELD_NUMBER: _ClassVar[int]
    PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    GROUPS_FIELD_NUMBER: _ClassVar[int]
    SCHEDULE_FIELD_NUMBER: _ClassVar[int]
    CLIPPING_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_DECAY_FIELD_NUMBER: _ClassVar[int]
    MODE_FIELD_NUMBER: _ClassVar[int]
    CONSISTENCY_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_DECAY_KIND_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_DECAY_FACTOR_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    ETAG_FIELD_NUMBER: _ClassVar[int]
    CREATE_TIME_FIELD_NUMBER: _ClassVar[int]
    UPDATE_TIME_FIELD_NUMBER: _ClassVar[int]
    BACKEND_FIELD_NUMBER: _ClassVar[int]
    MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    LINEAGE_FIELD_NUMBER: _ClassVar[int]
    name: str
    algorithm: _algorithms_pb2.Algorithm
    parameters: _containers.RepeatedCompositeFieldContainer[Parameter]
    groups: _containers.RepeatedCompositeFieldContainer[ParameterGroup]
    schedule: _algorithms_pb2.Schedule
    clipping: Clipping
    weight_decay: float
    mode: Mode
    consistency: Consistency
    weight_decay_kind: WeightDecayKind
    weight_decay_factor: float
    step: int
    etag: str
    create_time: _timestamp_pb2.Timestamp
    update_time: _timestamp_pb2.Timestamp
    backend: str
    memory_bytes: int
    slots: _containers.RepeatedScalarFieldContainer[str]
    lineage: str
    def __init__(self, name: _Optional[str] = ..., algorithm: _Optional[_Union[_algorithms_pb2.Algorithm, _Mapping]] = ..., parameters: _Optional[_Iterable[_Union[Parameter, _Mapping]]] = ..., groups: _Optional[_Iterable[_Union[ParameterGroup, _Mapping]]] = ..., schedule: _Optional[_Union[_algorithms_pb2.Schedule, _Mapping]] = ..., clipping: _Optional[_Union[Clipping, _Mapping]] = ..., weight_decay: _Optional[float] = ..., mode: _Optional[_Union[Mode, str]] = ..., consistency: _Optional[_Union[Consistency, _Mapping]] = ..., weight_decay_kind: _Optional[_Union[WeightDecayKind, str]] = ..., weight_decay_factor: _Optional[float] = ..., step: _Optional[int] = ..., etag: _Optional[str] = ..., create_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., update_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., backend: _Optional[str] = ..., memory_bytes: _Optional[int] = ..., slots: _Optional[_Iterable[str]] = ..., lineage: _Optional[str] = ...) -> None: ...

class Parameter(_message.Message):
    __slots__ = ("name", "shape", "data_type")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    DATA_TYPE_FIELD_NUMBER: _ClassVar[int]
    name: str
    shape: _containers.RepeatedScalarFieldContainer[int]
    data_type: DataType
    def __init__(self, name: _Optional[str] = ..., shape: _Optional[_Iterable[int]] = ..., data_type: _Optional[_Union[DataType, str]] = ...) -> None: ...

class ParameterGroup(_message.Message):
    __slots__ = ("parameters", "algorithm", "weight_decay", "weight_decay_factor")
    PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    ALGORITHM_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_DECAY_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_DECAY_FACTOR_FIELD_NUMBER: _ClassVar[int]
    parameters: _containers.RepeatedScalarFieldContainer[str]
    algorithm: _algorithms_pb2.Algorithm
    weight_decay: float
    weight_decay_factor: float
    def __init__(self, parameters: _Optional[_Iterable[str]] = ..., algorithm: _Optional[_Union[_algorithms_pb2.Algorithm, _Mapping]] = ..., weight_decay: _Optional[float] = ..., weight_decay_factor: _Optional[float] = ...) -> None: ...

class Clipping(_message.Message):
    __slots__ = ("value", "norm", "global_norm")
    VALUE_FIELD_NUMBER: _ClassVar[int]
    NORM_FIELD_NUMBER: _ClassVar[int]
    GLOBAL_NORM_FIELD_NUMBER: _ClassVar[int]
    value: float
    norm: float
    global_norm: float
    def __init__(self, value: _Optional[float] = ..., norm: _Optional[float] = ..., global_norm: _Optional[float] = ...) -> None: ...

class Consistency(_message.Message):
    __slots__ = ("bounded", "sync", "lease", "scale_by_staleness")
    ASYNC_FIELD_NUMBER: _ClassVar[int]
    BOUNDED_FIELD_NUMBER: _ClassVar[int]
    SYNC_FIELD_NUMBER: _ClassVar[int]
    LEASE_FIELD_NUMBER: _ClassVar[int]
    SCALE_BY_STALENESS_FIELD_NUMBER: _ClassVar[int]
    bounded: BoundedConsistency
    sync: SyncConsistency
    lease: _duration_pb2.Duration
    scale_by_staleness: bool
    def __init__(self, bounded: _Optional[_Union[BoundedConsistency, _Mapping]] = ..., sync: _Optional[_Union[SyncConsistency, _Mapping]] = ..., lease: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., scale_by_staleness: bool = ..., **kwargs) -> None: ...

class AsyncConsistency(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class BoundedConsistency(_message.Message):
    __slots__ = ("staleness",)
    STALENESS_FIELD_NUMBER: _ClassVar[int]
    staleness: int
    def __init__(self, staleness: _Optional[int] = ...) -> None: ...

class SyncConsistency(_message.Message):
    __slots__ = ("workers", "backup_workers")
    WORKERS_FIELD_NUMBER: _ClassVar[int]
    BACKUP_WORKERS_FIELD_NUMBER: _ClassVar[int]
    workers: int
    backup_workers: int
    def __init__(self, workers: _Optional[int] = ..., backup_workers: _Optional[int] = ...) -> None: ...
