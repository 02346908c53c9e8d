"""optserve: an optimizer as a service. Gradients go to a server, updates come back.

with optserve.connect("127.0.0.1:50051") as client:
    opt = client.create_optimizer("mlp", optserve.Adadelta(rho=0.95, eps=1e-6), params)
    for name, update in opt.step(grads).items():
        params[name] += update
"""

from optserve import algorithms
from optserve._steps.incremental import StepUnderWay

# Every method, so that one that is added needs no line here.
from optserve.algorithms import *  # noqa: F403
from optserve.client import Client, connect
from optserve.config import ClientConfig
from optserve.errors import (
    AbortedError,
    AlreadyExistsError,
    CheckpointDamagedError,
    ClientUseError,
    DeadlineExceededError,
    EtagMismatchError,
    FailedPreconditionError,
    FeatureUnavailableError,
    GradientLateError,
    InternalError,
    InvalidArgumentError,
    NotFoundError,
    OptserveError,
    ResourceExhaustedError,
    StateLostError,
    StateReplacedError,
    StepCancelledError,
    StepInDoubtError,
    StepInProgressError,
    StepsLostError,
    TooFewWorkersError,
    UnavailableError,
    UnreachableError,
    WorkerReplacedError,
    WrongStepError,
)
from optserve.local import LocalServer, local_server
from optserve.optimizer import Optimizer
from optserve.optimizer_info import OptimizerInfo
from optserve.settings import (
    L2,
    Async,
    AtSteps,
    Bounded,
    Clipping,
    Consistency,
    Constant,
    Cosine,
    Exponential,
    Group,
    InverseTime,
    Schedule,
    Sync,
    TimesLearningRate,
    WeightDecay,
)
from optserve.state import Checkpoint, HostedParameters, OptimizerState, TensorSpec
from optserve.statistics import ElementStatistics, Statistics, TensorStatistics
from optserve.step_result import StepResult
from optserve.tls import Tls
from optserve.weight_decay import with_weight_decay
from optserve.worker import Worker

__all__ = [
    "L2",
    "AbortedError",
    "AlreadyExistsError",
    "Async",
    "AtSteps",
    "Bounded",
    "Checkpoint",
    "CheckpointDamagedError",
    "Client",
    "ClientConfig",
    "ClientUseError",
    "Clipping",
    "Consistency",
    "Constant",
    "Cosine",
    "DeadlineExceededError",
    "ElementStatistics",
    "EtagMismatchError",
    "Exponential",
    "FailedPreconditionError",
    "FeatureUnavailableError",
    "GradientLateError",
    "Group",
    "HostedParameters",
    "InternalError",
    "InvalidArgumentError",
    "InverseTime",
    "LocalServer",
    "NotFoundError",
    "Optimizer",
    "OptimizerInfo",
    "OptimizerState",
    "OptserveError",
    "ResourceExhaustedError",
    "Schedule",
    "StateLostError",
    "StateReplacedError",
    "Statistics",
    "StepCancelledError",
    "StepInDoubtError",
    "StepInProgressError",
    "StepResult",
    "StepUnderWay",
    "StepsLostError",
    "Sync",
    "TensorSpec",
    "TensorStatistics",
    "TimesLearningRate",
    "Tls",
    "TooFewWorkersError",
    "UnavailableError",
    "UnreachableError",
    "WeightDecay",
    "Worker",
    "WorkerReplacedError",
    "WrongStepError",
    "connect",
    "local_server",
    "with_weight_decay",
]
__all__ += algorithms.__all__
