"""`tt bans report`: what is counted, which file is read and written, and that nothing in it can become markup."""

import argparse
import io
import os
import re
import stat
import subprocess
import sys
import time
from collections import Counter
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import msgspec
import pytest
from process import TT, environment
from report_kit import WINDOW, day

from tt import cli
from tt._core import REASONS
from tt.cli import bans_report, output
from tt.cli.report_chart import duration
from tt.cli.report_figures import DAY, HOUR, MINUTE, Entry, Window, bar_step, figures, floor_to, network_of
from tt.cli.report_page import page, percent
from tt.cli.report_style import COLOURED, DARK, LIGHT, reason_class

Capture = pytest.CaptureFixture[str]
BEGIN = 1_795_305_600.0  # 2026-11-22 00:00 UTC, a Sunday
EVIL = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>&lt;"


def entry(number: int, source: str = "192.0.2.1", at: float = 0.0, **more: object) -> Entry:
    """A time-out that began `at` seconds after BEGIN."""
    return msgspec.convert(
        {"number": number, "source": source, "reason": "not_protocol", "at_s": BEGIN + at, "seconds": 600.0, **more},
        Entry,
    )


def saved(place: Path, *entries: Entry, name: str = "saved") -> Path:
    """A file as `tt bans history --json` prints it."""
    file = place / name
    file.write_bytes(b"".join(msgspec.json.encode(one) + b"\n" for one in entries))
    return file


# ---- what is counted ------------------------------------------------------------------------------------------------


def test_the_figures_of_a_few_time_outs() -> None:
    entries = [
        entry(1, "192.0.2.1", 10, looks="SSH", dropped=5),
        entry(2, "192.0.2.77", 20, looks="SSH", dropped=0),
        entry(3, "192.0.2.1", HOUR, looks="Redis", seconds=1200.0, before=1, dropped=7),
        entry(4, "2001:db8:1:2::/64", HOUR + 1, reason="stalled", seconds=10.0, dropped=1),
        entry(5, "2001:db8:1:3::/64", HOUR + 2, before=2, looks="TLS ClientHello", state="running"),
        entry(6, "198.51.100.1", 2 * HOUR, reason="operator", note="by hand", seconds=30.0, dropped=0),
    ]
    made = figures(entries, Window(BEGIN, BEGIN + DAY))
    totals = made.totals
    assert (totals.timeouts, totals.sources, totals.networks) == (6, 5, 3)
    assert (totals.dropped, totals.unknown, totals.running) == (13, 1, 1)
    assert totals.longest is entries[2]
    assert totals.repeats == 2  # the second of 192.0.2.1, and the one that had some before this window
    assert made.reasons == [("not_protocol", 4), ("stalled", 1), ("operator", 1)]
    assert dict(made.looks) == {"SSH": 2, "Redis": 1, "unknown": 1, "TLS ClientHello": 1}  # none by hand
    assert [(one.network, one.timeouts, one.sources, one.dropped) for one in made.networks] == [
        ("192.0.2.0/24", 3, 2, 12), ("2001:db8:1::/48", 2, 2, 1), ("198.51.100.0/24", 1, 1, 0),
    ]  # fmt: skip
    assert (made.networks[0].first, made.networks[0].last) == (BEGIN + 10, BEGIN + HOUR)
    assert [(one.source, one.timeouts, one.longest, one.dropped) for one in made.repeaters] == [
        ("2001:db8:1:3::/64", 3, 600.0, 0), ("192.0.2.1", 2, 1200.0, 12),
    ]  # fmt: skip
    assert [one.number for one in made.latest] == [6, 5, 4, 3, 2, 1]
    assert made.bars.counts[0] == Counter(not_protocol=2)
    assert sum(made.bars.counts, Counter()) == Counter(dict(made.reasons))


def test_what_began_before_the_window_is_left_out_and_after_a_clock_was_put_back_kept() -> None:
    made = figures([entry(1, at=-1), entry(2, at=DAY + 7)], Window(BEGIN, BEGIN + DAY))
    assert [one.number for one in made.latest] == [2]
    assert made.bars.counts[-1].total() == 1


def test_lists_are_short_and_the_newest_come_first() -> None:
    made = figures(day(), WINDOW, latest=50)
    assert (len(made.networks), len(made.repeaters), len(made.latest)) == (20, 20, 50)
    assert [one.number for one in made.latest] == list(range(640, 590, -1))


def test_every_window_of_24_s_and_more_has_24_to_96_bars() -> None:
    for begin in (BEGIN, BEGIN + 12_345.6):
        length = 24.0
        while length <= bans_report.MOST:
            bars = figures([], Window(begin, begin + length)).bars
            assert 24 <= len(bars.counts) <= 96, length
            assert bars.begin <= begin
            assert begin + length <= bars.end < begin + length + bars.step + 1
            length *= 1.07


def test_bars_begin_where_a_person_would_let_them() -> None:
    assert (bar_step(HOUR), bar_step(DAY), bar_step(7 * DAY)) == (MINUTE, 30 * MINUTE, 2 * HOUR)
    assert floor_to(BEGIN + 3 * DAY + 5, 7 * DAY) == BEGIN + DAY  # a Monday
    assert floor_to(BEGIN + 3 * HOUR + 5, 30 * MINUTE) == BEGIN + 3 * HOUR


def test_the_network_of_a_source() -> None:
    assert network_of("192.0.2.77") == "192.0.2.0/24"
    assert network_of("2001:db8:1:2::/64") == "2001:db8:1::/48"
    assert network_of("2001:db8::/32") == "2001:db8::/32"  # with ipv6_prefix = 32
    assert network_of("fe80::1") == "fe80::/48"


def test_numbers_in_words() -> None:
    told = {0.4: "0 s", 59: "59 s", 600: "10 min", 3661: "1 h 1 min", 21690: "6 h 1 min", DAY * 30: "30 d"}
    assert {seconds: duration(seconds).replace("\xa0", " ") for seconds in told} == told
    shares = [unescape(percent(part, 1000)).replace("\xa0", " ") for part in (0, 1, 500, 999, 1000)]
    assert shares == ["0 %", "< 1 %", "50 %", "> 99 %", "100 %"]


# ---- the page -------------------------------------------------------------------------------------------------------


class Elements(HTMLParser):
    """The elements of a page, its texts, and the attributes that could run or load something."""

    def __init__(self, made: str) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.active: list[tuple[str, str | None]] = []
        self.texts: list[str] = []
        self.feed(made)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.active += [(name, value) for name, value in attrs if name.startswith("on") or name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


def test_no_text_of_others_becomes_markup() -> None:
    foreign = [
        entry(number, looks=EVIL, first=EVIL, note=EVIL + "\u202e\x1b\n", reason=EVIL, state=EVIL, before=number)
        for number in (0, 1)
    ]
    made = page(figures(foreign, Window(BEGIN, BEGIN + DAY)), EVIL)
    plain = page(figures([entry(1), entry(2)], Window(BEGIN, BEGIN + DAY)), "plain")
    elements = Elements(made)
    assert elements.tags.keys() <= Elements(plain).tags.keys() | {"code"}
    assert elements.active == []
    assert elements.texts.count(EVIL) > 10
    assert EVIL + r"\u202e\x1b\n" in elements.text  # neither turns the line round nor acts on a terminal


def test_the_page_loads_nothing_and_forbids_it() -> None:
    made = page(figures(day(), WINDOW), "tapes.example.org")
    assert made.isascii()
    elements = Elements(made)
    assert not elements.tags.keys() & {"script", "link", "img", "iframe", "object", "base", "form"}
    assert elements.active == []
    assert not re.search(r"url\(|@import|https?:", made)
    assert "content=\"default-src 'none'; style-src 'unsafe-inline'" in made


def test_the_page_says_its_window_in_utc_and_in_local_time(monkeypatch: pytest.MonkeyPatch) -> None:
    window = Window(BEGIN, BEGIN + DAY)
    try:
        monkeypatch.setenv("TZ", "<+0530>-5:30")
        time.tzset()
        made = Elements(page(figures([], window), "here")).text
        monkeypatch.setenv("TZ", "UTC0")
        time.tzset()
        in_utc = Elements(page(figures([], window), "here")).text
    finally:
        monkeypatch.undo()
        time.tzset()
    assert "2026-11-22 00:00 to 2026-11-23 00:00 UTC (1 d)" in made
    assert "2026-11-22 05:30 +0530 to 2026-11-23 05:30 +0530" in made
    assert "this host's clock is UTC" in in_utc


def test_a_window_without_time_outs_says_so() -> None:
    window = Window(BEGIN, BEGIN + DAY)
    assert "No time-outs in this window." in Elements(page(figures([], window), "here")).text
    lost = Elements(page(figures([], window._replace(lost=3)), "here")).text
    assert "No time-outs that are still held in this window." in lost


def test_the_page_says_what_is_no_longer_held() -> None:
    window = Window(BEGIN, BEGIN + DAY, lost=12_345)
    made = page(figures([entry(1, at=5 * HOUR), entry(2, at=6 * HOUR)], window), "here")
    words = "this is the last 2 since 2026-11-22 05:00 UTC. 12 345 older ones are gone."
    assert words in Elements(made).text
    assert '<rect class="unheld" width="10.00"' in made
    assert (
        "unheld" not in page(figures([entry(1, at=5 * HOUR)], window._replace(lost=0)), "here").partition("<body>")[2]
    )


def test_a_proxy_a_note_and_a_renewal_are_told() -> None:
    said = entry(1, proxied=True, note="ticket 4711", looks="SSH", state="renewed", first=r"SSH-2.0\r\n")
    made = Elements(page(figures([said], Window(BEGIN, BEGIN + DAY)), "here")).text
    assert "SSH \xb7 SSH-2.0\\r\\n \xb7 behind a proxy \xb7 ticket 4711" in made
    assert "renewed" in made


# ---- its colours ----------------------------------------------------------------------------------------------------


def luminance(colour: str) -> float:
    """The relative luminance of WCAG 2.2."""
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("colours", [LIGHT, DARK], ids=["light", "dark"])
def test_text_and_bars_stand_out_from_what_is_behind_them(colours: dict[str, str]) -> None:
    for text in ("ink", "soft"):
        for ground in ("page", "card"):
            assert contrast(colours[text], colours[ground]) >= 4.5, (text, ground)
    for name in (*COLOURED, "plain"):
        assert contrast(colours[name], colours["card"]) >= 3, name


def test_every_reason_that_times_out_has_a_colour() -> None:
    assert {name for name, times_out, _ in REASONS if times_out} == set(COLOURED)
    assert LIGHT.keys() == DARK.keys() > set(COLOURED)
    assert reason_class("of a newer version") == "r-adopted"


# ---- the command ----------------------------------------------------------------------------------------------------


def report(*words: str) -> int:
    return cli.main(["bans", "report", *words])


def refusal(capture: Capture, *words: str) -> tuple[int, str]:
    """The exit code and the one line of a report that is not made."""
    code = report(*words)
    out, err = capture.readouterr()
    assert out == ""
    assert err.startswith("tt: ")
    assert err.count("\n") == 1
    return code, err[4:-1]


def test_a_report_of_saved_history(tmp_path: Path, capsys: Capture) -> None:
    file, made = saved(tmp_path, entry(1), entry(2, at=60), entry(3, "192.0.2.2", 90)), tmp_path / "made.html"
    assert report("--from", str(file), "-o", str(made), "--name", "tapes.example.org") == output.OK
    assert capsys.readouterr() == (f"{made}: 3 time-outs of 2 sources\n", "")
    assert "<h1>Time-outs of tapes.example.org</h1>" in made.read_text("ascii")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["made.html", "saved"]
    assert report("--from", str(file), "-o", "-", "--name", "tapes.example.org") == output.OK
    assert capsys.readouterr() == (made.read_text("ascii"), "")


def test_saved_files_may_overlap_and_the_last_word_on_a_time_out_counts(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    running, other = entry(7, state="running"), entry(8, "192.0.2.9", 30)
    both = saved(tmp_path, other, running, entry(7, state="lifted"), other).read_bytes()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(both)))
    assert report("--from", "-", "-o", str(tmp_path / "made")) == output.OK
    assert capsys.readouterr().out.endswith("2 time-outs of 2 sources\n")
    assert "lifted" in Elements((tmp_path / "made").read_text()).texts
    assert "0 still running" in Elements((tmp_path / "made").read_text()).texts


def test_since_counts_back_from_the_last_time_out_of_a_file(tmp_path: Path, capsys: Capture) -> None:
    file = saved(tmp_path, entry(1), entry(2, at=HOUR), entry(3, at=2 * HOUR))
    assert report("--from", str(file), "-o", str(tmp_path / "made"), "--since", "90m") == output.OK
    assert "2 time-outs of 1 source\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b"nonsense", "line 2 is no time-out (JSON is malformed"),
        (b"{}", "line 2 is no time-out (Object missing required field `number`)"),
        (b"[]", "line 2 is no time-out (Expected `object`, got `array`)"),
        (b'"\xff"', "line 2 is no time-out ("),
        (
            b'{"number":1,"source":"<b>","reason":"stalled","at_s":0,"seconds":1}',
            "line 2 is no time-out ('<b>' does not appear to be an IPv4 or IPv6 network)",
        ),
        (
            b'{"number":1,"source":"192.0.2.1","reason":"stalled","at_s":1e300,"seconds":1}',
            "line 2 is no time-out (Expected `float` <= ",
        ),
        (
            b'{"number":1,"source":"192.0.2.1","reason":"stalled","at_s":0,"seconds":-1}',
            "line 2 is no time-out (Expected `float` >= 0.0",
        ),
    ],
)
def test_a_line_that_is_no_time_out_is_named(tmp_path: Path, capsys: Capture, line: bytes, says: str) -> None:
    file = saved(tmp_path, entry(1))
    file.write_bytes(file.read_bytes() + line + b"\n")
    code, words = refusal(capsys, "--from", str(file), "-o", str(tmp_path / "made"))
    assert code == output.USAGE
    assert words.startswith(f"{file}: {says}")
    assert words.endswith("give what 'tt bans history --json' printed")
    assert not (tmp_path / "made").exists()


def test_a_file_that_is_not_there_or_empty_is_named(tmp_path: Path, capsys: Capture) -> None:
    out = "-o", str(tmp_path / "made")
    code, words = refusal(capsys, "--from", str(tmp_path / "none"), *out)
    assert (code, words.partition(": name")[0]) == (
        output.USAGE,
        f"{tmp_path}/none: cannot be read (No such file or directory)",
    )
    code, words = refusal(capsys, "--from", str(saved(tmp_path)), *out)
    assert (code, words.partition(":")[2]) == (
        output.FAILED,
        " no time-outs in it: save some with 'tt bans history --json'",
    )


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--since", "soon"), "argument --since: 'soon' is no time: it must be "),
        (("--since", "59s"), "argument --since: '59s': it must be 1m to 1000d"),
        (("--since", "1001d"), "argument --since: '1001d': it must be 1m to 1000d"),
    ],
)
def test_a_window_too_short_or_too_long_is_refused(capsys: Capture, words: tuple[str, ...], says: str) -> None:
    code, told = refusal(capsys, "-o", "-", *words)
    assert code == output.USAGE
    assert says in told


def test_a_report_needs_a_place(capsys: Capture) -> None:
    assert refusal(capsys)[1].startswith("the following arguments are required: -o/--output")


def test_without_a_server_nothing_is_written(tmp_path: Path, capsys: Capture) -> None:
    made = tmp_path / "made"
    code, words = refusal(capsys, "--data", str(tmp_path), "-o", str(made))
    assert (code, "no server runs there" in words, made.exists()) == (output.NO_CONNECTION, True, False)


# ---- the file that is written ---------------------------------------------------------------------------------------


def test_a_new_file_has_the_mode_of_the_umask_and_one_that_is_there_keeps_its_own(tmp_path: Path) -> None:
    file, made = saved(tmp_path, entry(1)), tmp_path / "made"
    mask = os.umask(0o027)
    try:
        assert report("--from", str(file), "-o", str(made)) == output.OK
        assert stat.S_IMODE(made.stat().st_mode) == 0o640
        made.chmod(0o604)
        made.write_text("old")
        assert report("--from", str(file), "-o", str(made)) == output.OK
    finally:
        os.umask(mask)
    assert stat.S_IMODE(made.stat().st_mode) == 0o604
    assert made.read_text().startswith("<!doctype html>")


def test_what_is_no_regular_file_is_not_replaced(tmp_path: Path, capsys: Capture) -> None:
    file, target = saved(tmp_path, entry(1)), tmp_path / "target"
    target.write_text("kept")
    (tmp_path / "link").symlink_to(target)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name in ("link", "pipe", "folder"):
        code, words = refusal(capsys, "--from", str(file), "-o", str(tmp_path / name))
        assert (code, words.partition(": ")[2]) == (
            output.USAGE,
            "is no regular file, so it is not replaced: name another one, or - for standard output",
        )
    assert target.read_text() == "kept"
    code, words = refusal(capsys, "--from", str(file), "-o", str(tmp_path / "none" / "made"))
    assert code == output.FAILED
    assert "cannot be written (No such file or directory)" in words


def test_a_page_that_cannot_be_written_whole_leaves_the_old_one(tmp_path: Path) -> None:
    file, made = saved(tmp_path, *day()), tmp_path / "made"
    made.write_text("old")
    command = [TT, "bans", "report", "--from", str(file), "-o", str(made)]
    done = subprocess.run(
        ["sh", "-c", 'ulimit -f 8; exec "$@"', "sh", *command],
        env=environment(tmp_path), capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (output.FAILED, "")
    assert done.stderr.startswith(f"tt: {made}: cannot be written (File too large): ")
    assert done.stderr.count("\n") == 1
    assert made.read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["made", "saved"]


def test_the_command_is_one_of_tt_bans() -> None:
    args = cli._parser(["bans"]).parse_args(["bans", "report", "-o", "x"])
    assert isinstance(args, argparse.Namespace)
    assert (args.output, args.since, args.saved, args.name) == (Path("x"), None, None, None)
