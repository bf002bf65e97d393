"""tt/bpf.py on the real kernel: maps that are unpinned, or pinned in a BPF file system that this test alone sees."""

import ctypes
import errno
import os
import re
import struct
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random

import pytest
from harness import until
from process import need

from tt import bpf, bpf_load
from tt.bpf import Map

LIBC = ctypes.CDLL(None, use_errno=True)
CLONE_NEWNS = 0x20000
CAP_BPF = 39
NOBODY = 65534
VALUE = b"\x01\0\0\0"


@pytest.fixture(autouse=True)
def _root() -> None:
    need("mount", "bpftool", root=True)


@contextmanager
def own_namespace(kind: str, flag: int) -> Iterator[None]:
    """This thread in a new namespace; with it goes whatever was mounted, pinned or configured there."""
    before, folder = os.open(f"/proc/thread-self/ns/{kind}", os.O_RDONLY), Path.cwd()
    assert LIBC.unshare(flag) == 0, os.strerror(ctypes.get_errno())
    try:
        yield
    finally:
        # A thread that was begun here shares the folder with this one until it has gone, some time after its join();
        # the kernel refuses another mount namespace that long.
        until(f"the way back to the {kind} namespace", lambda: LIBC.setns(before, flag) == 0)
        os.close(before)
        os.chdir(folder)


@pytest.fixture
def bpffs(tmp_path: Path) -> Iterator[Path]:
    """A BPF file system that this thread alone sees."""
    place = tmp_path / "bpf"
    place.mkdir()
    with own_namespace("mnt", CLONE_NEWNS):
        subprocess.run(["mount", "--make-rprivate", "/"], check=True)
        subprocess.run(["mount", "-t", "bpf", "bpf", place], check=True)
        place.chmod(0o755)
        yield place


@pytest.fixture
def make() -> Iterator[Callable[..., Map]]:
    """Makes maps that are closed with the test."""
    made: list[Map] = []

    def create(kind: str = "hash", key: int = 4, value: int = 4, entries: int = 16, flags: int = 0) -> Map:
        made.append(bpf_load.create_map(kind, (key, value), entries, "tt_test", flags))
        return made[-1]

    yield create
    for one in made:
        one.close()


@contextmanager
def capabilities(*kept: int) -> Iterator[None]:
    """This thread with those capabilities alone in effect (capset(2), version 3)."""
    head, before = struct.pack("=Ii", 0x20080522, 0), ctypes.create_string_buffer(24)
    assert LIBC.capget(head, before) == 0
    words = list(struct.unpack("=6I", before.raw))
    for half in (0, 1):
        words[half * 3] = sum(1 << number % 32 for number in kept if number // 32 == half)
    assert LIBC.capset(head, struct.pack("=6I", *words)) == 0, os.strerror(ctypes.get_errno())
    try:
        yield
    finally:
        assert LIBC.capset(head, before) == 0


def key4(number: int) -> bytes:
    return struct.pack(">I", number)


def lpm(number: int) -> bytes:
    return struct.pack("=I", 32) + key4(number)


@contextmanager
def raises(number: int, sentence: str) -> Iterator[None]:
    """Expects an OSError of that errno whose sentence holds that text."""
    with pytest.raises(OSError, match=re.escape(sentence)) as caught:
        yield
    assert caught.value.errno == number


def stands_still(one: Map) -> None:
    """The map holds what it held: for a call that must change nothing."""
    assert one.entries() == []


# ---- open ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "key", "value"), [("hash", 4, 4), ("lru_hash", 16, 8), ("lpm_trie", 20, 4)])
def test_an_opened_pin_tells_what_the_kernel_knows(
    bpffs: Path, make: Callable[..., Map], kind: str, key: int, value: int
) -> None:
    path = str(bpffs / "map")
    bpf_load.pin_map(make(kind, key, value, 1024), path)
    opened = Map.open(path)
    found = opened.kind, opened.key_size, opened.value_size, opened.max_entries, opened.name, opened.path
    assert found == (kind, key, value, 1024, "tt_test", path)
    assert opened.flags == (bpf_load.NO_PREALLOC if kind == "lpm_trie" else 0)
    opened.close()


def test_the_products_own_command_makes_a_map_that_opens_under_its_cut_name(bpffs: Path) -> None:
    words = ["type", "hash", "key", "4", "value", "4", "entries", "1024", "name", "tapetrack_block_map"]
    subprocess.run(["bpftool", "map", "create", bpffs / "map", *words], check=True)
    opened = Map.open(str(bpffs / "map"))
    assert (opened.kind, opened.max_entries, opened.name) == ("hash", 1024, "tapetrack_block")
    opened.update(key4(1), VALUE)
    assert opened.entries() == [(key4(1), VALUE)]
    opened.close()


def test_a_kind_without_a_word_of_ours_is_its_number(bpffs: Path) -> None:
    attr = struct.pack("=5I", 27, 0, 0, os.sysconf("SC_PAGE_SIZE"), 0)  # a ring buffer has neither keys nor values
    ring = Map(bpf.call(bpf_load.MAP_CREATE, attr, {}, ""))
    bpf_load.pin_map(ring, str(bpffs / "ring"))
    ring.close()
    opened = Map.open(str(bpffs / "ring"))
    assert (opened.kind, opened.key_size, opened.value_size) == ("27", 0, 0)
    opened.close()


def test_opening_nothing_says_to_pin_a_map_first(bpffs: Path) -> None:
    with raises(errno.ENOENT, f"there is no {bpffs}/none: pin a map there first"):
        Map.open(f"{bpffs}/none")


def test_opening_what_is_no_map_says_so(bpffs: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    filter_ = bpf_load.load_listener_filter({}, 64)
    program = os.fsencode(bpffs / "program")
    bpf.call(bpf_load.OBJ_PIN, struct.pack("=QII", bpf.address(program), filter_.fd, 0), {}, "")
    filter_.close()
    before = len(os.listdir("/proc/self/fd"))
    for path in (tmp_path / "file", tmp_path, bpffs, bpffs / "program"):
        with raises(errno.EINVAL, f"{path} is not a pinned map"):
            Map.open(str(path))
    assert len(os.listdir("/proc/self/fd")) == before


def test_opening_without_the_right_says_what_is_needed(bpffs: Path, make: Callable[..., Map]) -> None:
    path = bpffs / "map"
    bpf_load.pin_map(make(), str(path))
    path.chmod(0o640)
    os.chown(path, NOBODY, 0)  # root's group may read it, not write it
    with capabilities(), raises(errno.EACCES, f"no right to open {path}: needs root, or a file and folder mode"):
        Map.open(str(path))
    path.chmod(0o660)
    with capabilities(CAP_BPF):  # on the newest kernels needless, before 5.19 not
        opened = Map.open(str(path))
        opened.update(key4(1), VALUE)
        opened.close()


def test_pinning_badly_says_what_a_pin_needs(bpffs: Path, tmp_path: Path, make: Callable[..., Map]) -> None:
    one = make()
    bpf_load.pin_map(one, str(bpffs / "map"))
    with raises(errno.EEXIST, f"cannot pin at {bpffs}/map: something is there already"):
        bpf_load.pin_map(one, str(bpffs / "map"))
    for path in (bpffs / "a.b", tmp_path / "map"):
        with raises(errno.EPERM, f"cannot pin at {path}: needs a BPF file system (/sys/fs/bpf), a name without a dot"):
            bpf_load.pin_map(one, str(path))
    with raises(errno.ENOENT, f"cannot pin at {bpffs}/no/map: there is no such folder"):
        bpf_load.pin_map(one, str(bpffs / "no" / "map"))


def test_making_a_map_without_the_right_says_what_is_needed() -> None:
    with capabilities(), raises(errno.EPERM, "no right to make map tt_test: needs CAP_BPF or root"):
        bpf_load.create_map("hash", (4, 4), 1, "tt_test")


# ---- one entry -------------------------------------------------------------------------------------------------------


def test_an_entry_is_added_changed_found_and_removed(make: Callable[..., Map]) -> None:
    one = make()
    assert one.lookup(key4(1)) is None
    one.update(key4(1), VALUE)
    assert one.lookup(key4(1)) == VALUE
    one.update(key4(1), b"\x02\0\0\0")
    assert one.entries() == [(key4(1), b"\x02\0\0\0")]
    assert one.delete(key4(1)) is True
    assert one.delete(key4(1)) is False
    assert one.entries() == []


@pytest.mark.parametrize("kind", ["hash", "lru_hash"])
def test_a_new_entry_never_changes_the_one_that_stands(make: Callable[..., Map], kind: str) -> None:
    one = make(kind)
    assert one.update(key4(1), VALUE, new=True)
    assert not one.update(key4(1), b"\x02\0\0\0", new=True)
    assert one.entries() == [(key4(1), VALUE)]


def test_keys_and_values_of_another_length_never_reach_the_kernel(make: Callable[..., Map]) -> None:
    one = make()
    for key, value in ((b"\0" * 3, VALUE), (b"\0" * 5, VALUE), (key4(0), b"\0" * 3), (key4(0), b"\0" * 5)):
        with pytest.raises(ValueError, match="assignment"):
            one.update(key, value)
        with pytest.raises(ValueError, match="map tt_test has keys of 4 and values of 4 bytes"):
            one.update_batch([key], [value])
    with pytest.raises(ValueError, match="map tt_test has keys of 4"):
        one.update_batch([key4(0), key4(1)], [VALUE])
    with pytest.raises(ValueError, match="map tt_test has keys of 4"):
        one.delete_batch([b"\0" * 3])
    stands_still(one)


def test_a_full_hash_refuses_new_keys_alone_and_names_its_size(bpffs: Path, make: Callable[..., Map]) -> None:
    bpf_load.pin_map(make(entries=3), str(bpffs / "map"))
    one = Map.open(str(bpffs / "map"))
    for number in range(3):
        one.update(key4(number), VALUE)
    with raises(errno.E2BIG, f"map {bpffs}/map is full: 3 entries"):
        one.update(key4(3), VALUE)
    one.update(key4(2), b"\x02\0\0\0")
    assert one.delete(key4(0))
    one.update(key4(3), VALUE)
    assert dict(one.entries()) == {key4(1): VALUE, key4(2): b"\x02\0\0\0", key4(3): VALUE}
    one.close()


def test_a_full_trie_names_its_size(make: Callable[..., Map]) -> None:
    one = make("lpm_trie", 8, entries=1)
    one.update(lpm(1), VALUE)
    with raises(errno.ENOSPC, "map tt_test is full: 1 entries"):
        one.update(lpm(2), VALUE)


def test_a_trie_refuses_a_prefix_longer_than_an_address(make: Callable[..., Map]) -> None:
    one = make("lpm_trie", 8)
    with raises(errno.EINVAL, "map tt_test takes no such key or value"):
        one.update(struct.pack("=I", 33) + key4(1), VALUE)


def test_a_frozen_map_says_so_and_keeps_its_entries(make: Callable[..., Map]) -> None:
    one = make()
    one.update(key4(1), VALUE)
    bpf_load.freeze_map(one)
    sentence = "no right to change map tt_test: it is frozen or read-only, or this kernel asks for CAP_BPF"
    with raises(errno.EPERM, sentence):
        one.update(key4(2), VALUE)
    with raises(errno.EPERM, sentence):
        one.delete(key4(1))
    assert one.update_batch([key4(2), key4(3)], [VALUE] * 2) == (0, errno.EPERM)
    assert one.delete_batch([key4(1)]) == (0, errno.EPERM)
    assert str(one.error(errno.EPERM)) == f"[Errno {int(errno.EPERM)}] {sentence}"
    assert one.entries() == [(key4(1), VALUE)]


def test_a_map_that_cannot_delete_says_so(make: Callable[..., Map]) -> None:
    with raises(errno.EINVAL, "map tt_test takes no such key or value"):
        make("array").delete(bytes(4))


def test_a_closed_map_never_changes_the_one_that_got_its_number(make: Callable[..., Map]) -> None:
    first = make()
    number = first.fd
    first.close()
    first.close()
    second = make()
    assert second.fd == number
    for act in (
        lambda: first.update(key4(1), VALUE),
        lambda: first.delete(key4(1)),
        lambda: first.lookup(key4(1)),
        first.entries,
    ):
        with raises(errno.EBADF, os.strerror(errno.EBADF)):
            act()
    assert first.update_batch([key4(1)], [VALUE]) == (0, errno.EBADF)
    stands_still(second)


def test_a_per_cpu_value_holds_one_for_every_possible_cpu(make: Callable[..., Map]) -> None:
    one = make("percpu_array", 4, 12, 2)
    value = b"".join(bytes([number]) * 12 + bytes(4) for number in range(bpf.possible_cpus()))
    one.update(bytes(4), value)
    assert one.lookup(bytes(4)) == value
    assert dict(one.entries())[bytes(4)] == value


# ---- batches ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["hash", "lru_hash"])
def test_a_batch_does_all_of_it(make: Callable[..., Map], kind: str) -> None:
    # Room for all: each processor keeps up to 128 free places of an LRU map for itself, so that one which runs this
    # later may find none while it is not full, and evict.
    one = make(kind, entries=1024 if kind == "hash" else 8192)
    keys = [key4(number) for number in range(1000)]
    assert one.update_batch(keys, [struct.pack("=I", number) for number in range(1000)]) == (1000, 0)
    assert dict(one.entries()) == {key4(number): struct.pack("=I", number) for number in range(1000)}
    assert one.delete_batch(keys[:999]) == (999, 0)
    assert one.entries() == [(key4(999), struct.pack("=I", 999))]


def test_a_batch_into_a_map_nearly_full_stops_at_the_first_key_too_many(make: Callable[..., Map]) -> None:
    one = make(entries=8)
    assert one.update_batch([key4(number) for number in range(6)], [VALUE] * 6) == (6, 0)
    keys = [key4(number) for number in (0, 6, 7, 8, 1)]
    assert one.update_batch(keys, [b"\x02\0\0\0"] * 5) == (3, errno.E2BIG)
    assert one.error(errno.E2BIG).strerror == "map tt_test is full: 8 entries"
    assert one.update_batch(keys[4:], [b"\x02\0\0\0"]) == (1, 0)  # behind it: a renewal
    changed = {key4(number) for number in (0, 6, 7, 1)}
    assert {key for key, value in one.entries() if value != VALUE} == changed


def test_a_batch_that_deletes_an_absent_key_stops_there(make: Callable[..., Map]) -> None:
    one = make()
    one.update_batch([key4(1), key4(3)], [VALUE] * 2)
    assert one.delete_batch([key4(1), key4(2), key4(3)]) == (1, errno.ENOENT)
    assert one.entries() == [(key4(3), VALUE)]
    assert one.delete_batch([key4(2)]) == (0, errno.ENOENT)
    assert one.delete_batch([key4(3)]) == (1, 0)


def test_an_empty_batch_is_done(make: Callable[..., Map]) -> None:
    one = make()
    assert one.update_batch([], []) == (0, 0)
    assert one.delete_batch([]) == (0, 0)


def test_a_kind_without_batches_says_so(make: Callable[..., Map]) -> None:
    one = make("array")
    assert one.delete_batch([bytes(4)]) == (-1, errno.ENOTSUP)


# ---- walks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 7, 4096])
def test_a_walk_sees_every_entry_once_whatever_its_chunk(
    make: Callable[..., Map], monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    """A chunk of 1: some bucket of a hash holds more than that, and the kernel then answers ENOSPC."""
    monkeypatch.setattr(bpf, "CHUNK", chunk)
    one = make(entries=1024)
    expected = {key4(number): struct.pack("=I", number) for number in range(1000)}
    one.update_batch(list(expected), list(expected.values()))
    found = one.entries()
    assert len(found) == 1000
    assert dict(found) == expected


def test_a_caller_may_delete_all_it_walks_over(make: Callable[..., Map]) -> None:
    for kind, size, key in (("hash", 4, key4), ("lru_hash", 4, key4), ("lpm_trie", 8, lpm)):
        one = make(kind, size, entries=1024)
        for number in range(1000):
            one.update(key(number), VALUE)
        assert all(one.delete(entry) for entry, _ in one.entries())
        stands_still(one)


@pytest.mark.parametrize(("kind", "size", "key"), [("hash", 4, key4), ("lru_hash", 4, key4), ("lpm_trie", 8, lpm)])
def test_what_stays_is_found_once_while_others_delete_and_add(
    make: Callable[..., Map], monkeypatch: pytest.MonkeyPatch, kind: str, size: int, key: Callable[[int], bytes]
) -> None:
    """Between any two calls of the walk another one removes what it was at, and adds."""
    monkeypatch.setattr(bpf, "CHUNK", 16)
    one = make(kind, size, entries=4096)
    other = Map(os.dup(one.fd))
    staying = {key(number): VALUE for number in range(0, 600, 2)}
    passing = [key(number) for number in range(1, 600, 2)]
    for entry in [*staying, *passing]:
        other.update(entry, VALUE)
    random, looked, walked = Random(1), Map.lookup, Map._call_batch
    new = iter(range(10_000, 20_000))

    def disturb() -> None:
        for _ in range(2):
            if passing:
                other.delete(passing.pop(random.randrange(len(passing))))
                other.update(key(next(new)), VALUE)

    def lookup(self: Map, entry: bytes) -> bytes | None:
        if self is one and entry in passing:  # removed under the walk's feet: it starts again
            other.delete(passing.pop(passing.index(entry)))
        disturb()
        return looked(self, entry)

    def call_batch(self: Map, command: int, *form: int) -> tuple[int, int]:
        disturb()
        return walked(self, command, *form)

    monkeypatch.setattr(Map, "lookup", lookup)
    monkeypatch.setattr(Map, "_call_batch", call_batch)
    found = one.entries()
    assert len(passing) < 300  # some did go meanwhile
    assert len({entry for entry, _ in found}) == len(found)
    assert staying.items() <= set(found)
    other.close()


def test_an_array_is_walked_key_by_key(make: Callable[..., Map]) -> None:
    one = make("array", entries=3)
    one.update(b"\x02\0\0\0", VALUE)
    assert one.entries() == [(struct.pack("=I", number), VALUE if number == 2 else bytes(4)) for number in range(3)]
