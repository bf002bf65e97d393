"""Which addresses are this host's own way out and in: loopback and the gateways, asked of the kernel by netlink.

Rules: no name is looked up.  Must not know the time-out table.
"""

from collections.abc import Iterable
from ipaddress import IPv4Network, IPv6Network, ip_network
from typing import TYPE_CHECKING

from pyroute2 import IPRoute, NetlinkError

if TYPE_CHECKING:
    from tt.config import Exempt

Network = IPv4Network | IPv6Network

LOOPBACK: tuple[Network, ...] = (IPv4Network("127.0.0.0/8"), IPv6Network("::1/128"))


def gateways() -> tuple[Network, ...]:
    """The next hops of all routes (rtnetlink(7)), each as the network of that one address.  Raises OSError."""
    found: dict[str, None] = {}
    try:
        with IPRoute() as netlink:
            for route in netlink.get_routes():
                for hop in (route, *(route.get_attr("RTA_MULTIPATH") or ())):
                    via = hop.get_attr("RTA_VIA")  # a next hop of the other family
                    address = hop.get_attr("RTA_GATEWAY") or (via and via["addr"])
                    if address:
                        found[address] = None
    except NetlinkError as error:  # what the kernel answers; it is no OSError to pyroute2
        raise OSError(error.code, str(error)) from error
    return tuple(ip_network(address) for address in found)


def resolve(exempt: "Iterable[Exempt]", gateway_networks: tuple[Network, ...]) -> tuple[Network, ...]:
    """The exempt networks with the words `loopback` and `gateways` replaced by what they stand for."""
    words = {"loopback": LOOPBACK, "gateways": gateway_networks}
    resolved: dict[Network, None] = {}
    for item in exempt:
        resolved |= dict.fromkeys(words[item] if isinstance(item, str) else (item,))
    return tuple(resolved)


def holds(networks: Iterable[Network], source: str) -> bool:
    """Whether a source, an address or an IPv6 prefix, touches one of the networks."""
    own = ip_network(source)
    return any(own.version == network.version and own.overlaps(network) for network in networks)
