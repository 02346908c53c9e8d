"""Connections that are secured, metadata that is sent with every call, and interceptors on either side."""

import asyncio
import ipaddress
import logging
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple

import grpc
import numpy as np
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID
from grpc_health.v1 import health_pb2, health_pb2_grpc

import optserve
from optserve import aio
from optserve_server.app import App
from optserve_server.domain.config import ServerConfig
from optserve_server.edge.gate.interceptors import ARRIVING, LEAVING

X = np.ones(1000, np.float32)
TOKEN = ("authorization", "Bearer hunter2")


class Identity(NamedTuple):
    """A key with its certificate, which is also that of its own authority."""

    key: bytes
    certificate: bytes


@pytest.fixture(scope="module")
def identity() -> Callable[[str], Identity]:
    """Makes identities for this host."""

    def make(name: str) -> Identity:
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        names = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
        now = datetime.now(UTC)
        certificate = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(days=1))
            .not_valid_after(now + timedelta(days=1))
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .sign(key, hashes.SHA256())
        )
        private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        return Identity(private, certificate.public_bytes(Encoding.PEM))

    return make


@contextmanager
def serving(credentials: grpc.ServerCredentials | None = None, *interceptors: grpc.ServerInterceptor):
    """A server in this process; gives its target."""
    app = App(ServerConfig(port=0, backend="numpy"), credentials, interceptors)
    app.start()
    try:
        yield app.target
    finally:
        app.stop()


def every_shape_of_call(client: optserve.Client, name: str, transport: Any = "grpc") -> None:
    """Unary calls, a stream of steps, a state out and in, parameters in and out."""
    opt = client.create_optimizer(name, optserve.Sgd(learning_rate=0.5), {"x": X}, hosted=True)
    attached = client.optimizer(name, transport=transport)
    assert np.array_equal(attached.step({"x": X})["x"], -0.5 * X)
    assert np.array_equal(opt.pull_parameters().arrays["x"], 0.5 * X)
    opt.import_state(opt.export_state())
    client.delete_optimizer(name)


class Seen(grpc.ServerInterceptor):
    """Notes the metadata of each call, by method."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, dict]] = []

    def intercept_service(self, continuation, handler_call_details):
        method = handler_call_details.method.rpartition("/")[2]
        self.calls.append((method, dict(handler_call_details.invocation_metadata)))
        return continuation(handler_call_details)


class Watching(
    grpc.UnaryUnaryClientInterceptor,
    grpc.UnaryStreamClientInterceptor,
    grpc.StreamUnaryClientInterceptor,
    grpc.StreamStreamClientInterceptor,
):
    """Notes the methods that are called, with their metadata."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple]] = []

    def _go_on(self, continuation, details, request):
        self.calls.append((details.method.rpartition("/")[2], tuple(details.metadata or ())))
        return continuation(details, request)

    def intercept_unary_unary(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        return self._go_on(continuation, client_call_details, request)

    def intercept_unary_stream(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        return self._go_on(continuation, client_call_details, request)

    def intercept_stream_unary(self, continuation: Any, client_call_details: Any, request_iterator: Any) -> Any:
        return self._go_on(continuation, client_call_details, request_iterator)

    def intercept_stream_stream(self, continuation: Any, client_call_details: Any, request_iterator: Any) -> Any:
        return self._go_on(continuation, client_call_details, request_iterator)


SHAPES = {"CreateOptimizer", "StreamSteps", "PushParameters", "PullParameters", "ExportState", "ImportState"}
"""Calls of all four shapes."""


@pytest.mark.parametrize("transport", ["grpc", "shm"])
def test_every_call_works_over_a_secured_connection(identity, transport):
    own = identity("server")
    with serving(grpc.ssl_server_credentials([(own.key, own.certificate)])) as target:
        config = optserve.ClientConfig(credentials=grpc.ssl_channel_credentials(own.certificate))
        with optserve.connect(target, config) as client:
            every_shape_of_call(client, "a", transport)


def test_the_asyncio_client_and_health_checks_work_over_it_too(identity):
    own = identity("server")
    credentials = grpc.ssl_channel_credentials(own.certificate)

    async def steps(target: str) -> np.ndarray:
        config = optserve.ClientConfig(credentials=credentials, metadata=(TOKEN,))
        async with aio.connect(target, config) as client:
            opt = await client.create_optimizer("a", optserve.Sgd(learning_rate=0.5), {"x": X})
            return (await opt.step({"x": X}))["x"]

    with serving(grpc.ssl_server_credentials([(own.key, own.certificate)])) as target:
        assert np.array_equal(asyncio.run(steps(target)), -0.5 * X)
        with grpc.secure_channel(target, credentials) as channel:
            health = health_pb2_grpc.HealthStub(channel)
            answer = health.Check(health_pb2.HealthCheckRequest(), timeout=30)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
            watch = health.Watch(health_pb2.HealthCheckRequest(), timeout=30)
            assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
            watch.cancel()


def test_who_trusts_another_certificate_or_none_does_not_reach_a_secured_server(identity):
    own, other = identity("server"), identity("other")
    with serving(grpc.ssl_server_credentials([(own.key, own.certificate)])) as target:
        for credentials in (None, grpc.ssl_channel_credentials(other.certificate)):
            config = optserve.ClientConfig(connect_timeout_s=1.0, credentials=credentials)
            with pytest.raises(optserve.OptserveError) as refused:
                optserve.connect(target, config)
            assert isinstance(refused.value, (optserve.UnavailableError, optserve.DeadlineExceededError))


def test_a_server_can_ask_for_certificates_of_its_clients(identity):
    own, known, stranger = identity("server"), identity("known"), identity("stranger")
    credentials = grpc.ssl_server_credentials(
        [(own.key, own.certificate)], root_certificates=known.certificate, require_client_auth=True
    )
    with serving(credentials) as target:
        for who in (known, stranger):
            given = grpc.ssl_channel_credentials(own.certificate, who.key, who.certificate)
            config = optserve.ClientConfig(connect_timeout_s=10.0 if who is known else 1.0, credentials=given)
            if who is known:
                with optserve.connect(target, config) as client:
                    every_shape_of_call(client, "a")
            else:
                with pytest.raises(optserve.OptserveError):
                    optserve.connect(target, config)


def test_metadata_is_sent_with_every_call_and_a_server_interceptor_sees_each_of_them():
    seen = Seen()
    metadata = (TOKEN, ("trace-bin", b"\x00\xff"))
    with serving(None, seen) as target, optserve.connect(target, optserve.ClientConfig(metadata=metadata)) as client:
        for name in ("a", "b"):
            every_shape_of_call(client, name)
    assert set(dict(seen.calls)) >= SHAPES
    # Each call, and not only the first of its method.
    assert all(count >= 2 for method, count in Counter(method for method, _ in seen.calls).items() if method in SHAPES)
    for method, given in seen.calls:
        assert (given["authorization"], given["trace-bin"]) == ("Bearer hunter2", b"\x00\xff"), method


def test_a_server_interceptor_can_refuse_calls():
    class Guard(grpc.ServerInterceptor):
        def intercept_service(self, continuation, handler_call_details):
            if TOKEN in [(key, value) for key, value in handler_call_details.invocation_metadata]:
                return continuation(handler_call_details)

            def refuse(_requests, context):
                context.abort(grpc.StatusCode.UNAUTHENTICATED, "no token")

            return grpc.stream_unary_rpc_method_handler(refuse)

    with serving(None, Guard()) as target:
        with pytest.raises(optserve.OptserveError, match="no token"):
            optserve.connect(target, optserve.ClientConfig(connect_timeout_s=5.0))
        with optserve.connect(target, optserve.ClientConfig(metadata=[TOKEN])) as client:
            every_shape_of_call(client, "a")


@pytest.mark.parametrize("way", ["another handler", "an exception"])
def test_calls_that_an_interceptor_refuses_late_take_nothing_from_the_others(way, monkeypatch):
    # pytest would keep what gRPC logs of each exception, and with it the frame that has the call's handler.
    monkeypatch.setattr(logging.getLogger("grpc._server"), "disabled", True)

    class Guard(grpc.ServerInterceptor):
        """Asks for the handler first, as many do, and looks at the token after that."""

        def intercept_service(self, continuation, handler_call_details):
            handler = continuation(handler_call_details)
            if TOKEN in [(key, value) for key, value in handler_call_details.invocation_metadata]:
                return handler
            if way == "an exception":
                raise PermissionError("no token")
            return grpc.stream_unary_rpc_method_handler(
                lambda _requests, context: context.abort(grpc.StatusCode.UNAUTHENTICATED, "no token")
            )

    with serving(None, Guard()) as target, grpc.insecure_channel(target) as channel:
        check = channel.unary_unary("/grpc.health.v1.Health/Check", None, None)
        threads = ARRIVING + LEAVING
        for _ in range(threads + 1):
            with pytest.raises(grpc.RpcError):
                check(b"", timeout=30)
        assert check(b"", timeout=30, metadata=(TOKEN,))


def test_a_client_interceptor_sees_every_call_with_its_metadata():
    watching = Watching()
    with serving() as target:
        config = optserve.ClientConfig(metadata=[TOKEN], interceptors=[watching])
        with optserve.connect(target, config) as client:
            every_shape_of_call(client, "a")
    assert set(dict(watching.calls)) >= SHAPES
    assert all(TOKEN in metadata for _, metadata in watching.calls)


def test_a_workers_lease_is_renewed_after_an_interceptor_has_raised():
    entered, renewed = threading.Event(), threading.Event()

    class Failing(Watching):
        """Raises once, in the first renewal of a lease."""

        has_raised = False

        def _go_on(self, continuation, details, request):
            if details.method.endswith("/ReportWorker") and entered.is_set():
                if not self.has_raised:
                    self.has_raised = True
                    raise RuntimeError("no fresh token")
                renewed.set()
            return continuation(details, request)

    with serving() as target, optserve.connect(target, optserve.ClientConfig(interceptors=[Failing()])) as client:
        consistency = optserve.Sync(1, lease_s=1.0)
        client.create_optimizer("a", optserve.Sgd(), {"x": X}, hosted=True, consistency=consistency)
        with client.worker("a"):
            entered.set()
            assert renewed.wait(30)


def test_a_client_with_interceptors_that_is_closed_says_so(monkeypatch):
    class Closing(Watching):
        """Lets another thread close the client while a stream begins."""

        def _go_on(self, continuation, details, request):
            if details.method.endswith("/ExportState"):
                client.close()
            return continuation(details, request)

    with serving() as target:
        client = optserve.connect(target, optserve.ClientConfig(interceptors=[Closing()]))
        opt = client.create_optimizer("a", optserve.Sgd(), {"x": X})
        with pytest.raises(optserve.ClientUseError, match="closed"):
            opt.export_state()


def test_a_call_with_interceptors_can_be_cancelled():
    arrived, go_on = threading.Event(), threading.Event()

    class Slow(Watching):
        def _go_on(self, continuation, details, request):
            if details.method.endswith("/GetOptimizer"):
                arrived.set()
            return continuation(details, request)

    class Holding(grpc.ServerInterceptor):
        def intercept_service(self, continuation, handler_call_details):
            if not handler_call_details.method.endswith("/GetOptimizer"):
                return continuation(handler_call_details)
            return grpc.stream_unary_rpc_method_handler(lambda _requests, _context: go_on.wait(30) and b"")

    async def cancelled(target: str) -> None:
        async with aio.connect(target, optserve.ClientConfig(interceptors=[Slow()])) as client:
            asked = asyncio.create_task(client.optimizer("a"))
            await asyncio.to_thread(arrived.wait, 30)
            asked.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asyncio.wait_for(asked, 20)

    with serving(None, Holding()) as target:
        try:
            asyncio.run(cancelled(target))
        finally:
            go_on.set()


def test_no_secret_is_shown():
    secrets: Any = {"metadata": [TOKEN], "interceptors": [Watching()]}
    config = optserve.ClientConfig(credentials=grpc.ssl_channel_credentials(), **secrets)
    assert "hunter2" not in repr(config)
    assert "redentials" not in repr(config)
    assert config == optserve.ClientConfig(credentials=config.credentials, **secrets)
    assert hash(config)
    with pytest.raises(ValueError, match="authorization must be") as refused:
        optserve.ClientConfig(metadata=[("authorization", "hunter2\n")])
    assert "hunter2" not in str(refused.value)
    with pytest.raises(ValueError, match="key of metadata") as refused:
        optserve.ClientConfig(metadata=[("Bearer hunter2", "authorization")])
    assert "hunter2" not in str(refused.value)


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        (("Authorization", "x"), "key of metadata"),
        (("grpc-timeout", "1S"), "key of metadata"),
        (("", "x"), "key of metadata"),
        (("trace-bin", "x"), "must be bytes"),
        (("trace", b"x"), "printable ASCII"),
        (("trace", "ü"), "printable ASCII"),
    ],
)
def test_metadata_that_cannot_be_sent_is_refused(pair, message):
    with pytest.raises(ValueError, match=message):
        optserve.ClientConfig(metadata=[pair])
