"""Reconciliation: a Repository is compared with what was scanned there, and the result is kept as a Certificate.

Correct is what is there and should be; surplus what was scanned and should not be there; deficit what should be there
and was not scanned.  A Volume that was scanned out is on its way, and should be there no more.  No Volume is changed.
Rules: one short function an operation.  A comparison is made in slices, so that Volumes may move during it: who counts
a Repository lets nothing in or out meanwhile.
Must not know how requests arrive.
"""

from collections.abc import Generator
from datetime import UTC, datetime
from itertools import islice
from typing import Annotated

import msgspec

from tt.catalog.messages import (
    MAX_SCANNED,
    PAGE,
    CertificateRecord,
    Certificates,
    OneCertificate,
    OneRepository,
    Reconciled,
)
from tt.catalog.model import Certificate, Invalid, Repository, check_name, own_id, parent
from tt.catalog.rights import Editor, Reader, Writer, acknowledged
from tt.catalog.volumes import slices, span
from tt.dispatch import OperationError
from tt.pending import Pending

SLICE = 500  # scanned names that are looked at before others are served
_TIME = "%Y%m%dT%H%M%S.%fZ"  # in the name of a Certificate
_decode = msgspec.msgpack.Decoder(Annotated[list[str], msgspec.Meta(max_length=MAX_SCANNED)]).decode


class Asked(msgspec.Struct, frozen=True, gc=False):
    """messages.Reconcile, with the names as they came: to make texts of them takes the right."""

    repository: str
    volumes: msgspec.Raw


def reconcile(at: Editor, asked: Asked) -> Generator[Pending | None, None, object]:
    here = at.record(Repository, asked.repository)
    scanned = yield from _ids(asked.volumes, parent(here.name))
    expected = yield from _expected(at, here)
    surplus = yield from _without(scanned, expected)
    deficit = yield from _without(expected, scanned)
    yield from at.store.idle()
    with at.writing() as writer:
        writer.permit("repository", here.name)
        certificate = Certificate(
            _new_name(writer, here), at.account.name, len(expected) - len(deficit), " ".join(surplus), " ".join(deficit)
        )
        written = writer.put(certificate, "reconcile")
    shown = _shown(certificate, surplus, deficit)
    return acknowledged([writer.change.pending], Reconciled(shown, written.sequence, written.hash))


def get_certificate(at: Reader, asked: OneCertificate) -> CertificateRecord:
    certificate = at.record(Certificate, asked.id)
    return _shown(certificate, certificate.surplus.split(), certificate.deficit.split())


def list_certificates(at: Reader, asked: OneRepository) -> Certificates:
    here = at.record(Repository, asked.repository)
    return Certificates([_shown(certificate, [], []) for certificate in at.store.certificates(here.name, PAGE)])


def _ids(volumes: msgspec.Raw, media: str) -> Generator[None, None, dict[str, None]]:
    """The ids in the order of the scans, each once.  Raises Invalid: too many, or no Volume of the Media type."""
    names = _texts(volumes)
    yield
    found: dict[str, None] = {}
    for start in range(0, len(names), SLICE):
        for name in names[start : start + SLICE]:
            full = check_name("volume", name if "." in name else f"{media}.{name}")
            if parent(full) != media:
                raise Invalid(f"volumes: must be of {media}, the Repository's Media type, not {full}")
            found[own_id(full)] = None
        yield
    return found


def _texts(volumes: msgspec.Raw) -> list[str]:
    """The names.  Too many of them are not even looked at.  Raises Invalid, msgspec.ValidationError."""
    try:
        names: list[str] = _decode(volumes)
    except msgspec.ValidationError as error:
        told = str(error)
        if "length" in told:  # else they are no texts
            raise Invalid(f"volumes: must be at most {MAX_SCANNED} names") from error
        told = told.partition(" - at `$")[0]
        raise msgspec.ValidationError(f"{told} - at `$.volumes`") from error
    return names


def _expected(at: Reader, here: Repository) -> Generator[None, None, dict[str, None]]:
    """The ids of the Volumes that should be there, by name."""
    found: dict[str, None] = {}
    spans = [span(f"{parent(here.name)}.")]
    position = ""
    for part in slices(at, spans, "", MAX_SCANNED + 1, repository=here.name):
        position = part.next
        found.update((own_id(volume.name), None) for volume in part.volumes if "U" not in volume.flags)
        yield
    if position or len(found) > MAX_SCANNED:
        raise OperationError("conflict", f"{here.name} has more than {MAX_SCANNED} Volumes: too many to reconcile")
    return found


def _without(names: dict[str, None], others: dict[str, None]) -> Generator[None, None, list[str]]:
    """Those of the names that are not among the others, in their order."""
    found: list[str] = []
    rest = iter(names)
    for _ in range(0, len(names), SLICE):
        found += [each for each in islice(rest, SLICE) if each not in others]
        yield
    return found


def _new_name(at: Writer, here: Repository) -> str:
    """The Repository and the time, which no other Certificate has: two in a microsecond are a microsecond apart."""
    microseconds = int(at.now * 1_000_000)
    while True:
        seconds, rest = divmod(microseconds, 1_000_000)
        name = f"{here.name} {datetime.fromtimestamp(seconds, UTC).replace(microsecond=rest).strftime(_TIME)}"
        if at.get(Certificate, name) is None:
            return name
        microseconds += 1


def _shown(certificate: Certificate, surplus: list[str], deficit: list[str]) -> CertificateRecord:
    repository, _, when = certificate.name.partition(" ")
    time = int(datetime.strptime(when, _TIME).replace(tzinfo=UTC).timestamp())
    return CertificateRecord(
        certificate.name, repository, time, certificate.user, certificate.correct, surplus, deficit
    )
