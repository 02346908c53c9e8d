"""What the package offers, and that it needs nothing of the server."""

import ast
import inspect
import subprocess
import sys
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import get_args, get_type_hints, is_typeddict

import numpy as np
import pytest

import optserve
import optserve.aio
from optserve import algorithms
from optserve._aio.awaiting import Threads
from optserve.aio import AsyncOptimizer, AsyncWorker
from optserve.v1 import algorithms_pb2, errors_pb2
from optserve_server.numerics.rules import RULES
from present import present

PUBLIC = [
    "AbortedError", "Algorithm", "AlreadyExistsError", "Async", "AtSteps", "Bounded", "Checkpoint",
    "CheckpointDamagedError", "Client", "ClientConfig", "ClientUseError", "Clipping", "Consistency", "Constant",
    "Cosine", "DeadlineExceededError", "ElementStatistics", "EtagMismatchError", "Exponential",
    "FailedPreconditionError", "FeatureUnavailableError", "GradientLateError", "Group", "HostedParameters",
    "InternalError", "InvalidArgumentError", "InverseTime", "L2", "LocalServer", "NotFoundError", "Optimizer",
    "OptimizerInfo", "OptimizerState", "OptserveError", "ResourceExhaustedError", "Schedule", "StateLostError",
    "StateReplacedError", "Statistics", "StepCancelledError", "StepInDoubtError", "StepInProgressError", "StepResult",
    "StepUnderWay", "StepsLostError", "Sync", "TensorSpec", "TensorStatistics", "TimesLearningRate", "Tls",
    "TooFewWorkersError", "UnavailableError", "UnreachableError", "WeightDecay", "Worker", "WorkerReplacedError",
    "WrongStepError", "connect",
    "local_server", "with_weight_decay",
    *(present(field.message_type).name for field in algorithms_pb2.Algorithm.DESCRIPTOR.fields),
]  # fmt: skip


def test_the_public_names_are_these():
    assert sorted(optserve.__all__) == sorted(PUBLIC)


MEMBERS = {
    optserve.Client: [
        "close", "create_optimizer", "create_optimizer_from_state", "delete_checkpoint", "delete_optimizer",
        "get_or_create_optimizer", "list_checkpoints", "list_optimizers", "optimizer", "server_info", "shares_memory",
        "target", "worker",
    ],
    optserve.Optimizer: [
        "add_parameters", "algorithm", "begin_step", "buffers", "cancel", "clipping", "close", "consistency",
        "current_step", "delete_checkpoint", "export_state", "gradient_norm", "groups", "import_state", "last_result",
        "list_checkpoints", "pull_parameters", "push_parameters", "refresh", "replay", "restore_checkpoint",
        "save_checkpoint", "schedule", "statistics", "step", "steps_made", "takes_curvature", "transport", "update",
        "weight_decay",
    ],
    optserve.Worker: [
        "at_step", "cancel", "current_step", "gradient_norm", "last_result", "pull", "refresh", "staleness", "step",
        "steps_made", "transport",
    ],
    optserve.StepUnderWay: ["send"],
    optserve.OptimizerState: [
        "clipping", "consistency", "groups", "hosted", "hosted_parameters", "load", "parameter_steps", "save",
        "schedule", "settings", "size_bytes", "weight_decay", "without",
    ],
    optserve.OptimizerInfo: ["algorithm", "clipping", "consistency", "groups", "schedule"],
    optserve.LocalServer: ["start", "stop"],
}  # fmt: skip


@pytest.mark.parametrize(("kind", "members"), MEMBERS.items(), ids=lambda value: getattr(value, "__name__", ""))
def test_the_public_members_are_these(kind, members):
    assert [name for name in dir(kind) if not name.startswith("_")] == members


def kinds_in(hint: object) -> set[type]:
    """This package's classes in the type of a value, and in the types of their fields; a TypedDict is a dict."""
    found = set().union(*map(kinds_in, get_args(hint)))
    is_ours = isinstance(hint, type) and hint.__module__.startswith("optserve.") and ".v1." not in hint.__module__
    if is_ours and not is_typeddict(hint):
        found.add(hint)
        if is_dataclass(hint):
            for field in get_type_hints(hint).values():
                found |= kinds_in(field)
    return found


@pytest.mark.parametrize("kind", MEMBERS, ids=lambda kind: kind.__name__)
def test_whatever_a_call_gives_has_a_public_name(kind):
    given = kinds_in(kind)
    for name in MEMBERS[kind]:
        member = getattr(kind, name)
        call = member.fget if isinstance(member, property) else member
        if inspect.isroutine(call):
            given |= kinds_in(get_type_hints(inspect.unwrap(call)).get("return"))
    assert [item for item in given if getattr(optserve, item.__name__, None) is not item] == []


def test_every_object_says_what_it_is(client, name):
    params = {"w": np.ones((3, 2)), "b": np.ones(2)}
    opt = client.create_optimizer(
        name, optserve.Adagrad(), params, hosted=True, schedule=optserve.InverseTime(decay=0.5),
        consistency=optserve.Async(),
    )  # fmt: skip
    with client.worker(name, "first") as worker:
        worker.pull()
        worker.step(params)
        assert repr(worker) == f"Worker('first' of {name!r}, 1 steps made)"
        assert repr(AsyncWorker(worker, Threads())) == f"AsyncWorker('first' of {name!r}, 1 steps made)"
    opt.refresh()
    assert repr(client) == f"Client({client.target!r})"
    assert repr(opt) == f"Optimizer({name!r}, adagrad, hosted, step 1)"
    assert repr(AsyncOptimizer(opt, Threads())) == f"AsyncOptimizer({name!r}, adagrad, hosted, step 1)"
    assert repr(optserve.aio.connect("localhost:1")) == "AsyncClient('localhost:1')"
    assert repr(opt.pull_parameters()) == "HostedParameters(step=1, 2 parameters, 64 bytes)"
    assert repr(opt.export_state()) == (
        "OptimizerState(step=1, algorithm=Adagrad(learning_rate=0.01, eps=1e-10), "
        "schedule=InverseTime(warmup_steps=0, decay=0.5), "
        "consistency=Async(lease_s=30.0, scale_by_staleness=False), 2 parameters, 128 bytes)"
    )
    delta = client.create_optimizer(f"{name}-2", optserve.Sgd(), params)
    with delta.begin_step() as step:
        step.send("b", params["b"])
        assert repr(step) == "StepUnderWay(1 of 2 gradients sent)"
        step.send("w", params["w"])


def test_whatever_is_public_is_there():
    assert all(hasattr(optserve, name) for name in optserve.__all__)


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


SOURCES = [path for path in Path(optserve.__file__).parent.rglob("*.py") if "v1" not in path.parts]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(Path(optserve.__file__).parent)))
def test_no_module_spells_out_a_reason(path):
    """A misspelt literal would compare unequal and say nothing; a misspelt constant fails at the import."""
    reasons = {name.removeprefix("ERROR_REASON_") for name in errors_pb2.ErrorReason.DESCRIPTOR.values_by_name}
    literals = {node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)}
    assert not reasons & literals
