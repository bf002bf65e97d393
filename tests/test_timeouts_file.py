"""tt/timeouts.py: the saved table survives what happens to files, and nothing of a damaged one is used."""

import os
import stat
from pathlib import Path

import pytest

from tt._core import TimeoutTable
from tt.state_file import HEAD, StateFileError
from tt.timeouts import FILE, load, save

SECOND = 10**9
HOUR = 3600 * SECOND
NOON = 1_800_000_000 * SECOND  # some UTC time, ns


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "timeouts"


def filled() -> TimeoutTable:
    """At 0 s: 192.0.2.1 until 600 s, 2001:db8::/64 until 60 s."""
    table = TimeoutTable(8)
    table.add("192.0.2.1", 1, 600 * SECOND, 0, hard=True)
    table.add("2001:db8::1", 2, 60 * SECOND, 0)
    return table


def ends(table: TimeoutTable, now: int) -> dict[str, int]:
    return {record.source: record.end - now for record in table.entries(now)}


def test_what_was_saved_is_restored(path: Path) -> None:
    save(path, filled().dump(0), NOON)
    table = TimeoutTable(8)
    assert load(str(path), table, HOUR, NOON) == 2
    assert ends(table, HOUR) == {"192.0.2.1": 600 * SECOND, "2001:db8::/64": 60 * SECOND}


def test_no_file_restores_nothing(path: Path) -> None:
    assert load(path, TimeoutTable(8), 0, NOON) == 0


def test_time_spent_down_counts(path: Path) -> None:
    save(path, filled().dump(0), NOON)
    table = TimeoutTable(8)
    assert load(path, table, 0, NOON + 100 * SECOND) == 2
    assert ends(table, 0) == {"192.0.2.1": 500 * SECOND}
    assert load(path, TimeoutTable(8), 0, NOON + 25 * HOUR) == 0


@pytest.mark.parametrize("back", [1, 100 * SECOND, HOUR, NOON])
def test_a_wall_clock_that_went_back_holds_nobody_longer(path: Path, back: int) -> None:
    save(path, filled().dump(100 * SECOND), NOON)
    table = TimeoutTable(8)
    load(path, table, 0, NOON - back)
    assert ends(table, 0) == {"192.0.2.1": 500 * SECOND}


def test_the_file_is_private_even_where_an_open_one_was_left_behind(path: Path) -> None:
    left = path.with_name("timeouts.new")
    left.write_bytes(bytes(10_000))
    left.chmod(0o666)
    save(path, filled().dump(0), NOON)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert os.listdir(path.parent) == ["timeouts"]
    assert load(path, TimeoutTable(8), 0, NOON) == 2


def test_a_link_left_under_the_temporary_name_is_not_written_through(path: Path) -> None:
    victim = path.with_name("victim")
    victim.write_text("untouched")
    path.with_name("timeouts.new").symlink_to(victim)
    with pytest.raises(StateFileError, match="not saved"):
        save(path, filled().dump(0), NOON)
    assert victim.read_text() == "untouched"
    save(path, filled().dump(0), NOON)
    assert load(path, TimeoutTable(8), 0, NOON) == 2


def test_the_file_reaches_the_disk_before_its_name_does(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[str] = []
    real_fsync, real_replace = os.fsync, Path.replace

    def fsync(descriptor: int) -> None:
        steps.append("directory" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        real_fsync(descriptor)

    def replace(self: Path, target: Path) -> Path:
        steps.append("rename")
        return real_replace(self, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "replace", replace)
    save(path, filled().dump(0), NOON)
    assert steps == ["file", "rename", "directory"]


def test_a_save_that_fails_leaves_the_old_file_and_nothing_else(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(path, filled().dump(0), NOON)
    before = path.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StateFileError, match="No space left on device: make the directory writable") as error:
        save(path, TimeoutTable(8).dump(0), NOON)
    assert "\n" not in str(error.value)
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == ["timeouts"]


def test_a_missing_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(StateFileError, match=r"none/timeouts: time-outs not saved: No such file"):
        save(tmp_path / "none" / "timeouts", b"", NOON)


def test_an_unreadable_file_is_named_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(StateFileError, match="not restored: Is a directory: make the file readable, or remove it"):
        load(tmp_path, TimeoutTable(8), 0, NOON)


def test_one_flipped_bit_anywhere_restores_nothing(path: Path) -> None:
    save(path, filled().dump(0), NOON)
    data = path.read_bytes()
    for at in range(len(data)):
        path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        table = TimeoutTable(8)
        with pytest.raises(StateFileError, match="time-outs not restored") as error:
            load(path, table, 0, NOON)
        assert "\n" not in str(error.value)
        assert table.entries(0, remembered=True) == []


def test_a_truncated_or_lengthened_file_restores_nothing(path: Path) -> None:
    save(path, filled().dump(0), NOON)
    data = path.read_bytes()
    for wrong in [data[:n] for n in range(len(data))] + [data + b"\0", data + data]:
        path.write_bytes(wrong)
        with pytest.raises(StateFileError, match="not restored"):
            load(path, TimeoutTable(8), 0, NOON)


def test_a_later_version_is_named(path: Path) -> None:
    save(path, filled().dump(0), NOON)
    data = path.read_bytes()
    path.write_bytes(HEAD.pack(FILE.magic, 2, 0, NOON, 0) + data[HEAD.size :])
    with pytest.raises(StateFileError, match="its version is 2, this server reads 1"):
        load(path, TimeoutTable(8), 0, NOON)


def test_a_right_checksum_over_no_dump_restores_nothing(path: Path) -> None:
    save(path, b"no dump of a table", NOON)
    with pytest.raises(StateFileError, match="not restored"):
        load(path, TimeoutTable(8), 0, NOON)


def test_a_claimed_length_is_not_believed(path: Path) -> None:
    path.write_bytes(HEAD.pack(FILE.magic, 1, 0, NOON, 2**64 - 1) + bytes(100))
    with pytest.raises(StateFileError, match="not the length that it names"):
        load(path, TimeoutTable(8), 0, NOON)
