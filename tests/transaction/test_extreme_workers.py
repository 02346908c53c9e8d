"""Workers whose gradients are of every size: a step is applied for all whose gradients are in it, or for none."""

import threading
from contextlib import closing
from dataclasses import replace

import numpy as np
import pytest

from extremes import Case, any_case, any_values, pick
from optserve._common import half_floats
from optserve_server.domain.errors import OptserveError
from optserve_server.engine.steps import Steps
from optserve_server.engine.transaction import Reply, StepRequest
from optserve_server.numerics import backends
from optserve_server.numerics.consistency import AsyncConsistency, Consistency, SyncConsistency
from optserve_server.numerics.gradient_mean import mean
from optserve_server.numerics.layout import Operand
from transaction.test_extreme_cases import REFUSALS, Operands, Play, arrays_of, digest, finite, plain, sent

CASES = 300

Chunks = list[tuple[int, bytes, Operand]]


def play(seed: int, consistency: Consistency) -> Play:
    case = any_case(seed)
    scaled = consistency.scale_by_staleness and hasattr(case.settings.rule, "learning_rate")
    settings = replace(case.settings, hosted=True, consistency=replace(consistency, scale_by_staleness=scaled))
    return Play(Case(seed, case.rng, case.layout, settings), backends.load("numpy", 1))


def gradients(made: Play, wire: np.dtype | None, share: float) -> tuple[Chunks, Operands]:
    """(what a worker sends, what arrives) of the gradients of a step; at most a share of what may arrive."""
    chunks: Chunks = []
    operands: Operands = []
    for operand in made.state.operand_kinds:
        operands.append({dtype: np.zeros(size, dtype) for dtype, size in made.layout.sizes.items()})
        for index, parameter in enumerate(made.layout.parameters):
            limit = share * made.state.limits.get((operand, parameter.dtype), 0.0)
            data, arrived = sent(any_values(made.rng, parameter.dtype, parameter.size, wire).clip(-limit, limit), wire)
            start = made.layout.starts[index]
            operands[-1][parameter.dtype][start : start + parameter.size] = arrived
            chunks.append((index, data, operand))
    return chunks, operands


def commit(steps: Steps, worker: str, number: int, chunks: Chunks, wire, reply: Reply, at_step: int | None = None):
    """A worker's whole step: its reply, or what it was refused with."""
    with closing(
        steps.begin(StepRequest(f"{worker}-{number}", wire=wire, reply=reply, worker=worker, parameters_step=at_step))
    ) as step:
        try:
            for index, data, operand in chunks:
                step.stage(index, 0, data, operand)
            step.commit()
        except OptserveError as error:
            return error
        return b"".join(step.reply(1 << 20, lambda piece: bytes(piece.data)))


def is_finite(reply: bytes, made: Play, wire: np.dtype | None) -> bool:
    begin = 0
    for parameter in made.layout.parameters if reply else ():
        dtype = wire or parameter.dtype
        end = begin + parameter.size * dtype.itemsize
        wide = np.empty(parameter.size)
        half_floats.convert(np.frombuffer(reply[begin:end], dtype), wide)
        if not np.isfinite(wide).all():
            return False
        begin = end
    return True


def is_applied(made: Play, operands: Operands, before, step: int, staleness: int = 0) -> bool:
    everything = tuple(range(len(made.layout.parameters)))
    # Every step is of all parameters.
    after, updates = plain(made.state, before, [step + 1] * len(everything), operands, everything, step, staleness)
    found = arrays_of(made.state)
    return finite(after | {"update": updates}) and all(
        found[name][dtype].tobytes() == after[name][dtype].tobytes() for name in after for dtype in after[name]
    )


@pytest.mark.parametrize("workers", [2, 3])
def test_a_step_of_many_is_applied_for_all_or_for_none(workers):
    applied = refused = 0
    for seed in range(2_000_000, 2_000_000 + CASES // 2):
        made = play(seed, SyncConsistency(workers=workers))
        names = [f"w{turn}" for turn in range(workers)]
        for name in names:
            made.steps.workers.report(name, leaving=False)
        for _ in range(2):
            wires = [pick(made.rng, (None, None, half_floats.FLOAT16, half_floats.BFLOAT16)) for _ in names]
            replies = [pick(made.rng, tuple(Reply)) for _ in names]
            given = [gradients(made, wire, 0.99) for wire in wires]
            before, was = arrays_of(made.state), digest(made.steps)
            results: dict[str, bytes | OptserveError] = {}

            def work(name: str, chunks: Chunks, wire: np.dtype | None, reply: Reply, at_step: int) -> None:
                results[name] = commit(made.steps, name, at_step, chunks, wire, reply, at_step)  # noqa: B023 - joined

            threads = [
                threading.Thread(target=work, args=(name, chunks, wire, reply, was[0]), daemon=True)
                for name, (chunks, _), wire, reply in zip(names, given, wires, replies, strict=True)
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(60)
                assert not thread.is_alive(), seed
            errors = [result for result in results.values() if isinstance(result, OptserveError)]
            if errors:
                refused += 1
                assert len(errors) == workers, seed
                assert {error.reason for error in errors} <= REFUSALS
                assert digest(made.steps) == was, seed
                continue
            applied += 1
            reply_wires = {name: result for name, result in results.items() if isinstance(result, bytes)}
            merged: Operands = []
            for position in range(len(made.state.operand_kinds)):
                merged.append({})
                for dtype in made.layout.sizes:
                    parts = [operands[position][dtype] for _, operands in given]
                    merged[-1][dtype] = np.empty_like(parts[0])
                    mean(parts, merged[-1][dtype], max(float(np.abs(part).max(initial=0)) for part in parts))
            assert is_applied(made, merged, before, was[0]), seed
            assert all(is_finite(reply_wires[name], made, wire) for name, wire in zip(names, wires, strict=True)), seed
    assert min(applied, refused) > 10


def test_steps_of_asynchronous_workers_are_finite_or_change_nothing():
    applied = refused = 0
    for seed in range(3_000_000, 3_000_000 + CASES):
        made = play(seed, AsyncConsistency(scale_by_staleness=True))
        for name in ("a", "b"):
            made.steps.workers.report(name, leaving=False)
        for number in range(4):
            wire, reply = (
                pick(made.rng, (None, half_floats.FLOAT16, half_floats.BFLOAT16)),
                pick(made.rng, tuple(Reply)),
            )
            chunks, operands = gradients(made, wire, np.inf)
            at_step = int(made.rng.integers(made.steps.step + 1))
            before, was = arrays_of(made.state), digest(made.steps)
            result = commit(made.steps, pick(made.rng, ("a", "b")), number, chunks, wire, reply, at_step)
            if isinstance(result, OptserveError):
                refused += 1
                assert result.reason in REFUSALS
                assert digest(made.steps) == was, seed
                continue
            applied += 1
            consistency = made.state.settings.consistency
            staleness = was[0] - at_step if consistency and consistency.scale_by_staleness else 0
            assert is_applied(made, operands, before, was[0], staleness), seed
            assert is_finite(result, made, wire), seed
    assert min(applied, refused) > 10
