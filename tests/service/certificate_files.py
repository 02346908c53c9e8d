"""Files with certificates, what a server shows of them, and the command that makes them."""

import os
import socket
import ssl
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from optserve.cli import authority

DAY = timedelta(days=1)
HOSTS = ["localhost", "127.0.0.1", "::1"]


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
    """Make an authority if there is none, and new certificates for a server and a client."""
    issuer = authority.load_or_make(folder, life)
    issuer.issue("server", life, HOSTS)
    issuer.issue("client", life)


def seen(target: str, folder: Path) -> int:
    """The serial number of the certificate that the server shows to its client now."""
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


def serial(path: Path) -> int:
    return x509.load_pem_x509_certificate(path.read_bytes()).serial_number


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
