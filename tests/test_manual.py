"""The man pages and the completion, made of the parser of the commands, as man, mandoc and the shells read them."""

import argparse
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from docs_kit import parse, simple_commands
from process import TT, environment, need, plain_environment
from shells import offered

from tt import __version__, config
from tt.cli import completion, manual, manual_text, output, roff

WIDE = 5000  # columns: a paragraph is one line


class Made(NamedTuple):
    """What `tt manual` wrote."""

    share: Path

    def pages(self) -> list[Path]:
        return sorted(self.share.glob("man/*/*"))


def tt(place: Path, *words: object, **environ: str) -> str:
    return subprocess.run(
        [TT, *map(str, words)], env=environment(place, **environ), stdout=subprocess.PIPE, text=True, check=True
    ).stdout


def refused(place: Path, *words: str, **environ: str) -> tuple[int, str]:
    """The exit code and the message."""
    done = subprocess.run(
        [TT, *words], env=environment(place, **environ), capture_output=True, text=True, check=False
    )  # fmt: skip
    assert done.stdout == ""
    return done.returncode, done.stderr


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    place = tmp_path_factory.mktemp("manual")
    tt(place, "manual", place / "share", TT_DATA="/somewhere", SOURCE_DATE_EPOCH="86400")
    return Made(place / "share")


def shown(page: Path, width: int) -> tuple[str, str]:
    """What man shows of a page, and its warnings."""
    need("man")
    done = subprocess.run(
        ["man", "-l", "--warnings", "-E", "UTF-8", page], capture_output=True, text=True, check=True,
        env=plain_environment() | {"MANWIDTH": str(width), "LC_ALL": "C.UTF-8"},
    )  # fmt: skip
    return done.stdout, done.stderr


def below(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    yield parser
    for child in completion.children(parser).values():
        yield from below(child)


def plain(text: str) -> str:
    """A text of the parser as a page shows it."""
    return " ".join(roff.LITERAL.sub(lambda found: found[1] or found[2], text).split())


# ---- man pages ------------------------------------------------------------------------------------------------------


def test_there_is_a_page_for_each_command_and_each_program(made: Made) -> None:
    names = {"tt", "tt-serve", "TapeTrackServer", "TMSS10Ping"}
    names |= {f"tt-{name}" for name in completion.children(completion.parser_of(""))}
    assert {page.stem for page in made.pages()} == names
    assert {page.stem for page in made.pages() if page.suffix == ".8"} == {"tt-serve", "TapeTrackServer"}


def test_every_command_and_option_stands_in_its_page_with_its_help(made: Made) -> None:
    for name, parser in completion.children(completion.parser_of("")).items():
        (page,) = made.share.glob(f"man/*/tt-{name}.?")
        text, _ = shown(page, WIDE)
        lines = {" ".join(line.split()) for line in text.splitlines()}
        flat = " ".join(text.split())
        for one in below(parser):
            assert one.prog in flat
            assert plain(one.description or "") in flat
            for action in one._actions:
                for flag in action.option_strings:
                    assert re.search(rf"(^|[ |[]){re.escape(flag)}($|[] |,])", flat), (one.prog, flag)
                if not completion.is_command(action):
                    text = plain(roff.sentence(one._get_formatter()._expand_help(action)))
                    assert any(line.endswith(text) for line in lines), (one.prog, text)


def test_a_page_has_its_sections_in_their_order(made: Made) -> None:
    order = "NAME SYNOPSIS DESCRIPTION COMMANDS OPTIONS ENVIRONMENT FILES,EXIT STATUS,EXAMPLES,SEE ALSO"
    sections = [
        part for word in order.split(",") for part in ([word] if word in ("EXIT STATUS", "SEE ALSO") else word.split())
    ]
    for page in made.pages():
        found = re.findall(r"^([A-Z][A-Z ]+)$", shown(page, 80)[0], re.MULTILINE)
        assert found == [name for name in sections if name in found], page.name
        assert {"NAME", "SYNOPSIS", "DESCRIPTION", "OPTIONS", "EXIT STATUS", "SEE ALSO"} <= set(found), page.name


def test_neither_man_nor_mandoc_warns_of_a_page(made: Made) -> None:
    need("mandoc")
    lint = ["mandoc", "-T", "lint", "-W", "warning", *map(str, made.pages())]
    done = subprocess.run(lint, capture_output=True, text=True, env=plain_environment(), check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert {page.name: warnings for page in made.pages() if (warnings := shown(page, 80)[1])} == {}


def test_what_a_page_names_can_be_searched_for_and_copied(made: Made) -> None:
    for page in made.pages():
        _, *body = page.read_text("utf-8").splitlines()
        # A bare one is a typographic hyphen, though some distributions' man shows a minus.
        assert [line for line in body if re.search(r"(?<!\\)-", line)] == [], page.name
        assert "\N{HYPHEN}" not in shown(page, 60)[0], "no word is broken"


def test_the_index_of_man_has_a_line_for_each_name_of_a_page(made: Made) -> None:
    done = subprocess.run(
        ["lexgrog", *made.pages()], capture_output=True, text=True, env=plain_environment(), check=True
    )
    found = set(re.findall(r': "(\S+) - \S', done.stdout))
    assert found == {page.stem for page in made.pages()}


def test_a_page_depends_on_version_and_day_alone(made: Made) -> None:
    for page in made.pages():
        text = page.read_text("utf-8")
        assert f' 1970-01-02 "tt {__version__}" ' in text.splitlines()[0]
        assert "/somewhere" not in text


def test_every_command_has_examples_that_the_parser_understands() -> None:
    commands = completion.children(completion.parser_of(""))
    assert manual_text.EXAMPLES.keys() == {"", *commands}, "each has its examples in tt/cli/manual_text.py"
    for name, text in manual_text.EXAMPLES.items():
        found = [words for line in text.splitlines() if not line.startswith("#") for words in simple_commands(line)]
        own = [words for words in found if words[0] in completion.PROGRAMS]
        programs = [*filter(None, (completion.PROGRAMS[words[0]] or words[1] for words in own))]
        assert name in {"", *programs}, name
        for words in own:
            parse([*filter(None, [completion.PROGRAMS[words[0]]]), *words[1:]])


def nasty_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tt x",
        description='.so /etc/passwd\n\n\'br \\fB a--b ~^` "c" 100 %, \N{LATIN SMALL LETTER E WITH ACUTE}',
        epilog="Exit codes: 0 well; 1 .not.",
    )
    some = parser.add_mutually_exclusive_group(required=True)
    some.add_argument("--one", nargs=2, metavar=("A", "B"), help=".TH 100%% \\n(.g")
    some.add_argument("--two", action="store_true")
    parser.add_argument("--secret", help=argparse.SUPPRESS)
    parser.add_argument("--flag", action=argparse.BooleanOptionalAction, help="'tis")
    parser.add_argument("--mode", choices=["a", "b"], required=True)
    parser.add_argument("rest", nargs="*", help="The rest")
    return parser


def page_of(parser: argparse.ArgumentParser, summary: str, place: Path) -> str:
    """What man shows, without a warning, of the page of a sub-command x."""
    page = place / "tt-x.1"
    subject = manual.Page("x", parser, summary)
    root = manual.Page("", argparse.ArgumentParser(epilog="Exit codes: 0 fine; 1 not."), "")
    page.write_text(manual._page(subject, [root, subject]), "utf-8")
    text, warnings = shown(page, WIDE)
    assert warnings == ""
    return " ".join(text.split())


def test_a_page_shows_every_character_as_the_parser_has_it(tmp_path: Path) -> None:
    flat = page_of(nasty_parser(), "Do 'this'.", tmp_path)
    assert "tt-x - do 'this' " in flat
    assert "tt x [-h] (--one A B | --two) [--flag | --no-flag] --mode {a,b} [rest ...]" in flat
    assert '.so /etc/passwd \'br \\fB a--b ~^` "c" 100 %, \N{LATIN SMALL LETTER E WITH ACUTE} OPTIONS' in flat
    assert "--one A B .TH 100% \\n(.g." in flat
    assert "--flag, --no-flag 'tis." in flat
    assert " rest The rest. " in flat
    assert "EXIT STATUS 0 Well. 1 .not. " in flat
    assert "secret" not in flat


def test_what_all_actions_have_stands_once_behind_them(tmp_path: Path) -> None:
    parser = argparse.ArgumentParser(prog="tt x", add_help=False)
    parser.add_argument("--group", action="store_true", help="Of the group.")
    actions = parser.add_subparsers()
    for name in ("one", "two"):
        action = actions.add_parser(name, description=f"Do {name}.", add_help=False, epilog=f"Exit codes: 0 {name}.")
        action.add_argument("--same", help="Of both.")
        action.add_argument("--other", help=f"Of {name}.")
    assert (
        "COMMANDS tt x one Do one. --other OTHER Of one. Its exit status: 0 One. "
        "tt x two Do two. --other OTHER Of two. Its exit status: 0 Two. "
        "OPTIONS These are common to the commands above: --group Of the group. --same SAME Of both. "
        "EXIT STATUS 0 Fine. 1 Not. SEE ALSO"
    ) in page_of(parser, "X.", tmp_path)


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "man").touch()
    assert refused(tmp_path, "manual", str(tmp_path)) == (
        output.FAILED, f"tt: {tmp_path}/man/man1/tt.1: cannot be written: Not a directory\n",
    )  # fmt: skip


def test_a_day_that_is_none_is_named(tmp_path: Path) -> None:
    assert refused(tmp_path, "manual", str(tmp_path), SOURCE_DATE_EPOCH="today") == (
        output.USAGE, "tt: SOURCE_DATE_EPOCH is 'today': it must be a number of seconds since 1970, or unset\n",
    )  # fmt: skip


# ---- completion -----------------------------------------------------------------------------------------------------


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with a file and a folder."""
    folder = tmp_path / "place"
    (folder / "in a folder").mkdir(parents=True)
    (folder / "in a file").touch()
    return folder


@pytest.fixture
def script(tmp_path: Path, shell: str) -> Path:
    path = tmp_path / f"completion.{shell}"
    path.write_text(tt(tmp_path, "completion", shell))
    return path


@pytest.mark.parametrize("shell", completion.SHELLS)
def test_a_shell_completes_every_command_and_option(shell: str, script: Path, place: Path) -> None:
    parsers = list(below(completion.parser_of("")))
    found = offered(shell, [f"{one.prog} {end}" for one in parsers for end in ("", "--")], place, script=script)
    for number, one in enumerate(parsers):
        words, options = found[2 * number : 2 * number + 2]
        assert completion.children(one).keys() <= words, one.prog
        wanted = {flag for action in one._actions for flag in action.option_strings if flag.startswith("--")}
        assert wanted <= options, one.prog


LINES = {
    "tt baz": set(),
    "tt bpf load --mode ": {"auto", "native", "generic"},
    "tt user access set jsmith US01 ": {"none", "read", "write", "alter"},
    "tt serve --timeout 5 --log-format ": {*config.OPTIONS["log_format"].kind.metavar.split("|")},
    "TapeTrackServer --exempt ": {"loopback", "gateways"},
    "TapeTrackServer --log-f": {"--log-format"},
    "TMSS10Ping --ti": {"--timeout"},
    "tt backup --data ": {"in a folder"},
    "tt config check ": {"in a folder", "in a file"},
    "tt serve -c ": {"in a folder", "in a file"},
    "tt verify --json --file in": {"in a folder", "in a file"},
}


@pytest.mark.parametrize("shell", completion.SHELLS)
def test_a_shell_completes_words_files_and_folders(shell: str, script: Path, place: Path) -> None:
    found = offered(shell, list(LINES), place, script=script)
    # Where zsh looks for what it reads and writes:
    assert [one - {"lines", "offered"} for one in found] == list(LINES.values())


@pytest.mark.parametrize("shell", completion.SHELLS)
def test_a_shell_finds_the_completion_of_each_program_where_it_is_written(shell: str, made: Made, place: Path) -> None:
    lines = ["tt user acc", "TapeTrackServer --log-f", "TMSS10Ping --ti"]
    assert offered(shell, lines, place, share=made.share) == [{"access"}, {"--log-format"}, {"--timeout"}]


def test_without_shtab_one_line_says_what_to_install(tmp_path: Path) -> None:
    (tmp_path / "shtab.py").write_text("raise ImportError\n")
    assert refused(tmp_path, "completion", "bash", PYTHONPATH=str(tmp_path)) == (
        output.USAGE,
        "tt: completion needs the package shtab: pip install shtab, or install 'tapetrack[cli]'\n",
    )
