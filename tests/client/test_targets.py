"""What is not the address of a server is an error at once, and not after the time-out for connections."""

import asyncio
import time
from typing import Any

import pytest
from typer.testing import CliRunner

import optserve
import optserve.aio
from optserve.cli import app

URLS = {
    "http://127.0.0.1:50051": "write 127.0.0.1:50051",
    "https://optimizers.example/": "write HOST:PORT",
    "grpc://[::1]:50051": r"write \[::1\]:50051",
    "tcp://host": "write HOST:PORT",
}
NO_ADDRESSES = [
    "", "localhost", "::1", "127.0.0.1:", ":50051", "127.0.0.1:port", "127.0.0.1:0", "127.0.0.1:70000", "unix:",
    "127.0.0.1:50051/optimizers", "host:1:2", "two words:50051", "user@host:50051", " 127.0.0.1:50051", "[::1]",
]  # fmt: skip


@pytest.mark.parametrize("target", URLS)
def test_a_url_is_no_address(target):
    began = time.monotonic()
    with pytest.raises(optserve.InvalidArgumentError, match=f"is a URL, .*{URLS[target]}"):
        optserve.connect(target)
    assert time.monotonic() - began < 2


@pytest.mark.parametrize("target", [*NO_ADDRESSES, None, 50051, b"127.0.0.1:50051"])
def test_what_is_no_address_is_said_to_be_none(target: Any):
    began = time.monotonic()
    with pytest.raises(optserve.InvalidArgumentError, match=r"write HOST:PORT, such as 127\.0\.0\.1:50051"):
        optserve.connect(target)
    assert time.monotonic() - began < 2


def test_commands_and_the_asynchronous_client_say_so_too():
    async def connect() -> None:
        async with optserve.aio.connect("http://127.0.0.1:1"):
            pass

    with pytest.raises(optserve.InvalidArgumentError, match="is a URL"):
        asyncio.run(connect())
    result = CliRunner().invoke(app.app, ["info", "--target", "http://127.0.0.1:1"])
    assert result.exit_code == 1


@pytest.mark.parametrize(
    "form", ["{}", "localhost:{port}", "ipv4:{}", "dns:{}", "dns:///{}", "LOCALHOST:{port}"], ids=str
)
def test_every_form_of_an_address_connects(server, form):
    port = server.target.rpartition(":")[2]
    with optserve.connect(form.format(server.target, port=port)) as client:
        assert client.server_info().backend


@pytest.mark.parametrize(
    "target", ["[::1]:1", "[fe80::1%25eth0]:1", "some-host.example:1", "ipv6:[::1]:1", "xn--bcher-kva.example:9"]
)
def test_an_address_without_a_server_is_tried(target):
    with pytest.raises(optserve.UnreachableError):
        optserve.connect(target, optserve.ClientConfig(connect_timeout_s=0.2))
