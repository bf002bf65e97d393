"""tt/catalog/accounts.py: who gets in and who does not, at equal cost; passwords; sessions."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from accounts_kit import CHEAP, HASH, REFUSED, WORD, Gate, House, building
from harness import until
from store_kit import no_file_grows

from tt import config
from tt.catalog import accounts, passwords
from tt.catalog.accounts import HOST
from tt.catalog.messages import AccessRecord, LoggedIn
from tt.catalog.model import SUPERUSER, User
from tt.catalog.passwords import SHARE_OF_NAME, Cost, hash_password
from tt.catalog.schema import fingerprint
from tt.dispatch import OperationError


@pytest.fixture
def build(tmp_path: Path) -> Iterator[Callable[..., House]]:
    with building(tmp_path) as make:
        yield make


@pytest.fixture
def house(build) -> House:
    return build()


@pytest.fixture
def hashes(monkeypatch) -> list[str]:
    """The passwords that are hashed."""
    done: list[str] = []
    derive = passwords._derive
    monkeypatch.setattr(passwords, "_derive", lambda word, cost, salt: done.append(word) or derive(word, cost, salt))
    return done


@pytest.fixture
def gate(monkeypatch) -> Iterator[Gate]:
    made = Gate(monkeypatch)
    yield made
    made.free.set()


# ---- login ----------------------------------------------------------------------------------------------------------


def test_the_right_password_begins_a_session(house: House) -> None:
    seat = house.come("a")
    assert house.ask("a", "login", user="boss", password=WORD) == LoggedIn("boss", True, False)
    assert seat.account.name == "boss"
    assert house.accounts.sessions() == 1


@pytest.mark.parametrize(
    ("user", "password"),
    [
        ("jsmith", "wrong"),
        ("jsmith", ""),
        ("jsmith", WORD + " "),
        ("JSMITH", WORD),
        ("unknown", WORD),
        ("", WORD),
        ("x" * 3000, WORD),
        ("\N{SNOWMAN} ' OR 1", WORD),
        ("gone", WORD),
        ("abroad", WORD),
        ("nobody", ""),
        ("nobody", WORD),
    ],
)
def test_whoever_is_not_let_in_costs_one_hash_and_gets_one_answer(house, hashes, user: str, password: str) -> None:
    assert house.try_login(user, password) == REFUSED
    assert hashes == [password]
    assert house.seats["stranger"].account is None
    assert house.accounts.sessions() == 0


def test_the_hash_of_who_is_not_let_in_has_the_cost_of_one_who_is(house, monkeypatch) -> None:
    costs: list[Cost] = []
    derive = passwords._derive
    monkeypatch.setattr(passwords, "_derive", lambda word, cost, salt: costs.append(cost) or derive(word, cost, salt))
    for user in ("jsmith", "unknown", "gone", "abroad", "nobody"):
        house.try_login(user, WORD)
    assert costs == [CHEAP] * 5


@pytest.mark.parametrize(
    ("source", "enters"),
    [
        ("192.0.2.77", True),
        ("192.0.3.1", False),
        ("2001:db8:5::1", True),
        ("2001:db9::1", False),
        ("fe80::1%lo", False),
    ],
)
def test_a_user_comes_from_his_networks_alone(house: House, source: str, enters: bool) -> None:
    assert house.try_login("abroad", WORD, source) == (("", "") if enters else REFUSED)


def test_a_second_login_in_a_session_is_a_conflict(house: House, hashes) -> None:
    house.log_in("jsmith")
    assert house.code("jsmith", "login", user="boss", password=WORD) == "conflict"
    assert hashes == [WORD]


def test_a_password_that_changes_while_it_is_checked_lets_nobody_in(house: House) -> None:
    house.come("a")
    begun = house.begin("a", "login", user="jsmith", password=WORD)
    pending = next(begun)  # in work
    house.put(house.changed("jsmith", password=hash_password("another", CHEAP)))
    house.wait(pending)
    with pytest.raises(OperationError, match="together"):
        house.finish(begun)


def test_who_is_disabled_while_his_password_is_checked_is_not_let_in(house: House) -> None:
    house.come("a")
    begun = house.begin("a", "login", user="jsmith", password=WORD)
    pending = next(begun)
    house.put(house.changed("jsmith", disabled=True))
    house.wait(pending)
    with pytest.raises(OperationError, match="together"):
        house.finish(begun)


def test_a_weaker_hash_is_replaced_at_login_and_the_history_shows_fingerprints_alone(house: House) -> None:
    weak = hash_password(WORD, Cost(3, 1, 1))
    house.put(house.changed("jsmith", password=weak))
    house.log_in("jsmith")
    house.wait(house.commit())
    stored = house.store.get(User, "jsmith").password
    assert stored.startswith("$scrypt$ln=4,")
    house.log_in("jsmith")
    (row,) = house.store.history(User, "jsmith", 0, 1)
    assert (row.user, row.changes) == ("jsmith", {"password": (fingerprint(weak), fingerprint(stored))})


def test_a_hash_that_is_replaced_meanwhile_keeps_nobody_out(house: House) -> None:
    house.put(house.changed("jsmith", password=hash_password(WORD, Cost(3, 1, 1))))
    for seat, source in (("a", "192.0.2.1"), ("b", "192.0.2.2")):
        house.come(seat, source)
    one = house.begin("a", "login", user="jsmith", password=WORD)
    two = house.begin("b", "login", user="jsmith", password=WORD)
    jobs = next(one), next(two)
    house.wait(jobs[0])
    house.finish(one)
    house.wait(house.commit())
    assert house.store.get(User, "jsmith").password.startswith("$scrypt$ln=4,")
    house.wait(jobs[1])
    house.finish(two)


def test_a_stronger_hash_does_not_overtake_a_new_password(house: House) -> None:
    house.put(house.changed("jsmith", password=hash_password(WORD, Cost(3, 1, 1))))
    house.come("a")
    login = house.begin("a", "login", user="jsmith", password=WORD)
    job = next(login)
    reset = house.accounts.reset("jsmith", HOST)
    house.commit()
    house.store.turn()
    house.hash(job)
    house.hash(house.passwords.make("behind that of the reset"))
    with pytest.raises(StopIteration):
        next(login)  # the stronger hash waits for the commit behind the new password
    done = house.finish(reset)
    assert house.try_login("jsmith", WORD) == REFUSED
    assert house.try_login("jsmith", done.password) == ("", "")


def test_memory_that_lacks_is_busy_and_no_failed_login(house: House) -> None:
    house.put(house.changed("jsmith", password=HASH.replace("ln=4,r=1", "ln=40,r=32")))
    for word in "1234567890":
        assert house.try_login("jsmith", word)[0] == "busy"
    assert house.seats["stranger"].closed_for == ""


def test_a_session_that_ends_while_its_password_is_checked_is_not_logged_in(house: House) -> None:
    """Its end is told once: what is added behind that stays for ever."""
    seat = house.come("a")
    begun = house.begin("a", "login", user="jsmith", password=WORD)
    pending = next(begun)
    seat.close("too_long")
    house.wait(pending)
    with pytest.raises(OperationError, match="has ended"):
        house.finish(begun)
    assert (house.accounts.sessions(), seat.account, house.vouched) == (0, None, [])


# ---- how many at once -----------------------------------------------------------------------------------------------


def test_a_few_logins_at_once_from_a_source_all_get_in_and_more_are_told_to_come_again(house: House, gate) -> None:
    logins = []
    for number in range(SHARE_OF_NAME):
        house.come(f"a{number}", "192.0.2.1")
        begun = house.begin(f"a{number}", "login", user="jsmith", password=WORD)
        logins.append((begun, next(begun)))
    assert house.try_login("jsmith", WORD, "192.0.2.1")[0] == "busy"
    house.come("b", "192.0.2.2")
    begun = house.begin("b", "login", user="boss", password=WORD)
    logins.append((begun, next(begun)))
    gate.free.set()
    for begun, pending in logins:
        house.wait(pending)
        house.finish(begun)
    assert house.accounts.sessions() == SHARE_OF_NAME + 1
    assert house.try_login("jsmith", WORD, "192.0.2.1") == ("", "")


def test_a_full_queue_is_busy_but_not_for_a_source_that_is_vouched_for(build, gate) -> None:
    house = build(password_queue="1")
    gate.free.set()
    house.log_in("jsmith", source="192.0.2.1")
    gate.free.clear()
    logins = []
    for number in (2, 3):  # the first is in work, the second fills the queue
        house.come("x", f"192.0.2.{number}")
        begun = house.begin("x", "login", user="unknown", password="x")
        logins.append((begun, next(begun)))
        until("it is in work", lambda: len(gate.begun) == 2)
    assert house.try_login("jsmith", WORD, "192.0.2.4")[0] == "busy"
    house.come("a", "192.0.2.1")
    known = house.begin("a", "login", user="jsmith", password=WORD)
    logins.append((known, next(known)))
    gate.free.set()
    for begun, pending in logins:
        house.wait(pending)
        if begun is known:
            assert house.finish(begun).user == "jsmith"
        else:
            with pytest.raises(OperationError, match="together"):
                house.finish(begun)
    assert gate.begun[-2:] == [WORD, "x"]


# ---- failed logins --------------------------------------------------------------------------------------------------


def test_five_different_failures_time_the_source_out(house: House) -> None:
    for user, password in (("jsmith", "1"), ("jsmith", "2"), ("boss", "1"), ("unknown", "1")):
        assert house.try_login(user, password) == REFUSED
        assert house.seats["stranger"].closed_for == ""
    assert house.try_login("gone", "1", "192.0.2.1") == REFUSED  # another source
    assert house.seats["stranger"].closed_for == ""
    assert house.try_login("unknown", "2") == REFUSED
    assert house.seats["stranger"].closed_for == "login_failed"


def test_a_script_with_an_old_password_is_never_timed_out(house: House) -> None:
    for _ in range(50):
        assert house.try_login("jsmith", "old") == REFUSED
        assert house.seats["stranger"].closed_for == ""
        house.tick += 1


def test_a_failed_login_is_logged_with_a_name_that_is_one(house: House, caplog) -> None:
    """What was sent for a name may be a password, typed too early."""
    with caplog.at_level("INFO", "tt"):
        house.try_login("jsmith", "wrong", "192.0.2.1")
        house.try_login("secret", "wrong", "192.0.2.1")
    assert [(record.message, record.fields) for record in caplog.records] == [
        ("login failed", {"user": "jsmith", "source": "192.0.2.1"}),
        ("login failed", {"user": None, "source": "192.0.2.1"}),
    ]


def test_who_has_an_account_does_not_guess_at_anothers_between_his_logins(house: House) -> None:
    for word in "1234":
        assert house.try_login("boss", word) == REFUSED
        assert house.seats["stranger"].closed_for == ""
        house.log_in("jsmith")
    house.try_login("boss", "5")
    assert house.seats["stranger"].closed_for == "login_failed"


def test_a_good_login_between_forgives(house: House) -> None:
    for word in "1234":
        house.try_login("jsmith", word)
    house.log_in("jsmith")
    for word in "5678":
        house.try_login("jsmith", word)
    assert house.seats["stranger"].closed_for == ""


def test_the_limit_is_an_option_that_may_change(build) -> None:
    house = build(login_failures="2")
    house.try_login("jsmith", "1")
    house.accounts.configure(config.load(None, {}, {"login_failures": "3", "login_delay": "0 s"}))
    house.try_login("jsmith", "2")
    assert house.seats["stranger"].closed_for == ""
    house.try_login("jsmith", "3")
    assert house.seats["stranger"].closed_for == "login_failed"


def test_who_leaves_before_the_answer_is_counted_all_the_same(house: House, hashes) -> None:
    for word in "12345":
        house.come("a")
        begun = house.begin("a", "login", user="jsmith", password=word)
        job = next(begun)
        house.wait(job)
        begun.close()
    assert len(hashes) == 5
    assert house.try_login("jsmith", WORD) == REFUSED
    assert house.seats["stranger"].closed_for == "login_failed"
    assert len(hashes) == 5
    assert house.try_login("jsmith", WORD) == ("", "")  # one verdict for five


def test_the_answer_to_a_failed_login_is_held_back_and_nobody_else_waits(build) -> None:
    house = build(login_delay="4 s")
    held = []
    for delay in (0.25, 0.5, 1.0, 2.0):
        house.come("a", "192.0.2.1")
        begun = house.begin("a", "login", user="jsmith", password="old")
        house.wait(next(begun))
        held.append((next(begun), house.tick + delay, begun))
    house.log_in("jsmith", source="192.0.2.1")  # of the same source and name, with the right password
    house.log_in("boss", source="192.0.2.2")
    for pending, end, begun in held:
        house.tick = end - 0.01
        house.accounts.turn()
        assert not pending.done
        house.tick = end
        house.wait(pending)
        with pytest.raises(OperationError, match="together"):
            next(begun)


def test_a_stranger_cannot_slow_the_owner_of_a_name_where_he_is_known(build) -> None:
    house = build(login_delay="4 s")
    house.log_in("jsmith", source="192.0.2.1")
    for number in range(2, 9):
        house.come("a", f"192.0.2.{number}")
        begun = house.begin("a", "login", user="jsmith", password="guess")
        house.wait(next(begun))
        house.tick += 1
        begun.close()
    house.come("a", "192.0.2.1")
    begun = house.begin("a", "login", user="jsmith", password="typo")
    house.wait(next(begun))
    pending = next(begun)
    house.tick += 0.25
    house.wait(pending)


def test_the_owner_of_a_name_gets_in_at_once_from_anywhere_while_others_guess(build) -> None:
    house = build(login_delay="4 s")
    for number in range(2, 9):
        house.come("a", f"192.0.2.{number}")
        begun = house.begin("a", "login", user="jsmith", password="guess")
        house.wait(next(begun))
    house.log_in("jsmith", source="198.51.100.1")


def test_a_good_login_vouches_for_its_source_and_a_bad_one_does_not(house: House) -> None:
    house.try_login("jsmith", "wrong", "192.0.2.1")
    assert house.vouched == []
    house.log_in("jsmith", source="192.0.2.2")
    assert house.vouched == ["192.0.2.2"]


def test_without_vouching_no_source_is_vouched_for(build) -> None:
    house = build(vouching="false")
    house.log_in("jsmith")
    assert house.vouched == []
    house.accounts.configure(config.load(None, {}, {}))
    house.log_in("jsmith")
    assert house.vouched == ["127.0.0.2"]


# ---- one's own session ----------------------------------------------------------------------------------------------

OWN = ("logout", "whoami", "password", "user.list", "user.add", "session.list", "access.list")


@pytest.mark.parametrize("operation", OWN)
def test_before_a_login_there_is_nothing_else(house: House, operation: str) -> None:
    house.come("a")
    assert house.code("a", operation, user="x", old="x", new="y") == "login_first"


def test_logout_ends_the_session(house: House) -> None:
    seat = house.log_in("jsmith")
    assert house.ask("jsmith", "logout") is None
    assert seat.closed_for == "logged_out"


def test_whoami_says_who_from_where_with_which_rights(house: House) -> None:
    house.log_in("boss")
    house.ask("boss", "access.set", user="jsmith", pattern="US*", level="write", catalog=True)
    house.log_in("jsmith", source="192.0.2.1")
    me = house.ask("jsmith", "whoami")
    assert (me.user, me.administrator, me.source) == ("jsmith", False, "192.0.2.1")
    assert me.access == [AccessRecord("jsmith", "US*", "write", catalog=True)]
    house.log_in(SUPERUSER)
    assert house.ask(SUPERUSER, "whoami").access == [AccessRecord(SUPERUSER, "*", "alter", catalog=True)]


def test_a_user_changes_his_password_and_his_other_sessions_end(house: House) -> None:
    other, seat = house.log_in("jsmith"), house.log_in("jsmith")
    boss = house.log_in("boss")
    done = house.ask("jsmith", "password", old=WORD, new="another horse")
    assert (done.sequence, done.hash) == (house.store.sequence, house.store.hash)
    assert (other.closed_for, seat.closed_for, boss.closed_for) == ("logged_out", "", "")
    assert house.try_login("jsmith", WORD) == REFUSED
    assert house.try_login("jsmith", "another horse") == ("", "")


def test_the_old_password_is_asked_for_and_guesses_count(house: House) -> None:
    seat = house.log_in("jsmith")
    for word in "1234":
        assert house.error("jsmith", "password", old=word, new="another horse") == REFUSED
        assert seat.closed_for == ""
    house.error("jsmith", "password", old="5", new="another horse")
    assert seat.closed_for == "login_failed"
    assert house.store.get(User, "jsmith").password == HASH


@pytest.mark.parametrize(
    ("new", "says"),
    [("1234567", "8 to 128"), ("x" * 129, "8 to 128"), ("", "8 to 128"), (WORD, "another than the old")],
)
def test_a_password_that_breaks_the_rule_is_refused_before_it_costs_anything(
    house, hashes, new: str, says: str
) -> None:
    house.log_in("jsmith")
    hashes.clear()
    code, message = house.error("jsmith", "password", old=WORD, new=new)
    assert code == "invalid"
    assert says in message
    assert not new or new not in message
    assert hashes == []


@pytest.mark.parametrize("new", ["12345678", "x" * 128, "\N{SNOWMAN}" * 8])
def test_passwords_at_the_limits_of_the_rule(house: House, new: str) -> None:
    house.log_in("jsmith")
    house.ask("jsmith", "password", old=WORD, new=new)
    house.log_in("jsmith", new)


def test_of_two_changes_at_once_one_is_made(house: House) -> None:
    first, second = house.log_in("jsmith", source="192.0.2.1"), house.log_in("jsmith", source="192.0.2.2")
    house.seats["first"], house.seats["second"] = first, second
    one = house.begin("first", "password", old=WORD, new="first horse")
    two = house.begin("second", "password", old=WORD, new="second horse")
    jobs = next(one), next(two)
    for job in jobs:
        house.wait(job)
    house.finish(one)
    with pytest.raises(OperationError, match="together"):
        house.finish(two)
    assert house.try_login("jsmith", "first horse") == ("", "")


def test_a_change_that_another_has_overtaken_in_one_commit_is_not_made(house: House) -> None:
    house.seats["first"] = house.log_in("jsmith", source="192.0.2.1")
    house.seats["second"] = house.log_in("jsmith", source="192.0.2.2")
    one = house.begin("first", "password", old=WORD, new="first horse")
    two = house.begin("second", "password", old=WORD, new="second horse")
    for job in (next(one), next(two)):
        house.wait(job)
    with pytest.raises(StopIteration) as made:
        next(one)  # its change waits for the disk
    with pytest.raises(OperationError, match="together"):
        next(two)
    house.finish(made.value.value)
    assert house.try_login("jsmith", "first horse") == ("", "")


def test_a_change_during_a_commit_waits_for_it(house: House) -> None:
    house.log_in("jsmith")
    begun = house.begin("jsmith", "password", old=WORD, new="another horse")
    house.wait(next(begun))
    commit = house.commit()
    house.store.turn()  # it is under way
    assert house.store.busy is commit
    assert next(begun) is commit
    house.wait(commit)
    house.finish(begun)
    house.log_in("jsmith", "another horse")


def test_a_password_that_cannot_be_stored_is_not_changed(house: House) -> None:
    seat = house.log_in("jsmith")
    begun = house.begin("jsmith", "password", old=WORD, new="another horse")
    house.wait(next(begun))
    with no_file_grows(), pytest.raises(OperationError) as raised:
        house.finish(begun)
    assert raised.value.code == "storage"
    assert seat.closed_for == ""
    house.log_in("jsmith")


# ---- sessions -------------------------------------------------------------------------------------------------------


def test_sessions_are_listed_from_login_to_end(house: House) -> None:
    house.log_in("boss")
    seat = house.come("jsmith", "192.0.2.1", "scanner 1.0")
    assert house.listed() == [("boss", "127.0.0.2")]
    house.ask("jsmith", "login", user="jsmith", password=WORD)
    seat.requests = 7
    entry = house.ask("boss", "session.list").entries[1]
    assert (entry.user, entry.source, entry.interface, entry.requests) == ("jsmith", "192.0.2.1", "scanner 1.0", 7)
    house.end(seat)
    house.end(seat)
    assert house.listed() == [("boss", "127.0.0.2")]


def test_a_list_of_sessions_ends_where_the_right_to_it_does(house: House, monkeypatch) -> None:
    monkeypatch.setattr(accounts, "SLICE", 1)
    house.log_in("boss")
    begun = house.begin("boss", "session.list")
    next(begun)
    house.put(house.changed("boss", administrator=False))
    with pytest.raises(OperationError, match="no administrator"):
        house.finish(begun)


def test_an_administrator_disconnects_the_session_that_he_names(house: House) -> None:
    house.log_in("boss")
    seats = [house.log_in("jsmith") for _ in range(3)]
    identity = house.ask("boss", "session.list").entries[2].id
    house.ask("boss", "session.disconnect", id=identity)
    assert [seat.closed_for for seat in seats] == ["", "logged_out", ""]
    house.end(seats[1])
    house.log_in("jsmith")
    assert house.code("boss", "session.disconnect", id=identity) == "not_found"  # no number is used twice
    assert house.code("boss", "session.disconnect", id=-1) == "not_found"


def test_nothing_stays_open(tmp_path: Path) -> None:
    before = set(os.listdir("/proc/self/fd"))
    with House(tmp_path) as house:
        house.log_in("jsmith")
    assert set(os.listdir("/proc/self/fd")) <= before
