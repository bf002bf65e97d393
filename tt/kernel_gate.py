"""The kernel gate: time-outs copied into pinned eBPF maps, so that the kernel drops their sources' packets.

The table in the process is the truth and a map its copy: no error of a map weakens a time-out or ends the service.
All changes of one turn of the loop go to the kernel at its end, in one batch a map where it has batches; what failed is
`missing` and tried again.  What stands in the map is looked at before it is changed: others write there too.  An entry
whose value is 0, or an end more than 30 days ahead, is the operator's own (preloaded): never changed nor removed.

    key     IPv4 address (4 bytes) or IPv6 /64 (16 bytes, host bits 0), network order; in an LPM trie behind its prefix
            length, 4 bytes in host order
    value   end of the time-out on CLOCK_MONOTONIC, host order: 4 bytes in whole seconds, rounded up; 8 bytes in ns

A source that was learnt behind a proxy is never written: the packets that the kernel sees are the proxy's.
It must not know sockets, frames, or why somebody is timed out.
"""

import errno
import logging
import struct
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from ipaddress import ip_address
from itertools import islice
from pathlib import Path
from socket import AF_INET, AF_INET6, inet_pton
from typing import Any

from tt import bpf, bpf_load, log, sources
from tt._core import REASON_CODES, TimedOut, TimeoutTable, source_text

SECOND = 1_000_000_000  # ns
LONGEST = 30 * 86400 * SECOND  # of a time-out; an end further ahead is the operator's
COMPLAINT_INTERVAL = 60.0  # s between log lines about one map
RETRIES = 256  # missing entries tried again a second
BATCH_PAYS = 4  # entries from which on one batch costs less than single calls through ctypes
PIECE = 512  # entries of a map looked at in one piece of a list
FULL = (errno.E2BIG, errno.ENOSPC)  # what a hash and an LPM trie answer then
FAMILIES = {  # by kind and bytes of the key
    ("hash", 4): 4,
    ("hash", 16): 6,
    ("lru_hash", 4): 4,
    ("lru_hash", 16): 6,
    ("lpm_trie", 8): 4,
    ("lpm_trie", 20): 6,
}
VALUE_FORMATS = {4: "=I", 8: "=Q"}
EXAMPLE = "bpftool map create {} type hash key 4 value 4 entries 1024 name tapetrack_block_map"


class GateError(Exception):
    """A map cannot be used; the text is one line that names it, the rule and the remedy."""


@dataclass(slots=True)
class BlockMap:
    """One map: how sources and ends are written in it, what of it is ours, and how it went."""

    map: bpf.Map
    family: int  # 4 or 6
    ipv6_prefix: int
    held: dict[bytes, bytes] = field(default_factory=dict)  # key to value: written here, or adopted at the start
    adopted: set[bytes] = field(default_factory=set)  # those of `held` that somebody else wrote
    stale: dict[bytes, bytes] = field(default_factory=dict)  # key to value: to be removed, but the kernel did not
    missing: dict[bytes, int] = field(default_factory=dict)  # key to end: running, but not in the map
    errors: dict[str, int] = field(default_factory=dict)  # by errno's name
    complained: float = float("-inf")  # when the log last heard of this map, s
    batches: bool = True  # until the kernel says that this kind has none

    def key(self, source: bytes) -> bytes | None:
        """The map's key for a packed source; None where the map cannot express it."""
        if len(source) != (4 if self.family == 4 else 16):
            return None
        if self.map.kind == "lpm_trie":
            return struct.pack("=I", self._prefix(source)) + source
        # In a hash the kernel program looks up the /64, which for a link-local address is everybody on the link.
        return source if self.family == 4 or self._prefix(source) == 64 else None

    def network(self, key: bytes) -> tuple[bytes, int]:
        """Address and prefix length that a key stands for."""
        if self.map.kind != "lpm_trie":
            return key, 32 if self.family == 4 else 64
        return key[4:], struct.unpack("=I", key[:4])[0]

    def source(self, key: bytes) -> str | None:
        """The source of a key, as text; None where it is no key of ours: a network, or one that nobody looks up."""
        address, length = self.network(key)
        if length != self._prefix(address):
            return None
        try:
            source = source_text(_text(address, length), self.ipv6_prefix)
        except ValueError:  # a part of ::ffff:0:0/96: such addresses are looked up as IPv4
            return None
        return source if packed(source) == address else None

    def value(self, end: int) -> bytes:
        """The map's value for an end in ns: in seconds rounded up, so that nobody is let in early."""
        unit = end if self.map.value_size == 8 else -(-end // SECOND)
        return unit.to_bytes(self.map.value_size, sys.byteorder)

    def end(self, value: bytes, now: int) -> int | None:
        """The end of a value, ns; None: preloaded."""
        unit: int = struct.unpack(VALUE_FORMATS[self.map.value_size], value)[0]
        end = unit if self.map.value_size == 8 else unit * SECOND
        return None if unit == 0 or end - now > LONGEST + SECOND else end  # the second: our own longest, rounded up

    def is_theirs(self, key: bytes, end: int | None, now: int) -> bool:
        """Whether an entry is the operator's: preloaded, or dropping a network that no source is."""
        return end is None or (end > now and key not in self.held and self.source(key) is None)

    def _prefix(self, address: bytes) -> int:
        if self.family == 4:
            return 32
        return 128 if address[0] == 0xFE and address[1] & 0xC0 == 0x80 else self.ipv6_prefix  # fe80::/10 stays whole


class KernelGate:
    """Keeps the maps as the table says; all calls are the loop's thread."""

    def __init__(self, maps: Sequence[BlockMap], ipv6_prefix: int) -> None:
        self.maps = maps
        self._ipv6_prefix = ipv6_prefix
        self._filter: bpf_load.Filter | None = None
        self._why_no_filter = "--no-listener-filter"

    @classmethod
    def open(cls, paths: Iterable[Path], ipv6_prefix: int) -> "KernelGate":
        """The gate for pinned maps, at most one a family.  Raises GateError."""
        _check_clock()
        maps: dict[int, BlockMap] = {}
        for path in paths:
            block_map = _open_map(path, ipv6_prefix)
            if block_map.family in maps:
                other = maps[block_map.family].map.path
                raise GateError(f"{path}: a second map for IPv{block_map.family} besides {other}: give one a family")
            maps[block_map.family] = block_map
        return cls([maps[family] for family in sorted(maps)], ipv6_prefix)

    def load_filter(self) -> None:
        """Load the listener filter; where the kernel refuses it, one warning, and the maps serve other programs."""
        try:
            by_family = {block_map.family: block_map.map for block_map in self.maps}
            self._filter = bpf_load.load_listener_filter(by_family, self._ipv6_prefix)
        except OSError as error:
            self._why_no_filter = error.strerror or str(error)
            words = "no listener filter: nothing is dropped in the kernel unless another program reads the map"
            log.event(logging.WARNING, words, error=self._why_no_filter)

    def attach(self, listener: int) -> None:
        """Attach the listener filter to a socket before it listens; without one, take off what another left there."""
        if self._filter is not None:
            bpf_load.attach(self._filter, listener)
        else:
            bpf_load.detach(listener)

    def reconcile(self, table: TimeoutTable, exempt: Sequence[sources.Network], now: int) -> None:
        """At the start: adopt what runs, remove what has ended or is exempt, write what only the table knows."""
        for block_map in self.maps:
            counts = {"adopted": 0, "ended": 0, "exempt": 0, "preloaded": 0}
            remove: dict[bytes, bytes] = {}
            for key, value in list(_entries(block_map)):
                end, source = block_map.end(value, now), block_map.source(key)
                if end is not None and end <= now:
                    counts["ended"] += 1
                    remove[key] = value
                elif end is None or source is None:
                    counts["preloaded"] += 1
                elif sources.holds(exempt, source):
                    counts["exempt"] += 1
                    remove[key] = value
                else:
                    counts["adopted"] += 1
                    block_map.held[key] = value
                    block_map.adopted.add(key)
                    if table.find(source, now) is None:  # a saved one has the exact end and the reason
                        table.add(source, REASON_CODES["adopted"], min(end - now, LONGEST), now)
            _delete(block_map, remove)
            log.event(logging.INFO, "kernel map", map=block_map.map.path, **counts)
        running = (record for record in table.entries(now) if not record.proxied)
        self._write({packed(record.source): record.end for record in running}, now)

    # ---- while the loop runs ----------------------------------------------------------------------------------------

    def turn(self, added: Sequence[TimedOut], ended: Sequence[bytes], table: TimeoutTable) -> None:
        """The changes of one turn of the loop."""
        if len(added) == 1 and not ended and not added[0].proxied and self._write_alone(added[0]):
            return
        now = time.monotonic_ns()
        last = {item.key: item for item in added if item.end}  # one source may be lifted and come again in a turn
        fresh = {key: item.end for key, item in last.items() if not item.proxied}
        gone = dict.fromkeys(ended)
        for source in [source for source in gone if source in fresh]:  # both in one turn: the table knows how it ended
            if table.find(source, now) is None:
                del fresh[source]
                continue
            del gone[source]
            for block_map in self.maps:  # lifted, then timed out anew: what was adopted may be shortened now
                block_map.adopted.discard(block_map.key(source) or b"")
        for block_map in self.maps:  # removed first: that may make the room which the new ones need
            keys = [key for source in gone if (key := block_map.key(source))]
            if keys:
                _remove_ours(block_map, keys, now)
        self._write(fresh, now)

    def tick(self) -> None:
        """About once a second: some of what is missing is tried again, the longest untried first."""
        now = time.monotonic_ns()
        for block_map in self.maps:
            _delete_stale(block_map)
            again = dict(islice(block_map.missing.items(), RETRIES))
            if again:
                _update(block_map, again, now)

    def _write_alone(self, item: TimedOut) -> bool:
        """One new source, as in nearly every turn with a verdict.  False: nothing is done, it goes the long way.

        One call of the kernel and little on the way to it: until then the kernel lets that source in.
        """
        for block_map in self.maps:
            if key := block_map.key(item.key):
                return item.end > 0 and _add(block_map, key, item.end)
        return False

    def _write(self, wanted: Mapping[bytes, int], now: int) -> None:
        for block_map in self.maps:
            changes = {key: end for source, end in wanted.items() if (key := block_map.key(source))}
            if changes:
                _update(block_map, changes, now)

    # ---- for the operator -------------------------------------------------------------------------------------------

    def survey(self, dropped: set[bytes], preloaded: list[str]) -> Iterator[None]:
        """Collects, a piece at each step, what the maps hold now: others change them too, and an LRU map forgets.

        `dropped` gets the packed sources with an entry, `preloaded` the operator's own entries as networks.
        """
        now = time.monotonic_ns()
        for block_map in self.maps:
            entries = iter(_entries(block_map))
            while piece := list(islice(entries, PIECE)):
                for key, value in piece:
                    end = block_map.end(value, now)
                    address, prefix = block_map.network(key)
                    if block_map.is_theirs(key, end, now):
                        preloaded.append(_text(address, prefix))
                    if end is None or end > now:
                        dropped.add(address)
                yield None

    def others(self, source: bytes) -> str | None:
        """The map in which an entry that was not written here drops this packed source, or None."""
        now = time.monotonic_ns()
        for block_map in self.maps:
            key = block_map.key(source)
            value = key and _lookup(block_map, key)
            if key and value and value != block_map.held.get(key):
                end = block_map.end(value, now)
                return block_map.map.path if end is None or end > now else None
        return None

    def status(self) -> dict[str, Any]:
        """What `tt status` shows: each map, and the filter or why there is none."""
        maps = [
            {
                "map": m.map.path,
                "family": f"IPv{m.family}",
                "kind": m.map.kind,
                "value_bytes": m.map.value_size,
                "size": m.map.max_entries,
                "entries": len(m.held),
                "missing": len(m.missing),
                "errors": dict(m.errors),
            }
            for m in self.maps
        ]
        if self._filter is None:
            return {"maps": maps, "filter": {"attached": False, "why": self._why_no_filter}}
        return {"maps": maps, "filter": {"attached": True, "dropped": self._filter.counters()["dropped_syns"]}}

    def close(self) -> None:
        """At a clean stop: remove what this process wrote and still holds its value."""
        for block_map in self.maps:
            _delete_stale(block_map)
            ours = [key for key in block_map.held if key not in block_map.adopted]
            _remove_ours(block_map, ours, time.monotonic_ns())
            block_map.map.close()
        if self._filter is not None:
            self._filter.close()


# ---- one map --------------------------------------------------------------------------------------------------------


def _update(block_map: BlockMap, changes: Mapping[bytes, int], now: int) -> None:
    """Writes entries, those that stand there first: a full map then fails new keys alone.  What fails is `missing`."""
    renewals: dict[bytes, bytes] = {}
    new: dict[bytes, bytes] = {}
    for key, end in changes.items():
        value = block_map.value(end)
        standing = _lookup(block_map, key)
        its_end = None if standing is None else block_map.end(standing, now)
        if standing is not None and standing == block_map.stale.pop(key, None):
            block_map.held[key] = standing  # ours, which the kernel did not remove
        if standing is None:
            new[key] = value
        elif standing == block_map.held.get(key) and key not in block_map.adopted:
            if standing != value:
                renewals[key] = value
        elif its_end is not None and its_end < end:
            renewals[key] = value
        elif standing != block_map.held.get(key):  # the operator's, or it ends later: never shortened, and not ours
            _forget(block_map, key)
    _write_all(block_map, renewals, changes)
    _write_all(block_map, new, changes, all_new=True)


def _add(block_map: BlockMap, key: bytes, end: int) -> bool:
    """Writes an entry where none stands.  False: nothing is done; one stands there, or the kernel refused."""
    # Other kinds are looked at first: an LRU map may evict an entry before it sees that one stands, a trie changes it.
    if block_map.map.kind != "hash" or key in block_map.held:
        return False
    value = block_map.value(end)
    try:
        if not block_map.map.update(key, value, new=True):
            return False
    except OSError:  # said and counted by the long way, which meets it again
        return False
    block_map.held[key] = value
    block_map.missing.pop(key, None)
    return True


def _write_all(
    block_map: BlockMap, entries: Mapping[bytes, bytes], ends: Mapping[bytes, int], *, all_new: bool = False
) -> None:
    keys, values = list(entries), list(entries.values())
    at = 0
    while at < len(keys):
        done, error = _write_some(block_map, keys[at:], values[at:])
        for i in range(at, at + done):
            block_map.held[keys[i]] = values[i]
            block_map.adopted.discard(keys[i])
            block_map.missing.pop(keys[i], None)
        at += done
        if not error:
            continue
        # A full map fails every new key: one complaint of the kernel is enough for all that are left.
        failed = keys[at:] if all_new and error in FULL else keys[at : at + 1]
        fresh = sum(key not in block_map.missing for key in failed)  # a retry that fails again is no new error
        for key in failed:
            _forget(block_map, key)
            block_map.missing[key] = ends[key]  # at the end: the next retry begins with others
        _complain(block_map, error, fresh)
        at += len(failed)


def _forget(block_map: BlockMap, key: bytes) -> bytes | None:
    """No more a word of this key; the value that was held."""
    block_map.adopted.discard(key)
    block_map.missing.pop(key, None)
    block_map.stale.pop(key, None)
    return block_map.held.pop(key, None)


def _write_some(block_map: BlockMap, keys: list[bytes], values: list[bytes]) -> tuple[int, int]:
    """As bpf.Map.update_batch, but singly where there are no batches, or nothing to gain from one."""
    if block_map.batches and len(keys) >= BATCH_PAYS:
        done, error = block_map.map.update_batch(keys, values)
        if error != errno.ENOTSUP:
            return done, error
        block_map.batches = False
    return _singly(keys, lambda i: block_map.map.update(keys[i], values[i]))


def _remove_ours(block_map: BlockMap, keys: Iterable[bytes], now: int) -> None:
    """Removes entries that still hold what was written here, or have ended; another's or the operator's stay."""
    remove: dict[bytes, bytes] = {}
    for key in keys:
        ours = _forget(block_map, key)
        value = _lookup(block_map, key)
        if value is None:
            continue
        end = block_map.end(value, now)
        if value == ours or (end is not None and end <= now):
            remove[key] = value
    _delete(block_map, remove)


def _delete_stale(block_map: BlockMap) -> None:
    stale, block_map.stale = block_map.stale, {}
    _delete(block_map, {key: value for key, value in stale.items() if _lookup(block_map, key) == value})


def _delete(block_map: BlockMap, entries: Mapping[bytes, bytes]) -> None:
    """Removes entries; what the kernel does not remove is `stale`, and tried again while it holds that value."""
    keys = list(entries)
    while keys:
        done, error = _delete_some(block_map, keys)
        if error and error != errno.ENOENT:  # ENOENT: that one is gone already
            _complain(block_map, error, 1)
            block_map.stale[keys[done]] = entries[keys[done]]
        keys = keys[done + 1 :]  # a batch resumes behind the entry it stopped at


def _delete_some(block_map: BlockMap, keys: list[bytes]) -> tuple[int, int]:
    """As bpf.Map.delete_batch, but singly where there are no batches, or nothing to gain from one."""
    if block_map.batches and len(keys) >= BATCH_PAYS:
        done, error = block_map.map.delete_batch(keys)
        if error != errno.ENOTSUP:
            return done, error
        block_map.batches = False
    return _singly(keys, lambda i: block_map.map.delete(keys[i]))


def _singly(keys: list[bytes], change: Callable[[int], object]) -> tuple[int, int]:
    for done in range(len(keys)):
        try:
            change(done)
        except OSError as error:
            return done, error.errno or errno.EIO
    return len(keys), 0


def _lookup(block_map: BlockMap, key: bytes) -> bytes | None:
    """What stands in the map; None also where it cannot be read, which is counted."""
    try:
        return block_map.map.lookup(key)
    except OSError as error:
        _complain(block_map, error.errno or errno.EIO, 1)
        return None


def _entries(block_map: BlockMap) -> Iterable[tuple[bytes, bytes]]:
    """All that stands in the map; none where it cannot be read, which is counted."""
    try:
        yield from block_map.map.walk()
    except OSError as error:
        _complain(block_map, error.errno or errno.EIO, 1)


def _complain(block_map: BlockMap, error: int, count: int) -> None:
    """Counted always, said at most once a minute: an attack must not fill the log through a full map."""
    if not count:
        return
    name = errno.errorcode.get(error, str(error))
    block_map.errors[name] = block_map.errors.get(name, 0) + count
    now = time.monotonic()
    if now - block_map.complained < COMPLAINT_INTERVAL:
        return
    block_map.complained = now
    said = block_map.map
    words = "kernel map full, the server still closes these sources" if error in FULL else "kernel map not updated"
    log.event(
        logging.WARNING, words, map=said.path, size=said.max_entries, error=name, missing=len(block_map.missing)
    )  # fmt: skip


# ---- opening --------------------------------------------------------------------------------------------------------


def _open_map(path: Path, ipv6_prefix: int) -> BlockMap:
    try:
        opened = bpf.Map.open(str(path))
    except FileNotFoundError:
        raise GateError(f"{path}: no such map: make it first: {EXAMPLE.format(path)} (key 16 for IPv6)") from None
    except OSError as error:
        raise GateError(f"-B: {error.strerror}") from error
    family = FAMILIES.get((opened.kind, opened.key_size))
    if family is None or opened.value_size not in VALUE_FORMATS:
        raise GateError(
            f"{path}: of kind {opened.kind}, keys of {opened.key_size} and values of {opened.value_size} bytes: "
            "-B takes a hash with keys of 4 (IPv4) or 16 (IPv6) bytes or an LPM trie of 8 or 20, and values of 4 or 8"
        )
    if family == 6 and ipv6_prefix != 64 and opened.kind != "lpm_trie":
        raise GateError(
            f"{path}: a hash holds IPv6 /64s: for --ipv6-prefix {ipv6_prefix} make it an lpm_trie with keys of 20"
        )
    block_map = BlockMap(opened, family, ipv6_prefix)
    _check_rights(block_map)
    return block_map


def _check_rights(block_map: BlockMap) -> None:
    """Looks for a key that is not there, and deletes it: a map that refuses this will refuse time-outs."""
    size = 4 if block_map.family == 4 else 16
    try:
        for number in range(256):
            key = block_map.key(number.to_bytes(size, "big"))
            if key is not None and block_map.map.lookup(key) is None:
                block_map.map.delete(key)
                return
    except OSError as error:
        remedy = f"-B needs one that can be read and changed: {EXAMPLE.format(block_map.map.path)}"
        raise GateError(f"{error.strerror}: {remedy}") from error


def _check_clock() -> None:
    """In a time namespace our clock is not the kernel programs': time-outs would end too late or never begin."""
    try:
        offsets = Path("/proc/self/timens_offsets").read_text()
    except FileNotFoundError:
        return  # a kernel without time namespaces
    for line in offsets.splitlines():
        clock, *offset = line.split()
        if clock == "monotonic" and any(int(part) for part in offset):
            raise GateError(
                "-B: this process is in a time namespace, whose clock kernel programs do not read: run outside it"
            )


def _text(address: bytes, prefix: int) -> str:
    text = str(ip_address(address))
    return text if prefix == len(address) * 8 else f"{text}/{prefix}"


def packed(source: str) -> bytes:
    """The address of a source as text, in network order."""
    return inet_pton(AF_INET6 if ":" in source else AF_INET, source.partition("/")[0])
