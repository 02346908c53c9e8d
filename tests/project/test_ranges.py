"""The ranges and defaults that the contract promises, in comments or as options, are those of a server."""

import dataclasses
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import pytest
from google.protobuf.message import Message

from optserve import settings
from optserve.v1 import (
    algorithms_pb2,
    checkpoints_pb2,
    optimizer_pb2,
    options_pb2,
    replicas_pb2,
    service_pb2,
    statistics_pb2,
    steps_pb2,
)
from present import present

CONTRACT = Path(__file__).parents[2] / "proto/optserve/v1"

# Its stub has the type of a plain field.
HYPERPARAMETER: Any = options_pb2.hyperparameter

_FIELD = re.compile(
    r"(?P<comment>(?:^ *//.*\n)+)"
    r" *(?P<label>optional |repeated )?(?P<type>[\w.]+) (?P<name>\w+) = \d+;",
    re.MULTILINE,
)
_RANGE = re.compile(r"(?:Range|Each in) ([\[(]) ?([^,\]]+), ([^,\])]+?) ?([\])])")
_UNITS = {" s": 1.0, " h": 3600.0}


class Ranged(NamedTuple):
    """A field of the contract whose comment or option gives a range."""

    message: str
    field: str
    kind: str
    opening: str
    low: float
    high: float
    closing: str
    absent_at_0: bool
    """Whether 0 says that the field is not given, and that is allowed."""

    @property
    def inside(self) -> list[float]:
        """Values next to both ends of the range."""
        return [self._next(self.low, 1, self.opening == "["), self._next(self.high, -1, self.closing == "]")]

    @property
    def outside(self) -> list[float]:
        """The first values beyond both ends, as far as the type has them."""
        beyond = [self._next(self.low, -1, self.opening == "("), self._next(self.high, 1, self.closing == ")")]
        if self.is_whole:
            beyond = [value for value in beyond if 0 <= value < 2**32 and not (value == 0 and self.absent_at_0)]
        return beyond

    @property
    def is_whole(self) -> bool:
        return self.kind.startswith("uint")

    def _next(self, bound: float, way: int, itself: bool) -> float:
        if math.isinf(bound):
            return bound if itself or way > 0 else (10**6 if self.is_whole else 1e30)
        if itself:
            return bound
        return bound + way * (1 if self.is_whole else max(abs(bound), 1.0) * 1e-6)


def _number(text: str) -> float:
    for unit, seconds in _UNITS.items():
        if text.endswith(unit):
            return float(text.removesuffix(unit)) * seconds
    return float(text)


def _said(field: Any) -> Any:
    """What the option of a field says."""
    return field.GetOptions().Extensions[HYPERPARAMETER]


def _hyperparameters() -> Iterator[Ranged]:
    """Those of the methods and schedules, whose options give the range."""
    for message in [*(present(kind.message_type) for kind in METHODS), *SCHEDULE_MESSAGES]:
        for field in message.fields:
            said = _said(field)
            lower, upper = said.WhichOneof("lower"), said.WhichOneof("upper")
            # Milestones are a list, and a kind is none.
            if not lower:
                continue
            yield Ranged(
                message.name,
                field.name,
                {field.TYPE_DOUBLE: "double", field.TYPE_UINT32: "uint32", field.TYPE_UINT64: "uint64"}[field.type],
                "[" if lower == "gte" else "(",
                getattr(said, lower),
                getattr(said, upper) if upper else math.inf,
                "]" if upper == "lte" else ")",
                absent_at_0=not field.has_presence and said.HasField("default_value"),
            )


def _commented_fields() -> Iterator[Ranged]:
    for path in sorted(CONTRACT.glob("*.proto")):
        # A oneof is no message of its own: its fields are its message's.
        for message, body in re.findall(r"^message (\w+) \{\n(.*?)^\}", path.read_text(), re.MULTILINE | re.DOTALL):
            for found in _FIELD.finditer(body):
                comment = re.sub(r"\n *// ?", " ", found["comment"])
                interval = _RANGE.search(comment)
                if interval is None:
                    continue
                opening, low, high, closing = interval.groups()
                absent = not found["label"] and ("Default" in comment or _number(low) == 0)
                yield Ranged(
                    message, found["name"], found["type"], opening, _number(low), _number(high), closing, absent
                )


METHODS = list(algorithms_pb2.Algorithm.DESCRIPTOR.fields)
SCHEDULE_KINDS = list(present(algorithms_pb2.Schedule.DESCRIPTOR.oneofs_by_name["kind"]).fields)
SCHEDULE_MESSAGES = [algorithms_pb2.Schedule.DESCRIPTOR, *(present(kind.message_type) for kind in SCHEDULE_KINDS)]
COMMENTED = list(_commented_fields())
RANGED = [*COMMENTED, *_hyperparameters()]


def _create(stub: Any, name: str, **settings: Any) -> None:
    given = {"algorithm": algorithms_pb2.Algorithm(sgd=algorithms_pb2.Sgd()), **settings}
    message = optimizer_pb2.Optimizer(parameters=[optimizer_pb2.Parameter(name="w", shape=[3])], **given)
    stub.CreateOptimizer(service_pb2.CreateOptimizerRequest(optimizer_id=name, optimizer=message))
    stub.DeleteOptimizer(service_pb2.DeleteOptimizerRequest(name=f"optimizers/{name}"))


def _algorithm(stub: Any, name: str, message: str, field: str, value: Any) -> None:
    # One of the two conditioning constants must be positive.
    others = {"eps": 1e-6} if field == "outer_eps" else {"outer_eps": 1e-6} if message == "WindowedRms" else {}
    method = next(item for item in METHODS if present(item.message_type).name == message)
    algorithm = algorithms_pb2.Algorithm()
    settings: Message = getattr(algorithm, method.name)
    for key, one in {**others, field: value}.items():
        setattr(settings, key, one)
    _create(stub, name, algorithm=algorithm)


def _schedule(stub: Any, name: str, message: str, field: str, value: Any) -> None:
    kind = next(
        item for item in algorithms_pb2.Schedule.DESCRIPTOR.fields if getattr(item.message_type, "name", "") == message
    )
    required: dict[str, Any] = {
        "exponential": {"rate": 0.5},
        "step": {"rate": 0.5, "milestones": [1]},
        "cosine": {"period_steps": 5},
    }.get(kind.name, {})
    schedule = algorithms_pb2.Schedule()
    settings: Message = getattr(schedule, kind.name)
    settings.SetInParent()
    for key, one in {**required, field: value}.items():
        if isinstance(one, list):
            getattr(settings, key).extend(one)
        else:
            setattr(settings, key, one)
    _create(stub, name, schedule=schedule)


def _hosted(stub: Any, name: str, **settings: Any) -> None:
    _create(stub, name, mode=optimizer_pb2.MODE_HOSTED, **settings)


def _consistency(stub: Any, name: str, **settings: Any) -> None:
    _hosted(stub, name, consistency=optimizer_pb2.Consistency(**settings))


def _statistics(stub: Any, name: str, **query: Any) -> None:
    message = optimizer_pb2.Optimizer(
        algorithm=algorithms_pb2.Algorithm(sgd=algorithms_pb2.Sgd()),
        parameters=[optimizer_pb2.Parameter(name="w", shape=[3])],
    )
    stub.CreateOptimizer(service_pb2.CreateOptimizerRequest(optimizer_id=name, optimizer=message))
    try:
        stub.GetStatistics(statistics_pb2.GetStatisticsRequest(name=f"optimizers/{name}", **query))
    finally:
        stub.DeleteOptimizer(service_pb2.DeleteOptimizerRequest(name=f"optimizers/{name}"))


def _step(stub: Any, name: str, settings: steps_pb2.StepSettings) -> None:
    message = optimizer_pb2.Optimizer(
        algorithm=algorithms_pb2.Algorithm(sgd=algorithms_pb2.Sgd()),
        parameters=[optimizer_pb2.Parameter(name="w", shape=[1])],
        mode=optimizer_pb2.MODE_HOSTED,
    )
    stub.CreateOptimizer(service_pb2.CreateOptimizerRequest(optimizer_id=name, optimizer=message))
    name = f"optimizers/{name}"
    data = bytes(4)
    upload = [
        replicas_pb2.PushParametersRequest(name=name, request_id="push"),
        replicas_pb2.PushParametersRequest(chunk=steps_pb2.Chunk(), data=data, commit=steps_pb2.Commit()),
    ]
    try:
        stub.PushParameters(iter(upload))
        stub.ApplyGradients(
            steps_pb2.ApplyGradientsRequest(
                name=name, request_id="step", gradients=[steps_pb2.Tensor(name="w", data=data)], settings=[settings]
            )
        )
    finally:
        stub.DeleteOptimizer(service_pb2.DeleteOptimizerRequest(name=name))


def _lease(stub: Any, name: str, value: float) -> None:
    consistency = optimizer_pb2.Consistency()
    consistency.bounded.SetInParent()
    consistency.lease.FromNanoseconds(int(value * 1e9))
    _hosted(stub, name, consistency=consistency)


def _workers(stub: Any, name: str, value: int) -> None:
    # So many can be connected to the server of the tests; more are refused for that.
    _consistency(stub, name, sync=optimizer_pb2.SyncConsistency(workers=200 if value == 4096 else value))


CALLS: dict[tuple[str, str], Callable[[Any, str, Any], None]] = {
    ("Optimizer", "weight_decay"): lambda stub, name, value: _hosted(stub, name, weight_decay=value),
    ("ParameterGroup", "weight_decay"): lambda stub, name, value: _hosted(
        stub, name, groups=[optimizer_pb2.ParameterGroup(parameters=["w"], weight_decay=value)]
    ),
    ("StepSettings", "weight_decay"): lambda stub, name, value: _step(
        stub, name, steps_pb2.StepSettings(weight_decay=value)
    ),
    ("Schedule", "warmup_steps"): lambda stub, name, value: _create(
        stub, name, schedule=algorithms_pb2.Schedule(constant=algorithms_pb2.ConstantSchedule(), warmup_steps=value)
    ),
    ("Clipping", "value"): lambda stub, name, value: _create(stub, name, clipping=optimizer_pb2.Clipping(value=value)),
    ("Clipping", "norm"): lambda stub, name, value: _create(stub, name, clipping=optimizer_pb2.Clipping(norm=value)),
    ("Clipping", "global_norm"): lambda stub, name, value: _create(
        stub, name, clipping=optimizer_pb2.Clipping(global_norm=value)
    ),
    ("Consistency", "lease"): _lease,
    ("SyncConsistency", "workers"): _workers,
    ("ListOptimizersRequest", "page_size"): lambda stub, name, value: stub.ListOptimizers(
        service_pb2.ListOptimizersRequest(page_size=value)
    ),
    ("ListCheckpointsRequest", "page_size"): lambda stub, name, value: stub.ListCheckpoints(
        checkpoints_pb2.ListCheckpointsRequest(parent=f"optimizers/{name}", page_size=value)
    ),
    ("GetStatisticsRequest", "random_indices"): lambda stub, name, value: _statistics(stub, name, random_indices=value),
    ("GetStatisticsRequest", "quantiles"): lambda stub, name, value: _statistics(stub, name, quantiles=[value]),
}


def _make(stub: Any, ranged: Ranged, name: str, value: float) -> None:
    """Send a value of the field to the server."""
    given = int(value) if ranged.is_whole else value
    key = ranged.message, ranged.field
    if key in CALLS:
        CALLS[key](stub, name, given)
    elif ranged.message.endswith("Schedule"):
        _schedule(stub, name, ranged.message, ranged.field, given)
    else:
        _algorithm(stub, name, ranged.message, ranged.field, given)


def test_the_contract_has_as_many_ranges_as_it_mentions():
    mentioned = sum(len(re.findall(r"Range|Each in \[", path.read_text())) for path in CONTRACT.glob("*.proto"))
    assert len(COMMENTED) == mentioned > 10
    assert len(RANGED) > 30


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_a_hyperparameter_that_is_absent_is_the_default_of_the_contract(stub, name, method):
    algorithm = algorithms_pb2.Algorithm()
    getattr(algorithm, method.name).SetInParent()
    parameters = [optimizer_pb2.Parameter(name="w", shape=[3])]
    message = optimizer_pb2.Optimizer(parameters=parameters, algorithm=algorithm)
    created = stub.CreateOptimizer(service_pb2.CreateOptimizerRequest(optimizer_id=name, optimizer=message))
    assert {field.name: value for field, value in getattr(created.optimizer.algorithm, method.name).ListFields()} == {
        field.name: _said(field).default_flag if field.type == field.TYPE_BOOL else _said(field).default_value
        for field in present(method.message_type).fields
    }


@pytest.mark.parametrize("ranged", RANGED, ids=lambda ranged: f"{ranged.message}.{ranged.field}")
def test_a_range_of_the_contract_is_the_servers(stub, name, ranged):
    for value in ranged.inside:
        _make(stub, ranged, name, value)
    assert ranged.outside or ranged.absent_at_0
    for value in ranged.outside:
        with pytest.raises(grpc.RpcError) as caught:
            _make(stub, ranged, name, value)
        assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT, value


@pytest.mark.parametrize("kind", SCHEDULE_KINDS, ids=lambda kind: kind.name)
def test_the_client_has_every_schedule_with_the_defaults_of_the_contract(kind):
    own = {field.name: field for field in present(kind.message_type).fields}
    said = {name: _said(field) for name, field in {**algorithms_pb2.Schedule.DESCRIPTOR.fields_by_name, **own}.items()}
    for field in dataclasses.fields(settings.SCHEDULES[kind.name]):
        required = not said[field.name].HasField("default_value")
        assert field.default == (dataclasses.MISSING if required else said[field.name].default_value), field.name
    assert own.keys() <= {field.name for field in dataclasses.fields(settings.SCHEDULES[kind.name])}


@pytest.mark.parametrize("kind", SCHEDULE_KINDS, ids=lambda kind: kind.name)
def test_a_value_of_a_schedule_that_is_absent_is_the_default_of_the_contract(stub, name, kind):
    required: dict[str, Any] = {"rate": 0.5, "decay": 1.0, "milestones": [1], "period_steps": 5}
    fields = present(kind.message_type).fields
    given = {field.name: required[field.name] for field in fields if not _said(field).HasField("default_value")}
    schedule = algorithms_pb2.Schedule()
    chosen = getattr(schedule, kind.name)
    chosen.SetInParent()
    chosen.MergeFrom(type(chosen)(**given))
    parameters = [optimizer_pb2.Parameter(name="w", shape=[3])]
    algorithm = algorithms_pb2.Algorithm(sgd=algorithms_pb2.Sgd())
    message = optimizer_pb2.Optimizer(parameters=parameters, algorithm=algorithm, schedule=schedule)
    created = stub.CreateOptimizer(service_pb2.CreateOptimizerRequest(optimizer_id=name, optimizer=message)).optimizer
    for field in fields:
        if field.name not in given:
            assert getattr(getattr(created.schedule, kind.name), field.name) == _said(field).default_value
