"""Which networks the words `loopback` and `gateways` stand for, and whom they hold."""

import subprocess
import sys
from ipaddress import ip_network

import pytest
from process import need, netns, plain_environment

from tt import sources

# Each route -> the next hops that it adds.
ROUTES = {
    "ip route add default via 192.0.2.254": ["192.0.2.254/32"],
    "ip route add 198.51.100.0/24 nexthop via 192.0.2.2 nexthop via 192.0.2.3": ["192.0.2.2/32", "192.0.2.3/32"],
    "ip route add 203.0.113.0/24 via inet6 fe80::5 dev v0": ["fe80::5/128"],
    "ip nexthop add id 7 via 192.0.2.9 dev v0; ip route add 192.0.3.0/24 nhid 7": ["192.0.2.9/32"],
    "ip route add 192.0.4.0/24 via 192.0.2.10 table 77": ["192.0.2.10/32"],
    "ip -6 route add default via 2001:db8::ff": ["2001:db8::ff/128"],
    "ip -6 route add 2001:db8:1::/48 nexthop via fe80::1 dev v0 nexthop via fe80::2 dev v0": [
        "fe80::1/128",
        "fe80::2/128",
    ],
    "ip route add blackhole 192.0.5.0/24": [],
}
SETUP = (
    "ip link add v0 type veth peer name v1; ip link set v0 up; ip link set v1 up",
    "ip address add 192.0.2.1/24 dev v0; ip address add 2001:db8::1/64 dev v0 nodad",
)
PRINT = "from tt import sources; print(*sources.gateways())"


def gateways(*commands: str) -> list[str]:
    """What sources.gateways() finds on a host that was set up so."""
    command = [*netns(*commands), sys.executable, "-c", PRINT]
    return subprocess.check_output(command, env=plain_environment(), text=True).split()


def test_the_gateways_are_the_next_hops_of_all_kinds_of_routes() -> None:
    need("unshare", "ip", root=True)
    expected = sorted(hop for hops in ROUTES.values() for hop in hops)
    assert sorted(gateways(*SETUP, *ROUTES)) == expected


def test_a_host_without_routes_has_no_gateway() -> None:
    need("unshare", "ip", root=True)
    assert gateways() == []


def test_words_are_replaced_and_nothing_is_there_twice() -> None:
    gateway, other = ip_network("192.0.2.254/32"), ip_network("2001:db8::/32")
    resolved = sources.resolve((other, "gateways", "loopback", gateway, other), (gateway,))
    assert resolved == (other, gateway, *sources.LOOPBACK)
    assert sources.resolve(("gateways",), ()) == ()


@pytest.mark.parametrize(
    ("source", "held"),
    [
        ("127.8.9.10", True),
        ("128.0.0.1", False),
        ("::1", True),
        ("::/64", True),  # a source that is an IPv6 network holds the address
        ("::2", False),
        ("2001:db8::/64", False),
        ("192.0.2.1", False),
    ],
)
def test_a_source_is_held_by_a_network_that_it_touches(source: str, held: bool) -> None:
    assert sources.holds(sources.LOOPBACK, source) is held
