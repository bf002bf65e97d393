"""`tt bans report`: the time-outs of a while, as one page of HTML that needs nothing else.

It is made from the history that a running server holds, or from what `tt bans history --json` printed before.
The file is written whole or not at all.  Must not know how the page looks, nor how its figures are counted.
"""

import argparse
import os
import socket
import stat
import sys
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import msgspec

from tt.cli import output
from tt.cli.arguments import duration
from tt.cli.ask import add_server_options, ask
from tt.cli.report_figures import DAY, MINUTE, Entry, Window, figures
from tt.cli.report_page import page
from tt.keys import write_file

STDIO = Path("-")
LEAST, MOST = MINUTE, 1000 * DAY  # s of a window


def register(actions: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `tt bans report` to the actions of `tt bans`."""
    text = "Write a page about the time-outs of a while: when, why, what they spoke, from where, and who came again."
    report = actions.add_parser("report", help=text, description=text)
    report.add_argument(
        "-o", "--output", type=Path, metavar="FILE", required=True,
        help="The page, one file of HTML; one that is there is replaced. '-': standard output.",
    )  # fmt: skip
    report.add_argument(
        "--since", type=_since, metavar="TIME",
        help="How far back, as in 90m, 24h, 30d (default: 24h; with --from all that the file has).",
    )  # fmt: skip
    report.add_argument(
        "--from", dest="saved", type=Path, metavar="FILE",
        help="Ask no server, but read what 'tt bans history --json' printed; TIME counts back from its last time-out."
        " '-': standard input.",
    )  # fmt: skip
    report.add_argument("--name", metavar="TEXT", help="Whose time-outs they are, for the title (default: this host).")
    add_server_options(report)
    report.set_defaults(run=_report)


def _since(text: str) -> float:
    seconds = duration(text)
    if not LEAST <= seconds <= MOST:
        raise argparse.ArgumentTypeError(f"{text!r}: it must be {LEAST // MINUTE}m to {MOST // DAY}d")
    return seconds


def _report(args: argparse.Namespace) -> int:
    entries, window = _saved(args.saved, args.since) if args.saved else _held(args)
    figured = figures(entries, window)
    _write(args.output, page(figured, args.name or socket.gethostname()).encode())
    if args.output != STDIO:
        count, sources = figured.totals.timeouts, figured.totals.sources
        output.line(f"{args.output}: {count} time-out{'s' * (count != 1)} of {sources} source{'s' * (sources != 1)}")
    return output.OK


# ---- where the entries come from ------------------------------------------------------------------------------------


def _held(args: argparse.Namespace) -> tuple[list[Entry], Window]:
    """What the server holds of the window, which ends now."""
    begin = time.time() - (args.since or DAY)
    *items, last = ask(args, {"do": "bans.history", "since": begin})
    return msgspec.convert(items, list[Entry]), Window(begin, time.time(), last["lost"])


def _saved(path: Path, since: float | None) -> tuple[list[Entry], Window]:
    """What a file has, in any order and also twice, as files put together do; the window ends with the last."""
    try:
        text = sys.stdin.buffer.read() if path == STDIO else path.read_bytes()
    except OSError as error:
        words = f"{path}: cannot be read ({error.strerror}): name what 'tt bans history --json' printed"
        raise output.Exit(output.USAGE, words) from error
    found = {(entry.number, entry.at_s, entry.source): entry for entry in _entries(path, text.splitlines())}
    if not found:
        raise output.Exit(output.FAILED, f"{path}: no time-outs in it: save some with 'tt bans history --json'")
    times = [entry.at_s for entry in found.values()]
    end = max(times)
    length = end - min(times) if since is None else since
    return list(found.values()), Window(end - min(max(length, LEAST), MOST), end)


def _entries(path: Path, lines: Iterable[bytes]) -> Iterable[Entry]:
    decode = msgspec.json.Decoder(Entry).decode
    for number, line in enumerate(lines, 1):
        try:
            yield decode(line)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            words = f"{path}: line {number} is no time-out ({error}): give what 'tt bans history --json' printed"
            raise output.Exit(output.USAGE, words) from error


# ---- where the page goes --------------------------------------------------------------------------------------------


def _write(path: Path, data: bytes) -> None:
    """All of it, or nothing: a reader never sees half a page, and what was there stays where the disk is full."""
    if path == STDIO:
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
        return
    mode = 0o666 & ~_umask()
    try:
        with suppress(FileNotFoundError):
            there = path.lstat()
            if not stat.S_ISREG(there.st_mode):  # a device, a folder, a link: to replace it is never what is meant
                words = f"{path}: is no regular file, so it is not replaced: name another one, or - for standard output"
                raise output.Exit(output.USAGE, words)
            mode = stat.S_IMODE(there.st_mode)
        write_file(path, data, mode, replace=True)
    except OSError as error:
        words = f"{path}: cannot be written ({error.strerror}): name a file in a folder that is there and open to you"
        raise output.Exit(output.FAILED, words) from error


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
