"""tt/catalog/accounts.py: the first password, and what the host's owner does for who has lost his."""

import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from accounts_kit import REFUSED, WORD, House, building
from store_kit import no_file_grows

from tt.catalog.accounts import FIRST_PASSWORD, HOST, reset_in_file
from tt.catalog.messages import LoggedIn
from tt.catalog.model import SUPERUSER, User
from tt.catalog.store import Store, StoreError
from tt.dispatch import OperationError


@pytest.fixture
def build(tmp_path: Path) -> Iterator[Callable[..., House]]:
    with building(tmp_path) as make:
        yield make


@pytest.fixture
def house(build) -> House:
    return build()


def test_the_first_start_leaves_a_password_that_works_once_and_must_be_changed(build) -> None:
    house = build(empty=True)
    house.accounts.first()
    path = house.data / FIRST_PASSWORD
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    once = path.read_text().strip()
    assert house.try_login(SUPERUSER, "wrong") == REFUSED
    assert path.exists()
    house.come("t")
    assert house.ask("t", "login", user=SUPERUSER, password=once) == LoggedIn(SUPERUSER, True, True)
    assert not path.exists()
    for operation in ("user.list", "customer.list", "statistics"):
        assert house.code("t", operation) == "password_change_first"
    assert house.code("t", "access.set", user="x", pattern="*", level="read") == "password_change_first"
    house.ask("t", "whoami")
    house.ask("t", "password", old=once, new=WORD)
    assert [user.user for user in house.ask("t", "user.list").entries] == [SUPERUSER]
    assert house.try_login(SUPERUSER, once) == REFUSED


def test_a_later_start_leaves_passwords_alone(build) -> None:
    house = build(empty=True)
    house.accounts.first()
    before = (house.data / FIRST_PASSWORD).read_text()
    house.accounts.first()
    assert (house.data / FIRST_PASSWORD).read_text() == before
    (house.data / FIRST_PASSWORD).unlink()
    house.accounts.first()
    assert not (house.data / FIRST_PASSWORD).exists()


def test_a_first_password_that_cannot_be_written_makes_no_user(build) -> None:
    house = build(empty=True)
    (house.data / FIRST_PASSWORD).mkdir()
    with pytest.raises(StoreError, match=r"first-password: not written: .*: make"):
        house.accounts.first()
    assert house.store.all(User) == []
    (house.data / FIRST_PASSWORD).rmdir()
    house.accounts.first()
    assert house.store.all(User)


def test_a_first_password_that_cannot_be_removed_is_said_and_lets_in(build, caplog) -> None:
    house = build(empty=True)
    house.accounts.first()
    path = house.data / FIRST_PASSWORD
    once = path.read_text().strip()
    path.unlink()
    path.mkdir()
    with caplog.at_level("INFO", "tt"):
        assert house.try_login(SUPERUSER, once) == ("", "")
    assert "first password used, and its file not removed" in caplog.messages


def test_the_host_gives_a_user_a_new_password_and_ends_his_sessions(house: House) -> None:
    seat = house.log_in("abroad", source="192.0.2.1")
    later = house.accounts.reset("abroad", HOST)
    done = house.finish(later)
    assert seat.closed_for == "logged_out"
    assert house.try_login("abroad", WORD, "192.0.2.1") == REFUSED
    assert house.try_login("abroad", done.password) == REFUSED  # his networks stay
    house.come("a", "192.0.2.1")
    assert house.ask("a", "login", user="abroad", password=done.password) == LoggedIn("abroad", False, True)
    (row,) = house.store.history(User, "abroad", 0, 1)
    assert (row.sequence, row.user, row.source) == (done.sequence, "", "local")


def test_the_host_lets_tapemaster_in_who_locked_himself_out(house: House) -> None:
    house.put(house.changed(SUPERUSER, networks="192.0.2.1/32"))
    (house.data / FIRST_PASSWORD).write_text("no longer right\n")
    done = house.finish(house.accounts.reset(SUPERUSER, HOST))
    assert not (house.data / FIRST_PASSWORD).exists()
    assert house.try_login(SUPERUSER, done.password) == ("", "")


def test_the_host_is_told_what_is_wrong(house: House) -> None:
    with pytest.raises(OperationError, match="there is no user 'unknown'"):
        house.finish(house.accounts.reset("unknown", HOST))
    later = house.accounts.reset("jsmith", HOST)
    with no_file_grows(), pytest.raises(OperationError) as raised:
        house.finish(later)
    assert raised.value.code == "storage"
    house.log_in("jsmith")


def test_without_a_server_the_file_itself_is_changed(tmp_path: Path) -> None:
    with House(tmp_path) as house:
        pass
    store = Store(tmp_path / "tapetrack.db")
    (tmp_path / FIRST_PASSWORD).write_text("x\n")
    done = reset_in_file(store, tmp_path, SUPERUSER)
    assert not (tmp_path / FIRST_PASSWORD).exists()
    with pytest.raises(OperationError, match="no user"):
        reset_in_file(store, tmp_path, "unknown")
    store.close()
    with House(tmp_path, empty=True) as house:
        assert (house.store.sequence, house.store.hash) == (done.sequence, done.hash)
        house.come("a")
        assert house.ask("a", "login", user=SUPERUSER, password=done.password).must_change_password
        house.wait(house.commit())  # the cheaper hash of this test
