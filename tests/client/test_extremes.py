"""Random settings and gradients of every size through a real server: a reply is finite, or nothing has changed."""

from contextlib import closing
from dataclasses import asdict, fields
from typing import Any

import numpy as np
import pytest

import optserve
from extremes import Case, any_case, any_values, pick
from optserve_server.numerics.rules import Rule
from optserve_server.numerics.schedule import Schedule
from optserve_server.numerics.settings import Settings

WIRES: tuple[Any, ...] = ("native", "native", "float16", "bfloat16", "float32")
REFUSALS = {"GRADIENT_OVERFLOW", "REPLY_OVERFLOW", "NON_FINITE_VALUE"}


def algorithm(rule: Rule) -> optserve.Algorithm:
    return getattr(optserve, type(rule).__name__)(**asdict(rule))


def schedule(given: Schedule | None) -> optserve.Schedule | None:
    return None if given is None else getattr(optserve, type(given).__name__)(**asdict(given))


def decay(settings: Settings) -> float | optserve.WeightDecay:
    kinds = {kind.kind: kind for kind in (optserve.TimesLearningRate, optserve.L2)}
    kind = kinds.get(settings.decay_kind.value)
    return kind(settings.weight_decay) if kind and settings.hosted else settings.weight_decay


def create(client: optserve.Client, name: str, case: Case) -> dict[str, np.ndarray]:
    """Make the optimizer of a case; gives its parameters."""
    settings, rng = case.settings, case.rng
    params = {p.name: any_values(rng, p.dtype, p.size) for p in case.layout.parameters}
    clipping, groups = settings.clipping, []
    for group in settings.groups:
        known = {item.name for item in fields(settings.rule)}
        names = [case.layout.parameters[index].name for index in group.parameters]
        overrides = {key: value for key, value in group.overrides.items() if key in known}
        groups.append(optserve.Group(names, overrides, group.weight_decay))
    client.create_optimizer(
        name,
        algorithm(settings.rule),
        params,
        schedule=schedule(settings.schedule),
        clipping=optserve.Clipping(**{clipping.kind: clipping.bound}) if clipping else None,
        groups=groups,
        hosted=settings.hosted,
        weight_decay=decay(settings),
    )
    return params


def state(opt: optserve.Optimizer) -> tuple[Any, ...]:
    exported = opt.export_state()
    return exported.step, [(n, s, a.tobytes()) for n, slots in exported.slots.items() for s, a in slots.items()]


@pytest.mark.parametrize("chunk", range(4))
def test_replies_are_finite_or_the_state_is_as_it_was(client, name, chunk):
    refused = applied = 0
    for seed in range(1_000_000 + 60 * chunk, 1_000_000 + 60 * (chunk + 1)):
        case = any_case(seed)
        params = create(client, f"{name}-{seed}", case)
        wire, reply = pick(case.rng, WIRES), pick(case.rng, ("updates", "parameters"))
        with closing(client.optimizer(f"{name}-{seed}", wire_dtype=wire)) as opt:
            for _ in range(3):
                operands = [
                    {n: any_values(case.rng, x.dtype, x.size) for n, x in params.items()}
                    for _ in range(1 + case.settings.rule.takes_curvature)
                ]
                before = state(opt)
                try:
                    got = opt.step(
                        operands[0],
                        curvature=operands[1] if operands[1:] else None,
                        reply=reply if case.settings.hosted else "updates",
                    )
                except optserve.InvalidArgumentError as error:
                    refused += 1
                    if error.reason not in REFUSALS or state(opt) != before:
                        raise AssertionError(f"case {seed} was refused wrongly") from error
                else:
                    applied += 1
                    assert all(np.isfinite(array).all() for array in got.values()), seed
            opt.import_state(opt.export_state())
        client.delete_optimizer(f"{name}-{seed}")
    assert min(refused, applied) > 10


def test_a_pull_that_the_wire_does_not_hold_is_refused(client, name):
    params = {"a": np.zeros(3), "b": np.array([1, 7e4], np.float32)}
    client.create_optimizer(name, optserve.Sgd(), params, hosted=True)
    with closing(client.optimizer(name, wire_dtype="float16")) as opt:
        with pytest.raises(optserve.InvalidArgumentError, match="'b' is 70000 at flat index 1, too large for float16"):
            opt.pull_parameters()
        pulled = opt.pull_parameters(["a"])
        assert pulled is not None
        assert pulled.arrays["a"].tolist() == [0, 0, 0]
    with closing(client.optimizer(name, wire_dtype="bfloat16")) as opt:
        assert opt.pull_parameters().arrays["b"][1] == pytest.approx(7e4, rel=1e-2)


@pytest.mark.parametrize("transport", ["grpc", "shm"])
def test_a_refusal_by_any_transport_names_the_place(client, name, transport):
    client.create_optimizer(name, optserve.Momentum(learning_rate=10.0), {"w": np.zeros((2, 3), np.float32)})
    with closing(client.optimizer(name, transport=transport)) as opt:
        gradient = np.zeros((2, 3), np.float32)
        gradient[1, 2] = 3e38
        with pytest.raises(
            optserve.InvalidArgumentError, match="The momentum of 'w' would be -inf at flat index 5"
        ) as caught:
            opt.step({"w": gradient})
        assert caught.value.reason == "GRADIENT_OVERFLOW"
        assert caught.value.metadata == {"parameter": "w", "index": "5", "array": "momentum"}
        assert opt.current_step == 0
        assert not opt.step({"w": np.zeros((2, 3), np.float32)})["w"].any()
