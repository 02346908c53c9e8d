"""`optserve health`: a light probe that says how a server is, wherever it listens."""

import json
import os
import resource
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress

import grpc
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

import optserve
from optserve_command import probe

PROGRAM = "from optserve_command import main; main()"


def command(*arguments: str, program: str = PROGRAM, **environment: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-c", program, *arguments]
    return subprocess.run(
        line, capture_output=True, text=True, timeout=60, check=False, env=dict(os.environ, **environment)
    )


@contextmanager
def health_server(status: health_pb2.HealthCheckResponse.ServingStatus | None) -> Iterator[str]:
    """A gRPC server with the standard health service, or without it where the status is None."""
    server = grpc.server(ThreadPoolExecutor(1))
    if status is not None:
        servicer = health.HealthServicer()
        servicer.set("", status)
        health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(None).wait()


@pytest.mark.parametrize("name", ["SERVING", "NOT_SERVING", "UNKNOWN"])
def test_the_status_is_that_of_the_standard_health_service(name):
    with health_server(health_pb2.HealthCheckResponse.ServingStatus.Value(name)) as target:
        assert probe.ask(target, 10) == name
        done = command("health", "--json", "--target", target)
        assert json.loads(done.stdout) == {"target": target, "status": name, "error": None}
        assert done.returncode == (0 if name == "SERVING" else 1)


def test_the_statuses_are_those_of_the_contract():
    values = health_pb2.HealthCheckResponse.ServingStatus.items()
    assert [(name, number) for number, name in enumerate(probe.STATUSES)] == values


def test_a_grpc_server_without_a_health_service_is_not_healthy():
    with health_server(None) as target, pytest.raises(probe.ProbeError, match="gives no status"):
        probe.ask(target, 10)


@contextmanager
def answering(answer: Callable[[socket.socket], object]) -> Iterator[str]:
    """Something that listens and is no gRPC server."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.settimeout(30)
                answer(connection)
                # A connection that is closed with something unread is reset, and what was sent may be lost.
                with suppress(ConnectionError):
                    while connection.recv(1 << 16):
                        pass

        thread = threading.Thread(target=serve)
        thread.start()
        yield f"127.0.0.1:{listener.getsockname()[1]}"
        thread.join()


FRAME = b"\0\0\0\4\0\0\0\0\0"


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda link: link.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n"), "does not speak HTTP/2"),
        (lambda link: link.shutdown(socket.SHUT_WR), "closes the connection"),
        (lambda link: link.sendall(FRAME + b"\0\0\x08\x07" + bytes(13)), "refuses the call"),
        (lambda link: link.sendall(b"\0\0\x07\0\x01\0\0\0\x01" + b"\1\0\0\0\2\x08\1"), "gives no status"),
        (lambda link: link.sendall(b"\0\0\x07\0\x01\0\0\0\x01" + b"\0\0\0\0\2\x08\7"), "gives no status"),
        (lambda link: [link.sendall(b"\0\x40\0\0\0\0\0\0\x01" + bytes(16384)) for _ in range(3)], "more than a status"),
        (lambda link: None, "does not answer within 0.5 s"),
    ],
    ids=["http1", "closes", "goaway", "compressed", "unheard-of", "endless", "silent"],
)
def test_whatever_else_answers_is_a_clear_error(answer, message):
    with answering(answer) as target, pytest.raises(probe.ProbeError, match=message):
        probe.ask(target, 0.5 if "within" in message else 20)


@pytest.mark.parametrize("target", ["nothing", "host:", ":1", "host:70000", "unix:/nonexistent", "127.0.0.1:1", ""])
def test_what_is_no_server_is_a_sentence(target, tmp_path):
    done = command("health", "--target", target, "--timeout-s", "5", OPTSERVE_TARGET_FILE=str(tmp_path / "none"))
    if target:
        assert (done.returncode, done.stderr.startswith(f"optserve: {target} ")) == (1, True)
        assert done.stderr.count("\n") == 1
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("listening", ["port", "ipv6", "socket"])
def test_a_server_is_found_wherever_it_listens_and_no_proxy_is_asked(tmp_path, listening):
    told = tmp_path / "target"
    told.write_text("127.0.0.1:1\n")
    options = {"port": [], "ipv6": ["--host", "::1"], "socket": ["--uds", str(tmp_path / "socket")]}[listening]
    with optserve.local_server(backend="numpy", options=[*options, "--target-file", str(told)]) as server:
        assert told.read_text() == f"{server.target}\n"
        dead = dict.fromkeys(("http_proxy", "https_proxy", "grpc_proxy"), "http://127.0.0.1:9")
        done = command("health", OPTSERVE_TARGET_FILE=str(told), **dead)
        assert (done.returncode, done.stdout) == (0, f"{server.target} is SERVING\n"), done.stderr
        # So do the other commands.
        done = command("optimizers", "list", "--json", OPTSERVE_TARGET_FILE=str(told))
        assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr
    assert not told.exists()


def test_a_target_file_that_cannot_be_written_is_no_reason_not_to_serve(tmp_path):
    with optserve.local_server(backend="numpy", options=["--target-file", str(tmp_path / "no" / "file")]) as server:
        assert probe.ask(server.target, 10) == "SERVING"


def test_a_probe_loads_nothing_heavy_and_takes_a_fraction_of_a_client(server):
    seen = "import sys, atexit; atexit.register(lambda: print(*sys.modules)); " + PROGRAM
    done = command("health", "--target", server.target, program=seen)
    assert done.returncode == 0, done.stderr
    loaded = done.stdout.split()
    assert not {"optserve", "grpc", "numpy", "typer", "rich", "json", "dataclasses"} & set(loaded)

    def cpu_s(*line: str) -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, *line], check=True, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    probes = min(cpu_s("-c", PROGRAM, "health", "--target", server.target) for _ in range(3))
    clients = min(cpu_s("-c", "import optserve.cli.app") for _ in range(3))
    assert probes < clients / 3


# --- Signals before a server has begun

SIGNALLED = """
import os, signal, sys

class Signalling:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            sys.meta_path.remove(self)
            os.kill(os.getpid(), {number})

sys.meta_path.insert(0, Signalling())
"""


@pytest.mark.parametrize(
    ("entry", "module", "number"),
    [
        ("optserve serve", "typer", "SIGTERM"),
        ("optserve serve", "grpc", "SIGTERM"),
        ("optserve serve", "optserve_server.app", "SIGINT"),
        ("optserve serve", "numba", "SIGTERM"),
        ("python -m optserve_server", "typer", "SIGTERM"),
        ("python -m optserve_server", "grpc", "SIGINT"),
        ("python -m optserve_server", "numba", "SIGINT"),
    ],
)
def test_a_signal_while_a_server_is_being_loaded_ends_it(tmp_path, entry, module, number):
    """The first process of a container would not hear a signal without a handler."""
    (tmp_path / "sitecustomize.py").write_text(SIGNALLED.format(module=module, number=f"signal.{number}"))
    start = ["-c", PROGRAM, "serve"] if entry == "optserve serve" else ["-m", "optserve_server"]
    done = subprocess.run(
        [sys.executable, *start, "--port", "0", "--backend", "numba", "--uds", str(tmp_path / "socket")],
        capture_output=True, text=True, timeout=60, check=False, env=dict(os.environ, PYTHONPATH=str(tmp_path)),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    if module == "numba":
        # Its own handlers are in place: it stops in order, once it has begun.
        assert "stopped" in done.stderr
    else:
        assert done.stderr == "optserve serve: stopped before it had started\n"
    assert not (tmp_path / "socket").exists()
