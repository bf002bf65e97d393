"""How the values of options are written: a Kind reads one from TOML or text, and writes it as a person would.

Rules: what cannot be read is a ValueError (also OverflowError and RuntimeError), never a guess; what `show` writes,
`read` takes.  Must not know which options there are.
"""

import re
from collections.abc import Callable, Mapping
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network
from pathlib import Path
from typing import Any, NamedTuple

KIB = 1 << 10
MIB = 1 << 20
MINUTE = 60
HOUR = 3600
DAY = 24 * HOUR


class Address(NamedTuple):
    """Where to listen: an IP address in its text form, and a TCP port (0: any free one)."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


Exempt = IPv4Network | IPv6Network | str  # a text: one of EXEMPT_WORDS
EXEMPT_WORDS = ("loopback", "gateways")


class Kind(NamedTuple):
    """How a value is written."""

    rule: str  # completes the sentence "it must be ..."
    toml: tuple[type, ...]  # the types that the file may use; everywhere else values are text
    read: Callable[[Any], Any]  # text, or one of those types, to the value; ValueError when it cannot be
    show: Callable[[Any], str]
    metavar: str
    many: bool = False  # a list in the file, commas in the environment, repeated on the command line


def _scaled(units: Mapping[str, int]) -> Callable[[Any], float]:
    """A reader of numbers that may carry one of these units."""
    pattern = re.compile(rf"\s*([0-9]+(?:\.[0-9]+)?)\s*({'|'.join(units)})?\s*")

    def read(value: Any) -> float:
        if not isinstance(value, str):
            return float(value)
        match = pattern.fullmatch(value)
        if match is None:
            raise ValueError
        return float(match[1]) * units[match[2] or ""]

    return read


def _show_scaled(units: Mapping[str, int], gap: str) -> Callable[[float], str]:
    """The inverse: in the largest unit that leaves a whole number."""

    def show(value: float) -> str:
        for unit, size in sorted(units.items(), key=lambda item: -item[1]):
            if unit and value and value % size == 0:
                return f"{int(value // size)}{gap}{unit}"
        return f"{value:g}"

    return show


def _whole(value: Any) -> int:
    if isinstance(value, str) and re.fullmatch(r"[0-9]{1,18}", value.strip()) is None:
        raise ValueError
    return int(value)


def _truth(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    if value.strip().lower() not in words:
        raise ValueError
    return words[value.strip().lower()]


def _address(value: str) -> Address:
    host, colon, port = value.strip().rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    if not colon or (":" in host and not bracketed):
        raise ValueError
    address = ip_address(host[1:-1] if bracketed else host)
    if bracketed != (address.version == 6) or _whole(port) > 65535:
        raise ValueError
    return Address(str(address), int(port))


def _exempt(value: str) -> Exempt:
    value = value.strip()
    return value if value in EXEMPT_WORDS else ip_network(value)


def _network(value: str) -> IPv4Network | IPv6Network:
    network = ip_network(value.strip())
    mapped = network.network_address.ipv4_mapped if network.version == 6 and network.prefixlen >= 96 else None
    # ::ffff:192.0.2.1 is what some tools show for 192.0.2.1; no peer ever has it as an address of its own.
    return network if mapped is None else IPv4Network((mapped, network.prefixlen - 96))


def _path(value: str) -> Path:
    if not value or "\0" in value:
        raise ValueError
    return Path(value).expanduser()


def choice(*words: str) -> Kind:
    """One of these words."""

    def read(value: str) -> str:
        if value not in words:
            raise ValueError
        return value

    return Kind(" or ".join(words), (str,), read, str, "|".join(words))


def _who(what: str) -> Kind:
    def read(value: str | int) -> str:
        if "\0" in str(value):
            raise ValueError
        return "" if value == "none" else str(value)

    return Kind(f"the name or number of a {what}, or none", (str, int), read, lambda value: value or "none", "NAME")


_SECONDS = {"": 1, "s": 1, "m": MINUTE, "h": HOUR, "d": DAY}
_BYTES = {"": 1, "KiB": KIB, "MiB": MIB}
DURATION = Kind(
    "a number of seconds, or a text like 30s, 10m, 2h, 1d",
    (int, float, str),
    _scaled(_SECONDS),
    _show_scaled(_SECONDS, ""),
    "SECONDS",
)
SIZE = Kind(
    "a number of bytes, or a text like 64 KiB, 1 MiB",
    (int, str),
    lambda value: _whole(_scaled(_BYTES)(value)),
    _show_scaled(_BYTES, " "),
    "BYTES",
)
COUNT = Kind("a whole number", (int,), _whole, str, "N")
RATE = Kind("a whole number (a second)", (int,), _whole, lambda value: f"{value} a second", "N")
SWITCH = Kind("true or false", (bool,), _truth, lambda value: str(value).lower(), "")
NETWORKS = Kind(
    "a network like 10.0.0.5/32 or 2001:db8::5/128 without host bits",
    (str,),
    _network,
    str,
    "CIDR",
    many=True,
)
DIRECTORY = Kind("the path of a directory", (str,), _path, str, "DIR")
MAPS = Kind("the path of a pinned eBPF map", (str,), _path, str, "PINNED_MAP", many=True)
USER = _who("user")
GROUP = _who("group")
ADDRESSES = Kind(
    "IPv4:PORT or [IPv6]:PORT, with an address, not a name, and a port of 0 to 65535",
    (str,),
    _address,
    str,
    "ADDR:PORT",
    many=True,
)
EXEMPTIONS = Kind(
    "a network like 192.0.2.0/24 or 2001:db8::/32 without host bits, or one of the words loopback, gateways",
    (str,),
    _exempt,
    str,
    "CIDR|loopback|gateways",
    many=True,
)
