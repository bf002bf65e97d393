"""tt/catalog/users.py: users and their access, at the limits of every field; what a change does to who is logged in."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from accounts_kit import REFUSED, WORD, House
from store_kit import no_file_grows

from tt.catalog import users
from tt.catalog.messages import AccessRecord, LoggedIn, UserRecord
from tt.catalog.model import ALTER, READ, SUPERUSER, Access, Customer, User
from tt.dispatch import OperationError

ADMINISTRATORS = {
    "user.add": {"user": "new"},
    "user.list": {},
    "user.change": {"user": "jsmith", "description": "x"},
    "user.reset": {"user": "jsmith"},
    "access.set": {"user": "jsmith", "pattern": "*", "level": "alter"},
    "access.list": {},
    "session.list": {},
    "session.disconnect": {"id": 1},
}


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    with House(tmp_path, login_delay="0 s") as made:
        made.put(Customer("US01"), Customer("US02"), Customer("EU01"))
        made.log_in("boss")
        yield made


def customers(house: House, seat: str) -> list[str]:
    return [entry.name for entry in house.ask(seat, "customer.list").entries]


@pytest.mark.parametrize("operation", ADMINISTRATORS)
def test_only_administrators_manage_users(house: House, operation: str) -> None:
    house.log_in("jsmith")
    before = house.store.sequence
    assert house.error("jsmith", operation, **ADMINISTRATORS[operation]) == ("denied", "jsmith is no administrator")
    assert house.store.sequence == before
    for user in ("boss", SUPERUSER):
        house.log_in(user)
        arguments = ADMINISTRATORS[operation] | ({"user": f"by-{user}"} if operation == "user.add" else {})
        assert house.code(user, operation, **arguments) == ""


@pytest.mark.parametrize("operation", ADMINISTRATORS)
def test_arguments_of_wrong_types_are_malformed(house: House, operation: str) -> None:
    if ADMINISTRATORS[operation]:
        wrong: dict[str, Any] = {name: [None] for name in ADMINISTRATORS[operation]}
        assert house.code("boss", operation, **wrong) == "malformed"


# ---- add ------------------------------------------------------------------------------------------------------------


def test_a_user_is_added_with_his_password(house: House) -> None:
    done = house.ask("boss", "user.add", user="new", password="their horse", description="N. User")
    assert (done.password, done.sequence, done.hash) == ("", house.store.sequence, house.store.hash)
    house.come("n")
    assert house.ask("n", "login", user="new", password="their horse") == LoggedIn("new", False, False)
    assert customers(house, "n") == []


def test_a_user_without_a_password_gets_one_to_be_used_once(house: House) -> None:
    done = house.ask("boss", "user.add", user="new", administrator=True)
    house.come("n")
    assert house.ask("n", "login", user="new", password=done.password) == LoggedIn("new", True, True)
    assert house.code("n", "user.list") == "password_change_first"
    house.ask("n", "password", old=done.password, new=WORD)
    assert house.code("n", "user.list") == ""


@pytest.mark.parametrize("user", ["a", "x" * 16, "A.b-9", ".", "-"])
def test_names_at_the_limits_of_their_rule(house: House, user: str) -> None:
    house.ask("boss", "user.add", user=user, password=WORD)
    house.log_in(user)


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"user": ""}, "user"),
        ({"user": "x" * 17}, "user"),
        ({"user": "a b"}, "user"),
        ({"user": "a_b"}, "user"),
        ({"user": "a\n"}, "user"),
        ({"user": "\N{LATIN SMALL LETTER E WITH ACUTE}"}, "user"),
        ({"description": "x" * 41}, "description"),
        ({"description": "a\tb"}, "description"),
        ({"password": "1234567"}, "password"),
        ({"password": "x" * 129}, "password"),
        ({"networks": "192.0.2.1/24"}, "networks"),
        ({"networks": "192.0.2.0/24,198.51.100.0/24"}, "networks"),
        ({"networks": "anywhere"}, "networks"),
        ({"networks": " ".join(["192.0.2.0/24"] * 78)}, "networks"),
    ],
)
def test_a_field_beyond_its_rule_is_named_and_nothing_is_added(
    house: House, fields: dict[str, str], field: str
) -> None:
    before = house.store.sequence
    code, message = house.error("boss", "user.add", **({"user": "new", "password": WORD} | fields))
    assert code == "invalid"
    assert message.startswith(f"{field}: must be ")
    assert fields.get("password", "?") not in message
    assert house.store.sequence == before


def test_the_longest_fields_are_kept(house: House) -> None:
    networks = " ".join(["192.0.2.0/24"] * 77)
    house.ask("boss", "user.add", user="new", description="x" * 40, networks=networks, password="p" * 128)
    assert UserRecord("new", "x" * 40, False, False, False, networks) in house.ask("boss", "user.list").entries


def test_a_name_is_taken_once_also_by_two_at_once(house: House) -> None:
    assert house.error("boss", "user.add", user="jsmith") == ("exists", "there is a user jsmith already")
    house.log_in(SUPERUSER, source="192.0.2.1")
    one = house.begin("boss", "user.add", user="new")
    two = house.begin(SUPERUSER, "user.add", user="new")
    jobs = next(one), next(two)
    for job in jobs:
        house.wait(job)
    house.finish(one)
    with pytest.raises(Exception, match="there is a user new already"):
        house.finish(two)


@pytest.mark.parametrize(("operation", "user"), [("user.add", "new"), ("user.reset", "jsmith")])
def test_who_is_no_administrator_any_more_when_the_hash_is_there_changes_nothing(
    house, operation: str, user: str
) -> None:
    house.log_in(SUPERUSER, source="192.0.2.1")
    begun = house.begin("boss", operation, user=user)
    house.wait(next(begun))
    before = house.store.get(User, user)
    house.ask(SUPERUSER, "user.change", user="boss", administrator=False)
    with pytest.raises(Exception, match="boss is no administrator"):
        house.finish(begun)
    assert house.store.get(User, user) == before


def test_users_have_a_limit(house: House, monkeypatch) -> None:
    monkeypatch.setattr(users, "MAX_USERS", 6)
    assert house.error("boss", "user.add", user="new") == ("full", "there are 6 users: that is the most")


def test_a_long_list_is_whole_and_comes_in_slices(house: House) -> None:
    house.put(*(User(f"u{number:04}") for number in range(1200)))
    assert sum(step is None for step in house.begin("boss", "user.list")) == 2
    assert len(house.ask("boss", "user.list").entries) == 1206


# ---- change ---------------------------------------------------------------------------------------------------------


def test_a_change_leaves_what_it_does_not_name(house: House) -> None:
    house.ask("boss", "user.change", user="jsmith", description="J. Smith", networks="192.0.2.0/24")
    done = house.ask("boss", "user.change", user="jsmith", administrator=True)
    assert (done.sequence, done.hash) == (house.store.sequence, house.store.hash)
    assert (
        UserRecord("jsmith", "J. Smith", True, False, False, "192.0.2.0/24") in house.ask("boss", "user.list").entries
    )
    house.log_in("jsmith", source="192.0.2.1")
    (row,) = house.store.history(User, "jsmith", 0, 1)
    assert (row.user, row.name, row.changes) == ("boss", "user jsmith", {"administrator": (False, True)})


@pytest.mark.parametrize(
    ("fields", "field"), [({"description": "x" * 41}, "description"), ({"networks": "x"}, "networks")]
)
def test_a_change_beyond_a_rule_changes_nothing(house: House, fields: dict[str, str], field: str) -> None:
    code, message = house.error("boss", "user.change", user="jsmith", administrator=True, **fields)
    assert code == "invalid"
    assert message.startswith(f"{field}: must be ")
    assert not house.store.get(User, "jsmith").administrator


def test_a_disabled_user_is_out_at_once(house: House) -> None:
    seats = [house.log_in("jsmith"), house.log_in("jsmith", source="192.0.2.1")]
    house.ask("boss", "user.change", user="jsmith", disabled=True)
    assert [seat.closed_for for seat in seats] == ["logged_out"] * 2
    assert house.seat("boss").closed_for == ""
    assert house.try_login("jsmith", WORD) == REFUSED
    house.ask("boss", "user.change", user="jsmith", disabled=False)
    house.log_in("jsmith")


def test_sessions_from_a_network_that_is_no_longer_allowed_end(house: House) -> None:
    stays, goes = house.log_in("jsmith", source="192.0.2.1"), house.log_in("jsmith", source="198.51.100.1")
    house.ask("boss", "user.change", user="jsmith", networks="192.0.2.0/24")
    assert (stays.closed_for, goes.closed_for) == ("", "logged_out")


def test_an_administrator_loses_his_right_at_the_commit(house: House) -> None:
    house.log_in(SUPERUSER)
    house.ask(SUPERUSER, "user.change", user="boss", administrator=False)
    assert house.code("boss", "user.list") == "denied"


def test_a_change_that_cannot_be_stored_takes_nothing_away(house: House) -> None:
    seat = house.log_in("jsmith")
    begun = house.begin("boss", "user.change", user="jsmith", disabled=True)
    with no_file_grows(), pytest.raises(Exception, match=r"disk|file") as raised:
        house.finish(begun)
    assert raised.value.code == "storage"
    assert seat.closed_for == ""
    assert house.code("jsmith", "whoami") == ""


def test_tapemaster_is_changed_by_himself_alone_and_stays_what_he_is(house: House) -> None:
    house.log_in(SUPERUSER)
    for fields in ({"disabled": True}, {"description": "x"}, {"networks": "192.0.2.0/24"}):
        assert house.code("boss", "user.change", user=SUPERUSER, **fields) == "denied"
    assert house.code("boss", "user.reset", user=SUPERUSER) == "denied"
    for fields in ({"disabled": True}, {"administrator": False}):
        assert house.code(SUPERUSER, "user.change", user=SUPERUSER, **fields) == "conflict"
    house.ask(SUPERUSER, "user.change", user=SUPERUSER, description="root")


@pytest.mark.parametrize("fields", [{"disabled": True}, {"networks": "198.51.100.0/24"}])
def test_nobody_locks_himself_out(house: House, fields: dict[str, Any]) -> None:
    code, message = house.error("boss", "user.change", user="boss", **fields)
    assert (code, message) == ("conflict", "it would lock out boss himself, from 127.0.0.2")
    house.ask("boss", "user.change", user="boss", networks="127.0.0.0/8")


def test_a_reset_gives_a_password_to_be_used_once_and_ends_sessions(house: House) -> None:
    seat = house.log_in("jsmith")
    done = house.ask("boss", "user.reset", user="jsmith")
    assert seat.closed_for == "logged_out"
    assert house.try_login("jsmith", WORD) == REFUSED
    house.come("n")
    assert house.ask("n", "login", user="jsmith", password=done.password) == LoggedIn("jsmith", False, True)


def test_what_is_not_there_is_named(house: House) -> None:
    for operation in ("user.change", "user.reset", "access.list"):
        assert house.error("boss", operation, user="x" * 50) == (
            "not_found",
            f"there is no user '{'x' * 40}...'",
        )
    assert house.code("boss", "access.set", user="unknown", pattern="*", level="read") == "not_found"


@pytest.mark.parametrize("operation", ["user.list", "access.list"])
def test_a_list_gives_nothing_once_the_right_to_it_is_taken_away(house: House, operation: str, monkeypatch) -> None:
    monkeypatch.setattr(users, "SLICE", 1)
    house.put(Access("jsmith US01", READ), Access("jsmith US02", READ))
    house.log_in(SUPERUSER)
    begun = house.begin("boss", operation)
    next(begun)
    house.ask(SUPERUSER, "user.change", user="boss", administrator=False)
    with pytest.raises(OperationError, match="boss is no administrator"):
        house.finish(begun)


# ---- access ---------------------------------------------------------------------------------------------------------


def test_rights_are_given_changed_and_taken_and_hold_from_the_commit_on(house: House) -> None:
    house.log_in("jsmith")
    assert customers(house, "jsmith") == []
    for arguments, visible in (
        ({"pattern": "US01", "level": "read"}, ["US01"]),
        ({"pattern": "US*", "level": "none", "catalog": True}, ["US01", "US02"]),
        ({"pattern": "*", "level": "alter"}, ["EU01", "US01", "US02"]),
        ({"pattern": "*", "level": "none"}, ["US01", "US02"]),
        ({"pattern": "US*", "level": "none"}, ["US01"]),
        ({"pattern": "US01", "level": "none"}, []),
    ):
        done = house.ask("boss", "access.set", user="jsmith", **arguments)
        assert (done.sequence, done.hash) == (house.store.sequence, house.store.hash)
        assert customers(house, "jsmith") == visible
    assert house.store.all(Access) == []


def test_a_right_that_could_not_be_stored_is_not_given(house: House) -> None:
    house.log_in("jsmith")
    begun = house.begin("boss", "access.set", user="jsmith", pattern="*", level="read")
    assert customers(house, "jsmith") == []  # not before the commit
    with no_file_grows(), pytest.raises(Exception, match=r"disk|file"):
        house.finish(begun)
    assert customers(house, "jsmith") == []


def test_entries_are_listed_of_one_and_of_all(house: House) -> None:
    house.put(User("jsmith2"), Access("jsmith US01", READ), Access("jsmith2 *", ALTER, catalog=True))
    mine, other = AccessRecord("jsmith", "US01", "read", False), AccessRecord("jsmith2", "*", "alter", True)
    assert house.ask("boss", "access.list", user="jsmith").entries == [mine]
    assert house.ask("boss", "access.list").entries == [mine, other]
    assert house.ask("boss", "access.list", user="gone").entries == []


@pytest.mark.parametrize("pattern", ["A", "US01", "*", "U*", "US0*"])
def test_patterns_at_the_limits_of_their_rule(house: House, pattern: str) -> None:
    house.ask("boss", "access.set", user="jsmith", pattern=pattern, level="read")


@pytest.mark.parametrize("pattern", ["", "US001", "US01*", "**", "*1", "us01", "US01.LTO", "U S"])
def test_a_pattern_beyond_its_rule_is_refused(house: House, pattern: str) -> None:
    code, message = house.error("boss", "access.set", user="jsmith", pattern=pattern, level="read")
    assert code == "invalid"
    assert message.startswith("pattern: must be ")


@pytest.mark.parametrize("level", ["", "Read", "all", "3"])
def test_a_level_that_is_none_is_refused(house: House, level: str) -> None:
    code, message = house.error("boss", "access.set", user="jsmith", pattern="*", level=level)
    assert code == "invalid"
    assert message.startswith("level: must be one of none, read, write, alter")


def test_an_entry_that_is_not_there_cannot_be_taken(house: House) -> None:
    assert house.error("boss", "access.set", user="jsmith", pattern="US01", level="none") == (
        "not_found",
        "jsmith has no entry US01",
    )


def test_tapemaster_needs_no_entry(house: House) -> None:
    assert house.code("boss", "access.set", user=SUPERUSER, pattern="*", level="read") == "conflict"


def test_entries_have_a_limit(house: House, monkeypatch) -> None:
    monkeypatch.setattr(users, "MAX_ACCESS", 1)
    house.ask("boss", "access.set", user="jsmith", pattern="US01", level="read")
    house.ask("boss", "access.set", user="jsmith", pattern="US01", level="write")
    assert house.error("boss", "access.set", user="jsmith", pattern="US02", level="read") == (
        "full",
        "jsmith has 1 entries: that is the most",
    )
    house.ask("boss", "access.set", user="gone", pattern="US02", level="read")
