"""What every command prints, and the exit codes.

Data goes to stdout, a line at a time; messages go to stderr as one line "tt: ...".  This is the one place that turns an
exception into a message and an exit code.  What a server sent is escaped before a terminal sees it.
Must not know any single command.
"""

import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import TextIO

import msgspec

from tt.connection import (
    ConnectionLost,
    NoConnection,
    NotAccepted,
    ProtocolError,
    Refused,
    RequestFailed,
    UnknownServer,
)
from tt.keys import KeyFileError
from tt.known_servers import KnownServersError

OK = 0
FAILED = 1  # or partly failed
USAGE = 2  # or configuration
NO_CONNECTION = 3  # refused, dropped, timed out
DENIED = 4  # WELCOME or login failed, or not allowed

EXIT_CODES: dict[type[Exception], int] = {
    UnknownServer: USAGE,
    KnownServersError: USAGE,
    KeyFileError: USAGE,
    NoConnection: NO_CONNECTION,
    ConnectionLost: NO_CONNECTION,
    NotAccepted: DENIED,
    Refused: DENIED,
    ProtocolError: FAILED,
    RequestFailed: FAILED,
}
# What a server's error says where it means that one is not let in, or may not.
NOT_ALLOWED = frozenset(("login", "login_first", "password_change_first", "denied"))


class Exit(Exception):  # noqa: N818  it is no error where the code is 0
    """Ends a command with an exit code and, unless it is empty, a message of one line."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


def guarded(run: Callable[[], int]) -> int:
    """Return what `run` returns, or the exit code of the exception that it raised, whose message is printed."""
    try:
        return run()
    except Exit as error:
        if str(error):
            message(str(error))
        return error.code
    except KeyboardInterrupt:
        message("interrupted")
        return FAILED
    except BrokenPipeError:
        # The reader of stdout went away, as `head` does; what is still buffered must not fail at the interpreter's end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except tuple(EXIT_CODES) as error:
        message(str(error))
        return _exit_code(error)
    except OSError as error:  # stdout on a full disk, for one
        message(f"{error.strerror or error}: the command could not finish")
        return FAILED


def _exit_code(error: Exception) -> int:
    if isinstance(error, RequestFailed) and error.code in NOT_ALLOWED:
        return DENIED
    return next(code for kind, code in EXIT_CODES.items() if isinstance(error, kind))


def line(text: str) -> None:
    """Print one line of data."""
    lines([text])


def blank_line() -> None:
    """Print an empty line, which sets one block of data apart from the next."""
    lines([""])


def json_line(value: Mapping[str, object]) -> None:
    """Print one JSON object (RFC 8259) on a line of its own."""
    _put(sys.stdout, _without_delete(json.dumps(value)) + "\n")  # escapes all that is not ASCII


def lines(texts: Iterable[str]) -> None:
    """Print many lines of data at once: a write for each would make a list of 50,000 take twice as long."""
    _put(sys.stdout, "".join(printable(text) + "\n" for text in texts))


def json_lines(texts: Iterable[bytes]) -> None:
    """Print lines of JSON as they are; with what is not ASCII escaped."""
    block = b"".join(texts)
    if not block.isascii():
        block = b"".join(json_text(msgspec.json.decode(line)).encode() + b"\n" for line in block.splitlines())
    _put(sys.stdout, _without_delete(block.decode("ascii")))


def json_text(value: object) -> str:
    """One JSON text in ASCII; msgspec takes an eighth of json's time, but does not escape the rest."""
    text = msgspec.json.encode(value)
    return _without_delete(
        text.decode("ascii") if text.isascii() else json.dumps(msgspec.json.decode(text), separators=(",", ":"))
    )


def _without_delete(text: str) -> str:
    """Escape the one control character that JSON in ASCII may hold as it is (RFC 8259, section 7)."""
    return text.replace("\x7f", "\\u007f")


def message(text: str) -> None:
    """Print one message for people."""
    _put(sys.stderr, f"tt: {printable(text)}\n")


def _put(stream: TextIO, text: str) -> None:
    """Write whole lines.  Not with print(): Ctrl-C can end it before the newline, which glues the next line on."""
    stream.write(text)
    stream.flush()


def printable(text: str) -> str:
    """The text with all escaped that a terminal would not show as it is."""
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode("ascii") for c in text
    )
