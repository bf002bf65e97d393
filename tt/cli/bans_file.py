"""`tt bans export` and `tt bans import`: time-outs as JSON lines, so that other servers and tools can have them.

    {"source": "192.0.2.1", "reason": "not_protocol", "since": "2026-01-31T12:00:00Z", "until": "2026-01-31T12:10:00Z",
     "before": 0, "looks": "SSH", "note": null}

`import` needs `source` and `until`, and takes lists of other tools, too: an address a line, blank lines and comments
behind "#" left out.  It asks of every line first what would become of it, so that a wrong one changes nothing.
Must not know how the server is asked, nor which sources and lengths are right: the server does.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import datetime
from itertools import islice
from typing import Any, NamedTuple

import msgspec

from tt.cli import output
from tt.cli.arguments import add_filters, duration
from tt.cli.ask import add_server_options, ask, connected

FIELDS = ("source", "reason", "since", "until", "before", "looks", "note")
TOGETHER = 500  # lines that are printed at once
BATCH = 64  # lines in one request: the server does them in one turn of its loop
BATCH_BYTES = 8 * 1024  # of JSON, of the 16 KiB that a request may have
MOST = 1 << 21  # lines
MAX_LINE = 4096  # bytes
MAX_NOTE = 200  # characters
SHOWN = 20  # wrong lines that are named
# What becomes of a line, and the words for it.
OUTCOMES = {
    "added": "imported", "kept": "timed out here for as long or longer", "ended": "over already",
    "exempt": "exempt here, or a proxy", "wrong": "wrong",
}  # fmt: skip
WRONG = "wrong"
BY_HAND = "operator"  # the reason of a time-out that was made by hand
NEVER = "preloaded"  # the reason of what is in the kernel map alone
Asked = Callable[[dict[str, Any]], Iterator[dict[str, Any]]]


class Line(NamedTuple):
    """One line that names a time-out: what the server is asked, or why it cannot be."""

    number: int  # counted from 1
    item: dict[str, Any]
    error: str | None  # of what is no time-out at all


class Written(msgspec.Struct):
    """A line of JSON, as far as it is read; what else it holds is let be."""

    source: str
    until: str
    reason: str = "operator"
    looks: str = "unknown"
    note: str | None = None


def register(actions: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `tt bans export` and `tt bans import` to the actions of `tt bans`."""
    text = "Print the time-outs that run as JSON lines, for 'tt bans import' on other servers, and for other tools."
    export = actions.add_parser("export", help=text, description=text)
    add_filters(export)
    add_server_options(export)
    export.set_defaults(run=_export)

    text = "Read time-outs from standard input: what 'tt bans export' printed, or an address a line."
    take = actions.add_parser(
        "import",
        help=text,
        description=f"{text} Each lasts until its own end; one that runs here for longer stays, and who is exempt here "
        "is left out. Where a line is wrong, nothing is done.",
    )
    take.add_argument(
        "--for", dest="seconds", type=duration, metavar="TIME",
        help="How long, for lines that hold an address alone, as in 90s, 10m, 2h, 30d.",
    )  # fmt: skip
    take.add_argument("--reason", metavar="TEXT", help="Why, for lines that hold an address alone.")
    take.add_argument("--skip-bad", action="store_true", help="Leave out lines that are wrong, and do the others.")
    take.add_argument("--dry-run", action="store_true", help="Change nothing, and say what would be done.")
    add_server_options(take)
    take.set_defaults(run=_import)


# ---- export ---------------------------------------------------------------------------------------------------------


def _export(args: argparse.Namespace) -> int:
    answer = ask(args, {"do": "bans.list", "network": args.network, "reason": args.reason})
    while some := list(islice(answer, TOGETHER)):
        running = [item for item in some if "end" not in item and item["reason"] != NEVER]
        output.lines(output.json_text({name: item[name] for name in FIELDS}) for item in running)
    return output.OK


# ---- import ---------------------------------------------------------------------------------------------------------


def _import(args: argparse.Namespace) -> int:
    lines = list(_read(sys.stdin.buffer, args.seconds, args.reason))
    with connected(args) as asked:
        would = _outcomes(asked, lines, dry_run=True)
        wrong = [(line.number, text) for line, (outcome, text) in zip(lines, would, strict=True) if outcome == WRONG]
        for number, text in wrong[:SHOWN]:
            output.message(f"line {number}: {text}")
        if wrong and not args.skip_bad:
            remedy = "mend them, or leave them out with --skip-bad"
            raise output.Exit(output.FAILED, f"nothing imported; lines that are wrong: {len(wrong)}: {remedy}")
        if not args.dry_run:
            would = _outcomes(asked, lines, dry_run=False)
    counts = Counter(outcome for outcome, _ in would)
    said = ", ".join(f"{counts[name]} {words}" for name, words in OUTCOMES.items() if counts[name])
    output.message(f"{'it would be: ' if args.dry_run else ''}{said or 'nothing to import'}")
    return output.FAILED if counts[WRONG] else output.OK


def _read(stream: Iterable[bytes], seconds: float | None, reason: str | None) -> Iterator[Line]:
    """The lines that name a time-out."""
    for number, raw in enumerate(stream, 1):
        if number > MOST:
            raise output.Exit(output.FAILED, f"over {MOST} lines: more than any server can hold; import a part of them")
        try:
            if item := _item(raw, seconds, reason):
                yield Line(number, item, None)
        except ValueError as error:
            yield Line(number, {}, str(error))


def _item(raw: bytes, seconds: float | None, reason: str | None) -> dict[str, Any]:
    """What the server is asked of a line; nothing where it is empty.  ValueError."""
    if len(raw) > MAX_LINE:
        raise ValueError(f"over {MAX_LINE} bytes")
    text = raw.decode().strip()
    if text.startswith("{"):
        return _of_json(text)
    source = text.partition("#")[0].strip()
    if source and seconds is None:
        raise ValueError(f"{source[:80]!r} does not say until when: give --for TIME")
    return {"source": source, "seconds": seconds, "note": reason} if source else {}


def _of_json(text: str) -> dict[str, Any]:
    try:
        written = msgspec.json.decode(text, type=Written)
    except msgspec.MsgspecError as error:
        raise ValueError(f"no time-out as 'tt bans export' prints it: {error}") from None
    try:
        until = datetime.fromisoformat(written.until)
    except ValueError:
        until = datetime.min  # noqa: DTZ901 - without a time zone, too
    if until.tzinfo is None:
        raise ValueError(
            f"'until' is {written.until[:80]!r}: it must be a time and its zone, as in 2026-01-31T12:00:00Z"
        )
    # This server has not seen the evidence: here it is the operator's word, who says whose it was.
    facts = [f"imported: {written.reason}", written.looks if written.looks != "unknown" else None, written.note]
    by_hand = written.reason == BY_HAND
    note = (written.note or "imported") if by_hand else ", ".join(fact for fact in facts if fact)
    return {"source": written.source, "until": until.timestamp(), "note": note[:MAX_NOTE]}


def _outcomes(asked: Asked, lines: Sequence[Line], *, dry_run: bool) -> list[tuple[str, str]]:
    """What becomes of each line, and of a wrong one why."""
    outcomes: list[tuple[str, str]] = []
    for batch in _batches(lines):
        request = {"do": "bans.import", "dry_run": dry_run, "items": [line.item for line in batch if not line.error]}
        ((answer),) = asked(request)
        said = iter(answer["outcomes"])
        outcomes += [(WRONG, line.error) if line.error else tuple(next(said)) for line in batch]
    return outcomes


def _batches(lines: Sequence[Line]) -> Iterator[list[Line]]:
    """As many together as one request may hold."""
    batch: list[Line] = []
    size = 0
    for line in lines:
        own = len(output.json_text(line.item))
        if batch and (len(batch) == BATCH or size + own > BATCH_BYTES):
            yield batch
            batch, size = [], 0
        batch.append(line)
        size += own
    if batch:
        yield batch
