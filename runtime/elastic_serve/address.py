"""Addresses and names: which are this machine's own, and from which page a request comes."""

import errno
import ipaddress
import os
import re
import socket
from collections.abc import Collection
from typing import Any
from urllib.parse import urlsplit

from elastic_runtime.errors import UsageError

# A name or an address, IPv6 in brackets, and a port (RFC 9110, 7.2).
NAME = re.compile(r"[0-9a-z._-]+", re.IGNORECASE)
HOST = re.compile(r"(\[[0-9a-f:.]+\]|[0-9a-z._-]+)(?::([0-9]{1,5}))?", re.IGNORECASE)
ABSENT = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)  # IPv6 on a machine without: its names are listed all the same


def is_local(host: str) -> bool:
    """Whether an address or a name is this machine's own, which no other reaches."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def asked_locally(host: str, names: Collection[str] = ()) -> bool:
    """Whether a Host header names this machine itself, or has one of the `names` that a proxy hands on; what is malformed does not."""
    match = HOST.fullmatch(host)
    return match is not None and int(match[2] or 0) <= 65535 and (is_local(match[1].lower()) or match[1].lower() in names)


def client_of(address: str) -> str:
    """Who an address stands for, where each is to have its share: of IPv6 the network, in which one host has all addresses it likes."""
    try:
        known = ipaddress.ip_address(address)
    except ValueError:
        return address
    known = getattr(known, "ipv4_mapped", None) or known  # as a socket for both kinds tells of IPv4
    return str(ipaddress.ip_network((known, 64), strict=False)) if known.version == 6 else str(known)


def same_origin(origin: str, host: str) -> bool:
    """Whether the page that an Origin header names is of the server that a Host header names; `null` is of none."""
    try:
        return urlsplit(origin).netloc.lower() == host.lower() != ""
    except ValueError:  # brackets that do not close
        return False


def bound(host: str, port: int) -> list[socket.socket]:
    """Sockets at the addresses of a host, not yet listening; at the first of them where any free port will do.

    Raises: UsageError where there is none to be had.
    """
    sockets, missing = list[socket.socket](), None
    try:
        for family, kind, protocol, _, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE):
            try:
                sockets.append(_bound(family, kind, protocol, address))
            except OSError as error:
                if error.errno not in ABSENT:
                    raise
                missing = error
            if sockets and not port:
                break
        if missing and not sockets:
            raise missing
    except (OSError, UnicodeError) as error:  # the latter of a name that no name may be
        for each in sockets:
            each.close()
        nowhere = isinstance(error, socket.gaierror | UnicodeError) or error.errno in ABSENT
        advice = "--host, an address of this machine" if nowhere else "--port, or end what uses it"
        raise UsageError(f"cannot listen on {host}:{port}: {getattr(error, 'strerror', None) or error}: take another {advice}") from None
    return sockets


def _bound(family: int, kind: int, protocol: int, address: Any) -> socket.socket:
    made = socket.socket(family, kind, protocol)
    try:
        if os.name == "posix":  # elsewhere it lets two processes have one port
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        made.bind(address)
    except OSError:
        made.close()
        raise
    return made
