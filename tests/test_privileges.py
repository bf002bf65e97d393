"""`--user`: what is handed over, what is dropped, and that the server then still does all of its work.

The server is run as root runs it, in a network namespace and with a BPF file system of the test's own; what it became
is read from /proc.  The trial of the maps, and old kernels, are tested in child processes, which cannot come back.
"""

import errno
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
from harness import until
from process import TT, Process, need, refused
from test_bpf import CAP_BPF

from tt import bpf_load, log, privileges
from tt.privileges import PrivilegesError, User

CLONE_NEWNS = 0x20000
NOBODY = pwd.getpwnam("nobody")
USER = User("nobody", NOBODY.pw_uid, NOBODY.pw_gid, (NOBODY.pw_gid,))
SET_UP = "mount --make-rprivate /; mount -t bpf bpf /sys/fs/bpf; {}"
MAKE = "bpftool map create /sys/fs/bpf/m type hash key 4 value 4 entries 16 name m"


@pytest.fixture(autouse=True)
def _root() -> None:
    need("mount", "bpftool", "ip", root=True)


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder that every user can enter; the tests' own is root's alone."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


def status(process: Process) -> dict[str, list[str]]:
    """What /proc says of every thread; they must be alike."""
    fields = ("Uid", "Gid", "Groups", "CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb", "NoNewPrivs")
    found = []
    for path in Path(f"/proc/{process.pid}/task").glob("*/status"):
        with suppress(FileNotFoundError, ProcessLookupError):  # a thread that saved, and has ended meanwhile
            rows = dict(line.split(":", 1) for line in path.read_text().splitlines())
            found.append({name: rows[name].split() for name in fields})
    assert all(one == found[0] for one in found)
    return found[0]


def is_without_rights(process: Process) -> bool:
    now = status(process)
    caps = {word for name in now if name.startswith("Cap") for word in now[name]}
    ids = (now["Uid"], now["Gid"], now["Groups"])
    wanted = ([str(USER.uid)] * 4, [str(USER.gid)] * 4, [str(USER.gid)])
    return ids == wanted and caps == {"0" * 16} and now["NoNewPrivs"] == ["1"]


# ---- the server ------------------------------------------------------------------------------------------------------


def test_as_another_user_it_serves_times_out_saves_and_reloads(place: Path) -> None:
    wrap = ("unshare", "--mount", "--net", "sh", "-ec", f'{SET_UP.format(MAKE)}; ip link set lo up; exec "$@"', "sh")
    settings = place / "tt.toml"
    settings.write_text("save_interval = 1\n")
    with Process(place, "-c", str(settings), "-B", "/sys/fs/bpf/m", "--user", "nobody", wrap=wrap) as server:
        assert is_without_rights(server)
        assert Path("/proc/sys/kernel/unprivileged_bpf_disabled").read_text().strip() in ("1", "2")
        server.await_line("running as user=nobody uid=65534 capabilities=none")
        assert '"filter"' in server.inside(TT, "status", "--json", "--data", str(place / "data"))
        server.inside("python3", "-c", SCAN.format(port=server.port))
        server.await_timed_out("127.0.0.9")
        entries = server.inside(TT, "bans", "list", "--data", str(place / "data"))
        assert [line.split()[6] for line in entries.splitlines()[1:]] == ["yes"]
        until("the save", (place / "data/timeouts").exists)
        settings.write_text("save_interval = 1\ntimeout = 5\n")
        server.send(signal.SIGHUP)
        server.await_line("configuration reloaded")
        assert not server.find("kernel map not updated")
        assert is_without_rights(server), "also the thread that saves"
    for name in ("", "server.key", "server.pub", "timeouts"):
        owner = (place / "data" / name).stat()
        assert (owner.st_uid, owner.st_gid) == (USER.uid, USER.gid), name
    assert (place / "data/server.key").stat().st_mode & 0o777 == 0o600
    assert (place / "config/tt/known_servers").stat().st_uid == 0, "it is entered for who started it"


SCAN = """
import socket
peer = socket.socket(); peer.settimeout(10); peer.bind(("127.0.0.9", 0)); peer.connect(("127.0.0.1", {port}))
peer.sendall(b"GET / HTTP/1.1\\r\\n\\r\\n")
try: peer.recv(1)
except ConnectionResetError: pass
"""


def test_what_root_made_before_is_handed_over_and_who_pings_sees_the_same_key(place: Path) -> None:
    with Process(place) as server:
        server.await_line("running as root.*--user NAME")
        key = (place / "data/server.pub").read_text()
        server.time_out("127.0.0.9")
        command = [TT, "exempt", "add", "10.0.0.0/8", "--data", str(place / "data")]
        subprocess.run(command, env=server.environ, check=True)
    shutil.copy2(place / "data/server.key", place / "data/server.key.old")
    names = {"server.key", "server.key.old", "server.pub", "timeouts", "ban-history", "exempt", "first-password"}
    assert names <= set(os.listdir(place / "data"))
    with Process(place, "--user", str(USER.uid)) as server:
        assert is_without_rights(server)
        assert server.ping().returncode == 0
        assert server.drops("127.0.0.9")
    assert (place / "data/server.pub").read_text() == key
    assert {path.stat().st_uid for path in place.glob("data/*")} == {USER.uid}
    with Process(place, "--user", "nobody") as server:
        assert is_without_rights(server), "and the next start finds a directory that is the user's already"


def test_an_unreadable_configuration_is_said_at_the_start_and_a_reload_keeps_the_running_one(place: Path) -> None:
    settings = place / "tt.toml"
    settings.write_text("timeout = 5\n")
    settings.chmod(0o600)
    with Process(place, "-c", str(settings), "--user", "nobody") as server:
        server.await_line("a SIGHUP cannot read the configuration again")
        server.send(signal.SIGHUP)
        server.await_line("configuration not reloaded, the running one stays")
        assert server.ping().returncode == 0


@pytest.mark.parametrize(
    ("user", "text"),
    [("nobodyatall", "there is no such user"), ("root", "that is root"), ("0", "that is root"),
     (str(2**32 - 1), "there is no such user"), ("-1", "there is no such user"), ("no body", "there is no such user")],
)  # fmt: skip
def test_a_user_that_cannot_be_is_one_line_and_nothing_is_made(place: Path, user: str, text: str) -> None:
    assert text in refused(place, f"--user={user}", "--data", str(place / "data"))


def test_who_is_not_root_can_only_stay_who_he_is(place: Path) -> None:
    wrap = ("setpriv", f"--reuid={USER.uid}", "--clear-groups", "--")
    assert "only root can become another user" in refused(place, "--user", "daemon", wrap=wrap)
    place.chmod(0o777)
    with Process(place, "--user", "nobody", wrap=wrap) as server:
        assert status(server)["CapBnd"] != ["0" * 16], "what the bounding set holds is withheld by no_new_privs"
        assert status(server)["NoNewPrivs"] == ["1"]
        assert server.ping().returncode == 0


def test_a_directory_that_the_user_cannot_enter_is_named(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    data = tmp_path / "data"
    data.mkdir()
    done = subprocess.run(
        [Path(TT).with_name("TapeTrackServer"), "--user", "nobody", "--data", data, "--listen", "127.0.0.1:0"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert f"data directory {data}: not writable" in done.stderr


# ---- handing over ----------------------------------------------------------------------------------------------------


def test_a_directory_of_roots_that_is_no_data_directory_is_not_handed_over(place: Path) -> None:
    (place / "etc").mkdir(mode=0o755)
    (place / "etc/passwd").touch()
    text = refused(place, "--user", "nobody", "--listen", "127.0.0.1:0", "--data", str(place / "etc"))
    assert "it holds something else" in text
    assert (place / "etc").stat().st_uid == 0


def test_a_link_that_the_user_put_into_his_directory_changes_no_other_file(place: Path) -> None:
    data, victim = place / "data", place / "victim"
    data.mkdir(mode=0o700)
    os.chown(data, USER.uid, USER.gid)
    victim.touch(mode=0o600)
    (data / "server.key").symlink_to(victim)
    (data / "timeouts").hardlink_to(victim)
    privileges.hand_over(data, USER)
    assert victim.stat().st_uid == 0


def test_where_others_can_write_nothing_is_handed_over(place: Path) -> None:
    data = place / "data"
    data.mkdir()
    data.chmod(0o777)
    with pytest.raises(PrivilegesError, match="others can write there"):
        privileges.hand_over(data, USER)
    assert data.stat().st_uid == 0


def test_acting_as_the_user_ends_also_after_an_error(place: Path) -> None:
    before = os.getgroups(), os.getegid(), os.geteuid()

    def fail() -> None:
        with privileges.acting_as(USER):
            assert (os.getgroups(), os.getegid(), os.geteuid()) == ([USER.gid], USER.gid, USER.uid)
            with pytest.raises(PermissionError):
                (place / "x").touch()
            raise ValueError

    with pytest.raises(ValueError):  # noqa: PT011
        fail()
    assert (os.getgroups(), os.getegid(), os.geteuid()) == before


# ---- the trial -------------------------------------------------------------------------------------------------------


def in_child(run: Callable[[], Any]) -> None:
    """Run this in a process of its own, since there is no way back."""
    if (pid := os.fork()) == 0:
        code = 1
        try:
            run()
            code = 0
        except BaseException as error:  # noqa: BLE001
            os.write(2, repr(error).encode())
        finally:
            os._exit(code)
    assert os.waitpid(pid, 0)[1] == 0


@pytest.mark.parametrize(("kind", "key"), [("hash", 4), ("hash", 16), ("lpm_trie", 8), ("lpm_trie", 20)])
def test_after_the_drop_an_open_map_is_changed_and_no_other_is_had(kind: str, key: int) -> None:
    one = bpf_load.create_map(kind, (key, 4), 16, "tt_test")

    def run() -> None:
        privileges.drop(USER, [one])
        assert privileges._permitted() == set()
        one.update(bytes(key), bytes(4))
        with pytest.raises(PermissionError):
            bpf_load.create_map("hash", (4, 4), 16, "tt_test")
        with pytest.raises(PermissionError):
            os.setuid(0)

    in_child(run)
    assert one.entries() == [(bytes(key), bytes(4))]
    one.close()


def test_the_trial_leaves_a_map_as_it_was() -> None:
    one = bpf_load.create_map("hash", (4, 4), 2, "tt_test")
    assert privileges.may_change(one)
    assert one.entries() == []
    one.update(ip_address("0.0.0.0").packed, b"\7\0\0\0")
    assert privileges.may_change(one)
    assert one.entries() == [(bytes(4), b"\7\0\0\0")]
    one.delete(bytes(4))
    for number in (1, 2):
        one.update(bytes([number] * 4), bytes(4))
    assert privileges.may_change(one), "a full map says so to who may change it"
    bpf_load.freeze_map(one)
    assert not privileges.may_change(one)
    one.close()


class OldKernel:
    """A map of a kernel before 5.19: whoever changes it needs CAP_BPF."""

    kind, key_size, value_size = "hash", 4, 4

    def lookup(self, _key: bytes) -> bytes | None:
        if f"{1 << CAP_BPF:016x}" not in Path("/proc/self/status").read_text().partition("CapEff:")[2][:20]:
            raise OSError(errno.EPERM, "not permitted")
        return None

    def update(self, key: bytes, _value: bytes) -> None:
        self.lookup(key)

    def delete(self, key: bytes) -> bool:
        return self.lookup(key) is None


def test_where_the_kernel_asks_for_it_cap_bpf_is_kept_alone_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(log, "event", lambda _level, words, **fields: said.append(f"{words} {fields}"))

    def run() -> None:
        privileges.drop(USER, [OldKernel()])  # type: ignore[list-item]
        assert privileges._permitted() == {CAP_BPF}
        assert said[0].startswith("CAP_BPF is kept")
        assert "'capabilities': 'CAP_BPF'" in said[-1]

    in_child(run)


def test_a_map_that_nobody_can_change_keeps_no_capability() -> None:
    one = bpf_load.create_map("hash", (4, 4), 2, "tt_test")
    bpf_load.freeze_map(one)

    def run() -> None:
        privileges.drop(USER, [one])
        assert privileges._permitted() == set()

    in_child(run)
    one.close()
