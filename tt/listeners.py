"""The listening sockets: made for the addresses of `listen`, or taken over from a service manager.

What is passed stays open in the manager while this process ends and the next one starts, so that no connection is
refused meanwhile: who comes waits in the backlog.  Hence it is this very socket that is taken over, as it is; a second
one on the same port (SO_REUSEPORT) would have a backlog of its own that ends with its process.
Rules: each passed descriptor is looked at before it is used; the kernel filter on a socket is ours or none: what an
earlier process attached there would go on dropping by that one's map.
It must not know who passes sockets, nor by which protocol (systemd.py).
"""

import errno
import logging
import os
import socket
import struct
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

from tt import bpf_load, config, log
from tt.kernel_gate import KernelGate
from tt.systemd import Passed

# What to do about a listener, by what the kernel says (ip(7), ipv6(7), tcp(7)).
REMEDIES = {
    errno.EADDRINUSE: "stop who has it (ss -ltnp), or name another with --listen",
    errno.EADDRNOTAVAIL: "name an address of this host (ip address) with --listen",
    errno.EACCES: "ports below 1024 need CAP_NET_BIND_SERVICE: name a higher one with --listen",
    errno.EINVAL: "a link-local address needs its interface: name it like [fe80::1%eth0]:5000 with --listen",
    errno.EAFNOSUPPORT: "this host has no IPv6: name an IPv4 address with --listen",
}
REMEDY = "name another with --listen"
FAMILIES = (socket.AF_INET, socket.AF_INET6)
ANY = "0.0.0.0"  # noqa: S104 - what a socket is bound to, said


class ListenError(Exception):
    """There is nothing to listen on; the text is one line that names the socket, the rule and the remedy."""


def open_listeners(
    settings: config.Config, gate: KernelGate | None = None, passed: Sequence[Passed] = ()
) -> list[socket.socket]:
    """Listening sockets with what the loop wants of them; those that are passed, or new ones.  Raises ListenError."""
    listeners: list[socket.socket] = []
    origin = settings.origin("listen")
    if passed and origin != config.DEFAULT:
        raise ListenError(
            f"{origin}: the service manager passes {len(passed)} listening socket{'s' * (len(passed) > 1)}, and it is "
            "these that are served: leave listen out (ListenStream= in the socket unit says where), or start without it"
        )
    made = (_listen(address, settings, gate) for address in settings.listen)
    try:
        for listener in (_take_over(one, settings, gate) for one in passed) if passed else made:
            if listener is not None:
                listeners.append(listener)  # noqa: PERF401 - what is open is closed where a later one fails
    except ListenError:
        for listener in listeners:
            listener.close()
        raise
    return listeners


def addresses(listeners: Iterable[socket.socket]) -> list[config.Address]:
    """Where they listen; a socket for IPv6 that takes IPv4 as well has two."""
    found = []
    for listener in listeners:
        host, port, *_ = listener.getsockname()
        found.append(config.Address(host, port))
        if host == "::" and not listener.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY):
            found.append(config.Address(ANY, port))
    return found


# ---- passed ---------------------------------------------------------------------------------------------------------


def _take_over(passed: Passed, settings: config.Config, gate: KernelGate | None) -> socket.socket:
    listener = None
    wrong: str | None
    try:
        listener = _socket(passed.descriptor)
        wrong = _unfit(listener)
        if not wrong:
            listener.setblocking(False)
            _prepare(listener, gate)
            listener.listen(settings.backlog)  # of a socket that listens already it only changes the backlog
            return listener
    except OSError as error:
        wrong = error.strerror or str(error)
    if listener is not None:
        listener.close()
    raise ListenError(
        f"descriptor {passed.descriptor} ({passed.name}) from the service manager: {wrong}: it must be a listening TCP "
        "socket of IPv4 or IPv6: in the socket unit, ListenStream= and Accept=no"
    )


def _socket(descriptor: int) -> socket.socket:
    """Raises OSError also for what is no socket."""
    os.set_inheritable(descriptor, False)
    return socket.socket(fileno=descriptor)


def _unfit(passed: socket.socket) -> str:
    """What a passed socket is that cannot be served; "" where it can."""
    if passed.family not in FAMILIES:
        return "it is of another address family"
    if passed.type != socket.SOCK_STREAM or passed.proto != socket.IPPROTO_TCP:
        return "it is not of TCP"
    if not passed.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        return "it is not listening"
    return ""


# ---- new ------------------------------------------------------------------------------------------------------------


def _listen(address: config.Address, settings: config.Config, gate: KernelGate | None) -> socket.socket | None:
    """A listener, or None for the default IPv6 one on a host without IPv6."""
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    optional = family == socket.AF_INET6 and settings.origin("listen") == config.DEFAULT
    if optional and _ipv6_is_off():
        _say_left_out(address)
        return None
    listener = None
    try:
        listener = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        listener.bind((address.host, address.port))
        _prepare(listener, gate)
        listener.listen(settings.backlog)
    except OSError as error:
        if listener is not None:
            listener.close()
        if optional and error.errno in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL):
            _say_left_out(address)
            return None
        remedy = REMEDIES.get(error.errno or 0, REMEDY)
        raise ListenError(f"listen on {address}: {error.strerror or error}: {remedy}") from error
    return listener


def _prepare(listener: socket.socket, gate: KernelGate | None) -> None:
    """What accepted sockets inherit.  Those that wait in a passed socket's backlog at its first start lack it."""
    # A drop is then accept and close, with a reset and nothing left behind.
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if gate is not None:
        gate.attach(listener.fileno())
    else:
        bpf_load.detach(listener.fileno())


def _ipv6_is_off() -> bool:
    """Whether no interface has an IPv6 address, not even loopback: a socket could be had and bound all the same."""
    with suppress(OSError):  # no IPv6 in the kernel, which the socket will say, or no /proc
        return not Path("/proc/net/if_inet6").read_bytes()
    return False


def _say_left_out(address: config.Address) -> None:
    log.event(logging.WARNING, "no IPv6 on this host: listening on IPv4 alone", left_out=str(address))
