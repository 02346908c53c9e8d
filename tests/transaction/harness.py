"""A transaction on its own: no server, no protobuf."""

import numpy as np

from optserve._common import sysv
from optserve_server.engine.durability import InMemory
from optserve_server.engine.steps import Steps
from optserve_server.engine.transaction import StepRequest
from optserve_server.numerics import backends
from optserve_server.numerics.layout import Layout, Operand, Parameter
from optserve_server.numerics.rules import Adadelta, Rule
from optserve_server.numerics.settings import Settings
from optserve_server.numerics.shared_segment import DIRTY_OFFSET, Segment
from optserve_server.numerics.state import State

F4, F8 = np.dtype("f4"), np.dtype("f8")


def make_steps(*parameters: Parameter, rule: Rule | None = None, durability=None) -> Steps:
    """A fresh optimizer of these parameters."""
    state = State(Layout(parameters), Settings(rule or Adadelta()), backends.load("numpy", 1))
    return Steps("test", state, durability or InMemory())


def run_step(steps: Steps, request_id: str, chunks, **options) -> bytes:
    """One whole step; returns the payload of its reply."""
    step = steps.begin(StepRequest(request_id, **options))
    try:
        for tensor, offset, data in chunks:
            step.stage(tensor, offset, data)
        step.commit()
        return b"".join(step.reply(1 << 20, lambda piece: bytes(piece.data)))
    finally:
        step.close()


def write_shared(segment: Segment, gradient: np.ndarray) -> None:
    """What a client does before it begins a step in shared memory."""
    sysv.attach(int(segment.name.removeprefix("sysv:")), segment.size_bytes)[DIRTY_OFFSET] = 1
    segment.operands[Operand.GRADIENT][gradient.dtype][: gradient.size] = gradient


def fingerprint(steps: Steps) -> tuple:
    """Everything that a step can change."""
    slots = [steps._state.backend.to_host(slot).tobytes() for arena in steps._state.slots.values() for slot in arena]
    return steps.step, steps.main.last_request_id, slots
