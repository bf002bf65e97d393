"""tt/catalog/passwords.py: hashes that last, and a thread that delays nobody and never stops."""

import os
import select
import threading
import time
import unicodedata
from collections.abc import Callable, Iterator

import pytest

from tt.catalog import passwords
from tt.catalog.passwords import (
    COST,
    LETTERS,
    SHARE,
    SHARE_OF_NAME,
    Busy,
    Cost,
    Job,
    Passwords,
    hash_password,
    one_time_password,
    same_password,
)

CHEAP = Cost(4, 1, 1)
STRONGER = Cost(5, 1, 1)
PATIENCE = 10.0  # s
WORD = "right horse"


@pytest.fixture
def start() -> Iterator[Callable[..., Passwords]]:
    """Makes hashers that are cheap, and ends them with the test."""
    made: list[Passwords] = []

    def make(cost: Cost = CHEAP, **options: int) -> Passwords:
        made.append(Passwords(cost=cost, **options))
        return made[-1]

    yield make
    for each in made:
        each.close()


class Gate:
    """Stands before every hash: each waits until it is let through.  It notes them in their order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun: list[str] = []
        self._permits = threading.Semaphore(0)
        derive = passwords._derive

        def wait(password: str, cost: Cost, salt: bytes) -> bytes:
            self.begun.append(password)
            assert self._permits.acquire(timeout=PATIENCE)
            return derive(password, cost, salt)

        monkeypatch.setattr(passwords, "_derive", wait)

    def let(self, count: int = 1) -> None:
        self._permits.release(count)


def wait_for(hasher: Passwords, *jobs: Job) -> None:
    """Turn as the loop does, until they are done."""
    while not all(job.done for job in jobs):
        assert select.select([hasher.descriptor], [], [], PATIENCE)[0]
        hasher.turn()


def begun(gate: Gate, count: int) -> None:
    end = time.monotonic() + PATIENCE
    while len(gate.begun) < count:
        assert time.monotonic() < end
        os.sched_yield()


def is_right(hasher: Passwords, password: str, stored: str) -> bool:
    job = hasher.check(password, stored, "")
    wait_for(hasher, job)
    assert job.error is None
    return job.right


# ---- hashes ---------------------------------------------------------------------------------------------------------


def test_a_hash_lets_its_password_in_and_no_other(start) -> None:
    hasher = start()
    stored = hash_password(WORD, CHEAP)
    assert is_right(hasher, WORD, stored)
    for wrong in ("", WORD + " ", WORD.upper(), WORD[:-1], stored):
        assert not is_right(hasher, wrong, stored)


def test_equal_passwords_have_different_hashes() -> None:
    assert hash_password(WORD, CHEAP) != hash_password(WORD, CHEAP)


def test_the_text_names_the_parameters_and_those_are_used(start) -> None:
    stored = hash_password(WORD, Cost(6, 2, 3))
    assert stored.startswith("$scrypt$ln=6,r=2,p=3$")
    assert is_right(start(), WORD, stored)
    assert not is_right(start(), WORD, stored.replace("p=3", "p=2"))


def test_a_vector_of_rfc_7914() -> None:
    """Section 12, "pleaseletmein": N = 16384, r = 8, p = 1; its first 32 bytes."""
    expected = "7023bdcb3afd7348461c06cd81fd38ebfda8fbba904f8e3ea9b543f6545da1f2"
    assert passwords._derive("pleaseletmein", Cost(14, 8, 1), b"SodiumChloride").hex() == expected


def test_a_letter_with_an_accent_is_the_same_from_every_keyboard(start) -> None:
    composed, decomposed = (
        unicodedata.normalize(form, "caf\N{LATIN SMALL LETTER E WITH ACUTE} au lait") for form in ("NFC", "NFD")
    )
    assert composed != decomposed
    assert is_right(start(), decomposed, hash_password(composed, CHEAP))


@pytest.mark.parametrize(
    "stored", ["", "x", "$scrypt$ln=4,r=1,p=1$AAAA$AAAA", "$argon2id$v=19$m=65536$a$b", "$scrypt$ln=4,r=1,p=1$$"]
)
def test_what_is_no_hash_lets_nobody_in_and_costs_the_same(start, stored: str, monkeypatch) -> None:
    hasher = start()
    costs: list[Cost] = []
    derive = passwords._derive
    monkeypatch.setattr(passwords, "_derive", lambda word, cost, salt: costs.append(cost) or derive(word, cost, salt))
    for word in ("", WORD, stored):
        assert not is_right(hasher, word, stored)
    assert costs == [CHEAP] * 3


def test_who_logs_in_with_a_weaker_hash_gets_a_stronger_one(start) -> None:
    hasher = start(STRONGER)
    job = hasher.check(WORD, hash_password(WORD, CHEAP), "")
    wait_for(hasher, job)
    assert job.right
    assert job.made.startswith("$scrypt$ln=5,")
    assert is_right(hasher, WORD, job.made)
    again = hasher.check(WORD, job.made, "")
    wrong = hasher.check("x", hash_password(WORD, CHEAP), "")
    wait_for(hasher, again, wrong)
    assert (again.made, wrong.made) == ("", "")


def test_a_stronger_hash_is_known_to_be_of_the_same_password_and_a_new_one_is_not(start) -> None:
    hasher, stored = start(STRONGER), hash_password(WORD, CHEAP)
    job = hasher.check(WORD, stored, "")
    wait_for(hasher, job)
    assert same_password(stored, job.made)
    assert not same_password(stored, hash_password(WORD, CHEAP))
    assert not same_password(stored, "")
    assert not same_password("", "")


def test_a_new_password_is_hashed_only_for_who_knows_the_old_one(start) -> None:
    hasher = start()
    stored = hash_password(WORD, CHEAP)
    right, wrong = hasher.change(WORD, stored, "another", ""), hasher.change("x", stored, "another", "")
    wait_for(hasher, right, wrong)
    assert (right.right, wrong.right, wrong.made) == (True, False, "")
    assert is_right(hasher, "another", right.made)


def test_a_one_time_password_is_read_and_typed_without_mistakes() -> None:
    made = {one_time_password() for _ in range(1000)}
    assert len(made) == 1000
    assert all(len(each) == 19 and set(each) <= set(LETTERS + "-") for each in made)
    assert len(LETTERS) == 32
    assert not set(LETTERS) & set("l1o0")


# ---- the thread -----------------------------------------------------------------------------------------------------


def test_python_goes_on_beside_a_hash(start) -> None:
    """What holds the GIL lets this loop turn a few times at most, beside any hash."""
    hasher = start(COST)

    def turns() -> int:
        job = hasher.make(WORD)
        count = 0
        while not job.done:
            count += 1
            hasher.turn()
        return count

    assert any(turns() > 1000 for _ in range(20))  # where this thread does not run meanwhile, the next one shows it


def test_the_thread_is_nicer_than_the_process(start) -> None:
    hasher = start()
    wait_for(hasher, hasher.make(WORD))  # it has begun
    thread = os.getpriority(os.PRIO_PROCESS, hasher._thread.native_id)
    assert thread == min(os.getpriority(os.PRIO_PROCESS, 0) + 10, 19)


def test_where_nobody_may_be_nicer_passwords_are_checked_all_the_same(start, monkeypatch) -> None:
    def forbidden(_: int) -> int:
        raise PermissionError(1, "Operation not permitted")  # as under a seccomp filter without setpriority(2)

    monkeypatch.setattr(os, "nice", forbidden)
    assert is_right(start(), WORD, hash_password(WORD, CHEAP))


def test_the_queue_is_bounded_and_those_who_come_first_have_their_own(start, monkeypatch) -> None:
    gate = Gate(monkeypatch)
    hasher = start(queue=2)
    jobs = [hasher.make("in work")]
    begun(gate, 1)
    jobs += [hasher.check("x", "", f"192.0.2.{number}") for number in range(2)]
    with pytest.raises(Busy):
        hasher.check("x", "", "192.0.2.3")
    jobs += [hasher.check("first", "", f"192.0.2.{number}", first=True) for number in range(4, 6)]
    with pytest.raises(Busy):
        hasher.check("first", "", "192.0.2.6", first=True)
    gate.let(9)
    wait_for(hasher, *jobs)
    assert gate.begun == ["in work", "first", "first", "x", "x"]
    wait_for(hasher, hasher.check("x", "", "192.0.2.3"))  # who was told to come again comes in


def test_a_source_has_a_share_and_is_served_by_turns_with_the_others(start, monkeypatch) -> None:
    gate = Gate(monkeypatch)
    hasher = start()
    jobs = [hasher.check(f"a{number}", "", "192.0.2.1") for number in range(SHARE)]
    for busy in (hasher.check, hasher.make):
        with pytest.raises(Busy):
            busy("a", *([""] if busy == hasher.check else []), "192.0.2.1")
    jobs += [hasher.check(f"b{number}", "", "192.0.2.2") for number in range(3)]
    jobs.append(hasher.check("c0", "", "192.0.2.3"))
    gate.let(len(jobs))
    wait_for(hasher, *jobs)
    assert gate.begun == ["a0", "a1", "b0", "c0", "a2", "b1", "a3", "b2", "a4", "a5", "a6", "a7"]
    gate.let()
    wait_for(hasher, hasher.check(WORD, "", "192.0.2.1"))
    assert not hasher._sources


def test_one_name_leaves_places_for_the_others_of_its_source(start, monkeypatch) -> None:
    gate = Gate(monkeypatch)
    hasher = start()
    jobs = [hasher.check("old", "", "192.0.2.1", "script") for _ in range(SHARE_OF_NAME)]
    with pytest.raises(Busy):
        hasher.check("old", "", "192.0.2.1", "script")
    jobs.append(hasher.check("old", "", "192.0.2.2", "script"))
    jobs.append(hasher.check("new", "", "192.0.2.1", "colleague"))
    gate.let(len(jobs))
    wait_for(hasher, *jobs)
    assert not hasher._sources
    assert not hasher._names


def test_of_a_source_only_one_comes_first(start, monkeypatch) -> None:
    """With more, a source that is known could keep all strangers waiting for ever."""
    gate = Gate(monkeypatch)
    hasher = start()
    jobs = [hasher.make("in work")]
    jobs.append(hasher.check("stranger", "", "192.0.2.2"))
    jobs += [hasher.check(f"known{number}", "", "192.0.2.1", first=True) for number in range(3)]
    gate.let(len(jobs))
    wait_for(hasher, *jobs)
    assert gate.begun == ["in work", "known0", "stranger", "known1", "known2"]


def test_a_few_sources_do_not_fill_the_queue(start, monkeypatch) -> None:
    gate = Gate(monkeypatch)
    hasher = start(queue=8)
    jobs = [hasher.make("in work")]
    jobs += [hasher.check("x", "", "192.0.2.1") for _ in range(4)]
    with pytest.raises(Busy):
        hasher.check("x", "", "192.0.2.1")
    for number in range(2, 6):
        jobs.append(hasher.check("x", "", f"192.0.2.{number}"))
        with pytest.raises(Busy):
            hasher.check("x", "", f"192.0.2.{number}")
    with pytest.raises(Busy):
        hasher.check("x", "", "192.0.2.6")
    gate.let(len(jobs))
    wait_for(hasher, *jobs)


def test_the_middle_one_of_a_source_can_be_dropped(start, monkeypatch) -> None:
    gate = Gate(monkeypatch)
    hasher = start()
    jobs = [hasher.check(word, "", "192.0.2.1") for word in "abcd"]
    hasher.drop(jobs[2])
    hasher.drop(jobs[2])
    gate.let(4)
    wait_for(hasher, jobs[0], jobs[1], jobs[3])
    assert gate.begun == ["a", "b", "d"]
    assert not hasher._sources


def test_what_nobody_waits_for_any_more_is_not_done(start, monkeypatch) -> None:
    gate = Gate(monkeypatch)
    hasher = start(queue=1)
    working = hasher.check("working", "", "192.0.2.1")
    begun(gate, 1)
    dropped = hasher.check("dropped", "", "192.0.2.2")
    hasher.drop(dropped)
    hasher.drop(working)  # too late
    last = hasher.check("last", "", "192.0.2.2")  # its place and its source are free
    with pytest.raises(Busy):
        hasher.check("x", "", "192.0.2.1")
    gate.let(9)
    wait_for(hasher, working, last)
    assert gate.begun == ["working", "last"]
    assert not dropped.done


def test_a_hash_that_fails_is_no_verdict_and_the_thread_goes_on(start) -> None:
    hasher = start()
    stored = hash_password(WORD, CHEAP)
    failed = hasher.check(WORD, stored.replace("ln=4,r=1", "ln=40,r=32"), "192.0.2.1")  # 4 PiB
    wait_for(hasher, failed)
    assert failed.error is not None
    assert not failed.right
    assert is_right(hasher, WORD, stored)


def test_a_megabyte_for_a_password_costs_no_more(start) -> None:
    hasher = start()
    assert not is_right(hasher, "\N{LATIN SMALL LETTER E WITH ACUTE}" * (1 << 20), hash_password(WORD, CHEAP))


def test_the_end_waits_for_the_hash_in_work_alone(start, monkeypatch) -> None:
    gate = Gate(monkeypatch)
    hasher = start()
    hasher.make("working")
    begun(gate, 1)
    for _ in range(10):
        hasher.make("waiting")
    gate.let()
    hasher.close()
    hasher.close()
    assert gate.begun == ["working"]
