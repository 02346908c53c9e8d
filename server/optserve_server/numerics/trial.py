"""Whether a step may be applied: whether all that it makes, and its reply as it will be read, is finite.

Bounds answer that for most steps, see `headroom.py`. Where they do not, the step is tried out on copies of small
blocks, by the kernel that would apply it, so the answer is exact. It takes one more pass, and memory for one block.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from optserve._common import half_floats
from optserve_server.domain.errors import OptserveError, Reason
from optserve_server.numerics.headroom import Answers
from optserve_server.numerics.layout import Arenas, Operands, Payload, Run
from optserve_server.numerics.settings import PARAMETER
from optserve_server.numerics.state import UPDATE, Prepared, State

BLOCK = 1 << 17
"""Elements that are tried out at a time."""


def check_reply(state: State, payload: Payload, source: Arenas) -> None:
    """Raise REPLY_OVERFLOW unless the wire of a payload holds what a reply brings from some arenas.

    Args:
        state: Whose layout the arenas have.
        payload: Of the reply.
        source: The arenas.
    """
    if payload.narrow is None:
        return
    for run in payload.runs:
        part = source[run.dtype][run.start : run.stop]
        if not state.backend.largest(part) <= half_floats.largest(run.wire):
            for start in range(0, part.size, BLOCK):
                _check_wire(payload, run, run.start + start, part[start : start + BLOCK], run.wire)


def try_out(
    state: State,
    operands: Operands,
    payload: Payload,
    prepared: Prepared,
    answers: Answers,
    step: int,
    staleness: int,
) -> None:
    """Make a step of copies, block by block; changes nothing.

    Args:
        state: To which the step is to be applied.
        operands: The arenas that hold the operands.
        payload: What takes part.
        prepared: Says how the gradient is clipped.
        answers: How its reply is read.
        step: See `State.apply`.
        staleness: See `State.apply`.

    Raises:
        OptserveError: GRADIENT_OVERFLOW or REPLY_OVERFLOW.
    """
    rows = state.constants_at(step, staleness)
    for turn, run in enumerate(payload.runs):
        for part, position, counter in state.parts_of(run):
            for start in range(part.start, part.stop, BLOCK):
                block = slice(start, min(start + BLOCK, part.stop))
                given = [arenas[run.dtype][block].copy() for arenas in operands.values()]
                if prepared.clip is not None:
                    prepared.clip.apply(turn, start - run.start, given[0])
                gradient = given[0].copy()
                made = state.tried(given, run.dtype, (block, position, counter), rows, staleness)
                _check_finite(state, payload, run, block, made, gradient)
                for array, wires in ((UPDATE, answers.updates), (PARAMETER, answers.parameters)):
                    for wire in wires:
                        _check_wire(payload, run, start, made[array], wire)


def _check_finite(
    state: State, payload: Payload, run: Run, block: slice, made: Mapping[str, Any], gradient: np.ndarray
) -> None:
    for array, values in made.items():
        if all(np.isfinite(state.backend.extremes(values))):
            continue
        host = state.backend.to_host(values)
        bad = int(np.argmin(np.isfinite(host)))
        name, index = _place(payload, run, block.start + bad)
        raise OptserveError(
            Reason.GRADIENT_OVERFLOW,
            f"The {array} of {name!r} would be {host[bad]:g} at flat index {index}, with a gradient there of "
            f"{gradient[bad]:g}"
            + _already(state, run.dtype, array, block.start + bad)
            + ". The step was refused and nothing was changed; lower the learning rate or the gradient.",
            parameter=name,
            index=index,
            array=array,
        )


def _already(state: State, dtype: np.dtype, array: str, index: int) -> str:
    """What to add where the state was not finite before: an older version of this server may have left it so."""
    if array not in state.settings.arrays:
        return ""
    before = state.read(dtype, state.settings.arrays.index(array), index, index + 1)
    return "" if np.isfinite(before).all() else f"; it is {before[0]:g} already, so restore a checkpoint"


def _check_wire(payload: Payload, run: Run, start: int, values: np.ndarray, wire: np.dtype) -> None:
    """Raise REPLY_OVERFLOW for a value that is not finite in a wire dtype."""
    rounded, back = np.empty(values.size, wire), np.empty(values.size, run.dtype)
    half_floats.convert(values, rounded)
    half_floats.convert(rounded, back)
    finite = np.isfinite(back)
    if finite.all():
        return
    bad = int(np.argmin(finite))
    name, index = _place(payload, run, start + bad)
    raise OptserveError(
        Reason.REPLY_OVERFLOW,
        f"The reply for {name!r} is {values[bad]:g} at flat index {index}, too large for "
        f"{half_floats.name_of(wire)} on the wire. Nothing was changed; ask for it in a wider data type.",
        parameter=name,
        index=index,
    )


def _place(payload: Payload, run: Run, element: int) -> tuple[str, int]:
    """(parameter, flat index in it) of an element of an arena."""
    tensor, byte = payload.locate(run.begin + (element - run.start) * run.wire.itemsize)
    return payload.layout.parameters[tensor].name, byte // run.wire.itemsize
