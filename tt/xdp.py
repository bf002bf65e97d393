"""The XDP program on the interfaces of this host: attached through a link pinned in /sys/fs/bpf.

A pinned link keeps the program where it is when its process ends, until the pin is removed.  Nothing is kept besides:
what is attached, with which ports, maps and counters, is asked of the kernel.  All interfaces share one program.
Rules: `lock` goes round whatever changes this; a load that fails leaves all as it was; the program of somebody else on
an interface is left alone.  A mode is what the kernel says after attaching, not what was asked for.
It must not know what the maps' keys and values mean, nor the command line.
"""

import ctypes
import errno
import fcntl
import os
import socket
import struct
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import NamedTuple

from pyroute2 import IPRoute, NetlinkError

from tt import bpf, bpf_load
from tt.bpf import Map, address
from tt.bpf_programs import XDP

FOLDER = Path("/sys/fs/bpf")
PIN = "tapetrack_xdp_"  # and the interface: one pinned link each
MODES = {"native": 1 << 2, "generic": 1 << 1}  # XDP_FLAGS_DRV_MODE, XDP_FLAGS_SKB_MODE
ATTEMPTS = {"auto": ("native", "generic"), "native": ("native",), "generic": ("generic",)}
MODE_WORDS = {"xdp": "native", "xdpgeneric": "generic", "xdpoffload": "in hardware", "xdpmulti": "several"}
MAX_PORTS = XDP.layout["ports"][1] // 2
COUNTERS = "tt_counters"
COUNTER_NAMES = ("passed_packets", "passed_bytes", "dropped_packets", "dropped_bytes")  # struct counts
PROG_GET_FD_BY_ID, MAP_GET_FD_BY_ID, LINK_CREATE, LINK_DETACH = 13, 14, 28, 34
BPF_XDP = 37  # enum bpf_attach_type
# BPF_PROG_TYPE_XDP.  It takes the length of a frame, so CAP_PERFMON besides CAP_BPF and CAP_NET_ADMIN; finding again
# what is attached takes CAP_SYS_ADMIN.
# Two forms: native, BPF_F_XDP_HAS_FRAGS (Linux 5.18) allows an MTU over a page.  Generic mode takes any MTU without it,
# and with it, on Linux 6.18, packets with two VLAN tags do not survive a tc program behind it that takes the tags off.
KINDS = {
    "native": bpf_load.Kind(6, "tt_xdp_native", "XDP program", "root", flags=1 << 5),
    "generic": bpf_load.Kind(6, "tt_xdp_generic", "XDP program", "root"),
}

# What attaching to an interface is refused with (net/core/dev.c, and the drivers).
REFUSED = {
    errno.EBUSY: "{0} has another XDP program, and an interface takes one: take that off (`bpftool net list` names it, "
    "`ip link set dev {0} xdp off` removes it unless a link holds it), or use the server's listener filter beside it",
    errno.EEXIST: "{0} has an XDP program in the other mode, or an interface above it has one: take that off first "
    "(`bpftool net list` names it)",
    errno.ERANGE: "{0}: the driver refuses native XDP at this MTU: lower it (`ip link set dev {0} mtu 1500`; of a veth "
    "pair, the other end's), or use --mode generic",
    errno.EINVAL: "{0}: the driver refuses native XDP with its present settings, often its MTU, queues or LRO: "
    "`dmesg | tail` may say which; change them, or use --mode generic",
    errno.EOPNOTSUPP: "{0}: its driver has no native XDP: use --mode generic, or attach to the interface below it",
    errno.EPERM: "no right to attach to {0}: needs root",
    errno.ENODEV: "{0} is gone: `ip link` lists the interfaces",
}
FINAL = (errno.EBUSY, errno.EEXIST, errno.EPERM, errno.ENODEV)  # the other mode would be refused as well
OBJECTS = {errno.EPERM: "no right to open {0}: needs root", errno.ENOENT: "{0} is gone"}


class XdpError(Exception):
    """It cannot be done; the text is one line that names the thing, the rule and the remedy."""


class Settings(NamedTuple):
    """What the program is loaded with, besides its maps."""

    ports: tuple[int, ...]  # TCP, 1 to MAX_PORTS of them
    all_packets: bool


class Link(NamedTuple):
    """A pinned link of ours."""

    pin: Path
    interface: str  # by the name it had when it was attached
    number: int  # of the interface (its ifindex); 0: it is gone
    program: int  # the program's id


class Attached(NamedTuple):
    """What the kernel says of an interface."""

    mode: str
    program: int


class Loaded(NamedTuple):
    """What became of one interface."""

    interface: str
    mode: str
    before: bool  # it was attached already
    refused: str  # why it is not native where that was tried; else ""


@contextmanager
def lock() -> Iterator[None]:
    """One at a time: the folder itself is locked (flock(2)), so that no file is left."""
    try:
        folder = os.open(FOLDER, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        remedy = f"mount -t bpf bpf {FOLDER}, and be root"
        raise XdpError(f"{FOLDER}: {error.strerror}: it must be a BPF file system: {remedy}") from error
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


# ---- the program ----------------------------------------------------------------------------------------------------


class Program:
    """The loaded program, by a descriptor that is closed with it; what it was loaded with is read from the kernel."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        count = struct.unpack_from("=I", _info(fd, 80), 52)[0]
        ids = ctypes.create_string_buffer(4 * count + 4)
        info = ctypes.create_string_buffer(struct.pack("=52xIQ", count, address(ids)), 80)
        bpf.call(bpf.INFO, struct.pack("=IIQ", fd, len(info), address(info)), {}, "the XDP program")
        self.id = struct.unpack_from("=I", info, 4)[0]
        self.map_ids = frozenset(struct.unpack_from(f"={count}I", ids))
        self.name = info.raw[64:80].rstrip(b"\0").decode("ascii", "replace")

    def settings(self) -> Settings:
        """Raises XdpError where another version of tt loaded it."""
        return _settings(self.constants())

    def constants(self) -> bytes:
        """As it was loaded with them."""
        with self.open_map(bpf_load.CONSTANTS) as rodata:
            data = rodata.lookup(bytes(4)) or b""
        if len(data) != len(bpf_load.lay_out(XDP, {name: bytes(size) for name, (_, size) in XDP.layout.items()})):
            raise XdpError(
                "the attached program is of another version: take it off with tt bpf unload, then load again"
            )
        return data

    def counters(self) -> dict[str, int]:
        """COUNTER_NAMES, summed over the CPUs since it was loaded."""
        with self.open_map(COUNTERS) as counted:
            each_cpu = struct.iter_unpack("=4Q", counted.lookup(bytes(4)) or b"")
        return dict(zip(COUNTER_NAMES, map(sum, zip(*each_cpu, strict=True)), strict=True))

    def close(self) -> None:
        """An attached program stays attached."""
        os.close(self.fd)

    def map_names(self) -> dict[int, str]:
        """The maps that it reads: their ids and names in the kernel."""
        return {number: opened.name for number, opened in self._maps()}

    @contextmanager
    def open_map(self, name: str) -> Iterator[Map]:
        """The one of its maps that has that name in the kernel."""
        with closing(self._maps()) as maps:
            for _, opened in maps:
                if opened.name == name:
                    yield opened
                    return
        raise XdpError("the attached program is not one that tt bpf loaded: take it off first with tt bpf unload")

    def _maps(self) -> Generator[tuple[int, Map], None, None]:
        for number in self.map_ids:
            opened = Map(_by_id(MAP_GET_FD_BY_ID, number, "a map of the XDP program"))
            try:
                yield number, opened
            finally:
                opened.close()


def load_program(
    maps: Mapping[int, Map], settings: Settings, mode: str = "native", like: Program | None = None
) -> Program:
    """Load it for the map of each family (4, 6), in the form for a mode, with the counters of `like`.  OSError."""
    with ExitStack() as ends:
        if like is not None:
            counted = ends.enter_context(like.open_map(COUNTERS))
        else:
            counted = bpf_load.create_map("percpu_array", (4, 8 * len(COUNTER_NAMES)), 1, COUNTERS)
            ends.callback(counted.close)
        bound, constants = _bind(maps, settings, counted)
        return Program(bpf_load.load(KINDS[mode], XDP, bound | {"counters": counted}, constants))


def _bind(maps: Mapping[int, Map], settings: Settings, unused: Map) -> tuple[dict[str, Map], dict[str, bytes]]:
    bound, constants = bpf_load.bind(maps, 64, unused)
    constants["ports"] = struct.pack(f"={MAX_PORTS}H", *settings.ports, *[0] * (MAX_PORTS - len(settings.ports)))
    constants["all_packets"] = struct.pack("=I", settings.all_packets)
    return bound, constants


def _settings(data: bytes) -> Settings:
    ports = struct.unpack_from(f"={MAX_PORTS}H", data, XDP.layout["ports"][0])
    all_packets = struct.unpack_from("=I", data, XDP.layout["all_packets"][0])[0]
    return Settings(tuple(port for port in ports if port), bool(all_packets))


def _check_loaded_so(program: Program, maps: Mapping[int, Map], settings: Settings) -> None:
    """Raises XdpError where a program has other maps or constants."""
    _, constants = _bind(maps, settings, next(iter(maps.values())))
    same_maps = {object_id(one.fd) for one in maps.values()} <= program.map_ids
    if not same_maps or program.constants() != bpf_load.lay_out(XDP, constants):
        raise XdpError(
            "the program is loaded already, with other ports, packets or maps, and all interfaces share these: "
            "take it off first with tt bpf unload --keep-maps"
        )


# ---- load and unload ------------------------------------------------------------------------------------------------


def load(interfaces: Sequence[str], maps: Mapping[int, Map], settings: Settings, mode: str) -> list[Loaded]:
    """Attach the program to interfaces in a mode of ATTEMPTS, all or none; those that have it keep it.

    Raises XdpError and OSError.
    """
    numbers = {name: _number(name) for name in dict.fromkeys(interfaces)}
    links = {link.interface: link for link in pinned()}
    with ExitStack() as undo, closing(_Forms(links.values(), maps, settings)) as forms:
        found = []
        for name, number in numbers.items():
            link = links.get(name)
            done = _kept(name, number, mode, link) if link else None
            found.append(done or _attach(forms, name, number, mode))
            if done is None:
                undo.callback(_take_off, pin_path(name))
        undo.pop_all()
    return found


class _Forms:
    """The program in the form for each mode, as it is attached, or loaded when it is first asked for."""

    def __init__(self, links: Iterable[Link], maps: Mapping[int, Map], settings: Settings) -> None:
        self._maps, self._settings = maps, settings
        self._programs: dict[str, Program] = {}  # by name
        try:
            for number in {link.program for link in links if link.number}:
                program = _program(number)
                self._programs[program.name] = program
                _check_loaded_so(program, maps, settings)
        except BaseException:
            self.close()
            raise

    def get(self, mode: str) -> Program:
        name = KINDS[mode].name
        if name not in self._programs:
            like = next(iter(self._programs.values()), None)
            self._programs[name] = load_program(self._maps, self._settings, mode, like)
        return self._programs[name]

    def close(self) -> None:
        for program in self._programs.values():
            program.close()


def unload(links: Iterable[Link]) -> None:
    """Detach the program, which goes with its last link.  When this returns it sees no more packets."""
    for link in links:
        _take_off(link.pin)


def _take_off(pin: Path) -> None:
    with _link(pin) as fd:
        # The kernel would detach it by itself, but only some time after the pin is gone.
        bpf.call(LINK_DETACH, struct.pack("=I", fd), OBJECTS, str(pin))
    pin.unlink(missing_ok=True)


def _kept(name: str, number: int, mode: str, link: Link) -> Loaded | None:
    """What an earlier load left on an interface; None, and no pin, where that interface is gone and this a new one."""
    if not link.number:
        link.pin.unlink()
        return None
    is_now = attached(number)
    if link.number != number or is_now is None or is_now.program != link.program:
        raise XdpError(
            f"{link.pin} holds another interface of that name, in another network namespace: "
            f"unload that one first with tt bpf unload --dev {name}"
        )
    if mode not in ("auto", is_now.mode):
        raise XdpError(f"{name} has the program already, {is_now.mode}: first tt bpf unload --keep-maps --dev {name}")
    return Loaded(name, is_now.mode, before=True, refused="")


def _attach(forms: _Forms, name: str, number: int, mode: str) -> Loaded:
    fd, refused = _create_link(forms, name, number, mode)
    try:
        bpf_load.pin(fd, str(pin_path(name)))
    finally:
        os.close(fd)
    is_now = attached(number)
    return Loaded(name, is_now.mode if is_now else "not attached", before=False, refused=refused)


def _create_link(forms: _Forms, name: str, number: int, mode: str) -> tuple[int, str]:
    """The descriptor of a new link, and why it is not native where that was tried first."""
    refused = ""
    for attempt in ATTEMPTS[mode]:
        attr = struct.pack("=4I", forms.get(attempt).fd, number, BPF_XDP, MODES[attempt])
        try:
            return bpf.call(LINK_CREATE, attr, REFUSED, name), refused
        except OSError as error:
            refused = str(error.strerror)
            if error.errno in FINAL:
                break
    raise XdpError(refused)


# ---- what the kernel says -------------------------------------------------------------------------------------------


def pin_path(interface: str) -> Path:
    """Where the link of an interface is pinned.  An interface's name may have dots, a name in that file system none."""
    return FOLDER / (PIN + interface.replace(".", "%2E"))  # the kernel takes no "%" in the latter


def pinned() -> list[Link]:
    """All pinned links of ours, by name."""
    found = []
    for path in sorted(FOLDER.glob(f"{PIN}*")):
        name = path.name.removeprefix(PIN).replace("%2E", ".")
        with _link(path) as fd:
            info = _info(fd, 24)
            found.append(Link(path, name, struct.unpack_from("=I", info, 16)[0], struct.unpack_from("=I", info, 8)[0]))
    return found


def attached(number: int) -> Attached | None:
    """The program of an interface of this network namespace, and its mode, as netlink tells them."""
    try:
        with IPRoute() as netlink:
            answer = netlink.get_links(number)
    except NetlinkError as error:
        if error.code == errno.ENODEV:
            return None
        raise OSError(error.code, str(error)) from error
    xdp = answer[0].get_attr("IFLA_XDP")
    if xdp is None or not (word := xdp.get_attr("IFLA_XDP_ATTACHED")):
        return None
    return Attached(MODE_WORDS.get(word, word), xdp.get_attr("IFLA_XDP_PROG_ID") or 0)


def program_of(links: Iterable[Link]) -> Program | None:
    """The program that our links hold, in one of its forms; None where nothing is attached.  The caller closes it."""
    return next((_program(link.program) for link in links if link.number), None)


def _program(number: int) -> Program:
    return Program(_by_id(PROG_GET_FD_BY_ID, number, "the attached XDP program"))


def object_id(fd: int) -> int:
    """The kernel's number of a map or program."""
    return int(struct.unpack_from("=I", _info(fd, 8), 4)[0])


@contextmanager
def _link(path: Path) -> Iterator[int]:
    name = os.fsencode(path)
    fd = bpf.call(bpf.OBJ_GET, struct.pack("=QII", address(name), 0, 0), OBJECTS, str(path))
    try:
        # A new link is a bpf_link there, one that was pinned a bpf-link.
        if os.readlink(f"/proc/self/fd/{fd}") not in ("anon_inode:bpf-link", "anon_inode:bpf_link"):
            raise XdpError(f"{path} is no link of BPF: remove it, that name is for links of tt bpf")
        yield fd
    finally:
        os.close(fd)


def _info(fd: int, size: int) -> bytes:
    """The first bytes of the kernel's struct bpf_map_info, bpf_prog_info or bpf_link_info."""
    info = ctypes.create_string_buffer(size)
    bpf.call(bpf.INFO, struct.pack("=IIQ", fd, size, address(info)), {}, "an object of BPF")
    return bytes(info.raw)


def _by_id(command: int, number: int, what: str) -> int:
    return bpf.call(command, struct.pack("=III", number, 0, 0), OBJECTS, what)


def _number(name: str) -> int:
    try:
        return socket.if_nametoindex(name)
    except OSError:
        raise XdpError(f"there is no interface {name} here: `ip link` lists them") from None
