"""A local authority, which signs certificates for servers and clients. Its files lie in one folder."""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

AUTHORITY, AUTHORITY_KEY = "authority.pem", "authority-key.pem"

AUTHORITY_LIFE = timedelta(days=3650)

_EARLIER = timedelta(minutes=5)
"""Certificates are valid from so long ago on, for machines whose clocks are slow."""

_HOST = re.compile(r"(\*\.)?[A-Za-z0-9_]([A-Za-z0-9_-]*[A-Za-z0-9_])?(\.[A-Za-z0-9_]([A-Za-z0-9_-]*[A-Za-z0-9_])?)*")


class AuthorityError(ValueError):
    """The authority cannot be used, or cannot sign what was asked for."""


@dataclass(frozen=True)
class Authority:
    """An authority, open for signing.

    Attributes:
        folder: The folder of its files.
        certificate: Its own.
        key: Its private key.
    """

    folder: Path
    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    def issue(self, name: str, life: timedelta, hosts: Sequence[str] = ()) -> list[str]:
        """Make a key and a certificate, and write them to NAME-key.pem and NAME.pem.

        Args:
            name: Common name of the subject.
            life: How long it is valid, at most as long as the authority.
            hosts: Names and addresses of a server; none for a client.

        Returns:
            What was made, in words: its name, whom it is for, until when, its file.

        Raises:
            AuthorityError: A host is neither a name nor an address.
            OSError: The files cannot be written.
        """
        key = ec.generate_private_key(ec.SECP256R1())
        usage = ExtendedKeyUsageOID.SERVER_AUTH if hosts else ExtendedKeyUsageOID.CLIENT_AUTH
        until = min(datetime.now(UTC) + life, self.certificate.not_valid_after_utc)
        builder = (
            _builder(name, key, until)
            .issuer_name(self.certificate.subject)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key()),
                critical=False,
            )
        )
        if hosts:
            builder = builder.add_extension(
                x509.SubjectAlternativeName([_host(host) for host in hosts]), critical=False
            )
        certificate = builder.sign(self.key, hashes.SHA256())
        # The key first: whoever reads the new certificate finds the key that belongs to it.
        _write(self.folder / f"{name}-key.pem", _private(key), secret=True)
        _write(self.folder / f"{name}.pem", certificate.public_bytes(Encoding.PEM), secret=False)
        return [name, ", ".join(hosts) or f"the client {name}", f"{until:%Y-%m-%d}", f"{name}.pem"]


def load_or_make(folder: Path, life: timedelta) -> Authority:
    """The authority of a folder, made now if there is none.

    Args:
        folder: Made if it does not exist.
        life: How long certificates are to be valid.

    Raises:
        AuthorityError: The authority is damaged, incomplete or no longer valid for that long.
        OSError: The folder cannot be used.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    certificate_path, key_path = folder / AUTHORITY, folder / AUTHORITY_KEY
    if certificate_path.exists() != key_path.exists():
        missing = key_path if certificate_path.exists() else certificate_path
        raise AuthorityError(f"{missing} is missing; without it, the authority in {folder} cannot sign.")
    if not certificate_path.exists():
        return _make(folder, max(AUTHORITY_LIFE, life))
    try:
        certificate = x509.load_pem_x509_certificate(certificate_path.read_bytes())
        key = load_pem_private_key(key_path.read_bytes(), password=None)
    except (ValueError, TypeError) as error:
        raise AuthorityError(f"The authority in {folder} is damaged: {error}.") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != certificate.public_key():
        raise AuthorityError(f"{AUTHORITY_KEY} in {folder} does not belong to {AUTHORITY}.")
    if certificate.not_valid_after_utc <= datetime.now(UTC):
        raise AuthorityError(f"The authority in {folder} has expired; make another one in a new folder.")
    return Authority(folder, certificate, key)


def _make(folder: Path, life: timedelta) -> Authority:
    key = ec.generate_private_key(ec.SECP256R1())
    builder = _builder("optserve authority", key, datetime.now(UTC) + life)
    certificate = (
        builder.issuer_name(_subject("optserve authority"))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_KEY_USAGE_OF_AUTHORITY, critical=True)
        .sign(key, hashes.SHA256())
    )
    _write(folder / AUTHORITY_KEY, _private(key), secret=True)
    _write(folder / AUTHORITY, certificate.public_bytes(Encoding.PEM), secret=False)
    return Authority(folder, certificate, key)


_KEY_USAGE_OF_AUTHORITY = x509.KeyUsage(
    digital_signature=False,
    content_commitment=False,
    key_encipherment=False,
    data_encipherment=False,
    key_agreement=False,
    key_cert_sign=True,
    crl_sign=True,
    encipher_only=False,
    decipher_only=False,
)


def _builder(name: str, key: ec.EllipticCurvePrivateKey, until: datetime) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(_subject(name))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(datetime.now(UTC) - _EARLIER)
        .not_valid_after(until)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )


def _subject(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _host(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host.strip("[]")))
    except ValueError:
        if not _HOST.fullmatch(host) or len(host) > 253:
            raise AuthorityError(
                f"{host!r} is neither a host's name nor an address; leave out the port and the scheme."
            ) from None
        return x509.DNSName(host)


def _private(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _write(path: Path, content: bytes, *, secret: bool) -> None:
    """Replace a file as a whole, so that nobody reads a part of it."""
    whole = path.with_name(f".{path.name}.{os.getpid()}")
    descriptor = os.open(whole, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600 if secret else 0o644)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        whole.replace(path)
    except BaseException:
        whole.unlink(missing_ok=True)
        raise
