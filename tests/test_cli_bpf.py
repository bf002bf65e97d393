"""`tt bpf`: what it makes, says and leaves, and what it answers when the kernel, or another program, is in the way."""

import errno
import fcntl
import json
import os
import socket
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import pytest
from harness import until
from process import need
from test_bpf import capabilities
from veth import Pair, pair, sh

from tt import block_maps, bpf, bpf_load, cli, xdp
from tt.bpf import Map
from tt.cli import output

FOLDER = Path("/sys/fs/bpf")
MAP, MAP6 = block_maps.DEFAULTS
MADE = f"tt: made {MAP}\ntt: made {MAP6}\n"
NATIVE, GENERIC = 1 << 2, 1 << 1
LONG_AGO = b"\1\0\0\0"  # a second after the boot


class Done(NamedTuple):
    code: int
    out: str
    err: str


Run = Callable[..., Done]


@pytest.fixture(autouse=True)
def net() -> Iterator[Pair]:
    need("ip", "mount", root=True)
    with pair() as both:
        yield both


@pytest.fixture
def tt(capsys: pytest.CaptureFixture[str]) -> Run:
    def run(*arguments: str | Path) -> Done:
        code = cli.main(["bpf", *map(str, arguments)])
        return Done(code, *capsys.readouterr())

    return run


def refused(done: Done, code: int, *texts: str) -> None:
    """One line that holds all these texts."""
    assert done.code == code
    assert done.out == ""
    assert done.err.startswith("tt: ")
    assert done.err.count("\n") == 1
    for text in texts:
        assert text in done.err


def pins() -> list[str]:
    return sorted(name for name in os.listdir(FOLDER) if not name.endswith(".debug"))


def foreign(interface: str, mode: int) -> int:
    """Somebody else's XDP program, on its link's descriptor."""
    code = struct.pack("<BBhiBBhi", 0xB7, 0, 0, 2, 0x95, 0, 0, 0)  # XDP_PASS
    program = bpf_load._load_instructions(xdp.KINDS["generic"], code)
    try:
        attr = struct.pack("=4I", program, socket.if_nametoindex(interface), xdp.BPF_XDP, mode)
        return bpf.call(xdp.LINK_CREATE, attr, {})
    finally:
        os.close(program)


# ---- load ------------------------------------------------------------------------------------------------------------


def test_load_makes_both_maps_attaches_and_says_the_mode(tt: Run) -> None:
    assert tt("load", "--dev", "vs") == Done(output.OK, "", f"{MADE}tt: vs: attached, mode native\n")
    assert pins() == [MAP.name, MAP6.name, "tapetrack_xdp_vs"]
    with block_maps.opened(block_maps.DEFAULTS) as maps:
        forms = [(one.map.kind, one.map.key_size, one.map.value_size, one.map.max_entries) for one in maps]
    assert forms == [("hash", 4, 4, 65536), ("hash", 16, 4, 65536)]


def test_load_twice_changes_nothing(tt: Run) -> None:
    tt("load", "--dev", "vs")
    before, links = pins(), xdp.pinned()
    assert tt("load", "--dev", "vs", "--dev", "vs") == Done(output.OK, "", "tt: vs: already attached, mode native\n")
    assert (pins(), xdp.pinned()) == (before, links)


def test_auto_falls_back_to_generic_and_says_so_and_why(tt: Run) -> None:
    done = tt("load", "--dev", "lo")
    assert done.err == f"{MADE}tt: lo: attached, mode generic (not native: {xdp.REFUSED[errno.EOPNOTSUPP]})\n".format(
        "lo"
    )
    assert json.loads(tt("status", "--json").out)["interfaces"][0]["mode"] == "generic"


def test_native_where_the_driver_has_none_is_refused_and_leaves_nothing(tt: Run) -> None:
    refused(tt("load", "--dev", "lo", "--mode", "native"), output.FAILED, "lo: its driver has no native XDP")
    assert pins() == []


def test_an_mtu_that_the_driver_refuses_is_named_and_auto_goes_on_generic(
    tt: Run, net: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(xdp.KINDS, "native", xdp.KINDS["native"]._replace(flags=0))  # as before Linux 5.18
    sh("ip link set vs mtu 9000")
    with net.in_client():
        sh("ip link set vc mtu 9000")
    refused(
        tt("load", "--dev", "vs", "--mode", "native"), output.FAILED, "native XDP at this MTU", "mtu 1500", "generic"
    )
    assert "mode generic (not native: vs: the driver refuses native XDP at this MTU" in tt("load", "--dev", "vs").err


@pytest.mark.parametrize("mode", ["auto", "native", "generic"])
def test_another_program_on_the_interface_is_left_alone(tt: Run, mode: str) -> None:
    link = foreign("vs", GENERIC if mode == "generic" else NATIVE)
    before = xdp.attached(socket.if_nametoindex("vs"))
    refused(tt("load", "--dev", "vs", "--mode", mode), output.FAILED, "vs has another XDP program", "listener filter")
    assert xdp.attached(socket.if_nametoindex("vs")) == before
    assert pins() == []
    os.close(link)


def test_a_program_in_the_other_mode_is_named(tt: Run) -> None:
    link = foreign("vs", GENERIC)
    refused(tt("load", "--dev", "vs", "--mode", "native"), output.FAILED, "vs has an XDP program in the other mode")
    os.close(link)


def test_all_interfaces_or_none(tt: Run) -> None:
    link = foreign("lo", GENERIC)
    refused(tt("load", "--dev", "vs", "--dev", "lo"), output.FAILED, "lo has an")
    assert pins() == []
    assert xdp.attached(socket.if_nametoindex("vs")) is None
    os.close(link)
    refused(tt("load", "--dev", "vs", "--dev", "none0"), output.FAILED, "there is no interface none0")
    assert pins() == []


def test_an_interface_whose_name_has_a_dot_is_pinned_all_the_same(tt: Run) -> None:
    sh("ip link add v.1 type veth peer name v2")
    assert "tt: v.1: attached, mode native" in tt("load", "--dev", "v.1").err
    assert pins()[-1] == "tapetrack_xdp_v%2E1"
    assert tt("status").out.splitlines()[0] == "interface    v.1: native"
    assert "tt: v.1: taken off" in tt("unload").err
    assert pins() == []


def test_other_options_than_those_loaded_are_refused(tt: Run) -> None:
    tt("load", "--dev", "vs")
    for options in (["--port", "5001"], ["--all-packets"], ["--map", FOLDER / "other"]):
        refused(tt("load", "--dev", "lo", *options), output.FAILED, "loaded already, with other ports", "--keep-maps")
    assert pins() == [MAP.name, MAP6.name, "tapetrack_xdp_vs"]
    refused(tt("load", "--dev", "vs", "--mode", "generic"), output.FAILED, "vs has the program already, native")
    assert tt("unload", "--keep-maps").err == "tt: vs: taken off\n"
    assert tt("load", "--dev", "vs", "--port", "5001", "--port", "5002").code == output.OK
    assert json.loads(tt("status", "--json").out)["program"]["ports"] == [5001, 5002]


def test_maps_are_made_as_asked_and_those_that_are_there_must_be_so(tt: Run) -> None:
    path = FOLDER / "one"
    options = ("--map", path, "--entries", "16", "--value", "8")
    assert tt("load", "--dev", "vs", *options).code == output.OK
    with block_maps.opened([path]) as (one,):
        assert (one.family, one.map.max_entries, one.map.value_size) == (4, 16, 8)
    tt("unload", "--keep-maps")
    assert tt("load", "--dev", "vs", "--map", path).code == output.OK
    tt("unload", "--keep-maps")
    refused(
        tt("load", "--dev", "vs", "--map", path, "--value", "4"), output.USAGE, f"{path} has 8 bytes a value, not 4"
    )
    refused(tt("load", "--dev", "vs", "--map", path, "--entries", "32"), output.USAGE, f"{path} has 16 entries, not 32")
    three = [word for name in ("one", "two", "three") for word in ("--map", FOLDER / name)]
    refused(tt("load", "--dev", "vs", *three), output.USAGE, "a map too many")
    assert pins() == ["one"]


def test_a_map_that_is_no_map_of_sources_is_refused(tt: Run) -> None:
    other = bpf_load.create_map("array", (4, 4), 1, "other")
    bpf_load.pin_map(other, str(FOLDER / "other"))
    other.close()
    refused(
        tt("load", "--dev", "vs", "--map", FOLDER / "other"), output.USAGE, "of kind array", "a hash with keys of 4"
    )


@pytest.mark.parametrize(
    "options",
    [("--port", "0"), ("--port", "65536"), ("--port", "-1"), ("--port", "\u0665"), ("--entries", "0"), ("--value", "5"),
     ("--mode", "offload"), [word for port in range(1, 18) for word in ("--port", str(port))]],
    ids=lambda options: " ".join(options[:2]),
)  # fmt: skip
def test_an_option_out_of_range_is_one_line(tt: Run, options: tuple[str, ...]) -> None:
    refused(tt("load", "--dev", "vs", *options), output.USAGE)
    assert pins() == []


def test_without_root_it_says_what_is_missing(tt: Run) -> None:
    with capabilities():
        refused(tt("load", "--dev", "vs"), output.DENIED, "no right to make map")
    tt("load", "--dev", "vs")
    with capabilities():
        refused(tt("status"), output.DENIED, "no right to open")


def test_a_folder_that_is_no_bpf_file_system_is_named(tt: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(xdp, "FOLDER", tmp_path / "none")
    refused(tt("load", "--dev", "vs"), output.FAILED, "none: No such file or directory", "mount -t bpf bpf")
    refused(tt("load", "--dev", "vs", "--map", tmp_path / "m"), output.FAILED, "mount -t bpf bpf")


def test_one_load_waits_for_another(tt: Run) -> None:
    with xdp.lock():
        folder = os.open(FOLDER, os.O_RDONLY)
        with pytest.raises(BlockingIOError):
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # A process and no thread: the end of the test changes the mount namespace, which a process with threads cannot.
        other = subprocess.Popen([sys.executable, "-c", "from tt import xdp\nwith xdp.lock(): pass"])
        with pytest.raises(subprocess.TimeoutExpired):
            other.wait(1)
    assert other.wait(30) == 0
    os.close(folder)


# ---- an interface that goes, or is elsewhere -------------------------------------------------------------------------


def test_an_interface_that_is_gone_is_shown_and_a_new_one_of_its_name_is_attached(tt: Run) -> None:
    sh("ip link add gone type veth peer name g2")
    tt("load", "--dev", "gone")
    sh("ip link delete gone")
    assert "interface    gone: the interface is gone" in tt("status").out
    sh("ip link add gone type veth peer name g2")
    assert tt("load", "--dev", "gone").err == "tt: gone: attached, mode native\n"
    sh("ip link delete gone")
    assert "gone: taken off" in tt("unload").err
    assert pins() == []


def test_an_interface_of_the_same_name_in_another_namespace_is_not_taken_for_it(tt: Run, net: Pair) -> None:
    with net.in_client():
        sh("ip link add same type veth peer name s2")
        tt("load", "--dev", "same")
    assert "interface    same: attached, in another network namespace" in tt("status").out
    sh("ip link add same type veth peer name s2")
    refused(tt("load", "--dev", "same"), output.FAILED, "in another network namespace", "tt bpf unload --dev same")
    assert "same: taken off" in tt("unload").err


# ---- unload ----------------------------------------------------------------------------------------------------------


def test_unload_takes_all_off_and_removes_what_load_made(tt: Run) -> None:
    tt("load", "--dev", "vs", "--dev", "lo")
    done = tt("unload")
    assert done.code == output.OK
    assert done.err.startswith(f"tt: lo: taken off\ntt: vs: taken off\ntt: removed {MAP} and {MAP6}: ")
    assert pins() == []
    assert tt("unload") == Done(output.OK, "", "tt: nothing was loaded\n")


def test_unload_of_one_interface_leaves_the_others_and_the_maps(tt: Run) -> None:
    tt("load", "--dev", "vs", "--dev", "lo")
    assert tt("unload", "--dev", "lo").err == "tt: lo: taken off\n"
    assert pins() == [MAP.name, MAP6.name, "tapetrack_xdp_vs"]
    refused(tt("unload", "--dev", "lo"), output.FAILED, "not attached to lo")


def test_unload_never_removes_a_map_of_the_operators(tt: Run) -> None:
    own = bpf_load.create_map("hash", (4, 4), 16, "tapetrack_block_map")
    bpf_load.pin_map(own, str(MAP))
    own.update(bytes(4), bytes(4))
    own.close()
    tt("load", "--dev", "vs")
    tt("unload")
    assert pins() == [MAP.name]
    with block_maps.opened([MAP]) as (one,):
        assert one.map.entries() == [(bytes(4), bytes(4))]


def test_unload_does_not_forget_a_map_that_is_pinned_elsewhere(tt: Run) -> None:
    path = FOLDER / "elsewhere"
    tt("load", "--dev", "vs", "--map", path)
    refused(tt("unload"), output.USAGE, "at none of the paths given", "--map", "--keep-maps")
    assert pins() == ["elsewhere", "tapetrack_xdp_vs"]
    assert tt("unload", "--map", path).code == output.OK
    assert pins() == []


def test_a_pin_of_our_name_that_is_no_link_is_named(tt: Run) -> None:
    stray = bpf_load.create_map("hash", (4, 4), 16, "stray")
    bpf_load.pin_map(stray, str(FOLDER / "tapetrack_xdp_stray"))
    stray.close()
    for command in (["status"], ["unload"], ["load", "--dev", "vs"]):
        refused(tt(*command), output.FAILED, "tapetrack_xdp_stray is no link of BPF")


# ---- status and clean ------------------------------------------------------------------------------------------------


def fill() -> None:
    for path, size in ((MAP, 4), (MAP6, 16)):
        one = Map.open(str(path))
        for number, value in ((1, LONG_AGO), (2, bytes(4)), (3, b"\xff\xff\xff\xff"), (4, LONG_AGO)):
            one.update(bytes([32, 1, 13, number]) + bytes(size - 4), value)
        one.close()


def test_status_without_anything_says_how_to_begin(tt: Run) -> None:
    assert tt("status").out == "interface    none: tt bpf load --dev IF attaches the program\n"
    assert json.loads(tt("status", "--json").out) == {"interfaces": [], "program": None, "maps": []}


def test_status_shows_interfaces_counters_and_entries(tt: Run) -> None:
    tt("load", "--dev", "vs")
    fill()
    lines = tt("status", "--entries").out.splitlines()
    assert lines[:2] == ["interface    vs: native", "drops        SYNs to TCP port 5000"]
    assert lines[2].startswith("dropped      0 packets, 0 bytes")
    assert f"{MAP}: IPv4, hash, values of 4 bytes: 0 running, 2 ended, 2 preloaded of 65536" in lines[4]
    listed = {line.split()[0]: line.split(maxsplit=1)[1] for line in lines if line.startswith("  ")}
    assert listed["32.1.13.1"] == "ended"
    assert listed["32.1.13.2"] == "for ever"
    assert listed["2001:d03::/64"] == "for ever"
    shown = json.loads(tt("status", "--json").out)
    assert set(shown["program"]["counters"]) == set(xdp.COUNTER_NAMES)
    assert [one["read_by_program"] for one in shown["maps"]] == [True, True]
    assert "entries" not in shown["maps"][0]


def test_status_tells_a_map_that_the_program_does_not_read(tt: Run) -> None:
    tt("load", "--dev", "vs")
    MAP.unlink()
    new = bpf_load.create_map("hash", (4, 4), 16, "new")
    bpf_load.pin_map(new, str(MAP))
    new.close()
    assert (
        f"{MAP}: IPv4, hash, values of 4 bytes: 0 running, 0 ended, 0 preloaded of 16; no program" in tt("status").out
    )


def test_clean_removes_ended_entries_alone(tt: Run) -> None:
    tt("load", "--dev", "vs")
    fill()
    assert tt("clean").err == f"tt: {MAP}: 2 ended entries removed\ntt: {MAP6}: 2 ended entries removed\n"
    assert tt("clean").err == f"tt: {MAP}: 0 ended entries removed\ntt: {MAP6}: 0 ended entries removed\n"
    assert [one["preloaded"] for one in json.loads(tt("status", "--json").out)["maps"]] == [2, 2]
    refused(tt("clean", "--map", FOLDER / "none"), output.USAGE, "none: no such map")


def test_nothing_stays_open(tt: Run) -> None:
    tt("load", "--dev", "vs")
    before = os.listdir("/proc/self/fd")
    for command in (["load", "--dev", "vs"], ["load", "--dev", "vs", "--port", "1"], ["status"], ["clean"], ["unload"]):
        tt(*command)
    assert os.listdir("/proc/self/fd") == before
    with closing(socket.socket()):
        until("no program", lambda: xdp.attached(socket.if_nametoindex("vs")) is None)
