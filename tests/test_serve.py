"""The real server, as an operator meets it: start, signals, restart, what it answers when it cannot start."""

import fcntl
import json
import os
import platform
import re
import shutil
import signal
import socket
import subprocess
import sys
import termios
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
from harness import HOST, read_exactly, until, until_end
from process import SERVER, TT, Process, need, netns, plain_environment, refused

from tt import keys
from tt.client import Client
from tt.noise import Transport, consume_welcome, create_hello
from tt.wire import DATA, HELLO, Hello, encode_hello, header

PING = header(DATA, 17)
LONG = 20.0  # s: a stop that a peer could hold up would last for ever
NO_IPV6 = netns("echo 1 >/proc/sys/net/ipv6/conf/all/disable_ipv6")


# Allows all but socket(AF_NETLINK), as a hardened service's system manager does (seccomp(2)); then runs a command.
NO_NETLINK = """
import ctypes, os, struct, sys
of_socket, of_netlink = ((0x20, 0, 0, 0), (0x15, 0, 3, SOCKET)), ((0x20, 0, 0, 16), (0x15, 0, 1, 16))
rules = *of_socket, *of_netlink, (6, 0, 0, 0x50061), (6, 0, 0, 0x7FFF0000)
code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *rule) for rule in rules))
libc = ctypes.CDLL(None)
program = struct.pack("HP", len(rules), ctypes.addressof(code))
assert libc.prctl(38, 1, 0, 0, 0) == 0 and libc.prctl(22, 2, program, 0, 0) == 0
os.execv(sys.argv[1], sys.argv[1:])
"""
SOCKET = {"x86_64": 41, "aarch64": 198}  # the number of the system call


def client(server: Process, source: str = "127.0.0.1") -> Client:
    public = keys.from_text((server.place / "data/server.pub").read_text())
    return Client(HOST, server.port, key=public, source=source)


# ---- what the product promises ------------------------------------------------------------------------------------


def test_a_stranger_is_timed_out_at_its_first_packet_and_may_come_again_after_it(tmp_path: Path) -> None:
    curl = ["curl", "--silent", "--show-error", "--max-time", "10", "--interface", "127.0.0.9"]
    with Process(tmp_path, "--timeout", "5") as server:
        answers = subprocess.run(
            [TT, "ping", "-c", "4", "-i", "0.1", f"{HOST}:{server.port}"],
            env=server.environ, capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
        assert len(re.findall(r"^\d+ bytes from 127\.0\.0\.1: seq=[1-4] time=\d+\.\d\d ms$", answers, re.M)) == 4

        url = f"http://{HOST}:{server.port}/"
        done = subprocess.run([*curl, url], env=plain_environment(), capture_output=True, text=True, check=False)
        assert "reset by peer" in done.stderr
        line = server.await_timed_out("127.0.0.9")
        assert 'reason=not_protocol seconds=5 before=0 looks="HTTP request" first="GET / HTTP/1.1\\r\\n' in line
        assert server.drops("127.0.0.9")
        assert server.ping(count=4).returncode == 0

        until("the end of the time-out", lambda: not server.drops("127.0.0.9"))
        with client(server, "127.0.0.9") as again:
            again.ping()
        assert len(re.findall("timed out source=", server.log)) == 1


# ---- starting -----------------------------------------------------------------------------------------------------


def test_it_starts_in_any_working_directory_also_one_that_is_gone(tmp_path: Path) -> None:
    (tmp_path / "gone").mkdir()
    leave = ("sh", "-c", 'cd gone; rmdir ../gone; exec "$@"', "sh")
    for start in ({"cwd": Path("/")}, {"wrap": leave}):
        with Process(tmp_path, **start) as server:
            assert server.ping().returncode == 0


def test_the_soft_descriptor_limit_is_raised_to_the_hard_one(tmp_path: Path) -> None:
    limited = ("prlimit", "--nofile=300:4096")
    with Process(tmp_path, wrap=limited, environ={"TT_MAX_CONNECTIONS": "5000"}) as server:
        limits = Path(f"/proc/{server.pid}/limits").read_text()
        assert re.search(r"^Max open files +4096 +4096 ", limits, re.M)
        server.await_line("started .*connections=3840")
        server.await_line(r"fewer connections than configured configured=5000 connections=3840 remedy=.* to 5256")


def told(*command: str) -> list[str]:
    """The words that another program prints; not under a sanitizer that is loaded for ours."""
    return subprocess.check_output(command, text=True, env=plain_environment()).split()


@pytest.mark.parametrize(
    "command", [(SERVER,), (TT, "serve"), (sys.executable, "-m", "tt", "serve")], ids=["script", "tt serve", "module"]
)
def test_every_tool_sees_the_process_under_its_name(tmp_path: Path, command: tuple[str, ...]) -> None:
    with Process(tmp_path, command=command) as server:
        shown = Path(f"/proc/{server.pid}/cmdline").read_bytes().rstrip(b"\0").split(b"\0")
        assert shown == [b"TapeTrackServer", b"--data", os.fsencode(tmp_path / "data"), b"--listen", b"127.0.0.1:0"]
        for names in (["ps", "-o", "comm=", "-p", str(server.pid)], ["ps", "-o", "args=", "-p", str(server.pid)]):
            assert told(*names)[0] == "TapeTrackServer"
        assert str(server.pid) in told("pidof", "TapeTrackServer")


def test_perf_names_the_functions_of_the_loop(tmp_path: Path) -> None:
    perf = shutil.which("perf")
    if perf is None or subprocess.run([perf, "--version"], capture_output=True, check=False).returncode:
        pytest.skip("perf is not installed for this kernel")
    record = [perf, "record", "--quiet", "-e", "cpu-clock", "-o", str(tmp_path / "perf.data")]
    with Process(tmp_path) as server:
        pings = [TT, "ping", "-c", "5000", "-i", "0", f"{HOST}:{server.port}"]
        done = subprocess.run(
            [*record, "-p", str(server.pid), "--", *pings],
            env=server.environ, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    report = [perf, "report", "--stdio", "--sort", "symbol", "-i", str(tmp_path / "perf.data")]
    shown = subprocess.run(report, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True).stdout
    assert re.search(r"\d% +\[\.\] __pyx_f_2tt_5_core_\w+", shown), shown


def test_a_ping_on_the_same_host_needs_no_key(tmp_path: Path) -> None:
    with Process(tmp_path) as server:
        for host in (HOST, "localhost"):
            done = subprocess.run(
                [TT, "ping", "-c", "1", f"{host}:{server.port}"],
                env=server.environ, capture_output=True, text=True, check=False,
            )  # fmt: skip
            assert done.returncode == 0, done.stderr


def test_without_a_place_for_known_servers_it_says_so_and_serves(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with Process(tmp_path, environ={"XDG_CONFIG_HOME": str(tmp_path / "file")}) as server:
        server.await_line("warning not entered into known servers server=127.0.0.1")
        with client(server) as honest:
            honest.ping()


def test_the_default_listeners_are_those_of_both_families(tmp_path: Path) -> None:
    need("unshare", "nsenter", "ip", root=True)
    with Process(tmp_path, listen=None, wrap=netns()) as server:
        assert re.findall(r"listening address=(\S+|\"\S+\")", server.log) == ["0.0.0.0:5000", "[::]:5000"]
        for host in (HOST, "::1"):
            server.inside(TT, "ping", "-c", "1", host)


def test_without_ipv6_the_default_listener_is_left_out_with_a_note(tmp_path: Path) -> None:
    need("unshare", "nsenter", "ip", root=True)
    with Process(tmp_path, "--log-format", "json", listen=None, wrap=NO_IPV6) as server:
        events = [json.loads(line) for line in server.log.splitlines()]
        assert [event["address"] for event in events if event["event"] == "listening"] == ["0.0.0.0:5000"]
        (note,) = [event for event in events if event["event"].startswith("no IPv6 on this host")]
        assert note["left_out"] == "[::]:5000"
        server.inside(TT, "ping", "-c", "1", HOST)


def without_netlink() -> tuple[str, ...]:
    if platform.machine() not in SOCKET:
        pytest.skip(f"the number of socket(2) on {platform.machine()} is not in the table")
    return (sys.executable, "-c", NO_NETLINK.replace("SOCKET", str(SOCKET[platform.machine()])))


def test_without_netlink_it_serves_and_says_that_it_knows_no_gateway(tmp_path: Path) -> None:
    with Process(tmp_path, wrap=without_netlink()) as server:
        server.await_line("warning gateways not known: .* error=")
        assert server.ping().returncode == 0


def test_without_netlink_gateways_cannot_be_exempt(tmp_path: Path) -> None:
    line = refused(tmp_path, *FREE, "--exempt", "gateways", wrap=without_netlink())
    assert "--exempt gateways: asking netlink: Address family not supported by protocol: allow AF_NETLINK" in line


def test_where_stderr_is_closed_no_peer_gets_its_number(tmp_path: Path) -> None:
    closed = ("sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh")
    with Process(tmp_path, wrap=closed, blind=True) as server:
        with client(server) as honest:
            honest.ping()
            for number in range(3):
                assert os.readlink(f"/proc/{server.pid}/fd/{number}") == "/dev/null"
        assert server.stop() == 0


# ---- not starting -------------------------------------------------------------------------------------------------


def wrong_key(mode: int, text: str) -> Callable[[Path], list[str]]:
    def make(place: Path) -> list[str]:
        (place / "data").mkdir()
        (place / "data/server.key").write_text(text)
        (place / "data/server.key").chmod(mode)
        return ["--data", str(place / "data")]

    return make


def wrong_file(text: str) -> Callable[[Path], list[str]]:
    def make(place: Path) -> list[str]:
        (place / "tt.toml").write_text(text)
        return ["-c", str(place / "tt.toml")]

    return make


def data_that_is_a_file(place: Path) -> list[str]:
    (place / "data").touch()
    return ["--data", "data"]


def a_line_break_in_a_path(place: Path) -> list[str]:
    (place / "a\nb").touch()
    return ["--data", str(place / "a\nb")]


FREE = ["--listen", f"{HOST}:0"]
# What is wrong -> its thing and rule, and its remedy, in the one line.
REFUSALS: dict[str, tuple[Callable[[Path], list[str]], str, str]] = {
    "key for all to read": (wrong_key(0o644, ""), r"data/server\.key has mode 0644", "run 'chmod 600 "),
    "damaged key": (wrong_key(0o600, "no key"), r"data/server\.key is damaged", "restore it from a backup"),
    "data is a file": (data_that_is_a_file, r"data directory /.*/data: not a directory", "with --data"),
    "data path too long": (lambda _: ["--data", "/tmp/" + 100 * "x"], "too long by 11 bytes for the socket", "--data"),
    "data below a file": (lambda _: ["--data", "/dev/null/data"], "data directory /dev/null/data: Not a", "--data"),
    "line break in a path": (a_line_break_in_a_path, r"data directory .*/a\\nb: not a directory", "with --data"),
    "no such file": (lambda _: ["-c", "no.toml"], r"no\.toml: No such file", "name a readable file with -c"),
    "no such kernel map": (lambda _: ["-B", "/sys/fs/bpf/no_map"], "/sys/fs/bpf/no_map: ", "create"),
    "unknown key": (wrong_file("timout = 5"), r"tt\.toml: 'timout': no such option", "did you mean 'timeout'"),
    "not TOML": (wrong_file("timeout: 5"), r"tt\.toml: not TOML", "write a line per option, like timeout = 600"),
    "unknown option": (lambda _: ["--time-out", "5"], "unrecognized arguments: --time-out", "--help"),
    "value out of range": (lambda _: ["--timeout", "0"], "--timeout = '0': out of range: .* 1s to 30d", "leave it"),
    "address of another host": (lambda _: ["--listen", "192.0.2.1:5000"], "192.0.2.1:5000: Cannot assign", "--listen"),
    "link-local address alone": (
        lambda _: ["--listen", "[fe80::1]:5000"], r"\[fe80::1\]:5000: ", r"with --listen"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSALS)
def test_a_start_that_fails_says_what_to_do_in_one_line_and_leaves_nothing_behind(tmp_path: Path, case: str) -> None:
    make, rule, remedy = REFUSALS[case]
    arguments = make(tmp_path)
    line = refused(tmp_path, *(arguments if "--listen" in arguments else [*FREE, *arguments]))
    assert re.search(rule, line), line
    assert remedy in line


def test_a_data_directory_in_a_working_directory_that_is_gone_is_refused(tmp_path: Path) -> None:
    leave = ("sh", "-c", 'mkdir gone; cd gone; rmdir ../gone; exec "$@"', "sh")
    assert "data directory var: No such file or directory: name a directory" in refused(tmp_path, *FREE, wrap=leave)


def test_a_port_in_use_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    with socket.create_server((HOST, 0)) as other:
        line = refused(tmp_path, "--listen", f"{HOST}:{other.getsockname()[1]}")
    assert "Address already in use: stop who has it (ss -ltnp), or name another with --listen" in line


def test_a_port_for_root_alone_is_refused(tmp_path: Path) -> None:
    need("unshare", "setpriv", "ip", root=True)
    line = refused(tmp_path, "--listen", f"{HOST}:80", wrap=(*netns(), "setpriv", "--bounding-set=-net_bind_service"))
    assert "listen on 127.0.0.1:80: Permission denied: ports below 1024 need CAP_NET_BIND_SERVICE" in line


def test_an_ipv6_address_that_was_asked_for_is_not_left_out(tmp_path: Path) -> None:
    need("unshare", "ip", root=True)
    line = refused(tmp_path, "--listen", f"{HOST}:5000", "--listen", "[::1]:5000", wrap=NO_IPV6)
    assert "listen on [::1]:5000: Cannot assign requested address: name an address of this host" in line


def test_a_read_only_data_directory_is_refused(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir(mode=0o555)
    # Root may write whatever the mode says, so that the file system has to be read-only for it.
    mount = ("unshare", "--mount", "sh", "-ec", f'mount -t tmpfs -o ro none {data}; exec "$@"', "sh")
    line = refused(tmp_path, *FREE, "--data", str(data), wrap=mount if os.geteuid() == 0 else ())
    assert f"data directory {data}: not writable: give it to this user, or name a directory" in line


def test_a_data_directory_that_another_server_uses_is_refused(tmp_path: Path) -> None:
    with Process(tmp_path) as server:
        server.await_line("head of the history")  # after which it writes nothing for long
        line = refused(tmp_path, *FREE, "--data", str(tmp_path / "data"))
        assert "data directory" in line
        assert "another server uses it: stop that one, or name another with --data" in line


def test_too_low_a_descriptor_limit_is_refused(tmp_path: Path) -> None:
    line = refused(tmp_path, *FREE, wrap=("prlimit", "--nofile=256:256"))
    assert "descriptor limit 256: it must be over 256: raise it (ulimit -Hn)" in line


def test_too_little_memory_is_refused(tmp_path: Path) -> None:
    if "asan" in os.environ.get("LD_PRELOAD", ""):
        pytest.skip("the address sanitizer needs more address space than there is memory")
    # One heap for all threads: each other one would reserve 64 MiB, which is room for the table after all.
    with Process(tmp_path, environ={"MALLOC_ARENA_MAX": "1"}) as server:
        peak = re.search(r"^VmPeak:\s+(\d+) kB", Path(f"/proc/{server.pid}/status").read_text(), re.M)
        assert peak is not None
    limited = ("prlimit", f"--as={(int(peak[1]) + 32768) * 1024}")
    line = refused(tmp_path, *FREE, "--data", str(tmp_path / "data"), "--table-size", "1048576", wrap=limited)
    assert re.search(r"not enough memory for \d+ connections and 2 x 1048576 timed-out sources: lower max_conn", line)


# ---- SIGTERM and SIGINT -------------------------------------------------------------------------------------------


def handshake(server: Process, source: str) -> tuple[socket.socket, Transport]:
    """A connection with its WELCOME that receives into little room, so that the server soon holds its replies."""
    peer = server.connect(source, buffer=16384)
    public = keys.from_text((server.place / "data/server.pub").read_text())
    message, pending = create_hello(public, encode_hello(Hello("test", "0")))
    peer.sendall(header(HELLO, len(message)) + message)
    head = read_exactly(peer, 8)
    _, transport = consume_welcome(pending, read_exactly(peer, int.from_bytes(head[4:])))
    return peer, transport


def unread(server: Process, peer: socket.socket) -> int:
    """Bytes of a peer that the server has not read: on their way (tcp(7), SIOCOUTQ), or arrived (proc_pid_net(5))."""
    under_way = int.from_bytes(fcntl.ioctl(peer, termios.TIOCOUTQ, bytes(4)), sys.byteorder)
    ends = f":{server.port:04X} 0[0-9A-F]00007F:{peer.getsockname()[1]:04X} 01 [0-9A-F]+:([0-9A-F]+)"
    # The kernel writes it in pieces: where others come and go meanwhile, a row may be left out.
    match = until("the connection", lambda: re.search(ends, Path("/proc/net/tcp").read_text()))
    return under_way + int(match[1], 16)


def ping_until_the_server_holds_replies(server: Process, peer: socket.socket, transport: Transport) -> int:
    """Ping and read nothing until the server reads no more; how many pings were sent, 1,000 at a time."""
    sent = 0
    while True:
        peer.sendall(b"".join(PING + transport.seal(PING, b"\0") for _ in range(1000)))
        sent += 1000
        try:
            until("all pings are read", lambda: unread(server, peer) == 0, patience=0.5)
        except AssertionError:
            return sent


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_two_hundred_connections_and_a_peer_that_never_reads_do_not_hold_up_a_stop(
    tmp_path: Path, number: signal.Signals
) -> None:
    with ExitStack() as peers, Process(tmp_path) as server:
        for i in range(150):
            peers.enter_context(client(server, f"127.0.0.{2 + i % 4}")).ping()
        for i in range(50):
            peers.enter_context(server.connect(f"127.0.0.{2 + i % 4}"))
        peer, transport = handshake(server, "127.0.0.6")
        peers.enter_context(peer)
        ping_until_the_server_holds_replies(server, peer, transport)
        server.time_out("127.0.0.9")
        server.send(number)
        assert server.wait(LONG) == 0
        server.await_line(f"stopping signal={number.name}")
        server.await_line(r"\bstopped\b")
    with Process(tmp_path) as again:
        again.await_line("time-outs restored running=1")
        assert again.drops("127.0.0.9")
        assert again.ping().returncode == 0


def test_replies_under_way_at_a_stop_arrive_whole(tmp_path: Path) -> None:
    # All of the time that a stop lasts at most is the peer's, should this machine let him wait.
    with Process(tmp_path, environ={"TT_DRAIN_DEADLINE": "60"}) as server:
        peer, transport = handshake(server, "127.0.0.6")
        with peer:
            sent = ping_until_the_server_holds_replies(server, peer, transport)
            server.send(signal.SIGTERM)
            data = until_end(peer)  # by an end of stream, not by a reset
        server.await_line("stopping")
        assert len(data) % 25 == 0
        assert sent - 1000 <= len(data) // 25 <= sent
        for at in range(0, len(data), 25):
            assert transport.open(data[at : at + 8], data[at + 8 : at + 25]) == b"\0"
        assert server.wait(LONG) == 0


def test_a_second_signal_while_stopping_changes_nothing(tmp_path: Path) -> None:
    with Process(tmp_path) as server, client(server) as idle:
        idle.ping()
        server.send(signal.SIGINT)
        server.await_line("stopping")
        server.send(signal.SIGINT)
        assert server.stop(signal.SIGHUP) == 0


# ---- SIGHUP -------------------------------------------------------------------------------------------------------


def reload(server: Process, words: str) -> None:
    """Send SIGHUP and wait for one more line with these words."""
    before = len(re.findall(words, server.log))
    server.send(signal.SIGHUP)
    until(f"{words!r} after SIGHUP", lambda: len(re.findall(words, server.log)) > before)


def test_a_reload_takes_the_new_file_and_loses_no_ban(tmp_path: Path) -> None:
    file = tmp_path / "tt.toml"
    file.write_text("timeout = 600\n")
    with Process(tmp_path, "-c", str(file)) as server:
        assert " seconds=600 " in server.time_out("127.0.0.9")

        file.write_text('timeout = "2m"\ntable_size = 2048\nbacklog = 8\n')
        reload(server, "configuration reloaded needs_restart=table_size,backlog")
        assert " seconds=120 " in server.time_out("127.0.0.10")

        for text in ("timeout = ", "timeout = 0", "tiemout = 5"):
            file.write_text(text)
            reload(server, r"error configuration not reloaded, the running one stays error=\"\S*tt.toml")
        file.unlink()
        reload(server, "error configuration not reloaded, the running one stays .*No such file")
        assert " seconds=120 " in server.time_out("127.0.0.11")

        file.write_text('exempt = ["127.0.0.12/32", "gateways"]')
        reload(server, r"configuration reloaded needs_restart|configuration reloaded\n")
        server.send_http("127.0.0.12")
        server.await_line("exempt, disconnected source=127.0.0.12 ")
        assert not server.drops("127.0.0.12")
        assert [server.drops(f"127.0.0.{last}") for last in (9, 10, 11)] == [True] * 3
        assert server.ping().returncode == 0


# ---- SIGKILL ------------------------------------------------------------------------------------------------------


def test_after_a_kill_the_bans_of_the_last_save_hold(tmp_path: Path) -> None:
    with Process(tmp_path, environ={"TT_SAVE_INTERVAL": "1"}) as server:
        server.time_out("127.0.0.9")
        until("a save", (tmp_path / "data/timeouts").exists)
        server.kill()
    with Process(tmp_path) as again:
        again.await_line("time-outs restored running=1")
        assert again.drops("127.0.0.9")
        assert again.ping().returncode == 0


# ---- the log ------------------------------------------------------------------------------------------------------


def test_a_log_that_nobody_reads_holds_up_no_ping(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
    with Process(tmp_path, stderr=writer, environ={"TT_LOG_BUFFER": "4096"}) as server:
        os.close(writer)
        for last in range(100, 200):
            server.send_http(f"127.0.0.{last}")
        assert server.ping(count=100).returncode == 0
        os.set_blocking(reader, False)
        log = bytearray()

        def read() -> bool:
            with suppress(BlockingIOError):
                log.extend(os.read(reader, 65536))
            return b"log lines dropped: stderr was not read fast enough" in log

        until("the count of dropped lines", read)
        assert server.stop() == 0
    os.close(reader)


def test_a_log_in_json_is_json_in_every_line(tmp_path: Path) -> None:
    with Process(tmp_path, "--log-format", "json", environ={"TT_MAX_CONNECTIONS": "1048576"}) as server:
        server.send_http("127.0.0.9")
        server.await_line('"event": "timed out"')
        assert server.ping().returncode == 0
        reload(server, "configuration reloaded")
        assert server.stop() == 0
        events = [json.loads(line) for line in server.log.splitlines()]
        assert {"listening", "started", "timed out", "configuration reloaded", "stopping", "stopped"} <= {
            event["event"] for event in events
        }
        (line,) = [event for event in events if event["event"] == "timed out"]
        assert (line["source"], line["looks"], line["reason"]) == ("127.0.0.9", "HTTP request", "not_protocol")
