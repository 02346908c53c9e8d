"""A proxy that the environment names takes no connection within this host, and is named where it takes one."""

import subprocess
import sys

import pytest

import optserve
from optserve._rpc.proxies import is_on_this_host

DEAD_PROXY = "http://127.0.0.1:9"
IMPATIENT = optserve.ClientConfig(connect_timeout_s=0.5)


@pytest.fixture(autouse=True)
def no_proxies(monkeypatch):
    for name in ("grpc_proxy", "https_proxy", "http_proxy", "no_grpc_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("variable", ["grpc_proxy", "https_proxy", "http_proxy"])
@pytest.mark.parametrize("form", ["127.0.0.1:{}", "localhost:{}", "ipv4:127.0.0.1:{}", "dns:///localhost:{}"])
def test_this_host_is_reached_without_the_proxy(server, monkeypatch, variable, form):
    monkeypatch.setenv(variable, DEAD_PROXY)
    with optserve.connect(form.format(server.target.rpartition(":")[2])) as client:
        assert client.server_info().version


def test_the_health_check_takes_no_proxy_either(server, monkeypatch):
    monkeypatch.setenv("http_proxy", DEAD_PROXY)
    command = [sys.executable, "-c", "from optserve.cli import main; main()", "health", "--target", server.target]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("variable", ["grpc_proxy", "https_proxy", "http_proxy"])
def test_an_error_names_the_variable_that_is_set(monkeypatch, variable):
    monkeypatch.setenv(variable, "http://user:secret@127.0.0.1:9")
    with pytest.raises(optserve.UnavailableError, match=f"environment variable {variable} sends") as caught:
        optserve.connect("192.0.2.1:50051", IMPATIENT)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("exempt", ["192.0.2.1", "0.2.1", "192.0.2.0/24", "example.org, 192.0.2.1"])
def test_a_proxy_that_is_not_taken_is_not_named(monkeypatch, exempt):
    monkeypatch.setenv("http_proxy", DEAD_PROXY)
    monkeypatch.setenv("no_proxy", exempt)
    with pytest.raises(optserve.OptserveError) as caught:
        optserve.connect("192.0.2.1:50051", IMPATIENT)
    assert "http_proxy" not in str(caught.value)


@pytest.mark.parametrize(
    ("target", "here"),
    [
        ("127.0.0.1:1", True),
        ("127.9.9.9:1", True),
        ("localhost", True),
        ("LOCALHOST.:1", True),
        ("a.localhost:1", True),
        ("[::1]:1", True),
        ("::1", True),
        ("[::ffff:127.0.0.1]:1", True),
        ("0.0.0.0:1", True),
        ("ipv6:%5B::1%5D:1", True),
        ("ipv4:127.0.0.1:1,127.0.0.2:1", True),
        ("dns://8.8.8.8/localhost:1", True),
        ("unix:/tmp/a b", True),
        ("unix:relative", True),
        ("unix-abstract:a", True),
        ("ipv4:127.0.0.1:1,192.0.2.1:1", False),
        ("192.0.2.1:1", False),
        ("localhost.example.org:1", False),
        ("optserve:50051", False),
        ("[2001:db8::1]:1", False),
        ("", False),
    ],
)
def test_which_targets_are_on_this_host(target, here):
    assert is_on_this_host(target) is here
