"""`tt top` without a terminal: rates and charts from samples, the picture as lines, and what the keys ask."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tt.cli import top_view
from tt.cli.report_figures import Entry
from tt.cli.top_keys import QUIT, Keys
from tt.cli.top_model import KEPT, PER_SAMPLE, RECENT, WINDOW, Model, Sample, asks_after
from tt.cli.top_view import LEAST, RATES, Screen, cells, chart, cut, figure, frame, moment, plain

NOW = 1_800_000_000.0  # s since 1970
SMALL = Screen(*LEAST)


def status(at: float = 0, **changes: Any) -> dict[str, Any]:
    """What a server answers that has counted nothing."""
    return {
        "version": "0.1.0", "pid": 77, "uptime_s": 100 + at, "observe": False, "exempt": [],
        "accepted": 0, "handshakes": 0, "frames": 0, "closed": {"timed_out": 0},
        "connections": {"new": 0, "waiting": 0, "open": 1, "logged_in": 2, "closing": 0},
        "table": {"running": 0, "remembered": 0, "evictions": 0, "size": 65536},
        "timeouts": {}, "timeouts_lifted": 0, "timeouts_expired": 0,
        "gate": None, "catalog": None, "log_dropped_lines": 0,
        "process": {
            "rss_bytes": 50 << 20, "cpu_seconds": 0.0, "descriptors": 9, "descriptor_limit": 1024, "threads": 4,
        },
        "history": {"held": 0, "most": 10_000, "begun": 0},
    } | changes  # fmt: skip


def gate(**changes: Any) -> dict[str, Any]:
    one = {
        "map": "/sys/fs/bpf/m", "family": "IPv4", "kind": "HASH", "value_bytes": 4, "size": 1024, "entries": 3,
        "missing": 0, "errors": {"full": 0},
    }  # fmt: skip
    return {"maps": [one | changes], "filter": {"attached": True, "dropped": 0}}


def catalog(commits: int, seconds: float, worst: float = 0.0, failed: int = 0) -> dict[str, Any]:
    times = {"commits": commits, "commit_seconds": seconds, "commit_seconds_max": worst, "commit_failures": failed}
    return {**times, "volumes": 10_000}


def entry(number: int, source: str = "192.0.2.1", **changes: Any) -> Entry:
    fields = {"reason": "not_protocol", "at_s": NOW - 60, "seconds": 600.0, "looks": "HTTP request", "state": "running"}
    return Entry(**{"number": number, "source": source, **fields, **changes})  # type: ignore[arg-type]


def listed(*entries: Entry, at: float = 0, begun: int | None = None, **changes: Any) -> Sample:
    """A sample of a server whose history has these."""
    newest = max((one.number for one in entries), default=0) if begun is None else begun
    return Sample(at, status(at, history={"held": 1, "most": 10_000, "begun": newest}, **changes), entries)


def counted(*accepted: int, step: float = 1.0) -> Model:
    """A model after samples at 0, `step`, ... that had accepted so many."""
    model = Model()
    for number, count in enumerate(accepted):
        model.add(Sample(number * step, status(number * step, accepted=count), []))
    return model


def picture(model: Model, keys: Keys | None = None, screen: Screen = SMALL, now: float = NOW) -> list[str]:
    lines = frame(model, keys or Keys(), screen, now)
    assert len(lines) == screen.height
    assert {cells("".join(span.text for span in line)) for line in lines} == {screen.width}
    return [plain(line) for line in lines]


def styles(model: Model, text: str, keys: Keys | None = None) -> str:
    """The style in which a piece with this text is shown."""
    spans = [span for line in frame(model, keys or Keys(), Screen(200, 30), NOW) for span in line]
    return next(span.style for span in spans if text in span.text)


# ---- rates ----------------------------------------------------------------------------------------------------------


def test_a_rate_is_not_known_before_the_second_sample_and_what_was_counted_before_is_in_none() -> None:
    assert counted(1_000_000).rate("accepts") is None
    assert counted(1_000_000, 1_000_010).rate("accepts") == 10


def test_a_rate_is_of_the_last_sample_or_of_a_minute() -> None:
    model = counted(*(number * 6 for number in range(100)), 600, 700)
    assert model.rate("accepts") == 100
    assert model.rate("accepts", 60) == (700 - 41 * 6) / 60
    assert counted(0, 5, 10, step=5).rate("accepts", 60) == 1


def test_counters_go_on_when_the_server_starts_anew() -> None:
    model = counted(1000, 1010)
    model.add(Sample(5, status(-99, accepted=7, pid=78), []))
    assert model.rate("accepts") is None  # how many there were until its end is not known
    model.add(Sample(6, status(-98, accepted=9, pid=78), []))
    assert model.rate("accepts") == 2
    assert model.growth("accepts", 60) == (10 + 7 + 2, 6)


def test_a_server_in_a_container_starts_anew_with_the_same_process_id() -> None:
    model = counted(1000, 1010)
    model.add(Sample(5, status(-99, accepted=2000), []))
    assert model.growth("accepts", 60) == (10 + 2000, 5)


def test_a_missed_sample_leaves_a_hole_in_the_chart_and_no_rate() -> None:
    model = counted(0, 1, 2)
    model.miss()
    model.add(Sample(6, status(6, accepted=40), []))
    assert model.rate("accepts") is None
    model.add(Sample(7, status(7, accepted=43), []))
    assert model.rate("accepts") == 3
    model.add(Sample(8, status(8, accepted=44), []))
    assert model.chart("accepts", 8, 1) == [1, None, None, None, None, 3, 1, None]


def test_a_chart_has_a_column_a_step_at_multiples_of_it_and_the_last_one_is_not_over() -> None:
    model = counted(0, 4, 8, 12, 13, 17)
    assert model.chart("accepts", 4, 2) == [None, 4, 2.5, 4]
    assert counted(0, 10, 20, step=5).chart("accepts", 5, 2) == [2, 2, 2, 2, None]  # as if all had come evenly


def test_samples_are_kept_for_the_window_alone() -> None:
    model = counted(*range(2000))
    assert len(model._points) == WINDOW + 1
    assert model.rate("accepts", 60) == 1


def test_the_mean_commit_is_that_of_a_minute() -> None:
    model = Model()
    for at, commits, seconds in ((0, 5, 9.0), (1, 7, 9.010), (2, 9, 9.012)):
        model.add(Sample(at, status(at, catalog=catalog(commits, seconds)), []))
    assert model.mean("commit seconds", "commits") == pytest.approx(0.003)
    assert counted(0, 1).mean("commit seconds", "commits") is None


# ---- the history ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("begun", "seen", "shown", "after"),
    [
        (0, 0, None, 0),
        (50_000, 0, None, 50_000 - KEPT),  # the first time
        (50_000, 50_000, None, 50_000),
        (50_000, 50_000, 49_977, 49_976),  # those on the screen once more
        (50_003, 50_000, 50_010, 50_000),
        (60_000, 50_000, 49_990, 60_000 - PER_SAMPLE),  # a flood
        (50_000, 50_000, 10, 50_000 - PER_SAMPLE),  # far down the list
        (7, 50_000, 49_990, 0),  # another history
    ],
)
def test_what_is_asked_of_the_history_is_new_or_on_the_screen_and_bounded(
    begun: int, seen: int, shown: int | None, after: int
) -> None:
    assert asks_after(begun, seen, shown) == after


def test_an_entry_that_is_asked_for_again_has_its_new_state_in_its_place() -> None:
    model = Model()
    model.add(listed(entry(1), entry(2)))
    model.add(listed(entry(1, state="lifted"), entry(2), entry(3)))
    assert [(one.number, one.state) for one in model.latest()] == [(3, "running"), (2, "running"), (1, "lifted")]
    assert model.seen == 3


def test_the_newest_entries_are_kept_and_a_history_that_begins_anew_replaces_them() -> None:
    model = Model()
    model.add(listed(*(entry(number) for number in range(1, KEPT + 11))))
    assert [one.number for one in model.latest()] == list(range(KEPT + 10, 10, -1))
    model.add(listed(entry(1)))
    assert [one.number for one in model.latest()] == [1]


@pytest.mark.parametrize(
    ("words", "numbers"),
    [
        ("", [4, 3, 2, 1]), ("http", [4, 2, 1]), ("192.0.2.", [2, 1]), ("2001:db8::/48", [3]), ("STALLED", [3]),
        ("lifted", [1]), ("get /", [2]), ("by hand", [4]), ("nothing", []),
    ],
)  # fmt: skip
def test_a_filter_finds_sources_networks_reasons_and_what_was_spoken(words: str, numbers: Sequence[int]) -> None:
    model = Model()
    model.add(
        listed(
            entry(1, state="lifted"), entry(2, "192.0.2.2", first="GET / HTTP"),
            entry(3, "2001:db8:0:7::/64", reason="stalled", looks="unknown"), entry(4, "198.51.100.4", note="by hand"),
        )
    )  # fmt: skip
    assert [one.number for one in model.latest(words)] == numbers


def test_networks_are_counted_by_their_recent_time_outs() -> None:
    model = Model()
    sources = ["192.0.2.1", "198.51.100.1", "198.51.100.2", "2001:db8:0:1::/64", "2001:db8:0:2::/64", "2001:db8::/64"]
    recent = [entry(number, source, at_s=NOW - 100 + number) for number, source in enumerate(sources, 2)]
    model.add(listed(entry(1, "192.0.2.1", at_s=NOW - RECENT - 1), *recent))
    assert [(one.name, one.timeouts, one.last - NOW) for one in model.networks(NOW)] == [
        ("2001:db8::/48", 3, -93), ("198.51.100.0/24", 2, -96), ("192.0.2.0/24", 1, -98),
    ]  # fmt: skip


def test_reasons_are_those_that_timed_out_somebody_the_latest_first() -> None:
    model = Model()
    recent = [entry(1, reason="operator", at_s=NOW - 59), entry(2, reason="stalled", at_s=NOW - 61)]
    for at, stalled, wrong in ((0, 100, 5), (1, 100, 8)):
        counts = {"stalled": stalled, "not_protocol": wrong, "bad_hello": 0, "operator": 1}
        model.add(listed(*recent, at=at, timeouts=counts))
    assert model.reasons(NOW) == [("not_protocol", 3, 8), ("operator", 1, 1), ("stalled", 0, 100)]


# ---- how numbers and charts look ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "-"), (0, "0"), (0.0167, "0.02"), (0.4, "0.4"), (9.94, "9.9"), (9.96, "10"), (999, "999"),
        (999.6, "1.0k"), (12_345, "12k"), (1e6, "1.0M"), (3.2e9, "3.2G"), (5e12, "5T"),
    ],
)  # fmt: skip
def test_a_rate_is_short(value: float | None, text: str) -> None:
    assert figure(value) == text


def test_times_are_short() -> None:
    spans = {-3: "0:00", 0: "0:00", 598: "9:58", 7200: "2:00:00", 3 * 86400 + 3661: "3d 1h"}
    assert {seconds: top_view.span_of(seconds) for seconds in spans} == spans
    assert [top_view.small_time(s) for s in (None, 0.00085, 0.0012, 1.25)] == ["-", "850 us", "1.2 ms", "1.2 s"]
    assert [moment(NOW - ago, NOW) for ago in (1, 86400)] == ["07:59:59", "14 Jan"]


def test_a_chart_is_as_high_as_its_peak_and_shows_the_least_rate() -> None:
    assert chart([None, 0, 0.001, 4, 8], 8, 1, " 12345678") == ["  148"]
    assert chart([0, 1, 8, 9, 16], 16, 2, " 12345678") == ["   18", " 1888"]
    assert chart([0, 0], 0, 1, " 1") == ["  "]


def test_a_text_is_cut_by_how_wide_it_is_shown() -> None:
    assert cells("caf\u00e9") == cells("cafe\u0301") == 4
    assert cells("\u78c1\u5e26") == 4
    assert cut("\u78c1\u5e26", 3) == "\u78c1"
    assert cut("GET", 2) == "GE"


# ---- the picture ----------------------------------------------------------------------------------------------------


def attacked() -> Model:
    model = Model()
    first = "GET / HTTP/1.1\\r\\n"
    model.add(Sample(0, status(0, timeouts={}), []))
    model.add(
        listed(
            entry(1, "192.0.2.1", first=first),
            entry(2, "198.51.100.7", reason="stalled", looks="unknown", state="lifted", at_s=NOW - 50),
            at=1, accepted=30, closed={"timed_out": 20}, timeouts={"not_protocol": 1, "stalled": 1}, frames=4000,
            exempt=["127.0.0.0/8"], gate=gate(), catalog=catalog(5, 0.01, 0.02),
        )
    )  # fmt: skip
    return model


def test_the_least_screen_shows_all_parts() -> None:
    assert picture(attacked(), screen=Screen(80, 24, unicode=False)) == [
        "server      tt 0.1.0, pid 77, up 1:41; timing out, 1 network exempt",
        "connections 3: new 0, waiting 0, open 1, logged_in 2, closing 0",
        "time-outs   0 of 65,536 run (0%), 0 remembered, 0 expired, 0 lifted",
        "process     memory 50.0 MiB, cpu 0%, descriptors 9 of 1,024, threads 4",
        "kernel      IPv4 3 of 1,024; filter dropped 0 SYNs, 0/s",
        "catalogue   5.0 commits/s, mean 2.0 ms, worst 20.0 ms in 1 min; volumes 10,000",
        "a second       now   1 min    peak  the last 5 min 08 s, 7 s a column",
        "accepts         30      30      30" + "@".rjust(46),
        "drops           20      20      20" + "@".rjust(46),
        "time-outs      2.0     2.0     2.0" + "@".rjust(46),
        "handshakes       0       0       0",
        "frames        4.0k    4.0k    4.0k" + "@".rjust(46),
        "reason           1 min   in all  network                    10 min     last",
        "not_protocol         1        1  198.51.100.0/24                 1 07:59:10",
        "stalled              1        1  192.0.2.0/24                    1 07:59:00",
        "",
        " time     source          reason           left spoke            first       (2)",
        " 07:59:10 198.51.100.7    stalled        lifted unknown",
        " 07:59:00 192.0.2.1       not_protocol     9:00 HTTP request     GET / HTTP/1.1\\",
        *[""] * 4,
        " q quit   arrows choose   / filter   p pause   ? help",
    ]


@pytest.mark.parametrize("screen", [Screen(80, 24), Screen(81, 25), Screen(132, 43), Screen(700, 120), Screen(120, 31)])
def test_a_screen_of_any_size_is_filled_and_keeps_room_for_time_outs(screen: Screen) -> None:
    lines = picture(attacked(), screen=screen)
    heading = next(number for number, line in enumerate(lines) if line.startswith(" time "))
    assert screen.height - heading - 2 >= 6


@pytest.mark.parametrize("screen", [Screen(79, 24), Screen(80, 23), Screen(10, 3), Screen(1, 1)])
def test_a_screen_that_is_too_small_says_so(screen: Screen) -> None:
    words = f"tt top needs 80 columns and 24 lines; here are {screen.width} and {screen.height}"
    text = "".join("".join(span.text for span in line) for line in frame(attacked(), Keys(), screen, NOW))
    assert text.rstrip() == words[: screen.width * screen.height].rstrip()


def test_a_server_without_a_kernel_map_or_catalogue_or_time_outs_says_so() -> None:
    text = "\n".join(picture(counted(0, 0)))
    assert "kernel      no map (-B)" in text
    assert "catalogue   none" in text
    assert "nobody exempt" in text
    assert "nobody was timed out" in text


def test_no_byte_of_a_stranger_or_an_operator_acts_on_the_terminal() -> None:
    model = Model()
    model.add(listed(entry(1, first="\x1b[2J\u9b0a\x07", note="\x1b]0;owned\x07caf\u00e9")))
    for screen in (SMALL, Screen(80, 24, unicode=False)):
        text = "".join(picture(model, screen=screen))
        assert text.isprintable()
        assert "\\x1b]0;owned\\x07caf" in text
        assert screen.unicode or text.isascii()


@pytest.mark.parametrize(
    ("changes", "text", "style"),
    [
        ({"observe": True}, "only observing", "warn"),
        ({"table": {"running": 60_000, "remembered": 0, "evictions": 9, "size": 65536}}, "60,000 of 65,536", "alarm"),
        ({"table": {"running": 60_000, "remembered": 0, "evictions": 9, "size": 65536}}, "9 gave way", "alarm"),
        ({"gate": gate(missing=4)}, "4 missing", "alarm"),
        ({"gate": gate() | {"filter": {"attached": False, "why": "no CAP_BPF"}}}, "not attached: no CAP_BPF", "warn"),
        ({"catalog": catalog(1, 1, 0.8)}, "worst 800.0 ms", "warn"),
        ({"catalog": catalog(1, 1, failed=2)}, "2 failed", "alarm"),
        ({"log_dropped_lines": 1234}, "1,234 lines of the log lost", "alarm"),
        ({}, "65,536 run", ""),
        ({"gate": gate()}, "3 of 1,024", ""),
    ],
)
def test_what_matters_has_a_colour(changes: dict[str, Any], text: str, style: str) -> None:
    model = Model()
    model.add(Sample(0, status(**changes), []))
    assert styles(model, text) == style


def test_what_the_kernel_does_not_count_of_the_process_is_no_error() -> None:
    old_kernel = status()["process"] | {"descriptors": None}
    for process, text in ((old_kernel, "descriptors at most 1,024"), (None, "not known: its host has no /proc")):
        model = Model()
        model.add(Sample(0, status(process=process), []))
        assert text in picture(model)[3]


def test_a_time_out_whose_end_has_come_is_shown_as_expired() -> None:
    model = Model()
    model.add(listed(entry(1, at_s=NOW - 601)))
    assert " expired HTTP request" in picture(model)[17]


# ---- keys -----------------------------------------------------------------------------------------------------------


def many(count: int = 40) -> Model:
    model = Model()
    model.add(listed(*(entry(number, f"192.0.2.{number}") for number in range(1, count + 1))))
    return model


def press(keys: Keys, model: Model, *names: str) -> Any:
    """What the last of these keys asks; the others ask nothing."""
    *before, last = names
    for name in before:
        assert keys.press(name, model) is None, name
    return keys.press(last, model)


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        (["down"], 40), (["j", "j"], 39), (["j", "j", "k"], 40), (["j", "up"], None), (["pagedown"], 31), (["end"], 1),
        (["end", "down"], 1), (["end", "home"], 40), (["end", "pageup"], 11), (["pagedown", "pageup"], 40),
        (["j", "escape"], None), (["k"], None),
    ],
)  # fmt: skip
def test_keys_choose_a_time_out(names: list[str], chosen: int | None) -> None:
    keys = Keys()
    press(keys, many(), *names)
    assert keys.chosen == chosen


def test_the_choice_stays_with_its_time_out_when_others_come_and_is_always_seen() -> None:
    model, keys = many(), Keys()
    press(keys, model, "j", "j")
    model.add(listed(*(entry(number, "198.51.100.1") for number in range(41, 100)), at=1))
    assert keys.chosen == 39
    assert [line for line in picture(model, keys) if line.startswith(">")] == [
        ">07:59:00 192.0.2.39      not_protocol     9:00 HTTP request"
    ]
    for key in ("end", "home"):
        keys.press(key, model)
        assert sum(line.startswith(">") for line in picture(model, keys)) == 1


def test_lifting_asks_and_only_y_does_it() -> None:
    model, keys = many(), Keys()
    for other in ("n", "escape", "enter", "q"):
        assert press(keys, model, "home", "l", other) is None
        assert keys.foot()[0] == "nothing was changed"
    press(keys, model, "l")
    assert keys.foot() == ("lift the time-out of 192.0.2.40? (y/n)", "ask")
    assert keys.press("y", model) == {"do": "bans.remove", "source": "192.0.2.40"}


@pytest.mark.parametrize("key", ["l", "e"])
def test_without_a_choice_nothing_is_asked(key: str) -> None:
    keys = Keys()
    assert press(keys, many(), key, "y") is None
    press(keys, many(), key)
    assert keys.foot()[0] == "choose a time-out first, with the arrows or j and k"


def test_exempting_shows_the_network_to_be_changed_and_then_what_it_means() -> None:
    model, keys = many(), Keys()
    press(keys, model, "j", "e")
    assert keys.foot() == ("exempt network: 192.0.2.0/24_", "ask")
    press(keys, model, "enter")
    assert keys.foot()[0] == "exempt 192.0.2.0/24: 256 addresses, and lift its 40 time-outs listed here? (y/n)"
    reason = "tt top: not_protocol of 192.0.2.40"
    assert keys.press("y", model) == {"do": "exempt.add", "network": "192.0.2.0/24", "reason": reason}
    press(keys, model, "e", "ctrl-u", *"192.0.2.40", "enter")
    assert keys.foot()[0] == "exempt 192.0.2.40/32: 1 address, and lift its 1 time-out listed here? (y/n)"
    press(keys, model, "n", "e", "backspace", "backspace", *"23", "enter")
    assert keys.foot()[0] == "exempt 192.0.2.0/23: 512 addresses, and lift its 40 time-outs listed here? (y/n)"


@pytest.mark.parametrize(
    ("network", "size"),
    [("2001:db8::/48", "65,536 networks /64"), ("2001:db8::/64", "1 network /64"), ("2001:db8::1", "1 address")],
)
def test_the_size_of_an_ipv6_network_is_in_its_sources(network: str, size: str) -> None:
    model, keys = many(), Keys()
    press(keys, model, "j", "e", "ctrl-u", *network, "enter")
    assert f": {size}? (y/n)" in keys.foot()[0]


def test_what_is_no_network_is_said_and_can_be_corrected() -> None:
    model, keys = many(), Keys()
    press(keys, model, "j", "e", "backspace", "backspace", "backspace", *"1/24", "enter")
    assert keys.foot()[0].endswith("; exempt network: 192.0.2.01/24_")
    press(keys, model, "ctrl-u", *"192.0.2.1/24", "enter")
    assert keys.foot()[0] == "192.0.2.1/24 has host bits set; exempt network: 192.0.2.1/24_"
    press(keys, model, "ctrl-u", *"192.0.2.9", "enter")
    assert keys.foot()[0].startswith("exempt 192.0.2.9/32: 1 address")
    assert press(keys, model, "n", "e", "escape") is None
    assert keys.foot()[0].startswith("l lift")


def test_a_filter_is_seen_while_it_is_written_and_escape_ends_it() -> None:
    model, keys = many(), Keys()
    press(keys, model, "/", *"192.0.2.4")
    assert keys.foot() == ("show only what has: 192.0.2.4_", "ask")
    assert "(2 of 40 with '192.0.2.4')" in "".join(picture(model, keys))
    press(keys, model, "enter", "j", "j")
    assert keys.chosen == 4
    press(keys, model, "escape")
    assert (keys.chosen, keys.filter) == (None, "192.0.2.4")
    press(keys, model, "escape")
    assert keys.filter == ""
    press(keys, model, "/", *"abc", "escape")
    assert keys.filter == ""


def test_help_is_shown_until_the_next_key_and_fits_the_least_screen() -> None:
    model, keys = many(), Keys()
    press(keys, model, "?")
    lines = picture(model, keys)
    assert lines[0].startswith("tt top: what the server")
    assert "any key goes back" in lines[:-1]
    assert press(keys, model, "q") is None
    assert not picture(model, keys)[0].startswith("tt top")


def test_a_server_that_does_not_answer_is_said_at_the_head_and_the_foot() -> None:
    model, keys = many(), Keys()
    keys.failure = "asking again: no server runs there"
    lines = picture(model, keys)
    assert lines[0].endswith("NO ANSWER")
    assert lines[-1] == " asking again: no server runs there"
    assert press(keys, model, "q") is QUIT


@pytest.mark.parametrize("before", [[], ["j", "l"], ["j", "e"], ["/"], ["?"]])
def test_control_c_ends_it_whatever_is_asked(before: list[str]) -> None:
    assert press(Keys(), many(), *before, "ctrl-c") is QUIT


def test_every_rate_of_the_picture_is_counted() -> None:
    assert set(RATES) <= set(attacked()._counters)


def test_the_picture_in_the_document_has_the_parts_of_ours() -> None:
    text = (Path(__file__).parents[1] / "docs/commands.md").read_text("utf-8")
    documented = text.partition("```text\nserver      tt ")[2].partition("\n```")[0].splitlines()
    model, keys = many(), Keys()
    press(keys, model, "j")
    ours = picture(model, keys)
    assert len(documented) == len(ours) == LEAST[1]
    assert [line[:12] for line in documented[1:12]][:5] == [line[:12] for line in ours[1:6]]
    assert [line.split()[0] for line in documented[6:13]] == [line.split()[0] for line in ours[6:13]]
    assert (documented[6], documented[12], documented[23]) == (ours[6], ours[12], ours[23])
    assert documented[16].partition("(")[0] == ours[16].partition("(")[0]
