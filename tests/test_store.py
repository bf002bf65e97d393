"""tt/catalog/store.py: what was acknowledged is there, and what failed has not happened."""

import hashlib
import itertools
import os
import random
import signal
import sqlite3
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path

import pytest
from msgspec.structs import replace
from store_kit import (
    AUTHOR,
    LOAD,
    MEDIA,
    NOON,
    ONE,
    THREE,
    TWO,
    altered,
    filled,
    holds,
    no_file_grows,
    run_with_syncs_that_fail,
    settle,
    write,
)

from tt.catalog import schema, store
from tt.catalog.chain import START
from tt.catalog.model import Access, Certificate, Customer, Media, Repository, User, Volume
from tt.catalog.store import Change, Store, StoreError


def all_of(opened: Store) -> tuple[object, ...]:
    """What a reader can see."""
    volumes = opened.volumes("", "~", limit=1_000_000)
    moving = opened.volumes("", "~", moving=True, limit=1_000_000)
    kept = [opened.all(kind) for kind in (Customer, Media, Repository, User, Access)]
    kept.append([opened.get(Certificate, one.name) for one in opened.certificates(f"{MEDIA}.VLT1", 9)])
    gets = [opened.get(Volume, name) for name in (ONE, TWO, THREE)]
    return opened.sequence, opened.hash, opened.count(), opened.moving, volumes, moving, kept, gets


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "tapetrack.db"


@pytest.fixture
def catalogue(path: Path) -> Iterator[Store]:
    opened = filled(path)
    yield opened
    opened.close()


# ---- changes and commits --------------------------------------------------------------------------------------------


def test_readers_see_a_change_when_it_is_on_disk_and_other_changes_at_once(catalogue: Store) -> None:
    before = all_of(catalogue)
    first = altered(catalogue, ONE, "move", target="VLT2", requested=5)
    with catalogue.change(AUTHOR) as second:
        assert second.get(Volume, ONE).target == "VLT2"
        assert second.sequence == first.sequence
        second.put(replace(second.get(Volume, ONE), target="", requested=0), "cancel")
        assert second.get(Volume, ONE).last == second.sequence == first.sequence + 1
    write(catalogue, Volume(THREE, "VLT1"))
    assert all_of(catalogue) == before
    assert first.pending is second.pending
    assert not first.pending.done
    catalogue.turn()
    assert catalogue.busy is first.pending
    assert all_of(catalogue)[:4] == before[:4]
    settle(catalogue)
    assert first.pending.done
    assert first.pending.error is None
    assert catalogue.get(Volume, ONE) == replace(before[-1][0], last=second.sequence)
    assert (catalogue.sequence, catalogue.count(MEDIA), catalogue.moving) == (second.sequence + 1, 3, 0)
    assert catalogue.commits == 2


def test_all_is_there_again_after_a_restart(path: Path) -> None:
    opened = filled(path)
    write(opened, User("jo", password="hash", administrator=True), Access("jo US*", 2, True))
    write(opened, Certificate(f"{MEDIA}.VLT1 20261123T101500.000001Z", "jo", 1, "A00009", "A00001 A00002"))
    write(opened, Repository(f"{MEDIA}.OUT", kind="transport", offsite=True, next="VLT2", allow_deletes=True))
    altered(opened, TWO, "move", target="VLT2", requested=5, flags="EL", move_date="2026-12-24", scanned="VLT1")
    settle(opened)
    before = all_of(opened)
    opened.close()
    assert os.listdir(path.parent) == [path.name]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    again = Store(path)
    assert all_of(again) == before
    assert type(again.all(User)[0].administrator) is bool
    again.close()
    assert holds(path).records == before[0] - 1  # each was added by a row, and one changed by another


def test_an_empty_catalogue_has_no_history(path: Path) -> None:
    opened = Store(path)
    assert (opened.sequence, opened.hash, opened.count(), opened.all(Customer)) == (0, START, 0, [])
    assert opened.volumes("", "~", limit=9) == opened.volumes("", "~", repository=f"{MEDIA}.VLT1", limit=9) == []
    opened.close()
    assert holds(path).head == (0, START)


@pytest.mark.parametrize("alone", [True, False], ids=["alone", "behind another change of the group"])
def test_an_exception_takes_a_change_of_several_records_back_and_no_other(catalogue: Store, alone: bool) -> None:
    before = all_of(catalogue)
    kept = None if alone else altered(catalogue, TWO, description="new")
    with pytest.raises(ZeroDivisionError), catalogue.change(AUTHOR) as change:  # noqa: PT012 - it is about the block
        change.put(Volume(THREE, "VLT1"), "add")
        change.put(replace(change.get(Volume, ONE), target="VLT2", requested=5), "move")
        change.delete(change.get(Volume, TWO), "delete")
        change.put(Customer("US02"), "add")
        assert (change.count(MEDIA), change.get(Volume, TWO), change.sequence) == (2, None, before[0] + 4 + (not alone))
        1 / 0  # noqa: B018
    with catalogue.change(AUTHOR) as change:
        assert change.sequence == before[0] + (not alone)
        assert change.get(Volume, TWO).description == ("two" if alone else "new")
        assert change.get(Volume, THREE) is change.get(Customer, "US02") is None
        assert change.count(MEDIA) == 2
    settle(catalogue)
    if kept is None:
        assert all_of(catalogue) == before
    else:
        assert kept.pending.error is None
        assert (catalogue.sequence, catalogue.hash) == (kept.sequence, kept.hash)
    assert holds(catalogue.path).head == (catalogue.sequence, catalogue.hash)


def test_an_answer_that_changes_nothing_waits_for_what_it_may_have_read(catalogue: Store) -> None:
    with catalogue.change(AUTHOR) as idle:
        idle.get(Volume, ONE)
    assert idle.pending.done
    written = altered(catalogue, ONE, description="x")
    with catalogue.change(AUTHOR) as reads:
        reads.get(Volume, ONE)
    assert reads.pending is written.pending
    settle(catalogue)


def test_a_record_that_others_have_changed_since_it_was_read_is_not_written(catalogue: Store) -> None:
    stale = catalogue.get(Volume, ONE)
    altered(catalogue, ONE, description="theirs")
    for record in (
        replace(stale, description="mine"),
        replace(stale, row=0),
        Volume(ONE, "VLT2"),
        Volume(THREE, "VLT1", row=9),
    ):
        with pytest.raises(ValueError, match="as this change sees it"):
            write(catalogue, record)
    with pytest.raises(ValueError, match="as this change sees it"), catalogue.change(AUTHOR) as change:
        change.delete(stale, "delete")
    with pytest.raises(ValueError, match="no such Media type"):
        write(catalogue, Volume("US01.DLT.A00001", "VLT1"))
    settle(catalogue)
    assert catalogue.get(Volume, ONE).description == "theirs"
    assert catalogue.count() == 2


def test_nothing_is_written_during_a_commit_nor_in_two_changes_at_once(catalogue: Store) -> None:
    altered(catalogue, ONE, description="x")
    catalogue.turn()
    with pytest.raises(RuntimeError):
        catalogue.change(AUTHOR)
    settle(catalogue)
    with catalogue.change(AUTHOR), pytest.raises(RuntimeError):
        catalogue.change(AUTHOR)


def test_who_waited_for_a_commit_writes_into_the_next_group_with_all_others_of_that_turn(catalogue: Store) -> None:
    told: list[Change] = []
    first = altered(catalogue, ONE, description="1")
    catalogue.turn()
    for number in (2, 3):
        catalogue.busy.when_done(lambda number=number: told.append(altered(catalogue, ONE, description=f"{number}")))
    while not told:
        catalogue.turn()
    assert catalogue.busy is None
    told.append(altered(catalogue, ONE, description="4"))
    settle(catalogue)
    assert [change.sequence for change in told] == [first.sequence + 1, first.sequence + 2, first.sequence + 3]
    assert {change.pending for change in told} == {told[0].pending}
    assert told[0].pending.done
    assert catalogue.get(Volume, ONE).description == "4"
    assert catalogue.commits == 3


# ---- history --------------------------------------------------------------------------------------------------------


def test_history_tells_who_when_where_and_what_newest_first(catalogue: Store) -> None:
    moved = altered(catalogue, ONE, "move", target="VLT2", requested=5, move_date="2026-12-24")
    altered(catalogue, TWO, description="between")
    scanned = altered(catalogue, ONE, "scan_in", current="VLT2", target="", scanned="VLT2", requested=0, flags="C")
    seen = altered(catalogue, ONE, "scan_in")
    settle(catalogue)
    rows = catalogue.history(Volume, ONE, 0, 10)
    assert [(row.sequence, row.event, row.place, row.changes) for row in rows] == [
        (seen.sequence, "scan_in", "VLT2", {}),
        (
            scanned.sequence,
            "scan_in",
            "VLT1",
            {
                "current": ("VLT1", "VLT2"),
                "target": ("VLT2", ""),
                "scanned": ("", "VLT2"),
                "flags": ("", "C"),
                "requested": (5, 0),
            },
        ),
        (
            moved.sequence,
            "move",
            "VLT1",
            {"target": ("", "VLT2"), "requested": (0, 5), "move_date": ("", "2026-12-24")},
        ),
        (5, "add", "VLT1", {"current": (None, "VLT1")}),
    ]
    assert {(row.name, row.time, row.user, row.interface, row.source) for row in rows} == {
        (ONE, int(NOON * 1_000_000), *AUTHOR)
    }
    assert [row.previous for row in rows] == [row.sequence for row in rows[1:]] + [0]
    assert rows[0].hash == seen.hash
    # By pages; what is no row of this record leads nowhere.
    assert catalogue.history(Volume, ONE, 0, 2) == rows[:2]
    assert catalogue.history(Volume, ONE, rows[1].sequence, 9) == rows[2:]
    assert catalogue.history(Volume, ONE, rows[-1].sequence, 9) == []
    assert catalogue.history(Volume, ONE, 6, 9) == catalogue.history(Volume, THREE, 0, 9) == []
    assert catalogue.history(Repository, f"{MEDIA}.VLT1", 0, 9)[0].changes == {"kind": (None, "rack")}


def test_a_deleted_record_keeps_its_history_and_a_new_one_of_its_name_goes_on_with_it(catalogue: Store) -> None:
    write(catalogue, Access("jo US01", 2))
    with catalogue.change(AUTHOR) as change:
        change.delete(change.get(Volume, TWO), "delete")
        change.delete(change.get(Access, "jo US01"), "delete")
    settle(catalogue)
    assert (catalogue.get(Volume, TWO), catalogue.count(MEDIA), catalogue.all(Access)) == (None, 1, [])
    assert [row.event for row in catalogue.history(Volume, TWO, 0, 9)] == ["delete", "add"]
    assert catalogue.history(Volume, TWO, 0, 1)[0].changes == {"current": ("VLT1", None), "description": ("two", None)}
    write(catalogue, Volume(TWO, "VLT2"))
    settle(catalogue)
    rows = catalogue.history(Volume, TWO, 0, 9)
    assert [(row.event, row.place) for row in rows] == [("add", "VLT2"), ("delete", "VLT1"), ("add", "VLT1")]
    assert rows[0].previous == rows[1].sequence
    assert catalogue.history(Access, "jo US01", 0, 9)[0].name == "access jo US01"
    assert catalogue.count(MEDIA) == 2
    assert holds(catalogue.path).records == 7  # with the end of the access entry


def test_of_passwords_only_fingerprints_stand_in_the_history(catalogue: Store) -> None:
    write(catalogue, User("jo", password="first-hash"))
    with catalogue.change(AUTHOR) as change:
        change.put(replace(change.get(User, "jo"), password="second-hash", disabled=True), "change")
    with catalogue.change(AUTHOR) as change:
        change.delete(change.get(User, "jo"), "delete")
    settle(catalogue)
    rows = catalogue.history(User, "jo", 0, 9)
    first, second = (hashlib.sha256(text).hexdigest()[:16] for text in (b"first-hash", b"second-hash"))
    assert [row.changes for row in rows] == [
        {"password": (second, None), "disabled": (True, None)},
        {"password": (first, second), "disabled": (False, True)},
        {"password": (None, first)},
    ]
    with closing(sqlite3.connect(catalogue.path)) as file:
        assert not [row for row in file.execute("SELECT * FROM history") if "hash" in repr(row[:-1])]
    assert holds(catalogue.path)


@pytest.mark.parametrize(
    "statement", ["UPDATE history SET place = 'X'", "DELETE FROM history", "DELETE FROM history WHERE sequence = 6"]
)
def test_the_database_itself_refuses_to_change_history(catalogue: Store, statement: str) -> None:
    with (
        closing(sqlite3.connect(catalogue.path)) as file,
        pytest.raises(sqlite3.IntegrityError, match="history is never"),
    ):
        file.execute(statement)


# ---- what is read ---------------------------------------------------------------------------------------------------


def test_lists_of_the_structure_are_sorted_and_take_a_prefix(catalogue: Store) -> None:
    assert [one.name for one in catalogue.all(Repository, f"{MEDIA}.")] == [f"{MEDIA}.VLT1", f"{MEDIA}.VLT2"]
    write(catalogue, Repository(f"{MEDIA}.AAAA"), Media("US01.DLT"), Customer("US010"), Repository("US01.DLT.VLT1"))
    settle(catalogue)
    names = [f"{MEDIA}.AAAA", f"{MEDIA}.VLT1", f"{MEDIA}.VLT2"]
    assert [one.name for one in catalogue.all(Repository, f"{MEDIA}.")] == names
    assert [one.name for one in catalogue.all(Repository)] == ["US01.DLT.VLT1", *names]
    assert [one.name for one in catalogue.all(Media, "US01.")] == ["US01.DLT", MEDIA]
    assert catalogue.all(Media, "US02.") == []


def test_certificates_come_newest_first_and_in_lists_without_their_names(catalogue: Store) -> None:
    days = [f"202611{day}T101500.000001Z" for day in (21, 22, 23)]
    write(
        catalogue, *(Certificate(f"{MEDIA}.VLT1 {day}", "jo", 7, "A00009", "A00001") for day in days), event="reconcile"
    )
    write(catalogue, Certificate(f"{MEDIA}.VLT2 {days[0]}", "jo"), Certificate(f"{MEDIA}.VLT {days[0]}", "jo"))
    settle(catalogue)
    found = catalogue.certificates(f"{MEDIA}.VLT1", 2)
    assert [(one.name, one.correct, one.surplus) for one in found] == [
        (f"{MEDIA}.VLT1 {day}", 7, "") for day in reversed(days[1:])
    ]
    assert catalogue.get(Certificate, f"{MEDIA}.VLT1 {days[0]}").deficit == "A00001"


def test_memory_holds_no_more_volumes_than_asked_for_and_the_last_used(path: Path) -> None:
    opened = filled(path, cache=3)
    write(opened, *(Volume(f"{MEDIA}.B{number:05}", "VLT1") for number in range(50)))
    settle(opened)
    assert len(opened._volumes) == 3
    for name in (ONE, f"{MEDIA}.B00049", TWO, THREE, ONE, f"{MEDIA}.B00001"):
        opened.get(Volume, name)
    assert list(opened._volumes) == [TWO, ONE, f"{MEDIA}.B00001"]
    altered(opened, TWO, description="seen")
    settle(opened)
    assert opened.get(Volume, TWO).description == "seen"
    opened.close()


MANY = 100_000
PLACES = [f"P{number}" for number in range(10)]


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    """MANY Volumes of two Media types, spread over ten Repositories each; every 50th moves."""
    opened = Store(tmp_path_factory.mktemp("large") / "tapetrack.db", cache=100)
    medias = (MEDIA, "US01.DLT")
    write(
        opened,
        Customer("US01"),
        *map(Media, medias),
        *(Repository(f"{media}.{at}") for media in medias for at in PLACES),
    )
    for first in range(0, MANY, 5000):
        write(opened, *map(one_of_many, range(first, first + 5000)))
        settle(opened)
    yield opened
    opened.close()


def one_of_many(number: int) -> Volume:
    media = MEDIA if number % 3 else "US01.DLT"
    moving = {"target": PLACES[number // 50 % 10], "requested": 1} if number % 50 == 0 else {}
    return Volume(f"{media}.A{number * 7919 % MANY:06}", PLACES[number // 7 % 10], **moving)


@pytest.mark.parametrize(
    ("fits", "only"),
    [
        (lambda volume: True, {}),
        (lambda volume: volume.current == "P3" and volume.name.startswith(MEDIA), {"repository": f"{MEDIA}.P3"}),
        (lambda volume: volume.target == "P4" and volume.name.startswith(MEDIA), {"target": f"{MEDIA}.P4"}),
        (lambda volume: volume.target, {"moving": True}),
        (lambda volume: volume.target, {"moving": True, "repository": f"{MEDIA}.P3"}),
        (
            lambda volume: volume.target == "P4" and volume.name.startswith(MEDIA),
            {"target": f"{MEDIA}.P4", "moving": True},
        ),
    ],
    ids=["all", "repository", "target", "moving", "moving, not repository", "target, not moving"],
)
def test_pages_of_a_hundred_thousand_volumes_come_by_name_whole_and_once(
    large: Store, fits: Callable[[Volume], object], only: dict
) -> None:
    expected = sorted(volume.name for volume in map(one_of_many, range(MANY)) if fits(volume))
    found: list[str] = []
    position = ""
    while True:
        page = large.volumes(position, "~", limit=1000, **only)
        found += [volume.name for volume in page]
        if len(page) < 1000:
            break
        position = found[-1]
    assert found == expected
    assert (large.count(), large.count(MEDIA)) == (MANY, sum(number % 3 > 0 for number in range(MANY)))
    some = expected[10:-10]
    assert [volume.name for volume in large.volumes(some[0], some[-1], limit=MANY, **only)] == some[1:-1]


def test_no_read_scans_a_table_or_sorts(large: Store) -> None:
    volumes = [store._BY_NAME, store._BY_CURRENT, store._BY_TARGET, store._BY_MOVING]
    statements = [*volumes, store._WALK, store._DELETED, store._NO_LONGER_DELETED, store._CERTIFICATES]
    statements += [f"{table.select} WHERE name = ?" for table in schema.TABLES.values()]
    statements += [f"UPDATE {table.name} SET last = 1 WHERE row = ?" for table in schema.TABLES.values()]
    for statement in statements:
        plan = large._reader.execute(f"EXPLAIN QUERY PLAN {statement}", [1] * statement.count("?")).fetchall()
        steps = [step[-1] for step in plan]
        assert any(step.startswith("SEARCH") for step in steps), (statement, steps)
        assert not [step for step in steps if "TEMP B-TREE" in step], (statement, steps)
        assert {step for step in steps if step.startswith("SCAN")} <= {"SCAN walk"}, (statement, steps)


# ---- faults ---------------------------------------------------------------------------------------------------------


def test_a_commit_that_fails_has_not_happened_and_the_next_one_goes_on(catalogue: Store) -> None:
    before = all_of(catalogue)
    changes = [altered(catalogue, ONE, description=f"lost {number}") for number in range(3)]
    changes.append(write(catalogue, Volume(THREE, "VLT1"), Customer("US02")))
    with no_file_grows():
        settle(catalogue)
    errors = {change.pending.error for change in changes}
    assert len(errors) == 1
    assert "disk" in str(error := errors.pop())
    assert isinstance(error, StoreError)
    assert all_of(catalogue) == before
    kept = altered(catalogue, ONE, description="kept")
    assert kept.sequence == before[0] + 1
    settle(catalogue)
    assert kept.pending.error is None
    assert catalogue.get(Volume, ONE).description == "kept"
    assert holds(catalogue.path).head == (kept.sequence, kept.hash)


def test_close_after_a_fault_and_twice_is_harmless(path: Path) -> None:
    opened = filled(path)
    head = opened.sequence, opened.hash
    lost = altered(opened, ONE, description="lost")
    with no_file_grows():
        opened.close()
    assert isinstance(lost.pending.error, StoreError)
    opened.close()
    with pytest.raises(StoreError, match="closed"):
        opened.change(AUTHOR)
    assert holds(path).head == head


def test_close_commits_what_is_open_and_waits_for_what_is_under_way(path: Path) -> None:
    opened = filled(path)
    first = altered(opened, ONE, description="under way")
    opened.turn()
    opened.close()
    assert first.pending.error is None
    opened = Store(path)
    second = altered(opened, ONE, description="open")
    opened.close()
    assert second.pending.done
    assert second.pending.error is None
    assert holds(path).head == (second.sequence, second.hash)


def test_a_group_that_sqlite_itself_ends_fails_as_a_whole_and_says_so(catalogue: Store) -> None:
    """As when the disk is full while pages are written before their COMMIT; here the file may have no more pages."""
    before = all_of(catalogue)
    early = altered(catalogue, ONE, description="early")
    (pages,) = catalogue._writer.execute("PRAGMA page_count").fetchone()
    catalogue._writer.execute(f"PRAGMA max_page_count = {pages}").fetchall()
    swallowed = []
    with pytest.raises(StoreError, match="free some space"), catalogue.change(AUTHOR) as change:  # noqa: PT012
        for number in itertools.count():
            try:
                change.put(Volume(f"{MEDIA}.B{number:05}", "VLT1", description="x" * 256), "add")
            except StoreError as error:
                swallowed.append(error)
                if len(swallowed) == 2:  # what follows the first error must not be written outside of the group
                    break
    assert not early.pending.done
    settle(catalogue)
    assert isinstance(early.pending.error, StoreError)
    assert all_of(catalogue) == before
    catalogue._writer.execute("PRAGMA max_page_count = 1000000").fetchall()
    kept = altered(catalogue, ONE, description="kept")
    settle(catalogue)
    assert kept.pending.error is None
    assert holds(catalogue.path).head == (kept.sequence, kept.hash)


def test_a_program_that_writes_to_the_file_stops_changes_but_loses_none(catalogue: Store) -> None:
    with closing(sqlite3.connect(catalogue.path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(StoreError, match="another program is writing"):
            altered(catalogue, ONE, description="x")
        assert catalogue.get(Volume, ONE).description == ""
        other.execute("ROLLBACK")
        assert altered(catalogue, ONE, description="x").pending is not None
        settle(catalogue)
    second = Store(catalogue.path)
    altered(second, TWO, description="by the other")
    second.close()
    for _ in range(2):
        with pytest.raises(StoreError, match="another program has written"):
            altered(catalogue, TWO, description="by the first")
    settle(catalogue)
    assert holds(catalogue.path).head == (second.sequence, second.hash)


def test_the_log_stays_short_under_load(catalogue: Store) -> None:
    log = catalogue.path.with_name(catalogue.path.name + "-wal")
    write(catalogue, *(Volume(f"{MEDIA}.B{number:05}", "VLT1", description="x" * 256) for number in range(3000)))
    settle(catalogue)
    written = 0
    dice = random.Random(1)
    while written < 60 << 20:
        for _ in range(50):
            altered(catalogue, f"{MEDIA}.B{dice.randrange(3000):05}", scanned=dice.choice(("VLT1", "VLT2")))
        settle(catalogue)
        written += 50 * 4096
        assert log.stat().st_size < 2 * 4096 * schema.CHECKPOINT
    assert schema.WAL_LIMIT >= 4096 * schema.CHECKPOINT


def test_what_was_acknowledged_is_there_after_a_kill_at_any_moment(path: Path) -> None:
    filled(path).close()
    dice = random.Random(7)
    for _ in range(12):
        with subprocess.Popen([sys.executable, "-c", LOAD, path], stdout=subprocess.PIPE, text=True) as process:
            acknowledged = [process.stdout.readline()]
            with suppress(subprocess.TimeoutExpired):
                process.wait(dice.uniform(0, 0.05))
            process.send_signal(signal.SIGKILL)
            acknowledged += process.stdout.readlines()
        assert process.returncode == -signal.SIGKILL
        # A line that the kill cut off acknowledges nothing.
        sequence, digest, name = [line for line in acknowledged if line.endswith("\n")][-1].split()
        opened = Store(path)
        assert opened.sequence >= int(sequence)
        rows = {row.sequence: row.hash for row in opened.history(Volume, name, 0, 100_000)}
        assert rows[int(sequence)].hex() == digest
        report = holds(path)
        assert report.head == (opened.sequence, opened.hash)
        opened.close()


def test_a_change_whose_fsync_failed_does_not_come_back_after_a_kill(tmp_path: Path, path: Path) -> None:
    """Its frames stand whole in the log: whoever recovers that takes them for committed, unless it was emptied."""
    script = """
        fail.touch()
        lost = altered(opened, ONE, description="lost")
        settle(opened)
        assert not fail.exists()
        assert "disk of the catalogue fails" in str(lost.pending.error), lost.pending.error
        assert "may or may not" not in str(lost.pending.error)
    """
    run_with_syncs_that_fail(tmp_path, path, script)
    again = Store(path)
    assert again.get(Volume, ONE).description == "kept"
    again.close()
    assert holds(path)


@pytest.mark.parametrize(
    "how", ["fail.mkdir()", "beside.executescript('BEGIN; SELECT * FROM media'); fail.touch()"], ids=["disk", "reader"]
)
def test_where_the_log_of_a_failed_commit_cannot_be_emptied_there_are_no_more_changes(
    tmp_path: Path, path: Path, how: str
) -> None:
    script = f"""
        beside = sqlite3.connect(path, isolation_level=None)
        {how}
        unsure = altered(opened, ONE, description="unsure")
        settle(opened)
        assert "may or may not have happened" in str(unsure.pending.error), unsure.pending.error
        if fail.exists():
            fail.rmdir()
        for _ in range(2):
            try:
                altered(opened, TWO, description="refused")
                raise SystemExit("it was taken")
            except StoreError as error:
                assert "not known whether the last changes are kept: restart" in str(error), error
        assert opened.get(Volume, ONE).description == "kept"
        assert len(opened.volumes("", "~", limit=9)) == len(opened.history(Volume, ONE, 0, 9)) == 2
    """
    run_with_syncs_that_fail(tmp_path, path, script)
    again = Store(path)
    assert again.get(Volume, ONE).description in ("kept", "unsure")
    altered(again, TWO, description="goes on")
    again.close()
    assert holds(path)
