"""Addresses: whom one stands for."""

import pytest

pytest.importorskip("uvicorn", reason="serving needs uvicorn")

from elastic_serve.address import client_of


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
