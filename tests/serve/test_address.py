"""Addresses: whom one stands for."""

import pytest

pytest.importorskip("uvicorn", reason="serving needs uvicorn")

from elastic_serve.address import asked_locally, client_of


@pytest.mark.parametrize(
    ("address", "client"),
    [
        ("203.0.113.5", "203.0.113.5"),
        ("::ffff:203.0.113.5", "203.0.113.5"),  # what a socket for both kinds tells of IPv4
        ("2001:db8:1:2:3::4", "2001:db8:1:2::/64"),
        ("testclient", "testclient"),
        ("", ""),
    ],
)
def test_who_an_address_stands_for(address: str, client: str) -> None:
    assert client_of(address) == client


@pytest.mark.parametrize(
    ("host", "answered"),
    [
        ("localhost:8000", True),
        ("127.0.0.1", True),
        ("Pictures.example.com", True),
        ("pictures.example.com:443", True),
        ("other.example.com", False),
        ("pictures.example.com:99999", False),
    ],
)
def test_names_of_a_proxy_are_answered_to_beside_this_machines(host: str, answered: bool) -> None:
    assert asked_locally(host, ("pictures.example.com",)) == answered
