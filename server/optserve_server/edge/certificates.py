"""The certificates of the port. They are read anew when their files have changed, so a server keeps running."""

from __future__ import annotations

import logging
from datetime import UTC, datetime
from pathlib import Path

import grpc
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from optserve_server.domain.config import ConfigError

logger = logging.getLogger(__name__)

_Identity = tuple[tuple[int, int, int], ...]


class Certificates:
    """A server's key and certificate, and the authority of its clients.

    gRPC asks for them before each handshake. A change of the files counts from the next connection on; connections that
    are open stay open.

    Args:
        certificate: PEM file: the server's certificate, followed by those that lead to its authority.
        key: PEM file: its private key, not encrypted.
        client_authority: PEM file: the authority of the clients' certificates. None to ask clients for none.

    Attributes:
        summary: Whom the certificate is for and until when, in words.

    Raises:
        ConfigError: A file cannot be read, or they do not belong together, or the certificate is not valid now.
    """

    def __init__(self, certificate: Path, key: Path, client_authority: Path | None) -> None:
        self._certificate = certificate
        self._key = key
        self._client_authority = client_authority
        self._files = self._identity()
        self._configuration = self._read()

    @property
    def credentials(self) -> grpc.ServerCredentials:
        """For the port. With an authority of clients, a client without a certificate of it is refused."""
        return grpc.dynamic_ssl_server_credentials(
            self._configuration,
            self._changed,  # pyright: ignore[reportArgumentType] - None stands for no change; the stubs lack it
            require_client_authentication=self._client_authority is not None,
        )

    def _changed(self) -> grpc.ServerCertificateConfiguration | None:
        """The new certificates if the files have changed and are valid; None to go on with the present ones."""
        files = self._identity()
        if files == self._files:
            return None
        # Also if they are not valid, so that the log has one entry for each change.
        self._files = files
        try:
            self._configuration = self._read()
        except ConfigError as error:
            logger.warning("the new certificate is not used; the one before stays in use: %s", error)
            return None
        logger.info("new certificate: %s", self.summary)
        return self._configuration

    def _identity(self) -> _Identity:
        """What differs after a file was written or replaced."""
        return tuple(_identity(path) for path in (self._certificate, self._key, self._client_authority) if path)

    def _read(self) -> grpc.ServerCertificateConfiguration:
        certificate, key = _bytes(self._certificate), _bytes(self._key)
        self.summary = _check_pair(self._certificate, certificate, self._key, key)
        authority = None
        if self._client_authority is not None:
            authority = _bytes(self._client_authority)
            _certificates(self._client_authority, authority)
        return grpc.ssl_server_certificate_configuration([(key, certificate)], authority)


def _identity(path: Path) -> tuple[int, int, int]:
    try:
        status = path.stat()
    except OSError:
        return (0, 0, 0)
    return (status.st_ino, status.st_mtime_ns, status.st_size)


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}.") from error


def _certificates(path: Path, pem: bytes) -> list[x509.Certificate]:
    """The certificates of a PEM file; at least one."""
    try:
        return x509.load_pem_x509_certificates(pem)
    except ValueError as error:
        raise ConfigError(f"{path} contains no certificate in PEM form, or a damaged one.") from error


def _check_pair(certificate_path: Path, certificate_pem: bytes, key_path: Path, key_pem: bytes) -> str:
    """Check a certificate and its key, and describe them.

    Raises:
        ConfigError: They are damaged, do not belong together, or are not valid now.
    """
    certificate = _certificates(certificate_path, certificate_pem)[0]
    try:
        key = load_pem_private_key(key_pem, password=None)
    except TypeError as error:
        raise ConfigError(f"The key {key_path} is encrypted; a server needs one without a password.") from error
    except (ValueError, UnsupportedAlgorithm) as error:
        raise ConfigError(f"{key_path} contains no private key in PEM form, or a damaged one.") from error
    if key.public_key() != certificate.public_key():
        raise ConfigError(f"The key {key_path} does not belong to the certificate {certificate_path}.")
    now = datetime.now(UTC)
    begin, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if not begin <= now <= end:
        raise ConfigError(
            f"The certificate {certificate_path} is valid from {begin:%Y-%m-%d %H:%M} to {end:%Y-%m-%d %H:%M} UTC, not "
            "now; `optserve certs` makes another one."
        )
    return f"for {', '.join(_names(certificate)) or 'no host'} until {end:%Y-%m-%d %H:%M} UTC"


def _names(certificate: x509.Certificate) -> list[str]:
    """The hosts that a certificate is for."""
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return []
    return [
        *names.get_values_for_type(x509.DNSName),
        *(str(address) for address in names.get_values_for_type(x509.IPAddress)),
    ]
