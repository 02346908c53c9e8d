"""Most steps need no look at the state: a look is as rare as it has to be."""

import numpy as np
import pytest

from optserve._common import half_floats
from optserve_server.numerics.backends.numpy import NumpyBackend
from optserve_server.numerics.headroom import NATIVE, ReplyWires
from optserve_server.numerics.layout import ALL, Layout, Operand, Parameter, Payload
from optserve_server.numerics.rules import RULES
from optserve_server.numerics.settings import Settings
from optserve_server.numerics.state import State

F4 = np.dtype("f4")


class Counting(NumpyBackend):
    """Counts the looks at slots."""

    looks = 0

    def extremes(self, slot):
        self.looks += 1
        return super().extremes(slot)


def steps_of(rule, reply_wires: ReplyWires = NATIVE, steps: int = 1000, **settings):
    """(looks at each slot, steps that bounds did not cover) with ordinary gradients."""
    backend = Counting(1)
    layout = Layout((Parameter("x", (50,), F4),))
    state = State(layout, Settings(rule, **settings), backend)
    payload, rng, uncovered = Payload(layout, ALL), np.random.default_rng(6), 0
    for step in range(steps):
        arenas = {operand: layout.arenas(np.zeros(200, np.uint8)) for operand in state.operand_kinds}
        largest = {}
        for operand, arena in arenas.items():
            arena[F4][...] = rng.standard_normal(50) * rng.uniform(0.1, 3)
            largest[operand, F4] = float(np.abs(arena[F4]).max())
        prepared = state.prepare(payload, arenas[Operand.GRADIENT], largest, reply_wires)
        uncovered += not prepared.covered
        state.apply(arenas, payload.runs, step, prepared=prepared)
        state.count(ALL)
    return backend.looks / max(len(rule.slots), 1), uncovered


@pytest.mark.parametrize("hosted", [False, True])
@pytest.mark.parametrize("kind", RULES.values(), ids=RULES)
def test_a_look_is_rare(kind, hosted):
    looks, uncovered = steps_of(kind(), hosted=hosted)
    assert uncovered == 0
    # Of ADADELTA's bounds one doubles in each step, at worst.
    assert looks <= (10 if kind.update_square_slot else 4)


@pytest.mark.parametrize("kind", RULES.values(), ids=RULES)
def test_it_is_rare_where_the_wire_is_narrow(kind):
    # No bound of a centred update is less than that of g / ε.
    rule = kind(eps=1e-3) if kind.name == "centered_rmsprop" else kind()
    looks, uncovered = steps_of(rule, ReplyWires(updates=(half_floats.FLOAT16,)))
    assert uncovered == 0
    assert looks <= 50


def test_a_first_gradient_that_is_much_larger_does_not_last():
    backend = Counting(1)
    layout = Layout((Parameter("x", (1,), F4),))
    state = State(layout, Settings(RULES["momentum"]()), backend)
    arenas = layout.arenas(np.zeros(4, np.uint8))
    payload, narrow = Payload(layout, ALL), ReplyWires(updates=(half_floats.FLOAT16,))
    for size in (1e6, *[1.0] * 500):
        assert state.prepare(payload, arenas, {(Operand.GRADIENT, F4): size}, narrow).covered
    assert backend.looks < 20
