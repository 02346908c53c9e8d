"""The image and the compose file, as real containers: a server that is healthy, and a trainer that learns from it.

Also a server within limits, as another user, that is stopped, killed and started again.
"""

import json
import os
import re
import shutil
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import yaml

import optserve
from optserve_demo.mnist import data

pytestmark = [pytest.mark.containers, pytest.mark.timeout(600), pytest.mark.xdist_group("containers")]

ROOT = Path(__file__).parents[2]
PODMAN_CONF = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "optserve/containers/containers.conf"


PATIENT = optserve.ClientConfig(connect_timeout_s=60)
"""A server of half a core, or on a busy machine, takes its time to start."""


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
    """The CPU image, built from this tree as compose does. `make test` has collected its wheels in dist/wheels."""
    if (ROOT / "dist/wheels").is_dir():
        engine.environment["PIP_OPTIONS"] = "--no-index --find-links /src/dist/wheels"
    # The OCI format has no health check; Docker's has, and is Docker's default.
    engine.environment["BUILDAH_FORMAT"] = "docker"
    engine.compose("build", "server")
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
    assert list(inspected["Config"]["Volumes"]) == ["/data"]
    assert "PYTHONFAULTHANDLER=1" in inspected["Config"]["Env"]


def test_compose_builds_upon_what_the_environment_says(engine):
    compose = yaml.safe_load(engine.compose_file.read_text())
    default = re.search("^ARG BASE=(.*)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    assert default
    for service in ("server", "server-gpu"):
        args = compose["services"][service]["build"]["args"]
        assert args == {"BASE": f"${{BASE:-{default[1]}}}", "PIP_OPTIONS": "${PIP_OPTIONS:-}"}


PROBING = """
import importlib.util, resource, subprocess
for name in ("optserve_command.probe", "optserve.client", "grpc", "numba", "socket"):
    cached = importlib.util.find_spec(name).cached
    assert __import__("os").path.exists(cached), cached
subprocess.run(["optserve", "health"])
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print("probe", used.ru_utime + used.ru_stime)
"""


def test_all_is_compiled_and_a_health_check_costs_little(engine, image):
    log = engine("run", "--rm", "--read-only", "--entrypoint", "python", image, "-c", PROBING)
    assert "127.0.0.1:50051 does not answer" in log
    # With the libraries it was half a second, every ten.
    (used_s,) = re.findall(r"^probe (.*)$", log, re.MULTILINE)
    assert float(used_s) < 0.15, log


def test_the_server_answers_from_its_container_and_is_healthy(engine, server):
    with optserve.connect(server, PATIENT) as client:
        assert client.server_info().backend == "numba"
    container = engine.container("server")
    engine("exec", container, "optserve", "health")
    described = json.loads(engine("inspect", container))[0]
    assert described["HostConfig"]["ReadonlyRootfs"]
    assert [mount["Destination"] for mount in described["Mounts"] if mount.get("Name")] == ["/data"]


def test_a_cache_that_the_trainer_may_not_read_is_a_sentence(engine, image, tmp_path):
    folder = tmp_path / "optserve" / "mnist"
    folder.mkdir(parents=True)
    name = next(iter(data.SHA256))
    (folder / name).write_bytes(b"x")
    (folder / name).chmod(0o600)
    for parent in (tmp_path, tmp_path.parent, tmp_path.parent.parent):
        parent.chmod(parent.stat().st_mode | 0o055)
    command = [engine.command, "run", "--rm", "--volume", f"{tmp_path}:/cache", image, "mnist", "--target", "nowhere:1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=engine.environment)
    assert done.returncode == 1
    expected = f"optserve: /cache/optserve/mnist/{name} cannot be read: Permission denied. Let user 10001 read it"
    assert expected in done.stderr
    assert "Traceback" not in done.stderr


def test_the_trainer_container_learns_mnist_from_the_server_container(engine, server):
    # podman without systemd runs no health checks by itself, so the server is not waited for by compose but above.
    with optserve.connect(server, PATIENT):
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
        service = yaml.safe_load(engine.compose_file.read_text())["services"]["server-gpu"]
    else:
        service = json.loads(engine.compose("--profile", "gpu", "config", "--format", "json"))["services"]["server-gpu"]
    (device,) = service["deploy"]["resources"]["reservations"]["devices"]
    assert (device["driver"], device["capabilities"]) == ("nvidia", ["gpu"])
    assert service["build"]["target"] == "cuda"


# --- Within limits, as another user

MIB = 1 << 20
EVERYWHERE = "0.0.0.0"  # noqa: S104 - of its container
HARDENED = ("--read-only", "--tmpfs", "/tmp", "--cap-drop", "ALL")  # noqa: S108
PARAMS = {"w": np.zeros((300, 100), np.float32)}


def gradients(step: int) -> dict[str, np.ndarray]:
    return {name: np.random.default_rng(step).standard_normal(value.shape, "f4") for name, value in PARAMS.items()}


@pytest.fixture
def limited(engine: Engine, image: str, tmp_path: Path) -> Iterator[tuple[str, str]]:
    """(container, target) of a server with half a core and 400 MiB, as a user of a cluster's choice."""
    name, port = "optserve-limited", free_port()
    engine(
        "run", "--detach", "--name", name, *HARDENED,
        "--memory", "400m", "--cpus", "0.5", "--user", "1000670000:0", "--volume", f"{name}:/data",
        "--publish", f"127.0.0.1:{port}:6001",
        image, "serve", "--host", EVERYWHERE, "--port", "6001", "--data-dir", "/data",
    )  # fmt: skip
    try:
        yield name, f"127.0.0.1:{port}"
    finally:
        engine("rm", "--force", name)
        engine("volume", "rm", "--force", name)


def test_a_limited_server_of_another_user_is_stopped_killed_and_started_again(engine, limited, tmp_path):
    container, target = limited
    with (
        optserve.connect(target, PATIENT) as client,
        optserve.local_server(backend="numba") as undisturbed,
        optserve.connect(undisturbed.target) as beside,
    ):
        info = client.server_info()
        assert info.device.startswith("CPU, 1 thread")
        assert info.limits.max_state_bytes <= 400 * MIB
        opt, expected = (one.create_optimizer("a", optserve.Adadelta(), PARAMS) for one in (client, beside))
        for step, ending in enumerate(["", "stop", "", "kill", "", "restart", ""]):
            # The client goes on by itself.
            got = opt.step(gradients(step))["w"]
            assert got.tobytes() == expected.step(gradients(step))["w"].tobytes(), f"step {step}"
            # It finds the server on its port without being told.
            assert "0.0.0.0:6001 is SERVING" in engine("exec", container, "optserve", "health")
            if ending:
                engine(*([ending] if ending == "kill" else [ending, "-t", "20"]), container)
            if ending in ("stop", "kill"):
                engine("start", container)
        assert opt.current_step == 7
    log = engine("logs", container)
    assert log.count("stopped") == 2
    assert "Traceback" not in log
    # What a container has written, this machine's Python reads, whatever its version.
    engine("stop", "-t", "20", container)
    folder = tmp_path / "data"
    folder.mkdir()
    engine("cp", f"{container}:/data/.", folder)
    with optserve.local_server(folder) as server, optserve.connect(server.target) as client:
        assert client.optimizer("a").current_step == 7


def largest(client: optserve.Client) -> tuple[optserve.Optimizer, dict[str, np.ndarray]]:
    """The largest optimizer that the server accepts, in steps of a million parameters, and a gradient for it."""
    for size in range(25_000_000, 0, -1_000_000):
        gradient = {"w": np.full(size, 1e-3, np.float32)}
        try:
            return client.create_optimizer("a", optserve.Adadelta(), gradient), gradient
        except optserve.ResourceExhaustedError:
            continue
    raise AssertionError("the server accepts nothing")


def test_a_server_of_little_memory_takes_what_it_can_hold_and_no_more(engine, image):
    """Down from what fills its memory; what it has accepted it steps, and recovers."""
    name, port = "optserve-little", free_port()
    options = ["--name", name, *HARDENED, "--memory", "300m", "--publish", f"127.0.0.1:{port}:50051"]
    engine("run", "--detach", *options, image)
    try:
        with optserve.connect(f"127.0.0.1:{port}", PATIENT) as client:
            opt, gradient = largest(client)
            assert 1_000_000 < gradient["w"].size < 25_000_000
            for ending in ("restart", "kill", ""):
                for _ in range(2):
                    opt.step(gradient)
                state = json.loads(engine("inspect", name))[0]["State"]
                assert (state["Running"], state["OOMKilled"]) == (True, False)
                if ending:
                    engine(*([ending] if ending == "kill" else [ending, "-t", "20"]), name)
                if ending == "kill":
                    engine("start", name)
            assert opt.current_step == 6
    finally:
        engine("rm", "--force", "--volumes", name)


# Waits until the first process has a handler for SIGTERM, bit 14, and sends it.
AT_ONCE = """
until [ $((0x$(sed -n "s/^SigCgt:[[:space:]]*//p" /proc/1/status) >> 14 & 1)) = 1 ]; do sleep 0.01; done
kill -TERM 1
"""


def test_a_server_hears_sigterm_from_the_first_moment_on(engine, image):
    name = "optserve-early"
    # A tenth of a core, so that it is still being loaded by then.
    engine("run", "--detach", "--name", name, "--cpus", "0.1", image)
    try:
        engine("exec", name, "sh", "-c", AT_ONCE)
        assert engine("wait", name).strip().splitlines()[0] == "0"
        log = engine("logs", name)
        assert "stopped before it had started" in log
        assert "serving" not in log
    finally:
        engine("rm", "--force", "--volumes", name)


@pytest.mark.parametrize(
    "listening",
    [
        ["--host", EVERYWHERE, "--port", "0"],
        ["--host", "::1"],
        ["--uds", "/data/optserve.socket"],
    ],
    ids=["port", "ipv6", "socket"],
)
def test_the_health_check_finds_the_server_wherever_it_listens(engine, image, listening):
    """At a quarter of a core, with a proxy for everything in the environment."""
    name = "optserve-elsewhere"
    proxies = [part for kind in ("http", "https", "grpc") for part in ("--env", f"{kind}_proxy=http://127.0.0.1:9")]
    options = ["--name", name, "--cpus", "0.25", *HARDENED, *proxies]
    engine("run", "--detach", *options, image, "serve", *listening)
    try:
        # The image's own command, as the health check runs it; it fails until the server is there.
        engine("exec", name, "sh", "-c", "for i in $(seq 600); do optserve health && exit; sleep 0.1; done; exit 1")
    finally:
        engine("rm", "--force", "--volumes", name)


@pytest.mark.timeout(1800)
def test_the_durability_tests_pass_under_the_python_of_debian(engine):
    """3.11.2 at present, which reads beyond a map of memory where it is asked to search it."""
    environment = dict(engine.environment, ENGINE=engine.command)
    chosen = ["-n", "2", "--dist", "loadgroup", "tests/golden", "tests/durability"]
    log = run(ROOT / "scripts/test-debian.sh", "-q", *chosen, env=environment)
    assert re.search(r"^Python 3\.11\.\d", log, re.MULTILINE)
    assert re.search(r"^\d+ passed", log, re.MULTILINE), log


# --- Shared memory between containers

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
    engine("run", "--detach", *options, image, "serve", "--host", EVERYWHERE)
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
    assert lines[0].partition(", because")[0] == transport, log
