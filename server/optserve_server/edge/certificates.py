"""The certificates of the port. They are read anew when their files have changed, so a server keeps running."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import grpc
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from optserve._common.clock import SYSTEM, Clock, Thread
from optserve._common.replaceable import Replaceable
from optserve_server.domain.config import ConfigError

logger = logging.getLogger(__name__)

_CURVES = {"secp256r1": "P-256", "secp384r1": "P-384"}
"""Elliptic curves for which gRPC's TLS accepts a server's key."""

READ_S = 0.5
"""Seconds that a handshake waits for the files. A file system may hang; the next handshakes do not wait at all then."""

_DATE = "%Y-%m-%d %H:%M UTC"


@dataclass(frozen=True)
class _Content:
    """What gRPC gets, whom the certificate is for, and until when."""

    configuration: grpc.ServerCertificateConfiguration
    hosts: str
    until: datetime


class Certificates:
    """A server's key and certificate, and the authority of its clients.

    gRPC asks for them before each handshake. A change of the files counts from the next connection on; connections that
    are open stay open. If the files cannot be used, or their certificate expires, the log says so.

    Args:
        certificate: PEM file: the server's certificate, followed by those that lead to its authority.
        key: PEM file: its private key, not encrypted.
        client_authority: PEM file: the authority of the clients' certificates. None to ask clients for none.
        clock: The time.

    Raises:
        ConfigError: A file cannot be read, or they do not belong together, or a certificate is not valid now.
    """

    def __init__(self, certificate: Path, key: Path, client_authority: Path | None, clock: Clock = SYSTEM) -> None:
        self._certificate = certificate
        self._key = key
        self._client_authority = client_authority
        self._clock = clock
        files = [path for path in (certificate, key, client_authority) if path]
        self._files = Replaceable(files, self._read, "certificate", logger, clock)
        self._given = self._files.content
        self._reported: _Content | None = None
        self._looking: Thread | None = None

    @property
    def summary(self) -> str:
        """Whom the certificate is for and until when, in words."""
        content = self._files.content
        return f"for {content.hosts} until {content.until:{_DATE}}"

    @property
    def credentials(self) -> grpc.ServerCredentials:
        """For the port. With an authority of clients, a client without a certificate of it is refused."""
        return grpc.dynamic_ssl_server_credentials(
            self._files.content.configuration,
            self._changed,  # pyright: ignore[reportArgumentType] - None stands for no change; the stubs lack it
            require_client_authentication=self._client_authority is not None,
        )

    def _changed(self) -> grpc.ServerCertificateConfiguration | None:
        """The new certificates if the files have changed and are valid; None to go on with the present ones."""
        self._look()
        content = self._files.content
        if self._clock.now() > content.until and self._reported is not content:
            self._reported = content
            logger.error(
                "the certificate %s has expired (%s); clients refuse it", self._certificate, f"{content.until:{_DATE}}"
            )
        if content is self._given:
            return None
        self._given = content
        logger.info("new certificate: %s", self.summary)
        return content.configuration

    def _look(self) -> None:
        """Read the files if they have changed, but for no longer than READ_S.

        In a thread of its own: gRPC makes one handshake wait for the other here, in threads that also serve streams.
        """
        if self._looking is not None and self._looking.is_alive():
            return
        self._looking = self._clock.thread(self._files.renew, "certificates")
        self._looking.start()
        self._looking.join(READ_S)
        if self._looking.is_alive():
            logger.warning("the files of the certificate are not read after %s s; the one before stays in use", READ_S)

    def _read(self) -> _Content:
        pem, key = _bytes(self._certificate), _bytes(self._key)
        now = self._clock.now()
        certificate = _certificates(self._certificate, pem)[0]
        try:
            _check_key(self._key, key, certificate, self._certificate)
            hosts = ", ".join(_names(certificate)) or "no host"
        # For contents that are not what they say, the library raises one of these.
        except (UnsupportedAlgorithm, x509.DuplicateExtension, x509.UnsupportedGeneralNameType) as error:
            raise ConfigError(f"The certificate {self._certificate} cannot be used: {error}.") from error
        _check_valid([certificate], f"The certificate {self._certificate}", now)
        authority = None
        if self._client_authority is not None:
            authority = _bytes(self._client_authority)
            listed = _certificates(self._client_authority, authority)
            _check_valid(listed, f"The authority of the clients {self._client_authority}", now)
        configuration = grpc.ssl_server_certificate_configuration([(key, pem)], authority)
        return _Content(configuration, hosts, certificate.not_valid_after_utc)


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


def _check_key(path: Path, pem: bytes, certificate: x509.Certificate, certificate_path: Path) -> None:
    """Check a private key, and that it belongs to its certificate.

    Raises:
        ConfigError: The key is damaged or encrypted, is of a type that gRPC does not take, or belongs to another one.
    """
    try:
        key = load_pem_private_key(pem, password=None)
    except TypeError as error:
        raise ConfigError(f"The key {path} is encrypted; a server needs one without a password.") from error
    except (ValueError, UnsupportedAlgorithm) as error:
        raise ConfigError(f"{path} contains no private key in PEM form, or a damaged one.") from error
    if key.public_key() != certificate.public_key():
        raise ConfigError(f"The key {path} does not belong to the certificate {certificate_path}.")
    # gRPC would start with some others, and then no client could connect.
    on_curve = isinstance(key, EllipticCurvePrivateKey) and key.curve.name in _CURVES
    if not on_curve and not isinstance(key, RSAPrivateKey):
        raise ConfigError(
            f"The key {path} is of a type that gRPC does not take: it takes RSA, and elliptic curves "
            f"{' and '.join(_CURVES.values())}."
        )


def _check_valid(certificates: list[x509.Certificate], what: str, now: datetime) -> None:
    """Raise ConfigError if none of the certificates is valid now."""
    if any(item.not_valid_before_utc <= now <= item.not_valid_after_utc for item in certificates):
        return
    begin, end = certificates[-1].not_valid_before_utc, certificates[-1].not_valid_after_utc
    raise ConfigError(
        f"{what} is valid from {begin:{_DATE}} to {end:{_DATE}}, not now; `optserve certs` makes another one."
    )


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
