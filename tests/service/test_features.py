"""What a server says that it has is what it can do on its host; what it has not is refused by its name."""

import errno
import subprocess
import sys
from collections.abc import Iterator

import grpc
import numpy as np
import pytest

import optserve
from optserve.v1 import service_pb2, service_pb2_grpc, steps_pb2
from service.wire_client import create, refused

ON_A_HOST = """
import os, sys
from optserve._common import sysv

number = int(sys.argv.pop(1))

def create(size_bytes):
    raise OSError(number, os.strerror(number))

sysv.create = create
from optserve_server.__main__ import main
main()
"""
"""A server on a host where no segment can be made, for the reason that is its first argument."""


@pytest.fixture
def target(request) -> Iterator[str]:
    """That of a server on such a host."""
    command = [sys.executable, "-c", ON_A_HOST, str(request.param), "--port", "0", "--announce", "--backend", "numpy"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert process.stdout is not None
    try:
        yield process.stdout.readline().decode().removeprefix("ready ").strip()
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def shares_memory(info: service_pb2.GetServerInfoResponse) -> bool:
    (status,) = [status for status in info.features if status.feature == service_pb2.FEATURE_SHARED_MEMORY]
    return status.available


def opened(stub: service_pb2_grpc.OptimizerServiceStub, name: str) -> steps_pb2.Opened:
    message = steps_pb2.Open(name=name, transport=steps_pb2.TRANSPORT_SHARED_MEMORY)
    replies = stub.StreamSteps(iter([steps_pb2.StreamStepsRequest(open=message)]))
    return next(iter(replies)).opened


@pytest.mark.parametrize("target", [errno.ENOSYS, errno.EACCES], indirect=True, ids=["ENOSYS", "EACCES"])
def test_a_host_without_shared_memory(target):
    with grpc.insecure_channel(target) as channel, optserve.connect(target) as client:
        info = client.server_info()
        assert not shares_memory(info)
        assert not info.host_id
        # Clients look at the host id, and do without.
        opt = client.create_optimizer("a", optserve.Sgd(1.0), {"x": np.zeros(2)})
        assert opt.step({"x": np.ones(2)})["x"].tolist() == [-1, -1]
        with pytest.raises(optserve.FeatureUnavailableError):
            client.optimizer("a", transport="shm")
        stub = service_pb2_grpc.OptimizerServiceStub(channel)
        with refused(grpc.StatusCode.UNIMPLEMENTED, "FEATURE_UNAVAILABLE", "open.transport") as seen:
            opened(stub, "optimizers/a")
        assert seen["metadata"] == {"feature": "FEATURE_SHARED_MEMORY"}
        assert seen["retry_s"] is None


@pytest.mark.parametrize("target", [errno.ENOSPC], indirect=True, ids=["ENOSPC"])
def test_a_host_that_has_lent_all_of_its_shared_memory_has_some_nevertheless(target):
    with grpc.insecure_channel(target) as channel, optserve.connect(target) as client:
        info = client.server_info()
        assert shares_memory(info)
        assert info.host_id
        stub = service_pb2_grpc.OptimizerServiceStub(channel)
        made = create(stub, "a", {"x": (2,)})
        assert not opened(stub, made.name).HasField("shared_memory")
        assert client.optimizer("a").step({"x": np.ones(2, np.float32)})["x"].size == 2


def test_the_host_of_these_tests_shares_memory(stub, name):
    assert shares_memory(stub.GetServerInfo(service_pb2.GetServerInfoRequest()))
    assert opened(stub, create(stub, name, {"x": (2,)}).name).HasField("shared_memory")
