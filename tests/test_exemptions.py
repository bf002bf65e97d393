"""Exemptions made at run time: their file, and what is asked of a server about them."""

import json
import os
import signal
import stat
import subprocess
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import pytest
from harness import until
from process import TT, Process
from test_control import Controlled, fill

from tt import control, exempt_requests, exemptions, state_file
from tt.exemptions import MOST, Exemption, Exemptions
from tt.state_file import StateFileError

OFFICE = ip_network("192.0.2.0/24")
ENTRIES = {
    OFFICE: Exemption("192.0.2.0/24", "caf\u00e9 \u2028", "2026-01-31T12:00:00Z"),
    "loopback": Exemption("loopback", None, "2026-01-31T12:00:00Z"),
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "exempt"


# ---- the file -------------------------------------------------------------------------------------------------------


def test_what_was_saved_is_taken_again_and_the_file_is_private_and_readable(path: Path) -> None:
    Exemptions(path).save(ENTRIES)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [json.loads(line)["network"] for line in path.read_bytes().splitlines()] == ["192.0.2.0/24", "loopback"]
    again = Exemptions(path)
    again.load()
    assert again.entries == ENTRIES
    again.save({})
    assert path.read_bytes() == b""


def test_without_a_file_nobody_is_exempt(path: Path) -> None:
    none = Exemptions(path)
    none.load()
    assert none.entries == {}


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        (b"192.0.2.0/24\n", "line 1: "),
        (b'{"network":"192.0.2.0/24","note":null,"since":""}\n{}\n', "line 2: "),
        (b'{"network":"192.0.2.1/24","note":null,"since":""}\n', "line 1: 192.0.2.1/24 has host bits set"),
        (b"\xff\n", "line 1: "),
        (b"x" * (exemptions.MAX_FILE + 1), f"over {exemptions.MAX_FILE} bytes"),
    ],
)
def test_a_file_that_cannot_be_read_is_named_and_never_written_over(path: Path, text: bytes, rule: str) -> None:
    path.write_bytes(text)
    broken = Exemptions(path)
    for call in (broken.load, lambda: broken.save(ENTRIES)):
        with pytest.raises(StateFileError) as error:
            call()
        assert str(error.value).startswith(f"{path}: exemptions not restored: {rule}")
        assert str(error.value).endswith(": repair or remove it, then restart")
        assert "\n" not in str(error.value)
    assert broken.entries == {}
    assert path.read_bytes() == text


def test_more_than_can_be_are_not_taken(path: Path) -> None:
    many = {n: Exemption(f"10.0.{n >> 8}.{n & 255}/32", None, "") for n in range(MOST + 1)}
    Exemptions(path).save(many)  # type: ignore[arg-type]
    with pytest.raises(StateFileError, match=f"{MOST + 1} entries: at most {MOST}"):
        Exemptions(path).load()


def test_a_save_that_fails_is_named_and_the_old_file_stands(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Exemptions(path).save(ENTRIES)
    before = path.read_bytes()

    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        StateFileError, match="exempt: exemptions not saved: No space left on device: make the directory"
    ):
        Exemptions(path).save({})
    assert path.read_bytes() == before


# ---- asked of a server ----------------------------------------------------------------------------------------------


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Controlled]:
    with Controlled(tmp_path / "data", exempt=["198.51.100.0/24"]) as server:
        yield server


def shown(server: Controlled) -> dict[str, tuple[str, str | None]]:
    return {item["network"]: (item["from"], item["note"]) for item in server.ask("exempt.list")[:-1]}


def rude(server: Controlled, source: str) -> None:
    with server.connect(source) as peer:
        peer.sendall(b"GET / HTTP/1.1\r\n\r\n")
        with pytest.raises(ConnectionResetError):
            peer.recv(1)


def test_who_is_exempted_is_let_in_at_once_and_is_not_timed_out_until_that_ends(server: Controlled) -> None:
    for source in ("127.0.0.2", "127.0.0.3", "127.9.0.1", "192.0.2.1"):
        server.ask("bans.add", source=source)
    assert server.is_dropped("127.0.0.2")
    (line,) = server.ask("exempt.add", network="127.0.0.0/16", reason="office")
    assert line == {"end": True, "network": "127.0.0.0/16", "added": True, "lifted": 2, "caveats": []}
    assert server.sources() == ["127.9.0.1", "192.0.2.1"]
    assert [item["state"] for item in server.ask("bans.history")[:-1]] == ["lifted", "lifted", "running", "running"]
    rude(server, "127.0.0.2")
    until("the log", lambda: server.events.of("exempt, disconnected"))
    assert not server.is_dropped("127.0.0.2")
    assert shown(server) == {"198.51.100.0/24": ("configuration", None), "127.0.0.0/16": ("run time", "office")}
    (refused,) = server.ask("bans.add", source="127.0.0.2")
    assert refused["error"] == "127.0.0.2 is exempt: use 'tt exempt remove 127.0.0.0/16' first"
    assert server.ask("exempt.remove", network="127.0.0.0/16") == [
        {"end": True, "network": "127.0.0.0/16", "still": False}
    ]
    rude(server, "127.0.0.2")
    until("the time-out", lambda: server.is_dropped("127.0.0.2"))
    assert [(e["request"], str(e["network"])) for e in server.events.of("done by hand") if "network" in e] == [
        ("exempt.add", "127.0.0.0/16"), ("exempt.remove", "127.0.0.0/16"),
    ]  # fmt: skip


def test_a_word_is_exempted_as_what_it_stands_for(server: Controlled) -> None:
    assert server.ask("exempt.add", network="loopback")[0]["added"] is True
    rude(server, "127.0.0.2")
    until("the log", lambda: server.events.of("exempt, disconnected"))
    assert server.ask("status")[0]["exempt"] == ["198.51.100.0/24", "127.0.0.0/8", "::1/128"]
    (line,) = server.ask("exempt.add", network="gateways")
    assert line["error"] == "gateways: none is known on this host: name their addresses"


def test_one_that_is_there_is_not_added_again_but_its_note_may_change(server: Controlled) -> None:
    assert server.ask("exempt.add", network="198.51.100.0/24")[0]["added"] is False
    for note, added in (("one", True), ("one", False), (None, False), ("two", True)):
        assert server.ask("exempt.add", network="192.0.2.0/24", reason=note)[0]["added"] is added
    assert shown(server)["192.0.2.0/24"] == ("run time", "two")


@pytest.mark.parametrize(
    ("do", "network", "line"),
    [
        (
            "add",
            "192.0.2.1/24",
            "'192.0.2.1/24' cannot be exempt: it must be a network like 192.0.2.0/24 or 2001:db8::/",
        ),
        (
            "add",
            "office",
            "'office' cannot be exempt: it must be a network like 192.0.2.0/24 or 2001:db8::/32 without h",
        ),
        ("add", 5, "the request needs 'network', a text"),
        ("remove", "198.51.100.0/24", "198.51.100.0/24 is exempt by the configuration: take it out of `exempt` there,"),
        ("remove", "198.51.100.7", "198.51.100.7/32 is not exempt by itself: see 'tt exempt list'"),
        ("remove", "203.0.113.0/24", "203.0.113.0/24 is not exempt: see 'tt exempt list'"),
        ("remove", "loopback", "loopback is not exempt: see 'tt exempt list'"),
        ("remove", "", "'' cannot be exempt: it must be "),
    ],
)
def test_what_cannot_be_done_is_one_line_with_the_rule(server: Controlled, do: str, network: Any, line: str) -> None:
    (refused,) = server.ask(f"exempt.{do}", network=network)
    assert refused["error"].startswith(line)
    assert list(shown(server)) == ["198.51.100.0/24"]


@pytest.mark.parametrize(
    ("network", "caveat"),
    [
        ("0.0.0.0/0", "all IPv4 addresses are never timed out; name networks of your own"),
        ("0.0.0.0/1", "1/2 of all IPv4 addresses are never timed out"),
        ("::ffff:192.0.2.0/120", "exempts nobody, since such a source counts as its IPv4 address; write 192.0.2.0/24"),
        ("2001:db8::7/128", "exempts all of 2001:db8::/64, which is one source; write that, so that it is seen"),
    ],
)
def test_what_will_not_do_what_it_seems_is_done_and_said(server: Controlled, network: str, caveat: str) -> None:
    (line,) = server.ask("exempt.add", network=network)
    assert line["added"]
    assert [text[: len(caveat)] for text in line["caveats"]] == [caveat]


def test_there_are_at_most_so_many(server: Controlled, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exempt_requests, "MOST", 2)
    for number in range(2):
        server.ask("exempt.add", network=f"192.0.2.{number}")
    (refused,) = server.ask("exempt.add", network="192.0.2.9")
    assert refused["error"] == "2 networks are exempt: remove one, or name a wider one"
    assert "end" in server.ask("exempt.add", network="192.0.2.1", reason="why")[0]


def test_a_change_that_cannot_be_saved_changes_nothing(server: Controlled, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tt.state_file.replace", fail)
    (line,) = server.ask("exempt.add", network="192.0.2.0/24")
    assert "exemptions not saved: No space left on device: make the directory writable" in line["error"]
    assert list(shown(server)) == ["198.51.100.0/24"]
    monkeypatch.undo()
    assert server.ask("exempt.add", network="192.0.2.0/24")[0]["added"] is True


def test_changes_asked_for_at_once_are_all_made(server: Controlled) -> None:
    with server.open() as one, server.open() as other:
        for number in range(20):
            for client, net in ((one, 0), (other, 1)):
                client.sendall(json.dumps({"do": "exempt.add", "network": f"192.0.{net}.{number}"}).encode() + b"\n")
        for client in (one, other):
            with client.makefile("rb") as stream:
                assert all(json.loads(stream.readline())["added"] for _ in range(20))
    assert len(shown(server)) == 41


def test_thousands_are_lifted_though_who_asked_goes_away(tmp_path: Path) -> None:
    server = Controlled(tmp_path / "data")
    fill(server.table, 20_000)
    with server:
        with server.open() as client:
            client.sendall(b'{"do":"exempt.add","network":"10.0.0.0/9"}\n')
        words = "time-outs lifted of sources that are exempt now"
        until("all to be lifted", lambda: server.events.of(words), 60)
        assert server.table.running == 0
        assert list(shown(server)) == ["10.0.0.0/9"]
        (said,) = server.events.of(words)
        assert said["count"] == 20_000


def test_a_change_whose_asker_was_dropped_while_it_was_saved_is_made_all_the_same(
    server: Controlled, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk, plain = threading.Event(), state_file.replace
    server.ask("bans.add", source="192.0.2.1")

    def slow(*arguments: Any) -> None:
        assert disk.wait(60)
        plain(*arguments)

    monkeypatch.setattr(state_file, "replace", slow)
    with server.open() as client, ExitStack() as others:
        client.sendall(b'{"do":"exempt.add","network":"192.0.2.0/24"}\n')
        until("the save", lambda: any(thread.name == "tt-exempt" for thread in threading.enumerate()))
        for _ in range(control.MAX_CLIENTS):
            others.enter_context(server.open())
        assert client.recv(1) == b""
        disk.set()
        until("the lifting", lambda: server.table.running == 0)
    assert list(shown(server)) == ["198.51.100.0/24", "192.0.2.0/24"]


def test_members_of_the_service_group_may_change_exemptions() -> None:
    assert {"exempt.list", "exempt.add", "exempt.remove"} <= control.FOR_GROUP


# ---- a real server --------------------------------------------------------------------------------------------------


def test_an_exemption_outlives_a_sighup_a_kill_and_a_restart(tmp_path: Path) -> None:
    def exempt(*words: str) -> str:
        command = [TT, "exempt", *words, "--data", str(tmp_path / "data")]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
        return done.stdout + done.stderr

    with Process(tmp_path) as server:
        server.time_out("127.0.0.9")
        assert "127.0.0.9/32 is exempt now; 1 time-out lifted" in exempt("add", "127.0.0.9", "--reason", "probe")
        server.send(signal.SIGHUP)
        server.await_line("configuration reloaded")
        server.send_http("127.0.0.9")
        server.await_line("exempt, disconnected source=127.0.0.9")
        server.kill()
    with Process(tmp_path) as again:
        again.send_http("127.0.0.9")
        again.await_line("exempt, disconnected source=127.0.0.9")
        assert "probe" in exempt("list")
        assert "127.0.0.9/32 is no longer exempt" in exempt("remove", "127.0.0.9")
        again.time_out("127.0.0.9")


def test_a_file_of_exemptions_that_cannot_be_read_keeps_nobody_from_the_start(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data/exempt").write_text("192.0.2.0/24\n")
    with Process(tmp_path) as server:
        server.await_line("exemptions not restored, going on without them error=.*line 1: .*repair or remove it")
