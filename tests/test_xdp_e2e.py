"""`tt bpf` and the server together, over a veth pair: a source's SYNs are gone before the stack counts them.

A SYN is either answered or counted as dropped, at once; only the end of a time-out takes its seconds.
"""

import errno
import io
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import closing, redirect_stdout
from ipaddress import ip_address
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from harness import ended, until
from process import TT, Process, need, refused
from test_xdp_verdicts import compile_xdp
from veth import CLIENT, CLIENT6, OTHER, OTHER6, SERVER, Pair, is_open, pair, segments_in, sh

from tt import block_maps, cli, xdp

PORT = 5000
LISTENS, TIME_WAIT = "0A", "06"  # in /proc/net/tcp
MAPS = [word for path in block_maps.DEFAULTS for word in ("-B", str(path))]
LISTEN = ("--listen", f"[::]:{PORT}")
NOBODY = 65534


@pytest.fixture
def net() -> Iterator[Pair]:
    need("ip", "mount", root=True)
    with pair() as both:
        yield both


def tt(*arguments: str) -> str:
    """What `tt bpf` says; it must succeed."""
    done = subprocess.run([TT, "bpf", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done
    return done.stdout + done.stderr


def status() -> dict[str, Any]:
    """In this process: a time-out that is to run still does not wait for the start of another one."""
    with redirect_stdout(io.StringIO()) as out:
        assert cli.main(["bpf", "status", "--json"]) == 0
    return dict(json.loads(out.getvalue()))


def dropped() -> int:
    program = xdp.program_of(xdp.pinned())
    assert program
    with closing(program):
        return program.counters()["dropped_packets"]


def server(tmp_path: Path, *arguments: str) -> Process:
    """It has no filter of its own: what is dropped, the XDP program drops."""
    return Process(tmp_path, *MAPS, "--no-listener-filter", *LISTEN, *arguments, listen=f"0.0.0.0:{PORT}")


def no_connection_is_left() -> bool:
    """Whether no segment is to come for one: the server may end it some time after its peer did."""
    tables = (Path(f"/proc/thread-self/net/{name}").read_text() for name in ("tcp", "tcp6"))
    return {line.split()[3] for table in tables for line in table.splitlines()[1:]} <= {LISTENS, TIME_WAIT}


def lets_in(net: Pair, source: str) -> bool:
    """Whether a SYN from there is answered; else it was dropped before the stack saw it."""
    until("the end of earlier connections", no_connection_is_left)
    before, segments = dropped(), segments_in()
    with net.begin(source, PORT) as peer:
        until(f"an answer or a drop of {source}", lambda: is_open(peer) or dropped() > before)
        seen = segments_in()
        if dropped() > before:
            # Open all the same: this machine stood still, and the SYN was sent again behind the time-out's end.
            assert seen == segments or is_open(peer)
            return False
        assert seen > segments
        return True


def scan(net: Pair, server: Process, source: str) -> None:
    """Speak HTTP, and be timed out for it."""
    with net.begin(source, PORT) as peer:
        until("the connection", lambda: is_open(peer))
        peer.settimeout(10)
        peer.sendall(b"GET / HTTP/1.1\r\n\r\n")
        assert ended(peer) == b""
    server.await_timed_out(source if "." in source else source.replace("::2", "::/64"))


@pytest.mark.parametrize(
    ("mode", "tags"),
    [(mode, tags) for mode in ("native", "generic") for tags in ((), (0x8100,), (0x8100, 0x88A8))],
    ids=lambda value: value if isinstance(value, str) else f"{len(value)} tags",
)
def test_a_scanner_is_gone_after_its_first_packet_until_its_time_out_has_ended(
    net: Pair, tmp_path: Path, mode: str, tags: tuple[int, ...]
) -> None:
    if tags:
        net.tag(*tags)
    tt("load", "--dev", "vs", "--mode", mode, "--value", "8")
    assert [one["mode"] for one in status()["interfaces"]] == [mode]
    with server(tmp_path, "--timeout", "6") as running:
        for source in (CLIENT, OTHER, CLIENT6, OTHER6):
            assert lets_in(net, source)
        scan(net, running, CLIENT)
        scan(net, running, CLIENT6)
        assert [lets_in(net, source) for source in (CLIENT, OTHER, CLIENT6, OTHER6)] == [False, True, False, True]
        assert [(one["running"], one["read_by_program"]) for one in status()["maps"]] == [(1, True)] * 2
        until("the end", lambda: lets_in(net, CLIENT) and lets_in(net, CLIENT6), 30)
        assert running.find("kernel map not updated") is None


def test_a_server_that_is_killed_leaves_drops_that_end_by_themselves(net: Pair, tmp_path: Path) -> None:
    tt("load", "--dev", "vs", "--value", "8")
    with server(tmp_path, "--timeout", "5") as running:
        scan(net, running, CLIENT)
        running.kill()
        assert not lets_in(net, CLIENT)

        def is_refused() -> bool:
            with net.begin(CLIENT, PORT) as peer:
                return peer.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == errno.ECONNREFUSED

        until("the end: nobody listens, and the kernel says so", is_refused, 30)
        (one, _) = status()["maps"]
        assert (one["running"], one["ended"]) == (0, 1)
        assert "1 ended entry removed" in tt("clean")
        assert status()["maps"][0]["ended"] == 0


@pytest.mark.parametrize("all_packets", [False, True])
def test_an_open_connection_goes_on_unless_all_packets_are_dropped(net: Pair, all_packets: bool) -> None:
    tt("load", "--dev", "vs", *(["--all-packets"] if all_packets else []))
    with socket.create_server((SERVER, PORT)) as listener, net.begin(CLIENT, PORT) as peer:
        until("the connection", lambda: is_open(peer))
        served = listener.accept()[0]
        with block_maps.opened(block_maps.DEFAULTS) as (one, _):
            one.map.update(ip_address(CLIENT).packed, bytes(4))
        before = dropped()
        peer.send(b"x")
        served.settimeout(10)
        if all_packets:
            until("a drop", lambda: dropped() > before)
        else:
            assert served.recv(1) == b"x"
            assert dropped() == before
        served.close()


def test_unloading_under_traffic_loses_nothing_and_leaves_nothing(net: Pair) -> None:
    folder = sorted(os.listdir("/sys/fs/bpf"))
    flood = "import socket; s = socket.socket(fileno=0)\nwhile True: s.send(b'x')"
    with socket.socket(type=socket.SOCK_DGRAM) as sink, net.begin(CLIENT, PORT, socket.SOCK_DGRAM) as source:
        sink.bind((SERVER, PORT))
        sink.settimeout(10)
        source.setblocking(True)
        with subprocess.Popen([sys.executable, "-c", flood], stdin=source) as sender:
            try:
                for mode in ("native", "generic", "native"):
                    tt("load", "--dev", "vs", "--mode", mode)
                    (link,) = xdp.pinned()
                    with closing(xdp.program_of([link])) as program:
                        before = program.counters()["passed_packets"]
                        until("passed packets", lambda p=program, n=before: p.counters()["passed_packets"] > n)
                    assert "vs: taken off" in tt("unload")
                    assert sorted(os.listdir("/sys/fs/bpf")) == folder
                    assert xdp.attached(socket.if_nametoindex("vs")) is None
                    until("the program's end", lambda number=link.program: number not in loaded_programs())
                    assert sink.recv(10) == b"x"
            finally:
                sender.kill()


def loaded_programs() -> set[int]:
    return {one["id"] for one in json.loads(sh("bpftool --json prog show"))}


def test_two_interfaces_share_the_program_its_maps_and_its_counters(net: Pair, tmp_path: Path) -> None:
    sh("ip link set lo up && ip address add 10.78.0.1/32 dev lo && ip address add 10.78.0.2/32 dev lo")
    tt("load", "--dev", "vs", "--dev", "lo")
    assert {one["interface"]: one["mode"] for one in status()["interfaces"]} == {"vs": "native", "lo": "generic"}
    with server(tmp_path) as running:
        scan(net, running, CLIENT)
        subprocess.run([TT, "bans", "add", "10.78.0.2", "--data", tmp_path / "data"], check=True, capture_output=True)
        assert not lets_in(net, CLIENT)
        running.await_timed_out("10.78.0.2")  # it answers before it writes the map
        before = dropped()
        with socket.socket() as peer:
            peer.setblocking(False)
            peer.bind(("10.78.0.2", 0))
            peer.connect_ex(("10.78.0.1", PORT))
            until("a drop on the other interface", lambda: dropped() > before)
        tt("unload", "--dev", "lo")
        assert not lets_in(net, CLIENT)


def test_native_takes_frames_of_9000_bytes(net: Pair) -> None:
    sh("ip link set vs mtu 9000")
    with net.in_client():
        sh("ip link set vc mtu 9000")
    assert "mode native" in tt("load", "--dev", "vs", "--mode", "native")
    with socket.create_server((SERVER, PORT)) as listener, net.begin(CLIENT, PORT) as peer:
        until("the connection", lambda: is_open(peer))
        served = listener.accept()[0]
        sender = Thread(target=lambda: (peer.setblocking(True), peer.sendall(bytes(4_000_000)), peer.close()))
        sender.start()
        got = 0
        while part := served.recv(1 << 20):
            got += len(part)
        sender.join()
        served.close()
    assert got == 4_000_000


def test_the_servers_map_that_bpftool_made_serves_the_program_and_outlives_it(net: Pair, tmp_path: Path) -> None:
    need("bpftool")
    path = block_maps.DEFAULTS[0]
    sh(f"bpftool map create {path} type hash key 4 value 4 entries 1024 name tapetrack_block_map")
    assert f"made {path}\n" not in tt("load", "--dev", "vs")
    with server(tmp_path) as running:
        scan(net, running, CLIENT)
        assert not lets_in(net, CLIENT)
        assert tt("status", "--entries").splitlines()[-2].split()[0] == CLIENT
    tt("unload")
    assert sorted(name for name in os.listdir("/sys/fs/bpf") if "debug" not in name) == [path.name]


def test_the_commands_for_bpftool_alone_work_as_documented(net: Pair, tmp_path: Path) -> None:
    need("bpftool")
    root = Path(__file__).resolve().parent.parent
    text = (root / "docs/xdp.md").read_text("utf-8")
    block = text.partition("## With bpftool alone")[2].partition("```sh\n")[2].partition("```")[0]
    compiled = compile_xdp(tmp_path)
    commands = block.replace("build/tt_xdp.bpf.o", str(compiled)).replace("eth0", "vs").replace("\\\n", "").splitlines()
    *before, end = commands
    assert len(before) == 5
    for command in before:
        sh(command)
    attached = xdp.attached(socket.if_nametoindex("vs"))
    assert attached
    assert attached.mode == "native"
    with server(tmp_path) as running:
        scan(net, running, CLIENT)
        until("the end of that connection", no_connection_is_left)
        with closing(xdp._program(attached.program)) as program, program.open_map("counters") as counted:
            segments, before_it = segments_in(), counted.lookup(bytes(4))
            with net.begin(CLIENT, PORT):
                until("a drop", lambda: counted.lookup(bytes(4)) != before_it)
            assert segments_in() == segments
    sh(end)
    assert xdp.attached(socket.if_nametoindex("vs")) is None


# ---- as another user -------------------------------------------------------------------------------------------------


@pytest.fixture
def open_place() -> Iterator[Path]:
    """A folder that every user can enter; the tests' own is root's alone."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


def test_a_scanner_is_dropped_for_a_server_that_has_no_rights(net: Pair, open_place: Path) -> None:
    tt("load", "--dev", "vs")
    with Process(open_place, *MAPS, *LISTEN, "--user", "nobody", listen=f"0.0.0.0:{PORT}") as running:
        for source in (CLIENT, CLIENT6):
            scan(net, running, source)
            assert not lets_in(net, source)
        assert status()["program"]["counters"]["dropped_packets"] >= 2
        uids = sh(f"grep Uid /proc/{running.pid}/status").split()[1:]
        assert uids == [str(NOBODY)] * 4
    assert [one["running"] for one in status()["maps"]] == [0, 0], "a clean stop removes what it wrote"
    tt("unload")
    assert [name for name in os.listdir("/sys/fs/bpf") if "debug" not in name] == []


def test_a_map_that_is_not_there_is_named_before_anything_is_made(net: Pair, tmp_path: Path) -> None:
    assert str(block_maps.DEFAULTS[0]) in refused(tmp_path, *MAPS, "--user", "nobody", "--data", str(tmp_path / "data"))
