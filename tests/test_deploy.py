"""The units of the service: they verify, they expose little, and the server works under all that they take away."""

import os
import pwd
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from activation import Manager
from harness import HOST, until
from process import SERVER, TT, Process, need, plain_environment
from test_privileges import place

__all__ = ["place"]  # a fixture, found by its name: a folder that every user can enter

ROOT = Path(__file__).parents[1]
CONFINE = str(ROOT / "tests/confine.py")
MAP = "/sys/fs/bpf/tapetrack_block_map"
# A tenth of what systemd-analyze prints: "OK" ends at 4.9.  A service that changes nothing has 9.6.
MOST_EXPOSED = {"tapetrack.service": 15, "with block-map.conf": 20}


def make(target: str, prefix: Path) -> None:
    done = subprocess.run(["make", target, f"PREFIX={prefix}"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, ""), done


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """The prefix with the units, and a server at the place that they name."""
    make("install-units", tmp_path / "prefix")
    (tmp_path / "prefix/bin").mkdir()
    (tmp_path / "prefix/bin/TapeTrackServer").symlink_to(SERVER)
    return tmp_path / "prefix"


def units(prefix: Path) -> Path:
    return prefix / "lib/systemd/system"


def drop_in(prefix: Path) -> Path:
    """The drop-in for a map, where an operator puts it."""
    folder = units(prefix) / "tapetrack.service.d"
    folder.mkdir()
    return Path(shutil.copy(ROOT / "deploy/block-map.conf", folder))


def analyze(*arguments: str, path: Path) -> subprocess.CompletedProcess[str]:
    need("systemd-analyze")
    return subprocess.run(
        ["systemd-analyze", "--no-pager", *arguments],
        env=plain_environment() | {"SYSTEMD_UNIT_PATH": f"{path}:"},
        capture_output=True,
        text=True,
        check=False,
    )


# ---- what is installed ----------------------------------------------------------------------------------------------


def test_the_installed_units_have_their_paths_in_and_verify(installed: Path) -> None:
    service = (units(installed) / "tapetrack.service").read_text("ascii")
    assert f"ExecStart={installed}/bin/TapeTrackServer --config {installed}/etc/tapetrack.toml --data %S/" in service
    assert re.search(r"@[A-Z]+@", service) is None
    for with_drop_in in (False, True):
        if with_drop_in:
            drop_in(installed)
        done = analyze(
            "verify", "--man=no", *map(str, units(installed).glob("tapetrack.s*[et]")), path=units(installed)
        )
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("case", MOST_EXPOSED)
def test_the_service_is_exposed_to_little(installed: Path, case: str) -> None:
    if case != "tapetrack.service":
        drop_in(installed)
    security = ["security", "--offline=true", f"--threshold={MOST_EXPOSED[case]}"]
    done = analyze(*security, str(units(installed) / "tapetrack.service"), path=units(installed))
    assert done.returncode == 0, done.stdout


def test_the_user_of_the_unit_is_made(installed: Path, tmp_path: Path) -> None:
    need("systemd-sysusers", root=True)
    (tmp_path / "host/etc").mkdir(parents=True)
    subprocess.run(
        ["systemd-sysusers", f"--root={tmp_path}/host", str(installed / "lib/sysusers.d/tapetrack.conf")],
        env=plain_environment(), capture_output=True, check=True,
    )  # fmt: skip
    service = (units(installed) / "tapetrack.service").read_text("ascii")
    for file, name in (("passwd", "User"), ("group", "Group")):
        assert f"\n{name}=tapetrack\n" in service
        assert re.search(r"^tapetrack:", (tmp_path / "host/etc" / file).read_text(), re.M)


def test_the_options_of_the_service_have_no_error(installed: Path) -> None:
    done = subprocess.run(
        [TT, "config", "check", str(installed / "etc/tapetrack.toml")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done


def test_options_that_the_operator_changed_survive_install_and_uninstall(installed: Path) -> None:
    options = installed / "etc/tapetrack.toml"
    options.write_text("timeout = 5\n")
    make("install-units", installed)
    make("uninstall", installed)
    assert options.read_text() == "timeout = 5\n"
    assert list(installed.rglob("*tapetrack*")) == [options]


def test_options_that_nobody_changed_go(installed: Path) -> None:
    make("uninstall", installed)
    assert list(installed.rglob("*tapetrack*")) == []


# ---- under what the unit takes away ---------------------------------------------------------------------------------


def confined(unit: Path, place: Path, *more: Path, caps: str = "-all", uid: int = 0, setup: str = "") -> list[str]:
    """What a server is started by, to have `place` alone to write to, no other capabilities, and the units' filters.

    ProtectSystem=strict, ProtectKernelTunables= and ProcSubset=pid are these mounts.
    """
    proc = "" if more else "mount -t proc -o subset=pid,hidepid=invisible proc /proc"
    mounts = f"mount --bind {place} {place}; {setup}{proc}"
    read_only = "for at in /sys /; do mount -o remount,bind,ro $at; done"
    files = [str(unit), *map(str, more)]
    return [
        "unshare", "--mount", "sh", "-ec", f'{mounts}\n{read_only}\nexec "$@"', "sh",
        "setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups", f"--bounding-set={caps}",
        f"--inh-caps={caps}", f"--ambient-caps={caps}",
        sys.executable, CONFINE, *files, "--",
    ]  # fmt: skip


@pytest.fixture
def lab() -> None:
    need("unshare", "setpriv", "systemd-analyze", root=True)
    if "asan" in os.environ.get("LD_PRELOAD", ""):
        pytest.skip("the address sanitizer needs what the unit forbids")


def told(server: Process, *command: str) -> str:
    """What a command of ours prints, which must succeed."""
    done = subprocess.run([TT, *command], env=server.environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (done, server.log)
    return done.stdout


@pytest.mark.usefixtures("lab")
def test_the_server_does_all_its_work_under_what_the_unit_takes_away(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "pw").write_text("correct horse battery\n")
    file = tmp_path / "tt.toml"
    file.write_text('exempt = ["gateways"]\n')
    wrap = confined(units(installed) / "tapetrack.service", tmp_path)
    with Manager(tmp_path, [socket.create_server((HOST, 0))], watchdog=30) as manager:
        for turn in range(2):
            started = manager.start()
            started["wrap"] = (*wrap, *started["wrap"])
            with Process(tmp_path, "-c", str(file), "--control-group", "0", **started) as server:
                status = Path(f"/proc/{server.pid}/status").read_text()
                assert re.findall(r"^(Cap(?:Eff|Prm|Bnd|Amb)|NoNewPrivs|Seccomp):\s+0*(\w)$", status, re.M) == [
                    ("CapPrm", "0"), ("CapEff", "0"), ("CapBnd", "0"), ("CapAmb", "0"),
                    ("NoNewPrivs", "1"), ("Seccomp", "2"),
                ]  # fmt: skip
                assert server.ping(count=3).returncode == 0
                if turn:
                    server.await_line("time-outs restored running=1")
                else:
                    server.time_out("127.0.0.9")
                    first_password = f"tapemaster:{tmp_path}/data/first-password@{HOST}:{server.port}"
                    told(server, "user", "password", "-S", first_password, "--new", str(tmp_path / "pw"))
                assert server.drops("127.0.0.9")
                told(server, "status", "--data", str(tmp_path / "data"))
                server.send(signal.SIGHUP)
                server.await_line("configuration reloaded")
                until("READY again", lambda turn=turn: len(manager.heard_with("READY")) == 2 * turn + 2)
                assert server.find(" error ") is None, server.log


@pytest.mark.usefixtures("lab")
def test_with_the_drop_in_an_ordinary_user_has_the_map_and_the_filter_and_keeps_no_capability(
    installed: Path, place: Path
) -> None:
    need("bpftool")
    nobody = pwd.getpwnam("nobody").pw_uid
    os.chown(place, nobody, nobody)
    caps = ",".join(["-all", *(f"+{name[4:].lower()}" for name in ambient(ROOT / "deploy/block-map.conf"))])
    setup = (
        "mount -t bpf -o mode=0700 none /sys/fs/bpf; "
        f"bpftool map create {MAP} type hash key 4 value 4 entries 16 name tapetrack_block_map\n"
        "mount -o remount,bind,ro /sys/fs/bpf; "
    )
    unit, more = units(installed) / "tapetrack.service", drop_in(installed)
    # This user may be shut out from the Python of the tests; what he then lacks is not what the unit takes away.
    with Manager(place, [socket.create_server((HOST, 0))]) as manager:
        os.chown(place / "notify", nobody, nobody)
        started = manager.start()
        started["wrap"] = (*confined(unit, place, more, caps=caps, uid=nobody, setup=setup), *started["wrap"])
        with Process(place, "-B", MAP, "--user", "nobody", **started) as server:
            server.await_line(rf"kernel map map={MAP} adopted=0 ")
            server.await_line("running as user=nobody .*capabilities=none")
            server.time_out("127.0.0.9")
            assert "attached, " in told(server, "status", "--data", str(place / "data"))
            assert server.ping().returncode == 0


def ambient(unit: Path) -> list[str]:
    (line,) = re.findall(r"^AmbientCapabilities=(.+)$", unit.read_text("ascii"), re.M)
    return line.split()
