"""-S USER:PASSWORD@SERVER: which server a command asks, and as whom.

    -S jsmith:-hackme@host        the password is what stands behind "-"
    -S batch:/etc/tt/batch@host   it is the first line of that file
    -S jsmith:@host:5001          it is asked on the terminal; so does jsmith@host
    TT_SERVER                     is taken without -S

Rules: nothing is sent before the whole text is understood; no message shows a password.
Must not know what is asked of the server.
"""

import argparse
import getpass
import os
import random
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, TypeVar

from tt import known_servers
from tt.catalog.model import Invalid, check
from tt.cli import output
from tt.cli.known import server_key
from tt.client import Client, RequestFailed

VARIABLE = "TT_SERVER"
LITERAL = "-"  # begins a password that stands there itself
MAX_LINE = 1024  # bytes read of a password's file
BUSY_FOR = 10.0  # s for which a login is tried again where the server has too many at once
BUSY_PAUSE = 0.1, 1.0  # s between two tries, at random: who was told so together must not come again together
FORM = "USER:PASSWORD@SERVER[:PORT]"


R = TypeVar("R")


class Server(NamedTuple):
    """What -S says."""

    user: str
    password: str
    host: str
    port: int


def add(parser: argparse.ArgumentParser) -> None:
    """Add -S and --key."""
    parser.add_argument(
        "-S", dest="server", metavar=FORM,
        help=f"The server and the user. PASSWORD is the name of a file that holds it, or {LITERAL} and the password "
        f"itself, or empty to be asked for it (default: the variable {VARIABLE}).",
    )  # fmt: skip
    parser.add_argument(
        "--key", type=server_key,
        help="The server's public key, as its file server.pub holds it (default: the known servers are asked).",
    )  # fmt: skip
    parser.set_defaults(program=parser.prog)


@contextmanager
def connected(args: argparse.Namespace, server: Server | None = None, *, once: bool = False) -> Iterator[Client]:
    """A client that has logged in, as -S says or as `named` has said before.  Raises output.Exit, and as the client.

    `once`: also with a password that is to be used once, to set another.
    """
    server = server or named(args)  # the password before the connection: the server waits for nobody to type
    with Client(server.host, server.port, key=args.key, name=args.program) as client:
        done = while_busy(lambda: client.login(server.user, server.password))
        if done.must_change_password and not once:
            raise output.Exit(
                output.DENIED,
                f"the password of {server.user} is to be used once, to set another: run 'tt user password' with it; "
                f"when it is lost, 'tt user reset {server.user} --data DIR' on the server's host makes a new one",
            )
        yield client


def while_busy(log_in: Callable[[], R]) -> R:
    """What it gives, tried again for BUSY_FOR while the server answers "busy".  Raises as `log_in`."""
    end = time.monotonic() + BUSY_FOR
    while True:
        pause = random.uniform(*BUSY_PAUSE)  # noqa: S311 - no secret
        try:
            return log_in()
        except RequestFailed as error:
            if error.code != "busy" or time.monotonic() + pause > end:
                raise
        time.sleep(pause)


def named(args: argparse.Namespace) -> Server:
    """What -S or its variable says, with the password read.  Raises output.Exit."""
    where, text = ("-S", args.server) if args.server is not None else (VARIABLE, os.environ.get(VARIABLE, ""))
    if not text:
        raise output.Exit(output.USAGE, f"no server: give it with -S {FORM}, or in the variable {VARIABLE}")
    try:
        server = parse(text)
    except ValueError as error:
        raise output.Exit(output.USAGE, f"{where}: {error}") from error
    return server._replace(password=read_password(server.password, f"Password of {server.user} on {server.host}: "))


def parse(text: str) -> Server:
    """Take the text of -S apart, and the password as it stands there.  Raises ValueError, which does not show it."""
    account, at, address = text.rpartition("@")  # the last one: a password may have more of them
    if not at:
        raise ValueError(f"it must be written {FORM}, with an '@'")
    user, _, password = account.partition(":")
    try:
        check("user", user)
        host, port = known_servers.parse_address(address)
    except Invalid as error:
        raise ValueError(f"{error}; it must be written {FORM}") from error
    return Server(user, password, host, known_servers.DEFAULT_PORT if port is None else port)


def read_password(given: str, prompt: str) -> str:
    """The password that "-literal", a file's name, or "" for the terminal stands for.  Raises output.Exit."""
    if given.startswith(LITERAL):
        return given.removeprefix(LITERAL)
    return _of_file(Path(given)) if given else _asked(prompt)


def _of_file(path: Path) -> str:
    try:
        with path.open("rb") as file:
            line = file.readline(MAX_LINE)
        password = line.decode().rstrip("\r\n")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        # A name without a folder may be a password whose '-' was forgotten: mails of cron must not have it.
        name = str(path) if path != Path(path.name) else "the password's file"
        raise output.Exit(
            output.USAGE, f"{name}: cannot be read ({why}): a password itself is written with '{LITERAL}' before it"
        ) from error
    if not password:
        raise output.Exit(output.USAGE, f"{path}: its first line, which is to be the password, is empty")
    return password


def _asked(prompt: str) -> str:
    try:
        with open("/dev/tty", "rb"):
            pass
    except OSError as error:  # getpass would read it from stdin then, and show it
        raise output.Exit(
            output.USAGE, f"there is no terminal to ask for the password: give a file's name in -S {FORM}"
        ) from error
    try:
        return getpass.getpass(prompt)
    except EOFError as error:
        sys.stderr.write("\n")
        raise output.Exit(output.USAGE, "no password was given") from error
