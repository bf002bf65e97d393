"""`tt manual`: the man pages, and the completion for shells, as files for `make install` and for packages.

A page for tt(1) and for each sub-command, made of the parser of the command line; what that does not say is in
tt.cli.manual_text.  TapeTrackServer(8) and TMSS10Ping(1) are second names of two pages.
Rule: a page depends on the version and the day alone, not on who makes it.
Must not know any single command.
"""

import argparse
import os
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from tt import __version__, config
from tt.cli import completion, manual_text, output
from tt.cli.completion import children, is_command
from tt.cli.roff import bold, escape, example, in_one_piece, italic, item, paragraph, section, sentence

SERVICES = ("serve",)  # in section 8 of the manual; all others are in section 1
EXIT_CODES = re.compile(r"Exit codes: (.*)\.", re.DOTALL)
# In an epilog: a name that is indented, and below it, indented further, what it means.
DEFINED = re.compile(r"^  (\S.*)\n((?: {6}.*\n?)+)", re.MULTILINE)
Parser = argparse.ArgumentParser


def register(commands: "argparse._SubParsersAction[Parser]") -> None:
    """Add `tt manual`."""
    text = "Write the man pages, and the completion for shells, into a folder such as /usr/local/share."
    parser = commands.add_parser("manual", help=text, description=text)
    parser.add_argument("folder", metavar="DIR", type=Path, help="The folder; what is missing of it is made.")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    # Some options have a default that the environment sets, and say so in their help.
    for name in [name for name in os.environ if name.startswith(config.ENVIRONMENT)]:
        del os.environ[name]
    for name, text in (*pages(), *completion.files()):
        path = args.folder / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, "utf-8")
        except OSError as error:
            raise output.Exit(output.FAILED, f"{path}: cannot be written: {error.strerror or error}") from error
    return output.OK


# ---- which pages there are ------------------------------------------------------------------------------------------


class Page(NamedTuple):
    """What a page is about."""

    command: str  # the sub-command; "" for all of tt
    parser: Parser
    summary: str

    @property
    def names(self) -> list[str]:
        """As man(1) takes them: its own, then that of the program that does just this."""
        programs = [program for program, command in completion.PROGRAMS.items() if command == self.command]
        return [f"tt-{self.command}", *programs] if self.command else programs

    @property
    def number(self) -> int:
        """The section of the manual."""
        return 8 if self.command in SERVICES else 1


def pages() -> Iterator[tuple[str, str]]:
    """Every page: the name of its file, below a folder like /usr/share, and its text."""
    parser = completion.parser_of("")
    subjects = [Page("", parser, parser.description or "")]
    subjects += [Page(name, child, help_of(parser, name)) for name, child in children(parser).items()]
    for page in subjects:
        text = _page(page, subjects)
        for name in page.names:  # a copy: where pages are links, not every man finds what .so names
            yield f"man/man{page.number}/{name}.{page.number}", text


def help_of(parser: Parser, command: str) -> str:
    """What the parser's own help says about a sub-command."""
    choices = (shown for action in parser._actions if is_command(action) for shown in action._choices_actions)
    return next(shown.help or "" for shown in choices if shown.dest == command)


def _page(page: Page, subjects: Sequence[Page]) -> str:
    body = [line for one in _sections(page, subjects[0].parser) for line in one]
    named = set(re.findall(r"\btt ([a-z-]+)", "\n".join(body).replace(r"\-", "-")))
    others = [one for one in subjects if one is not page and (not page.command or one.command in {"", *named})]
    others.sort(key=lambda one: (one.number, one.names))
    body += section("SEE ALSO", [",\n".join(f"{bold(one.names[0])}({one.number})" for one in others)])
    title = f'.TH {escape(page.names[0].upper())} {page.number} {_day()} "tt {__version__}" "Tape tracking"'
    # Lines are neither filled up with spaces nor hyphenated: an option that is searched for must be in one piece.
    # Other macros set hyphenation back to the register HY.
    return "\n".join([title, ".nr HY 0", ".nh", ".ad l", *body, ""])


def _day() -> str:
    """The day of a build that is to be repeatable (reproducible-builds.org), or today.  Raises output.Exit."""
    text = os.environ.get("SOURCE_DATE_EPOCH") or str(int(time.time()))
    try:
        return f"{datetime.fromtimestamp(int(text), UTC):%Y-%m-%d}"
    except (ValueError, OverflowError, OSError):
        raise output.Exit(
            output.USAGE, f"SOURCE_DATE_EPOCH is {text!r}: it must be a number of seconds since 1970, or unset"
        ) from None


# ---- the sections of a page -----------------------------------------------------------------------------------------


def _sections(page: Page, root: Parser) -> Iterator[list[str]]:
    summary = page.summary[:1].lower() + page.summary[1:].rstrip(".")
    yield section("NAME", [rf"{', '.join(map(escape, page.names))} \-", *paragraph(summary)])
    below = list(_below(page.parser)) if page.command else []
    leaves = [one for one in below if not children(one)]
    yield section("SYNOPSIS", [*_synopses(page, leaves or [page.parser])])
    yield section("DESCRIPTION", paragraph(page.parser.description or ""))
    shared = set.intersection(*({_identity(action) for action in one._actions} for one in leaves)) if leaves else set()
    own = page.parser._actions
    if leaves:
        yield section("COMMANDS", [line for one in below for line in _command(one, shared)])
        own = [action for action in own if _identity(action) not in shared]
        own += [action for action in leaves[0]._actions if _identity(action) in shared]
    elif children(page.parser):
        yield section("COMMANDS", [line for name in children(page.parser)
                                   for line in item(bold(f"tt {name}"), help_of(page.parser, name))])  # fmt: skip
    options = [*_arguments(page.parser, own), *_epilog(page.parser)]
    yield section("OPTIONS", (["These are common to the commands above:"] if leaves else []) + options)
    yield section("ENVIRONMENT", _about(page, manual_text.ENVIRONMENT))
    yield section("FILES", _about(page, manual_text.FILES))
    yield section("EXIT STATUS", _exit_codes(page.parser) or _exit_codes(root))
    yield section("EXAMPLES", example(manual_text.EXAMPLES.get(page.command, "")))


def _below(parser: Parser) -> Iterator[Parser]:
    """All sub-commands below a parser, each before its own."""
    for child in children(parser).values():
        yield child
        yield from _below(child)


def _identity(action: argparse.Action) -> tuple[object, ...]:
    """Equal for an option that several sub-commands have."""
    return tuple(action.option_strings), str(action.metavar), action.help


def _command(parser: Parser, shared: set[tuple[object, ...]]) -> Iterator[str]:
    """A sub-command below that of the page, with the options that it does not share with all others there."""
    yield f".SS {escape(parser.prog)}"
    yield from paragraph(parser.description or "")
    if not children(parser):
        yield from _arguments(parser, [action for action in parser._actions if _identity(action) not in shared])
        yield from _epilog(parser)
        if codes := _exit_codes(parser):
            yield from (".PP", "Its exit status:", *codes)


def _about(page: Page, entries: Iterable[tuple[Sequence[str], str, str]]) -> list[str]:
    """Those of the entries that this page is to have, each once."""
    keys = {key for one in (page.parser, *_below(page.parser)) for action in one._actions
            for key in action.option_strings} | {page.command, *children(page.parser)}  # fmt: skip
    lines = {name: item(italic(name), text) for wanted, name, text in entries if keys.intersection(wanted)}
    return [line for one in lines.values() for line in one]


def _exit_codes(parser: Parser) -> list[str]:
    """From the end of the parser's help."""
    found = EXIT_CODES.search(parser.epilog or "")
    codes = re.split(r";\s+(?=\d )", found[1]) if found else []
    return [line for code in codes for line in item(bold(code[0]), sentence(code[2:]))]


def _epilog(parser: Parser) -> Iterator[str]:
    """The rest of the end of the parser's help, with what it defines as a list."""
    text = EXIT_CODES.sub("", parser.epilog or "")
    for number, part in enumerate(DEFINED.split(text)):  # in turn: text, a name, what it means
        if number % 3 == 1:
            tag = part
        elif number % 3 == 2:
            yield from item(bold(tag), part)
        elif part.strip():
            yield from (".PP", *paragraph(part))


# ---- the arguments of a command -------------------------------------------------------------------------------------


def _synopses(page: Page, parsers: Iterable[Parser]) -> Iterator[str]:
    for parser in parsers:
        yield from (f'.SY "{escape(parser.prog)}"', *_synopsis(parser), ".YS")
    for program in page.names[1:]:
        yield from (f'.SY "{escape(program)}"', r"[\fIOPTION\fR]\ ...", ".YS")


def _synopsis(parser: Parser) -> Iterator[str]:
    """The arguments, options first; those of which one alone may be given stand together."""
    together = {id(action): group for group in parser._mutually_exclusive_groups for action in group._group_actions}
    done: set[int] = set()
    for action in sorted(parser._actions, key=lambda one: not one.option_strings):
        group = together.get(id(action))
        if id(group) in done or action.help == argparse.SUPPRESS:
            continue
        if group is None:
            text = _usage(parser, action)
            yield f"[{text}]" if action.option_strings and not action.required else text
        else:
            done.add(id(group))
            choice = r"\ | ".join(_usage(parser, one) for one in group._group_actions)
            yield f"({choice})" if group.required else f"[{choice}]"


def _usage(parser: Parser, action: argparse.Action) -> str:
    if action.option_strings and action.nargs == 0:  # --this, or --this | --no-this
        return r"\ | ".join(map(bold, action.format_usage().split(" | ")))
    return in_one_piece(_forms(parser, action)[0])


def _forms(parser: Parser, action: argparse.Action) -> list[str]:
    """Every way to write an argument, with its value, as source."""
    formatter = parser._get_formatter()
    if is_command(action):
        return [rf"{italic(str(action.metavar))} \fR..."]
    if not action.option_strings:
        return [italic(formatter._format_args(action, formatter._get_default_metavar_for_positional(action)))]
    if action.nargs == 0:
        return [bold(flag) for flag in action.option_strings]
    value = italic(formatter._format_args(action, formatter._get_default_metavar_for_optional(action)))
    return [f"{bold(flag)} {value}" for flag in action.option_strings]


def _arguments(parser: Parser, actions: Iterable[argparse.Action]) -> Iterator[str]:
    for action in actions:
        if action.help != argparse.SUPPRESS and not is_command(action):
            formatter = parser._get_formatter()
            tag = ", ".join(map(in_one_piece, _forms(parser, action)))
            if not action.option_strings:  # without what says how many there may be
                metavar = formatter._metavar_formatter(action, formatter._get_default_metavar_for_positional(action))
                tag = italic(*metavar(1))
            yield from item(tag, sentence(formatter._expand_help(action) if action.help else ""))
