"""tt/kernel_gate.py on maps of the real kernel that nobody pins: what it writes, keeps, removes, and survives."""

import errno
import logging
import os
import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from ipaddress import ip_network
from pathlib import Path

import harness
import pytest
from harness import LOGIN, Events, Running
from netns import Lab, lpm, v4, v6
from process import need

from tt import bpf_load, kernel_gate, log
from tt._core import REASON_CODES, TimedOut, TimeoutTable
from tt.bpf import Map
from tt.kernel_gate import LONGEST, BlockMap, KernelGate

SECOND = 10**9
START = 5000 * SECOND + 1  # ns: the first moment of a test; its whole seconds are over
A, B, C = "192.0.2.1", "192.0.2.2", "192.0.2.3"
SO_ATTACH_FILTER = 26


class Clock:
    """Takes the place of the module `time` in the gate."""

    def __init__(self) -> None:
        self.ns = START

    def monotonic_ns(self) -> int:
        return self.ns

    def monotonic(self) -> float:
        return self.ns / SECOND


class Gated:
    """A gate over one new map, with a time-out table whose changes reach it as the loop's do."""

    def __init__(self, clock: Clock, new: Map, ipv6_prefix: int) -> None:
        self.clock = clock
        self.map = new
        family = 4 if new.key_size in (4, 8) else 6
        self.block_map = BlockMap(Map(os.dup(self.map.fd), "/pin"), family, ipv6_prefix)
        self.gate = KernelGate([self.block_map], ipv6_prefix)
        self.table = TimeoutTable(16384, ipv6_prefix=ipv6_prefix, now=clock.ns)

    def add(self, *sources: str, seconds: float = 600) -> list[TimedOut]:
        """New time-outs in the table, as the loop reports them."""
        added = []
        for source in sources:
            r = self.table.add(source, REASON_CODES["operator"], int(seconds * SECOND), self.clock.ns)
            added.append(TimedOut(r.source, kernel_gate.packed(r.source), "operator", r.start, r.end, 0, False, b""))
        return added

    def lift(self, *sources: str) -> list[bytes]:
        for source in sources:
            self.table.remove(source)
        return [kernel_gate.packed(source) for source in sources]

    def turn(self, added: list[TimedOut] | None = None, ended: list[bytes] | None = None) -> None:
        self.gate.turn(added or [], ended or [], self.table)

    def reconcile(self, *exempt: str) -> None:
        self.gate.reconcile(self.table, [ip_network(network) for network in exempt], self.clock.ns)

    def entries(self) -> dict[bytes, bytes]:
        return dict(self.map.entries())

    def preloaded(self) -> list[str]:
        preloaded: list[str] = []
        for _ in self.gate.survey(set(), preloaded):
            pass
        return sorted(preloaded)

    def seconds(self, from_now: float) -> bytes:
        """A value of 4 bytes, rounded up."""
        return struct.pack("=I", -int(-(self.clock.ns + int(from_now * SECOND)) // SECOND))


Make = Callable[..., Gated]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(kernel_gate, "time", clock)
    return clock


@pytest.fixture
def make(clock: Clock) -> Iterator[Make]:
    need(root=True)
    made: list[Gated] = []

    def create(
        kind: str = "hash", key: int = 4, value: int = 4, *, entries: int = 1024, ipv6_prefix: int = 64
    ) -> Gated:
        new = bpf_load.create_map(kind, (key, value), entries, "tt_test")
        made.append(Gated(clock, new, ipv6_prefix))
        return made[-1]

    yield create
    for one in made:
        one.gate.close()
        one.map.close()


@pytest.fixture
def events() -> Iterator[Events]:
    events = Events()
    log.LOGGER.addHandler(events)
    log.LOGGER.setLevel(logging.INFO)
    yield events
    log.LOGGER.removeHandler(events)


# ---- keys and values ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("form", "source", "expected"),  # form: kind, bytes of a key, --ipv6-prefix
    [
        (("hash", 4, 64), A, v4(A)),
        (("lru_hash", 4, 64), "::ffff:192.0.2.1", v4(A)),
        (("lpm_trie", 8, 64), A, lpm(A, 32)),
        (("hash", 16, 64), "2001:db8:1:2::3", v6("2001:db8:1:2::")),
        (("hash", 16, 64), "fe80::1", None),  # its /64 is everybody on the link
        (("lpm_trie", 20, 64), "2001:db8:1:2::3", lpm("2001:db8:1:2::", 64)),
        (("lpm_trie", 20, 64), "fe80::1", lpm("fe80::1", 128)),
        (("lpm_trie", 20, 48), "2001:db8:1:2::3", lpm("2001:db8:1::", 48)),
        (("hash", 16, 64), A, None),  # of the other family
        (("hash", 4, 64), "2001:db8::1", None),
    ],
)
def test_a_source_becomes_the_key_that_the_kernel_program_looks_up(
    make: Make, form: tuple[str, int, int], source: str, expected: bytes | None
) -> None:
    kind, key, prefix = form
    one = make(kind, key, ipv6_prefix=prefix)
    one.turn(one.add(source))
    assert list(one.entries()) == ([] if expected is None else [expected])
    one.turn([], one.lift(one.table.entries(one.clock.ns)[0].source))
    assert one.entries() == {}


def test_an_end_is_rounded_up_to_whole_seconds_and_kept_in_nanoseconds(make: Make) -> None:
    for size, expected in ((4, struct.pack("=I", 5601)), (8, struct.pack("=Q", START + 600_500_000_000))):
        one = make(value=size)
        one.turn(one.add(A, seconds=600.5))
        assert one.entries() == {v4(A): expected}
    one = make()
    one.clock.ns = 6000 * SECOND
    one.turn(one.add(A, seconds=600))
    assert one.entries() == {v4(A): struct.pack("=I", 6600)}


def test_the_longest_time_out_is_not_taken_for_a_preloaded_entry(make: Make) -> None:
    for size in (4, 8):
        one = make(value=size)
        one.turn(one.add(A, seconds=LONGEST / SECOND))
        assert one.preloaded() == []
        one.turn([], one.lift(A))
        assert one.entries() == {}


# ---- one turn -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "size", "looks"),
    [("hash", 4, 0), ("lru_hash", 4, 1), ("lpm_trie", 8, 1)],  # the others may lose an entry before they see it stands
)
def test_a_new_source_alone_in_its_turn_is_written_to_a_hash_without_a_look(
    make: Make, monkeypatch: pytest.MonkeyPatch, kind: str, size: int, looks: int
) -> None:
    one = make(kind, size)
    lookup, asked = one.block_map.map.lookup, []
    monkeypatch.setattr(one.block_map.map, "lookup", lambda key: asked.append(key) or lookup(key))
    one.turn(one.add(A))
    assert list(one.entries().values()) == list(one.block_map.held.values()) == [one.seconds(600)]
    assert len(asked) == looks
    one.turn(one.add(A, seconds=1200))
    assert list(one.entries().values()) == list(one.block_map.held.values()) == [one.seconds(1200)]


def test_what_ends_makes_room_for_what_begins_in_the_same_turn(make: Make) -> None:
    one = make(entries=1)
    one.turn(one.add(A))
    one.turn(one.add(B), one.lift(A))
    assert list(one.entries()) == [v4(B)]
    assert one.block_map.errors == {}


def test_lifted_and_timed_out_anew_in_one_turn_stands_with_the_new_end(make: Make) -> None:
    one = make()
    one.turn(one.add(A, seconds=3600))
    ended = one.lift(A)
    one.turn(one.add(A, seconds=10), ended)
    assert one.entries() == {v4(A): one.seconds(10)}


def test_lifted_and_timed_out_anew_in_one_turn_shortens_what_was_adopted(make: Make) -> None:
    one = make()
    one.map.update(v4(A), one.seconds(3600))
    one.reconcile()
    ended = one.lift(A)
    one.turn(one.add(A, seconds=10), ended)
    assert one.entries() == {v4(A): one.seconds(10)}


def test_timed_out_and_lifted_in_one_turn_leaves_nothing(make: Make) -> None:
    one = make()
    added = one.add(A)
    one.turn(added, one.lift(A))
    assert one.entries() == {}
    one.turn(one.add(A))
    assert list(one.entries()) == [v4(A)]


def test_a_source_learnt_behind_a_proxy_is_not_written(make: Make) -> None:
    one = make()
    (direct,) = one.add(A)
    behind = direct._replace(proxied=True)
    one.turn([behind])
    assert one.entries() == {}
    one.turn([direct, behind], [v4(A)])  # lifted between: what runs is the later one
    assert one.entries() == {}
    one.turn([behind, direct], [v4(A)])
    assert list(one.entries()) == [v4(A)]


def test_an_exempt_or_only_observed_source_is_not_written(make: Make) -> None:
    one = make()
    one.turn([TimedOut(A, v4(A), "not_protocol", 0, 0, 0, True, b"GET /")])
    assert one.entries() == {}


def test_a_full_map_fails_new_sources_alone_wherever_they_stand_in_the_turn(make: Make) -> None:
    one = make(entries=4)
    known = [f"192.0.2.{number}" for number in range(4)]
    one.turn(one.add(*known))
    new = [f"198.51.100.{number}" for number in range(20)]
    one.turn(one.add(*new[:10], *known, *new[10:], seconds=1200))
    assert one.entries() == dict.fromkeys(map(v4, known), one.seconds(1200))
    assert set(one.block_map.missing) == set(map(v4, new))
    assert one.block_map.errors == {"E2BIG": 20}


def test_an_entry_that_another_server_made_is_renewed_in_a_full_map(make: Make) -> None:
    one = make(entries=2)
    for source in (A, B):
        one.map.update(v4(source), one.seconds(5))
    one.turn(one.add(C, A))
    assert one.entries() == {v4(A): one.seconds(600), v4(B): one.seconds(5)}


def test_a_full_map_is_said_once_a_minute_and_counted_once_a_source(make: Make, events: Events) -> None:
    one = make(entries=2)
    one.turn(one.add(A, B))
    for number in range(130):
        one.turn(one.add(f"198.51.100.{number}"))
        one.gate.tick()
        one.clock.ns += SECOND
    said = events.of("kernel map full, the server still closes these sources")
    assert [(event["map"], event["size"], event["error"], event["missing"]) for event in said] == [
        ("/pin", 2, "E2BIG", number) for number in (1, 61, 121)
    ]
    assert one.block_map.errors == {"E2BIG": 130}


def test_what_found_no_room_follows_when_there_is_some_and_its_end_is_forgotten(make: Make) -> None:
    one = make(entries=2)
    one.turn(one.add(A, B))
    one.turn(one.add(C))
    one.turn([], one.lift(A))
    one.gate.tick()
    assert set(one.entries()) == {v4(B), v4(C)}
    one.turn(one.add(A))
    one.turn([], one.lift(A))
    assert one.block_map.missing == {}


def test_missing_sources_take_turns_to_be_tried_again(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that the map refuses for ever must not keep the others waiting."""
    monkeypatch.setattr(kernel_gate, "RETRIES", 1)
    one = make(entries=1)
    one.turn(one.add(A))
    one.turn(one.add(B, C))
    assert list(one.block_map.missing) == [v4(B), v4(C)]
    one.gate.tick()
    assert list(one.block_map.missing) == [v4(C), v4(B)]


def test_a_batch_goes_on_behind_the_entry_that_failed(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    one = make()
    update, delete = one.block_map.map.update_batch, one.block_map.map.delete_batch
    sources = [f"192.0.2.{number}" for number in range(10)]

    def failing_update(keys: list[bytes], values: list[bytes]) -> tuple[int, int]:
        at = keys.index(v4(sources[3])) if v4(sources[3]) in keys else len(keys)
        update(keys[:at], values[:at])
        return at, errno.ENOMEM if at < len(keys) else 0

    monkeypatch.setattr(one.block_map.map, "update_batch", failing_update)
    one.turn(one.add(*sources))
    assert set(one.entries()) == {v4(source) for source in sources if source != sources[3]}
    assert one.block_map.errors == {"ENOMEM": 1}
    monkeypatch.undo()

    one.map.delete(v4(sources[5]))
    # All entries seem to stand, though one is gone when the batch comes.
    monkeypatch.setattr(one.block_map.map, "lookup", dict(one.block_map.held).get)
    deletes: list[int] = []
    monkeypatch.setattr(one.block_map.map, "delete_batch", lambda keys: deletes.append(len(keys)) or delete(keys))
    one.turn([], one.lift(*sources))
    assert one.entries() == {}
    assert deletes == [9, 4]  # the second begins behind the one that was gone


@contextmanager
def refused(one: Gated, source: str) -> Iterator[None]:
    """Within it the kernel refuses to delete one source, singly or in a batch: as when another CPU has its bucket."""
    key, delete, delete_batch = v4(source), one.block_map.map.delete, one.block_map.map.delete_batch

    def refusing(wanted: bytes) -> bool:
        if wanted == key:
            raise one.map.error(errno.EBUSY)
        return delete(wanted)

    def refusing_batch(keys: list[bytes]) -> tuple[int, int]:
        if key not in keys:
            return delete_batch(keys)
        assert delete_batch(keys[: keys.index(key)]) == (keys.index(key), 0)
        return keys.index(key), errno.EBUSY

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(one.block_map.map, "delete", refusing)
        patch.setattr(one.block_map.map, "delete_batch", refusing_batch)
        yield


@pytest.mark.parametrize("count", [1, 10], ids=["single", "batch"])
def test_what_the_kernel_refused_to_delete_is_tried_again_until_it_is_gone(make: Make, count: int) -> None:
    one = make()
    sources = [f"192.0.2.{number}" for number in range(count)]
    last = sources[count // 2]
    one.turn(one.add(*sources))
    with refused(one, last):
        one.turn([], one.lift(*sources))
        assert list(one.entries()) == [v4(last)]
        one.gate.tick()
        assert list(one.entries()) == [v4(last)]
    one.gate.tick()
    assert one.entries() == {}
    assert one.block_map.errors == {"EBUSY": 2}


def test_what_the_kernel_refused_to_delete_at_the_start_is_tried_again(make: Make) -> None:
    one = make()
    for source in (A, B):
        one.map.update(v4(source), one.seconds(60))
    with refused(one, A):
        one.reconcile("192.0.2.0/24")
    one.gate.tick()
    assert one.entries() == {}


def test_what_was_written_since_a_refused_delete_stays(make: Make) -> None:
    one = make()
    one.turn(one.add(A, B))
    for source in (A, B):
        with refused(one, source):
            one.turn([], one.lift(source))
    one.map.update(v4(A), bytes(4))  # by the operator
    one.turn(one.add(B, seconds=1200))
    one.gate.tick()
    assert one.entries() == {v4(A): bytes(4), v4(B): one.seconds(1200)}


def test_a_map_without_batches_is_changed_singly(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    one = make()
    asked: list[str] = []
    monkeypatch.setattr(one.block_map.map, "update_batch", lambda *_: asked.append("update") or (-1, errno.ENOTSUP))
    monkeypatch.setattr(one.block_map.map, "delete_batch", lambda *_: asked.append("delete") or (-1, errno.ENOTSUP))
    sources = [f"192.0.2.{number}" for number in range(10)]
    one.turn(one.add(*sources[:5]))
    one.turn(one.add(*sources[5:]))
    assert len(one.entries()) == 10
    one.turn([], one.lift(*sources))
    assert one.entries() == {}
    assert asked == ["update"]  # the kernel is asked once


def test_changes_of_a_turn_are_one_batch(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    one = make()
    update, sizes = one.block_map.map.update_batch, []
    monkeypatch.setattr(
        one.block_map.map, "update_batch", lambda keys, values: sizes.append(len(keys)) or update(keys, values)
    )
    sources = [f"192.0.{number // 250}.{number % 250}" for number in range(1000)]
    added = one.add(*sources, seconds=10) + one.add(*sources)
    one.turn(added)
    assert sizes == [1000]  # one change a key
    assert set(one.entries().values()) == {one.seconds(600)}


def test_a_map_that_fails_after_the_start_ends_nothing(make: Make, events: Events) -> None:
    one = make()
    one.turn(one.add(A))
    one.block_map.map.close()
    one.turn(one.add(B), [v4(A)])
    one.gate.tick()
    assert one.preloaded() == []
    assert one.gate.others(v4(A)) is None
    assert one.gate.status()["maps"][0]["missing"] == 1
    assert one.block_map.errors["EBADF"] > 0
    assert [event["error"] for event in events.of("kernel map not updated")] == ["EBADF"]


# ---- what others write ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("foreign", [bytes(4), struct.pack("=I", 5000 + 40 * 86400), struct.pack("=I", 5000 + 86400)])
def test_an_entry_for_ever_or_with_a_later_end_is_neither_changed_nor_removed(make: Make, foreign: bytes) -> None:
    one = make()
    one.map.update(v4(A), foreign)
    one.turn(one.add(A))
    one.turn(one.add(A, seconds=1200))
    assert one.gate.others(v4(A)) == "/pin"
    one.turn([], one.lift(A))
    one.gate.close()
    assert one.entries() == {v4(A): foreign}


def test_an_entry_replaced_by_hand_is_not_ours_any_more(make: Make) -> None:
    one = make()
    one.turn(one.add(A, B))
    assert one.gate.others(v4(A)) is None
    one.map.update(v4(A), bytes(4))
    one.map.update(v4(B), one.seconds(86400))
    one.turn(one.add(A, B))
    assert one.block_map.held == {}
    one.gate.close()
    assert one.entries() == {v4(A): bytes(4), v4(B): one.seconds(86400)}


def test_an_entry_deleted_by_hand_comes_back_with_its_renewal(make: Make) -> None:
    one = make()
    one.turn(one.add(A))
    one.map.delete(v4(A))
    one.turn(one.add(A, seconds=1200))
    assert one.entries() == {v4(A): one.seconds(1200)}


def test_a_start_leaves_alone_what_no_source_of_ours_is(make: Make, events: Events) -> None:
    """Keys that the kernel programs never look up, or that cover many sources: whoever wrote them wanted that."""
    strange = {
        "hash": [v6("2001:db8::1"), v6("fe80::")],
        "lpm_trie": [lpm("2001:db8::", 32), lpm("2001:db8::1", 128), lpm("fe80::", 64), lpm("2001:db8:1::9", 64)],
    }
    for kind, keys in strange.items():
        one = make(kind, 16 if kind == "hash" else 20)
        before = dict.fromkeys(keys, one.seconds(60))
        for key, value in before.items():
            one.map.update(key, value)
        one.reconcile("2001:db8::/32")
        assert one.entries() == before
        assert one.table.entries(one.clock.ns) == []
        assert events.of("kernel map")[-1]["preloaded"] == len(keys) == len(one.preloaded())
        one.clock.ns += 100 * SECOND
        assert one.preloaded() == []  # they drop nobody any more
        one.clock.ns = START


def test_a_start_knows_the_exact_end_of_what_it_had_saved(make: Make) -> None:
    """The map's whole seconds come from the killed server; the saved table knows better, also the reason."""
    one = make()
    record = one.table.add(A, REASON_CODES["not_protocol"], 60 * SECOND, one.clock.ns)
    one.map.update(v4(A), one.seconds(60))
    one.map.update(v4(B), one.seconds(60))
    one.table.add(C, REASON_CODES["not_protocol"], 60 * SECOND, one.clock.ns)
    one.reconcile()
    assert one.table.find(A, one.clock.ns) == record
    adopted = one.table.find(B, one.clock.ns)
    assert adopted is not None
    assert (adopted.reason, adopted.end) == (REASON_CODES["adopted"], 5061 * SECOND)
    assert set(one.entries()) == {v4(A), v4(B), v4(C)}
    one.turn([], one.lift(A))
    one.gate.close()
    assert set(one.entries()) == {v4(B)}  # adopted, so it may be another server's


def test_a_survey_tells_what_stands_in_the_map_now(make: Make) -> None:
    one = make(value=8)
    one.turn(one.add(A, B))
    one.map.delete(v4(B))
    one.map.update(v4("198.51.100.1"), bytes(8))
    one.map.update(v4("198.51.100.2"), struct.pack("=Q", one.clock.ns))  # has just ended
    dropped: set[bytes] = set()
    preloaded: list[str] = []
    list(one.gate.survey(dropped, preloaded))
    assert dropped == {v4(A), v4("198.51.100.1")}
    assert preloaded == ["198.51.100.1"]


# ---- the filter -----------------------------------------------------------------------------------------------------


def deaf_listener() -> socket.socket:
    """A listening socket with a filter that drops everything, as somebody may hand it over."""
    listener = socket.create_server(("127.0.0.1", 0))
    instructions = struct.pack("=HBBI", 6, 0, 0, 0)  # BPF_RET 0
    program = kernel_gate.bpf.address(instructions)
    listener.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, struct.pack("=H6xQ", 1, program))
    return listener


@pytest.mark.parametrize("loaded", [True, False])
def test_a_filter_on_a_socket_that_was_handed_over_is_replaced_or_taken_off(make: Make, *, loaded: bool) -> None:
    one = make()
    if loaded:
        one.gate.load_filter()
    with deaf_listener() as listener:
        with pytest.raises(TimeoutError):
            socket.create_connection(listener.getsockname(), 0.3)
        one.gate.attach(listener.fileno())
        socket.create_connection(listener.getsockname(), 5).close()
        assert one.gate.status()["filter"]["attached"] is loaded


def test_the_session_of_a_user_goes_on_when_a_colleague_behind_the_same_address_is_timed_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the table, in the map, silent for new connections: and the logged-in one hears its replies."""
    need(root=True)
    one = bpf_load.create_map("hash", (4, 4), 16, "tt_test")
    with closing(KernelGate([BlockMap(one, 4, 64)], 64)) as gate:
        gate.load_filter()
        monkeypatch.setattr(harness, "open_listeners", lambda settings: open_listeners(settings, gate))
        with Running(tmp_path / "data", LOGIN) as server:
            server.guard.gate = gate
            user, transport = server.user("127.0.0.7")
            with server.connect("127.0.0.7") as colleague:
                colleague.sendall(b"GET / HTTP/1.1\r\n\r\n")
                server.await_timed_out("127.0.0.7")
            with pytest.raises(TimeoutError):
                server.connect("127.0.0.7", timeout=0.3)
            for _ in range(3):
                user.sendall(server.seal(transport, b"\0"))
                assert server.read_plaintext(user, transport) == b"\0"
            assert gate.status()["filter"]["dropped"] >= 1


open_listeners = harness.open_listeners


def test_the_lab_leaves_nothing_behind(tmp_path: Path) -> None:
    """The helper itself: its namespaces end with it."""
    with Lab(tmp_path) as lab:
        lab.make_map()
        holders = [lab.host.pid, lab.neighbour.pid]
    assert not any(Path(f"/proc/{pid}").exists() for pid in holders)


def refused_to_go(make):
    """A source that was lifted while the kernel refused to remove its entry, of 3600 s."""
    one = make()
    one.turn(one.add(A, seconds=3600))
    with refused(one, A):
        one.turn([], one.lift(A))
    return one


def test_an_entry_that_did_not_go_is_shortened_when_its_source_is_timed_out_anew_for_less(make):
    one = refused_to_go(make)
    one.turn(one.add(A, seconds=10))
    one.gate.tick()
    assert one.entries() == {v4(A): one.seconds(10)}


def test_an_entry_that_did_not_go_is_ours_again_and_goes_with_the_next_lift(make):
    one = refused_to_go(make)
    one.turn(one.add(A, seconds=3600))
    one.turn([], one.lift(A))
    one.gate.tick()
    assert one.entries() == {}


def test_an_entry_that_did_not_go_goes_at_a_clean_stop(make):
    one = refused_to_go(make)
    one.gate.close()
    assert one.entries() == {}
