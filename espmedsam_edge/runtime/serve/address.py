"""Where the server listens: ``[HOST:]PORT``, its socket, and the names that a browser may call it by."""

from __future__ import annotations

import errno
import ipaddress
import re
import secrets
import socket
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from espmedsam_edge.errors import UserError

LOOPBACK = "127.0.0.1"
MIN_TOKEN = 16
"""Characters: 16 letters and digits at random cannot be guessed at the rate that the server allows."""

_USAGE = "Give a port, or HOST:PORT: --serve 8080, --serve 0.0.0.0:8080, --serve [::1]:8080."
_NAME = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_.-]{0,252}[A-Za-z0-9_])?")
_HOST_HEADER = re.compile(r"(?P<host>\[[0-9A-Fa-f:.]{2,45}\]|[A-Za-z0-9_.-]{1,253})(:(?P<port>[0-9]{1,5}))?")


@dataclass(frozen=True)
class Address:
    """A host, by name or number (IPv6 without brackets), and a port; port 0 takes any that is free."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def parse_address(text: str) -> Address:
    """Read ``PORT``, ``HOST:PORT`` or ``[IPv6]:PORT``; a port alone is one of this machine only, on 127.0.0.1.

    Raises:
        UserError: not of that form.
    """
    host, colon, port = text.strip().rpartition(":")
    if not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise UserError(f"--serve {text}: '{port}' is not a port from 0 to 65535.", _USAGE)
    if not colon:
        return Address(LOOPBACK, int(port))
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    if ":" in bare:
        try:
            if bare == host:
                raise ValueError
            return Address(str(ipaddress.IPv6Address(bare)), int(port))
        except ValueError:
            raise UserError(f"--serve {text}: '{host}' is not an IPv6 address in brackets.", _USAGE) from None
    if not _NAME.fullmatch(bare):
        raise UserError(f"--serve {text}: '{host}' is not a host.", _USAGE)
    return Address(bare, int(port))


def parse_proxies(given: Sequence[str]) -> list[str]:
    """Addresses and networks whose word on the client is taken, as uvicorn's ``forwarded_allow_ips``.

    Raises:
        UserError: a name, a network with bits of a host, or one that holds everybody.
    """
    usage = "Give the proxy's own address or network: --trust-proxy 127.0.0.1, --trust-proxy 10.42.0.0/16."
    found: list[str] = []
    for text in given:
        try:
            network = ipaddress.ip_network(text)
        except ValueError:
            raise UserError(f"--trust-proxy {text} is not an address of a proxy.", usage) from None
        if network.prefixlen == 0:
            raise UserError(f"--trust-proxy {text} is everybody, who then could forge their address.", usage)
        found.append(str(network))
        if network.version == 4:  # as a socket of both families names it
            found.append(f"::ffff:{network.network_address}/{96 + network.prefixlen}")
    return found


def listen(address: Address) -> socket.socket:
    """A listening socket.

    Raises:
        UserError: the port is taken or not allowed, or the host is not one of this machine's.
    """
    try:
        found = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (socket.gaierror, UnicodeError) as error:
        raise UserError(f"--serve {address}: no address is known for '{address.host}'.", _USAGE) from error
    family, kind, protocol, _, target = found[0]
    opened = socket.socket(family, kind, protocol)
    try:
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        opened.bind(target)
        opened.listen(128)
        opened.setblocking(False)
    except OSError as error:
        opened.close()
        raise _not_bound(address, error) from error
    return opened


def _not_bound(address: Address, error: OSError) -> UserError:
    if error.errno == errno.EADDRINUSE:
        return UserError(f"port {address.port} is taken by another program.", "Choose another, or 0 for any.")
    if error.errno == errno.EACCES:
        return UserError(f"port {address.port} may not be used by this user.", "Choose one from 1024 to 65535.")
    if error.errno == errno.EADDRNOTAVAIL:
        return UserError(f"'{address.host}' is not an address of this machine.", _USAGE)
    return UserError(f"cannot listen on {address}: {error.strerror or error}.", _USAGE)


def is_loopback(opened: socket.socket) -> bool:
    """Whether only programs on this machine can reach the socket."""
    return ipaddress.ip_address(str(opened.getsockname()[0]).partition("%")[0]).is_loopback


def choose_token(given: str | None, *, loopback: bool) -> str | None:
    """The token that clients must show: the one given; else for an address that others reach one made now; else None.

    Raises:
        UserError: a token that is too short, or holds what an HTTP header cannot.
    """
    if given is None:
        return None if loopback else secrets.token_urlsafe(24)
    if len(given) < MIN_TOKEN or len(given) > 256:
        raise UserError(
            f"the token has {len(given)} characters; {MIN_TOKEN} to 256 are needed.",
            "Leave --token out, and one is made and printed.",
        )
    if not re.fullmatch(r"[!-~]+", given):
        raise UserError("the token holds a space or a character that is not ASCII.", "Use letters, digits, - and _.")
    return given


@dataclass(frozen=True)
class Names:
    """The hosts that a request may name, so that no foreign name can be pointed at this server (DNS rebinding).

    Attributes:
        known: names in lower case, and numbers.
        any_number: whether every IP address is allowed; a number cannot be rebound.
    """

    known: frozenset[str]
    any_number: bool

    @classmethod
    def of(cls, address: Address, *, loopback: bool, more: Iterable[str] = ()) -> Names:
        """Those that lead to a server on this address, and the ones given, such as that of a proxy before it.

        Raises:
            UserError: one given is not a name.
        """
        known = {"localhost", LOOPBACK, "::1", address.host.lower()}
        for name in more:
            if not _NAME.fullmatch(name):
                raise UserError(f"--allow-host {name} is not a host's name.", "Give it without http:// and port.")
            known.add(name.lower())
        if not loopback:
            own = socket.gethostname().lower()
            known |= {own, f"{own}.local"}
        return cls(frozenset(known), not loopback)

    def allow(self, header: str) -> bool:
        """Whether a Host header, with or without a port, names one of them."""
        match = _HOST_HEADER.fullmatch(header)
        if match is None:
            return False
        host = match["host"].strip("[]").lower().removesuffix(".")
        if host in self.known:
            return True
        try:
            ipaddress.ip_address(host)
        except ValueError:
            return False
        return self.any_number
