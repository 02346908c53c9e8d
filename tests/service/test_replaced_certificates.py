"""Certificates that are replaced while a server and its clients run, in every way in which people replace them."""

import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc
import numpy as np
import pytest

import optserve
from optserve._common.clock import SYSTEM, Clock
from optserve._common.replaceable import RETRY_S, Replaceable
from optserve._rpc.channel import is_connected, open_channel
from optserve.cli import authority
from optserve_server.app import App
from optserve_server.domain.config import ServerConfig
from optserve_server.edge.certificates import READ_S
from service.certificate_files import DAY, issue, seen, serial

X = np.ones(1000, np.float32)
CHECK, WATCH = "/grpc.health.v1.Health/Check", "/grpc.health.v1.Health/Watch"


class LaterClock(Clock):
    """The machine's clock, but later."""

    later = timedelta()

    def monotonic(self) -> float:
        return SYSTEM.monotonic() + self.later.total_seconds()

    def now(self) -> datetime:
        return datetime.now(UTC) + self.later


@contextmanager
def serving(folder: Path, clock: Clock = SYSTEM) -> Iterator[str]:
    """A server in this process that lets in clients of its authority; gives its target."""
    config = ServerConfig(
        port=0,
        backend="numpy",
        tls_certificate=str(folder / "server.pem"),
        tls_key=str(folder / "server-key.pem"),
        tls_client_authority=str(folder / "authority.pem"),
    )
    app = App(config, clock=clock)
    app.start()
    try:
        yield app.target
    finally:
        app.stop()


def settings(folder: Path) -> optserve.ClientConfig:
    tls = optserve.Tls(folder / "authority.pem", folder / "client.pem", folder / "client-key.pem")
    return optserve.ClientConfig(tls=tls, connect_timeout_s=10)


def test_files_that_could_not_be_used_are_read_again_though_they_have_not_changed(tmp_path, caplog):
    """Their rights may have been set since, or the time may have come from which they are valid."""
    file = tmp_path / "file"
    file.write_text("a")
    unusable: list[str] = []

    def read() -> str:
        if unusable:
            raise ValueError(unusable[0])
        return file.read_text()

    clock = LaterClock()
    files = Replaceable([file], read, "file", logging.getLogger("test"), clock)
    assert (files.content, files.renew()) == ("a", None)
    unusable.append("not yours")
    file.write_text("other")
    assert (files.renew(), files.renew()) == (None, None)
    unusable.clear()
    clock.later = timedelta(seconds=2 * RETRY_S)
    assert files.renew() == "other"
    assert (files.renew(), files.content) == (None, "other")
    (record,) = caplog.records
    assert record.getMessage() == "the new file is not used; the one before stays in use: not yours"


def test_while_a_thread_reads_the_files_others_go_on_with_the_present_ones(tmp_path):
    file = tmp_path / "file"
    file.write_text("a")
    reading, go_on = threading.Event(), threading.Event()
    go_on.set()

    def read() -> str:
        reading.set()
        assert go_on.wait(20)
        return file.read_text()

    files = Replaceable([file], read, "file", logging.getLogger("test"), SYSTEM)
    go_on.clear()
    reading.clear()
    file.write_text("other")
    thread = threading.Thread(target=files.renew)
    thread.start()
    assert reading.wait(20)
    assert (files.renew(), files.content) == (None, "a")
    go_on.set()
    thread.join()
    assert files.content == "other"


def test_a_file_system_that_hangs_delays_neither_streams_nor_new_connections(tmp_path, caplog):
    """Here a pipe into which nobody writes."""
    issue(tmp_path)
    with serving(tmp_path) as target, optserve.connect(target, settings(tmp_path)) as client:
        client.create_optimizer("a", optserve.Sgd(learning_rate=1.0), {"x": X})
        stream = client.optimizer("a", transport="grpc")
        stream.step({"x": X})
        used = serial(tmp_path / "server.pem")
        os.mkfifo(tmp_path / "pipe")
        (tmp_path / "pipe").rename(tmp_path / "server.pem")
        began = SYSTEM.monotonic()
        for _ in range(20):
            assert seen(target, tmp_path) == used
            stream.step({"x": X})
        # One of them waited.
        assert SYSTEM.monotonic() - began < 20 * READ_S
        assert caplog.text.count("are not read after") == 1
        # Ends the wait of the thread that reads.
        (tmp_path / "server.pem").write_bytes(b"")
        issue(tmp_path)
        assert seen(target, tmp_path) == serial(tmp_path / "server.pem")


def test_a_folder_that_is_replaced_as_a_whole_through_a_link(tmp_path):
    """As Kubernetes replaces a secret: the files are links through ..data, which leads to another folder at once."""
    for number in (1, 2):
        (tmp_path / f"..{number}").mkdir()
        issue(tmp_path / f"..{number}")
    (tmp_path / "..data").symlink_to("..1")
    for name in ("authority.pem", "server.pem", "server-key.pem", "client.pem", "client-key.pem"):
        (tmp_path / name).symlink_to(f"..data/{name}")
    with serving(tmp_path) as target, optserve.connect(target, settings(tmp_path)) as client:
        assert seen(target, tmp_path) == serial(tmp_path / "..1/server.pem")
        (tmp_path / "..new").symlink_to("..2")
        (tmp_path / "..new").rename(tmp_path / "..data")
        assert seen(target, tmp_path) == serial(tmp_path / "..2/server.pem")
        # Its connection from before would not do: the new server's authority is another one.
        with optserve.connect(target, settings(tmp_path)) as later:
            assert later.server_info() == client.server_info()


def test_during_a_change_of_the_authority_both_are_trusted_on_both_sides(tmp_path):
    sides = [tmp_path / "old", tmp_path / "new"]
    for side in sides:
        side.mkdir()
        issue(side)
    both = b"".join((side / "authority.pem").read_bytes() for side in sides)
    for side in sides:
        (side / "authority.pem").write_bytes("# Both, until the old one is gone: ∀\n".encode() + both)
    for server in sides:
        with serving(server) as target:
            for client in sides:
                with optserve.connect(target, settings(client)) as connected:
                    assert connected.server_info().backend == "numpy"


def test_a_certificate_that_expires_while_the_server_runs_is_an_error_in_its_log_once(tmp_path, caplog):
    clock = LaterClock()
    issue(tmp_path)
    with serving(tmp_path, clock) as target:
        seen(target, tmp_path)
        assert "has expired" not in caplog.text
        clock.later = 2 * DAY
        seen(target, tmp_path)
        seen(target, tmp_path)
    assert caplog.text.count("has expired") == 1


def test_a_client_says_that_it_does_not_use_its_new_certificate_and_goes_on(tmp_path, caplog):
    issue(tmp_path)
    with serving(tmp_path) as target, optserve.connect(target, settings(tmp_path)) as client:
        kept = (tmp_path / "client-key.pem").read_bytes()
        (tmp_path / "client-key.pem").unlink()
        for _ in range(3):
            client.server_info()
        assert caplog.text.count("the new TLS certificate is not used; the one before stays in use") == 1
        assert "client-key.pem cannot be read" in caplog.text
        (tmp_path / "client-key.pem").write_bytes(kept)
        client.server_info()


def test_a_stream_has_a_connection_though_new_calls_have_none(tmp_path):
    """So a step that takes too long is not said to have no connection."""
    issue(tmp_path)
    with serving(tmp_path) as target:
        channel = open_channel(target, settings(tmp_path), SYSTEM)
        watch = channel.unary_stream(WATCH, None, None)(b"", timeout=60)
        next(iter(watch))
        assert is_connected(channel)
        for name in ("authority", "authority-key"):
            (tmp_path / f"{name}.pem").unlink()
        authority.load_or_make(tmp_path, DAY)
        with pytest.raises(grpc.RpcError, match="CERTIFICATE_VERIFY_FAILED"):
            channel.unary_unary(CHECK, None, None)(b"", timeout=10)
        assert is_connected(channel)
        watch.cancel()
        channel.close()


def held() -> tuple[int, int]:
    """Descriptors and threads of this process."""
    return len(list(Path("/proc/self/fd").iterdir())), threading.active_count()


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts descriptors as Linux shows them")
def test_a_hundred_replacements_leave_neither_connections_nor_threads(tmp_path):
    """While threads make calls, cancel them, and drop streams that they have not read to their end."""
    issue(tmp_path)
    ended = threading.Event()
    failures: list[BaseException] = []

    def calls(channel: grpc.Channel) -> None:
        try:
            while not ended.is_set():
                channel.unary_unary(CHECK, None, None)(b"", timeout=20)
                channel.unary_unary(CHECK, None, None).future(b"", timeout=20).cancel()
                next(iter(channel.unary_stream(WATCH, None, None)(b"", timeout=20)))
        # Whatever it is, this thread's test has failed.
        except BaseException as error:  # noqa: BLE001
            failures.append(error)

    files = ["--tls-certificate", str(tmp_path / "server.pem"), "--tls-key", str(tmp_path / "server-key.pem")]
    with optserve.local_server(backend="numpy", options=files) as server:
        channel = open_channel(server.target, settings(tmp_path), SYSTEM)
        channel.unary_unary(CHECK, None, None)(b"", timeout=20)
        before = held()
        workers = [threading.Thread(target=calls, args=(channel,)) for _ in range(3)]
        for worker in workers:
            worker.start()
        issuer = authority.load_or_make(tmp_path, DAY)
        for _ in range(100):
            issuer.issue("client", DAY)
            channel.unary_unary(CHECK, None, None)(b"", timeout=20)
        ended.set()
        for worker in workers:
            worker.join()
        assert not failures
        # Connections end a moment after their channel was closed.
        until = SYSTEM.monotonic() + 20
        while any(now > first for now, first in zip(held(), before, strict=True)) and SYSTEM.monotonic() < until:
            channel.unary_unary(CHECK, None, None)(b"", timeout=20)
        after = held()
        assert after[0] <= before[0]
        assert after[1] <= before[1]
        channel.close()
