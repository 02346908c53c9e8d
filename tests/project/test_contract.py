"""The contract, its generated code and the server's catalogues say the same."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from google.rpc import code_pb2

from optserve.v1 import algorithms_pb2, errors_pb2, service_pb2, steps_pb2
from optserve_server.domain.errors import CODES, RETRY_AFTER_S, OptserveError, Reason
from optserve_server.edge import features
from optserve_server.edge.status import to_status
from optserve_server.numerics.rules import RULES
from present import present

ROOT = Path(__file__).parents[2]
SERVER = ROOT / "server/optserve_server"


def test_what_is_committed_is_what_the_contract_generates(tmp_path):
    subprocess.run([ROOT / "scripts/generate.sh", tmp_path], check=True, capture_output=True)
    generated = {path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()}
    stubs = {path.relative_to(ROOT) for path in (ROOT / "client/python/optserve/v1").iterdir() if path.is_file()}
    assert generated - stubs == {
        Path("client/python/optserve/algorithms.py"),
        Path("docs/methods.md"),
        Path("server/optserve_server/numerics/rules/__init__.py"),
        Path("server/optserve_server/numerics/rules/contract.py"),
    }
    assert stubs <= generated
    for path in generated:
        assert (tmp_path / path).read_bytes() == (ROOT / path).read_bytes(), path


@pytest.mark.parametrize(
    ("said", "instead", "message"),
    [
        ("    gte: 0\n    lt: 1\n", "    lt: 1\n", "Adadelta.rho needs a (hyperparameter) with default_value and gte"),
        ("    default_value: 0.95\n", "", "Adadelta.rho needs a (hyperparameter)"),
        ("default_value: 0.95", "default_value: 1", "The default of Adadelta.rho, 1, does not lie in [0, 1)"),
        (
            "default_value: 1e-6\n    gt: 0",
            "default_value: 0\n    gt: 0",
            "The default of Adadelta.eps, 0, does not lie",
        ),
        ("optional double rho = 1", "double rho = 1", "Adadelta.rho is not optional"),
        ("optional double rho = 1", "optional string rho = 1", "Adadelta.rho is neither a double nor"),
        ("optional double rho = 1", "optional bool rho = 1", "Adadelta.rho needs a (hyperparameter) with default_flag"),
    ],
)
def test_a_hyperparameter_that_does_not_say_all_is_refused(tmp_path, said, instead, message):
    shutil.copytree(ROOT / "proto", tmp_path / "proto")
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts")
    contract = tmp_path / "proto/optserve/v1/algorithms.proto"
    assert said in contract.read_text()
    contract.write_text(contract.read_text().replace(said, instead, 1))
    done = subprocess.run(
        [tmp_path / "scripts/generate.sh"], env={**os.environ, "PYTHON": sys.executable},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert f"algorithms.proto: {message}" in done.stderr


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
    assert {field.name for field in present(message).fields} == {field.name for field in fields(rule)}


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


def test_a_call_that_finds_no_memory_says_so(caplog):
    status = to_status(MemoryError("a secret"))
    assert status.code == code_pb2.RESOURCE_EXHAUSTED
    assert "no memory" in status.message
    assert "secret" not in str(status)
    assert "a secret" in caplog.text


def test_the_contract_is_at_most_120_columns_wide():
    """`buf format` leaves comments as they are."""
    for path in (ROOT / "proto/optserve").rglob("*.proto"):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            assert len(line) <= 120, f"{path.name}:{number}"
