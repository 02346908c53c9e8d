"""Step counters of parameters: what a method that uses them is given, on every backend, and how steps are split."""

import numpy as np
import pytest

from optserve_server.numerics import backends, parameter_steps
from optserve_server.numerics.clipping import Clipping
from optserve_server.numerics.headroom import NATIVE
from optserve_server.numerics.layout import ALL, Layout, Operand, Parameter, Payload, Selection
from optserve_server.numerics.rules import RULES, Adadelta
from optserve_server.numerics.schedule import Exponential
from optserve_server.numerics.settings import Group, Settings
from optserve_server.numerics.staging import Staging
from optserve_server.numerics.state import State
from optserve_server.numerics.step_settings import StepPoint
from optserve_server.numerics.trial import run_trial
from toy import SignDescent, sign_descent

F4, F8 = np.dtype("<f4"), np.dtype("<f8")
LAYOUT = Layout(
    (
        Parameter("a", (300,), F4),
        Parameter("b", (11, 7), F4),
        Parameter("none", (0,), F4),
        Parameter("c", (13,), F4),
        Parameter("wide", (9,), F8),
        Parameter("d", (), F4),
    )
)
TURNS = [ALL, Selection((0,)), Selection((3, 1)), ALL, Selection((5, 4, 0)), Selection((2, 3)), ALL]
"""What takes part in each step."""


def play(
    backend: backends.Backend, settings: Settings, layout: Layout = LAYOUT, turns: list[Selection] = TURNS
) -> tuple[State, list[np.ndarray], list[list[np.ndarray | None]]]:
    """Make steps: (the state, the sum of updates, the gradients or None) of each parameter."""
    state, rng = State(layout, settings, backend), np.random.default_rng(5)
    staging = Staging(state)
    sums = [np.zeros(parameter.size) for parameter in layout.parameters]
    given: list[list[np.ndarray | None]] = [[] for _ in layout.parameters]
    for step, selection in enumerate(turns):
        payload, largest = Payload(layout, selection), {}
        gradients = {
            tensor: rng.standard_normal(layout.parameters[tensor].size).astype(layout.parameters[tensor].dtype)
            for tensor in payload.tensors
        }
        data = b"".join(gradients[tensor].tobytes() for tensor in payload.tensors)
        staging.stage(payload, Operand.GRADIENT, 0, data, largest)
        prepared = state.prepare(payload, staging.updates, largest, NATIVE)
        run_trial(state, staging.operands, payload, prepared, NATIVE, StepPoint(step))
        state.apply(staging.operands, payload.runs, step, 0, prepared)
        state.count(selection)
        for tensor, parameter in enumerate(layout.parameters):
            given[tensor].append(gradients.get(tensor))
            if tensor in gradients:
                start = layout.starts[tensor]
                sums[tensor] += staging.updates[parameter.dtype][start : start + parameter.size]
    return state, sums, given


def test_each_parameter_has_the_rate_of_its_own_steps(backend):
    rule = SignDescent(learning_rate=0.3, beta=0.5)
    state, sums, given = play(backend, Settings(rule))
    assert state.parameter_steps.tolist() == [5, 4, 4, 5, 4, 4]
    for tensor in (0, 1, 3, 4, 5):
        np.testing.assert_allclose(sums[tensor], sign_descent(rule, given[tensor]), rtol=1e-5)


def test_backends_agree_bit_for_bit(backend):
    settings = Settings(SignDescent(), groups=(Group((1,), {"learning_rate": 0.7}),), clipping=Clipping("norm", 0.5))
    state, sums, _ = play(backend, settings)
    reference, reference_sums, _ = play(backends.load("numpy"), settings)
    assert [total.tobytes() for total in sums] == [total.tobytes() for total in reference_sums]
    for tensor in range(len(LAYOUT.parameters)):
        assert state.slot(tensor, 0).tobytes() == reference.slot(tensor, 0).tobytes()


def test_a_parameter_among_others_steps_as_it_does_alone(backend):
    settings = Settings(SignDescent(), schedule=Exponential(rate=0.5, period_steps=2))
    together, sums, given = play(backend, settings)
    alone = Layout((LAYOUT.parameters[1],))
    state, staging, total = State(alone, settings, backend), None, np.zeros(77)
    staging = Staging(state)
    payload = Payload(alone, ALL)
    for step, gradient in enumerate(given[1]):
        if gradient is not None:
            staging.stage(payload, Operand.GRADIENT, 0, gradient.tobytes(), {})
            state.apply(staging.operands, payload.runs, step)
            state.count(ALL)
            total += staging.updates[F4]
    assert total.tobytes() == sums[1].tobytes()
    assert state.slot(0, 0).tobytes() == together.slot(1, 0).tobytes()


COUNTED = {name: kind for name, kind in RULES.items() if kind.counts_steps}


@pytest.mark.parametrize("kind", COUNTED.values(), ids=COUNTED)
def test_every_method_that_counts_steps_does_so_for_each_parameter_and_group(backend, kind):
    """Each parameter as if it had been alone, with its group's settings and the schedule's rate at each step."""
    groups = (Group((1, 4), {"learning_rate": 0.7}), Group((3,), {"learning_rate": 0.2}))
    settings = Settings(kind(), Exponential(rate=0.5, period_steps=2), groups=groups)
    together, sums, given = play(backend, settings)
    for tensor in (0, 1, 3, 4, 5):
        position = next((turn for turn, group in enumerate(groups, 1) if tensor in group.parameters), 0)
        own = Layout((LAYOUT.parameters[tensor],))
        state = State(own, Settings(settings.rules()[position], settings.schedule), backend)
        staging, payload, total = Staging(state), Payload(own, ALL), np.zeros(LAYOUT.parameters[tensor].size)
        for step, gradient in enumerate(given[tensor]):
            if gradient is not None:
                staging.stage(payload, Operand.GRADIENT, 0, gradient.tobytes(), {})
                state.apply(staging.operands, payload.runs, step)
                state.count(ALL)
                total += staging.updates[LAYOUT.parameters[tensor].dtype]
        assert total.tobytes() == sums[tensor].tobytes()
        for slot in range(len(kind.slots)):
            assert state.slot(0, slot).tobytes() == together.slot(tensor, slot).tobytes()


def test_a_run_is_split_where_counters_or_groups_differ_and_only_there():
    state = State(LAYOUT, Settings(SignDescent(), groups=(Group((3,), {"beta": 0.5}),)), backends.load("numpy"))
    (run,) = Payload(LAYOUT, Selection((0, 1, 2, 3, 5))).runs
    whole = [(slice(0, 377), 0, 1), (slice(377, 390), 1, 1), (slice(390, 391), 0, 1)]
    assert list(state.parts_of(run)) == whole
    state.count(Selection((1, 5)))
    assert list(state.parts_of(run)) == [
        (slice(0, 300), 0, 1),
        (slice(300, 377), 0, 2),
        (slice(377, 390), 1, 1),
        (slice(390, 391), 0, 2),
    ]
    state.count(Selection((0, 3)))
    assert list(state.parts_of(run)) == [(slice(0, 377), 0, 2), (slice(377, 390), 1, 2), (slice(390, 391), 0, 2)]
    (some,) = Payload(LAYOUT, Selection((1, 3))).runs
    assert list(state.parts_of(some)) == [(slice(300, 377), 0, 2), (slice(377, 390), 1, 2)]


def test_counters_that_are_equal_again_are_one_number_again():
    counted = parameter_steps.ParameterSteps([3, 3, 3])
    counted.count(ALL)
    assert (counted.shared, counted.written, counted.of(1)) == (4, 4, 4)
    counted.count(Selection((0, 2)))
    counted.count(ALL)
    assert (counted.shared, counted.written, counted.of(1)) == (None, [6, 5, 6], 5)
    counted.count(Selection((1,)))
    assert (counted.shared, counted.each.tolist()) == (6, [6, 6, 6])


def test_a_method_that_does_not_use_counters_has_none():
    state = State(LAYOUT, Settings(Adadelta()), backends.load("numpy"))
    state.count(ALL)
    state.set_parameter_steps(None, 7)
    assert state.parameter_steps.size == 0
    assert state.written_parameter_steps is None


def test_where_nothing_is_written_down_all_parameters_have_taken_part_in_all_steps():
    state = State(LAYOUT, Settings(SignDescent()), backends.load("numpy"))
    state.set_parameter_steps(None, 7)
    assert state.parameter_steps.tolist() == [7] * 6
    assert state.written_parameter_steps == 7
    state.count(Selection((2,)))
    assert state.written_parameter_steps == [7, 7, 8, 7, 7, 7]


@pytest.mark.parametrize("given", [[1, 2], [1, 2, 3, 4], [1, 2, -1], [1, 2, 2.0], [1, 2, 1 << 63], -1])
def test_what_cannot_be_counters_is_refused(given):
    with pytest.raises(ValueError, match="step counter"):
        parameter_steps.each(given, 3)
