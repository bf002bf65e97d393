"""The endpoint of the metrics: what HTTP gets there, and that no client of it holds the thread or the loop."""

import os
import socket
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from harness import HOST, ended, read_exactly, until, until_end
from metrics_kit import LONG, Measured, always_fresh, parsed, patient
from process import Process, refused

from tt import metrics_http
from tt.config import Address
from tt.metrics_http import CONNECTIONS, MAX_REQUEST, Endpoint, MetricsError, open_listeners


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Measured]:
    patient(monkeypatch)
    with Measured(tmp_path / "data") as server:
        yield server


# ---- what is answered -----------------------------------------------------------------------------------------------


def test_get_has_the_page_and_head_its_headers(server: Measured) -> None:
    status, text, headers = server.get()
    assert (status, headers["Content-Type"]) == (200, "text/plain; version=0.0.4; charset=utf-8")
    assert int(headers["Content-Length"]) == len(text.encode())
    assert parsed(text)["tt_observe", ""] == 0
    status, nothing, of_head = server.get(method="HEAD")
    assert (status, nothing, of_head["Content-Length"]) == (200, "", headers["Content-Length"])
    assert server.get("/metrics?name=x")[0] == 200
    assert server.get(f"http://{HOST}:{server.http}/metrics")[0] == 200


@pytest.mark.parametrize(
    ("method", "path", "status", "text"),
    [
        ("POST", "/metrics", 405, "/metrics is for GET and HEAD\n"),
        ("DELETE", "/metrics", 405, "/metrics is for GET and HEAD\n"),
        ("GET", "/", 404, "there is /metrics alone\n"),
        ("GET", "/metrics/", 404, "there is /metrics alone\n"),
        ("GET", "/../metrics", 404, "there is /metrics alone\n"),
        ("POST", "/other", 404, "there is /metrics alone\n"),
        ("HEAD", "/other", 404, ""),
    ],
)
def test_other_methods_and_paths_are_told_what_there_is(
    server: Measured, method: str, path: str, status: int, text: str
) -> None:
    answered, body, headers = server.get(path, method, b"x" * 100_000 if method == "POST" else None)
    assert (answered, body) == (status, text)
    assert headers["Allow"] == ("GET, HEAD" if status == 405 else None)


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"GET /metrics\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n", 400),
        (b"\r\n\r\n", 400),
        (b"GET /metrics HTTP/2.0\r\n\r\n", 400),
        (b"GET /m\xff HTTP/1.1\r\n\r\n", 400),
        (b"GET /metrics HTTP/1.1\r\nHost: x", 400),
        (b"", 400),
        (b"GET /metrics HTTP/1.1\r\nX: " + b"x" * MAX_REQUEST, 431),
        (b"GET /" + b"x" * MAX_REQUEST, 431),
    ],
)
def test_what_is_no_request_is_refused_in_one_line(server: Measured, request_: bytes, status: int) -> None:
    peer = server.browse()
    peer.sendall(request_)
    peer.shutdown(socket.SHUT_WR)
    head, _, body = until_end(peer).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 %d " % status)
    assert body == b"an HTTP request of at most 8192 bytes: GET /metrics\n"


def test_a_target_that_is_no_url_is_not_found(server: Measured) -> None:
    peer = server.browse()
    peer.sendall(b"GET http://[/metrics HTTP/1.1\r\n\r\n")
    assert until_end(peer).startswith(b"HTTP/1.1 404 Not Found\r\n")


def test_a_request_may_come_byte_by_byte(server: Measured) -> None:
    peer = server.browse()
    for byte in b"GET /metrics HTTP/1.0\r\n\r\n":
        peer.send(bytes([byte]))
    assert until_end(peer).startswith(b"HTTP/1.1 200 OK\r\n")


# ---- clients that hold on -------------------------------------------------------------------------------------------


def test_silent_clients_give_way_to_the_one_that_asks(server: Measured, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics_http, "DEADLINE", 1000.0)
    silent = [server.browse() for _ in range(CONNECTIONS + 4)]
    assert server.get()[0] == 200
    for peer in silent[:4]:  # who was first
        assert ended(peer) == b""
    silent[-1].sendall(b"GET /metrics HTTP/1.1\r\n\r\n")
    assert read_exactly(silent[-1], 12) == b"HTTP/1.1 200"


def test_a_client_that_sends_a_byte_now_and_then_ends_at_the_deadline(
    server: Measured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics_http, "DEADLINE", 0.2)
    peer = server.browse()

    def is_over() -> bool:
        with suppress(BlockingIOError):
            try:
                peer.send(b"x")
                return not peer.recv(1, socket.MSG_DONTWAIT)
            except ConnectionError:
                return True
        return False

    until("its end", is_over)


def test_a_client_that_does_not_read_ends_at_the_deadline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics_http, "DEADLINE", 0.2)
    server = Measured(tmp_path / "data")
    with server:
        server.endpoint._make_page = lambda _counts: bytes(64 << 20)  # more than the sockets take

        def begins() -> bool:
            """Whether a client gets the first byte: on a busy machine its deadline may come before that."""
            peer = server.browse()
            with suppress(ConnectionError):
                peer.sendall(b"GET /metrics HTTP/1.1\r\n\r\n")
                return peer.recv(1) == b"H"
            return False

        until("the beginning of a page", begins)
        until("the end of its task", lambda: not server.endpoint._tasks)


def test_the_server_serves_while_clients_hold_the_endpoint(server: Measured) -> None:
    for _ in range(CONNECTIONS):
        server.browse()
    server.handshake("127.0.0.3")


# ---- the loop -------------------------------------------------------------------------------------------------------


def test_the_loop_is_asked_once_for_many_scrapes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    patient(monkeypatch)
    monkeypatch.setattr(metrics_http, "PAGE_AGE", 1000.0)
    server = Measured(tmp_path / "data")
    asked: list[dict[str, Any]] = []
    take = server.take
    server.take = lambda: asked.append(take()) or asked[-1]  # type: ignore[func-returns-value]
    with server:
        pages = {server.get()[1] for _ in range(5)}
    assert len(asked) == len(pages) == 1


def test_a_loop_that_does_not_answer_is_said_and_the_next_scrape_is_served(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    always_fresh(monkeypatch)
    monkeypatch.setattr(metrics_http, "PATIENCE", 0.1)
    server = Measured(tmp_path / "data")
    goes_on = threading.Event()
    taken: list[Any] = []
    take = server.take
    server.take = lambda: goes_on.wait(60) and (taken.append(take()) or taken[-1])  # type: ignore[func-returns-value]
    with server:
        status, text, _ = server.get()
        assert (status, text) == (503, "the server's loop has not answered for 0.1 s\n")
        goes_on.set()
        until("the late answer", lambda: taken)
        monkeypatch.setattr(metrics_http, "PATIENCE", LONG)
        assert server.get()[0] == 200
    assert not [record for record in caplog.records if record.name == "asyncio"]


def test_a_failure_to_count_costs_one_scrape(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    always_fresh(monkeypatch)
    monkeypatch.setattr(metrics_http, "PATIENCE", 0.1)
    server = Measured(tmp_path / "data")
    take, failures = server.take, [OSError("no /proc any more")]
    monkeypatch.setattr(server, "take", lambda: take() if not failures else raise_(failures.pop()))
    with server:
        assert server.get()[0] == 503
        # It may come after the 503, on a busy machine; the next scrape is not to share it.
        until("the failure", lambda: server.events.of("internal error"))
        monkeypatch.setattr(metrics_http, "PATIENCE", LONG)
        assert server.get()[0] == 200
        server.events.all.clear()


def raise_(error: Exception) -> None:
    raise error


# ---- start and end --------------------------------------------------------------------------------------------------


def test_a_taken_port_is_one_line_and_nothing_is_left(tmp_path: Path) -> None:
    with socket.create_server((HOST, 0)) as taken:
        port = taken.getsockname()[1]
        said = refused(tmp_path, "--listen", f"{HOST}:0", "--metrics", f"{HOST}:{port}", "--data", "data")
    remedy = "name a free port and an address of this host, or leave --metrics out"
    assert said == f"tt: --metrics {HOST}:{port}: Address already in use: {remedy}\n"


def test_where_one_address_fails_the_others_are_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[socket.socket] = []

    def keep(*family: int) -> socket.socket:
        made.append(socket.socket(*family))
        return made[-1]

    monkeypatch.setattr(metrics_http, "socket", SimpleNamespace(**vars(socket) | {"socket": keep}))
    with pytest.raises(MetricsError, match=r"^--metrics 192\.0\.2\.1:1: Cannot assign requested address: name a free"):
        open_listeners([Address(HOST, 0), Address("192.0.2.1", 1)])
    assert [listener.fileno() for listener in made] == [-1, -1]


def test_without_a_thread_the_start_is_refused(server: Measured, monkeypatch: pytest.MonkeyPatch) -> None:
    def cannot(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    before = os.listdir("/proc/self/fd")
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", cannot)
        with pytest.raises(MetricsError, match=r"^--metrics: no thread can be had: raise the limit of tasks"):
            Endpoint([], server.server, server.take, lambda _counts: b"", "text/plain")
    assert os.listdir("/proc/self/fd") == before


def test_a_server_serves_metrics_in_both_families_and_stops_although_a_client_holds_on(tmp_path: Path) -> None:
    with Process(tmp_path, "--metrics", f"{HOST}:0", "--metrics", "[::1]:0") as server:
        said = server.await_line(r"info metrics address=\S+:(\d+)\n.*info metrics address=\S+:(\d+)\n")
        ports = map(int, said.groups())
        for host, port in zip((HOST, "::1"), ports, strict=True):
            with socket.create_connection((host, port), 10) as peer:
                peer.sendall(b"GET /metrics HTTP/1.1\r\n\r\n")
                values = parsed(until_end(peer).decode().partition("\r\n\r\n")[2])
            assert values["tt_catalog_users", ""] == 1
        with socket.create_connection((HOST, int(said[1])), 10):
            assert server.stop() == 0


def test_an_address_that_strangers_reach_is_warned_of(tmp_path: Path) -> None:
    with Process(tmp_path, "--metrics", "0.0.0.0:0") as server:
        server.await_line(
            r'warning metrics for whoever reaches this address address=0\.0\.0\.0:\d+ remedy="name a loopback or '
        )


def test_without_the_option_nothing_listens_and_no_thread_is_there(tmp_path: Path) -> None:
    with Process(tmp_path) as server:
        names = set()
        for path in Path(f"/proc/{server.pid}/task").glob("*/comm"):
            with suppress(OSError):  # a thread that has ended meanwhile
                names.add(path.read_text().strip())
        assert names
        assert "tt-metrics" not in names
        assert "metrics" not in server.log
