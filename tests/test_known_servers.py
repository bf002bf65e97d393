"""tt.known_servers: the file of trusted servers."""

import multiprocessing
import os
from pathlib import Path

import pytest

from tt import known_servers
from tt.keys import to_text
from tt.known_servers import KnownServer, KnownServersError

A, B, C = (bytes([n]) * 32 for n in (1, 2, 3))


@pytest.fixture(autouse=True)
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    return tmp_path / "tt" / "known_servers"


def write(file: Path, text: str) -> None:
    file.parent.mkdir(exist_ok=True)
    file.write_text(text)


def test_no_file_knows_nobody() -> None:
    assert known_servers.entries() == []
    assert known_servers.lookup("localhost", 5000) == []
    assert not known_servers.remove("localhost", 5000)


def test_what_is_added_is_found_listed_and_removed(file: Path) -> None:
    assert known_servers.add("Tapes.Example.ORG", 5000, A)
    assert known_servers.add("::1", 5001, B)
    assert file.read_text() == f"tapes.example.org:5000 {to_text(A)}\n[::1]:5001 {to_text(B)}\n"
    assert file.stat().st_mode & 0o777 == 0o600
    assert file.parent.stat().st_mode & 0o777 == 0o700
    assert known_servers.lookup("tapes.example.org", 5000) == [A]
    assert known_servers.lookup("TAPES.example.org", 5000) == [A]
    assert known_servers.lookup("0:0::1", 5001) == [B]
    assert known_servers.lookup("tapes.example.org", 5001) == []
    assert known_servers.entries() == [KnownServer("tapes.example.org", 5000, (A,)), KnownServer("::1", 5001, (B,))]
    assert known_servers.remove("tapes.EXAMPLE.org", 5000)
    assert known_servers.entries() == [KnownServer("::1", 5001, (B,))]


def test_a_key_change_keeps_two_keys_the_newest_first(file: Path) -> None:
    assert known_servers.add("host", 1, A)
    assert not known_servers.add("host", 1, A)
    assert known_servers.add("host", 1, B)
    assert known_servers.lookup("host", 1) == [B, A]
    assert known_servers.add("host", 1, A)  # back again: it is the newest now
    assert known_servers.lookup("host", 1) == [A, B]
    assert known_servers.add("host", 1, C)
    assert known_servers.lookup("host", 1) == [C, A]
    assert len(file.read_text().splitlines()) == 1


def test_comments_and_other_lines_survive_every_change(file: Path) -> None:
    comment = b"# caf\xe9 \x0c \xe2\x80\xa8 keep\n"
    file.parent.mkdir()
    file.write_bytes(comment + b"\n" + f"host:1 {to_text(A)} # rack 3\r\nother:2  {to_text(B)}\n".encode())
    file.chmod(0o644)
    known_servers.add("host", 1, C)
    known_servers.add("third", 3, A)
    known_servers.remove("other", 2)
    expected = f"host:1 {to_text(C)} {to_text(A)}  # rack 3\r\nthird:3 {to_text(A)}\n".encode()
    assert file.read_bytes() == comment + b"\n" + expected
    assert file.stat().st_mode & 0o777 == 0o644


def test_a_last_line_without_an_end_is_not_glued_to_the_next(file: Path) -> None:
    write(file, f"host:1 {to_text(A)}")
    known_servers.add("other", 2, B)
    assert [server.host for server in known_servers.entries()] == ["host", "other"]


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("host:1", "1 to 2 keys, not 0"),
        (f"host:1 {to_text(A)} {to_text(B)} {to_text(C)}", "1 to 2 keys, not 3"),
        (f"host {to_text(A)}", "no port"),
        (f"host:0 {to_text(A)}", "'0' is no port"),
        (f"host:65536 {to_text(A)}", "'65536' is no port"),
        (f"::1:5000x {to_text(A)}", "no host"),
        (f"host:1 {to_text(A)[:-1]}x", "typing error"),
        (f"fine:1 {to_text(B)}", "stands in line 2 already"),
        ("\x00\x01\x02", "no host"),
    ],
)
def test_a_damaged_line_is_an_error_that_names_it(file: Path, line: str, fault: str) -> None:
    text = f"# mine\nfine:1 {to_text(A)}\n{line}\n"
    write(file, text)
    for use in (
        known_servers.entries,
        lambda: known_servers.lookup("fine", 1),
        lambda: known_servers.add("fine", 1, B),
        lambda: known_servers.remove("fine", 1),
    ):
        with pytest.raises(KnownServersError, match=fault) as error:
            use()
        assert f"{file}, line 3: " in str(error.value)
        assert "\n" not in str(error.value)
    assert file.read_text() == text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("localhost", ("localhost", None)),
        ("LOCALHOST:5000", ("localhost", 5000)),
        ("127.0.0.1:1", ("127.0.0.1", 1)),
        ("::1", ("::1", None)),
        ("2001:DB8::0:1", ("2001:db8::1", None)),
        ("[::1]", ("::1", None)),
        ("[::1]:65535", ("::1", 65535)),
        ("[fe80::1%eth0]:5000", ("fe80::1%eth0", 5000)),
    ],
)
def test_addresses_are_split(text: str, expected: tuple[str, int | None]) -> None:
    assert known_servers.parse_address(text) == expected


@pytest.mark.parametrize(
    "text",
    ["", ":", ":5000", "host:", "host:x", "host:+1", "host:٣", "host:0", "host:65536", "host:999999", "a b", "a#b",
     "[::1", "[::1]x", "[::1]:", "[]:1", "[host]:1", "[a:b]:1", "a:b:c", "a/b", "a\nb", "a" * 254, "host:1\n"],
)  # fmt: skip
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"is no (host|port): "):
        known_servers.parse_address(text)


def test_the_file_is_where_the_xdg_specification_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for ignored in ("", "relative/path"):
        monkeypatch.setenv("XDG_CONFIG_HOME", ignored)
        assert known_servers.path() == tmp_path / "home" / ".config" / "tt" / "known_servers"
    monkeypatch.delenv("XDG_CONFIG_HOME")
    assert known_servers.path() == tmp_path / "home" / ".config" / "tt" / "known_servers"


def test_a_link_into_a_dotfiles_directory_stays_a_link(file: Path, tmp_path: Path) -> None:
    file.parent.mkdir()
    target = tmp_path / "dotfiles"
    target.write_text("# mine\n")
    file.symlink_to(target)
    known_servers.add("host", 1, A)
    assert file.is_symlink()
    assert target.read_text() == f"# mine\nhost:1 {to_text(A)}\n"


def test_a_file_or_directory_that_cannot_be_used_is_named(file: Path) -> None:
    file.mkdir(parents=True)
    with pytest.raises(KnownServersError, match="cannot read"):
        known_servers.entries()
    file.rmdir()
    file.parent.rmdir()
    file.parent.write_text("a file in place of the directory")
    with pytest.raises(KnownServersError, match="cannot write"):
        known_servers.add("host", 1, A)


def _add_many(first: int) -> None:
    for number in range(first, first + 20):
        known_servers.add(f"host{number}", 5000, A)


def test_no_entry_is_lost_when_many_add_at_once(file: Path) -> None:
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_add_many, args=(100 * n,)) for n in range(1, 5)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert all(process.exitcode == 0 for process in processes)
    assert len(known_servers.entries()) == 80
    assert sorted(os.listdir(file.parent)) == ["known_servers", "known_servers.lock"]
