"""What the client does after a try of a step that has failed, for every reason of the contract."""

import re
from pathlib import Path
from typing import NamedTuple

import pytest
from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import Message
from google.rpc import code_pb2, error_details_pb2, status_pb2

import optserve
from optserve._steps.verdict import Action, Ending, Verdict, judge, next_try
from optserve.errors import OptserveError, from_status
from optserve.v1 import errors_pb2

CONTRACT = (Path(__file__).parents[2] / "proto/optserve/v1/errors.proto").read_text()
REASONS = [name.removeprefix("ERROR_REASON_") for name in errors_pb2.ErrorReason.DESCRIPTOR.values_by_name]


class Row(NamedTuple):
    """What follows when the server refuses a step."""

    first: Action
    """At the first try."""
    later: Action
    """At a later one, when an earlier one may have applied the step."""


PASSES = Row(Action.RETRY, Action.RETRY)
FINAL = Row(Action.NOT_APPLIED, Action.RAISE)
AFTER_ALL = Row(Action.RAISE, Action.RAISE)
"""It may come after the step was applied."""
TOO_LATE_TO_ASK = Row(Action.NOT_APPLIED, Action.IN_DOUBT)

TABLE = {
    "UNSPECIFIED": FINAL,
    "INVALID_FIELD": FINAL,
    "HYPERPARAMETER_OUT_OF_RANGE": FINAL,
    "UNKNOWN_PARAMETER": FINAL,
    "DUPLICATE_PARAMETER": FINAL,
    "WRONG_SHAPE": FINAL,
    "WRONG_DATA_TYPE": FINAL,
    "WRONG_BYTE_COUNT": FINAL,
    "OVERLAPPING_CHUNK": FINAL,
    "MISSING_CHUNK": FINAL,
    "CHUNK_OUT_OF_BOUNDS": FINAL,
    "NON_FINITE_VALUE": FINAL,
    "GRADIENT_OVERFLOW": FINAL,
    "REPLY_OVERFLOW": FINAL,
    "INVALID_PAGE_TOKEN": FINAL,
    "REQUEST_ID_REUSED": FINAL,
    "OPTIMIZER_NOT_FOUND": FINAL,
    "OPTIMIZER_EXISTS": FINAL,
    "CHECKPOINT_NOT_FOUND": FINAL,
    "CHECKPOINT_EXISTS": FINAL,
    "WRONG_STEP": TOO_LATE_TO_ASK,
    "ETAG_MISMATCH": FINAL,
    "STEP_IN_PROGRESS": PASSES,
    "STEP_TAKEN_OVER": PASSES,
    "REPLY_GONE": TOO_LATE_TO_ASK,
    "STATE_REPLACED": FINAL,
    "CHECKPOINT_MISMATCH": FINAL,
    "CHECKPOINT_DAMAGED": FINAL,
    "NOT_HOSTED": FINAL,
    "PARAMETERS_MISSING": FINAL,
    "PARAMETERS_IN_PLACE": FINAL,
    "WORKER_UNKNOWN": FINAL,
    "GRADIENT_LATE": FINAL,
    "WORKERS_ATTACHED": FINAL,
    "TOO_FEW_WORKERS": PASSES,
    "WORKER_REPLACED": TOO_LATE_TO_ASK,
    "NOT_OPEN": FINAL,
    "ALREADY_OPEN": FINAL,
    "NO_STEP": FINAL,
    "STEP_NOT_ENDED": FINAL,
    "MESSAGE_TOO_LARGE": FINAL,
    "MODEL_TOO_LARGE": FINAL,
    "SERVER_FULL": FINAL,
    "TOO_MANY_STREAMS": PASSES,
    "TOO_MANY_FRAGMENTS": FINAL,
    "STAGING_FULL": PASSES,
    "REPLIES_FULL": PASSES,
    "FEATURE_UNAVAILABLE": FINAL,
    "DRAINING": PASSES,
    "STATE_LOST": AFTER_ALL,
    "NOT_DURABLE": PASSES,
    "CLIENT_GONE": PASSES,
    "INTERNAL": AFTER_ALL,
}
KEPT = {"in_doubt": "true"}
MAY_BE_APPLIED = {"INTERNAL", "STATE_LOST", "STEP_TAKEN_OVER"}
"""Reasons that may come after the step was applied."""

every_reason = pytest.mark.parametrize("reason", REASONS)
first_or_later = pytest.mark.parametrize("in_doubt", [False, True], ids=["first", "later"])


def from_the_server(reason: str) -> OptserveError:
    """The error that the contract describes: with its code, and worth another try where it says so."""
    (comment,) = re.findall(rf"((?: *//.*\n)+) *ERROR_REASON_{reason} =", CONTRACT)
    if reason == "UNSPECIFIED":
        # The only one without a code: nobody sends it.
        comment = "// UNKNOWN: it."
    ((code, retried),) = re.findall(r"^ *// ([A-Z_]+)(, to be retried)?: ", comment)
    return refusal(code, reason, retried=bool(retried))


def refusal(code: str, reason: str, *, retried: bool) -> OptserveError:
    """The error for a status with this code and reason."""
    details: list[Message] = [
        error_details_pb2.ErrorInfo(reason=reason, domain="optserve.v1", metadata={"current_step": "7"})
    ]
    if retried:
        details.append(error_details_pb2.RetryInfo(retry_delay=duration_pb2.Duration(nanos=1)))
    status = status_pb2.Status(code=code_pb2.Code.Value(code), message=reason)
    for detail in details:
        status.details.append(any_pb2.Any())
        status.details[-1].Pack(detail)
    return from_status(status)


@pytest.mark.parametrize("code", ["RESOURCE_EXHAUSTED", "ABORTED", "FAILED_PRECONDITION"])
def test_a_reason_of_a_newer_server_is_judged_by_what_comes_with_it(code):
    for retried in (True, False):
        error = refusal(code, "OF_TOMORROW", retried=retried)
        assert error.reason == "OF_TOMORROW"
        action = judge(error, Ending.REFUSED, in_doubt=False, can_register=False).action
        assert action is (Action.RETRY if retried else Action.NOT_APPLIED)


def test_every_reason_of_the_contract_has_its_row():
    assert set(TABLE) == set(REASONS)


@every_reason
@first_or_later
def test_a_step_that_the_server_refuses(reason, in_doubt):
    verdict = judge(from_the_server(reason), Ending.REFUSED, in_doubt=in_doubt, can_register=False)
    assert verdict.action is (TABLE[reason].later if in_doubt else TABLE[reason].first)
    assert verdict.in_doubt == (in_doubt or reason in MAY_BE_APPLIED)
    # All others leave the stream as it was.
    assert verdict.closes_stream == (reason == "STEP_TAKEN_OVER")


@first_or_later
def test_a_step_that_the_disk_refuses_and_may_keep_is_in_doubt(in_doubt):
    refused, kept = (optserve.UnavailableError("no", reason="NOT_DURABLE", metadata=said) for said in ({}, KEPT))
    assert judge(refused, Ending.REFUSED, in_doubt=in_doubt, can_register=False).in_doubt == in_doubt
    assert judge(kept, Ending.REFUSED, in_doubt=in_doubt, can_register=False) == Verdict(Action.RETRY, True, False)


@every_reason
@first_or_later
def test_a_stream_that_ends_in_the_middle_of_a_step_leaves_it_in_doubt(reason, in_doubt):
    verdict = judge(from_the_server(reason), Ending.LOST, in_doubt=in_doubt, can_register=False)
    assert (verdict.action, verdict.in_doubt) == (TABLE[reason].later, True)


@every_reason
@first_or_later
def test_a_step_that_was_not_sent_is_as_it_was(reason, in_doubt):
    verdict = judge(from_the_server(reason), Ending.NOT_SENT, in_doubt=in_doubt, can_register=False)
    first = TABLE[reason].first if TABLE[reason] is not AFTER_ALL else Action.NOT_APPLIED
    assert (verdict.action, verdict.in_doubt) == (TABLE[reason].later if in_doubt else first, in_doubt)


@every_reason
@first_or_later
@pytest.mark.parametrize("ending", Ending)
def test_a_worker_registers_again_where_it_is_not_known_and_else_does_as_others_do(reason, in_doubt, ending):
    error = from_the_server(reason)
    worker = judge(error, ending, in_doubt=in_doubt, can_register=True)
    other = judge(error, ending, in_doubt=in_doubt, can_register=False)
    if reason == "WORKER_UNKNOWN":
        assert (worker.action, other.action) == (
            Action.REGISTER,
            Action.RAISE if other.in_doubt else Action.NOT_APPLIED,
        )
        assert (worker.in_doubt, worker.closes_stream) == (other.in_doubt, other.closes_stream)
    else:
        assert worker == other


@every_reason
def test_a_stream_is_opened_again_for_what_passes(reason):
    """Of a step that was taken over there is nothing to be resumed while none is under way."""
    passes = TABLE[reason] is PASSES and reason != "STEP_TAKEN_OVER"
    assert next_try(from_the_server(reason), can_register=False) is (Action.RETRY if passes else None)
    registers = reason == "WORKER_UNKNOWN"
    assert next_try(from_the_server(reason), can_register=True) is (
        Action.REGISTER if registers else Action.RETRY if passes else None
    )


@pytest.mark.parametrize(
    ("error", "ending", "expected"),
    [
        # No server, or none any more.
        (optserve.UnavailableError("gone"), Ending.NOT_SENT, PASSES),
        (optserve.UnavailableError("gone"), Ending.LOST, PASSES),
        (optserve.ResourceExhaustedError("busy", retry_after_s=0.5), Ending.NOT_SENT, PASSES),
        # Patience has ended.
        (optserve.DeadlineExceededError("late"), Ending.NOT_SENT, FINAL),
        (optserve.DeadlineExceededError("late"), Ending.LOST, AFTER_ALL),
        (optserve.StepCancelledError("cancelled"), Ending.NOT_SENT, FINAL),
        (optserve.StepCancelledError("cancelled"), Ending.LOST, AFTER_ALL),
        # An answer that the contract does not allow; a client that was closed.
        (optserve.InternalError("garbage"), Ending.NOT_SENT, FINAL),
        (optserve.InternalError("garbage"), Ending.LOST, AFTER_ALL),
        (optserve.ClientUseError("closed"), Ending.LOST, AFTER_ALL),
        # What the client finds out when a stream is open: another state, or updates where the gradients were.
        (optserve.StepsLostError("fewer steps"), Ending.NOT_SENT, FINAL),
        (optserve.StateReplacedError("restored"), Ending.NOT_SENT, FINAL),
        (optserve.StepInDoubtError("overwritten"), Ending.NOT_SENT, FINAL),
    ],
    ids=lambda value: getattr(value, "name", None) or type(value).__name__,
)
@first_or_later
def test_errors_of_the_client_itself(error, ending, expected, in_doubt):
    verdict = judge(error, ending, in_doubt=in_doubt, can_register=False)
    assert verdict.action is (expected.later if in_doubt else expected.first)
    assert verdict.in_doubt == (in_doubt or ending is Ending.LOST)
