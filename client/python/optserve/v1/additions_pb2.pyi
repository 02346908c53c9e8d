from optserve.v1 import optimizer_pb2 as _optimizer_pb2
from optserve.v1 import steps_pb2 as _steps_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class AddParametersRequest(_message.Message):
    __slots__ = ("name", "parameters", "groups", "request_id", "etag", "lineage", "wire_type", "chunk", "commit", "data")
    NAME_FIELD_NUMBER: _ClassVar[int]
    PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    GROUPS_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ETAG_FIELD_NUMBER: _ClassVar[int]
    LINEAGE_FIELD_NUMBER: _ClassVar[int]
    WIRE_TYPE_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    COMMIT_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    name: str
    parameters: _containers.RepeatedCompositeFieldContainer[_optimizer_pb2.Parameter]
    groups: _containers.RepeatedCompositeFieldContainer[_optimizer_pb2.ParameterGroup]
    request_id: str
    etag: str
    lineage: str
    wire_type: _optimizer_pb2.DataType
    chunk: _steps_pb2.Chunk
    commit: _steps_pb2.Commit
    data: bytes
    def __init__(self, name: _Optional[str] = ..., parameters: _Optional[_Iterable[_Union[_optimizer_pb2.Parameter, _Mapping]]] = ..., groups: _Optional[_Iterable[_Union[_optimizer_pb2.ParameterGroup, _Mapping]]] = ..., request_id: _Optional[str] = ..., etag: _Optional[str] = ..., lineage: _Optional[str] = ..., wire_type: _Optional[_Union[_optimizer_pb2.DataType, str]] = ..., chunk: _Optional[_Union[_steps_pb2.Chunk, _Mapping]] = ..., commit: _Optional[_Union[_steps_pb2.Commit, _Mapping]] = ..., data: _Optional[bytes] = ...) -> None: ...

class AddParametersResponse(_message.Message):
    __slots__ = ("optimizer",)
    OPTIMIZER_FIELD_NUMBER: _ClassVar[int]
    optimizer: _optimizer_pb2.Optimizer
    def __init__(self, optimizer: _Optional[_Union[_optimizer_pb2.Optimizer, _Mapping]] = ...) -> None: ...
