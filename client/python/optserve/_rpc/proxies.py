"""Which connections go through an HTTP proxy. gRPC reads the environment for that; what it would do is found out here.

A server on this very host is always reached directly: a proxy has another loopback interface.
"""

from __future__ import annotations

from ipaddress import IPv6Address, ip_address, ip_network
from urllib.parse import unquote

from optserve.config import no_proxy_hosts, proxy_variable

_LOCAL_SCHEMES = ("unix:", "unix-abstract:", "vsock:")
_ADDRESS_SCHEMES = ("ipv4:", "ipv6:", "dns:")


def channel_options(target: str) -> list[tuple[str, int]]:
    """The options of a channel to `target` that keep connections within this host away from proxies."""
    return [("grpc.enable_http_proxy", 0)] if is_on_this_host(target) else []


def is_on_this_host(target: str) -> bool:
    """Whether `target`, in any form that gRPC takes, is a Unix socket or an address of the loopback interface."""
    return target.startswith(_LOCAL_SCHEMES) or all(_is_loopback(host) for host in _hosts(target))


def proxy_hint(target: str) -> str:
    """A sentence that names the environment variable by which connections to `target` take a proxy; or nothing."""
    variable = proxy_variable()
    if not variable or is_on_this_host(target) or all(map(_is_exempt, _hosts(target))):
        return ""
    return (
        f" The environment variable {variable} sends this connection through a proxy; name the host in no_proxy, or "
        f"unset {variable}, to connect directly."
    )


def _hosts(target: str) -> list[str]:
    """The names or addresses in a target, without their ports."""
    for scheme in _ADDRESS_SCHEMES:
        if target.startswith(scheme):
            target = target.removeprefix(scheme)
            # dns://RESOLVER/HOST:PORT
            target = target.rpartition("/")[2]
            break
    return [_host(unquote(address)) for address in target.split(",")]


def _host(address: str) -> str:
    if address.startswith("["):
        return address[1:].partition("]")[0]
    # An IPv6 address may stand alone; a port has one colon before it.
    return address.partition(":")[0] if address.count(":") == 1 else address


def _is_loopback(host: str) -> bool:
    name = host.rstrip(".").lower()
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        address = ip_address(host.partition("%")[0])
    except ValueError:
        return False
    if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    # Whoever connects to 0.0.0.0 or :: reaches this host.
    return address.is_loopback or address.is_unspecified


def _is_exempt(host: str) -> bool:
    """Whether gRPC takes no proxy to that host: a suffix of its name, or a network that it lies in, is listed."""
    for entry in no_proxy_hosts():
        if host.lower().endswith(entry.lower()):
            return True
        try:
            if ip_address(host) in ip_network(entry, strict=False):
                return True
        except ValueError:
            continue
    return False
