"""The contract, its generated code and the server's catalogues say the same."""

import re
import subprocess
from pathlib import Path

import pytest

from optserve.v1 import algorithms_pb2, errors_pb2, service_pb2, steps_pb2
from optserve_server.domain.errors import CODES, RETRY_AFTER_S, OptserveError, Reason
from optserve_server.edge import features
from optserve_server.edge.status import to_status
from optserve_server.numerics.rules import RULES

ROOT = Path(__file__).parents[2]
SERVER = ROOT / "server/optserve_server"


def test_the_committed_stubs_are_those_that_the_contract_generates(tmp_path):
    subprocess.run([ROOT / "scripts/generate.sh", tmp_path], check=True, capture_output=True)
    generated = {path.name: path.read_bytes() for path in (tmp_path / "optserve/v1").iterdir()}
    committed = {
        path.name: path.read_bytes() for path in (ROOT / "client/python/optserve/v1").iterdir() if path.is_file()
    }
    assert generated == committed


def test_every_reason_of_the_server_is_in_the_contract_with_its_code():
    contract = {name.removeprefix("ERROR_REASON_") for name in errors_pb2.ErrorReason.DESCRIPTOR.values_by_name}
    assert {reason.name for reason in Reason} <= contract
    text = (ROOT / "proto/optserve/v1/errors.proto").read_text()
    for reason in Reason:
        comment = text.split(f"ERROR_REASON_{reason.name} =")[0].rsplit("//", 4)
        described = "".join(comment[-4:])
        assert CODES[reason].name in described, reason
        assert (reason in RETRY_AFTER_S) == ("to be retried" in described.rsplit(";", 1)[-1]), reason


@pytest.mark.parametrize("reason", Reason, ids=lambda reason: reason.name)
def test_every_reason_is_given_somewhere(reason):
    """One that no server gives is a promise of the contract that nobody keeps."""
    given = [path for path in SERVER.rglob("*.py") if path.name != "errors.py" or path.parent.name != "domain"]
    assert any(re.search(rf"\bReason\.{reason.name}\b", path.read_text()) for path in given)


def test_every_feature_has_a_standing():
    assert set(service_pb2.Feature.values()) >= features.available()


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_every_rule_has_its_message_with_the_same_fields(rule):
    from dataclasses import fields

    message = algorithms_pb2.Algorithm.DESCRIPTOR.fields_by_name[rule.name].message_type
    assert {field.name for field in message.fields} == {field.name for field in fields(rule)}


def test_the_payload_is_the_last_field_of_its_messages():
    for message in (steps_pb2.StreamStepsRequest, steps_pb2.StreamStepsResponse):
        assert max(field.number for field in message.DESCRIPTOR.fields) == message.DATA_FIELD_NUMBER == 2047


def test_a_status_stays_below_the_limit_of_trailers():
    for letter in "xü🦀":
        error = OptserveError(Reason.INVALID_FIELD, letter * 100_000, field="f", value=letter * 100_000)
        assert len(to_status(error).SerializeToString()) < 4096


def test_an_unknown_error_shows_an_incident_and_not_itself(caplog):
    status = to_status(ZeroDivisionError("a secret"))
    assert "secret" not in str(status)
    assert "a secret" in caplog.text
