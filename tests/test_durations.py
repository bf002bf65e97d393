"""tt/durations.py: what is counted of durations, against a plain list of them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tt.durations import BOUNDS, MINUTE, Durations

SECONDS = st.floats(0, 100, allow_nan=False)


@given(st.lists(SECONDS))
def test_buckets_and_sum_are_those_of_a_list(durations: list[float]) -> None:
    counted = Durations()
    for seconds in durations:
        counted.add(seconds, 0.0)
    bounds = [*map(str, BOUNDS), "inf"]
    assert [float(name) for name in counted.buckets()] == [float(bound) for bound in bounds]
    for name, count in counted.buckets().items():
        assert count == sum(seconds <= float(name) for seconds in durations)
    assert counted.sum == pytest.approx(sum(durations))


@given(st.lists(st.tuples(SECONDS, st.floats(0, 30)), max_size=50), st.floats(0, 130))
def test_the_longest_is_of_the_last_minute(durations: list[tuple[float, float]], later: float) -> None:
    """Of whole seconds: what ended between one minute and a second less ago may be in it or not."""
    counted, now, added = Durations(), 1000.0, []
    for seconds, pause in durations:
        now += pause
        counted.add(seconds, now)
        added.append((now, seconds))
    now += later
    of_last = [seconds for at, seconds in added if now - at < MINUTE - 1]
    of_more = [seconds for at, seconds in added if now - at <= MINUTE]
    assert max(of_last, default=0.0) <= counted.longest(now) <= max(of_more, default=0.0)


def test_a_minute_later_a_shorter_one_is_the_longest() -> None:
    counted = Durations()
    counted.add(5.0, 1000.0)
    counted.add(1.0, 1000.0 + MINUTE)  # in the place of that second
    assert counted.longest(1000.0 + MINUTE) == 1.0


def test_nothing_is_counted_as_nothing() -> None:
    counted = Durations()
    assert (counted.sum, counted.longest(0.0), counted.longest(1e6)) == (0, 0, 0)
    assert set(counted.buckets().values()) == {0}
    assert list(counted.buckets())[-1] == "+Inf"
