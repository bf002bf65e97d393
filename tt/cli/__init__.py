"""The command line: one module a group of sub-commands.

A group has register(commands), which adds its parsers and names the function that runs each with
parser.set_defaults(run=run); run(args) returns an exit code.  Output and exit codes are in tt.cli.output.

Rule: only the group that is asked for is imported, so that `tt ping` does not load the server.
"""

import argparse
import sys
from importlib import import_module
from typing import NoReturn

from tt import __version__
from tt.cli import output

# The first word of the command line -> the module of its group, in the order of the help text.
GROUPS = {
    "serve": "tt.cli.serve",
    "config": "tt.cli.config",
    "ping": "tt.cli.ping",
    "known": "tt.cli.known",
    "bans": "tt.cli.bans",
    "exempt": "tt.cli.exempt",
    "status": "tt.cli.status",
    "top": "tt.cli.top",
    "bpf": "tt.cli.bpf",
    "customer": "tt.cli.customer",
    "media": "tt.cli.media",
    "repository": "tt.cli.repository",
    "volume": "tt.cli.volume",
    "scan": "tt.cli.scan",
    "reconcile": "tt.cli.reconcile",
    "move-pending": "tt.cli.movepending",
    "sync": "tt.cli.sync",
    "history": "tt.cli.history",
    "user": "tt.cli.user",
    "verify": "tt.cli.verify",
    "backup": "tt.cli.backup",
    "completion": "tt.cli.completion",
    "manual": "tt.cli.manual",
}


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, and which takes no abbreviated options, since they break with new ones."""

    def __init__(self, **options: object) -> None:
        super().__init__(allow_abbrev=False, **options)  # type: ignore[arg-type]

    def error(self, message: str) -> NoReturn:
        raise output.Exit(output.USAGE, f"{message}; see '{self.prog} --help'")


def main(argv: list[str] | None = None) -> int:
    """Run one command (without `argv`, that of the process) and return its exit code.

    Raises SystemExit(0) after --help and --version, as argparse does.
    """
    return output.guarded(lambda: _run(sys.argv[1:] if argv is None else argv))


def _run(argv: list[str]) -> int:
    args = _parser(argv).parse_args(argv)
    code: int = args.run(args)
    return code


def _parser(argv: list[str]) -> Parser:
    parser = Parser(
        prog="tt",
        description="The tape-tracking server and its tools.",
        epilog="Exit codes: 0 done; 1 failed or partly failed; 2 wrong usage or configuration; 3 no connection "
        "(refused, dropped or timed out); 4 the server was not accepted, the login failed, or it is not allowed.",
    )
    parser.add_argument("--version", action="version", version=f"tt {__version__}", help="Print the version and exit.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True, title="commands")
    # The parser itself has no option with a value, so a command can only be the first word.
    wanted = [argv[0]] if argv and argv[0] in GROUPS else list(GROUPS)
    for name in wanted:
        import_module(GROUPS[name]).register(commands)
    return parser
