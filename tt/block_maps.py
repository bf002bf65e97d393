"""The pinned maps of timed-out sources, for the operator: made where they are missing, shown, cleaned and removed.

Works beside a running server, and without one.  A map made here has a name of its own in the kernel, so that `remove`
knows it from the operator's, which it never removes.
It must not know the programs that read a map, nor the command line.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from ipaddress import ip_network
from pathlib import Path
from typing import Any

from tt import bpf_load
from tt.kernel_gate import SECOND, BlockMap, GateError, KernelGate

DEFAULTS = (Path("/sys/fs/bpf/tapetrack_block_map"), Path("/sys/fs/bpf/tapetrack_block_map6"))  # IPv4, IPv6
KEYS = {4: 4, 6: 16}  # bytes, by family: what is made is a hash, of IPv4 addresses or IPv6 /64s
NAMES = {4: "tt_block_map", 6: "tt_block_map6"}  # in the kernel, of those made here
ENTRIES = 65536  # as many as the server's table holds by default
VALUE_SIZE = 4
IPV6_PREFIX = 64  # of an IPv6 hash; a trie has any


@contextmanager
def opened(paths: Sequence[Path]) -> Iterator[list[BlockMap]]:
    """The maps at these paths, that for IPv4 first.  Raises GateError."""
    maps = list(KernelGate.open(paths, IPV6_PREFIX).maps)
    try:
        yield maps
    finally:
        for one in maps:
            one.map.close()


def make_missing(paths: Sequence[Path], entries: int | None, value_size: int | None) -> list[Path]:
    """Make and pin what is missing at these paths: the first for IPv4, unless that one is there.  Returns those made.

    What is there must have the `entries` and `value_size` (bytes) that are asked for; None: any, and what is made gets
    the defaults.  Raises GateError and OSError, and has made nothing then.
    """
    with opened([path for path in paths if path.exists()]) as present:
        for one in present:
            for found, wanted, word in (
                (one.map.value_size, value_size, "bytes a value"),
                (one.map.max_entries, entries, "entries"),
            ):
                if wanted not in (None, found):
                    raise GateError(
                        f"{one.map.path} has {found} {word}, not {wanted}: leave that option out to use it as it is, "
                        "or remove the map first"
                    )
        families = [family for family in KEYS if family not in [one.family for one in present]]
    missing = [path for path in paths if not path.exists()]
    if len(missing) > len(families):
        raise GateError(f"{missing[-1]}: a map too many: there is one for IPv4 and one for IPv6")
    made: list[Path] = []
    try:
        for family, path in zip(families, missing, strict=False):
            _make(path, family, entries or ENTRIES, value_size or VALUE_SIZE)
            made.append(path)
    except BaseException:
        _unlink(made)
        raise
    return made


def remove(paths: Sequence[Path]) -> list[Path]:
    """Remove the pins of the maps that were made here; returns them.  Whoever has one open keeps it."""
    with opened([path for path in paths if path.exists()]) as present:
        ours = [Path(one.map.path) for one in present if is_ours(one.map.name)]
    _unlink(ours)
    return ours


def is_ours(name: str) -> bool:
    """Whether a map of that name in the kernel was made here."""
    return name in NAMES.values()


def clean(one: BlockMap) -> int:
    """Remove ended entries; returns how many.  One that was renewed meanwhile stays."""
    removed = 0
    for key, value in one.map.entries():
        end = one.end(value, time.monotonic_ns())
        if end is not None and end <= time.monotonic_ns() and one.map.lookup(key) == value:
            removed += one.map.delete(key)
    return removed


def entries(one: BlockMap) -> Iterator[dict[str, Any]]:
    """Each entry: its network, and the seconds to its end (negative: ended; None: the operator's, for ever)."""
    now = time.monotonic_ns()
    for key, value in one.map.entries():
        end = one.end(value, now)
        address, bits = one.network(key)
        text = str(ip_network((address, bits), strict=False)).removesuffix(f"/{8 * len(address)}")
        yield {"source": text, "ends_in_s": None if end is None else round((end - now) / SECOND, 3)}


def _make(path: Path, family: int, size: int, value_size: int) -> None:
    made = bpf_load.create_map("hash", (KEYS[family], value_size), size, NAMES[family])
    try:
        bpf_load.pin_map(made, str(path))
    finally:
        made.close()


def _unlink(paths: Sequence[Path]) -> None:
    for path in paths:
        path.unlink(missing_ok=True)
