"""A disk that fails under a running server: steps are refused, everything is readable, and it goes on afterwards."""

import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

import optserve
from backend_under_test import BACKEND
from optserve.v1 import service_pb2_grpc, steps_pb2
from present import present
from service.attacks import wait_until
from service.wire_client import refused

FAILING = Path(__file__).with_name("failing_server.py")
PATIENT = optserve.ClientConfig(initial_backoff_s=0.02, max_backoff_s=0.1)
# Its first pause is longer than its time-outs, so it says why it was refused once.
ONE_TRY = optserve.ClientConfig(timeout_s=30, step_timeout_s=30, initial_backoff_s=60, max_backoff_s=60)


def gradient(step: int) -> dict[str, np.ndarray]:
    return {"w": np.random.default_rng(step).standard_normal((50, 90)).astype(np.float32)}


@contextmanager
def failing_server(folder: Path, flag: Path, call: str, error: str):
    """A target; the server is killed at the end."""
    options = ["--port", "0", "--announce", "--data-dir", folder, "--backend", BACKEND]
    process = subprocess.Popen(
        [sys.executable, FAILING, flag, call, error, *options], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    try:
        yield present(process.stdout).readline().decode().removeprefix("ready ").strip()
    finally:
        process.kill()
        process.wait()
        present(process.stdout).close()


@pytest.mark.parametrize(
    ("call", "error"),
    [
        ("pwritev", "ENOSPC"),
        ("pwritev", "EIO"),
        ("fdatasync", "EIO"),
        ("fdatasync", "ENOSPC"),
        ("fdatasync,ftruncate", "EIO"),
    ],
)
def test_steps_are_refused_while_the_disk_fails_and_nothing_is_lost(tmp_path, client, name, call, error):
    flag, folder = tmp_path / "flag", tmp_path / "data"
    undisturbed = client.create_optimizer(name, optserve.Adadelta(), gradient(0))
    with (
        failing_server(folder, flag, call, error) as target,
        optserve.connect(target, PATIENT) as shaky,
        optserve.connect(target, ONE_TRY) as hasty,
        grpc.insecure_channel(target) as channel,
    ):
        opt = shaky.create_optimizer("a", optserve.Adadelta(), gradient(0))
        for step in range(3):
            assert opt.step(gradient(step))["w"].tobytes() == undisturbed.step(gradient(step))["w"].tobytes()
        before = opt.export_state()
        once = hasty.optimizer("a")
        flag.touch()
        told = ""
        # A snapshot that this calls for, and that is synced in other ways, takes the word back until the next refusal.
        while "the disk refuses changes" not in told:
            with pytest.raises(optserve.UnavailableError, match="disk refused") as caught:
                once.step(gradient(3))
            assert caught.value.reason == "NOT_DURABLE"
            assert ("in_doubt" in caught.value.metadata) == ("ftruncate" in call)
            told = shaky.server_info().durability_problem
        for change in (
            lambda: shaky.create_optimizer("b", optserve.Sgd(), gradient(0)),
            lambda: opt.update(optserve.Adadelta(rho=0.5)),
        ):
            threading.Timer(0.1, flag.unlink).start()
            change()  # which waits until there is room again
            flag.touch()
        # Everything can be read.
        health = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
        assert health.status == health_pb2.HealthCheckResponse.SERVING
        assert [item.name for item in shaky.list_optimizers()] == ["a", "b"]
        assert opt.algorithm == optserve.Adadelta(rho=0.5)
        after = opt.export_state()
        assert after.step == before.step == 3
        for slot, array in before.slots["w"].items():
            assert after.slots["w"][slot].tobytes() == array.tobytes()
        # A step that is waiting goes on as soon as there is room.
        undisturbed.update(optserve.Adadelta(rho=0.5))
        threading.Timer(0.3, flag.unlink).start()
        assert opt.step(gradient(3))["w"].tobytes() == undisturbed.step(gradient(3))["w"].tobytes()
        # Snapshots that have failed are tried again after a pause, until one is written.
        wait_until(lambda: not shaky.server_info().durability_problem, 60)
        opt.step(gradient(4))
        expected = undisturbed.step(gradient(4))
    # And after kill -9 all of it is there.
    with optserve.local_server(folder, backend=BACKEND) as server, optserve.connect(server.target) as again:
        opt = again.optimizer("a")
        assert opt.current_step == 5
        assert opt.replay()["w"].tobytes() == expected["w"].tobytes()
        assert opt.step(gradient(5))["w"].tobytes() == undisturbed.step(gradient(5))["w"].tobytes()


def test_a_unary_step_that_the_disk_may_keep_says_so_whatever_else_there_is_to_refuse(tmp_path):
    flag = tmp_path / "flag"
    # With fsync, a snapshot fails too. It would end the doubt, for it takes the place of the record.
    with (
        failing_server(tmp_path / "data", flag, "fdatasync,fsync,ftruncate", "EIO") as target,
        optserve.connect(target, PATIENT) as client,
        grpc.insecure_channel(target) as channel,
    ):
        client.create_optimizer("a", optserve.Sgd(), gradient(0)).step(gradient(0))
        stub = service_pb2_grpc.OptimizerServiceStub(channel)
        tensor = steps_pb2.Tensor(name="w", data=gradient(1)["w"].tobytes())
        flag.touch()
        for expected_step in (1, 7):
            request = steps_pb2.ApplyGradientsRequest(
                name="optimizers/a",
                request_id=f"after {expected_step}",
                expected_step=expected_step,
                gradients=[tensor],
            )
            with refused(grpc.StatusCode.UNAVAILABLE, "NOT_DURABLE") as seen:
                stub.ApplyGradients(request)
            assert seen["metadata"] == {"in_doubt": "true"}
        flag.unlink()
        with refused(grpc.StatusCode.ABORTED, "WRONG_STEP"):
            stub.ApplyGradients(request)


def test_a_folder_that_cannot_be_written_is_said(tmp_path):
    folder = tmp_path / "data"
    with (
        pytest.raises(optserve.UnavailableError, match="did not start"),
        optserve.local_server("/proc/optserve", backend="numpy"),
    ):
        pass
    folder.write_text("")
    with (
        pytest.raises(optserve.UnavailableError, match="cannot be used: it is not a folder"),
        optserve.local_server(folder, backend="numpy"),
    ):
        pass
