"""Listening sockets: what is refused of those that are passed, what is set on them, whose kernel filter they have."""

import os
import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
from activation import Manager
from harness import HOST
from process import Process, need, refused

from tt import bpf_load, config
from tt.config import Address
from tt.kernel_gate import BlockMap, KernelGate
from tt.listeners import ListenError, addresses, open_listeners
from tt.systemd import Passed

SO_GET_FILTER = 26  # asm-generic/socket.h; Python does not name it


@pytest.fixture
def passed() -> Iterator[Callable[[socket.socket], Passed]]:
    """A passed descriptor that is another one of a socket which the service manager keeps."""
    kept: list[socket.socket] = []

    def of(one: socket.socket) -> Passed:
        kept.append(one)
        return Passed(os.dup(one.fileno()), "tapetrack.socket")

    yield of
    for one in kept:
        one.close()


def settings(**options: object) -> config.Config:
    return config.load(None, {}, options)


def has_filter(listener: socket.socket) -> bool:
    """Whether an eBPF filter is attached; the kernel shows it to nobody (net/core/filter.c)."""
    try:
        assert listener.getsockopt(socket.SOL_SOCKET, SO_GET_FILTER) == 0
    except PermissionError:
        return True
    return False


# ---- what is passed -------------------------------------------------------------------------------------------------


def datagrams() -> socket.socket:
    made = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    made.bind((HOST, 0))
    return made


def local() -> socket.socket:
    made = socket.socket(socket.AF_UNIX)
    made.bind(f"\0tt-test-{os.getpid()}")
    made.listen()
    return made


def bound_only() -> socket.socket:
    made = socket.socket()
    made.bind((HOST, 0))
    return made


WRONG = {
    "a datagram socket": (datagrams, "it is not of TCP"),
    "a Unix socket": (local, "it is of another address family"),
    "a socket that does not listen": (bound_only, "it is not listening"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_no_listening_tcp_socket_is_refused_with_its_number_and_name(passed, case: str) -> None:
    make, wrong = WRONG[case]
    good, bad = passed(socket.create_server((HOST, 0))), passed(make())
    with pytest.raises(ListenError) as refusal:
        open_listeners(settings(), passed=[good, bad])
    assert f"descriptor {bad.descriptor} (tapetrack.socket) from the service manager: {wrong}: " in str(refusal.value)
    assert "in the socket unit, ListenStream= and Accept=no" in str(refusal.value)
    for one in (good, bad):
        with pytest.raises(OSError, match="Bad file"):
            os.fstat(one.descriptor)


def test_a_closed_descriptor_and_a_file_are_refused(tmp_path: Path) -> None:
    with (tmp_path / "file").open("w") as file:
        for number, why in ((file.fileno(), "Socket operation on non-socket"), (1 << 20, "Bad file descriptor")):
            with pytest.raises(ListenError, match=rf"descriptor {number} .*: {why}: it must be a listening TCP"):
                open_listeners(settings(), passed=[Passed(number, "x")])


def test_a_start_with_a_socket_that_cannot_be_served_is_refused_in_one_line(tmp_path: Path) -> None:
    wrap = ("sh", "-c", 'export LISTEN_FDS=1 LISTEN_PID=$$; exec "$@" 3</dev/null', "sh")
    line = refused(tmp_path, "--data", str(tmp_path / "data"), wrap=wrap)
    assert "descriptor 3 (unknown) from the service manager: Socket operation on non-socket: it must be" in line


def test_listen_beside_passed_sockets_is_refused_and_says_where_it_stands(tmp_path: Path, passed) -> None:
    one = passed(socket.create_server((HOST, 0)))
    (tmp_path / "tt.toml").write_text('listen = ["127.0.0.1:5000"]\n')
    cases = (
        (config.load(None, {}, {"listen": [f"{HOST}:0"]}), "option --listen: "),
        (config.load(None, {"TT_LISTEN": f"{HOST}:0"}, {}), "environment TT_LISTEN: "),
        (config.load(tmp_path / "tt.toml", {}, {}), f"{tmp_path}/tt.toml: listen: "),
    )
    for given, where in cases:
        with pytest.raises(ListenError) as refusal:
            open_listeners(given, passed=[one])
        assert str(refusal.value).startswith(f"{where}the service manager passes 1 listening socket, and it is these")
        assert "leave listen out" in str(refusal.value)
    os.close(one.descriptor)


def test_what_is_passed_gets_all_that_the_loop_wants_and_stays_the_same_socket(passed) -> None:
    kept = socket.create_server((HOST, 0), backlog=1)
    (listener,) = open_listeners(settings(backlog="100"), passed=[passed(kept)])
    with listener:
        assert addresses([listener]) == [Address(*kept.getsockname())]
        assert listener.getsockopt(socket.SOL_SOCKET, socket.SO_LINGER, 8) == struct.pack("ii", 1, 0)
        assert listener.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        assert not os.get_blocking(kept.fileno())
        assert not os.get_inheritable(listener.fileno())
        backlog = struct.unpack_from("=I", listener.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104), 28)
        assert backlog == (100,), "tcpi_sacked of a listening socket is its backlog (net/ipv4/tcp.c)"
    kept.settimeout(10)  # who is connected may not have arrived here yet
    with socket.create_connection(kept.getsockname()):
        kept.accept()[0].close()  # it listens still


def test_an_ipv6_socket_that_takes_ipv4_too_listens_at_two_addresses(passed) -> None:
    if not socket.has_dualstack_ipv6():
        pytest.skip("no IPv6 here")
    for dual in (True, False):
        kept = socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=dual)
        port = kept.getsockname()[1]
        (listener,) = open_listeners(settings(), passed=[passed(kept)])
        with listener:
            both = [Address("::", port), Address("0.0.0.0", port)]
            assert addresses([listener]) == (both if dual else both[:1])


# ---- the kernel filter ----------------------------------------------------------------------------------------------


def test_a_filter_on_a_passed_socket_is_replaced_and_taken_off_where_the_next_server_has_none(passed) -> None:
    need(root=True)
    kept = socket.create_server((HOST, 0))
    kept.settimeout(10)

    def take_over(*sources: str) -> None:
        """As a server with a map that holds these sources, and ends."""
        one = bpf_load.create_map("hash", (4, 4), 16, "tt_test")
        for source in sources:
            one.update(socket.inet_aton(source), bytes(4))  # the operator's own entry: for ever
        with closing(KernelGate([BlockMap(one, 4, 64)], 64)) as gate:
            gate.load_filter()
            release(open_listeners(settings(), gate, [passed(kept)]))

    def release(listeners: list[socket.socket]) -> None:
        for listener in listeners:
            listener.close()

    def is_dropped(patience: float) -> bool:
        try:
            with socket.create_connection(kept.getsockname(), patience, ("127.0.0.7", 0)):
                return False
        except TimeoutError:
            return True

    take_over("127.0.0.7")
    assert has_filter(kept), "it outlives its process with the socket"
    assert is_dropped(0.3)
    take_over()
    assert has_filter(kept)
    assert not is_dropped(10)
    take_over("127.0.0.7")
    assert is_dropped(0.3)
    release(open_listeners(settings(), None, [passed(kept)]))
    assert not has_filter(kept)
    assert not is_dropped(10)


def test_a_restart_without_a_map_lets_in_whom_the_filter_dropped(tmp_path: Path) -> None:
    need("mount", "bpftool", root=True)
    path = "/sys/fs/bpf/m"
    make = f"bpftool map create {path} type hash key 4 value 4 entries 16 name m"
    preload = f"bpftool map update pinned {path} key 127 0 0 7 value 0 0 0 0"
    wrap = ("unshare", "--mount", "sh", "-ec", f'mount -t bpf bpf /sys/fs/bpf; {make}; {preload}; exec "$@"', "sh")
    with Manager(tmp_path, [socket.create_server((HOST, 0))]) as manager:
        (kept,), started = manager.sockets, manager.start()
        with Process(tmp_path, "-B", path, **started | {"wrap": (*wrap, *started["wrap"])}) as server:
            server.await_line(f"kernel map map={path} adopted=0 ended=0 exempt=0 preloaded=1")
            assert has_filter(kept)
            with pytest.raises(TimeoutError), socket.create_connection((HOST, server.port), 0.3, ("127.0.0.7", 0)):
                pass
        with Process(tmp_path, **started) as server:
            assert not has_filter(kept)
            assert server.ping("--source", "127.0.0.7").returncode == 0
