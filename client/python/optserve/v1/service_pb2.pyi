import datetime

from google.protobuf import field_mask_pb2 as _field_mask_pb2
from google.protobuf import timestamp_pb2 as _timestamp_pb2
from optserve.v1 import additions_pb2 as _additions_pb2
from optserve.v1 import checkpoints_pb2 as _checkpoints_pb2
from optserve.v1 import optimizer_pb2 as _optimizer_pb2
from optserve.v1 import replicas_pb2 as _replicas_pb2
from optserve.v1 import statistics_pb2 as _statistics_pb2
from optserve.v1 import steps_pb2 as _steps_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Feature(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    FEATURE_UNSPECIFIED: _ClassVar[Feature]
    FEATURE_UNARY_STEPS: _ClassVar[Feature]
    FEATURE_STREAMED_STEPS: _ClassVar[Feature]
    FEATURE_LIVE_UPDATES: _ClassVar[Feature]
    FEATURE_PARAMETER_GROUPS: _ClassVar[Feature]
    FEATURE_SCHEDULES: _ClassVar[Feature]
    FEATURE_CLIPPING: _ClassVar[Feature]
    FEATURE_CURVATURE: _ClassVar[Feature]
    FEATURE_HOSTED_MODE: _ClassVar[Feature]
    FEATURE_WORKERS: _ClassVar[Feature]
    FEATURE_CHECKPOINTS: _ClassVar[Feature]
    FEATURE_STATE_TRANSFER: _ClassVar[Feature]
    FEATURE_STATISTICS: _ClassVar[Feature]
    FEATURE_SHARED_MEMORY: _ClassVar[Feature]
    FEATURE_HALF_PRECISION_WIRE: _ClassVar[Feature]
    FEATURE_IMPORTED_SETTINGS: _ClassVar[Feature]
    FEATURE_STEP_SETTINGS: _ClassVar[Feature]
    FEATURE_ADDED_PARAMETERS: _ClassVar[Feature]
    FEATURE_WEIGHT_DECAY_KINDS: _ClassVar[Feature]
    FEATURE_WEIGHT_DECAY_FACTORS: _ClassVar[Feature]
FEATURE_UNSPECIFIED: Feature
FEATURE_UNARY_STEPS: Feature
FEATURE_STREAMED_STEPS: Feature
FEATURE_LIVE_UPDATES: Feature
FEATURE_PARAMETER_GROUPS: Feature
FEATURE_SCHEDULES: Feature
FEATURE_CLIPPING: Feature
FEATURE_CURVATURE: Feature
FEATURE_HOSTED_MODE: Feature
FEATURE_WORKERS: Feature
FEATURE_CHECKPOINTS: Feature
FEATURE_STATE_TRANSFER: Feature
FEATURE_STATISTICS: Feature
FEATURE_SHARED_MEMORY: Feature
FEATURE_HALF_PRECISION_WIRE: Feature
FEATURE_IMPORTED_SETTINGS: Feature
FEATURE_STEP_SETTINGS: Feature
FEATURE_ADDED_PARAMETERS: Feature
FEATURE_WEIGHT_DECAY_KINDS: Feature
FEATURE_WEIGHT_DECAY_FACTORS: Feature

class GetServerInfoRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetServerInfoResponse(_message.Message):
    __slots__ = ("version", "instance_id", "start_time", "backend", "backend_reason", "device", "durability", "limits", "features", "methods", "optimizer_count", "host_id", "durability_problem")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    INSTANCE_ID_FIELD_NUMBER: _ClassVar[int]
    START_TIME_FIELD_NUMBER: _ClassVar[int]
    BACKEND_FIELD_NUMBER: _ClassVar[int]
    BACKEND_REASON_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    DURABILITY_FIELD_NUMBER: _ClassVar[int]
    LIMITS_FIELD_NUMBER: _ClassVar[int]
    FEATURES_FIELD_NUMBER: _ClassVar[int]
    METHODS_FIELD_NUMBER: _ClassVar[int]
    OPTIMIZER_COUNT_FIELD_NUMBER: _ClassVar[int]
    HOST_ID_FIELD_NUMBER: _ClassVar[int]
    DURABILITY_PROBLEM_FIELD_NUMBER: _ClassVar[int]
    version: str
    instance_id: str
    start_time: _timestamp_pb2.Timestamp
    backend: str
    backend_reason: str
    device: str
    durability: str
    limits: _steps_pb2.ServerLimits
    features: _containers.RepeatedCompositeFieldContainer[FeatureStatus]
    methods: _containers.RepeatedScalarFieldContainer[str]
    optimizer_count: int
    host_id: str
    durability_problem: str
    def __init__(self, version: _Optional[str] = ..., instance_id: _Optional[str] = ..., start_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., backend: _Optional[str] = ..., backend_reason: _Optional[str] = ..., device: _Optional[str] = ..., durability: _Optional[str] = ..., limits: _Optional[_Union[_steps_pb2.ServerLimits, _Mapping]] = ..., features: _Optional[_Iterable[_Union[FeatureStatus, _Mapping]]] = ..., methods: _Optional[_Iterable[str]] = ..., optimizer_count: _Optional[int] = ..., host_id: _Optional[str] = ..., durability_problem: _Optional[str] = ...) -> None: ...

class FeatureStatus(_message.Message):
    __slots__ = ("feature", "available")
    FEATURE_FIELD_NUMBER: _ClassVar[int]
    AVAILABLE_FIELD_NUMBER: _ClassVar[int]
    feature: Feature
    available: bool
    def __init__(self, feature: _Optional[_Union[Feature, str]] = ..., available: bool = ...) -> None: ...

class CreateOptimizerRequest(_message.Message):
    __slots__ = ("optimizer_id", "optimizer", "request_id")
    OPTIMIZER_ID_FIELD_NUMBER: _ClassVar[int]
    OPTIMIZER_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    optimizer_id: str
    optimizer: _optimizer_pb2.Optimizer
    request_id: str
    def __init__(self, optimizer_id: _Optional[str] = ..., optimizer: _Optional[_Union[_optimizer_pb2.Optimizer, _Mapping]] = ..., request_id: _Optional[str] = ...) -> None: ...

class CreateOptimizerResponse(_message.Message):
    __slots__ = ("optimizer",)
    OPTIMIZER_FIELD_NUMBER: _ClassVar[int]
    optimizer: _optimizer_pb2.Optimizer
    def __init__(self, optimizer: _Optional[_Union[_optimizer_pb2.Optimizer, _Mapping]] = ...) -> None: ...

class GetOptimizerRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class GetOptimizerResponse(_message.Message):
    __slots__ = ("optimizer",)
    OPTIMIZER_FIELD_NUMBER: _ClassVar[int]
    optimizer: _optimizer_pb2.Optimizer
    def __init__(self, optimizer: _Optional[_Union[_optimizer_pb2.Optimizer, _Mapping]] = ...) -> None: ...

class ListOptimizersRequest(_message.Message):
    __slots__ = ("page_size", "page_token")
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    page_size: int
    page_token: str
    def __init__(self, page_size: _Optional[int] = ..., page_token: _Optional[str] = ...) -> None: ...

class ListOptimizersResponse(_message.Message):
    __slots__ = ("optimizers", "next_page_token")
    OPTIMIZERS_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    optimizers: _containers.RepeatedCompositeFieldContainer[_optimizer_pb2.Optimizer]
    next_page_token: str
    def __init__(self, optimizers: _Optional[_Iterable[_Union[_optimizer_pb2.Optimizer, _Mapping]]] = ..., next_page_token: _Optional[str] = ...) -> None: ...

class UpdateOptimizerRequest(_message.Message):
    __slots__ = ("optimizer", "update_mask")
    OPTIMIZER_FIELD_NUMBER: _ClassVar[int]
    UPDATE_MASK_FIELD_NUMBER: _ClassVar[int]
    optimizer: _optimizer_pb2.Optimizer
    update_mask: _field_mask_pb2.FieldMask
    def __init__(self, optimizer: _Optional[_Union[_optimizer_pb2.Optimizer, _Mapping]] = ..., update_mask: _Optional[_Union[_field_mask_pb2.FieldMask, _Mapping]] = ...) -> None: ...

class UpdateOptimizerResponse(_message.Message):
    __slots__ = ("optimizer",)
    OPTIMIZER_FIELD_NUMBER: _ClassVar[int]
    optimizer: _optimizer_pb2.Optimizer
    def __init__(self, optimizer: _Optional[_Union[_optimizer_pb2.Optimizer, _Mapping]] = ...) -> None: ...

class DeleteOptimizerRequest(_message.Message):
    __slots__ = ("name", "etag", "allow_missing")
    NAME_FIELD_NUMBER: _ClassVar[int]
    ETAG_FIELD_NUMBER: _ClassVar[int]
    ALLOW_MISSING_FIELD_NUMBER: _ClassVar[int]
    name: str
    etag: str
    allow_missing: bool
    def __init__(self, name: _Optional[str] = ..., etag: _Optional[str] = ..., allow_missing: bool = ...) -> None: ...

class DeleteOptimizerResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...
