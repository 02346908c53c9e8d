"""The image and the compose file, as real containers: a server that is healthy, and a trainer that learns from it."""

import json
import os
import re
import shutil
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import optserve
from optserve.examples.mnist import data

pytestmark = [pytest.mark.containers, pytest.mark.timeout(600), pytest.mark.xdist_group("containers")]

ROOT = Path(__file__).parents[2]
PODMAN_CONF = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "optserve/containers/containers.conf"


def run(*command: str | Path, **options) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False, **options)
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout + done.stderr


@dataclass(frozen=True)
class Engine:
    """Docker, or podman where there is no Docker engine."""

    command: str
    compose_command: tuple[str, ...]
    environment: dict[str, str]
    compose_file: Path

    def __call__(self, *arguments: str | Path) -> str:
        return run(self.command, *arguments, env=self.environment)

    def compose(self, *arguments: str) -> str:
        return run(*self.compose_command, "-f", self.compose_file, *arguments, env=self.environment)

    def container(self, service: str) -> str:
        return self("ps", "-q", "--filter", f"name=optserve.{service}").split()[0]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    environment = dict(os.environ, OPTSERVE_PORT=str(free_port()), OPTSERVE_EPOCHS="1", OPTSERVE_VERSION="test")
    cache = tmp_path_factory.mktemp("cache")
    environment["OPTSERVE_CACHE"] = str(cache)
    # The container's user is none of this machine's.
    for parent in (cache, cache.parent, cache.parent.parent):
        parent.chmod(parent.stat().st_mode | 0o055)
    folder = cache / "optserve" / "mnist"
    shutil.copytree(_mnist(), folder)
    for path in (cache / "optserve", folder, *folder.iterdir()):
        path.chmod(0o755 if path.is_dir() else 0o644)
    compose_file = ROOT / "deploy" / "compose.yaml"
    if shutil.which("docker") and subprocess.run(["docker", "info"], capture_output=True, check=False).returncode == 0:
        return Engine("docker", ("docker", "compose"), environment, compose_file)
    if shutil.which("podman") and PODMAN_CONF.is_file():
        environment["CONTAINERS_CONF"] = str(PODMAN_CONF)
        podman_compose = shutil.which("podman-compose") or str(ROOT / ".venv/bin/podman-compose")
        return Engine("podman", (podman_compose,), environment, compose_file)
    message = "there is no Docker engine, and scripts/podman.sh did not set podman up"
    if os.environ.get("CI"):
        pytest.fail(message)
    pytest.skip(message)


def _mnist() -> Path:
    import platformdirs

    data.load(say=lambda _line: None)
    return platformdirs.user_cache_path("optserve") / "mnist"


@pytest.fixture(scope="module")
def image(engine: Engine) -> str:
    """The CPU image, built from this tree. `make test` has collected its wheels in dist/wheels."""
    options = "--no-index --find-links /src/dist/wheels" if (ROOT / "dist/wheels").is_dir() else ""
    # The OCI format has no health check; Docker's has, and is Docker's default.
    formatted = ["--format", "docker"] if engine.command == "podman" else []
    engine("build", *formatted, "--target", "cpu", "--build-arg", f"PIP_OPTIONS={options}", "-t", "optserve:test", ROOT)
    return "optserve:test"


@pytest.fixture(scope="module")
def server(engine: Engine, image: str) -> Iterator[str]:
    engine.compose("up", "-d", "server")
    try:
        yield f"127.0.0.1:{engine.environment['OPTSERVE_PORT']}"
    finally:
        engine.compose("--profile", "demo", "down", "-v")


def test_the_image_is_small_and_runs_as_nobody_in_particular(engine, image):
    inspected = json.loads(engine("image", "inspect", image))[0]
    assert inspected["Config"]["User"] == "10001:10001"
    # The base made with debootstrap is 150 MB larger than the published one.
    assert inspected["Size"] < 650e6
    # Docker and podman show it in different places.
    health = inspected["Config"].get("Healthcheck") or inspected["Healthcheck"]
    assert health["Test"] == ["CMD", "optserve", "health"]


def test_the_server_answers_from_its_container_and_is_healthy(engine, server):
    with optserve.connect(server) as client:
        assert client.server_info().backend == "numba"
    container = engine.container("server")
    engine("exec", container, "optserve", "health")
    described = json.loads(engine("inspect", container))[0]
    assert described["HostConfig"]["ReadonlyRootfs"]
    assert [mount["Destination"] for mount in described["Mounts"] if mount.get("Name")] == ["/data"]


def test_the_trainer_container_learns_mnist_from_the_server_container(engine, server):
    # podman without systemd runs no health checks by itself, so the server is not waited for by compose but above.
    with optserve.connect(server):
        log = engine.compose("--profile", "demo", "up", "--no-deps", "trainer")
    assert "server server:50051" in log
    error = re.search(r"Test error (\d+\.\d+) % after 1 epochs: 600 steps", log)
    assert error, log
    assert float(error[1]) < 5.0
    assert "created mnist-adadelta-" in engine("logs", engine.container("server"))


def test_the_server_container_stops_in_order(engine, server):
    container = engine.container("server")
    engine("stop", "-t", "20", container)
    assert "stopped" in engine("logs", container)
    assert json.loads(engine("inspect", container))[0]["State"]["ExitCode"] == 0


def test_the_gpu_profile_reserves_a_device(engine):
    if engine.command == "podman":
        import yaml

        service = yaml.safe_load(engine.compose_file.read_text())["services"]["server-gpu"]
    else:
        service = json.loads(engine.compose("--profile", "gpu", "config", "--format", "json"))["services"]["server-gpu"]
    (device,) = service["deploy"]["resources"]["reservations"]["devices"]
    assert (device["driver"], device["capabilities"]) == ("nvidia", ["gpu"])
    assert service["build"]["target"] == "cuda"


SHARING = """
import sys
import numpy as np
import optserve

gradients = {"w": np.linspace(-1, 1, 100_000, dtype=np.float32)}
with optserve.connect(sys.argv[1]) as client:
    updates = []
    for name, transport in (("near", "auto"), ("far", "grpc")):
        client.create_optimizer(name, optserve.Adadelta(), gradients)
        opt = client.optimizer(name, transport=transport)
        updates.append([opt.step(gradients)["w"].tobytes() for _ in range(3)])
        if transport == "auto":
            print(": ".join(opt.transport))
        client.delete_optimizer(name)
assert updates[0] == updates[1]
"""


@pytest.fixture(scope="module")
def shareable(engine: Engine, image: str) -> Iterator[tuple[str, str]]:
    """(container, network) of a server that shares its IPC namespace."""
    network, name = "optserve-sharing", "optserve-shareable"
    engine("network", "create", network)
    options = ["--name", name, "--network", network, "--ipc", "shareable"]
    engine("run", "--detach", *options, image, "serve", "--host", "0.0.0.0")  # noqa: S104 - of its container
    try:
        yield name, network
    finally:
        engine("rm", "--force", name)
        engine("network", "rm", network)


@pytest.mark.parametrize(
    ("joined", "transport"),
    [
        (("ipc", "network"), "shm: the server is on this host"),
        (("ipc",), "shm: the server is on this host; control takes gRPC"),
        (("network",), "grpc: shared memory was not asked for"),
    ],
)
def test_containers_that_join_the_servers_ipc_namespace_share_its_memory(engine, image, shareable, joined, transport):
    server, network = shareable
    options = [part for kind in joined for part in (f"--{kind}", f"container:{server}")]
    options += [] if "network" in joined else ["--network", network]
    target = "127.0.0.1:50051" if "network" in joined else f"{server}:50051"
    log = engine("run", "--rm", *options, "--entrypoint", "python", image, "-c", SHARING, target)
    lines = [line for line in log.splitlines() if line.startswith(("shm", "grpc"))]
    assert lines[0].partition(", as its socket")[0] == transport, log
