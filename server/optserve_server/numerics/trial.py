"""Checks exactly whether a step leaves the state and its reply finite, by making it on copies.

Most steps need no trial, see `headroom.py`. A trial copies one block after the other and runs the real kernel on it. It
takes one more pass, and memory for one block.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from optserve._common import half_floats
from optserve_server.domain.errors import OptserveError, Reason
from optserve_server.numerics.headroom import ReplyWires
from optserve_server.numerics.layout import Arenas, Operands, Payload, Run
from optserve_server.numerics.preparation import Prepared
from optserve_server.numerics.settings import PARAMETER
from optserve_server.numerics.state import UPDATE, State
from optserve_server.numerics.step_settings import StepPoint

BLOCK = 1 << 17
"""Elements of one block."""


def check_reply(state: State, payload: Payload, source: Arenas) -> None:
    """Raise REPLY_OVERFLOW if a value of a reply does not fit into its wire dtype.

    Args:
        state: Its layout is that of the arenas.
        payload: The payload of the reply.
        source: The arenas that the reply is made of.
    """
    if payload.narrow_wire is None:
        return
    for run in payload.runs:
        part = source[run.dtype][run.start : run.stop]
        if not state.backend.largest(part) <= half_floats.largest(run.wire):
            for start in range(0, part.size, BLOCK):
                _check_wire(payload, run, run.start + start, part[start : start + BLOCK], run.wire)


def run_trial(
    state: State,
    operands: Operands,
    payload: Payload,
    prepared: Prepared,
    reply_wires: ReplyWires,
    at: StepPoint,
) -> None:
    """Make a step on copies, block by block; changes nothing.

    Args:
        state: The state that the step would change.
        operands: The arenas that hold the operands.
        payload: The parameters.
        prepared: Says how the gradient is clipped.
        reply_wires: The wire dtypes of the step's reply.
        at: Which step it is.

    Raises:
        OptserveError: GRADIENT_OVERFLOW or REPLY_OVERFLOW.
    """
    constants = state.constants_for(at.settings)
    rows = constants.at(at.step, at.staleness)
    for run_number, run in enumerate(payload.runs):
        for part, position, counter in state.parts_of(run):
            decay = constants.decay(run.dtype, position, at.step, at.staleness)
            for start in range(part.start, part.stop, BLOCK):
                block = slice(start, min(start + BLOCK, part.stop))
                operand_parts = [arenas[run.dtype][block].copy() for arenas in operands.values()]
                if prepared.clip is not None:
                    prepared.clip.apply(run_number, start - run.start, operand_parts[0])
                gradient = operand_parts[0].copy()
                made = state.trial_step(operand_parts, run.dtype, (block, position, counter), rows, decay)
                _check_finite(state, payload, run, block, made, gradient)
                for array, wires in ((UPDATE, reply_wires.updates), (PARAMETER, reply_wires.parameters)):
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
        name, index = _locate_element(payload, run, block.start + bad)
        raise OptserveError(
            Reason.GRADIENT_OVERFLOW,
            f"The {array} of {name!r} would be {host[bad]:g} at flat index {index}, with a gradient there of "
            f"{gradient[bad]:g}"
            + _earlier_overflow(state, run.dtype, array, block.start + bad)
            + ". The step was refused and nothing was changed; lower the learning rate or the gradient.",
            parameter=name,
            index=index,
            array=array,
        )


def _earlier_overflow(state: State, dtype: np.dtype, array: str, index: int) -> str:
    """A clause for the error if the state was not finite before; an older server may have left it so."""
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
    name, index = _locate_element(payload, run, start + bad)
    raise OptserveError(
        Reason.REPLY_OVERFLOW,
        f"The reply for {name!r} is {values[bad]:g} at flat index {index}, too large for "
        f"{half_floats.name_of(wire)} on the wire. Nothing was changed; ask for it in a wider data type.",
        parameter=name,
        index=index,
    )


def _locate_element(payload: Payload, run: Run, element: int) -> tuple[str, int]:
    """(parameter, flat index in it) of an element of an arena."""
    tensor, byte = payload.locate(run.begin + (element - run.start) * run.wire.itemsize)
    return payload.layout.parameters[tensor].name, byte // run.wire.itemsize
