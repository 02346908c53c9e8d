"""How a client secures its connection: the files with certificates."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Tls:
    """A connection secured by TLS.

    The client reads the files anew when they have changed, and uses their new content for new connections; calls under
    way go on over the old one.

    Example:
        >>> tls = optserve.Tls(authority="authority.pem")  # doctest: +SKIP
        >>> client = optserve.connect("trainer.example:50051", optserve.ClientConfig(tls=tls))  # doctest: +SKIP
    """

    authority: str | Path = ""
    """PEM file with the authority of the server's certificate; empty for the public ones that gRPC brings."""
    certificate: str | Path = ""
    """PEM file with the client's certificate, then those that lead to its authority, for a server that asks for one."""
    key: str | Path = ""
    """PEM file with the private key of `certificate`, not encrypted."""
    server_name: str = ""
    """The name that the server's certificate must have; empty for the host of the target."""

    def __post_init__(self) -> None:
        """Raise ValueError if one file of a pair is missing."""
        if bool(self.certificate) != bool(self.key):
            raise ValueError("A client's certificate and its key must be given together.")

    @property
    def files(self) -> list[Path]:
        """The files that there are: the authority, the certificate, the key."""
        return [Path(file) for file in (self.authority, self.certificate, self.key) if file]
