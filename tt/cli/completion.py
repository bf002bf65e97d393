"""`tt completion`: what bash, zsh or fish reads to complete the commands.

The scripts are made by shtab of the parser of the command line, so they offer the sub-commands, options and words that
there are; where an argument is a file or a folder, its name.  Nothing is asked of a server.
Must not know any single command.
"""

import argparse
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TypeGuard

from tt import cli
from tt.cli import output

# Each shell, and where it looks for the script of a program, below a folder like /usr/share.
SHELLS = {
    "bash": "bash-completion/completions/{}",
    "zsh": "zsh/site-functions/_{}",
    "fish": "fish/vendor_completions.d/{}.fish",
}
# Each program, and the sub-command that it is.
PROGRAMS = {"tt": "", "TapeTrackServer": "serve", "TMSS10Ping": "ping"}
FOLDERS = frozenset({"DIR"})  # metavars
FILES = frozenset({"FILE", "PATH", "PINNED_MAP"})
# A metavar like text|json or CIDR|loopback|gateways: in small letters stands what is written so.
WORD = re.compile(r"[a-z0-9-]+")


def register(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `tt completion`."""
    parser = commands.add_parser(
        "completion",
        help="Print the script with which a shell completes the commands.",
        description="Print the script with which a shell completes tt, TapeTrackServer and TMSS10Ping. In its "
        'start-up file: source <(tt completion bash); after compinit, eval "$(tt completion zsh)"; '
        "tt completion fish | source.",
    )
    parser.add_argument("shell", metavar="SHELL", choices=[*SHELLS], help=f"One of {', '.join(SHELLS)}.")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    make = _maker()
    for program in PROGRAMS:
        print(make(program, args.shell), flush=True)  # as it is, tabs and all: a shell reads it
    return output.OK


def files() -> Iterator[tuple[str, str]]:
    """The script of each program for each shell: the name of its file, below a folder like /usr/share, and its text."""
    make = _maker()
    for shell, name in SHELLS.items():
        for program in PROGRAMS:
            yield name.format(program), make(program, shell)


def _maker() -> Callable[[str, str], str]:
    """A function that makes the script of a program for a shell.  Raises output.Exit where shtab is missing."""
    try:
        import shtab  # noqa: PLC0415 - it is an extra, and no other command needs it
    except ImportError:
        raise output.Exit(
            output.USAGE, "completion needs the package shtab: pip install shtab, or install 'tapetrack[cli]'"
        ) from None

    def make(program: str, shell: str) -> str:
        parser = parser_of(PROGRAMS[program])
        parser.prog = program
        for action in arguments(parser):
            _hint(action, {"file": shtab.FILE, "folder": shtab.DIRECTORY})
        return str(shtab.complete(parser, shell))

    return make


def parser_of(command: str) -> argparse.ArgumentParser:
    """The parser of a sub-command; of all for ""."""
    parser = cli._parser([])
    return children(parser)[command] if command else parser


def is_command(action: argparse.Action) -> "TypeGuard[argparse._SubParsersAction[argparse.ArgumentParser]]":
    """Whether sub-commands stand for this argument."""
    return isinstance(action, argparse._SubParsersAction)


def children(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """The sub-commands of a parser, by their names; argparse has no public way to them."""
    return {name: child for action in parser._actions if is_command(action) for name, child in action.choices.items()}


def arguments(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """Every option and positional argument of a parser and of its sub-commands."""
    yield from parser._actions
    for child in children(parser).values():
        yield from arguments(child)


def _hint(action: argparse.Action, kinds: Mapping[str, object]) -> None:
    """Tell shtab what completes this argument."""
    metavar = str(action.metavar)
    if metavar in FOLDERS:
        action.complete = kinds["folder"]  # type: ignore[attr-defined]
    elif metavar in FILES or action.type is Path:
        action.complete = kinds["file"]  # type: ignore[attr-defined]
    elif action.choices is None and "|" in metavar:
        action.choices = [word for word in metavar.split("|") if WORD.fullmatch(word)] or None
