"""Reconciliation: what is correct, surplus and deficit; the Certificates kept; fifty thousand at once."""

import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import msgspec
import pytest
from catalog_kit import NOON, Desk

from tt.catalog import reconcile
from tt.catalog.messages import MAX_SCANNED, PAGE
from tt.catalog.model import Access, Certificate, Volume

LIBR, VLT1 = "US01.LTO.LIBR", "US01.LTO.VLT1"


@pytest.fixture
def desk(desk: Desk) -> Desk:
    desk.put(
        Volume("US01.LTO.A0", "LIBR"),
        Volume("US01.LTO.A1", "LIBR", target="VLT1", requested=5),
        Volume("US01.LTO.A2", "LIBR", target="VLT1", requested=5, flags="U"),
        Volume("US01.LTO.A3", "LIBR", target="VLT1", requested=5, flags="U"),
        Volume("US01.LTO.B0", "VLT1"),
        Volume("US01.LTO.B1", "VLT1", target="LIBR", requested=5, flags="U"),
        Volume("US01.DLT.A9", "LIBR"),
    )
    return desk


def test_a_repository_is_compared_with_what_was_scanned_there(desk: Desk) -> None:
    scanned = ["X9", "US01.LTO.A0", "A2", "A0", "B1", "B0"]
    answer = desk.ask("write", "reconcile", repository=LIBR, volumes=scanned)
    certificate = answer.certificate
    assert certificate.repository == LIBR
    assert (certificate.user, certificate.time, certificate.correct) == ("write", int(NOON), 1)
    assert certificate.surplus == ["X9", "A2", "B1", "B0"]  # in the order of the scans: as they stand on the shelf
    assert certificate.deficit == ["A1"]  # A3 is on its way
    assert (answer.sequence, answer.hash) == (desk.store.sequence, desk.store.hash)
    assert desk.ask("read", "certificate.get", id=certificate.id) == certificate
    row = desk.store.history(Certificate, certificate.id, 0, 10)[0]
    assert (row.event, row.user, row.changes["surplus"]) == ("reconcile", "write", (None, "X9 A2 B1 B0"))
    assert desk.volume("US01.LTO.A1").flags == ""


def test_nothing_scanned_is_all_deficit_and_all_scanned_is_correct(desk: Desk) -> None:
    nothing = desk.ask("write", "reconcile", repository=LIBR, volumes=[]).certificate
    assert (nothing.correct, nothing.surplus, nothing.deficit) == (0, [], ["A0", "A1"])
    everything = desk.ask("write", "reconcile", repository=LIBR, volumes=["A1", "A0"]).certificate
    assert (everything.correct, everything.surplus, everything.deficit) == (2, [], [])
    empty = desk.ask("write", "reconcile", repository="US01.LTO.RACK", volumes=[]).certificate
    assert (empty.correct, empty.surplus, empty.deficit) == (0, [], [])


def test_certificates_are_listed_newest_first_and_none_shares_its_name(desk: Desk) -> None:
    kept = [desk.ask("write", "reconcile", repository=LIBR, volumes=["X9"]).certificate.id for _ in range(3)]
    assert kept == [f"{LIBR} 20261123T120000.00000{n}Z" for n in range(3)]
    desk.ask("write", "reconcile", repository=VLT1, volumes=[])
    listed = desk.ask("read", "certificate.list", repository=LIBR).entries
    assert [entry.id for entry in listed] == kept[::-1]
    assert {(entry.correct, *entry.surplus, *entry.deficit) for entry in listed} == {(0,)}
    assert desk.ask("read", "certificate.list", repository="US01.LTO.RACK").entries == []


def test_a_list_of_certificates_has_a_limit(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reconcile, "PAGE", 2)
    for _ in range(3):
        desk.ask("write", "reconcile", repository=LIBR, volumes=[])
        desk.now += 1
    listed = desk.ask("read", "certificate.list", repository=LIBR).entries
    assert [entry.time for entry in listed] == [int(NOON) + 2, int(NOON) + 1]
    assert PAGE > 2


def test_who_loses_the_right_during_a_reconciliation_keeps_no_certificate(desk: Desk) -> None:
    work = desk.begin("write", "reconcile", repository=LIBR, volumes=["A0"])
    next(work)
    desk.put(msgspec.structs.replace(desk.store.get(Access, "write US01"), level=1))
    with pytest.raises(Exception, match="has no write right for Customer US01"):
        desk.finish(work)
    assert desk.store.certificates(LIBR, PAGE) == []


def test_who_may_not_reconcile_has_no_name_looked_at(desk: Desk) -> None:
    for names in ([5], [""] * (MAX_SCANNED + 1), 5):
        assert desk.code("none", "reconcile", repository=LIBR, volumes=names) == "not_found"
        assert desk.code("read", "reconcile", repository=LIBR, volumes=names) == "denied"


def test_what_is_surplus_and_deficit_is_found_in_slices(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reconcile, "SLICE", 1)
    scanned = ["X9", "X8", "X7", "A0"]
    steps = list(desk.begin("write", "reconcile", repository=LIBR, volumes=scanned))
    # Decoded, the scanned ones looked at, the expected ones read, surplus among the scanned, deficit of A0 and A1.
    assert steps == [None] * (1 + 4 + 1 + 4 + 2)


LIMITS: dict[tuple[str, str], tuple[list[Any], list[Any]]] = {
    ("reconcile", "repository"): ([LIBR], ["LIBR", "", "US01.LTO.libr"]),
    ("reconcile", "volumes"): (
        [[], ["A0"], ["US01.LTO.A0"], ["AA"] * MAX_SCANNED],
        [["A"], [""], ["a0"], ["US01.DLT.A9"], ["A0\n"], ["A0 A1"], ["AA"] * (MAX_SCANNED + 1)],
    ),
    ("certificate.get", "id"): (
        [f"{LIBR} 20261123T120000.000000Z"],
        ["", LIBR, f"{LIBR} 20261123T120000Z", f"{LIBR} 20261123T120000.000000Z ", "US01.LTO 20261123T120000.000000Z"],
    ),
    ("certificate.list", "repository"): ([LIBR], ["LIBR", ""]),
}
BASE: dict[str, dict[str, Any]] = {"reconcile": {"repository": LIBR, "volumes": []}}


@pytest.mark.parametrize(("operation", "field"), LIMITS, ids=map(" ".join, LIMITS))
def test_a_field_is_taken_at_its_limits_and_named_beyond_them(desk: Desk, operation: str, field: str) -> None:
    fitting, wrong = LIMITS[operation, field]
    base = BASE.get(operation, {})
    for value in fitting:
        assert desk.code("tapemaster", operation, **{**base, field: value}) in ("", "not_found")
    before = desk.store.sequence
    for value in wrong:
        code, message = desk.error("tapemaster", operation, **{**base, field: value})
        assert code == "invalid", (value, code, message)
        assert ": must be " in message
        assert len(message) < 250
    assert desk.store.sequence == before


@contextmanager
def without_collector() -> Iterator[None]:
    """No slice pays for looking through all that the tests before this one have left."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def test_fifty_thousand_are_reconciled_in_slices_and_one_more_is_too_many(desk: Desk) -> None:
    desk.put(*(Volume(f"US02.LTO.A{n:05}", "LIBR") for n in range(MAX_SCANNED)))
    scanned = [f"A{n:05}" for n in range(1, MAX_SCANNED)] + ["X9"]
    work = desk.begin("tapemaster", "reconcile", repository="US02.LTO.LIBR", volumes=scanned)
    steps, longest = 0, 0.0
    with without_collector():
        while True:
            start = time.thread_time()
            try:
                next(work)
            except StopIteration as end:
                answer = desk.finish(end.value)
                break
            steps += 1
            longest = max(longest, time.thread_time() - start)
    certificate = answer.certificate
    assert (certificate.correct, certificate.surplus, certificate.deficit) == (MAX_SCANNED - 1, ["X9"], ["A00000"])
    assert steps > MAX_SCANNED / 500
    assert longest < 0.1  # s of processor time: twenty times what a slice takes
    desk.put(Volume("US02.LTO.Z00000", "LIBR"))
    code, message = desk.error("tapemaster", "reconcile", repository="US02.LTO.LIBR", volumes=scanned)
    assert (code, message) == ("conflict", f"US02.LTO.LIBR has more than {MAX_SCANNED} Volumes: too many to reconcile")
