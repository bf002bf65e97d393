"""`-B` end to end: the real server process, the real kernel, peers in a second network namespace."""

import os
import re
import shlex
import struct
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from harness import until
from netns import (
    FAR,
    HOST,
    MAP,
    MAP6,
    NEAR,
    NEAR_TOO,
    NEIGHBOURS,
    Lab,
    lpm,
    seconds,
    until_past,
    v4,
    v6,
)
from process import BIN, refused

from tt import bpf_load, keys
from tt.client import Client
from tt.kernel_gate import GateError, KernelGate

A, B, C, D = NEIGHBOURS
DAY = 86400
CREATE = "bpftool map create {} type hash key {} value 4 entries 1024 name tapetrack_block_map"


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    with Lab(tmp_path) as lab:
        yield lab


def end_of(value: bytes | None) -> int:
    """What an entry means, ns of CLOCK_MONOTONIC."""
    assert value is not None
    return struct.unpack("=Q", value)[0] if len(value) == 8 else struct.unpack("=I", value)[0] * 10**9


# ---- the product's two commands --------------------------------------------------------------------------------------


def test_a_scanner_is_served_timed_out_silent_and_served_again_in_both_families(lab: Lab) -> None:
    for path, size in ((MAP, 4), (MAP6, 16)):
        lab.host.run(*CREATE.format(path, size).split())
    map4, map6 = lab.open_map(MAP), lab.open_map(MAP6)
    with lab.serve("-B", MAP, "-B", MAP6, "--timeout", "8") as server:
        assert lab.note_programs(server)
        for source, colleague, other in ((A, A, B), (NEAR, NEAR_TOO, FAR)):
            assert lab.meet(server, source) == "served"
            lab.misbehave(server, source)
            assert lab.meet(server, source) == "silent"
            assert lab.meet(server, colleague) == "silent"  # IPv6: the same /64
            assert lab.meet(server, other) == "served"
        shown = lab.host.run("bpftool", "map", "dump", "pinned", MAP)
        assert re.search(r"key: 0a 37 00 02\s+value: ", shown)
        listed = lab.tt(server, "bans", "list")
        assert re.search(r"^10\.55\.0\.2 +not_protocol +\S+Z +0:0\d +0 +0 yes +HTTP request$", listed, re.M), listed
        assert re.search(r"^2001:db8:a::/64 +not_protocol .* yes +HTTP request$", listed, re.M), listed
        until("the end of both", lambda: not map4.entries() and not map6.entries(), 30)
        assert [lab.meet(server, source) for source in (A, NEAR)] == ["served", "served"]

        lab.misbehave(server, B)
        assert lab.meet(server, B) == "silent"
        assert "1 time-out lifted" in lab.tt(server, "bans", "remove", B)
        assert lab.meet(server, B) == "served"


def test_the_map_is_written_in_the_turn_of_the_verdict(lab: Lab) -> None:
    """When the log says it, the entry is there: the gate comes first."""
    one = lab.make_map()
    with lab.serve("-B", MAP) as server:
        for source in (A, B, C):
            lab.misbehave(server, source)
            assert one.lookup(v4(source)) is not None


def test_a_session_goes_on_when_its_source_stands_in_the_map(lab: Lab) -> None:
    one = lab.make_map()
    with lab.serve("-B", MAP) as server:
        public = keys.from_text((lab.place / "data/server.pub").read_text())
        with lab.neighbour.network():
            session = Client(HOST, server.port, key=public, source=A)
            session.connect()
        one.update(v4(A), seconds(60))
        assert lab.meet(server, A) == "silent"
        for _ in range(3):
            session.ping()
        session.close()


# ---- nobody is blocked past his end ----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [4, 8])
def test_after_kill_9_nobody_is_blocked_past_his_end_and_the_next_start_reconciles(
    lab: Lab, tmp_path: Path, size: int
) -> None:
    """Another server's filter reads the same map, so it goes on blocking for the one that was killed."""
    one = lab.make_map(value=size)
    (tmp_path / "other").mkdir()
    with lab.serve("-B", MAP, place=tmp_path / "other", listen=f"{HOST}:5001") as other:
        with lab.serve("-B", MAP, "--timeout", "6") as server:
            lab.note_programs(server)
            lab.note_programs(other)
            lab.tt(server, "bans", "add", B, "--for", "60")
            began = time.monotonic_ns()
            lab.misbehave(server, A)
            server.kill()
        end = end_of(one.lookup(v4(A)))
        assert began + 6e9 <= end <= time.monotonic_ns() + 6e9 + (1e9 if size == 4 else 0)
        assert lab.meet(other, A, 5001) == "silent"
        until_past(end)
        assert lab.meet(other, A, 5001) == "served"
        assert one.lookup(v4(A)) is not None  # nobody removed it

        with lab.serve("-B", MAP) as server:
            server.await_line(rf"kernel map map={MAP} adopted=1 ended=1 exempt=0 preloaded=0\n")
            assert one.lookup(v4(A)) is None
            assert lab.bans(server)[B]["in_kernel"] is True
            assert lab.meet(server, A) == "served"
            assert lab.meet(server, B) == "silent"


@pytest.mark.parametrize("size", [4, 8])
def test_a_program_that_tests_presence_alone_lets_everybody_in_within_20_ms_of_his_end(lab: Lab, size: int) -> None:
    one = lab.make_map(value=size)
    overdue: list[float] = []  # the latest of each round, with the asking: other work on this machine may delay some
    with lab.serve("-B", MAP) as server:
        while not overdue or (min(overdue) >= 0.02 and len(overdue) < 30):
            began = time.monotonic()
            lab.ask(server, *({"do": "bans.add", "source": source, "seconds": 1} for source in (A, B, C)))
            until("the end of the entries", lambda: not any(one.lookup(v4(source)) for source in (A, B, C)))
            overdue.append(time.monotonic() - began - 1)
    assert min(overdue) < 0.02, overdue


# ---- what others write -----------------------------------------------------------------------------------------------


def test_a_start_adopts_what_runs_drops_what_ended_or_is_exempt_and_keeps_what_is_preloaded(lab: Lab) -> None:
    one = lab.make_map()
    for_ever, longer_than_30_days = bytes(4), seconds(40 * DAY)
    entries = {
        A: for_ever,
        B: longer_than_30_days,
        C: seconds(60),
        "192.0.2.1": seconds(-5),
        "198.51.100.7": seconds(60),
    }
    for address, value in entries.items():
        one.update(v4(address), value)
    with lab.serve("-B", MAP, "--exempt", "198.51.100.0/24") as server:
        server.await_line(rf"kernel map map={MAP} adopted=1 ended=1 exempt=1 preloaded=2\n")
        kept = {v4(address): entries[address] for address in (A, B, C)}
        assert dict(one.entries()) == kept
        listed = lab.bans(server)
        assert (listed[A]["reason"], listed[B]["reason"], listed[C]["reason"]) == ("preloaded", "preloaded", "adopted")
        assert re.search(rf"^{A} +preloaded +never +yes$", lab.tt(server, "bans", "list"), re.M)
        assert [lab.meet(server, source) for source in (A, B, C, D)] == ["silent", "silent", "silent", "served"]
        lab.misbehave(server, D)
        assert one.lookup(v4(D)) is not None
    assert dict(one.entries()) == kept  # a clean stop removes its own alone


def test_a_preloaded_source_that_misbehaves_stays_preloaded(lab: Lab) -> None:
    one = lab.make_map()
    entries = {v4(A): bytes(4), v4(B): seconds(40 * DAY)}
    for key, value in entries.items():
        one.update(key, value)
    with lab.serve("-B", MAP, "--no-listener-filter", "--timeout", "8") as server:
        for source in (A, B):
            lab.misbehave(server, source)
            assert lab.meet(server, source) == "closed"
            answer = lab.tt(server, "bans", "remove", source, code=1)
            assert f"1 time-out lifted\ntt: {source} is still dropped by an entry of {MAP}" in answer
            lab.misbehave(server, source)
        until("the end of both", lambda: lab.ask(server, {"do": "status"})[0]["table"]["running"] == 0, 30)
        assert dict(one.entries()) == entries
        assert f"{A} is not timed out; its earlier" in lab.tt(server, "bans", "remove", A, code=1)
    assert dict(one.entries()) == entries


def test_a_map_changed_by_hand_meanwhile_is_the_operators_word(lab: Lab) -> None:
    one = lab.make_map()
    with lab.serve("-B", MAP, "--timeout", "8", "--no-listener-filter") as server:
        for source in (A, B, C):
            lab.misbehave(server, source)
        one.delete(v4(A))
        one.update(v4(B), bytes(4))
        foreign = seconds(3600)
        one.update(v4(C), foreign)
        listed = lab.bans(server)
        assert [listed[source]["in_kernel"] for source in (A, C)] == [False, True]
        assert lab.meet(server, A) == "closed"  # the table is the truth
        lab.tt(server, "bans", "add", A, "--for", "1m")  # a renewal writes it again
        lab.tt(server, "bans", "add", C, "--for", "1m")  # but shortens nothing
        assert end_of(one.lookup(v4(A))) > time.monotonic_ns() + 50e9
        lab.tt(server, "bans", "remove", A)
        lab.tt(server, "bans", "remove", C, code=1)
        until("the end of B", lambda: lab.meet(server, B) == "served", 30)
        assert dict(one.entries()) == {v4(B): bytes(4), v4(C): foreign}


def test_two_servers_on_one_map_each_remove_their_own(lab: Lab, tmp_path: Path) -> None:
    one = lab.make_map()
    (tmp_path / "other").mkdir()
    with lab.serve("-B", MAP) as first:
        lab.misbehave(first, A)
        with lab.serve("-B", MAP, place=tmp_path / "other", listen=f"{HOST}:5001") as second:
            second.await_line("adopted=1")
            with lab.connect(B, 5001) as peer:
                peer.sendall(b"GET / HTTP/1.1\r\n\r\n")
            second.await_timed_out(B)
            assert [lab.meet(first, source) for source in (A, B, C)] == ["silent", "silent", "served"]
        assert [key for key, _ in one.entries()] == [v4(A)]
        assert lab.meet(first, B) == "served"
    assert one.entries() == []


# ---- full, and other kinds of maps -----------------------------------------------------------------------------------


def test_5000_time_outs_in_a_map_of_1024_are_all_kept_by_the_server(lab: Lab) -> None:
    one = lab.make_map()
    began = time.monotonic()
    with lab.serve("-B", MAP) as server:
        lab.misbehave(server, A)
        sources = [f"192.0.{2 + i // 250}.{i % 250}" for i in range(5000)]
        assert all("end" in answer for answer in lab.ask(server, *({"do": "bans.add", "source": s} for s in sources)))
        assert len(one.entries()) == 1024
        lab.tt(server, "bans", "add", A, "--for", "3h")
        assert end_of(one.lookup(v4(A))) > time.monotonic_ns() + 2 * 3600e9  # a renewal finds its place in a full map
        with lab.connect(B) as peer:
            peer.sendall(b"GET / HTTP/1.1\r\n\r\n")
            until("the time-out of B", lambda: B in lab.bans(server))
        assert lab.meet(server, B) == "closed"
        status = lab.tt(server, "status")
        assert re.search(
            r"IPv4, hash, values of 4 bytes, 1024 of 1024 entries, 3978 missing, errors: E2BIG 3978$", status, re.M
        )
        line, *more = re.findall(r".*kernel map full.*", server.log)
        assert len(more) <= (time.monotonic() - began) / 60, "it is said once a minute"
        assert f"the server still closes these sources map={MAP} size=1024 error=E2BIG" in line
        assert sum(item["in_kernel"] for item in lab.bans(server).values()) == 1024
        # Room is used: what is missing is tried again, once a second, so perhaps before `tt` has ended.
        lifted = {v4(source) for source in sources[:500]}
        assert len(lifted & {key for key, _ in one.entries()}) == 500
        assert "500 time-outs lifted" in lab.tt(server, "bans", "remove", "192.0.2.0/23")
        assert not lifted & {key for key, _ in one.entries()}
        until("those that are missing to follow", lambda: len(one.entries()) == 1024)


@pytest.mark.parametrize(
    ("kind", "key", "prefix", "sources"),
    [
        ("lru_hash", 4, 64, {A: "silent", B: "served"}),
        ("lru_hash", 16, 64, {NEAR: "silent", NEAR_TOO: "silent", FAR: "served"}),
        ("lpm_trie", 8, 64, {A: "silent", B: "served"}),
        ("lpm_trie", 20, 40, {NEAR: "silent", FAR: "silent"}),
        ("lpm_trie", 20, 128, {NEAR: "silent", NEAR_TOO: "served"}),
    ],
)
def test_every_kind_of_map_blocks_and_lets_go(
    lab: Lab, kind: str, key: int, prefix: int, sources: dict[str, str]
) -> None:
    one = lab.make_map(kind=kind, key=key, value=8)
    source = next(iter(sources))
    with lab.serve("-B", MAP, "--ipv6-prefix", str(prefix)) as server:
        lab.misbehave(server, source, ipv6_prefix=prefix)
        assert {source: lab.meet(server, source) for source in sources} == sources
        assert [item["in_kernel"] for item in lab.bans(server).values()] == [True]
        lab.tt(server, "bans", "remove", source)
        assert lab.meet(server, source) == "served"
        assert one.entries() == []


def test_a_network_preloaded_into_a_trie_blocks_all_of_it_for_ever(lab: Lab) -> None:
    one = lab.make_map(kind="lpm_trie", key=8)
    one.update(lpm("10.55.0.4", 31), bytes(4))
    with lab.serve("-B", MAP, "--timeout", "1") as server:
        assert [lab.meet(server, source) for source in (A, C, D)] == ["served", "silent", "silent"]
        assert lab.bans(server)["10.55.0.4/31"]["reason"] == "preloaded"
        lab.tt(server, "bans", "add", C)  # an entry of its own would end, and then let it in
        lab.tt(server, "bans", "remove", C, code=1)
        assert one.entries() == [(lpm("10.55.0.4", 31), bytes(4))]
        assert lab.meet(server, C) == "silent"


# ---- rights and refusals ---------------------------------------------------------------------------------------------


def without(*capabilities: str) -> tuple[str, ...]:
    return ("setpriv", "--bounding-set", ",".join(f"-{name}" for name in capabilities))


def test_without_the_right_to_load_the_map_is_kept_all_the_same(lab: Lab) -> None:
    one = lab.make_map()
    with lab.serve("-B", MAP, wrap=without("bpf", "sys_admin", "net_admin")) as server:
        assert lab.note_programs(server) == set()
        (line,) = re.findall(r".* warning no listener filter.*", server.log)
        assert "no listener filter: nothing is dropped in the kernel unless another program reads the map" in line
        assert "needs CAP_BPF or root" in line
        lab.misbehave(server, A)
        assert one.lookup(v4(A)) is not None
        assert lab.meet(server, A) == "closed"
        assert "filter       not attached: no right to" in lab.tt(server, "status")


def test_a_map_that_cannot_be_used_ends_the_start_with_one_line(lab: Lab) -> None:
    words = ["--data", str(lab.place / "data"), "--listen", f"{HOST}:5000", "-B"]
    line = refused(lab.place, *words, "/sys/fs/bpf/none", wrap=lab.host.wrap)
    assert line.startswith("tt: /sys/fs/bpf/none: no such map: make it first: bpftool map create /sys/fs/bpf/none type")

    lab.make_map("/sys/fs/bpf/closed")
    lab.host.run("sh", "-c", "chown 65534 /sys/fs/bpf/closed; chmod 600 /sys/fs/bpf/closed")
    powerless = without("bpf", "sys_admin", "dac_override", "dac_read_search")
    line = refused(lab.place, *words, "/sys/fs/bpf/closed", wrap=(*lab.host.wrap, *powerless))
    assert "no right to open /sys/fs/bpf/closed: needs root, or a file and folder mode that lets this user" in line


def test_every_map_that_cannot_be_used_is_named_with_the_rule(lab: Lab) -> None:
    there = Path(f"/proc/{lab.host.pid}/root")

    def refusal(*paths: str, ipv6_prefix: int = 64) -> str:
        with pytest.raises(GateError) as refused:
            KernelGate.open([there / path[1:] for path in paths], ipv6_prefix)
        return str(refused.value).replace(str(there), "")

    lab.make_map("/sys/fs/bpf/array", kind="array")
    rule = "-B takes a hash with keys of 4 (IPv4) or 16 (IPv6) bytes or an LPM trie of 8 or 20, and values of 4 or 8"
    assert refusal("/sys/fs/bpf/array") == f"/sys/fs/bpf/array: of kind array, keys of 4 and values of 4 bytes: {rule}"
    lab.make_map("/sys/fs/bpf/wide", value=16)
    assert refusal("/sys/fs/bpf/wide") == f"/sys/fs/bpf/wide: of kind hash, keys of 4 and values of 16 bytes: {rule}"

    frozen = lab.make_map("/sys/fs/bpf/frozen")
    bpf_load.freeze_map(frozen)
    assert refusal("/sys/fs/bpf/frozen").startswith(
        "no right to change map /sys/fs/bpf/frozen: it is frozen or read-only"
    )

    assert refusal("/sys/fs/bpf").startswith("-B: /sys/fs/bpf is not a pinned map")
    lab.make_map()
    lab.make_map("/sys/fs/bpf/second")
    words = f"/sys/fs/bpf/second: a second map for IPv4 besides {MAP}: give one a family"
    assert refusal(MAP, "/sys/fs/bpf/second") == words
    lab.make_map(MAP6, key=16)
    words = "a hash holds IPv6 /64s: for --ipv6-prefix 56 make it an lpm_trie with keys of 20"
    assert refusal(MAP6, ipv6_prefix=56) == f"{MAP6}: {words}"


def test_in_a_time_namespace_the_map_is_refused(lab: Lab) -> None:
    lab.make_map()
    shifted = ("unshare", "--time", "--monotonic", "1000", "--fork")
    line = refused(lab.place, "--data", str(lab.place / "data"), "-B", MAP, wrap=(*lab.host.wrap, *shifted))
    assert (
        line == "tt: -B: this process is in a time namespace, whose clock kernel programs do not read: run outside it\n"
    )


def test_a_table_restored_from_disk_is_in_the_map_before_anybody_is_served(lab: Lab) -> None:
    one, other = lab.make_map(), lab.make_map(MAP6, key=16, value=8)
    with lab.serve() as server:
        for source in (A, NEAR):
            lab.misbehave(server, source)
    with lab.serve("-B", MAP, "-B", MAP6) as server:
        assert {key for key, _ in one.entries()} == {v4(A)}
        assert {key for key, _ in other.entries()} == {v6("2001:db8:a::")}
        assert [lab.meet(server, source) for source in (A, NEAR)] == ["silent", "silent"]
    assert one.entries() == other.entries() == []


# ---- docs/kernel.md -------------------------------------------------------------------------------------------------


def test_the_commands_of_the_document_work_in_their_order(lab: Lab) -> None:
    text = (Path(__file__).parents[1] / "docs/kernel.md").read_text("utf-8")
    blocks = re.findall(r"<!-- run -->\n```sh\n(.*?)```", text, re.DOTALL)
    commands = "".join(blocks).splitlines()
    assert len(commands) == 14
    shell = ("env", f"TT_DATA={lab.place / 'data'}", f"PATH={BIN}:{os.environ['PATH']}")
    library = [f"LD_PRELOAD={os.environ['LD_PRELOAD']}"] if "LD_PRELOAD" in os.environ else []  # the sanitizer's
    with ExitStack() as running:
        for command in commands:
            program, *arguments = shlex.split(command)
            if program == "TapeTrackServer":
                running.close()
                server = running.enter_context(lab.serve(*arguments))
                server.await_line("started")
            else:
                said = lab.host.run(*shell, *(library if program == "tt" else ()), "sh", "-ec", command)
                if program == "bpftool" and "create" in arguments:
                    lab.open_map(arguments[2])
            if command.startswith("bpftool map dump"):
                assert "key: c0 00 02 01" in said
    cut = lab.host.run("bpftool", "map", "show", "pinned", MAP)
    assert " name tapetrack_block " in cut
