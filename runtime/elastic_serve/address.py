"""Addresses and names: which are this machine's own, and from which page a request comes."""

import ipaddress
import re
from urllib.parse import urlsplit

# A name or an address, IPv6 in brackets, and a port (RFC 9110, 7.2).
HOST = re.compile(r"(\[[0-9a-f:.]+\]|[0-9a-z._-]+)(?::([0-9]{1,5}))?", re.IGNORECASE)


def is_local(host: str) -> bool:
    """Whether an address or a name is this machine's own, which no other reaches."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def asked_locally(host: str) -> bool:
    """Whether a Host header names this machine itself; what is malformed does not."""
    match = HOST.fullmatch(host)
    return match is not None and int(match[2] or 0) <= 65535 and is_local(match[1].lower())


def same_origin(origin: str, host: str) -> bool:
    """Whether the page that an Origin header names is of the server that a Host header names; `null` is of none."""
    try:
        return urlsplit(origin).netloc.lower() == host.lower() != ""
    except ValueError:  # brackets that do not close
        return False
