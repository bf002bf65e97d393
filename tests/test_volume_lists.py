"""Lists of Volumes by page, histories, and the moves that are due."""

from typing import Any

import msgspec
import pytest
from catalog_kit import DAY, LIBR, NOON, RACK, TODAY, TOMORROW, VLT1, YESTERDAY, A, Desk
from store_kit import no_file_grows

from tt.catalog import volumes
from tt.catalog.messages import PAGE
from tt.catalog.model import Access, Volume
from tt.catalog.store import Change, StoreError
from tt.dispatch import OperationError

# ---- lists ----------------------------------------------------------------------------------------------------------


def listed(desk: Desk, user: str = "read", **asked: Any) -> list[str]:
    """The ids of all pages."""
    found: list[str] = []
    after = ""
    while True:
        page = desk.ask(user, "volume.list", after=after, **asked)
        found += [entry.name.removeprefix("US01.LTO.") for entry in page.entries]
        if not page.next:
            return found
        assert page.next > after
        after = page.next


@pytest.fixture
def shelf(desk: Desk) -> Desk:
    """Twelve Volumes of several kinds."""
    desk.put(
        *(Volume(f"US01.LTO.A{n}0", "LIBR") for n in range(4)),
        *(Volume(f"US01.LTO.B{n}0", "VLT1", target="LIBR", requested=int(NOON)) for n in range(2)),
        Volume("US01.LTO.C00", "RACK", target="VLT1", requested=5, flags="QU"),
        Volume("US01.LTO.D00", "RACK", move_date=TODAY, description="x", flags="Eh"),
        Volume("US01.DLT.A00", "LIBR"),
        Volume("US02.LTO.A00", "LIBR", target="LIBR", requested=5),
    )
    return desk


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        ({}, ["US01.DLT.A00", "A00", "A10", "A20", "A30", "B00", "B10", "C00", "D00"]),
        ({"scope": "US01"}, ["US01.DLT.A00", "A00", "A10", "A20", "A30", "B00", "B10", "C00", "D00"]),
        ({"scope": "US01.DLT"}, ["US01.DLT.A00"]),
        ({"scope": "US01.LTO.*10"}, ["A10", "B10"]),
        ({"scope": "US01.LTO.[AB]?0", "repository": VLT1}, ["B00", "B10"]),
        ({"scope": "US01.LTO.[!A]*"}, ["B00", "B10", "C00", "D00"]),
        ({"scope": "US01.LTO.A20"}, ["A20"]),
        ({"scope": "US01.LTO.A2"}, []),
        ({"repository": LIBR}, ["A00", "A10", "A20", "A30"]),
        ({"repository": LIBR, "scope": "US01.DLT"}, []),
        ({"target": VLT1}, ["C00"]),
        ({"target": LIBR, "repository": VLT1}, ["B00", "B10"]),
        ({"target": LIBR, "repository": "US01.DLT.LIBR"}, []),
        ({"moving": True}, ["B00", "B10", "C00"]),
        ({"moving": True, "repository": RACK}, ["C00"]),
        ({"moving": True, "scope": "US01.LTO.B1*"}, ["B10"]),
        ({"overdue": True}, ["C00"]),
        ({"flags": "UQ"}, ["C00"]),
        ({"flags": "dN"}, ["D00"]),
        ({"flags": "O"}, ["B00", "B10"]),
    ],
    ids=str,
)
@pytest.mark.parametrize("limit", [1, 3, PAGE])
def test_a_list_has_what_fits_all_that_is_asked_for_whatever_its_pages(
    shelf: Desk, asked: dict[str, Any], found: list[str], limit: int
) -> None:
    assert listed(shelf, limit=limit, **asked) == found


def test_a_list_of_all_has_the_customers_that_the_user_may_read(shelf: Desk) -> None:
    assert listed(shelf, "none") == []
    assert len(listed(shelf, "tapemaster")) == 10
    assert listed(shelf, "tapemaster", scope="US02") == ["US02.LTO.A00"]
    shelf.put(Access("none US*", 1), Access("none US02", 1))
    assert len(listed(shelf, "none", limit=2)) == 10
    assert shelf.code("read", "volume.list", scope="US02") == "not_found"
    assert shelf.code("read", "volume.list", repository="US02.LTO.LIBR") == "not_found"


def test_a_page_looks_at_four_times_its_limit_and_no_more(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    desk.put(*(Volume(f"US01.LTO.A{n:04}", "LIBR", flags="E" * (n == 99)) for n in range(100)))
    looked_at = []
    volumes_of = desk.store.volumes

    def counting(*arguments: Any, **options: Any) -> list[Volume]:
        looked_at.append(len(found := volumes_of(*arguments, **options)))
        return found

    monkeypatch.setattr(desk.store, "volumes", counting)
    page = desk.ask("read", "volume.list", flags="E", limit=10)
    assert (page.entries, page.next, sum(looked_at)) == ([], "US01.LTO.A0039", 40)
    assert listed(desk, flags="E", limit=10) == ["A0099"]


def test_who_pages_while_others_add_and_delete_sees_each_volume_that_stays_exactly_once(desk: Desk) -> None:
    stays = [f"US01.LTO.A{n:04}" for n in range(0, 600, 2)]
    goes = [f"US01.LTO.A{n:04}" for n in range(1, 600, 2)]
    desk.put(*(Volume(name, "LIBR") for name in stays + goes[::2]))
    seen: list[str] = []
    after = ""
    turns = 0
    while True:
        work = desk.begin("read", "volume.list", after=after, limit=250)
        while True:
            try:
                next(work)
            except StopIteration as end:
                page = end.value
                break
            turns += 1
            changes = [desk.begin("alter", "volume.add", volume=goes[2 * turns + 1], repository="LIBR")]
            changes.append(desk.begin("alter", "volume.delete", volume=goes[2 * turns]))
            for change in changes:
                desk.finish(change)
        seen += [entry.name for entry in page.entries]
        if not page.next:
            break
        after = page.next
    assert turns >= 3
    assert seen == sorted(set(seen))
    assert set(stays) <= set(seen)


WORK: dict[str, dict[str, Any]] = {"volume.list": {}, "volume.move_pending": {"dry_run": True}}


@pytest.mark.parametrize("operation", WORK)
def test_what_was_found_by_rights_that_are_taken_away_meanwhile_is_dropped(desk: Desk, operation: str) -> None:
    def level(new: int) -> None:
        desk.put(msgspec.structs.replace(desk.store.get(Access, "write US01"), level=new))

    def taken(**asked: Any) -> Any:
        level(2)
        work = desk.begin("write", operation, **WORK[operation], **asked)
        assert next(work) is None
        level(0)
        return work

    desk.put(*(Volume(f"US01.LTO.A{n:04}", "LIBR", flags="p") for n in range(700)))
    page = desk.finish(taken())
    assert (page.entries, page.next) == ([], "")
    with pytest.raises(OperationError, match="there is no Customer US01"):
        desk.finish(taken(scope="US01"))


def test_a_list_goes_on_where_the_rights_of_another_user_change(desk: Desk) -> None:
    desk.put(*(Volume(f"US01.LTO.A{n:04}", "LIBR") for n in range(3 * volumes.SLICE)))
    work = desk.begin("read", "volume.list")
    assert next(work) is None
    desk.put(msgspec.structs.replace(desk.store.get(Access, "write US01"), level=0))
    assert len(list(work)) == 3  # the rest of its slices, the last one empty


# ---- history --------------------------------------------------------------------------------------------------------


def test_a_history_is_paged_newest_first(desk: Desk) -> None:
    desk.ask("alter", "volume.add", volume=A, repository="LIBR")
    for n in range(12):
        desk.ask("write", "volume.update", volume=A, description=f"{n}")
    rows: list[Any] = []
    before = 0
    while True:
        page = desk.ask("read", "volume.history", volume=A, before=before, limit=5)
        rows += page.entries
        if not page.next:
            break
        before = page.next
    assert [row.changes.get("description") for row in rows[:2]] == [("10", "11"), ("9", "10")]
    assert [row.event for row in rows] == ["change"] * 12 + ["add"]
    assert [row.previous for row in rows] == [row.sequence for row in rows[1:]] + [0]
    assert {(row.user, row.interface, row.source, row.place) for row in rows[:-1]} == {
        ("write", "tests", "127.0.0.2", "LIBR")
    }


def test_a_row_of_another_record_is_no_place_to_go_on_from(desk: Desk) -> None:
    desk.volume()
    other = desk.volume("US02.LTO.A00001")
    page = desk.ask("read", "volume.history", volume=A, before=other.last)
    assert (page.entries, page.next) == ([], 0)


def test_a_long_history_is_given_in_slices(desk: Desk) -> None:
    for n in range(volumes.HISTORY_SLICE + 1):
        desk.volume(description=f"{n}")
    work = desk.begin("read", "volume.history", volume=A, limit=PAGE)
    assert next(work) is None
    assert len(desk.finish(work).entries) == volumes.HISTORY_SLICE + 1


# ---- the moves that are due -----------------------------------------------------------------------------------------


@pytest.fixture
def due(desk: Desk) -> Desk:
    """Volumes of which some are due."""
    desk.put(
        Volume("US01.LTO.DATE", "LIBR", move_date=TODAY),
        Volume("US01.LTO.EARLY", "LIBR", move_date=TOMORROW),
        Volume("US01.LTO.FLAG", "LIBR", flags="p"),
        Volume("US01.LTO.GOES", "LIBR", target="RACK", requested=5, flags="p", move_date=TODAY),
        Volume("US01.LTO.HELD", "LIBR", flags="lp"),
        Volume("US01.LTO.KEPT", "LIBR", flags="L", move_date=YESTERDAY),
        Volume("US01.LTO.LAST", "VLT1", flags="p"),
        Volume("US01.LTO.REST", "LIBR"),
        Volume("US02.LTO.FLAG", "LIBR", flags="p"),
    )
    return desk


DUE = [
    ("US01.LTO.DATE", "LIBR", "VLT1", ""),
    ("US01.LTO.FLAG", "LIBR", "VLT1", ""),
    ("US01.LTO.HELD", "LIBR", "VLT1", "has the move lock (flag l)"),
    ("US01.LTO.KEPT", "LIBR", "VLT1", "has the update lock (flag L): only tapemaster may move it"),
    ("US01.LTO.LAST", "VLT1", "", "VLT1 has no next Repository"),
]


def entries(page: Any) -> list[tuple[str, str, str, str]]:
    return [(entry.volume, entry.origin, entry.target, entry.problem) for entry in page.entries]


@pytest.mark.parametrize("scope", ["", "US01", "US01.LTO"])
def test_a_dry_run_says_what_would_move_and_moves_nothing(due: Desk, scope: str) -> None:
    before = due.store.sequence
    page = due.ask("write", "volume.move_pending", scope=scope, dry_run=True)
    assert entries(page) == DUE
    assert (page.next, page.sequence, page.hash, due.store.sequence) == ("", 0, b"", before)


def test_the_moves_that_are_due_are_started_once(due: Desk) -> None:
    page = due.ask("write", "volume.move_pending")
    assert entries(page) == DUE
    assert (page.sequence, page.hash) == (due.store.sequence, due.store.hash)
    assert due.state("US01.LTO.DATE") == ("LIBR", "VLT1", "", "DdM")
    assert due.state("US01.LTO.FLAG") == ("LIBR", "VLT1", "", "M")
    assert due.events("US01.LTO.DATE")[-1] == "move"
    assert due.store.get(Volume, "US02.LTO.FLAG").target == ""
    again = due.ask("write", "volume.move_pending")
    assert entries(again) == DUE[2:]
    assert (again.sequence, again.hash) == (0, b"")


def test_a_date_moves_a_volume_when_it_comes_and_no_more_once_it_has_arrived(due: Desk) -> None:
    due.now += DAY
    assert "US01.LTO.EARLY" in [entry[0] for entry in entries(due.ask("write", "volume.move_pending"))]
    due.ask("write", "volume.scan_in", volume="EARLY", repository=VLT1)
    due.now += DAY
    assert "US01.LTO.EARLY" not in [entry[0] for entry in entries(due.ask("write", "volume.move_pending"))]


def test_tapemaster_moves_what_is_under_the_update_lock(due: Desk) -> None:
    page = due.ask("tapemaster", "volume.move_pending")
    assert ("US01.LTO.KEPT", "LIBR", "VLT1", "") in entries(page)
    assert "US02.LTO.FLAG" in [entry[0] for entry in entries(page)]


def test_what_was_moved_by_another_since_it_was_found_due_is_left_alone(due: Desk) -> None:
    work = due.begin("write", "volume.move_pending")
    assert next(work) is None  # it has looked
    due.ask("alter", "volume.move", volume="US01.LTO.DATE", to="RACK")
    due.ask("alter", "volume.delete", volume="US01.LTO.FLAG")
    assert entries(due.finish(work)) == DUE[2:]
    assert due.state("US01.LTO.DATE")[1] == "RACK"


def test_who_has_lost_the_right_since_it_was_found_due_moves_nothing(due: Desk) -> None:
    work = due.begin("write", "volume.move_pending")
    assert next(work) is None
    due.put(msgspec.structs.replace(due.store.get(Access, "write US01"), level=1))
    assert entries(due.finish(work)) == []
    assert due.state("US01.LTO.DATE")[1] == ""


def test_moves_that_are_due_wait_for_the_commit_under_way(due: Desk) -> None:
    work = due.begin("write", "volume.move_pending")
    assert next(work) is None
    other = due.begin("alter", "volume.update", volume="US01.LTO.REST", description="x")
    due.store.turn()
    busy = due.store.busy
    assert busy is not None
    assert next(work) is busy
    due.finish(other)
    assert entries(due.finish(work)) == DUE


def test_others_are_served_between_the_slices_of_the_moves_that_are_due(desk: Desk) -> None:
    desk.put(*(Volume(f"US01.LTO.A{n:04}", "LIBR", flags="p") for n in range(2 * volumes.MOVES_A_SLICE)))
    work = desk.begin("write", "volume.move_pending")
    assert next(work) is None  # it has looked
    desk.wait(next(work))  # the first slice is moved
    assert next(work) is None
    assert desk.store.moving == volumes.MOVES_A_SLICE
    assert desk.ask("read", "volume.get", volume="US01.LTO.A0000").target == "VLT1"
    assert len(desk.finish(work).entries) == 2 * volumes.MOVES_A_SLICE


@pytest.mark.parametrize("failing", ["change", "commit"])
def test_the_moves_before_the_disk_failed_are_told_and_who_goes_on_is_told_the_error(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    def fail(*_: object) -> None:
        raise StoreError("the disk is full")

    most = volumes.MOVES_A_SLICE
    desk.put(*(Volume(f"US01.LTO.A{n:04}", "LIBR", flags="p") for n in range(2 * most)))
    work = desk.begin("write", "volume.move_pending")
    assert next(work) is None
    desk.wait(next(work))
    assert next(work) is None
    with no_file_grows() if failing == "commit" else monkeypatch.context() as patch:
        if patch is not None:
            patch.setattr(Change, "put", fail)
        page = desk.finish(work)
        assert [entry.volume for entry in page.entries] == [f"US01.LTO.A{n:04}" for n in range(most)]
        assert (page.next, page.sequence, page.hash) == (page.entries[-1].volume, desk.store.sequence, desk.store.hash)
        assert desk.store.moving == most
        assert desk.code("write", "volume.move_pending", after=page.next) == "storage"
    rest = desk.ask("write", "volume.move_pending", after=page.next)
    assert (len(rest.entries), rest.next, desk.store.moving) == (most, "", 2 * most)


def test_many_moves_that_are_due_come_in_pages(desk: Desk) -> None:
    desk.put(*(Volume(f"US01.LTO.A{n:04}", "LIBR", flags="p") for n in range(PAGE + volumes.SLICE + 50)))
    first = desk.ask("write", "volume.move_pending")
    assert first.next == f"US01.LTO.A{PAGE - 1:04}"
    second = desk.ask("write", "volume.move_pending", after=first.next)
    assert (len(first.entries), len(second.entries), second.next) == (PAGE, volumes.SLICE + 50, "")
    assert desk.store.moving == PAGE + volumes.SLICE + 50
