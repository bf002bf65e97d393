"""Customers, Media types and Repositories: added, changed, listed; every field at its limits and beyond."""

from typing import Any

import msgspec
import pytest
from catalog_kit import Desk

from tt.catalog import structure
from tt.catalog.messages import CustomerRecord, MediaRecord, RepositoryRecord
from tt.catalog.model import REPOSITORY_KINDS, Access, Customer, Media, Repository
from tt.dispatch import OperationError


def test_a_whole_structure_is_added_and_listed(desk: Desk) -> None:
    desk.ask("tapemaster", "customer.add", customer="EU7", description="Europe")
    desk.ask("tapemaster", "media.add", media="EU7.LTO8", description="LTO-8", max_volumes=5)
    desk.ask("tapemaster", "repository.add", repository="EU7.LTO8.V", kind="vault", offsite=True, allow_deletes=True)
    done = desk.ask("tapemaster", "repository.add", repository="EU7.LTO8.L", description="robot", next="V")
    assert (done.sequence, done.hash) == (desk.store.sequence, desk.store.hash)
    assert CustomerRecord("EU7", "Europe") in desk.ask("tapemaster", "customer.list").entries
    assert desk.ask("tapemaster", "media.list", scope="EU7").entries == [MediaRecord("EU7.LTO8", "LTO-8", 5)]
    assert desk.ask("tapemaster", "repository.list", scope="EU7.LTO8").entries == [
        RepositoryRecord("EU7.LTO8.L", "robot", "rack", offsite=False, next="V", allow_deletes=False),
        RepositoryRecord("EU7.LTO8.V", "", "vault", offsite=True, next="", allow_deletes=True),
    ]


def test_a_change_leaves_what_it_does_not_name(desk: Desk) -> None:
    desk.ask("tapemaster", "customer.change", customer="US01", description="new")
    assert desk.store.get(Customer, "US01").description == "new"
    desk.ask("catalog", "media.change", media="US01.LTO", max_volumes=7)
    desk.ask("catalog", "media.change", media="US01.LTO", description="x")
    media = desk.store.get(Media, "US01.LTO")
    assert (media.description, media.max_volumes) == ("x", 7)
    before = desk.store.get(Repository, "US01.LTO.LIBR")
    desk.ask("catalog", "repository.change", repository="US01.LTO.LIBR", next="", offsite=True)
    after = desk.store.get(Repository, "US01.LTO.LIBR")
    assert after == msgspec.structs.replace(before, next="", offsite=True, last=after.last)
    desk.ask("catalog", "repository.change", repository="US01.LTO.LIBR")
    assert desk.store.get(Repository, "US01.LTO.LIBR").offsite


def test_letters_follow_when_a_repository_goes_offsite(desk: Desk) -> None:
    desk.volume()
    desk.ask("catalog", "repository.change", repository="US01.LTO.LIBR", offsite=True)
    assert desk.ask("read", "volume.get", volume="US01.LTO.A00001").flags == "O"


@pytest.mark.parametrize(
    ("operation", "arguments", "code", "message"),
    [
        ("customer.add", {"customer": "US01"}, "exists", "there is a Customer US01 already"),
        ("media.add", {"media": "US01.LTO"}, "exists", "there is a Media type US01.LTO already"),
        ("repository.add", {"repository": "US01.LTO.LIBR"}, "exists", "there is a Repository US01.LTO.LIBR already"),
        ("customer.change", {"customer": "US09"}, "not_found", "there is no Customer US09"),
        ("media.add", {"media": "US09.LTO"}, "not_found", "there is no Customer US09"),
        ("media.change", {"media": "US01.X"}, "not_found", "there is no Media type US01.X"),
        ("repository.add", {"repository": "US01.X.LIBR"}, "not_found", "there is no Media type US01.X"),
        ("repository.change", {"repository": "US01.LTO.X"}, "not_found", "there is no Repository US01.LTO.X"),
        ("repository.add", {"repository": "US01.LTO.A", "next": "X"}, "not_found", "there is no Repository US01.LTO.X"),
        (
            "repository.change", {"repository": "US01.LTO.LIBR", "next": "LIBR"}, "invalid",
            "next: must be another Repository than US01.LTO.LIBR itself",
        ),
        ("media.list", {"scope": "US09"}, "not_found", "there is no Customer US09"),
        ("repository.list", {"scope": "US01.X"}, "not_found", "there is no Media type US01.X"),
    ],
)  # fmt: skip
def test_what_is_there_or_not_there_is_named(
    desk: Desk, operation: str, arguments: dict[str, Any], code: str, message: str
) -> None:
    assert desk.error("tapemaster", operation, **arguments) == (code, message)


CUSTOMERS = (["A", "Z9Z9", "0"], ["", "US011", "us01", "US.1", "US-1", "US 1", "\u00dcS", "US1\n"])
MEDIA = (["US01.A", "US01.0000"], ["US01", "US01.", "US01.LTO88", "US01.lto", "US01.LTO.A", ".LTO"])
REPOSITORIES = (
    ["US01.LTO.A", "US01.LTO.0000"],
    ["US01.LTO", "US01.LTO.", "US01.LTO.LIBRA", "US01.LTO.li", "US01.LTO.A.B", "LIBR"],
)
OF_40 = (["", "x" * 40, "\u00e9\u65e5"], ["x" * 41, "a\tb", "\x7f"])
OF_20 = (["", "x" * 20], ["x" * 21, "a\nb"])
COUNTS = ([0, 1, structure.MAX_VOLUMES], [-1, structure.MAX_VOLUMES + 1])
KINDS = (list(REPOSITORY_KINDS), ["", "Rack", "shelf"])
NEXTS = (["", "VLT1"], ["VLT11", "vlt1", "US01.LTO.VLT1", "-"])
LIMITS: dict[tuple[str, str], tuple[list[Any], list[Any]]] = {
    ("customer.add", "customer"): CUSTOMERS,
    ("customer.add", "description"): OF_40,
    ("customer.change", "customer"): CUSTOMERS,
    ("customer.change", "description"): OF_40,
    ("media.add", "media"): MEDIA,
    ("media.add", "description"): OF_20,
    ("media.add", "max_volumes"): COUNTS,
    ("media.change", "media"): MEDIA,
    ("media.change", "description"): OF_20,
    ("media.change", "max_volumes"): COUNTS,
    ("repository.add", "repository"): REPOSITORIES,
    ("repository.add", "description"): OF_20,
    ("repository.add", "kind"): KINDS,
    ("repository.add", "next"): NEXTS,
    ("repository.change", "repository"): REPOSITORIES,
    ("repository.change", "description"): OF_20,
    ("repository.change", "kind"): KINDS,
    ("repository.change", "next"): NEXTS,
    ("media.list", "scope"): (["", "US01"], ["us01", "US01.LTO", "US*"]),
    ("repository.list", "scope"): (["", "US01", "US01.LTO"], ["us01", "US01.LTO.LIBR", "US*"]),
}
BASE = {
    "customer.add": {"customer": "NEW"},
    "customer.change": {"customer": "US01"},
    "media.add": {"media": "US01.NEW"},
    "media.change": {"media": "US01.LTO"},
    "repository.add": {"repository": "US01.LTO.NEW"},
    "repository.change": {"repository": "US01.LTO.LIBR"},
}


@pytest.mark.parametrize(("operation", "field"), LIMITS, ids=map(" ".join, LIMITS))
def test_a_field_is_taken_at_its_limits_and_named_beyond_them(desk: Desk, operation: str, field: str) -> None:
    fitting, wrong = LIMITS[operation, field]
    base = BASE.get(operation, {})
    for value in fitting:
        assert desk.code("tapemaster", operation, **{**base, field: value}) in ("", "not_found", "exists")
    before = desk.store.sequence
    for value in wrong:
        code, message = desk.error("tapemaster", operation, **{**base, field: value})
        assert code == "invalid", (value, code, message)
        assert ": must be " in message
        assert "\n" not in message
    assert desk.store.sequence == before


@pytest.mark.parametrize(
    ("limit", "operation", "names", "message"),
    [
        ("MAX_CUSTOMERS", "customer.add", ["A", "B"], "this server has 3 of Customer already, which is the most"),
        ("MAX_MEDIA", "media.add", ["US01.A", "US01.B"], "US01 has 3 of Media type already, which is the most"),
        (
            "MAX_REPOSITORIES", "repository.add", ["US01.DLT.A", "US01.DLT.B", "US01.DLT.C"],
            "US01.DLT has 3 of Repository already, which is the most",
        ),
    ],
)  # fmt: skip
def test_there_is_a_most_of_everything_kept_in_memory(  # noqa: PLR0917
    desk: Desk, monkeypatch: pytest.MonkeyPatch, limit: str, operation: str, names: list[str], message: str
) -> None:
    monkeypatch.setattr(structure, limit, 3)
    field = operation.partition(".")[0]
    errors = [desk.error("tapemaster", operation, **{field: name}) for name in names]
    assert errors == [("", "")] * (len(names) - 1) + [("full", message)]


def test_lists_have_what_the_user_may_read(desk: Desk) -> None:
    def names(user: str, operation: str) -> list[str]:
        return [entry.name for entry in desk.ask(user, operation).entries]

    assert names("none", "customer.list") == names("none", "media.list") == names("none", "repository.list") == []
    assert names("read", "customer.list") == ["US01"]
    assert names("read", "media.list") == ["US01.DLT", "US01.LTO"]
    assert "US02.LTO.LIBR" not in names("read", "repository.list")
    assert names("tapemaster", "media.list") == ["US01.DLT", "US01.LTO", "US02.LTO"]
    # An administrator manages Customers, so he sees which there are, and not what they have.
    assert names("administrator", "customer.list") == ["US01", "US02"]
    assert names("administrator", "repository.list") == []


def test_a_long_list_is_given_in_slices_and_without_what_is_forbidden_meanwhile(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(structure, "SLICE", 2)
    work = desk.begin("read", "repository.list")
    assert next(work) is None
    desk.put(msgspec.structs.replace(desk.store.get(Access, "read US01"), level=0))
    assert desk.finish(work).entries == []


def test_a_list_is_begun_anew_only_where_the_rights_of_its_own_user_change(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(structure, "SLICE", 2)
    work = desk.begin("read", "repository.list", scope="US01")
    assert next(work) is None
    desk.put(msgspec.structs.replace(desk.store.get(Access, "write US01"), level=0))
    assert len(list(work)) == 1  # the rest of its slices
    work = desk.begin("read", "repository.list", scope="US01")
    assert next(work) is None
    desk.put(msgspec.structs.replace(desk.store.get(Access, "read US01"), level=0))
    with pytest.raises(OperationError, match="there is no Customer US01"):
        desk.finish(work)
