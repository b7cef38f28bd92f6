"""Whom the service calls by itself, which is whom its unit must let through."""

import socket

import pytest

from appliance.core.config import Orchestrator
from appliance.orchestrator import reach

CENTRAL = Orchestrator(api_base="https://192.0.2.7", user_id="acme", site="https://is.no.url.of/ours")


@pytest.mark.parametrize(
    ("settings", "urls", "addresses"),
    [
        (Orchestrator(), (), ()),
        (Orchestrator(proxy="http://192.0.2.8:3128"), (), ()),
        (CENTRAL, ("https://192.0.2.7:443",), ("192.0.2.7",)),
        (CENTRAL.model_copy(update={"proxy": "http://192.0.2.8:3128"}), ("http://192.0.2.8:3128",), ("192.0.2.8",)),
        (CENTRAL.model_copy(update={"api_base": "https://[2001:db8::7]:443"}), None, ("2001:db8::7",)),
        (CENTRAL.model_copy(update={"api_base": "https://localhost:443"}), ("https://localhost:443",), ()),
    ],
)
def test_who_is_called(settings: Orchestrator, urls: tuple[str, ...] | None, addresses: tuple[str, ...]) -> None:
    """The central API, or the proxy on the way to it; not this machine, which is always let through."""
    assert urls is None or reach.called(settings) == urls
    assert reach.all_addresses(settings) == addresses


def test_a_name_that_nobody_knows_is_an_error() -> None:
    with pytest.raises(socket.gaierror):
        reach.all_addresses(CENTRAL.model_copy(update={"api_base": "https://nobody.invalid:443"}))
