"""Exemptions that were made at run time, and kept over a restart; those of the configuration stay its own.

The file `exempt` in the data directory: one JSON object a line, {"network": "192.0.2.0/24", "note": "office", "since":
"2026-01-31T12:00:00Z"}.  It is replaced whole, and written by `tt exempt` alone.

Rules: at most MOST, since every verdict looks through them.  Where the file cannot be read nothing is taken from it and
nothing is written over it.  Must not know the time-out table, nor who asks.
"""

from collections.abc import Iterator, Mapping
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path

import msgspec

from tt import state_file
from tt.option_kinds import EXEMPTIONS, Exempt
from tt.state_file import StateFileError

MOST = 1000
MAX_FILE = 1 << 20  # bytes
# Networks whose addresses are one IPv4 source each (RFC 4291 section 2.5.5.2, RFC 6052 section 2.1).
IPV4_IN_IPV6 = (IPv6Network("::ffff:0:0/96"), IPv6Network("64:ff9b::/96"))
WIDEST = {4: 8, 6: 7}  # bits: 10.0.0.0/8 and fc00::/7 are the widest networks of one's own


class Exemption(msgspec.Struct, frozen=True):
    """One line of the file."""

    network: str  # as the option `exempt` takes it: a network, or a word
    note: str | None
    since: str  # UTC


Entries = Mapping[Exempt, Exemption]


class Exemptions:
    """Those that hold now, and their file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._broken: StateFileError | None = None
        self.entries: Entries = {}

    def load(self) -> None:
        """Takes what the file holds; nothing where there is none.  StateFileError: nothing is taken."""
        try:
            self.entries = self._read()
        except FileNotFoundError:
            return
        except (OSError, ValueError, msgspec.MsgspecError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            remedy = "repair or remove it, then restart"
            self._broken = StateFileError(f"{self._path}: exemptions not restored: {reason}: {remedy}")
            raise self._broken from error

    def _read(self) -> Entries:
        with self._path.open("rb") as file:
            data = file.read(MAX_FILE + 1)
        if len(data) > MAX_FILE:
            raise ValueError(f"over {MAX_FILE} bytes")
        decode = msgspec.json.Decoder(Exemption).decode
        entries: dict[Exempt, Exemption] = {}
        for number, line in enumerate(data.splitlines(), 1):
            try:
                entry = decode(line)
                entries[EXEMPTIONS.read(entry.network)] = entry
            except (ValueError, msgspec.MsgspecError) as error:
                raise ValueError(f"line {number}: {error}") from error
        if len(entries) > MOST:
            raise ValueError(f"{len(entries)} entries: at most {MOST}")
        return entries

    def save(self, entries: Entries) -> None:
        """Replaces the file; for a thread.  StateFileError: the old one stands, or this server could not read it."""
        if self._broken is not None:
            raise self._broken
        encode = msgspec.json.Encoder().encode
        try:
            state_file.replace(self._path, [encode(entry) + b"\n" for entry in entries.values()])
        except OSError as error:
            remedy = "make the directory writable, with room for it"
            raise StateFileError(f"{self._path}: exemptions not saved: {error.strerror or error}: {remedy}") from error


def caveats(network: Exempt, ipv6_prefix: int) -> Iterator[str]:
    """What of exempting this will not do what it seems: each one line with the remedy."""
    if isinstance(network, str):
        return
    if network.prefixlen < WIDEST[network.version]:
        share = "all" if network.prefixlen == 0 else f"1/{1 << network.prefixlen} of all"
        yield f"{share} IPv{network.version} addresses are never timed out; name networks of your own"
    elif isinstance(network, IPv6Network):
        yield from _caveats_ipv6(network, ipv6_prefix)


def _caveats_ipv6(network: IPv6Network, prefix: int) -> Iterator[str]:
    if any(network.subnet_of(mapped) for mapped in IPV4_IN_IPV6):
        inner = IPv4Network((int(network.network_address) & 0xFFFFFFFF, network.prefixlen - 96))
        yield f"exempts nobody, since such a source counts as its IPv4 address; write {inner}"
    elif network.prefixlen > prefix and not network.is_link_local:  # of those each is a source by itself
        whole = network.supernet(new_prefix=prefix)
        yield f"exempts all of {whole}, which is one source; write that, so that it is seen"
