"""`tt scan`, `reconcile`, `move-pending` and `sync` against the real server: what they do, print and return."""

import io
import json
import os
import pty
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from harness import HOST, PATIENCE
from process import TT, Process
from shells import read_all

from tt import cli, keys
from tt.catalog.messages import AddVolume, UpdateVolume, Written
from tt.cli import output, server_option
from tt.cli.reconcile import Element, ListError, read_mtx
from tt.client import Client

EXAMPLES = Path(__file__).parent.parent / "examples"
LONG = 60.0  # s that an answer may take: what hashes a password lets all others on the machine go first
PASSWORD = "correct horse"
REPOSITORIES = (("VLT1", "vault", ""), ("RACK", "rack", ""), ("LIB", "library", "VLT1"))
MEDIA = ("SCAN", "REC", "PEND", "SYNC", "LTO")  # one a group of tests, so that none counts another's tapes
MAX_LIST_BYTES = 500_000  # of 10,000 Volumes, down to the client
MAX_UPDATES_BYTES = 10_000  # of 100 updates, both ways

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    """A server with a Customer, MEDIA and REPOSITORIES, whose tapemaster has PASSWORD."""
    with Process(tmp_path_factory.mktemp("server")) as server:
        first = (server.place / "data/first-password").read_text().strip()
        with client_of(server) as client:
            client.request("login", {"user": "tapemaster", "password": first})
            client.request("password", {"old": first, "new": PASSWORD})
            client.request("customer.add", {"customer": "US01"})
            for media in MEDIA:
                client.request("media.add", {"media": f"US01.{media}"})
                for repository, kind, following in REPOSITORIES:
                    name = f"US01.{media}.{repository}"
                    client.request("repository.add", {"repository": name, "kind": kind, "next": following})
        yield server


def client_of(server: Process, port: int = 0) -> Client:
    public = keys.from_text((server.place / "data/server.pub").read_text().strip())
    return Client(HOST, port or server.port, key=public, timeout=LONG)


class Tt:
    """Runs `tt` in this process, as the tapemaster, and what it printed."""

    def __init__(self, server: Process, capture: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
        self._server, self._capture, self._monkeypatch = server, capture, monkeypatch
        monkeypatch.setattr(server_option, "Client", partial(Client, timeout=LONG))
        self.login = f"tapemaster:-{PASSWORD}@{HOST}:{server.port}"
        monkeypatch.setenv("XDG_CONFIG_HOME", server.environ["XDG_CONFIG_HOME"])

    def __call__(self, *words: str, stdin: str | bytes = "", code: int = output.OK) -> tuple[str, str]:
        data = stdin.encode() if isinstance(stdin, str) else stdin
        self._monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
        assert cli.main([*words, "-S", self.login]) == code, self._capture.readouterr()
        out, err = self._capture.readouterr()
        return out, err


@pytest.fixture
def tt(server: Process, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> Tt:
    return Tt(server, capsys, monkeypatch)


@pytest.fixture
def ask(server: Process) -> Iterator[Callable[..., Any]]:
    """Asks for one operation."""
    with client_of(server) as client:
        client.request("login", {"user": "tapemaster", "password": PASSWORD})
        yield lambda operation, **arguments: client.request(operation, arguments)


def volume(ask: Callable[..., Any], name: str) -> dict[str, Any]:
    fields = ("name", "current", "target", "scanned", "flags", "move_date")
    return dict(zip(fields, ask("volume.get", volume=name), strict=False))


# ---- tt scan --------------------------------------------------------------------------------------------------------


def test_each_scan_is_answered_and_the_sums_decide_the_exit_code(tt: Tt, ask: Callable[..., Any]) -> None:
    for name in ("A1", "A2", "A3"):
        ask("volume.add", volume=f"US01.SCAN.{name}", repository="LIB")
    for name in ("A1", "A2"):
        ask("volume.move", volume=f"US01.SCAN.{name}", to="VLT1")
    words = ("scan", "out", "--repository", "US01.SCAN.LIB")
    out, err = tt(*words, stdin="A1\r\n\nUS01.SCAN.A2\nA3\nB9\na b\n" + 21 * "X" + "\n", code=output.FAILED)
    assert out.splitlines() == [
        "ok      US01.SCAN.A1: on its way to VLT1",
        "ok      US01.SCAN.A2: on its way to VLT1",
        "wrong   US01.SCAN.A3: is not to move",
        "unknown US01.SCAN.B9: there is no Volume B9 in US01.SCAN",
        out.splitlines()[4],
        f"unknown {21 * 'X'}: a barcode has at most 20 characters",
        "2 ok, 1 wrong, 3 unknown",
    ]
    assert out.splitlines()[4].startswith("unknown a b: volume: must be 2 to 10 of A-Z, 0-9 and '-'")
    assert err == ""
    assert tt("scan", "in", "--repository", "US01.SCAN.VLT1", stdin="A1\nA2\n")[0].endswith(
        "\n2 ok, 0 wrong, 0 unknown\n"
    )
    assert volume(ask, "US01.SCAN.A1") == {
        "name": "US01.SCAN.A1", "current": "VLT1", "target": "", "scanned": "VLT1", "flags": "C", "move_date": "",
    }  # fmt: skip


def test_json_is_an_object_a_scan_and_one_for_the_sums(tt: Tt) -> None:
    out, _ = tt("scan", "in", "--repository", "US01.SCAN.LIB", "--json", stdin="NOSUCH\n", code=output.FAILED)
    scan, sums = map(json.loads, out.splitlines())
    assert scan == {
        "verdict": "unknown", "volume": "US01.SCAN.NOSUCH", "message": "there is no Volume NOSUCH in US01.SCAN",
    }  # fmt: skip
    assert sums == {"ok": 0, "wrong": 0, "unknown": 1}


def test_nothing_scanned_is_no_failure(tt: Tt) -> None:
    assert tt("scan", "in", "--repository", "US01.SCAN.LIB") == ("0 ok, 0 wrong, 0 unknown\n", "")


def test_a_repository_that_is_none_ends_the_run(tt: Tt) -> None:
    words = ("scan", "in", "--repository", "US01.SCAN.NONE")
    out, err = tt(*words, stdin="A1\nA2\n", code=output.FAILED)
    assert out == "0 ok, 0 wrong, 0 unknown\n"
    assert err == "tt: there is no Repository US01.SCAN.NONE (not_found)\n"
    _, err = tt("scan", "in", "--repository", "VLT1", code=output.USAGE)
    assert "repository: must be written CUSTOMER.MEDIA.REPOSITORY, not 'VLT1'" in err


def test_a_barcode_is_answered_before_the_next_is_read(server: Process, tt: Tt) -> None:
    with subprocess.Popen(
        [TT, "scan", "in", "--repository", "US01.SCAN.LIB", "-S", tt.login],
        env=server.environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0,
    ) as process:  # fmt: skip
        assert process.stdin
        assert process.stdout
        for name in (b"ONE", b"TWO"):
            process.stdin.write(name + b"\n")
            assert process.stdout.readline().startswith(b"unknown US01.SCAN." + name)
        process.stdin.close()
        assert process.stdout.read() == b"0 ok, 0 wrong, 2 unknown\n"
    assert process.returncode == output.FAILED


def test_on_a_terminal_ctrl_d_ends(server: Process, tt: Tt) -> None:
    outside, inside = pty.openpty()
    with subprocess.Popen(
        [TT, "scan", "in", "--repository", "US01.SCAN.LIB", "-S", tt.login],
        env=server.environ, stdin=inside, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        os.close(inside)
        os.write(outside, b"\x04")
        out, err = process.communicate(timeout=LONG)
    os.close(outside)
    assert (out, err) == ("0 ok, 0 wrong, 0 unknown\n", "tt: scan in at US01.SCAN.LIB; Ctrl-D ends\n")
    assert process.returncode == output.OK


def test_ctrl_c_prints_the_sums_of_what_was_recorded(server: Process, tt: Tt) -> None:
    with subprocess.Popen(
        [TT, "scan", "in", "--repository", "US01.SCAN.LIB", "-S", tt.login],
        env=server.environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0,
    ) as process:  # fmt: skip
        assert process.stdin
        assert process.stdout
        assert process.stderr
        process.stdin.write(b"ONE\n")
        assert process.stdout.readline().startswith(b"unknown US01.SCAN.ONE")
        process.send_signal(signal.SIGINT)
        assert process.stdout.read() == b"0 ok, 0 wrong, 1 unknown\n"
        assert process.stderr.read() == b""
    assert process.returncode == output.FAILED


def test_a_scan_is_sent_again_on_a_new_connection(server: Process, tt: Tt, ask: Callable[..., Any]) -> None:
    ask("volume.add", volume="US01.SCAN.L1", repository="LIB")
    with subprocess.Popen(
        [TT, "scan", "in", "--repository", "US01.SCAN.LIB", "-S", tt.login],
        env=server.environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0,
    ) as process:  # fmt: skip
        assert process.stdin
        assert process.stdout
        assert process.stderr
        process.stdin.write(b"L1\n")
        assert process.stdout.readline() == b"ok      US01.SCAN.L1: confirmed\n"
        (session,) = [one for one in ask("session.list")[0] if one[3] == "tt scan"]
        ask("session.disconnect", id=session[0])
        process.stdin.write(b"L1\n")
        assert process.stdout.readline() == b"ok      US01.SCAN.L1: confirmed\n"
        process.stdin.close()
        assert b"connecting again" in process.stderr.read()
    assert process.returncode == output.OK


# ---- tt reconcile ---------------------------------------------------------------------------------------------------

CHANGER = "  Storage Changer /dev/sg3:1 Drives, 3 Slots ( 1 Import/Export )\n"


def test_mtx_status_with_drives_slots_and_import_export_elements() -> None:
    text = CHANGER + (
        "Data Transfer Element 0:Full (Unknown Storage Element Loaded):VolumeTag = A00001L6                 \n"
        "      Storage Element 1:Full \n"
        "      Storage Element 2:Empty:VolumeTag=\n"
        "      Storage Element 3 IMPORT/EXPORT:Full :VolumeTag=A00002L6       :AlternateVolumeTag=other\n"
    )
    assert list(read_mtx(text.splitlines())) == [
        Element("Data Transfer Element 0", "A00001L6"),
        Element("Storage Element 1", ""),
        Element("Storage Element 3", "A00002L6"),
    ]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "it is not the whole output of 'mtx status': 0 of 0 Data Transfer Elements, 0 of 0 Storage Elements"),
        (CHANGER + "Data Transfer Element 0:Empty\n      Storage Element 1:Empty\n", "1 of 3 Storage Elements"),
        ("mtx: Request Sense: Long Report=yes\n", "line 1 is none that 'mtx status' prints: 'mtx: Request Sense"),
        (CHANGER + "      Storage Element 1:Fullish\n", "line 2 is none that 'mtx status' prints"),
    ],
)
def test_what_is_not_the_whole_output_of_mtx_is_compared_with_nothing(text: str, says: str) -> None:
    with pytest.raises(ListError, match=re.escape(says)):
        list(read_mtx(text.splitlines()))


def test_reconcile_prints_and_keeps_what_was_found(tt: Tt, ask: Callable[..., Any]) -> None:
    for name in ("A1", "A2", "A3"):
        ask("volume.add", volume=f"US01.REC.{name}", repository="RACK")
    words = ("reconcile", "--repository", "US01.REC.RACK")
    out, err = tt(*words, stdin="A1\nUS01.REC.A2\nA1\nB7\n", code=output.FAILED)
    found = re.fullmatch(
        r"surplus B7\ndeficit A3\n2 correct, 1 surplus, 1 deficit\ncertificate (US01\.REC\.RACK \S+Z)\n", out
    )
    assert found, out
    assert err == ""
    assert tt("reconcile", "--show", found[1])[0] == out
    assert tt("reconcile", "--show", *found[1].split())[0] == out
    shown = json.loads(tt("reconcile", "--show", found[1], "--json")[0])
    assert (shown["id"], shown["correct"], shown["surplus"], shown["deficit"]) == (found[1], 2, ["B7"], ["A3"])
    listed = tt(*words, "--list", "--json")[0]
    assert [json.loads(line)["id"] for line in listed.splitlines()] == [found[1]]
    assert found[1] in tt(*words, "--list")[0]
    assert tt(*words, stdin="A1\nA2\nA3\n")[0].startswith("3 correct, 0 surplus, 0 deficit\n")


def test_a_list_with_a_bad_line_makes_no_certificate(tt: Tt, ask: Callable[..., Any]) -> None:
    before = ask("statistics")[5]
    words = ("reconcile", "--repository", "US01.REC.LIB")
    out, err = tt(*words, stdin=b"A1\nUS01.LTO.A1\n\xff\xfe\n", code=output.FAILED)
    assert out == ""
    assert (
        err.splitlines()[0] == "tt: line 2: volume: must be of US01.REC, the Repository's Media type, not US01.LTO.A1"
    )
    assert err.splitlines()[1].startswith("tt: line 3: volume: must be 2 to 10 of A-Z")
    assert err.splitlines()[2] == "tt: 2 lines name no Volume: correct them first; nothing was compared"
    assert ask("statistics")[5] == before


def test_the_mtx_list_of_the_examples_and_labels_that_cannot_be_read(
    tt: Tt, ask: Callable[..., Any], tmp_path: Path
) -> None:
    words = ("reconcile", "--repository", "US01.REC.LIB", "--mtx")
    ask("volume.add", volume="US01.REC.A00001L6", repository="LIB")
    path = tmp_path / "status"
    path.write_text(
        CHANGER + "Data Transfer Element 0:Full (Storage Element 1 Loaded):VolumeTag = A00001L6\n"
        "      Storage Element 1:Empty\n      Storage Element 2:Full \n"
        "      Storage Element 3 IMPORT/EXPORT:Full :VolumeTag=CLN001L1\n"
    )
    out, err = tt(*words, str(path), code=output.FAILED)
    assert out.startswith("1 correct, 0 surplus, 0 deficit\n")
    assert err.startswith("tt: Storage Element 2 holds a tape that is left out: volume: must be 2 to 10 of A-Z")
    path.write_text(path.read_text().replace("2:Full ", "2:Empty"))
    assert tt(*words, str(path))[0].startswith("1 correct, 0 surplus, 0 deficit\n")
    assert tt(*words, "-", stdin=path.read_text())[0].startswith("1 correct")
    out, err = tt(*words, "/nonexistent", code=output.USAGE)
    assert err == "tt: /nonexistent: No such file or directory\n"
    _, err = tt("reconcile", code=output.USAGE)
    assert err == "tt: --repository is required; see 'tt reconcile --help'\n"


# ---- tt move-pending ------------------------------------------------------------------------------------------------


def test_move_pending_is_quiet_until_something_is_due(tt: Tt, ask: Callable[..., Any]) -> None:
    words = ("move-pending", "--scope", "US01.PEND")
    ask("volume.add", volume="US01.PEND.A1", repository="LIB", move_date="2099-01-01")
    assert tt(*words) == ("", "")
    ask("volume.update", volume="US01.PEND.A1", move_date="2026-01-01")
    ask("volume.add", volume="US01.PEND.A2", repository="RACK", flags="p")
    line = "US01.PEND.A1 LIB -> VLT1\n"
    problem = "tt: US01.PEND.A2 stays in RACK: RACK has no next Repository\n"
    assert tt(*words, "--dry-run", code=output.FAILED) == (line, problem)
    assert volume(ask, "US01.PEND.A1")["target"] == ""
    assert tt(*words, code=output.FAILED) == (line, problem)
    assert volume(ask, "US01.PEND.A1")["target"] == "VLT1"
    assert json.loads(tt(*words, "--json", code=output.FAILED)[0]) == {
        "volume": "US01.PEND.A2", "from": "RACK", "to": "", "problem": "RACK has no next Repository",
    }  # fmt: skip
    ask("volume.update", volume="US01.PEND.A2", clear_flags="p")
    assert tt(*words) == ("", "")


def test_move_pending_goes_through_all_pages(server: Process, tt: Tt) -> None:
    names = [f"US01.PEND.P{number:04}" for number in range(1200)]
    with client_of(server) as client:
        client.login("tapemaster", PASSWORD)
        client.pack([("volume.add", AddVolume(name, "LIB", flags="p")) for name in names])
    moving = "".join(f"{name} LIB -> VLT1\n" for name in names)
    words = ("move-pending", "--scope", "US01.PEND")
    assert tt(*words, "--dry-run") == (moving, "")
    assert tt(*words) == (moving, "")
    assert tt(*words) == ("", "")


# ---- tt sync --------------------------------------------------------------------------------------------------------

MAPPING = """
scope = "US01.SYNC"
[may]
add = true
update = true
move = true
[columns]
volume = "Barcode"
repository = "Place"
description = "Label"
"""


@pytest.fixture
def mapping(tmp_path: Path) -> str:
    path = tmp_path / "mapping.toml"
    path.write_text(MAPPING)
    return str(path)


def statistics(out: str) -> dict[str, int]:
    """The last line, as JSON, without what is 0."""
    return {key: count for key, count in json.loads(out.splitlines()[-1]).items() if count}


def test_sync_adds_updates_and_moves_only_what_differs(tt: Tt, ask: Callable[..., Any], mapping: str) -> None:
    words = ("sync", "-d", mapping, "--json")
    out, err = tt(*words, stdin="Barcode,Place,Label\nA1,RACK,one\nA2,RACK,two\nA3,LIB,three\n")
    assert (statistics(out), err) == ({"lines": 3, "added": 3}, "")
    changed = "Barcode,Place,Label\nA1,RACK,one\nA2,RACK,zwei\nA3,VLT1,three\n"
    before = ask("statistics")[5]
    out, err = tt(*words, "--dry-run", stdin=changed)
    assert out.splitlines()[:-1] == [
        "update US01.SYNC.A2: description 'two' -> 'zwei'", "move US01.SYNC.A3 from LIB to VLT1",
    ]  # fmt: skip
    assert statistics(out) == {"lines": 3, "scope": 3, "unchanged": 1, "updated": 1, "moved": 1}
    assert err == ""
    out, _ = tt("sync", "-d", mapping, "--dry-run", stdin=changed)
    assert re.search(r"^Volumes to update +1\nMoves to ask for +1\n", out, re.M)
    assert ask("statistics")[5] == before
    assert statistics(tt(*words, stdin=changed)[0]) == {
        "lines": 3, "scope": 3, "unchanged": 1, "updated": 1, "moved": 1,
    }  # fmt: skip
    assert ask("statistics")[5] == before + 2
    assert statistics(tt(*words, stdin=changed)[0]) == {"lines": 3, "scope": 3, "unchanged": 3}
    assert ask("statistics")[5] == before + 2


def test_a_bad_line_and_a_refused_change_are_named_and_the_others_done(
    tt: Tt, ask: Callable[..., Any], mapping: str
) -> None:
    text = "Barcode,Place,Label\nB1,RACK,one\nb2,RACK,two\nB3,NONE,three\nB4,RACK,four\n"
    out, err = tt("sync", "-d", mapping, stdin=text, code=output.FAILED)
    first, second = err.splitlines()
    assert first.startswith("tt: line 3: volume in column 'Barcode': must be 2 to 10 of A-Z, 0-9 and '-', the first")
    assert second == "tt: line 4: there is no Repository US01.SYNC.NONE (not_found)"
    assert re.search(r"^Lines with an error +1\n", out, re.M)
    assert re.search(r"^Volumes added +2\n", out, re.M)
    assert re.search(r"^Changes that the server refused +1\n", out, re.M)
    assert volume(ask, "US01.SYNC.B4")["current"] == "RACK"


@pytest.mark.parametrize("line", ["b2,RACK,two\n", "B3,NONE,three\n"])
def test_one_bad_line_or_refused_change_is_exit_code_1(tt: Tt, mapping: str, line: str) -> None:
    _, err = tt("sync", "-d", mapping, stdin=f"Barcode,Place,Label\n{line}", code=output.FAILED)
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("stdin", "says"),
    [
        ("Barcode,Place\nA1,RACK\n", "tt: column 'Label', which the mapping names for description, is not among"),
        (
            "",
            "tt: column 'Barcode', which the mapping names for volume, is not among the headings of line 1: there are",
        ),
    ],
)
def test_headings_that_do_not_fit_are_exit_code_2(tt: Tt, mapping: str, stdin: str, says: str) -> None:
    out, err = tt("sync", "-d", mapping, stdin=stdin, code=output.USAGE)
    assert out == ""
    assert err.startswith(says)
    assert err.count("\n") == 1


def test_a_connection_that_is_lost_says_what_was_done_before(
    tt: Tt, ask: Callable[..., Any], mapping: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = Client.pack

    def pack_and_lose(client: Client, asked: Any) -> list[Any]:
        results = plain(client, asked)
        client.close()
        return results

    text = "Barcode,Place,Label\nC1,RACK,\nC2,RACK,\n"
    with monkeypatch.context() as patched:
        patched.setattr("tt.cli.sync.BATCH", 1)
        patched.setattr(Client, "pack", pack_and_lose)
        out, err = tt("sync", "-d", mapping, "--json", stdin=text, code=output.NO_CONNECTION)
    assert statistics(out)["added"] == 1
    assert err.startswith("tt: there is no connection to ")
    assert statistics(tt("sync", "-d", mapping, "--json", stdin=text)[0])["added"] == 1
    assert volume(ask, "US01.SYNC.C2")["current"] == "RACK"


def test_progress_is_shown_on_a_terminal_only(server: Process, tt: Tt, mapping: str) -> None:
    outside, inside = pty.openpty()
    text = "Barcode,Place,Label\n" + "".join(f"P{number:04},RACK,\n" for number in range(1200))
    with subprocess.Popen(
        [TT, "sync", "-d", mapping, "-S", tt.login],
        env=server.environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=inside, text=True,
    ) as process:  # fmt: skip
        os.close(inside)
        out, _ = process.communicate(text, timeout=LONG)
    shown = read_all(outside, bytearray()).decode()
    os.close(outside)
    assert process.returncode == output.OK
    assert re.search(r"\d+ of 1200 changes sent", shown), shown
    assert shown.endswith("\r\x1b[K")
    assert re.search(r"^Volumes added +1200$", out, re.M)


# ---- the whole inventory --------------------------------------------------------------------------------------------


SYNC = ("sync", "-d", str(EXAMPLES / "inventory.toml"), "--json")


@pytest.fixture(scope="module")
def inventory(server: Process) -> bytes:
    """The CSV of the examples, which the server has."""
    made = subprocess.run([sys.executable, EXAMPLES / "make_inventory.py"], capture_output=True, check=True).stdout
    login = f"tapemaster:-{PASSWORD}@{HOST}:{server.port}"
    done = subprocess.run([TT, *SYNC, "-S", login], input=made, env=server.environ, capture_output=True, check=True)
    assert statistics(done.stdout.decode()) == {"lines": 10_000, "added": 10_000}
    assert done.stderr == b""
    return made


def test_a_second_sync_of_the_whole_inventory_finds_no_difference(tt: Tt, inventory: bytes) -> None:
    assert statistics(tt(*SYNC, stdin=inventory)[0]) == {"lines": 10_000, "scope": 10_000, "unchanged": 10_000}


def test_the_tape_library_of_the_examples_fits_the_inventory_but_for_two_tapes(tt: Tt, inventory: bytes) -> None:
    assert inventory
    words = ("reconcile", "--repository", "US01.LTO.LIB", "--mtx", str(EXAMPLES / "mtx-status.txt"))
    out, _ = tt(*words, code=output.FAILED)
    assert out.startswith("surplus A04711\ndeficit A09980\n35 correct, 1 surplus, 1 deficit\ncertificate US01.LTO.LIB ")


def test_10000_volumes_and_100_updates_are_small_on_the_wire(server: Process, inventory: bytes) -> None:
    assert inventory
    with Relay(server.port) as relay, client_of(server, relay.port) as client:
        client.login("tapemaster", PASSWORD)
        volumes = list(client.volumes(scope="US01.LTO"))
        assert len(volumes) == 10_000
        assert relay.down < MAX_LIST_BYTES, relay.down
        before = relay.up + relay.down
        updates = [
            ("volume.update", UpdateVolume(volume.name, f"{volume.description}, checked {number * 7919 % 10_000}"))
            for number, volume in enumerate(volumes[::100])
        ]
        results = client.pack(updates)
        assert {type(result) for result in results} == {Written}
        assert relay.up + relay.down - before < MAX_UPDATES_BYTES, relay.up + relay.down - before


class Relay:
    """Passes one connection on to a port of HOST, and counts its bytes; use it in a `with` statement."""

    def __init__(self, port: int) -> None:
        self._listener = socket.create_server((HOST, 0))
        self.port = self._listener.getsockname()[1]
        self._to = port
        self.up = self.down = 0
        self._threads: list[threading.Thread] = []

    def _serve(self) -> None:
        peer, _ = self._listener.accept()
        server = socket.create_connection((HOST, self._to))
        back = threading.Thread(target=self._pass, args=(server, peer, "down"))
        back.start()
        self._pass(peer, server, "up")
        back.join()
        peer.close()
        server.close()

    def _pass(self, source: socket.socket, to: socket.socket, way: str) -> None:
        while data := source.recv(65536):
            setattr(self, way, getattr(self, way) + len(data))
            to.sendall(data)
        to.shutdown(socket.SHUT_WR)

    def __enter__(self) -> "Relay":
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.join(PATIENCE)
        self._listener.close()
        assert not self._thread.is_alive()
