"""`tt top`: a live picture of the server on this host, with keys to lift time-outs and exempt networks.

    server --(Asker, a thread)--> Sample --> Model --> frame() --> lines --> Terminal
                                  keys --> Keys --> Request --> Asker

Rules: a server that hangs or ends does not hang the keys; of its history only what is new or on the screen is asked.
Must not know how the picture looks, nor how a terminal is painted.
"""

import argparse
import locale
import os
import shutil
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from queue import Empty, SimpleQueue

import msgspec

from tt.cli import output, top_terminal
from tt.cli.ask import add_server_options, ask
from tt.cli.report_figures import Entry
from tt.cli.top_keys import QUIT, Keys, Request
from tt.cli.top_model import WINDOW, Model, Sample, asks_after
from tt.cli.top_terminal import Terminal
from tt.cli.top_view import LEAST, Screen, frame, plain

SHORTEST, LONGEST = 0.2, 60.0  # s between samples

Result = Sample | Exception | tuple[str, str]  # what came of asking; a tuple is for Keys.say


def register(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `tt top`."""
    text = "Watch the server on this host: rates, time-outs and what they spoke; lift a time-out or exempt a network."
    parser = commands.add_parser("top", help=text, description=f"{text} The key ? explains the keys.")
    parser.add_argument(
        "--interval", type=_interval, metavar="SECONDS", default=1.0, help="Time between samples (default: 1)."
    )
    parser.add_argument("--once", action="store_true", help="Print one picture, after two samples, and end.")
    parser.add_argument("--ascii", action="store_true", help="Print ASCII alone, as where the locale is not UTF-8.")
    add_server_options(parser)
    parser.set_defaults(run=run)


def _interval(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not SHORTEST <= seconds <= LONGEST:
        raise argparse.ArgumentTypeError(f"{text!r}: it must be a number of seconds from {SHORTEST} to {LONGEST:.0f}")
    return seconds


def run(args: argparse.Namespace) -> int:
    """Print one picture, or paint until somebody ends it."""
    unicode = not args.ascii and _is_utf8()
    if not args.once:
        top_terminal.check()
    first = sample(args, 0, None)  # here a server that is not there is an error like that of any command
    if args.once:
        _print_once(args, first, unicode=unicode)
        return output.OK
    streams, colour = (sys.stdin.fileno(), sys.stdout.fileno()), not os.environ.get("NO_COLOR")
    with Terminal(*streams, colour=colour, encoding="utf-8" if unicode else "ascii") as terminal:
        ended_by = Top(args, first, terminal, unicode=unicode).run()
    if ended_by is not None:  # as if it had never been caught, so that who sent it sees what it did
        signal.signal(ended_by, signal.SIG_DFL)
        signal.raise_signal(ended_by)
    return output.OK


def _is_utf8() -> bool:
    """By the variables, as setlocale(3) reads them: Python itself takes the C locale for UTF-8 (PEP 538, PEP 540)."""
    names = [os.environ.get(name, "") for name in ("LC_ALL", "LC_CTYPE", "LANG")]
    named = next((name for name in names if name), "")
    stdout = (sys.stdout.encoding or "").lower().replace("-", "")
    return stdout == "utf8" and "utf8" in (named or locale.getencoding()).lower().replace("-", "")


def sample(args: argparse.Namespace, seen: int, shown: int | None) -> Sample:
    """Ask for the status, and for the entries of the history that asks_after() says.  Raises output.Exit."""
    (status,) = ask(args, {"do": "status"})
    after = asks_after(status["history"]["begun"], seen, shown)
    *items, _ = ask(args, {"do": "bans.history", "after": after, "since": None})
    return Sample(time.monotonic(), status, [msgspec.convert(item, Entry) for item in items])


def _print_once(args: argparse.Namespace, first: Sample, *, unicode: bool) -> None:
    model = Model()
    model.add(first)
    time.sleep(args.interval)
    model.add(sample(args, model.seen, None))
    columns, lines = shutil.get_terminal_size(LEAST)
    screen = Screen(max(columns, LEAST[0]), max(lines, LEAST[1]), unicode=unicode)
    picture = frame(model, Keys(), screen, time.time())[:-1]  # the foot is about keys
    output.lines(plain(line) for line in picture)


class Asker:
    """Asks in a thread of its own; what comes of it is in `results`, and then `wake` is called."""

    def __init__(self, wake: Callable[[], None]) -> None:
        self.results: SimpleQueue[Result] = SimpleQueue()
        self._wake = wake
        self._jobs: SimpleQueue[Callable[[], Result]] = SimpleQueue()
        # Daemon: the end of the command does not wait for a server that does not answer.
        threading.Thread(target=self._work, name="tt-ask", daemon=True).start()

    def do(self, job: Callable[[], Result]) -> None:
        """After all that was to be done before."""
        self._jobs.put(job)

    def _work(self) -> None:
        while True:
            job = self._jobs.get()
            try:
                result = job()
            except Exception as error:  # noqa: BLE001 - for the thread that paints, which can say it
                result = error
            self.results.put(result)
            self._wake()


class Top:
    """The loop: samples and keys in, pictures out; all calls are of the main thread."""

    def __init__(self, args: argparse.Namespace, first: Sample, terminal: Terminal, *, unicode: bool) -> None:
        self._args = args
        self._terminal = terminal
        self._unicode = unicode
        self._keys = Keys()
        self._model = Model()
        self._model.add(first)
        self._seen = self._model.seen
        self._asker = Asker(terminal.wake)
        self._asking = False  # for a sample
        self._next = time.monotonic() + args.interval
        self._waiting: deque[Sample | None] = deque(maxlen=int(WINDOW / args.interval))  # while paused; None: missed

    def run(self) -> signal.Signals | None:
        """Until a key or the signal that is returned ends it."""
        while True:
            self._paint()
            until = self._next if not self._asking else time.monotonic() + LONGEST
            for event in self._terminal.events(until - time.monotonic()):
                if isinstance(event, signal.Signals):
                    return event
                if self._press(event):
                    return None
            self._take_results()
            if not self._keys.paused:
                self._show_waiting()
            if not self._asking and time.monotonic() >= self._next:
                self._ask_sample()

    def _paint(self) -> None:
        screen = Screen(self._terminal.width, self._terminal.height, self._unicode)
        self._terminal.paint(frame(self._model, self._keys, screen, time.time()))

    def _press(self, key: str) -> bool:
        """Whether it ends the command."""
        if key == "ctrl-z":
            self._terminal.suspend()
        if key in ("ctrl-l", "ctrl-z"):
            self._terminal.forget()
            return False
        request = self._keys.press(key, self._model)
        if request is QUIT:
            return True
        if request is not None:
            self._asker.do(lambda: _done(self._args, request))
        return False

    # ---- the server -------------------------------------------------------------------------------------------------

    def _ask_sample(self) -> None:
        self._asking = True
        self._next = max(self._next + self._args.interval, time.monotonic())
        seen, shown = self._seen, self._oldest_shown()
        self._asker.do(lambda: sample(self._args, seen, shown))

    def _oldest_shown(self) -> int | None:
        entries, lines = self._model.latest(self._keys.filter), self._terminal.height
        first = self._keys.first_shown(entries, lines)
        return min((entry.number for entry in entries[first : first + lines]), default=None)

    def _take_results(self) -> None:
        while True:
            try:
                result = self._asker.results.get_nowait()
            except Empty:
                return
            match result:
                case Sample():
                    self._asking, self._keys.failure = False, ""
                    self._seen = max((entry.number for entry in result.entries), default=self._seen)
                    self._waiting.append(result)
                case output.Exit():
                    self._asking, self._keys.failure = False, f"asking again: {result}"
                    self._next = time.monotonic() + self._args.interval
                    self._waiting.append(None)
                case Exception():
                    raise result
                case text, style:
                    self._keys.say(text, style)
                    self._next = time.monotonic()  # what it did is to be seen at once

    def _show_waiting(self) -> None:
        while self._waiting:
            result = self._waiting.popleft()
            if result is None:
                self._model.miss()
            else:
                self._model.add(result)


def _done(args: argparse.Namespace, request: Request) -> tuple[str, str]:
    """Have it done; what to say about it, and its style."""
    try:
        (answer,) = ask(args, dict(request))
    except output.Exit as error:
        return str(error), "alarm"
    if request["do"] == "exempt.add":
        words = f"{answer['network']} is exempt" if answer["added"] else f"{answer['network']} was exempt already"
        done = f"{words}, {answer['lifted']:,} time-outs lifted" if answer["lifted"] else words
        return "; ".join([done, *answer["caveats"]]), "warn" if answer["caveats"] else "bold"
    if others := answer.get("others"):
        return f"{request['source']} is still dropped by an entry of {others} that this server did not write", "alarm"
    if not answer["removed"]:
        return f"{request['source']} was not timed out any more", "bold"
    return f"the time-out of {request['source']} is lifted", "bold"
