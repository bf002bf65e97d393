"""The terminal of `tt top`: keys in, whole pictures out, and as it was before at every end.

By the control sequences of ECMA-48 and xterm, which every terminal of today knows, not by curses: a picture is plain
lines, which --once and the tests print, too, and goes out in one write, of the changed lines alone, as a synchronized
update.  So there is no flicker, no terminfo to be installed, and no second state beside the picture.
Rules: a line's text was escaped before it comes here; signals only wake `events`, which says what they were.
Must not know what is shown.
"""

import codecs
import os
import re
import select
import signal
import sys
import termios
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from types import TracebackType

from tt.cli import output

# Style -> parameters of SGR (ECMA-48, 8.3.117): with colours, and without (NO_COLOR, https://no-color.org).
STYLES: Mapping[str, tuple[str, str]] = {
    "": ("", ""),
    "bold": ("1", "1"),
    "dim": ("2", "2"),
    "name": ("1", "1"),
    "heading": ("7", "7"),
    "chosen": ("1;7", "1;7"),
    "chart": ("36", ""),
    "warn": ("33", "1"),
    "alarm": ("1;31", "1"),
    "ask": ("1;33", "1"),
}
# The other screen, no cursor, no wrapping; and back.
ENTER = "\x1b[?1049h\x1b[?25l\x1b[?7l\x1b[2J"
LEAVE = "\x1b[0m\x1b[?7h\x1b[?25h\x1b[?1049l"
BEGIN_UPDATE, END_UPDATE = "\x1b[?2026h", "\x1b[?2026l"  # to be shown at once; others ignore it
ENDS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
ESCAPE_WAIT = 0.05  # s: what follows the beginning of a sequence later than this is no part of it
WAKE = 0  # a byte into the pipe that is no signal's number
CODES = {
    "A": "up", "B": "down", "H": "home", "F": "end", "1~": "home", "4~": "end", "7~": "home", "8~": "end",
    "5~": "pageup", "6~": "pagedown",
}  # fmt: skip
CONTROLS = {
    "\r": "enter", "\n": "enter", "\x7f": "backspace", "\b": "backspace", "\x1b": "escape", "\x03": "ctrl-c",
    "\x0c": "ctrl-l", "\x15": "ctrl-u", "\x1a": "ctrl-z",
}  # fmt: skip
# A control sequence, of which what follows "\x1b[" or "\x1bO", or else one character.
KEY = re.compile(r"\x1b[\[O]([0-?]*[ -/]*[@-~])|(.)", re.DOTALL)
BEGUN = re.compile(rb"\x1b(?:[\[O][0-?]*[ -/]*)?\Z")  # the same where a read has cut it, as a packet of SSH may


class Terminal:
    """One on these two descriptors; use it in a `with` statement, in the main thread."""

    def __init__(self, keys: int, screen: int, *, colour: bool, encoding: str) -> None:
        self._colour = colour
        self._encoding = encoding
        self._in, self._out = keys, screen
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._shown: list[str] = []
        self.width, self.height = self._size()

    def __enter__(self) -> "Terminal":
        self._before = termios.tcgetattr(self._in)
        self._woken, self._wakes = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._wakeup_before = signal.set_wakeup_fd(self._wakes, warn_on_full_buffer=False)
        self._handlers = {number: signal.signal(number, _only_wake) for number in (*ENDS, signal.SIGWINCH)}
        try:
            self._take()
        except BaseException:
            self._give_back()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._give_back()

    def _give_back(self) -> None:
        """In any case, also where the terminal is gone."""
        self._release()
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup_before)
        os.close(self._woken)
        os.close(self._wakes)

    def _take(self) -> None:
        raw = termios.tcgetattr(self._in)
        raw[0] &= ~(termios.IXON | termios.ICRNL)  # Ctrl-S must not stop the picture
        raw[3] &= ~(termios.ICANON | termios.ECHO | termios.ISIG | termios.IEXTEN)
        raw[6][termios.VMIN], raw[6][termios.VTIME] = 1, 0
        termios.tcsetattr(self._in, termios.TCSANOW, raw)
        self._write(ENTER)
        self._shown = []

    def _release(self) -> None:
        with suppress(OSError):
            self._write(LEAVE)
        with suppress(termios.error):
            termios.tcsetattr(self._in, termios.TCSAFLUSH, self._before)

    def suspend(self) -> None:
        """Let the shell have the terminal until it lets this process go on (Ctrl-Z, fg)."""
        self._release()
        os.kill(0, signal.SIGTSTP)  # all of the job, as the terminal itself does it
        self._take()

    # ---- in ---------------------------------------------------------------------------------------------------------

    def wake(self) -> None:
        """Make `events` return; from any thread."""
        with suppress(OSError):  # full, of what wakes it, too; or this is over
            os.write(self._wakes, bytes([WAKE]))

    def events(self, seconds: float) -> Iterator[str | signal.Signals]:
        """Keys, and signals that are to end the command, that come within that time; returns early after the first.

        A signal SIGHUP stands for the end of the input, too.
        """
        ready, _, _ = select.select([self._in, self._woken], [], [], max(0, seconds))
        if self._woken in ready:
            with suppress(BlockingIOError):
                yield from [signal.Signals(number) for number in os.read(self._woken, 4096) if number in ENDS]
            self._measure()
        if self._in in ready:
            yield from self._keys()

    def _size(self) -> tuple[int, int]:
        """Columns and lines; those of the VT100 where the terminal does not know, as a serial line."""
        columns, lines = os.get_terminal_size(self._out)
        return columns or 80, lines or 24

    def _measure(self) -> None:
        size = self._size()
        if size != (self.width, self.height):
            self.width, self.height = size
            self.forget()

    def _keys(self) -> Iterator[str | signal.Signals]:
        data = self._read()
        while BEGUN.search(data) and select.select([self._in], [], [], ESCAPE_WAIT)[0] and (more := self._read()):
            data += more
        if not data:
            yield signal.SIGHUP
        for match in KEY.finditer(self._decoder.decode(data)):
            sequence, character = match.groups()
            if sequence:
                yield from [CODES[sequence]] if sequence in CODES else []
            elif character in CONTROLS:
                yield CONTROLS[character]
            elif character and character.isprintable():
                yield character

    def _read(self) -> bytes:
        try:
            return os.read(self._in, 4096)
        except OSError:  # the terminal is gone
            return b""

    # ---- out --------------------------------------------------------------------------------------------------------

    def forget(self) -> None:
        """Paint all at the next picture."""
        self._shown = []

    def paint(self, lines: Sequence[Sequence[tuple[str, str]]]) -> None:
        """Show these lines, each of spans (text, style) as wide as the screen."""
        texts = ["".join(self._styled(*span) for span in line) for line in lines]
        before = self._shown if len(self._shown) == len(texts) else [""] * len(texts)
        changed = [
            f"\x1b[{number};1H{text}"
            for number, (text, old) in enumerate(zip(texts, before, strict=True), 1)
            if text != old
        ]
        if changed:
            clear = "" if self._shown else "\x1b[2J"
            self._write(f"{BEGIN_UPDATE}{clear}{''.join(changed)}{END_UPDATE}")
        self._shown = texts

    def _styled(self, text: str, style: str) -> str:
        sgr = STYLES[style][0 if self._colour else 1]
        return f"\x1b[{sgr}m{text}\x1b[0m" if sgr and text else text

    def _write(self, text: str) -> None:
        data = text.encode(self._encoding, "backslashreplace")
        while data:
            data = data[os.write(self._out, data) :]


def _only_wake(_number: int, _frame: object) -> None:
    """The number itself comes through the wakeup descriptor."""


def check() -> None:
    """Raises output.Exit where there is no terminal to paint on."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise output.Exit(output.USAGE, "tt top needs a terminal for its input and output: --once prints one picture")
    if os.environ.get("TERM", "dumb") in ("dumb", ""):
        raise output.Exit(output.USAGE, "TERM says that this terminal cannot be painted on: --once prints one picture")
