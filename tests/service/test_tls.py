"""Connections secured by TLS: who is let in, and certificates that are replaced while server and clients run."""

import re
import socket
import ssl
import subprocess
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

import optserve
from optserve.cli import authority
from optserve_command import probe
from service.certificate_files import DAY, HOSTS, command, issue, seen, serial, signed

X = np.ones(1000, np.float32)
BRIEF_S = 3.0
"""Seconds for a client that is not let in: enough for one handshake on a busy machine, which says why."""


def options(folder: Path, *, clients: bool = False) -> list[str]:
    """Options of a server with these certificates; if `clients`, it lets in its clients only."""
    given = ["--tls-certificate", str(folder / "server.pem"), "--tls-key", str(folder / "server-key.pem")]
    return [*given, "--tls-client-authority", str(folder / "authority.pem")] if clients else given


def trusting(folder: Path, *, pair: Path | None = None, server_name: str = "", patience_s: float = 10.0):
    """The settings of a client that trusts this authority."""
    tls = optserve.Tls(
        folder / "authority.pem",
        pair / "client.pem" if pair else "",
        pair / "client-key.pem" if pair else "",
        server_name,
    )
    return optserve.ClientConfig(tls=tls, connect_timeout_s=patience_s)


def step(client: optserve.Client, name: str) -> None:
    """Every shape of call."""
    opt = client.create_optimizer(name, optserve.Sgd(learning_rate=0.5), {"x": X}, hosted=True)
    assert np.array_equal(opt.step({"x": X})["x"], -0.5 * X)
    assert np.array_equal(opt.pull_parameters().arrays["x"], 0.5 * X)
    opt.import_state(opt.export_state())
    client.delete_optimizer(name)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("certificates")
    issue(folder)
    return folder


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of another authority."""
    folder = tmp_path_factory.mktemp("others")
    issue(folder)
    return folder


@pytest.fixture(scope="module")
def secured(folder: Path) -> Iterator[optserve.LocalServer]:
    """A server that lets in anybody who speaks TLS."""
    with optserve.local_server(backend="numpy", options=options(folder)) as server:
        yield server


@pytest.fixture(scope="module")
def mutual(folder: Path) -> Iterator[optserve.LocalServer]:
    """A server that lets in its clients only."""
    with optserve.local_server(backend="numpy", options=options(folder, clients=True)) as server:
        yield server


def test_a_client_that_trusts_the_authority_makes_every_call(secured, folder):
    with optserve.connect(secured.target, trusting(folder)) as client:
        step(client, "a")


def test_a_client_with_a_certificate_makes_every_call(mutual, folder):
    with optserve.connect(mutual.target, trusting(folder, pair=folder)) as client:
        step(client, "a")


def test_commands_and_health_checks_take_certificates_from_the_environment(mutual, folder):
    environment = {
        "OPTSERVE_CLIENT_TLS_AUTHORITY": str(folder / "authority.pem"),
        "OPTSERVE_CLIENT_TLS_CERTIFICATE": str(folder / "client.pem"),
        "OPTSERVE_CLIENT_TLS_KEY": str(folder / "client-key.pem"),
    }
    for arguments in (["health"], ["info"], ["optimizers", "list"]):
        done = command(*arguments, "--target", mutual.target, **environment)
        assert done.returncode == 0, done.stderr
    without = command("health", "--target", mutual.target)
    assert without.returncode == 1
    incomplete = command(
        "info", "--target", mutual.target, OPTSERVE_CLIENT_TLS_KEY=environment["OPTSERVE_CLIENT_TLS_KEY"]
    )
    assert incomplete.returncode == 1
    assert "OPTSERVE_CLIENT_TLS_CERTIFICATE" in incomplete.stderr


@pytest.mark.parametrize("form", ["127.0.0.1:{}", "ipv4:127.0.0.1:{}", "dns:///localhost:{}", "dns:localhost:{}"])
def test_a_health_check_over_tls_takes_every_form_of_a_target(mutual, folder, form):
    tls = {name: str(folder / file) for name, file in FILES.items()}
    assert probe.ask(form.format(mutual.target.rpartition(":")[2]), 10, tls) == "SERVING"


@pytest.mark.parametrize("listening", [["--host", "::1"], ["--uds", "{}/socket"]])
def test_a_health_check_over_tls_finds_the_server_wherever_it_listens(folder, tmp_path, listening):
    given = [part.format(tmp_path) for part in listening]
    with optserve.local_server(backend="numpy", options=[*options(folder), *given]) as server:
        for target in (server.target, server.target.replace("[::1]", "ipv6:[::1]")):
            assert probe.ask(target, 10, {"authority": str(folder / "authority.pem")}) == "SERVING"


def test_a_health_check_trusts_an_authority_that_another_one_has_signed_as_grpc_does(folder, tmp_path):
    """Python's own functions demand the root, or more than that, by their version."""
    issuer = authority.load_or_make(folder, DAY)
    root = ec.generate_private_key(ec.SECP256R1())
    (tmp_path / "authority.pem").write_bytes(
        signed(root, of=issuer.key.public_key(), subject=issuer.certificate.subject, authority=True)
    )
    with optserve.local_server(backend="numpy", options=options(folder)) as server:
        assert probe.ask(server.target, 10, {"authority": str(tmp_path / "authority.pem")}) == "SERVING"
        optserve.connect(server.target, trusting(tmp_path)).close()


def test_an_authority_between_the_two_goes_with_the_certificate(tmp_path):
    """The root, with an RSA key, has signed an authority, which has signed the certificates of server and client."""
    root = rsa.generate_private_key(65537, 2048)
    issuer = authority.load_or_make(tmp_path, DAY)
    issue(tmp_path)
    between = signed(root, of=issuer.key.public_key(), subject=issuer.certificate.subject, authority=True)
    for name in ("server.pem", "client.pem"):
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes() + between)
    (tmp_path / "authority.pem").write_bytes(signed(root, authority=True))
    with (
        optserve.local_server(backend="numpy", options=options(tmp_path, clients=True)) as server,
        optserve.connect(server.target, trusting(tmp_path, pair=tmp_path)) as client,
    ):
        step(client, "a")


FILES = {"authority": "authority.pem", "certificate": "client.pem", "key": "client-key.pem"}

UNHEALTHY = {
    "nothing": (dict.fromkeys(FILES, ""), "closes the connection; it may ask for TLS"),
    "no pair": (
        {"certificate": "", "key": ""},
        "it may ask for a client's certificate|refuses the connection over TLS",
    ),
    "half a pair": ({"certificate": ""}, "a certificate and its key must be given together"),
    "a missing authority": ({"authority": "missing.pem"}, r"missing.pem cannot be used \(No such file or directory\)"),
    "a missing key": ({"key": "missing.pem"}, "client.pem or .*missing.pem cannot be used"),
    "a damaged authority": ({"authority": "client-key.pem"}, "client-key.pem cannot be used"),
    "another name": (
        {"server_name": "elsewhere.example"},
        "not trusted: Hostname mismatch, .*'elsewhere.example'; OPTSERVE_CLIENT_TLS_SERVER_NAME names another.$",
    ),
    "no name": ({"server_name": ".x"}, "'.x' is not the name of a host"),
}


@pytest.mark.parametrize("what", UNHEALTHY)
def test_a_health_check_that_fails_over_tls_is_a_sentence_with_the_reason(mutual, folder, what):
    changed, message = UNHEALTHY[what]
    tls = {name: str(folder / file) for name, file in (FILES | changed).items() if file}
    if "server_name" in changed:
        tls["server_name"] = changed["server_name"]
    with pytest.raises(probe.ProbeError, match=message) as failed:
        probe.ask(mutual.target, 10, tls)
    assert not str(failed.value).endswith("..")


def test_a_health_check_waits_no_longer_for_a_handshake_than_it_may(folder):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        target = f"127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(probe.ProbeError, match=r"does not answer within 0.5 s"):
            probe.ask(target, 0.5, {"authority": str(folder / "authority.pem")})


def test_a_command_that_is_not_let_in_says_it_in_one_line(mutual, other):
    environment = {"OPTSERVE_CLIENT_TLS_AUTHORITY": str(other / "authority.pem")}
    done = command("info", "--target", mutual.target, **environment)
    assert done.returncode == 1
    lines = [line for line in done.stderr.splitlines() if not line.startswith("still trying")]
    assert len(lines) == 1, done.stderr
    assert "has not signed the server's certificate" in lines[0]


REFUSED = {
    "a plain connection": (lambda folder, _other: optserve.ClientConfig(connect_timeout_s=BRIEF_S), "may ask for TLS"),
    "another authority": (
        lambda folder, other: trusting(other, pair=folder, patience_s=BRIEF_S),
        "has not signed the server's certificate",
    ),
    "no certificate": (lambda folder, _other: trusting(folder, patience_s=BRIEF_S), "or for a client's certificate"),
    "a certificate of another authority": (
        lambda folder, other: trusting(folder, pair=other, patience_s=BRIEF_S),
        "or for a client's certificate",
    ),
    "another server's name": (
        lambda folder, _other: trusting(folder, pair=folder, server_name="elsewhere.example", patience_s=BRIEF_S),
        "certificate is for another name",
    ),
}


@pytest.mark.parametrize("who", REFUSED)
def test_others_are_not_let_in_and_are_told_why(mutual, folder, other, who):
    config, why = REFUSED[who]
    with pytest.raises(optserve.UnreachableError, match=why):
        optserve.connect(mutual.target, config(folder, other))


def test_a_client_whose_certificate_has_expired_is_not_let_in(mutual, folder, tmp_path):
    issuer = authority.load_or_make(folder, DAY)
    expired = authority.Authority(tmp_path, issuer.certificate, issuer.key)
    expired.issue("client", -timedelta(seconds=1))
    with pytest.raises(optserve.UnreachableError, match="or for a client's certificate"):
        optserve.connect(mutual.target, trusting(folder, pair=tmp_path, patience_s=BRIEF_S))


def test_a_secured_client_does_not_speak_to_a_plain_server(server, folder):
    with pytest.raises(optserve.UnreachableError, match="does not speak TLS"):
        optserve.connect(server.target, trusting(folder, patience_s=BRIEF_S))


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion.TLSv1_1 is deprecated")
def test_versions_of_tls_before_1_2_are_refused(secured):
    with pytest.raises(ssl.SSLError):
        handshake(secured.target, ssl.TLSVersion.TLSv1_1)
    assert handshake(secured.target, ssl.TLSVersion.TLSv1_2)


def handshake(target: str, version: ssl.TLSVersion = ssl.TLSVersion.TLSv1_2) -> int:
    """The serial number of the server's certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    # Or this side would refuse the old versions.
    context.set_ciphers("ALL:@SECLEVEL=0")
    context.minimum_version = context.maximum_version = version
    context.set_alpn_protocols(["h2"])
    host, _, port = target.rpartition(":")
    with socket.create_connection((host, int(port)), 10) as plain, context.wrap_socket(plain) as secured:
        der = secured.getpeercert(binary_form=True)
    assert der is not None
    return x509.load_der_x509_certificate(der).serial_number


def test_new_certificates_are_used_by_new_connections_and_end_no_stream(tmp_path):
    """Several times, while 20 streams step: none is lost, none doubled."""
    issue(tmp_path)
    with (
        optserve.local_server(backend="numpy", options=options(tmp_path, clients=True)) as server,
        optserve.connect(server.target, trusting(tmp_path, pair=tmp_path)) as client,
    ):
        names = [f"a{number}" for number in range(20)]
        for name in names:
            client.create_optimizer(name, optserve.Sgd(learning_rate=1.0), {"x": X})
        open_ones = [client.optimizer(name, transport="grpc") for name in names]
        for turn in range(1, 6):
            for opt in open_ones:
                assert np.array_equal(opt.step({"x": X})["x"], -X)
            issue(tmp_path)
            # The server's side of a handshake that ends early counts too.
            assert seen(server.target, tmp_path) == serial(tmp_path / "server.pem")
            with optserve.connect(server.target, trusting(tmp_path, pair=tmp_path)) as later:
                assert [later.optimizer(name).current_step for name in names] == [turn] * len(names)
        for opt in open_ones:
            opt.step({"x": X})
            opt.close()


def test_a_client_takes_over_a_new_authority_while_its_stream_goes_on(tmp_path):
    """Nothing of the old authority is left: new calls have the new files, the stream its old connection."""
    issue(tmp_path)
    with (
        optserve.local_server(backend="numpy", options=options(tmp_path, clients=True)) as server,
        optserve.connect(server.target, trusting(tmp_path, pair=tmp_path)) as client,
    ):
        client.create_optimizer("a", optserve.Sgd(learning_rate=1.0), {"x": X})
        stream = client.optimizer("a", transport="grpc")
        stream.step({"x": X})
        before = (tmp_path / "authority.pem").read_bytes()
        for name in ("authority", "authority-key"):
            (tmp_path / f"{name}.pem").unlink()
        issue(tmp_path)
        assert (tmp_path / "authority.pem").read_bytes() != before
        stream.step({"x": X})
        assert client.optimizer("a").current_step == 2
        client.optimizer("a", transport="grpc").step({"x": X})
        assert client.optimizer("a").current_step == 3


def test_files_that_do_not_belong_together_are_not_used_and_the_server_goes_on(tmp_path, other, capfd):
    issue(tmp_path)
    with subprocess.Popen(
        [
            *(sys.executable, "-P", "-m", "optserve_server", "--port", "0", "--backend", "numpy"),
            *("--announce", "--exit-on-eof", "--log-level", "info", *options(tmp_path)),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        target = process.stdout.readline().split()[1]
        used = serial(tmp_path / "server.pem")
        (tmp_path / "server.pem").write_bytes((other / "server.pem").read_bytes())
        assert handshake(target) == used
        assert handshake(target) == used
        (tmp_path / "server-key.pem").write_bytes((other / "server-key.pem").read_bytes())
        assert handshake(target) == serial(other / "server.pem")
        process.stdin.close()
        log = process.stderr.read()
    assert log.count("the new certificate is not used") == 1
    assert "does not belong to the certificate" in log
    assert log.count("new certificate: for localhost") == 1


def test_a_key_that_grpc_does_not_take_is_named_by_the_client(mutual, folder, tmp_path):
    key = ed25519.Ed25519PrivateKey.generate()
    (tmp_path / "client-key.pem").write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    (tmp_path / "client.pem").write_bytes(signed(key))
    with pytest.raises(optserve.UnreachableError, match="key is of another type than RSA, or elliptic curve P-256"):
        optserve.connect(mutual.target, trusting(folder, pair=tmp_path, patience_s=BRIEF_S))


def damaged(tmp_path: Path, folder: Path, other: Path, what: str) -> list[str]:
    """Options of a server that cannot be started."""
    certificate, key, clients = folder / "server.pem", folder / "server-key.pem", folder / "authority.pem"
    made = tmp_path / "made.pem"
    if what == "no such file":
        certificate = tmp_path / "missing.pem"
    elif what == "no certificate in it":
        certificate = key
    elif what == "no key in it":
        key = certificate
    elif what == "another key":
        key = other / "server-key.pem"
    elif what == "clients without a certificate":
        made.write_text("nothing")
        clients = made
    elif what == "expired":
        issuer = authority.load_or_make(folder, DAY)
        authority.Authority(tmp_path, issuer.certificate, issuer.key).issue("old", -timedelta(seconds=1), HOSTS)
        certificate, key = tmp_path / "old.pem", tmp_path / "old-key.pem"
    elif what == "an expired authority of clients":
        key_of_authority = ec.generate_private_key(ec.SECP256R1())
        made.write_bytes(signed(key_of_authority, until=-timedelta(seconds=1)))
        clients = made
    elif what == "a key of another type":
        other_key = ed25519.Ed25519PrivateKey.generate()
        made.write_bytes(signed(other_key))
        certificate, key = made, tmp_path / "key.pem"
        key.write_bytes(other_key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    elif what == "an encrypted key":
        made.write_text("-----BEGIN ENCRYPTED PRIVATE KEY-----\nMAA=\n-----END ENCRYPTED PRIVATE KEY-----\n")
        key = made
    elif what == "no key":
        return ["--tls-certificate", str(certificate)]
    elif what == "no certificate":
        return ["--tls-client-authority", str(clients)]
    return [*options(folder)[:1], str(certificate), "--tls-key", str(key), "--tls-client-authority", str(clients)]


UNUSABLE = {
    "no such file": "missing.pem cannot be read: No such file",
    "no certificate in it": "contains no certificate",
    "no key in it": "contains no private key",
    "another key": "does not belong to the certificate",
    "clients without a certificate": "contains no certificate",
    "an expired authority of clients": "authority of the clients .*made.pem is valid from",
    "a key of another type": "is of a type that gRPC does not take",
    "expired": "is valid from",
    "an encrypted key": "private key|encrypted",
    "no key": "tls_key must be set together with tls_certificate",
    "no certificate": "needs tls_certificate",
}


@pytest.mark.parametrize("what", UNUSABLE)
def test_files_that_cannot_be_used_are_one_sentence_before_the_start(tmp_path, folder, other, what):
    given = damaged(tmp_path, folder, other, what)
    done = command("serve", "--port", "0", "--backend", "numpy", *given)
    assert done.returncode == 2
    assert re.search(UNUSABLE[what], " ".join(done.stderr.split())), done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("what", ["authority", "certificate", "key"])
def test_a_client_says_which_of_its_files_cannot_be_used(folder, tmp_path, what):
    damaged = tmp_path / "damaged.pem"
    damaged.write_text("nothing")
    for path, message in ((damaged, "damaged.pem"), (tmp_path / "missing.pem", "missing.pem cannot be read")):
        files = {
            "authority": folder / "authority.pem",
            "certificate": folder / "client.pem",
            "key": folder / "client-key.pem",
        } | {what: path}
        with pytest.raises(optserve.InvalidArgumentError, match=message):
            optserve.connect("127.0.0.1:1", optserve.ClientConfig(tls=optserve.Tls(**files)))


def test_half_a_pair_is_refused():
    with pytest.raises(ValueError, match="together"):
        optserve.Tls(certificate="client.pem")
