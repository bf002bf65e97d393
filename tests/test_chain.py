"""tt/catalog/chain.py: whatever is changed in the file by hand is found, and a backup is whole."""

import hashlib
import sqlite3
import stat
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from msgspec.structs import replace
from store_kit import AUTHOR, LOAD, MEDIA, ONE, THREE, TWO, altered, filled, holds, no_file_grows, settle, write

from tt.catalog.chain import START, Head, backup, link, parse_head, verify
from tt.catalog.model import Access, User, Volume
from tt.catalog.schema import MIGRATIONS
from tt.catalog.store import Store, StoreError

Tamper = Callable[[sqlite3.Connection], object]
TRIGGERS = [each for step in MIGRATIONS for each in step if each.startswith("CREATE TRIGGER")]
WRAP = (1 << 61) - 1  # Python's hash of n is that of n + WRAP


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A catalogue with 12 rows of history: 5 and 6 add ONE and TWO, the last three are about ONE, TWO and ONE."""
    opened = filled(tmp_path / "tapetrack.db")
    write(opened, User("jo", password="hash"), Access("jo US01", 2), Volume(THREE, "VLT2"))
    with opened.change(AUTHOR) as change:
        change.delete(change.get(Access, "jo US01"), "delete")
        change.put(replace(change.get(Volume, ONE), target="VLT2", requested=5), "move")
        change.put(replace(change.get(Volume, TWO), flags="E"), "change")
    altered(opened, ONE, "scan_in", current="VLT2", scanned="VLT2", target="", requested=0, flags="C")
    settle(opened)
    assert opened.sequence == 13
    opened.close()
    return opened.path


def sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def tamper(path: Path, *work: str | Tamper) -> None:
    """Do that in the file, as somebody can who may write it, and leave no other trace."""
    with closing(sqlite3.connect(path, isolation_level=None)) as file:
        file.execute("DROP TRIGGER IF EXISTS history_no_update")
        file.execute("DROP TRIGGER IF EXISTS history_no_delete")
        for each in work:
            file.execute(each) if isinstance(each, str) else each(file)
        for trigger in TRIGGERS:
            file.execute(trigger)


def make_anew(file: sqlite3.Connection) -> None:
    """The whole chain, from whatever the rows are now."""
    before = START
    for row in file.execute("SELECT * FROM history ORDER BY sequence").fetchall():
        before = link(before, row[:-1])
        file.execute("UPDATE history SET hash = ? WHERE sequence = ?", (before, row[0]))


def renumber(first: int, by: int) -> Tamper:
    """Give the rows from `first` on other numbers, in an order in which none is taken."""

    def work(file: sqlite3.Connection) -> None:
        order = "DESC" if by > 0 else "ASC"
        rows = file.execute(
            f"SELECT sequence FROM history WHERE sequence >= {first} ORDER BY sequence {order}"
        ).fetchall()
        for (number,) in rows:
            file.execute(f"UPDATE history SET sequence = {number + by} WHERE sequence = {number}")

    return work


def copied(number: int, to: int) -> str:
    """A row put in by hand."""
    columns = "time, 'mallory', interface, source, event, kind, name, place, changes, previous, hash"
    return f"INSERT INTO history SELECT {to}, {columns} FROM history WHERE sequence = {number}"


# ---- the chain ------------------------------------------------------------------------------------------------------


def test_the_hash_of_a_row_is_of_the_one_before_and_of_messagepack_in_its_shortest_form() -> None:
    columns = (1, 1_800_000_000_000_000, "jo", "tt", "::1", "add", "volume", "A", "V", "{}", 0)
    packed = b"\x9b\x01\xcf\x00\x06\x65\x17\x28\x98\x80\x00\xa2jo\xa2tt\xa3::1\xa3add\xa6volume\xa1A\xa1V\xa2{}\x00"
    assert link(b"\7" * 32, columns) == hashlib.sha256(b"\7" * 32 + packed).digest()


def test_a_catalogue_that_nobody_touched_holds_also_beside_a_running_server(path: Path) -> None:
    report = verify(path)
    assert (report.problem, report.row, report.records) == ("", 0, 9)
    running = Store(path)
    assert report.head == (running.sequence, running.hash)
    altered(running, ONE, description="open")
    assert verify(path) == report
    settle(running)
    assert verify(path, tuple(report.head)).head == (running.sequence, running.hash)
    for number in range(report.head.sequence):  # any row can be an anchor
        with closing(sqlite3.connect(path)) as file:
            row = file.execute("SELECT sequence, hash FROM history WHERE sequence = ?", (number + 1,)).fetchone()
        assert verify(path, row).problem == ""
    running.close()


@pytest.mark.parametrize(
    "column",
    ["time = 0", "user = 'jo'", "interface = ''", "source = '::1'", "event = 'change'", "kind = 'media'",
     "name = 'US02'", "place = 'VLT2'", "changes = '{}'", "previous = 4", "hash = zeroblob(32)", "hash = x''"],
)  # fmt: skip
@pytest.mark.parametrize("row", [1, 11, 13])
def test_a_row_that_was_altered_is_named(path: Path, row: int, column: str) -> None:
    tamper(path, f"UPDATE history SET {column} WHERE sequence = {row}")
    report = verify(path)
    assert (report.row, report.head.sequence) == (row, row - 1)
    assert report.problem.startswith(f"row {row} of the history was altered")


@pytest.mark.parametrize(
    ("work", "row", "says"),
    [
        (["DELETE FROM history WHERE sequence = 1"], 1, "row 1 of the history was removed"),
        (["DELETE FROM history WHERE sequence = 7"], 7, "row 7 of the history was removed"),
        (["DELETE FROM history WHERE sequence BETWEEN 7 AND 9"], 7, "row 7 of the history was removed"),
        (["DELETE FROM history WHERE sequence = 7", renumber(8, -1)], 7, "stands where another was removed"),
        ([renumber(7, 1), copied(6, 7)], 7, "row 7 of the history was altered, or stands where"),
        ([copied(13, 14)], 14, "row 14 of the history was altered, or stands where"),
        ([copied(6, 0)], 0, "row 0 was inserted"),
        ([copied(6, -3)], -3, "row -3 was inserted"),
        (["DELETE FROM history"], 0, "access jo US01 was altered: last is 10, but None by the history"),
    ],
    ids=["first removed", "removed", "three removed", "removed and renumbered", "inserted and renumbered", "added",
         "before the first", "far before the first", "all removed"],
)  # fmt: skip
def test_rows_that_were_removed_or_inserted_are_named(
    path: Path, work: list[str | Tamper], row: int, says: str
) -> None:
    tamper(path, *work)
    report = verify(path)
    assert says in report.problem
    assert report.row == row


@pytest.mark.parametrize("anchored", [4, 7, 11, 13])
def test_a_chain_that_was_made_anew_passes_without_an_anchor_and_not_with_one(path: Path, anchored: int) -> None:
    """Who is said to have done it leads to no record, so that nothing else contradicts it."""
    with closing(sqlite3.connect(path)) as file:
        anchor = file.execute("SELECT sequence, hash FROM history WHERE sequence = ?", (anchored,)).fetchone()
    tamper(path, "UPDATE history SET user = 'mallory' WHERE sequence = 7", make_anew)
    assert verify(path).problem == ""
    report = verify(path, anchor)
    if anchored < 7:
        assert report.problem == ""  # an anchor says nothing of what came after it
    else:
        assert report.row == anchored
        assert "it or one before was altered, and the chain made anew" in report.problem


def test_rows_that_were_cut_off_are_missed_by_the_anchor_and_by_the_records(path: Path) -> None:
    head = verify(path).head
    tamper(path, "DELETE FROM history WHERE sequence > 11")
    assert verify(path, head)[2:] == (12, "rows 12 to 13 of the history were removed")
    assert verify(path)[2:] == (6, f"volume {TWO} was altered: flags is 'E', but None by the history")


@pytest.mark.parametrize(
    ("change", "row", "says"),
    [
        (
            """changes = '{"target":["","VLT1"],"requested":[0,5]}' WHERE sequence = 11""",
            13,
            f"row 13 of the history says that target of volume {ONE} was 'VLT2', but by the rows before it was 'VLT1'",
        ),
        (
            """changes = '{"flags":["","EL"]}' WHERE sequence = 12""",
            12,
            f"volume {TWO} was altered: flags is 'E', but 'EL' by the history",
        ),
        (
            f"""changes = '{{"flags":["",{1 << 64}]}}' WHERE sequence = 12""",
            12,
            "changes is None, but 'unreadable' by the history",
        ),
        (
            """changes = '{"flags":["",{}]}' WHERE sequence = 12""",
            12,
            "changes is None, but 'unreadable' by the history",
        ),
        ("changes = 'nonsense' WHERE sequence = 12", 12, "changes is None, but 'unreadable' by the history"),
        ("previous = 5 WHERE sequence = 12", 12, f"that last of volume {TWO} was 5, but by the rows before it was 6"),
        (
            f"name = '{ONE}' WHERE sequence = 12",
            12,
            f"that last of volume {ONE} was 6, but by the rows before it was 11",
        ),
    ],
    ids=["a move", "a flag", "no number of SQLite", "no values", "no JSON", "another row before", "another record"],
)
def test_a_chain_made_anew_over_other_changes_contradicts_the_records(
    path: Path, change: str, row: int, says: str
) -> None:
    tamper(path, f"UPDATE history SET {change}", make_anew)
    report = verify(path)
    assert says in report.problem
    assert report.row == row


# ---- the records ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("statement", "row", "says"),
    [
        (
            f"UPDATE volume SET current = 'VLT1' WHERE name = '{ONE}'",
            13,
            f"volume {ONE}: current is 'VLT1', but 'VLT2'",
        ),
        (f"UPDATE volume SET flags = '' WHERE name = '{TWO}'", 12, f"volume {TWO}: flags is '', but 'E'"),
        (f"UPDATE volume SET last = 12 WHERE name = '{ONE}'", 13, f"volume {ONE}: last is 12, but 13"),
        (f"UPDATE volume SET media = 9 WHERE name = '{ONE}'", 13, f"volume {ONE}: it stands under another Media type"),
        (f"DELETE FROM volume WHERE name = '{THREE}'", 9, f"volume {THREE}: current is None, but 'VLT2'"),
        ("INSERT INTO customer VALUES (9, 'US99', 'mine', 3)", 0, "customer US99: description is 'mine', but None"),
        ("INSERT INTO access VALUES (9, 'jo US01', 3, 1, 10)", 10, "access jo US01: catalog is 1, but None"),
        ("UPDATE repository SET allow_deletes = 1", 3, f"repository {MEDIA}.VLT1: allow_deletes is 1, but None"),
        ("UPDATE user SET administrator = 1", 7, "user jo: administrator is 1, but None"),
        ("UPDATE user SET password = 'mine'", 7, f"user jo: password is '{sha('mine')}', but '{sha('hash')}' by"),
        (f"UPDATE media SET max_volumes = max_volumes + {WRAP}", 2, f"media {MEDIA}: max_volumes is {WRAP}, but None"),
        (f"UPDATE volume SET last = last + {WRAP} WHERE name = '{TWO}'", 12, f"volume {TWO}: last is {WRAP + 12}, but"),
        ("DELETE FROM deleted", 10, "access jo US01: last is None, but 10"),
    ],
)
def test_a_record_that_was_altered_past_the_history_is_named(path: Path, statement: str, row: int, says: str) -> None:
    tamper(path, statement)
    report = verify(path)
    assert says in report.problem.replace(" was altered", "")
    assert report.row == row


@pytest.mark.parametrize(
    ("statement", "says"),
    [
        ("DROP TRIGGER history_no_update", "trigger history_no_update was removed from the catalogue"),
        (
            "CREATE TRIGGER evil AFTER INSERT ON history BEGIN UPDATE volume SET current = 'X'; END",
            "trigger evil was added to the catalogue",
        ),
        (
            "DROP TRIGGER history_no_update; CREATE TRIGGER history_no_update UPDATE ON media BEGIN SELECT 1; END",
            "trigger history_no_update of the catalogue was altered",
        ),
        ("DROP INDEX volume_moving", "index volume_moving was removed"),
        ("CREATE TABLE mine (name)", "table mine was added"),
        ("ALTER TABLE customer ADD COLUMN mine TEXT", "table customer of the catalogue was altered"),
    ],
)
def test_tables_indexes_and_triggers_that_tt_did_not_make_so_are_named(path: Path, statement: str, says: str) -> None:
    with closing(sqlite3.connect(path)) as file:
        file.executescript(statement)
    report = verify(path)
    assert report.problem.startswith(says)
    assert (report.row, report.records) == (0, 0)


def test_a_damaged_file_is_no_verdict_on_the_chain(path: Path, tmp_path: Path) -> None:
    pages = path.stat().st_size // 4096
    data = bytearray(path.read_bytes())
    for page in range(1, pages):
        data[page * 4096 + 8 : page * 4096 + 40] = b"\x55" * 32
    path.write_bytes(data)
    with pytest.raises(StoreError, match="damaged: restore a backup"):
        verify(path)
    with pytest.raises(StoreError, match="no such file"):
        verify(tmp_path / "none")
    (tmp_path / "empty").touch()
    with pytest.raises(StoreError, match="its tables are not those of this tt"):
        verify(tmp_path / "empty")


def test_a_head_is_read_back_from_its_text() -> None:
    head = Head(12, bytes(range(32)))
    assert parse_head(f" {head}\n") == head
    for text in ("", "12", f"12:{'0' * 63}", f"x:{'0' * 64}", f"12:{'g' * 64}", f"-1:{'0' * 64}", f"\u0661:{'0' * 64}"):
        with pytest.raises(ValueError, match=r"SEQUENCE:HASH|hexadecimal"):
            parse_head(text)
    assert parse_head(f"0:{'0' * 64}") == (0, START)
    with pytest.raises(ValueError, match="there is no row 0, and before the first row it is 0:0000"):
        parse_head(f"0:{'f' * 64}")


# ---- backups --------------------------------------------------------------------------------------------------------


def test_a_backup_is_one_private_file_with_all_that_was_committed(path: Path, tmp_path: Path) -> None:
    running = Store(path)
    altered(running, ONE, description="committed")
    settle(running)
    altered(running, ONE, description="open")
    target = tmp_path / "backups" / "copy"
    target.parent.mkdir()
    assert backup(path, target) == (running.sequence, running.hash)
    assert [one.name for one in target.parent.iterdir()] == ["copy"]
    assert stat.S_IMODE(target.stat().st_mode) == 0o600
    settle(running)
    running.close()
    assert holds(target).head.sequence == 14
    assert [one.name for one in target.parent.iterdir()] == ["copy"]  # reading it leaves nothing beside it
    restored = Store(target)
    assert restored.get(Volume, ONE).description == "committed"
    altered(restored, ONE, description="goes on")
    restored.close()
    assert holds(target).head.sequence == 15


def test_a_backup_beside_a_server_under_load_is_whole(path: Path, tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", LOAD, path], stdout=subprocess.PIPE, text=True) as process:
        for number in range(5):
            sequence, digest, _ = process.stdout.readline().split()
            head = backup(path, tmp_path / f"copy{number}")
            assert head.sequence >= int(sequence)
            assert verify(tmp_path / f"copy{number}", Head(int(sequence), bytes.fromhex(digest)))[::2] == (head, 0)
        process.kill()


def test_a_backup_that_cannot_be_made_leaves_nothing_and_overwrites_nothing(path: Path, tmp_path: Path) -> None:
    before = path.read_bytes()
    (tmp_path / "file").write_text("mine")
    for target in (path, tmp_path / "file"):
        with pytest.raises(StoreError, match="it is there already: give another name"):
            backup(path, target)
    with pytest.raises(StoreError, match="none/copy: no backup was made: No such file"):
        backup(path, tmp_path / "none" / "copy")
    names = sorted(one.name for one in tmp_path.iterdir() if "-" not in one.name)
    with no_file_grows(), pytest.raises(StoreError, match="the disk of the catalogue"):
        backup(path, tmp_path / "copy")
    assert sorted(one.name for one in tmp_path.iterdir() if "-" not in one.name) == names
    assert path.read_bytes() == before
    assert (tmp_path / "file").read_text() == "mine"
    assert backup(path, tmp_path / "copy") == verify(path).head
