from optserve.v1 import options_pb2 as _options_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Algorithm(_message.Message):
    __slots__ = ("adadelta", "sgd", "momentum", "adagrad", "windowed_rms", "diagonal_hessian", "vsgd", "adam", "adamw", "sgd_momentum", "rmsprop", "centered_rmsprop", "lion", "yogi", "fed_adam", "nadam")
    ADADELTA_FIELD_NUMBER: _ClassVar[int]
    SGD_FIELD_NUMBER: _ClassVar[int]
    MOMENTUM_FIELD_NUMBER: _ClassVar[int]
    ADAGRAD_FIELD_NUMBER: _ClassVar[int]
    WINDOWED_RMS_FIELD_NUMBER: _ClassVar[int]
    DIAGONAL_HESSIAN_FIELD_NUMBER: _ClassVar[int]
    VSGD_FIELD_NUMBER: _ClassVar[int]
    ADAM_FIELD_NUMBER: _ClassVar[int]
    ADAMW_FIELD_NUMBER: _ClassVar[int]
    SGD_MOMENTUM_FIELD_NUMBER: _ClassVar[int]
    RMSPROP_FIELD_NUMBER: _ClassVar[int]
    CENTERED_RMSPROP_FIELD_NUMBER: _ClassVar[int]
    LION_FIELD_NUMBER: _ClassVar[int]
    YOGI_FIELD_NUMBER: _ClassVar[int]
    FED_ADAM_FIELD_NUMBER: _ClassVar[int]
    NADAM_FIELD_NUMBER: _ClassVar[int]
    adadelta: Adadelta
    sgd: Sgd
    momentum: Momentum
    adagrad: Adagrad
    windowed_rms: WindowedRms
    diagonal_hessian: DiagonalHessian
    vsgd: Vsgd
    adam: Adam
    adamw: AdamW
    sgd_momentum: SgdMomentum
    rmsprop: Rmsprop
    centered_rmsprop: CenteredRmsprop
    lion: Lion
    yogi: Yogi
    fed_adam: FedAdam
    nadam: Nadam
    def __init__(self, adadelta: _Optional[_Union[Adadelta, _Mapping]] = ..., sgd: _Optional[_Union[Sgd, _Mapping]] = ..., momentum: _Optional[_Union[Momentum, _Mapping]] = ..., adagrad: _Optional[_Union[Adagrad, _Mapping]] = ..., windowed_rms: _Optional[_Union[WindowedRms, _Mapping]] = ..., diagonal_hessian: _Optional[_Union[DiagonalHessian, _Mapping]] = ..., vsgd: _Optional[_Union[Vsgd, _Mapping]] = ..., adam: _Optional[_Union[Adam, _Mapping]] = ..., adamw: _Optional[_Union[AdamW, _Mapping]] = ..., sgd_momentum: _Optional[_Union[SgdMomentum, _Mapping]] = ..., rmsprop: _Optional[_Union[Rmsprop, _Mapping]] = ..., centered_rmsprop: _Optional[_Union[CenteredRmsprop, _Mapping]] = ..., lion: _Optional[_Union[Lion, _Mapping]] = ..., yogi: _Optional[_Union[Yogi, _Mapping]] = ..., fed_adam: _Optional[_Union[FedAdam, _Mapping]] = ..., nadam: _Optional[_Union[Nadam, _Mapping]] = ...) -> None: ...

class Adadelta(_message.Message):
    __slots__ = ("rho", "eps", "learning_rate")
    RHO_FIELD_NUMBER: _ClassVar[int]
    EPS_FIELD_NUMBER: _ClassVar[int]
    LEARNING_RATE_FIELD_NUMBER: _ClassVar[int]
    rho: float
    eps: float
    learning_rate: float
    def __init__(self, rho: _Optional[float] = ..., eps: _Optional[float] = ..., learning_rate: _Optional[float] = ...) -> None: ...

class Sgd(_message.Message):
    __slots__ = ("learning_rate",)
    LEARNING_RATE_FIELD_NUMBER: _ClassVar[int]
    learning_rate: float
    def __init__(self, learning_rate: _Optional[float] = ...) -> None: ...

class Momentum(_message.Message):
    __slots__ = ("learning_rate", "rho")
    LEARNING_RATE_FIELD_NUMBER: _ClassVar[int]
    RHO_FIELD_NUMBER: _ClassVar[int]
    learning_rate: float
    rho: float
    def __init__(self, learning_rate: _Optional[float] = ..., rho: _Optional[float] = ...) -> None: ...

class Adagrad(_message.Message):
    __slots__ = ("learning_rate", "eps")
    LEARNING_RATE_FIELD_NUMBER: _ClassVar[int]
    EPS_FIELD_NUMBER: _ClassVar[int]
    learning_rate: float
    eps: float
    def __init__(self, learning_rate: _Optional[float] = ..., eps: _Optional[float] = ...) -> None: ...

class WindowedRms(_message.Message):
    __slots__ = ("learning_rate", "rho", "eps", "outer_eps")
    LEARNING_RATE_FIELD_NUMBER: _ClassVar[int]
    RHO_FIELD_NUMBER: _ClassVar[int]
    EPS_FIELD_NUMBER: _ClassVar[int]
    OUTER_EPS_FIELD_NUMBER: _ClassVar[int]
    learning_rate: float
    rho: float
    eps: float
    outer_eps: float
    def __init__(self, learning_rate: _Optional[float] = ..., rho: _Optional[float] = ..., eps: _Optional[float] = ..., outer_eps: _Optional[float] = ...) -> None: ...

class DiagonalHessian(_message.Message):
    __slots__ = ("mu", "learning_rate")
    MU_FIELD_NUMBER: _ClassVar[int]
    LEARNING_RATE_FIELD_NUMBER: _ClassVar[int]
    mu: float
    learning_rate: float
    def __init__(self, mu: _Optional[float] = ..., learning_rate: _Optional[float] = ...) -> None: ...

class Vsgd(_message.Message):
    __slots__ = ("eps", "initial_overestimate", "initial_steps")
    EPS_FIELD_NUMBER: _ClassVar[int]
    INITIAL_OVERESTIMATE_FIELD_NUMBER: _ClassVar[int]
    INITIAL_STEPS_FIELD_NUMBER: _ClassVar[int]
    eps: float
    initial_overestimate: float
    initial_steps: int
    def __init__(self, eps: _Optional[float] = ..., initial_overestimate: _Optional[float] = ..., initial_steps: _Optional[int] = ...) -> None: ...

class Adam(_message.Message):
    __slots__ = ("learning_rate", "beta1", "beta2", "eps")
    LEARNING_RATE_FIELD_NUMBER: _ClassVar[int]
    BETA1_FIELD_NUMBER: _ClassVar[int]
    BETA2_FIELD_NUMBER: _ClassVar[int]
    EPS_FIELD_NUMBER: _ClassVar[int]
    learning_rate: float
    beta1: float
    beta2: float
    eps: float
    def __init__(self, learning_rate: _Optional[float] = ..., beta1: _Optional[float] = ..., beta2: _Optional[float] = ..., eps: _Optional[float] = ...) -> None: ...

class AdamW(_message.Message):
    __slots__ = ("learning_rate", "beta1", "beta2", "eps")
    LEARNING_RATE_FIELD_NUMBER: _ClassVar[int]
    BETA1_FIELD_NUMBER: _ClassVar[int]
    BETA2_FIELD_NUMBER: _ClassVar[int]
    EPS_FIELD_NUMBER: _ClassVar[int]
    learning_rate: float
    beta1: float
    beta2: float
    eps: float
    def __init__(self, learning_rate: _Optional[float] = ..., beta1: _Optional[float] = ..., beta2: _Optional[float] = ..., eps: _Optional[float] = ...) -> None: ...

class SgdMomentum(_message.Message):
    __slots__ = ("learning_rate", "momentum", "dampening", "nesterov")
    LEARNING_RATE_FIELD_NUMBER: _ClassVar[int]
    MOMENTUM_FIELD_NUMBER: _ClassVar[int]
    DAMPENING_FIELD_NUMBER: _ClassVar[int]
    NESTEROV_FIELD_NUMBER: _ClassVar[int]
    learning_rate: float
    momentum: float
    dampening: float
    nesterov: bool
    def __init__(self, learning_rate: _Optional[float] = ..., momentum: _Optional[float] = ..., dampening: _Optional[float] = ..., nesterov: bool = ...) -> None: ...

class Rmsprop(_message.Message):
    __slots__ = ("learning_rate", "rho", "eps", "momentum")
    LEARNING_RATE_FIELD_NUMBER: _ClassVar[int]
    RHO_FIELD_NUMBER: _ClassVar[int]
    EPS_FIELD_NUMBER: _ClassVar[int]
    MOMENTUM_FIELD_NUMBER: _ClassVar[int]
    learning_rate: float
    rho: float
    eps: float
    momentum: float
    def __init__(self, learning_rate: _Optional[float] = ..., rho: _Optional[float] = ..., eps: _Optional[float] = ..., momentum: _Optional[float] = ...) -> None: ...

class CenteredRmsprop(_message.Message):
    __slots__ = ("learning_rate", "rho", "eps", "momentum")
    LEARNING_RATE_FIELD_NUMBER: _ClassVar[int]
    RHO_FIELD_NUMBER: _ClassVar[int]
    EPS_FIELD_NUMBER: _ClassVar[int]
    MOMENTUM_FIELD_NUMBER: _ClassVar[int]
    learning_rate: float
    rho: float
    eps: float
    momentum: float
    def __init__(self, learning_rate: _Optional[float] = ..., rho: _Optional[float] = ..., eps: _Optional[float] = ..., momentum: _Optional[float] = ...) -> None: ...

class Lion(_message.Message):
    __slots__ = ("learning_rate", "beta1", "beta2")
    LEARNING_RATE_FIELD_NUMBER: _ClassVar[int]
    BETA1_FIELD_NUMBER: _ClassVar[int]
    BETA2_FIELD_NUMBER: _ClassVar[int]
    learning_rate: float
    beta1: float
    beta2: float
    def __init__(self, learning_rate: _Optional[float] = ..., beta1: _Optional[float] = ..., beta2: _Optional[float] = ...) -> None: ...

class Yogi(_message.Message):
    __slots__ = ("learning_rate", "beta1", "beta2", "eps", "bias_correction")
    LEARNING_RATE_FIELD_NUMBER: _ClassVar[int]
    BETA1_FIELD_NUMBER: _ClassVar[int]
    BETA2_FIELD_NUMBER: _ClassVar[int]
    EPS_FIELD_NUMBER: _ClassVar[int]
    BIAS_CORRECTION_FIELD_NUMBER: _ClassVar[int]
    learning_rate: float
    beta1: float
    beta2: float
    eps: float
    bias_correction: bool
    def __init__(self, learning_rate: _Optional[float] = ..., beta1: _Optional[float] = ..., beta2: _Optional[float] = ..., eps: _Optional[float] = ..., bias_correction: bool = ...) -> None: ...

class FedAdam(_message.Message):
    __slots__ = ("learning_rate", "beta1", "beta2", "eps", "bias_correction")
    LEARNING_RATE_FIELD_NUMBER: _ClassVar[int]
    BETA1_FIELD_NUMBER: _ClassVar[int]
    BETA2_FIELD_NUMBER: _ClassVar[int]
    EPS_FIELD_NUMBER: _ClassVar[int]
    BIAS_CORRECTION_FIELD_NUMBER: _ClassVar[int]
    learning_rate: float
    beta1: float
    beta2: float
    eps: float
    bias_correction: bool
    def __init__(self, learning_rate: _Optional[float] = ..., beta1: _Optional[float] = ..., beta2: _Optional[float] = ..., eps: _Optional[float] = ..., bias_correction: bool = ...) -> None: ...

class Nadam(_message.Message):
    __slots__ = ("learning_rate", "beta1", "beta2", "eps", "momentum_decay")
    LEARNING_RATE_FIELD_NUMBER: _ClassVar[int]
    BETA1_FIELD_NUMBER: _ClassVar[int]
    BETA2_FIELD_NUMBER: _ClassVar[int]
    EPS_FIELD_NUMBER: _ClassVar[int]
    MOMENTUM_DECAY_FIELD_NUMBER: _ClassVar[int]
    learning_rate: float
    beta1: float
    beta2: float
    eps: float
    momentum_decay: float
    def __init__(self, learning_rate: _Optional[float] = ..., beta1: _Optional[float] = ..., beta2: _Optional[float] = ..., eps: _Optional[float] = ..., momentum_decay: _Optional[float] = ...) -> None: ...

class Schedule(_message.Message):
    __slots__ = ("constant", "inverse_time", "exponential", "step", "cosine", "warmup_steps")
    CONSTANT_FIELD_NUMBER: _ClassVar[int]
    INVERSE_TIME_FIELD_NUMBER: _ClassVar[int]
    EXPONENTIAL_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    COSINE_FIELD_NUMBER: _ClassVar[int]
    WARMUP_STEPS_FIELD_NUMBER: _ClassVar[int]
    constant: ConstantSchedule
    inverse_time: InverseTimeSchedule
    exponential: ExponentialSchedule
    step: StepSchedule
    cosine: CosineSchedule
    warmup_steps: int
    def __init__(self, constant: _Optional[_Union[ConstantSchedule, _Mapping]] = ..., inverse_time: _Optional[_Union[InverseTimeSchedule, _Mapping]] = ..., exponential: _Optional[_Union[ExponentialSchedule, _Mapping]] = ..., step: _Optional[_Union[StepSchedule, _Mapping]] = ..., cosine: _Optional[_Union[CosineSchedule, _Mapping]] = ..., warmup_steps: _Optional[int] = ...) -> None: ...

class ConstantSchedule(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class InverseTimeSchedule(_message.Message):
    __slots__ = ("decay",)
    DECAY_FIELD_NUMBER: _ClassVar[int]
    decay: float
    def __init__(self, decay: _Optional[float] = ...) -> None: ...

class ExponentialSchedule(_message.Message):
    __slots__ = ("rate", "period_steps")
    RATE_FIELD_NUMBER: _ClassVar[int]
    PERIOD_STEPS_FIELD_NUMBER: _ClassVar[int]
    rate: float
    period_steps: int
    def __init__(self, rate: _Optional[float] = ..., period_steps: _Optional[int] = ...) -> None: ...

class StepSchedule(_message.Message):
    __slots__ = ("rate", "milestones")
    RATE_FIELD_NUMBER: _ClassVar[int]
    MILESTONES_FIELD_NUMBER: _ClassVar[int]
    rate: float
    milestones: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, rate: _Optional[float] = ..., milestones: _Optional[_Iterable[int]] = ...) -> None: ...

class CosineSchedule(_message.Message):
    __slots__ = ("period_steps", "floor")
    PERIOD_STEPS_FIELD_NUMBER: _ClassVar[int]
    FLOOR_FIELD_NUMBER: _ClassVar[int]
    period_steps: int
    floor: float
    def __init__(self, period_steps: _Optional[int] = ..., floor: _Optional[float] = ...) -> None: ...
