"""Most steps need no look at the state: a look is as rare as it has to be."""

from unittest import mock

import numpy as np
import pytest

from optserve._common import half_floats
from optserve_server.numerics.backends.numpy import NumpyBackend
from optserve_server.numerics.headroom import NATIVE, ReplyWires
from optserve_server.numerics.layout import ALL, Layout, Operand, Parameter, Payload
from optserve_server.numerics.rules import RULES
from optserve_server.numerics.settings import Settings
from optserve_server.numerics.state import State
from optserve_server.numerics.step_settings import PLAIN, Change, StepOptions, StepSettings

F4 = np.dtype("f4")


class Counting(NumpyBackend):
    """Counts the looks at slots."""

    looks = 0

    def extremes(self, slot):
        self.looks += 1
        return super().extremes(slot)


def steps_of(rule, reply_wires: ReplyWires = NATIVE, steps: int = 1000, own=lambda _step: PLAIN, **settings):
    """(looks at each slot, steps that bounds did not cover) with ordinary gradients; `own` gives a step's options."""
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
        options = own(step)
        prepared = state.prepare(payload, arenas[Operand.GRADIENT], largest, reply_wires, options)
        uncovered += not prepared.covered
        state.apply(arenas, payload.runs, step, prepared=prepared, settings=options.settings)
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


def only(**overrides) -> StepOptions:
    """Hyper-parameters of one step."""
    return StepOptions(StepSettings((Change(None, overrides),)))


SCHEDULES_OF_CLIENTS = {
    "decay": lambda step: only(learning_rate=0.01 * 0.999**step),
    "warm-up": lambda step: only(learning_rate=0.01 * (step + 1) / 1000),
    "cycles": lambda step: only(learning_rate=0.01 * (1 + np.sin(step / 10))),
    "now and then": lambda step: only(learning_rate=0.1) if step % 7 == 0 else PLAIN,
}


@pytest.mark.parametrize("own", SCHEDULES_OF_CLIENTS.values(), ids=SCHEDULES_OF_CLIENTS)
@pytest.mark.parametrize("kind", [kind for kind in RULES.values() if hasattr(kind, "learning_rate")])
def test_it_is_rare_with_a_learning_rate_of_each_step(kind, own):
    looks, uncovered = steps_of(kind(), own=own)
    assert uncovered == 0
    assert looks <= (10 if kind.update_square_slot else 4)


def test_bounds_are_computed_rarely_while_a_learning_rate_grows():
    adam = RULES["adam"]
    with mock.patch.object(adam, "bounds", side_effect=adam.bounds) as bounds:
        steps_of(adam(), own=SCHEDULES_OF_CLIENTS["warm-up"])
    # Once for each doubling, and for each look ahead.
    assert bounds.call_count <= 120


@pytest.mark.parametrize("kind", [kind for kind in RULES.values() if hasattr(kind, "beta1")])
def test_it_is_rare_with_other_constants_at_each_step(kind):
    looks, uncovered = steps_of(kind(), own=lambda step: only(beta1=0.85 + 0.1 * (step % 50) / 50))
    assert uncovered == 0
    assert looks <= 20


def test_a_learning_rate_that_is_too_large_for_bounds_does_not_last():
    def rate(step: int) -> StepOptions:
        return only(learning_rate=1e38) if step == 5 else only(learning_rate=1.0 - step / 1000)

    looks, uncovered = steps_of(RULES["sgd_momentum"](), own=rate, steps=300)
    assert uncovered <= 1
    assert looks <= 10


def test_a_first_gradient_that_is_much_larger_does_not_last():
    backend = Counting(1)
    layout = Layout((Parameter("x", (1,), F4),))
    state = State(layout, Settings(RULES["momentum"]()), backend)
    arenas = layout.arenas(np.zeros(4, np.uint8))
    payload, narrow = Payload(layout, ALL), ReplyWires(updates=(half_floats.FLOAT16,))
    for size in (1e6, *[1.0] * 500):
        assert state.prepare(payload, arenas, {(Operand.GRADIENT, F4): size}, narrow).covered
    assert backend.looks < 20
