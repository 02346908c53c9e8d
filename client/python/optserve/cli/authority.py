"""A local authority, which signs certificates for servers and clients. Its files lie in one folder."""

from __future__ import annotations

import fcntl
import ipaddress
import os
import re
import secrets
import stat
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
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

_MAX_HOST_LENGTH = 253


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
                x509.SubjectAlternativeName([_general_name(host_of(host)) for host in hosts]), critical=False
            )
        certificate = builder.sign(self.key, hashes.SHA256())
        _write_pair(self.folder, name, key, certificate)
        return [name, ", ".join(hosts) or f"the client {name}", f"{until:%Y-%m-%d}", f"{name}.pem"]


def load_or_make(folder: Path, life: timedelta) -> Authority:
    """The authority of a folder, made now if there is none.

    Args:
        folder: Made if it does not exist.
        life: How long certificates are to be valid; an authority that is there may end before.

    Raises:
        AuthorityError: The authority is damaged, incomplete or has expired.
        OSError: The folder cannot be used.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    certificate_path, key_path = folder / AUTHORITY, folder / AUTHORITY_KEY
    if certificate_path.exists() != key_path.exists():
        missing = key_path if certificate_path.exists() else certificate_path
        raise AuthorityError(
            f"{missing} is missing; without it, the authority in {folder} cannot sign. Bring it back, or make another "
            "authority in a new folder."
        )
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
    _write_pair(folder, "authority", key, certificate)
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


def host_of(text: str) -> str:
    """A host's name or address, without the brackets of an address; raises AuthorityError for anything else."""
    try:
        return str(ipaddress.ip_address(text.removeprefix("[").removesuffix("]")))
    except ValueError:
        if _HOST.fullmatch(text) and len(text) <= _MAX_HOST_LENGTH:
            return text
        raise AuthorityError(
            f"{text!r} is neither a host's name nor an address; leave out the port and the scheme."
        ) from None


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _write_pair(folder: Path, name: str, key: ec.EllipticCurvePrivateKey, certificate: x509.Certificate) -> None:
    """Replace NAME-key.pem and NAME.pem. Both are on disk before the first is replaced, so a full disk changes none."""
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    with ExitStack() as remains:
        written = []
        for file, content, mode in (
            (f"{name}-key.pem", private, 0o600),
            (f"{name}.pem", certificate.public_bytes(Encoding.PEM), 0o644),
        ):
            # A name of its own: one that a killed call has left is in nobody's way.
            whole = folder / f".{file}.{secrets.token_hex(8)}"
            remains.callback(whole.unlink, missing_ok=True)
            with os.fdopen(os.open(whole, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as output:
                output.write(content)
                output.flush()
                os.fsync(output.fileno())
            written.append((whole, folder / file))
        # The key first: whoever reads the new certificate finds the key that belongs to it. A link is replaced itself.
        for whole, path in written:
            whole.replace(path)


@contextmanager
def working_in(folder: Path) -> Iterator[None]:
    """Make the folder if it does not exist, and work in it alone for the length of a with-block.

    Raises:
        AuthorityError: Another call works in it, or everybody may write into it.
        OSError: It cannot be used.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if folder.stat().st_mode & stat.S_IWOTH:
        raise AuthorityError(
            f"Everybody may write into {folder}, so the authority in it could be anybody's; choose another folder."
        )
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise AuthorityError(f"Another `optserve certs` works in {folder}; try again when it has ended.") from None
        yield
    finally:
        os.close(descriptor)
