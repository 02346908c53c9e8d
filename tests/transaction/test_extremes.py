"""Finite input never makes a state, a mean or a reply NaN or infinite: it is applied rightly, or refused whole."""

import threading
from collections.abc import Callable
from contextlib import closing

import numpy as np
import pytest

from optserve._common import half_floats
from optserve_server.domain.errors import OptserveError, Reason
from optserve_server.engine.durability import InMemory
from optserve_server.engine.steps import Steps
from optserve_server.engine.transaction import Reply, StepRequest
from optserve_server.numerics.clipping import Clipping
from optserve_server.numerics.consistency import SyncConsistency
from optserve_server.numerics.layout import ALL, Layout, Operand, Parameter
from optserve_server.numerics.rules import Adadelta, Adagrad, DiagonalHessian, Momentum, Sgd, WindowedRms
from optserve_server.numerics.schedule import AtSteps
from optserve_server.numerics.settings import Group, Settings
from optserve_server.numerics.state import State
from optserve_server.numerics.trial import check_reply
from simulated_device import SimulatedBackend, load
from transaction.harness import F4, F8, fingerprint, run_step


@pytest.fixture(params=["numpy", "simulated"])
def optimizer(request: pytest.FixtureRequest) -> Callable[..., Steps]:
    """Makes an optimizer; where it is hosted, x is 0."""

    def make(settings: Settings, *parameters: Parameter) -> Steps:
        state = State(Layout(parameters or (Parameter("w", (2,), F4),)), settings, load(request.param, 1))
        steps = Steps("test", state, InMemory())
        if settings.hosted:
            with closing(steps.begin_placement("upload")) as upload:
                upload.stage(0, 0, bytes(upload.payload.size_bytes), Operand.PARAMETER)
                upload.commit()
        return steps

    return make


def together(steps: Steps, **gradients: np.ndarray) -> list[OptserveError]:
    """A step of a worker each, at the same time; what they are refused with."""
    refused: list[OptserveError] = []

    def work(worker: str, gradient: np.ndarray) -> None:
        with closing(steps.begin(StepRequest(f"{worker}-{steps.step}", reply=Reply.NOTHING, worker=worker))) as step:
            step.stage(0, 0, gradient.tobytes())
            try:
                step.commit()
            except OptserveError as error:
                refused.append(error)

    for worker in gradients:
        steps.workers.report(worker, leaving=False)
    threads = [threading.Thread(target=work, args=item, daemon=True) for item in gradients.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    return refused


@pytest.mark.parametrize("dtype", [F4, F8], ids=str)
def test_the_mean_of_two_workers_largest_gradients_is_applied(optimizer, dtype):
    sync = SyncConsistency(workers=2)
    steps = optimizer(Settings(Sgd(learning_rate=0.5), hosted=True, consistency=sync), Parameter("w", (3,), dtype))
    most = np.finfo(dtype).max
    gradient = np.array([most, -most, most], dtype)
    assert not together(steps, a=gradient, b=gradient * np.array([1, 1, -1], dtype))
    assert steps._state.parameters[dtype].tolist() == [-most / 2, most / 2, 0]


@pytest.mark.parametrize("kind", ["value", "norm", "global_norm"])
def test_a_gradient_that_clipping_brings_down_may_be_of_any_size(optimizer, kind):
    steps = optimizer(Settings(Adadelta(), clipping=Clipping(kind, 1.0)))
    reply = np.frombuffer(run_step(steps, "a", [(0, 0, np.array([1e20, 0], F4).tobytes())]), F4)
    alone = optimizer(Settings(Adadelta()))
    assert reply.tobytes() == run_step(alone, "a", [(0, 0, np.array([1, 0], F4).tobytes())])


@pytest.mark.parametrize("kind", ["value", "norm", "global_norm"])
@pytest.mark.parametrize(
    "rule", [Adagrad(learning_rate=2.1e38, eps=1e-45), DiagonalHessian(learning_rate=2.1e38, mu=1e-45)], ids=str
)
def test_a_bound_that_is_rounded_up_counts_as_it_is_met(optimizer, kind, rule):
    # Among the smallest numbers of float32 1.6 is 2.
    smallest = float(np.finfo(F4).smallest_subnormal)
    steps = optimizer(Settings(rule, clipping=Clipping(kind, 1.6 * smallest)))
    with closing(steps.begin(StepRequest("a"))) as step:
        step.stage(0, 0, np.array([0, 5 * smallest], F4).tobytes())
        if rule.takes_curvature:
            step.stage(0, 0, bytes(8), Operand.CURVATURE)
        with refused(Reason.GRADIENT_OVERFLOW, "w", 1, "update"):
            step.commit()


def refused(reason: Reason, parameter: str, index: int, array: str | None = None):
    """A refusal that names the place."""

    def check(error: OptserveError) -> bool:
        place = {"parameter": parameter, "index": str(index)} | ({"array": array} if array else {})
        return error.reason is reason and error.metadata == place

    return pytest.raises(OptserveError, check=check)


def in_one_tensor(*values: float, dtype: np.dtype = F4) -> list[tuple[int, int, bytes]]:
    return [(0, 0, np.array(values, dtype).tobytes())]


@pytest.mark.parametrize(
    ("rule", "gradient", "applied", "array"),
    [
        (Momentum(learning_rate=10.0), 3e38, 0, "momentum"),
        (Momentum(learning_rate=0.5), 3e38, 2, "momentum"),
        (Adagrad(), 1.8e19, 1, "sum"),
        (Sgd(learning_rate=10.0), 3e38, 0, "update"),
        (WindowedRms(learning_rate=1e38), 100.0, 0, "update"),
    ],
    ids=str,
)
def test_a_step_that_would_poison_the_state_is_refused_and_changes_nothing(optimizer, rule, gradient, applied, array):
    steps = optimizer(Settings(rule))
    for number in range(applied):
        run_step(steps, f"good-{number}", in_one_tensor(1, gradient))
    before = fingerprint(steps)
    with refused(Reason.GRADIENT_OVERFLOW, "w", 1, array):
        run_step(steps, "bad", in_one_tensor(1, gradient))
    assert fingerprint(steps) == before
    run_step(steps, "next", in_one_tensor(1, 0), expected_step=applied)


def test_a_step_that_needs_memory_of_a_full_device_changes_nothing():
    """Its trial copies the slots there; a step that bounds cover needs no memory."""
    backend = SimulatedBackend()
    state = State(Layout((Parameter("w", (2,), F4),)), Settings(Momentum(learning_rate=10.0)), backend)
    steps = Steps("test", state, InMemory())
    run_step(steps, "covered", in_one_tensor(1, 1))
    before, free = fingerprint(steps), backend.simulated.free_bytes
    backend.simulated.free_bytes = 0
    with pytest.raises(MemoryError):
        run_step(steps, "large", in_one_tensor(1, 3e38))
    assert fingerprint(steps) == before
    backend.simulated.free_bytes = free
    with refused(Reason.GRADIENT_OVERFLOW, "w", 1, "momentum"):
        run_step(steps, "large", in_one_tensor(1, 3e38))


def test_hosted_parameters_stay_finite(optimizer):
    steps = optimizer(Settings(Sgd(learning_rate=1.0), hosted=True, weight_decay=1e-3))
    run_step(steps, "a", in_one_tensor(0, 3e38))
    x = steps._state.parameters[F4].tobytes()
    with refused(Reason.GRADIENT_OVERFLOW, "w", 1, "parameter"):
        run_step(steps, "b", in_one_tensor(0, 1e38))
    assert (steps.step, steps._state.parameters[F4].tobytes()) == (1, x)


def test_a_schedule_and_a_group_count(optimizer):
    rule = Sgd(learning_rate=100.0)
    settings = Settings(rule, AtSteps(rate=0.01, milestones=(1,)), groups=(Group((1,), {"learning_rate": 1000.0}),))
    steps = optimizer(settings, Parameter("a", (2,), F4), Parameter("b", (3,), F4))
    chunks = in_one_tensor(0, 3e36, 1, 3e36, 0)
    with refused(Reason.GRADIENT_OVERFLOW, "b", 1, "update"):
        run_step(steps, "x", chunks)
    run_step(steps, "y", in_one_tensor(0, 1, 0, 0, 0))
    run_step(steps, "z", chunks)


def test_a_state_that_is_not_finite_already_is_named_as_such(optimizer):
    # As an older server may have left it behind.
    steps = optimizer(Settings(Momentum()))
    steps._state.write(F4, 0, 0, np.array([np.inf], F4))
    with pytest.raises(OptserveError, match="it is inf already, so restore a checkpoint"):
        run_step(steps, "a", in_one_tensor(1, 1))


def test_what_is_put_into_a_state_counts_from_the_next_step_on(optimizer):
    steps = optimizer(Settings(Adagrad()))
    for number in range(3):
        run_step(steps, str(number), in_one_tensor(1, 1e18))
    # As an import does.
    steps._state.write(F4, 0, 1, np.array([3.4e38], F4))
    with refused(Reason.GRADIENT_OVERFLOW, "w", 1, "sum"):
        run_step(steps, "a", in_one_tensor(1, 1e18))
    steps._state.write(F4, 0, 1, np.array([1], F4))
    run_step(steps, "a", in_one_tensor(1, 1e18))


@pytest.mark.parametrize(
    ("wire", "dtype", "most"),
    [
        (half_floats.FLOAT16, F4, 65_519.0),
        (half_floats.FLOAT16, F8, 65_519.0),
        (half_floats.BFLOAT16, F8, 3.39e38),
        (F4, F8, 3.4028235e38),
    ],
    ids=str,
)
@pytest.mark.parametrize("reply", [Reply.UPDATES, Reply.PARAMETERS])
def test_a_reply_that_the_wire_does_not_hold_is_refused_before_the_step_is_applied(optimizer, wire, dtype, most, reply):
    steps = optimizer(Settings(Sgd(learning_rate=1e30), hosted=True), Parameter("w", (2,), dtype))

    def step(request_id: str, size: float, on_wire: np.dtype | None = wire) -> bytes:
        gradient = np.array([0, size / 1e30], dtype)
        sent = np.empty(2, on_wire or dtype)
        half_floats.convert(gradient, sent)
        return run_step(steps, request_id, [(0, 0, sent.tobytes())], wire=on_wire, reply=reply)

    if wire == F4:
        assert np.isfinite(np.frombuffer(step("a", most), wire)).all()
    before = steps.step
    with closing(steps.begin(StepRequest("b", wire=None, reply=reply))) as native:
        native.stage(0, 0, np.array([0, most * 1.01 / 1e30], dtype).tobytes())
        native.commit()
    # The same reply by a narrower wire, which does not hold it.
    x = steps._state.parameters[dtype].tobytes()
    with refused(Reason.REPLY_OVERFLOW, "w", 1):
        run_step(steps, "b", [], wire=wire, reply=reply)
    assert (steps.step, steps._state.parameters[dtype].tobytes()) == (before + 1, x)
    with pytest.raises(OptserveError, match="too large for"):
        check_reply(steps._state, steps.payload(ALL, wire), steps._state.parameters)


def test_a_reply_of_nothing_is_not_refused_for_its_wire(optimizer):
    steps = optimizer(Settings(Sgd(learning_rate=4.0), hosted=True))
    sent = np.full(2, 30_000, np.float16).tobytes()
    with refused(Reason.REPLY_OVERFLOW, "w", 0):
        run_step(steps, "a", [(0, 0, sent)], wire=half_floats.FLOAT16)
    assert run_step(steps, "b", [(0, 0, sent)], wire=half_floats.FLOAT16, reply=Reply.NOTHING, expected_step=0) == b""
    assert steps._state.parameters[F4].tolist() == [-120_000, -120_000]


def test_of_a_refused_mean_all_workers_are_told(optimizer):
    sync = SyncConsistency(workers=2)
    steps = optimizer(Settings(Momentum(learning_rate=4.0), hosted=True, consistency=sync))
    gradient = np.array([0, 3e38], F4)
    errors = together(steps, a=gradient, b=gradient)
    assert [error.reason for error in errors] == [Reason.GRADIENT_OVERFLOW] * 2
    assert (steps.step, steps._state.parameters[F4].tolist()) == (0, [0, 0])
    assert not together(steps, a=gradient, b=-gradient)
    assert steps.step == 1


def test_steps_near_the_limit_go_on(optimizer):
    # Bounds are of no use here: each step is tried out.
    steps = optimizer(Settings(Adagrad(learning_rate=1.0)))
    run_step(steps, "first", in_one_tensor(1, 1.8439e19))
    for number in range(100):
        run_step(steps, str(number), in_one_tensor(1, 1e16))
    assert 3.399e38 < steps._state.slot(0, 0)[1] < np.inf
