"""tt/catalog/schema.py: what is no catalogue is refused, on any disk, and an older one becomes a newer one."""

import os
import sqlite3
import subprocess
import sys
import textwrap
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from process import need
from store_kit import filled, holds

from tt.catalog import schema
from tt.catalog.store import Store, StoreError


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "tapetrack.db"


# ---- real disks: a file system of its own, in a mount namespace -----------------------------------------------------


def on_a_disk_of_its_own(place: Path, script: str) -> None:
    """Run a script in a process that has a small tmpfs at `place`, where `path` is a catalogue."""
    need("unshare", "mount", root=True)
    head = """
        import subprocess, sys
        from contextlib import suppress
        from pathlib import Path
        import pytest
        sys.path.insert(0, sys.argv[2])
        from store_kit import *
        from tt.catalog.store import StoreError
        disk = Path(sys.argv[1])
        path = disk / "tapetrack.db"
    """
    place.mkdir()
    mount = 'mount -t tmpfs -o size=2m none "$1"; exec "$2" -c "$3" "$1" "$4"'
    words = ["sh", place, sys.executable, textwrap.dedent(head) + textwrap.dedent(script), Path(__file__).parent]
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-ec", mount, *words], check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_on_a_full_disk_reads_go_on_writes_say_so_and_room_heals_it(tmp_path: Path) -> None:
    on_a_disk_of_its_own(
        tmp_path / "disk",
        """
        opened = filled(path)
        acknowledged, errors = 0, []
        filler = (disk / "filler").open("wb", buffering=0)
        with suppress(OSError):
            while True:
                filler.write(bytes(4096))
        filler.truncate(filler.tell() - 40 * 4096)
        for number in range(400):
            try:
                change = altered(opened, ONE, description=f"{number}" * 60)
            except StoreError as error:
                errors.append(error)
                settle(opened)
                continue
            settle(opened)
            if change.pending.error:
                errors.append(change.pending.error)
            else:
                acknowledged = change.sequence
            assert opened.get(Volume, ONE).last == acknowledged or not acknowledged
            assert opened.get(Volume, TWO).description == "two"
            assert len(opened.volumes("", "~", limit=9)) == 2
        assert len(errors) > 100, len(errors)
        assert {str(error).partition(": ")[0] for error in errors} == {"the disk of the catalogue is full"}
        assert acknowledged <= opened.sequence
        filler.close()
        (disk / "filler").unlink()
        healed = altered(opened, ONE, description="healed")
        settle(opened)
        assert healed.pending.error is None, healed.pending.error
        assert healed.sequence == max(acknowledged, 6) + 1
        opened.close()
        assert holds(path).head == (healed.sequence, healed.hash)
        """,
    )


def test_a_read_only_file_or_directory_is_refused_in_one_line(tmp_path: Path) -> None:
    on_a_disk_of_its_own(
        tmp_path / "disk",
        """
        filled(path).close()
        (disk / "new").mkdir()
        def refused(path, *words):
            with pytest.raises(StoreError) as raised:
                Store(path)
            text = str(raised.value)
            assert text.startswith(f"{path}: ") and "\\n" not in text, text
            assert all(word in text for word in words), text
        def run(*words):
            subprocess.run(words, check=True)
        run("mount", "--bind", path, path)
        run("mount", "-o", "remount,ro,bind", path)
        refused(path, "can be written")
        run("umount", path)
        run("mount", "-o", "remount,ro", disk)
        refused(path, "can be written")
        refused(disk / "another.db", "Read-only file system", "mount it writable")
        assert verify(path).problem == ""
        run("mount", "-o", "remount,rw", disk)
        Store(path).close()
        """,
    )


# ---- files that are not a catalogue ---------------------------------------------------------------------------------


NEWER = len(schema.MIGRATIONS) + 1


def text_file(path: Path) -> None:
    path.write_text("PRAGMA this is no database\n" * 500)


def other_database(path: Path) -> None:
    with closing(sqlite3.connect(path)) as file:
        file.execute("CREATE TABLE volume (name)")


def cut(path: Path) -> None:
    filled(path).close()
    os.truncate(path, path.stat().st_size // 2)


def page_overwritten(path: Path, number: int) -> None:
    filled(path).close()
    with path.open("r+b") as file:
        file.seek(4096 * number + (100 if number == 0 else 0))
        file.write(b"\x55" * 3000)


def newer(path: Path) -> None:
    filled(path).close()
    with closing(sqlite3.connect(path)) as file:
        file.execute(f"PRAGMA user_version = {NEWER}")


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (text_file, "no tape catalogue"),
        (other_database, "no tape catalogue: give another file"),
        (cut, "damaged: restore a backup"),
        (lambda path: page_overwritten(path, 0), "damaged: restore a backup"),
        (lambda path: page_overwritten(path, 1), "damaged: restore a backup"),
        (newer, f"its version is {NEWER}, this tt reads up to {NEWER - 1}: use a newer tt"),
        (lambda path: path.mkdir(), "it must be a file"),
        (lambda path: path.symlink_to("nowhere/file"), "it must be a file"),
    ],
    ids=["text", "other database", "cut", "schema page", "table page", "newer", "directory", "dangling link"],
)
def test_what_is_no_catalogue_is_refused_in_one_line_and_left_as_it_is(
    path: Path, make: Callable[[Path], None], says: str
) -> None:
    make(path)
    before = path.read_bytes() if path.is_file() else None
    with pytest.raises(StoreError) as raised:
        Store(path)
    text = str(raised.value)
    assert text.startswith(f"{path}: ")
    assert says in text
    assert "\n" not in text
    assert before is None or path.read_bytes() == before


def test_a_catalogue_in_no_directory_is_refused_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"none/tapetrack\.db: No such file or directory: make the directory"):
        Store(tmp_path / "none" / "tapetrack.db")


# ---- migrations -----------------------------------------------------------------------------------------------------


def version_of(path: Path) -> int:
    with closing(sqlite3.connect(path)) as file:
        return int(file.execute("PRAGMA user_version").fetchone()[0])


STEPS = (
    *schema.MIGRATIONS,
    ("ALTER TABLE volume ADD COLUMN slot TEXT NOT NULL DEFAULT ''", "UPDATE volume SET slot = 'second'"),
    ("UPDATE volume SET slot = slot || ' third'",),
)


def test_an_older_file_takes_the_steps_it_lacks_in_their_order(path: Path) -> None:
    filled(path).close()
    assert version_of(path) == 1
    for _ in range(2):  # the second time there is nothing to do
        schema.connect(path, lambda file, path: schema.migrate(file, path, STEPS)).close()
        assert version_of(path) == 3
        with closing(sqlite3.connect(path)) as file:
            assert file.execute("SELECT DISTINCT slot FROM volume").fetchall() == [("second third",)]


def test_a_step_that_fails_leaves_the_file_at_its_version(path: Path) -> None:
    filled(path).close()
    steps = (*STEPS, ("UPDATE volume SET slot = 'lost'", "UPDATE nowhere SET slot = 1"))
    with pytest.raises(StoreError, match="no such table: nowhere"):
        schema.connect(path, lambda file, path: schema.migrate(file, path, steps))
    assert version_of(path) == 1
    opened = Store(path)
    assert opened.count() == 2
    opened.close()
    assert holds(path)
