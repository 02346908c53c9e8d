"""What the package offers, and that it needs nothing of the server."""

import subprocess
import sys
from dataclasses import fields

import pytest

import optserve
from optserve import algorithms
from optserve_server.rules import RULES

PUBLIC = [
    "AbortedError", "Adadelta", "Adagrad", "Algorithm", "AlreadyExistsError", "Async", "AtSteps", "Bounded",
    "Checkpoint", "CheckpointDamagedError", "Client", "ClientConfig", "ClientUseError", "Clipping", "Consistency",
    "Constant", "Cosine", "DeadlineExceededError", "DiagonalHessian", "EtagMismatchError", "Exponential",
    "FailedPreconditionError", "FeatureUnavailableError", "GradientLateError", "Group", "HostedParameters",
    "InternalError", "InvalidArgumentError", "InverseTime", "LocalServer", "Momentum", "NotFoundError", "Optimizer",
    "OptimizerInfo", "OptimizerState", "OptserveError", "ResourceExhaustedError", "Schedule", "Sgd", "StateLostError",
    "StateReplacedError", "StepCancelledError", "StepInDoubtError", "StepInProgressError", "StepsLostError", "Sync",
    "TensorSpec", "TooFewWorkersError", "UnavailableError", "Vsgd", "WindowedRms", "Worker", "WorkerReplacedError",
    "WrongStepError", "connect", "local_server",
    "with_weight_decay",
]  # fmt: skip


def test_the_public_names_are_these():
    assert optserve.__all__ == PUBLIC


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_the_client_has_every_rule_with_the_same_defaults(rule):
    kind = algorithms.ALGORITHMS[rule.name]
    assert {field.name: field.default for field in fields(kind)} == {
        field.name: field.default for field in fields(rule)
    }


@pytest.mark.parametrize("kind", algorithms.ALGORITHMS.values(), ids=algorithms.ALGORITHMS)
def test_algorithms_survive_the_way_through_the_contract(kind):
    assert algorithms.from_message(kind().to_message()) == kind()


def test_importing_the_client_imports_neither_the_server_nor_the_command_line():
    script = "import sys, optserve, optserve.aio; print(*sorted(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    for module in ("optserve_server", "numba", "typer", "rich", "matplotlib", "platformdirs"):
        assert module not in loaded


def test_every_exception_is_drawn_in_the_tree_of_its_module():
    from optserve import errors

    kinds = [
        name for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, errors.OptserveError)
    ]
    for name in kinds:
        assert name in (errors.__doc__ or "")
        assert name in PUBLIC


@pytest.mark.parametrize(
    "bad",
    [
        {"timeout_s": 0},
        {"step_timeout_s": float("inf")},
        {"keepalive_s": 5},
        {"max_chunk_bytes": 3},
        {"max_receive_bytes": 1},
    ],
)
def test_settings_that_cannot_be_used_are_refused(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        optserve.ClientConfig(**bad)
