"""What all requests at the control socket have in common: who asks, how an answer is made, and how a field is read.

An answer is an iterator of objects that JSON can hold.  PIECE_ENDS in it lets the loop go on with the others; a Pending
lets the answer wait until that is done.
It must not know the socket, nor what any request does.
"""

import logging
import pwd
from collections.abc import Iterator, Mapping
from functools import lru_cache
from ipaddress import ip_network
from typing import Any, NamedTuple

from tt import log, sources
from tt.pending import Pending

PIECE = 128  # places of the table looked at in one turn of the loop: about 0.5 ms when all are taken

Answer = Iterator[dict[str, Any] | Pending]
PIECE_ENDS: dict[str, Any] = {}


class RequestError(Exception):
    """A request cannot be done; the text is one line for who asked."""


class Caller(NamedTuple):
    """Who asks, as the kernel had it when the client connected (SO_PEERCRED and SO_PEERGROUPS, unix(7))."""

    uid: int
    groups: frozenset[int]


@lru_cache(64)  # asked once of a user: a directory service may take its time
def user_name(uid: int) -> str:
    """The name of a user, or his number where he has none."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def say_done(caller: Caller, do: str, **fields: object) -> None:
    """Log what was changed by hand, with who did it."""
    log.event(logging.INFO, "done by hand", request=do, **fields, uid=caller.uid, user=user_name(caller.uid))


# ---- fields of a request --------------------------------------------------------------------------------------------


def text(request: Mapping[str, Any], name: str) -> str:
    """A text that must be there.  RequestError."""
    value = request.get(name)
    if not isinstance(value, str):
        raise RequestError(f"the request needs {name!r}, a text")
    return value


def optional_text(request: Mapping[str, Any], name: str) -> str | None:
    """A text, or None where there is none.  RequestError."""
    return None if request.get(name) is None else text(request, name)


def optional_number(request: Mapping[str, Any], name: str) -> float | None:
    """A number, or None where there is none.  RequestError."""
    value = request.get(name)
    if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
        raise RequestError(f"{name!r} is {value!r:.20}: it must be a number")
    return value


def note(request: Mapping[str, Any], name: str = "reason", *, most: int = 200) -> str | None:
    """Why something is done, in the words of who does it; at most so many characters.  RequestError."""
    words = optional_text(request, name)
    if words and len(words) > most:
        raise RequestError(f"a {name} of {len(words)} characters: it must be at most {most}")
    return words or None


def network(words: str) -> sources.Network:
    """An address or network.  RequestError."""
    try:
        return ip_network(words)
    except ValueError as error:
        raise RequestError(f"{words!r} is no address or network: {error}") from None


def optional_network(request: Mapping[str, Any], name: str) -> sources.Network | None:
    """An address or network, or None where there is none.  RequestError."""
    words = optional_text(request, name)
    return None if words is None else network(words)


def within(source: str, whole: sources.Network | None) -> bool:
    """Whether a source is in a network; None: in any."""
    return whole is None or sources.holds((whole,), source)
