"""A step is applied once, whole, or not at all."""

from collections.abc import Sequence
from contextlib import closing
from datetime import UTC, datetime

import numpy as np
import pytest

from optserve_server.domain.errors import OptserveError, Reason
from optserve_server.engine.durability import InMemory
from optserve_server.engine.optimizer import Optimizer
from optserve_server.engine.step_record import StepRecord
from optserve_server.engine.steps import Steps
from optserve_server.engine.transaction import StepRequest
from optserve_server.engine.transition import Replacement
from optserve_server.numerics.backends.base import Kernel
from optserve_server.numerics.backends.numpy import NumpyBackend
from optserve_server.numerics.layout import Layout, Parameter, Selection
from optserve_server.numerics.rules import Adadelta, Rule
from optserve_server.numerics.settings import Settings
from optserve_server.numerics.state import State
from optserve_server.numerics.step_settings import StepOptions
from transaction.harness import F4, F8, fingerprint, make_steps, run_step, write_shared

G = np.arange(1, 8, dtype=np.float32)


class DeviceError(RuntimeError):
    """What a library of a device raises when it is gone."""


class FailingBackend(NumpyBackend):
    """NumPy on a device that can fail in the middle of a step: one slot is changed, the others are not."""

    fails = False

    def compile(self, rule: type[Rule], dtype: np.dtype) -> Kernel:
        whole = super().compile(rule, dtype)

        def kernel(
            staged: np.ndarray, slots: Sequence[np.ndarray], scalars: Sequence[np.generic], *inputs: np.ndarray
        ) -> None:
            if self.fails:
                slots[0][...] = 1
                raise DeviceError("the device is gone")
            whole(staged, slots, scalars, *inputs)

        return kernel


def refuse(reason: Reason):
    return pytest.raises(OptserveError, check=lambda error: error.reason is reason)


def test_a_step_counts_and_answers_with_the_update(steps):
    reply = np.frombuffer(run_step(steps, "a", [(0, 0, G.tobytes())]), np.float32)
    # The first step of ADADELTA: -sqrt(eps) / sqrt((1 - rho) g^2 + eps) g.
    np.testing.assert_allclose(reply, -np.sqrt(1e-6) / np.sqrt(0.05 * G**2 + 1e-6) * G, rtol=1e-5)
    assert (steps.step, steps.main.last_request_id) == (1, "a")


def test_nothing_changes_before_the_commit(steps):
    run_step(steps, "a", [(0, 0, G.tobytes())])
    before = fingerprint(steps)
    step = steps.begin(StepRequest("b"))
    step.stage(0, 0, G.tobytes())
    assert fingerprint(steps) == before
    step.close()
    assert fingerprint(steps) == before


def test_the_settings_that_a_step_knows_are_compared_at_its_begin_and_at_its_commit(steps):
    steps.etag = "first"
    request = StepRequest("a", options=StepOptions(etag="first"))
    with closing(steps.begin(request)) as step:
        step.stage(0, 0, G.tobytes())
        before, steps.etag = fingerprint(steps), "second"
        with refuse(Reason.ETAG_MISMATCH):
            step.commit()
    assert fingerprint(steps) == before
    with refuse(Reason.ETAG_MISMATCH):
        steps.begin(request)


def test_the_same_request_id_gets_the_same_bytes_and_changes_nothing(steps):
    first = run_step(steps, "a", [(0, 0, G.tobytes())])
    before = fingerprint(steps)
    step = steps.begin(StepRequest("a", expected_step=0))
    step.stage(0, 0, (2 * G).tobytes())  # ignored: what was applied is what counts
    outcome = step.commit()
    again = b"".join(step.reply(8, lambda piece: bytes(piece.data)))
    step.close()
    assert (outcome.replayed, outcome.step) == (True, 1)
    assert again == first
    assert fingerprint(steps) == before


def test_a_retry_of_a_step_that_was_not_committed_starts_afresh(steps):
    abandoned = steps.begin(StepRequest("a"))
    abandoned.stage(0, 0, G[:3].tobytes())
    taken_over = steps.begin(StepRequest("a"))
    with refuse(Reason.STEP_TAKEN_OVER):
        abandoned.stage(0, 12, G[3:].tobytes())
    with refuse(Reason.STEP_TAKEN_OVER):
        abandoned.commit()
    abandoned.close()
    taken_over.stage(0, 0, G.tobytes())
    assert taken_over.commit().step == 1


def test_a_reply_that_is_overtaken_stops_instead_of_mixing_two_steps(steps):
    slow = steps.begin(StepRequest("a"))
    slow.stage(0, 0, G.tobytes())
    slow.commit()
    pieces = slow.reply(8, lambda piece: bytes(piece.data))
    next(pieces)
    run_step(steps, "a", [])
    run_step(steps, "b", [(0, 0, G.tobytes())])
    with refuse(Reason.STEP_TAKEN_OVER):
        next(pieces)


def test_another_request_waits_for_the_one_under_way(steps):
    step = steps.begin(StepRequest("a"))
    with refuse(Reason.STEP_IN_PROGRESS) as caught:
        steps.begin(StepRequest("b"))
    assert caught.value.retry_after_s
    step.close()
    steps.begin(StepRequest("b")).close()


def test_a_wrong_expected_step_is_refused_with_the_current_one(steps):
    run_step(steps, "a", [(0, 0, G.tobytes())])
    before = fingerprint(steps)
    with refuse(Reason.WRONG_STEP) as caught:
        steps.begin(StepRequest("b", expected_step=0))
    assert caught.value.metadata == {"current_step": "1", "expected_step": "0"}
    assert fingerprint(steps) == before


def test_a_reply_that_a_later_gradient_has_overwritten_is_gone_and_says_so(steps):
    run_step(steps, "a", [(0, 0, G.tobytes())])
    step = steps.begin(StepRequest("b"))
    step.stage(0, 0, G[:1].tobytes())
    step.close()
    with refuse(Reason.REPLY_GONE):
        steps.begin(StepRequest("a"))


def test_a_deleted_optimizer_refuses_without_keeping_anything(steps):
    steps.delete(OptserveError(Reason.OPTIMIZER_NOT_FOUND, "gone"))
    errors = []
    for _ in range(3):
        with refuse(Reason.OPTIMIZER_NOT_FOUND) as caught:
            steps.begin(StepRequest("a"))
        errors.append(caught.value)
    assert len({id(error) for error in errors}) == 3  # each with a traceback of its own
    assert not steps._state.slots


def test_a_step_of_some_parameters_leaves_the_others_alone(steps):
    run_step(steps, "a", [(0, 0, G.tobytes())])
    w_before = steps._state.slot(0, 0).tobytes()
    b_before = steps._state.slot(1, 0).tobytes()
    reply = run_step(steps, "b", [(1, 0, G[:1].tobytes())], selection=Selection((1,)))
    assert len(reply) == 4
    assert steps._state.slot(0, 0).tobytes() == w_before
    assert steps._state.slot(1, 0).tobytes() != b_before
    assert steps.last()[2] == Selection((1,))


@pytest.mark.parametrize(
    ("chunks", "reason", "parameter"),
    [
        ([(0, 0, G[:6].tobytes())], Reason.MISSING_CHUNK, "b"),
        ([(0, 4, G[1:].tobytes())], Reason.MISSING_CHUNK, "w"),
        ([(0, 0, G.tobytes()), (0, 0, G[:1].tobytes())], Reason.OVERLAPPING_CHUNK, "w"),
        ([(0, 0, G[:2].tobytes()), (0, 4, G[:1].tobytes())], Reason.OVERLAPPING_CHUNK, "w"),
        ([(0, 8, G[:4].tobytes()), (0, 4, G[:2].tobytes())], Reason.OVERLAPPING_CHUNK, "w"),
        ([(0, 0, G.tobytes() + bytes(4))], Reason.CHUNK_OUT_OF_BOUNDS, "w"),
        ([(0, 28, G[:1].tobytes())], Reason.CHUNK_OUT_OF_BOUNDS, "w"),
        ([(0, 1 << 62, G[:1].tobytes())], Reason.CHUNK_OUT_OF_BOUNDS, "w"),
        ([(2, 0, G[:1].tobytes())], Reason.CHUNK_OUT_OF_BOUNDS, "none"),
        ([(0, 2, G[:1].tobytes())], Reason.CHUNK_OUT_OF_BOUNDS, "w"),
        ([(0, 0, G[:1].tobytes()[:3])], Reason.CHUNK_OUT_OF_BOUNDS, "w"),
        ([(3, 0, G[:1].tobytes())], Reason.UNKNOWN_PARAMETER, "3"),
        ([(0, 0, np.array([1, 2, np.nan], np.float32).tobytes())], Reason.NON_FINITE_VALUE, "w"),
        ([(0, 20, np.array([1, -np.inf], np.float32).tobytes())], Reason.NON_FINITE_VALUE, "b"),
        ([(0, 0, np.array([-2e19], np.float32).tobytes())], Reason.GRADIENT_OVERFLOW, "w"),
    ],
)
def test_bad_chunks_are_refused_and_change_nothing(steps, chunks, reason, parameter):
    run_step(steps, "a", [(0, 0, G.tobytes())])
    before = fingerprint(steps)
    with refuse(reason) as caught:
        run_step(steps, "b", chunks)
    assert caught.value.metadata["parameter"] == parameter
    assert caught.value.field
    assert fingerprint(steps) == before
    run_step(steps, "c", [(0, 0, G.tobytes())], expected_step=1)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_bad_value_is_named_by_tensor_and_first_index(steps, bad):
    values = G[:6].copy()
    values[4:] = bad
    with refuse(Reason.NON_FINITE_VALUE) as caught:
        run_step(steps, "a", [(0, 0, values.tobytes())])
    assert caught.value.metadata == {"parameter": "w", "index": "4"}


def test_too_many_fragments_are_refused():
    size = 40_000
    steps = make_steps(Parameter("x", (size,), F4))
    step = steps.begin(StepRequest("a"))
    with refuse(Reason.TOO_MANY_FRAGMENTS):
        for element in range(0, size, 2):
            step.stage(0, 4 * element, bytes(4))


@pytest.mark.parametrize("tensors", [(0, 0), (1, 0, 1)])
def test_a_parameter_listed_twice_is_refused(steps, tensors):
    with refuse(Reason.DUPLICATE_PARAMETER):
        steps.begin(StepRequest("a", selection=Selection(tensors)))


def test_an_unknown_parameter_is_refused(steps):
    with refuse(Reason.UNKNOWN_PARAMETER):
        steps.begin(StepRequest("a", selection=Selection((3,))))


@pytest.mark.parametrize("request_id", ["", "x" * 65, "ü", "a\nb"])
def test_an_unusable_request_id_is_refused(steps, request_id):
    with refuse(Reason.INVALID_FIELD):
        steps.begin(StepRequest(request_id))


def test_a_device_that_fails_in_the_middle_loses_the_state_and_says_so():
    backend = FailingBackend()
    state = State(Layout((Parameter("w", (6,), F4), Parameter("b", (1,), F4))), Settings(Adadelta()), backend)
    steps = Steps("test", state, InMemory())
    run_step(steps, "a", [(0, 0, G.tobytes())])
    backend.fails = True
    with refuse(Reason.STATE_LOST) as caught:
        run_step(steps, "b", [(0, 0, G.tobytes())])
    assert isinstance(caught.value.__cause__, DeviceError)
    assert caught.value.metadata == {"optimizer": "test"}
    backend.fails = False
    # The state may be half changed, so that it stays lost when the device works again.
    with refuse(Reason.STATE_LOST):
        steps.begin(StepRequest("c"))
    assert steps.step == 1


def test_a_step_that_cannot_be_made_durable_is_not_applied():
    class Full(InMemory):
        reads_staging = True
        full = False

        def write(self, record):
            if self.full:
                raise OSError("no space left on device")
            assert isinstance(record, StepRecord)
            self.seen = [gradient.tobytes() for gradient in record.operands]
            return 1

    disk = Full()
    steps = make_steps(Parameter("x", (7,), F4), durability=disk)
    run_step(steps, "a", [(0, 0, G.tobytes())])
    assert disk.seen == [G.tobytes()]  # what is recorded is the gradient, not the update that overwrites it
    before, disk.full = fingerprint(steps), True
    with pytest.raises(OSError, match="no space"):
        run_step(steps, "b", [(0, 0, G.tobytes())])
    assert fingerprint(steps) == before
    disk.full = False
    run_step(steps, "b", [(0, 0, G.tobytes())], expected_step=1)


def test_dtypes_mix_in_one_model():
    parameters = [Parameter("a", (3,), F4), Parameter("b", (2,), F8), Parameter("c", (2,), F4)]
    mixed = make_steps(*parameters)
    payload = G[:3].tobytes() + np.array([4.0, 5.0]).tobytes() + G[5:].tobytes()
    reply = run_step(mixed, "a", [(0, 0, payload)])
    for index, (begin, end) in enumerate([(0, 12), (12, 28), (28, 36)]):
        alone = make_steps(parameters[index])
        assert run_step(alone, "a", [(0, 0, payload[begin:end])]) == reply[begin:end]


def test_a_chunk_must_not_split_an_element_of_the_next_dtype():
    steps = make_steps(Parameter("a", (1,), F4), Parameter("b", (2,), F8))
    with refuse(Reason.CHUNK_OUT_OF_BOUNDS):
        run_step(steps, "a", [(0, 0, bytes(8))])


def test_a_replay_whose_reply_has_gone_meanwhile_applies_nothing_from_shared_memory(steps):
    segment = steps.share()
    assert segment is not None
    write_shared(segment, G)
    with closing(steps.begin(StepRequest("a", segment=segment))) as step:
        step.commit()
    with closing(steps.begin(StepRequest("a", segment=segment))) as replay:
        # As when workers have stepped since.
        steps.main.retained = None
        before = fingerprint(steps)
        with refuse(Reason.MISSING_CHUNK):
            replay.commit()
    assert fingerprint(steps) == before


def test_a_request_is_looked_for_while_another_one_is_noted(steps):
    optimizer = Optimizer("a", steps._state, steps, "", datetime.now(UTC))
    optimizer.replacements.extend([Replacement("first", ""), Replacement("second", "")])

    class Wanted(str):
        """Another thread goes on at each look."""

        def __eq__(self, other):
            optimizer.replacements.append(Replacement("third", ""))
            return super().__eq__(other)

        __hash__ = str.__hash__

    assert optimizer.was_replaced_by(Wanted("second"), "a restore")
