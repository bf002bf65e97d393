"""How a command asks the server that runs on this host: one line of JSON into its control socket, lines of JSON back.

Which server: --control names the socket, or --data the data directory that it was started with.
Must not know what is asked, nor how it is shown.
"""

import argparse
import json
import os
import socket
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import msgspec

from tt import config
from tt.cli import output

PATIENCE = 10.0  # s for the next line
BUFFER = 1 << 16  # bytes read at once
LAST = (b'{"end"', b'{"error"')  # how the last line of an answer begins


def add_server_options(parser: argparse.ArgumentParser) -> None:
    """--data and --control."""
    which = add_data_option(parser)
    which.add_argument("--control", type=Path, metavar="PATH", help="Its control socket, wherever that is.")


def add_data_option(parser: argparse.ArgumentParser) -> "argparse._MutuallyExclusiveGroup":
    """--data; to the group that is returned goes what may stand in its place."""
    default = os.environ.get("TT_DATA", str(config.default("data")))
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--data", type=Path, metavar="DIR", default=Path(default),
        help=f"The data directory of the server (default: {default}; the variable TT_DATA sets it).".replace("%", "%%"),
    )  # fmt: skip
    return which


def ask(
    args: argparse.Namespace, request: dict[str, Any], *, patience: float | None = PATIENCE
) -> Iterator[dict[str, Any]]:
    """The objects of the answer as they come, the last one with "end".  Raises output.Exit.

    `patience`: s for the next line; None: for ever.
    """
    with connected(args, patience=patience) as asked:
        yield from asked(request)


@contextmanager
def connected(
    args: argparse.Namespace, *, patience: float | None = PATIENCE
) -> Iterator[Callable[[dict[str, Any]], Iterator[dict[str, Any]]]]:
    """A connection for many requests, one after the other, each asked as by `ask`.  Raises output.Exit."""
    path = control_path(args)
    with connection_to(path, patience) as connection, connection.makefile("rb", BUFFER) as lines:
        yield lambda request: _answer(connection, lines, path, request)


def control_path(args: argparse.Namespace) -> Path:
    """The control socket of the server that the options name."""
    path: Path = args.control or args.data / config.CONTROL_SOCKET
    return path


@contextmanager
def connection_to(path: Path, patience: float | None) -> Iterator[socket.socket]:
    """Raises output.Exit."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(patience)
        try:
            connection.connect(str(path))
        except (FileNotFoundError, NotADirectoryError, ConnectionRefusedError) as error:
            raise output.Exit(
                output.NO_CONNECTION,
                f"{path}: no server runs there: name its data directory with --data, or its socket with --control",
            ) from error
        except PermissionError as error:
            raise output.Exit(
                output.DENIED, f"{path}: not allowed: be root or the user that runs the server, or be let in by a group"
            ) from error
        except OSError as error:
            raise output.Exit(output.NO_CONNECTION, f"{path}: {error.strerror or error}") from error
        yield connection


def _answer(
    connection: socket.socket, lines: Iterable[bytes], path: Path, request: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    with _understood(path):
        _send(connection, request)
        for line in lines:
            item = _item(line)
            last = bool(item.get("end"))
            yield item
            if last:
                return
    raise output.Exit(output.NO_CONNECTION, f"{path}: the server ended before it had answered")


def ask_lines(args: argparse.Namespace, request: dict[str, Any]) -> Iterator[bytes]:
    """As `ask`, each object as the line of JSON that it came in, without the last one, which has "end".

    A list of 50,000 takes longer to decode and to encode again than the server takes to make it.
    """
    path = control_path(args)
    with connection_to(path, PATIENCE) as connection, connection.makefile("rb", BUFFER) as lines, _understood(path):
        _send(connection, request)
        for line in lines:
            is_one_of_many = line.startswith(b'{"') and line.endswith(b"}\n") and not line.startswith(LAST)
            if not is_one_of_many and _item(line).get("end"):
                return
            yield line
        raise output.Exit(output.NO_CONNECTION, f"{path}: the server ended before it had answered")


def _send(connection: socket.socket, request: dict[str, Any]) -> None:
    with suppress(BrokenPipeError):  # it answered before it had read all: too long
        connection.sendall(json.dumps(request).encode() + b"\n")


def _item(line: bytes) -> dict[str, Any]:
    item: dict[str, Any] = msgspec.json.decode(line)  # many at a time: five times as fast as `json`
    if "error" in item:
        raise output.Exit(output.DENIED if item.get("denied") else output.FAILED, item["error"])
    return item


@contextmanager
def _understood(path: Path) -> Iterator[None]:
    """Says what is wrong with what answers there."""
    try:
        yield
    except OSError as error:
        raise output.Exit(output.NO_CONNECTION, f"{path}: the server does not answer: {error}") from error
    except (msgspec.DecodeError, UnicodeDecodeError, TypeError, AttributeError) as error:
        raise output.Exit(output.NO_CONNECTION, f"{path}: what answers there is no TapeTrackServer") from error
