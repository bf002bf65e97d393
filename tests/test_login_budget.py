"""tt/catalog/login_budget.py: what is an attack and what is not, how delays grow and end, and how much is kept."""

import tracemalloc
from types import SimpleNamespace

import pytest

from tt.catalog.login_budget import PLACES, LoginBudget

HOUR = 3600.0


class Budget(LoginBudget):
    """With the defaults of tt/config.py, and a clock that stands still until a test moves it."""

    def __init__(self, **settings: float) -> None:
        self.now = 1000.0
        defaults = {"login_failures": 5, "login_window": 600.0, "login_delay": 4.0}
        super().__init__(SimpleNamespace(**(defaults | settings)), lambda: self.now)

    def fail(self, *pairs: str, source: str = "192.0.2.1") -> list[float]:
        """The delays of these failures, each "name password"."""
        return [self.failed(source, *pair.split(" ")) for pair in pairs]


@pytest.fixture
def budget() -> Budget:
    return Budget()


# ---- time-outs ------------------------------------------------------------------------------------------------------


def test_the_fifth_different_pair_uses_up_the_tries_of_its_source_alone(budget: Budget) -> None:
    budget.fail("a 1", "a 2", "b 1", "b 2")
    assert not budget.used_up("192.0.2.1")
    budget.fail("c 1", source="192.0.2.2")
    assert not budget.used_up("192.0.2.1")
    budget.fail("c 1")
    assert budget.used_up("192.0.2.1")
    assert not budget.used_up("192.0.2.2")


def test_it_is_said_once_and_begins_anew(budget: Budget) -> None:
    budget.fail("a 1", "a 2", "a 3", "a 4", "a 5")
    assert budget.used_up("192.0.2.1")
    assert not budget.used_up("192.0.2.1")
    budget.fail("a 1", "a 2", "a 3", "a 4")
    assert not budget.used_up("192.0.2.1")
    budget.fail("a 5")
    assert budget.used_up("192.0.2.1")


def test_a_script_with_an_old_password_never_uses_them_up(budget: Budget) -> None:
    for _ in range(1000):
        budget.fail("batch old")
        budget.now += 1
    assert not budget.used_up("192.0.2.1")


def test_names_and_passwords_that_look_alike_when_joined_are_different_pairs(budget: Budget) -> None:
    for name, password in (("ab", "c"), ("a", "bc"), ("", "abc"), ("abc", ""), ("ab", "C")):
        assert not budget.used_up("192.0.2.1")
        budget.failed("192.0.2.1", name, password)
    assert budget.used_up("192.0.2.1")


def test_a_good_login_forgives_the_failures_of_its_source_with_its_name(budget: Budget) -> None:
    budget.fail("a 1", "a 2", "a 3", "a 4")
    budget.succeeded("192.0.2.1", "a")
    budget.fail("a 5")
    assert not budget.used_up("192.0.2.1")


def test_a_good_login_forgives_no_failures_with_other_names_nor_from_elsewhere(budget: Budget) -> None:
    """Who has an account is not free to guess at another's."""
    for word in "1234":
        budget.fail(f"victim {word}")
        budget.succeeded("192.0.2.1", "mallory")
        budget.succeeded("192.0.2.2", "victim")
    assert not budget.used_up("192.0.2.1")
    assert budget.fail("victim 5") == [4.0]
    assert budget.used_up("192.0.2.1")
    budget.succeeded("192.0.2.1", "victim")
    assert budget.fail("victim 6") == [4.0]  # nor does it shorten delays after the verdict


def test_failures_count_for_the_window_alone(budget: Budget) -> None:
    budget.fail("a 1", "a 2")
    budget.now += 599
    budget.fail("a 3", "a 4")
    budget.now += 1
    budget.fail("a 5")
    assert not budget.used_up("192.0.2.1")
    budget.fail("a 6", "a 7")
    assert budget.used_up("192.0.2.1")


def test_who_was_not_told_in_time_is_not_told_at_all(budget: Budget) -> None:
    budget.fail("a 1", "a 2", "a 3", "a 4", "a 5")
    budget.now += 600
    assert not budget.used_up("192.0.2.1")


def test_the_limit_is_as_configured_and_may_change(budget: Budget) -> None:
    budget = Budget(login_failures=2, login_window=10.0)
    budget.fail("a 1")
    assert not budget.used_up("192.0.2.1")
    budget.settings = SimpleNamespace(login_failures=1, login_window=10.0, login_delay=0.0)
    assert budget.used_up("192.0.2.1")
    assert budget.fail("a 2") == [0.0]


# ---- delays ---------------------------------------------------------------------------------------------------------


def test_delays_grow_to_their_limit_and_end_with_the_window(budget: Budget) -> None:
    assert budget.fail(*["a 1"] * 7) == [0.25, 0.5, 1.0, 2.0, 4.0, 4.0, 4.0]
    budget.now += 599
    assert budget.fail("a 1") == [4.0]
    budget.now += 600
    assert budget.fail("a 1") == [0.25]


def test_a_thousand_failures_do_not_overflow(budget: Budget) -> None:
    assert budget.fail(*["a 1"] * 2000)[-1] == 4.0


def test_a_source_is_delayed_whatever_the_names_and_a_name_wherever_from(budget: Budget) -> None:
    assert budget.fail("a 1", "b 1", "c 1") == [0.25, 0.5, 1.0]
    assert [budget.fail("d 1", source=f"192.0.2.{number}")[0] for number in range(5, 9)] == [0.25, 0.5, 1.0, 2.0]
    assert budget.fail("e 1", source="192.0.2.9") == [0.25]


def test_what_others_do_with_a_name_does_not_delay_a_source_where_it_logged_in(budget: Budget) -> None:
    budget.succeeded("192.0.2.1", "victim")
    for number in range(5, 15):
        budget.fail("victim 1", source=f"192.0.2.{number}")
    assert budget.fail("victim typo", source="192.0.2.99") == [4.0]
    assert budget.fail("victim typo") == [0.25]


def test_a_good_login_with_another_name_does_not_free_a_source_of_the_delay_by_name(budget: Budget) -> None:
    """Else who has an account, and many sources, would guess at another's without a delay."""
    for number in range(5, 15):
        budget.succeeded(f"192.0.2.{number}", "mallory")
        delays = budget.fail("victim 1", source=f"192.0.2.{number}")
    assert delays == [4.0]


def test_a_good_login_ends_the_delay_that_its_name_made(budget: Budget) -> None:
    budget.fail("a 1", "a 1", "b 1", "c 1")
    budget.succeeded("192.0.2.1", "a")
    assert budget.fail("a 1") == [1.0]
    for name in ("b", "c", "a"):
        budget.succeeded("192.0.2.1", name)
    assert budget.fail("d 1") == [0.25]


def test_a_good_login_vouches_for_a_day(budget: Budget) -> None:
    assert not budget.vouched("192.0.2.1")
    budget.succeeded("192.0.2.1", "a")
    budget.now += 24 * HOUR - 1
    assert budget.vouched("192.0.2.1")
    assert not budget.vouched("192.0.2.2")
    budget.now += 1
    assert not budget.vouched("192.0.2.1")


# ---- what is kept ---------------------------------------------------------------------------------------------------


def forge(budget: Budget, count: int) -> None:
    for number in range(count):
        budget.failed(str(number), f"name{number}", "x")
        budget.succeeded(f"good{number}", "a")


def test_full_tables_take_little_memory(budget: Budget) -> None:
    tracemalloc.start()
    try:
        forge(budget, PLACES + 1000)
        assert tracemalloc.get_traced_memory()[1] < 20 << 20
    finally:
        tracemalloc.stop()


def test_a_million_forged_names_fill_the_places_and_no_more(budget: Budget) -> None:
    for number in range(1_000_000):
        budget.failed("192.0.2.1" if number % 2 else str(number), f"name{number}", "x")
        if number % 4 == 1:
            budget.used_up("192.0.2.1")
    assert [len(table._entries) for table in (budget._sources, budget._names)] == [PLACES] * 2
    assert not budget.vouched("192.0.2.1")


def test_who_failed_longest_ago_gives_way(budget: Budget) -> None:
    budget.fail("a 1", "a 2", source="old")
    budget.fail("a 1", "a 2", source="again")
    for number in range(PLACES - 1):
        if number == PLACES // 2:
            budget.fail("a 3", source="again")
        budget.failed(str(number), f"name{number}", "x")
    assert budget.fail("b 1", source="again") == [2.0]
    assert budget.fail("b 2", source="old") == [0.5]  # of its name alone


def test_no_password_is_kept_in_the_clear(budget: Budget) -> None:
    budget.failed("192.0.2.1", "jsmith", "correct horse")
    kept = repr([vars(budget._sources), vars(budget._names), budget._sources._entries["192.0.2.1"][1].pairs])
    assert "correct" not in kept
    assert "jsmith" not in kept
