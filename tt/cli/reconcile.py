"""`tt reconcile`: a Repository compared with the barcodes that were scanned there, or with a tape library's own list.

Rules: the result is kept as a certificate, so a list that cannot be read whole is compared with nothing.  Only what
nobody can correct in the list, a tape library's tape without a readable label, is said and left out.
Must not know how the comparison is made: the server does that.
"""

import argparse
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from tt.catalog.messages import MAX_SCANNED, CertificateRecord
from tt.catalog.model import Invalid, check_name, own_id, parent
from tt.cli import output, server_option, table
from tt.cli.scan import add_repository, barcodes

# What `mtx status` prints, by the format strings of its source (mtx.c).
_CHANGER = re.compile(r"\s*Storage Changer .*:(\d+) Drives, (\d+) Slots \( *\d+ Import/Export \)\s*")
_ELEMENT = re.compile(
    r"\s*(?P<name>(?P<kind>Data Transfer|Storage) Element \d+)(?: IMPORT/EXPORT)?:(?P<full>Full|Empty)\b[^:]*"
    r"(?::VolumeTag\s*=\s*(?P<tag>.*?))?(?::AlternateVolumeTag.*)?\s*"
)
CLEANING = "CLN"  # a cleaning cartridge's label begins so (IBM's LTO label specification)
LISTED = {
    "CERTIFICATE": lambda certificate: certificate.id,
    "USER": lambda certificate: certificate.user,
    "CORRECT": lambda certificate: certificate.correct,
}


class ListError(Exception):
    """A list is not what it should be; the text names the line."""


class Element(NamedTuple):
    """A place in a tape library that holds a tape."""

    name: str  # Storage Element 3
    tag: str  # the tape's label; "": none that could be read


def register(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `tt reconcile`."""
    parser = commands.add_parser(
        "reconcile",
        help="Compare a Repository with what was scanned there.",
        description="Compare a Repository with what was scanned there, and keep the result as a certificate. Reads a "
        "barcode a line from standard input (A00001, or US01.LTO.A00001), or the output of 'mtx status'. Surplus is "
        "what was scanned and should not be there; deficit what should be there and was not scanned.",
        epilog="Exit codes: 0 all was correct; 1 there was a surplus or a deficit, or it failed; 2 wrong usage; "
        "3 no connection; 4 not allowed.",
    )
    add_repository(parser, "The Repository", required=False)
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--mtx",
        metavar="FILE",
        help="Take the tapes from the output of 'mtx status' (- for standard input): those in drives, slots and "
        f"import/export elements, but no cleaning cartridges, whose labels begin with {CLEANING}.",
    )
    what.add_argument("--list", action="store_true", help="List the Repository's certificates, the newest first.")
    what.add_argument("--show", metavar="ID", nargs="+", help="Show a certificate.")
    table.add_formats(parser)
    server_option.add(parser)
    parser.set_defaults(run=_run)


# ---- what was scanned -----------------------------------------------------------------------------------------------


def read_mtx(lines: Iterable[str]) -> Iterator[Element]:
    """The tapes in the output of `mtx status`, of one or more changers.  Raises ListError at the end, too."""
    announced, found = {"Data Transfer": 0, "Storage": 0}, {"Data Transfer": 0, "Storage": 0}
    for number, line in enumerate(lines, 1):
        if changer := _CHANGER.fullmatch(line):
            announced["Data Transfer"] += int(changer[1])
            announced["Storage"] += int(changer[2])
        elif element := _ELEMENT.fullmatch(line):
            found[element["kind"]] += 1
            if element["full"] == "Full":
                yield Element(element["name"], (element["tag"] or "").strip())  # mtx pads it
        elif line.strip():
            raise ListError(f"line {number} is none that 'mtx status' prints: {line.strip()[:60]!r}")
    if found != announced or not any(found.values()):  # cut off, it would show a deficit that is none
        raise ListError(
            "it is not the whole output of 'mtx status': "
            + ", ".join(f"{found[kind]} of {announced[kind]} {kind} Elements" for kind in found)
        )


def _from_mtx(args: argparse.Namespace) -> tuple[list[str], int]:
    """The labels, and how many could not be read."""
    try:
        text = sys.stdin.buffer.read() if args.mtx == "-" else Path(args.mtx).read_bytes()
        elements = list(read_mtx(text.decode("utf-8", "replace").splitlines()))
    except OSError as error:
        raise output.Exit(output.USAGE, f"{args.mtx}: {error.strerror}") from error
    except ListError as error:
        raise output.Exit(output.FAILED, f"{args.mtx}: {error}; nothing was compared") from error
    tags, unread = [], 0
    for element in elements:
        if element.tag.startswith(CLEANING):
            continue
        try:
            tags.append(_in_media(element.tag, parent(args.repository)))
        except Invalid as error:
            output.message(f"{element.name} holds a tape that is left out: {error}")
            unread += 1
    return tags, unread


def _from_stdin(args: argparse.Namespace) -> list[str]:
    if sys.stdin.isatty():
        output.message(f"scan what is in {args.repository}; Ctrl-D ends")
    scanned, unread = [], 0
    for number, text in barcodes(sys.stdin.buffer):
        try:
            scanned.append(_in_media(text, parent(args.repository)))
        except Invalid as error:
            output.message(f"line {number}: {error}")
            unread += 1
    if unread:
        raise output.Exit(output.FAILED, f"{unread} lines name no Volume: correct them first; nothing was compared")
    return scanned


def _in_media(text: str, media: str) -> str:
    """The id of a Volume of the Repository's Media type, from a barcode.  Raises Invalid."""
    name = check_name("volume", text if "." in text else f"{media}.{text}")
    if parent(name) != media:
        raise Invalid(f"volume: must be of {media}, the Repository's Media type, not {name}")
    return own_id(name)


# ---- what is printed ------------------------------------------------------------------------------------------------


def _run(args: argparse.Namespace) -> int:
    if args.show:
        with server_option.connected(args) as client:
            _print(args, client.certificate_get(" ".join(args.show)))
        return output.OK
    if args.repository is None:
        raise output.Exit(output.USAGE, "--repository is required; see 'tt reconcile --help'")
    if args.list:
        with server_option.connected(args) as client:
            certificates = client.certificate_list(args.repository).entries
        table.show(args, CertificateRecord, certificates, LISTED)
        return output.OK
    scanned, unread = _from_mtx(args) if args.mtx else (_from_stdin(args), 0)
    scanned = list(dict.fromkeys(scanned))
    if len(scanned) > MAX_SCANNED:
        raise output.Exit(output.FAILED, f"{len(scanned)} Volumes, where at most {MAX_SCANNED} can be compared at once")
    with server_option.connected(args) as client:
        certificate = client.reconcile(args.repository, scanned).certificate
    _print(args, certificate)
    return output.FAILED if unread or certificate.surplus or certificate.deficit else output.OK


def _print(args: argparse.Namespace, certificate: CertificateRecord) -> None:
    if args.json or args.csv:
        table.show(args, CertificateRecord, [certificate], {})
        return
    output.lines(f"surplus {name}" for name in certificate.surplus)
    output.lines(f"deficit {name}" for name in certificate.deficit)
    output.line(
        f"{certificate.correct} correct, {len(certificate.surplus)} surplus, {len(certificate.deficit)} deficit"
    )
    output.line(f"certificate {certificate.id}")
