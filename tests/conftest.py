"""What all tests share: a real server process and a client connected to it."""

import itertools
from collections.abc import Iterator

import grpc
import pytest

import optserve
from backend_under_test import BACKEND
from optserve.v1 import service_pb2_grpc


@pytest.fixture(scope="session")
def server() -> Iterator[optserve.LocalServer]:
    """A server of its own for each worker process of the test run."""
    with optserve.local_server(backend=BACKEND) as running:
        yield running


@pytest.fixture(scope="session")
def client(server: optserve.LocalServer) -> Iterator[optserve.Client]:
    with optserve.connect(server.target) as connected:
        yield connected


@pytest.fixture(scope="session")
def stub(server: optserve.LocalServer) -> Iterator[service_pb2_grpc.OptimizerServiceStub]:
    """The generated stub: what a client in any language has."""
    with grpc.insecure_channel(server.target) as channel:
        yield service_pb2_grpc.OptimizerServiceStub(channel)


@pytest.fixture(scope="session")
def _names() -> Iterator[int]:
    return itertools.count()


@pytest.fixture
def name(_names: Iterator[int]) -> str:
    """An optimizer id that no other test uses."""
    return f"test-{next(_names)}"
