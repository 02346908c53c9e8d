"""Connections secured by TLS: who is let in, and certificates that are replaced while server and clients run."""

import os
import re
import socket
import ssl
import stat
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

import optserve
from optserve.cli import authority
from optserve_command import probe

X = np.ones(1000, np.float32)
DAY = timedelta(days=1)
HOSTS = ["localhost", "127.0.0.1", "::1"]
BRIEF_S = 3.0
"""Seconds for a client that is not let in: enough for one handshake on a busy machine, which says why."""


def command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `optserve`; with TLS variables if they are given."""
    code = "from optserve_command import main; main()"
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | environment,
        check=False,
    )


def issue(folder: Path, *, life: timedelta = DAY) -> None:
    """Make an authority if there is none, and new certificates for a server and two clients."""
    issuer = authority.load_or_make(folder, DAY)
    issuer.issue("server", life, HOSTS)
    issuer.issue("client", life)


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


def signed(
    key: ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey | rsa.RSAPrivateKey,
    *,
    of: Any = None,
    subject: x509.Name | None = None,
    authority: bool = False,
    until: timedelta = DAY,
) -> bytes:
    """A certificate that this key has signed: of another one, or its own."""
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "self")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject or name)
        .issuer_name(name)
        .public_key(of or key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - DAY)
        .not_valid_after(now + until)
        .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
        .sign(key, None if isinstance(key, ed25519.Ed25519PrivateKey) else hashes.SHA256())
    )
    return certificate.public_bytes(Encoding.PEM)


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


def serial(path: Path) -> int:
    return x509.load_pem_x509_certificate(path.read_bytes()).serial_number


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
            assert handshake_of_a_client(server.target, tmp_path) == serial(tmp_path / "server.pem")
            with optserve.connect(server.target, trusting(tmp_path, pair=tmp_path)) as later:
                assert [later.optimizer(name).current_step for name in names] == [turn] * len(names)
        for opt in open_ones:
            opt.step({"x": X})
            opt.close()


def handshake_of_a_client(target: str, folder: Path) -> int:
    context = ssl.create_default_context(cafile=str(folder / "authority.pem"))
    context.load_cert_chain(folder / "client.pem", folder / "client-key.pem")
    context.set_alpn_protocols(["h2"])
    host, _, port = target.rpartition(":")
    with (
        socket.create_connection((host, int(port)), 10) as plain,
        context.wrap_socket(plain, server_hostname=host) as secured,
    ):
        der = secured.getpeercert(binary_form=True)
    assert der is not None
    return x509.load_der_x509_certificate(der).serial_number


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


def test_certs_makes_an_authority_and_signs_again(tmp_path):
    made = tmp_path / "made"
    first = command("certs", str(made), "--host", "trainer.example", "--host", "10.0.0.7", "--client", "anna")
    assert first.returncode == 0, first.stderr
    assert sorted(path.name for path in made.iterdir()) == sorted(
        f"{name}{ending}" for name in ("authority", "server", "anna") for ending in (".pem", "-key.pem")
    )
    for path in made.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == (0o600 if path.name.endswith("-key.pem") else 0o644)
    assert f"OPTSERVE_CLIENT_TLS_KEY={made}/anna-key.pem" in first.stdout
    certificate = x509.load_pem_x509_certificate((made / "server.pem").read_bytes())
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["trainer.example"]
    assert [str(address) for address in names.get_values_for_type(x509.IPAddress)] == ["10.0.0.7"]
    assert certificate.not_valid_after_utc - datetime.now(UTC) > 364 * DAY
    kept = (made / "authority.pem").read_bytes()
    assert command("certs", str(made), "--days", "2").returncode == 0
    assert (made / "authority.pem").read_bytes() == kept
    renewed = x509.load_pem_x509_certificate((made / "server.pem").read_bytes())
    assert renewed.serial_number != certificate.serial_number
    assert renewed.not_valid_after_utc - datetime.now(UTC) < 2 * DAY


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--host", "https://trainer.example"], "neither a host's name nor an address"),
        (["--host", "trainer.example:50051"], "neither a host's name nor an address"),
        (["--host", "*.*.example"], "neither a host's name nor an address"),
        (["--client", "../anna"], "cannot be the name of a client"),
        (["--client", "server"], "cannot be the name of a client"),
        (["--client", "a-key"], "cannot be the name of a client"),
    ],
)
def test_certs_refuses_what_it_cannot_sign(tmp_path, arguments, message):
    done = command("certs", str(tmp_path / "made"), *arguments)
    assert done.returncode == 1
    assert message in " ".join(done.stderr.split())
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("what", ["damaged", "without its key"])
def test_certs_does_not_replace_an_authority_that_cannot_sign(tmp_path, what):
    issue(tmp_path)
    kept = (tmp_path / "server.pem").read_bytes()
    if what == "damaged":
        (tmp_path / "authority.pem").write_text("nothing")
    else:
        (tmp_path / "authority-key.pem").unlink()
    done = command("certs", str(tmp_path))
    assert done.returncode == 1
    assert "authority" in done.stderr
    assert (tmp_path / "server.pem").read_bytes() == kept


def test_certs_replaces_a_key_and_its_certificate_or_neither(tmp_path):
    """Here with a limit of 512 bytes for a file: a key is shorter, a certificate longer."""
    issue(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert len(before["server-key.pem"]) < 512 < len(before["server.pem"])
    code = (
        "import resource, sys; from optserve.cli import main; "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (512, 512)); sys.argv[1:] = ['certs', sys.argv[1]]; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 1
    assert "File too large" in done.stderr
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_certs_works_in_a_folder_alone(tmp_path):
    with authority.working_in(tmp_path):
        done = command("certs", str(tmp_path))
    assert done.returncode == 1
    assert "Another `optserve certs` works in" in done.stderr
    assert not list(tmp_path.iterdir())


def test_certs_takes_no_authority_from_a_folder_into_which_everybody_may_write(tmp_path):
    tmp_path.chmod(0o1777)
    done = command("certs", str(tmp_path))
    assert done.returncode == 1
    assert "Everybody may write into" in done.stderr
    assert not list(tmp_path.iterdir())


def test_certs_replaces_a_link_and_not_what_it_leads_to(tmp_path):
    (tmp_path / "made").mkdir()
    (tmp_path / "theirs").write_text("kept")
    (tmp_path / "made/server-key.pem").symlink_to(tmp_path / "theirs")
    assert command("certs", str(tmp_path / "made")).returncode == 0
    assert (tmp_path / "theirs").read_text() == "kept"
    assert stat.S_IMODE((tmp_path / "made/server-key.pem").lstat().st_mode) == 0o600


def test_certs_says_that_the_authority_ends_before_the_days_are_over(tmp_path):
    made = tmp_path / "made"
    authority.load_or_make(made, DAY)
    # An address with its brackets is the address.
    done = command("certs", str(made), "--host", "[::1]", "--days", "3650")
    assert done.returncode == 0, done.stderr
    assert "The authority ends" not in done.stdout
    assert "--target [::1]:50051" in done.stdout
    certificate = x509.load_pem_x509_certificate((made / "authority.pem").read_bytes())
    key = serialization.load_pem_private_key((made / "authority-key.pem").read_bytes(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    short = signed(key, subject=certificate.subject, authority=True)
    (made / "authority.pem").write_bytes(short)
    done = command("certs", str(made), "--days", "30")
    assert done.returncode == 0, done.stderr
    assert "The authority ends before the 30 days are over" in done.stdout
