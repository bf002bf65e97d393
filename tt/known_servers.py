"""The servers a user trusts: $XDG_CONFIG_HOME/tt/known_servers (~/.config without it), like ssh's known_hosts.

A line is "HOST:PORT KEY [KEY]" ("[ADDRESS]:PORT" for IPv6), the newest key first; '#' begins a comment, which is kept.
Two keys are valid while a server changes its key.  Host names are compared in lower case, addresses in canonical form
(RFC 5952); a name and its address are two different servers.

Rules: changes are made under a lock and replace the file at once, so readers need no lock; a damaged line is an error,
not skipped, because a skipped line would look like an unknown server.
Must not know the network or the command line.
"""

import fcntl
import ipaddress
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from tt.keys import from_text, to_text, write_file

DEFAULT_PORT = 5000  # TCP
MAX_KEYS = 2  # of one server: the one in use and the one before (or after) it
MAX_HOST = 253  # characters of a host name (RFC 1035)


class KnownServersError(Exception):
    """The file cannot be used; the text is one line that names the file, the fault and the remedy."""


@dataclass(frozen=True, slots=True)
class KnownServer:
    """A trusted server: its host (canonical), TCP port and 1 or 2 public keys of 32 bytes, the newest first."""

    host: str
    port: int
    keys: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class _Line:
    text: str  # as it stands in the file
    server: KnownServer | None = None  # None: empty or a comment
    comment: str = ""  # what follows '#' behind a server


def parse_address(text: str) -> tuple[str, int | None]:
    """Split HOST, HOST:PORT, ADDRESS6 or [ADDRESS6]:PORT; the port is None where there is none.

    Raises ValueError, one sentence.
    """
    if match := re.fullmatch(r"\[([^\[\]]*:[^\[\]]*)\](?::(.*))?", text, re.DOTALL):
        host, port = match[1], match[2]
    elif text.count(":") == 1:
        host, _, port = text.partition(":")
    else:
        host, port = text, None
    return _canonical(host), None if port is None else parse_port(port)


def parse_port(text: str) -> int:
    """Return a TCP port, 1 to 65535.  Raises ValueError, one sentence."""
    if not re.fullmatch("[0-9]{1,5}", text) or not 1 <= int(text) <= 65535:
        raise ValueError(f"'{text}' is no port: give a number from 1 to 65535")
    return int(text)


def format_address(host: str, port: int) -> str:
    """Return HOST:PORT, or [ADDRESS6]:PORT, in canonical form.  Raises ValueError for what is no host or port."""
    host = _canonical(host)
    parse_port(str(port))
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def path() -> Path:
    """Return the path of the file.  Raises KnownServersError where there is no home directory."""
    configured = os.environ.get("XDG_CONFIG_HOME", "")
    if os.path.isabs(configured):  # the XDG base directory specification: a relative path is to be ignored
        return Path(configured, "tt", "known_servers")
    try:
        return Path.home() / ".config" / "tt" / "known_servers"
    except RuntimeError as error:
        raise KnownServersError(
            "there is no home directory to keep the known servers in: set HOME or XDG_CONFIG_HOME"
        ) from error


def entries() -> list[KnownServer]:
    """Return all known servers in the file's order; none where there is no file.  Raises KnownServersError."""
    return [line.server for line in _read(path()) if line.server]


def lookup(host: str, port: int) -> list[bytes]:
    """Return the keys of HOST:PORT, the newest first; empty where it is unknown.  Raises KnownServersError."""
    host = _canonical(host)
    return [key for server in entries() if (server.host, server.port) == (host, port) for key in server.keys]


def add(host: str, port: int, key: bytes) -> bool:
    """Make `key` (32 bytes) the newest key of HOST:PORT, and return whether that changed the file.

    The key before it stays valid, an older one is dropped.  Raises KnownServersError; ValueError for no host or port.
    """
    address, host = format_address(host, port), _canonical(host)
    with _locked() as file:
        lines = _read(file)
        for number, line in enumerate(lines):
            if line.server and (line.server.host, line.server.port) == (host, port):
                keys = (key, *(other for other in line.server.keys if other != key))[:MAX_KEYS]
                if keys == line.server.keys:
                    return False
                comment = f"  #{line.comment}" if line.comment else ""
                lines[number] = replace(line, text=f"{address} {' '.join(map(to_text, keys))}{comment}")
                break
        else:
            lines.append(_Line(f"{address} {to_text(key)}"))
        _write(file, lines)
    return True


def remove(host: str, port: int) -> bool:
    """Forget HOST:PORT with all its keys, and return whether it was known.  Raises KnownServersError, ValueError."""
    host = _canonical(host)
    with _locked() as file:
        lines = _read(file)
        kept = [line for line in lines if not line.server or (line.server.host, line.server.port) != (host, port)]
        if len(kept) == len(lines):
            return False
        _write(file, kept)
    return True


def _canonical(host: str) -> str:
    try:
        return str(ipaddress.ip_address(host))
    except ValueError:
        pass
    if not host or len(host) > MAX_HOST or not host.isprintable() or re.search(r"[\s#:/\[\]]", host):
        raise ValueError(f"'{host}' is no host: give a name or an address, with a port HOST:PORT or [ADDRESS6]:PORT")
    return host.lower()


def _parse_line(text: str) -> _Line:
    """Raises ValueError, one sentence."""
    fields, _, comment = text.partition("#")
    if not (words := fields.split()):
        return _Line(text)
    host, port = parse_address(words[0])
    if port is None:
        raise ValueError(f"'{words[0]}' has no port: write HOST:PORT")
    if not 1 <= len(words) - 1 <= MAX_KEYS:
        raise ValueError(f"a server has 1 to {MAX_KEYS} keys, not {len(words) - 1}")
    return _Line(text, KnownServer(host, port, tuple(map(from_text, words[1:]))), comment)


def _read(file: Path) -> list[_Line]:
    try:
        # A comment may be in any encoding: surrogateescape keeps its bytes.
        text = file.read_bytes().decode("utf-8", errors="surrogateescape")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise KnownServersError(
            f"cannot read {file} ({error.strerror}): it must be a file that you may read"
        ) from error
    lines: list[_Line] = []
    seen: dict[tuple[str, int], int] = {}
    # Not splitlines(): it also splits at form feeds and U+2028, which may stand in a comment.
    for number, line_text in enumerate(text.removesuffix("\n").split("\n") if text else [], 1):
        try:
            line = _parse_line(line_text)
            if line.server:
                first = seen.setdefault((line.server.host, line.server.port), number)
                if first != number:
                    raise ValueError(f"the server stands in line {first} already")  # noqa: TRY301  same answer as a bad line
        except ValueError as error:
            raise KnownServersError(f"{file}, line {number}: {error}; correct or delete the line") from error
        lines.append(line)
    return lines


def _write(file: Path, lines: list[_Line]) -> None:
    """The caller holds the lock."""
    text = "".join(f"{line.text}\n" for line in lines)
    try:
        mode = file.stat().st_mode & 0o777 if file.exists() else 0o600
        write_file(file, text.encode("utf-8", errors="surrogateescape"), mode, replace=True)
    except OSError as error:
        raise KnownServersError(f"cannot write {file} ({error.strerror}): its directory must be writable") from error


@contextmanager
def _locked() -> Iterator[Path]:
    """Hold the lock for a change of the file and give the file's path, behind symbolic links.

    The lock is a file of its own, since the known servers' file is replaced; it is opened for writing, which NFS needs.
    """
    named = path()
    try:
        named.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(named.with_name("known_servers.lock"), os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise KnownServersError(f"cannot write in {named.parent} ({error.strerror}): make it writable") from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError as error:
            raise KnownServersError(
                f"cannot lock {named} ({error.strerror}): its file system must support locks"
            ) from error
        yield Path(os.path.realpath(named))  # a link into a dotfiles directory stays a link
    finally:
        os.close(descriptor)
