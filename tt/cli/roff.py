"""Plain text as man(7) source, which man and mandoc show alike.

Every character of a text stands for itself: the escapes are those of groff_char(7).  What stands between back-ticks is
set in bold, as is a command between quotes.
Must not know what a page says.
"""

import re
import textwrap
from collections.abc import Iterable

WIDTH = 76  # of a line of the source
ESCAPES = str.maketrans(
    {"\\": r"\(rs", "-": r"\-", "'": r"\(aq", "`": r"\(ga", "^": r"\(ha", "~": r"\(ti", '"': r"\(dq"}
)
LITERAL = re.compile(r"`([^`]+)`|'(tt [^']+)'")
SENTENCE = re.compile(r"(?<=[.?!]) (?=[A-Z])")


def escape(text: str) -> str:
    """The text in the current font."""
    return "".join(c if c.isascii() else f"\\[u{ord(c):04X}]" for c in text.translate(ESCAPES))


def bold(text: str) -> str:
    """What is typed as it is."""
    return rf"\fB{escape(text)}\fR"


def italic(text: str) -> str:
    """What something else is put for."""
    return rf"\fI{escape(text)}\fR"


def in_one_piece(source: str) -> str:
    """Source that stays on one line, unless that is too short for it: then it breaks behind a comma or a bar."""
    return re.sub(r"[,|](?=\S)", r"\g<0>\\:", source).replace(" ", r"\ ")


def sentence(text: str) -> str:
    """With a capital at its begin and a stop at its end: argparse and the exit codes have phrases."""
    text = text.strip()
    return text[:1].upper() + text[1:] + "." * (not text.endswith((".", "?", "!")))


def paragraph(text: str) -> list[str]:
    """The lines of a paragraph; a sentence begins a line, so that the formatter sets the right space before it."""
    return [line for one in SENTENCE.split(" ".join(text.split())) for line in _wrapped(_marked(one))]


def item(tag: str, text: str) -> list[str]:
    """A tag, which is source, and the text that explains it, beside it and below."""
    return [".TP", _guarded(tag), *paragraph(text)]


def example(text: str) -> list[str]:
    """Lines shown as they are, set in; none for no text."""
    lines = [_guarded(escape(line)) for line in text.splitlines()]
    return [".RS 4", ".EX", *lines, ".EE", ".RE"] if lines else []


def section(title: str, lines: Iterable[str]) -> list[str]:
    """A section; none where there is nothing in it."""
    body = list(lines)
    return [f".SH {escape(title)}", *body] if body else []


def _marked(text: str) -> str:
    """Escaped, with the literals in bold."""
    source, end = "", 0
    for found in LITERAL.finditer(text):
        source += escape(text[end : found.start()]) + bold(found[1] or found[2])
        end = found.end()
    return source + escape(text[end:])


def _wrapped(source: str) -> list[str]:
    return [_guarded(line) for line in textwrap.wrap(source, WIDTH, break_long_words=False, break_on_hyphens=False)]


def _guarded(line: str) -> str:
    """Not taken for a request, which begins with a dot; a quote, the other such character, is escaped already."""
    return rf"\&{line}" if line.startswith(".") else line
