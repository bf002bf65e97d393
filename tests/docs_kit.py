"""Documents as text for tests: tables, marked parts, and the commands in them, which the parser must understand."""

import argparse
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

from tt import cli, config

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")


def table(text: str, *columns: str) -> list[list[str]]:
    """The rows of the one table that has these columns, as their cells."""
    head = f"| {' | '.join(columns)} |\n|{' --- |' * len(columns)}\n"
    assert text.count(head) == 1, f"one table must have the columns {columns}"
    rows = re.match(r"(?:\|.*\n)*", text.partition(head)[2])
    return [[cell.strip() for cell in row[1:-1].split("|")] for row in rows[0].splitlines()] if rows else []


def code(cell: str) -> str:
    """The text of a cell, without the back-ticks."""
    return cell.strip("`")


def between(text: str, name: str) -> str:
    return text.partition(f"<!-- {name} -->\n")[2].partition("<!-- end -->")[0]


# ---- commands --------------------------------------------------------------------------------------------------------


def commands(text: str = README) -> Iterator[list[str]]:
    """The commands in the blocks of a document, as words."""
    for kind, block in re.findall(r"^```(sh|console)\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        for line in block.splitlines():
            if kind == "sh" or line.startswith("$ "):
                yield from simple_commands(line.removeprefix("$ "))


def simple_commands(line: str) -> Iterator[list[str]]:
    """Those of a shell's pipeline, without redirections."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.wordchars += "*[]:,=@%{}+"
    words: list[str] = []
    for word in [*lexer, ";"]:
        if set(word) <= set("();|&"):
            yield from [words[words[0] == "sudo" :]] if words else []
            words = []
        elif word in ("<", ">") or words[-1:] in (["<"], [">"]):
            words = [*words, word] if word in ("<", ">") else words[:-1]
        else:
            words.append(word)


def parse(argv: list[str]) -> argparse.Namespace:
    """What the real parser makes of a command line of `tt`; an option's value is read as a server would."""
    args = cli._parser(argv).parse_args(argv)
    if argv[0] == "serve":
        given = {name: getattr(args, name, None) for name in config.OPTIONS}
        config.load(None, {}, {name: value for name, value in given.items() if value is not None})
    return args


def understood(text: str = README) -> set[str]:
    """The names of a document's commands; fails where our parser or the Makefile has one that is not there."""
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    seen = set()
    for words in commands(text):
        command = Path(words[0]).name
        seen.add(command)
        if command == "make":
            assert words[1] in targets
            if words[1] == "serve" and len(words) > 2:
                parse(["serve", *shlex.split(words[2].removeprefix("ARGS="))])
        elif command in ("tt", "TapeTrackServer", "TMSS10Ping"):
            parse({"tt": [], "TapeTrackServer": ["serve"], "TMSS10Ping": ["ping"]}[command] + words[1:])
    for target in re.findall(r"`(?:sudo )?make (\w+)", text):
        assert target in targets
    return seen
