"""Another key for a server whose clients have the old one: for as long as it is left there, both are let in."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from harness import HOST
from process import TT, Process, refused

from tt import keys


def public_key(server: Process) -> str:
    return (server.place / "data/server.pub").read_text().strip()


def pings(server: Process, key: str) -> bool:
    """Whether somebody who has that key is answered."""
    command = [TT, "ping", "-c", "1", "--key", key, "--source", "127.0.0.9", f"{HOST}:{server.port}"]
    return subprocess.run(command, env=server.environ, capture_output=True, timeout=60, check=False).returncode == 0


def status(server: Process, *options: str) -> str:
    command = [TT, "status", "--data", str(server.place / "data"), *options]
    return subprocess.run(command, env=server.environ, capture_output=True, text=True, timeout=60, check=True).stdout


def test_clients_with_either_key_are_served_and_counted_until_the_old_one_is_removed(tmp_path: Path) -> None:
    data = tmp_path / "data"
    with Process(tmp_path) as server:
        old = public_key(server)
        assert pings(server, old)
        assert json.loads(status(server, "--json"))["old_key_handshakes"] is None
        assert "old key" not in status(server)
    (data / "server.key").rename(data / "server.key.old")
    with Process(tmp_path) as server:
        new = public_key(server)
        assert new != old
        line = server.await_line(r" info old key in force, too key=(\S+) remedy=\"remove (\S+) and restart, when all")
        assert (line[1], line[2]) == (old, str(data / "server.key.old"))
        assert pings(server, new)
        assert json.loads(status(server, "--json"))["old_key_handshakes"] == 0
        assert pings(server, old)
        assert "\nold key      handshakes 1\n" in status(server)
        assert not server.find("timed out")
    (data / "server.key.old").unlink()
    with Process(tmp_path) as server:
        assert not pings(server, old)
        assert "reason=bad_hello" in server.await_timed_out("127.0.0.9")


def test_a_key_that_was_copied_and_not_moved_is_said_and_is_one_key(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    keys.create_or_load(tmp_path / "data")
    shutil.copy2(tmp_path / "data/server.key", tmp_path / "data/server.key.old")
    with Process(tmp_path) as server:
        server.await_line(r" warning old key is the key in force .*move server\.key there instead of copying it")
        assert json.loads(status(server, "--json"))["old_key_handshakes"] is None


@pytest.mark.parametrize("content", [b"", b"tt1-something\n"])
def test_an_old_key_that_is_none_ends_the_start_with_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "data").mkdir()
    keys.create_or_load(tmp_path / "data")
    old = tmp_path / "data/server.key.old"
    old.touch(0o600)
    old.write_bytes(content)
    line = refused(tmp_path, "--listen", f"{HOST}:0", "--data", str(tmp_path / "data"))
    assert f"{old} is damaged or is no private key without a passphrase in PEM form" in line
    assert "move it away: who has the old key alone is not let in then" in line
