from google.protobuf import descriptor_pb2 as _descriptor_pb2
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Optional as _Optional

DESCRIPTOR: _descriptor.FileDescriptor
METHOD_FIELD_NUMBER: _ClassVar[int]
method: _descriptor.FieldDescriptor
HYPERPARAMETER_FIELD_NUMBER: _ClassVar[int]
hyperparameter: _descriptor.FieldDescriptor

class Method(_message.Message):
    __slots__ = ("takes_curvature",)
    TAKES_CURVATURE_FIELD_NUMBER: _ClassVar[int]
    takes_curvature: bool
    def __init__(self, takes_curvature: bool = ...) -> None: ...

class Hyperparameter(_message.Message):
    __slots__ = ("default_value", "gte", "gt", "lte", "lt", "default_flag")
    DEFAULT_VALUE_FIELD_NUMBER: _ClassVar[int]
    GTE_FIELD_NUMBER: _ClassVar[int]
    GT_FIELD_NUMBER: _ClassVar[int]
    LTE_FIELD_NUMBER: _ClassVar[int]
    LT_FIELD_NUMBER: _ClassVar[int]
    DEFAULT_FLAG_FIELD_NUMBER: _ClassVar[int]
    default_value: float
    gte: float
    gt: float
    lte: float
    lt: float
    default_flag: bool
    def __init__(self, default_value: _Optional[float] = ..., gte: _Optional[float] = ..., gt: _Optional[float] = ..., lte: _Optional[float] = ..., lt: _Optional[float] = ..., default_flag: bool = ...) -> None: ...
