from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class GetStatisticsRequest(_message.Message):
    __slots__ = ("name", "tensors", "quantiles", "indices", "random_indices", "seed")
    NAME_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    QUANTILES_FIELD_NUMBER: _ClassVar[int]
    INDICES_FIELD_NUMBER: _ClassVar[int]
    RANDOM_INDICES_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    name: str
    tensors: _containers.RepeatedScalarFieldContainer[int]
    quantiles: _containers.RepeatedScalarFieldContainer[float]
    indices: _containers.RepeatedScalarFieldContainer[int]
    random_indices: int
    seed: int
    def __init__(self, name: _Optional[str] = ..., tensors: _Optional[_Iterable[int]] = ..., quantiles: _Optional[_Iterable[float]] = ..., indices: _Optional[_Iterable[int]] = ..., random_indices: _Optional[int] = ..., seed: _Optional[int] = ...) -> None: ...

class GetStatisticsResponse(_message.Message):
    __slots__ = ("step", "tensors")
    STEP_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    step: int
    tensors: _containers.RepeatedCompositeFieldContainer[TensorStatistics]
    def __init__(self, step: _Optional[int] = ..., tensors: _Optional[_Iterable[_Union[TensorStatistics, _Mapping]]] = ...) -> None: ...

class TensorStatistics(_message.Message):
    __slots__ = ("tensor", "rms_gradient", "rms_update", "effective_rate_quantiles", "elements", "rates_count_last_update")
    TENSOR_FIELD_NUMBER: _ClassVar[int]
    RMS_GRADIENT_FIELD_NUMBER: _ClassVar[int]
    RMS_UPDATE_FIELD_NUMBER: _ClassVar[int]
    EFFECTIVE_RATE_QUANTILES_FIELD_NUMBER: _ClassVar[int]
    ELEMENTS_FIELD_NUMBER: _ClassVar[int]
    RATES_COUNT_LAST_UPDATE_FIELD_NUMBER: _ClassVar[int]
    tensor: int
    rms_gradient: float
    rms_update: float
    effective_rate_quantiles: _containers.RepeatedScalarFieldContainer[float]
    elements: _containers.RepeatedCompositeFieldContainer[ElementStatistics]
    rates_count_last_update: bool
    def __init__(self, tensor: _Optional[int] = ..., rms_gradient: _Optional[float] = ..., rms_update: _Optional[float] = ..., effective_rate_quantiles: _Optional[_Iterable[float]] = ..., elements: _Optional[_Iterable[_Union[ElementStatistics, _Mapping]]] = ..., rates_count_last_update: bool = ...) -> None: ...

class ElementStatistics(_message.Message):
    __slots__ = ("index", "effective_rate", "update", "slots")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    EFFECTIVE_RATE_FIELD_NUMBER: _ClassVar[int]
    UPDATE_FIELD_NUMBER: _ClassVar[int]
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    index: int
    effective_rate: float
    update: float
    slots: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, index: _Optional[int] = ..., effective_rate: _Optional[float] = ..., update: _Optional[float] = ..., slots: _Optional[_Iterable[float]] = ...) -> None: ...
