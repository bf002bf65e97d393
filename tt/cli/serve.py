"""`tt serve`: the server, in the foreground, until SIGTERM or Ctrl-C.

The options and their help, units and defaults are generated from tt.config, so each is stated there alone; what the
command line does not have is listed under it, for the file and the environment.
Must not know what an option means.
"""

import argparse
import os
import textwrap
from pathlib import Path
from typing import Any

from tt import __version__, config
from tt.cli import output


def register(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `tt serve`."""
    text = "Run the server in the foreground; SIGTERM or Ctrl-C ends it, SIGHUP reads the configuration again."
    parser = commands.add_parser(
        "serve", help=text, description=text, epilog=_epilog(), formatter_class=_OptionsThenText
    )
    parser.add_argument("--version", action="version", version=f"tt {__version__}", help="Print the version and exit.")
    parser.add_argument("-c", "--config", type=Path, metavar="FILE", help="Read options from this TOML file.")
    add_flags(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Load the configuration and serve; returns the exit code."""
    try:
        loaded = config.load(args.config, os.environ, overrides(args))
    except config.ConfigError as error:
        raise output.Exit(output.USAGE, str(error)) from error
    from tt.serve import main  # noqa: PLC0415 - not for `tt serve --help`, nor for an error in the configuration

    return main(loaded)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The options that the command line has."""
    for name, option in config.OPTIONS.items():
        if option.flag:
            _add_flag(parser, name, option)


def overrides(args: argparse.Namespace) -> dict[str, Any]:
    """Those of them that were given."""
    given = {name: getattr(args, name) for name, option in config.OPTIONS.items() if option.flag}
    return {name: value for name, value in given.items() if value is not None}


def _add_flag(parser: argparse.ArgumentParser, name: str, option: config.Option) -> None:
    text = _describe(name, option).replace("%", "%%")
    flags = [option.short, config.flag(name)] if option.short else [config.flag(name)]
    if option.kind is config.SWITCH:
        # The command line can only turn the default round; what the file sets otherwise is set back in the file.
        turned = not config.default(name)
        flags = flags if turned else [config.flag(f"no_{name}")]
        text = text if turned else f"Turn this off: {text[0].lower()}{text[1:]}"
        parser.add_argument(*flags, dest=name, action="store_const", const=turned, help=text)
    elif option.kind.many:
        parser.add_argument(
            *flags, dest=name, action="append", metavar=option.kind.metavar, help=f"{text} May be repeated."
        )
    else:
        parser.add_argument(*flags, dest=name, metavar=option.kind.metavar, help=text)


def _describe(name: str, option: config.Option) -> str:
    return f"{option.help[0].upper()}{option.help[1:]} (default: {config.show(name, config.default(name))})."


class _OptionsThenText(argparse.HelpFormatter):
    """Keeps the lines of the epilog, whose options stand in a table of their own."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text if "\n" in text else super()._fill_text(text, width, indent)


def _epilog() -> str:
    lines = [
        "Every option above is also a key of FILE (table_size = 4096) and a variable of the environment",
        f"({config.ENVIRONMENT}TABLE_SIZE=4096); the command line overrides the environment, and that the file.",
        "Durations may be written 30s, 10m, 2h, 1d. In FILE and the environment alone:",
        "",
    ]
    for name, option in config.OPTIONS.items():
        if not option.flag:
            lines.append(f"  {name}")
            lines += textwrap.wrap(_describe(name, option), 90, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines)
