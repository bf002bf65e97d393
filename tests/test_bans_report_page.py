"""The page of `tt bans report` in a real browser: what it shows of a real history, how it fits, and what it loads."""

import argparse
import socket
import subprocess
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from browser import Browser
from harness import HOST, ended, until
from process import TT, Process
from report_kit import WINDOW, day
from test_bans_report import BEGIN, EVIL, entry

from tt.cli import output
from tt.cli.ask import ask
from tt.cli.bans_report import MOST
from tt.cli.report_figures import DAY, HOUR, MINUTE, Window, figures
from tt.cli.report_page import page
from tt.cli.report_style import COLOURED

PICTURE = Path(__file__).parents[1] / "docs/report.png"
# The cells of a table's rows, by the id of its heading; a row below another one belongs to that.
ROWS = """[...document.querySelectorAll('section[aria-labelledby="%s"] table tbody tr:not(.below)')]
    .map(row => [...row.cells].map(cell => cell.innerText.trim()))"""
TILES = """Object.fromEntries([...document.querySelectorAll('.tiles div')]
    .map(tile => [tile.querySelector('dt').innerText, tile.querySelector('b').innerText]))"""
# What stands out of the page, but for what scrolls in its own frame.
OUTSIDE = """[...document.querySelectorAll('body *')].filter(one => !one.closest('.scroll')
    && one.getBoundingClientRect().right > innerWidth + 0.5).map(one => one.outerHTML.slice(0, 80))"""


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("browser")) as browser:
        yield browser


@pytest.fixture
def browser(started: Browser) -> Iterator[Browser]:
    """Nothing but the pages themselves may be asked for, and none may complain."""
    started.open("about:blank")  # the page of the test before has said all by then
    started.requests.clear()
    started.complaints.clear()
    yield started
    assert started.complaints == []
    assert [address for address in started.requests if not address.endswith(".html")] == []


@pytest.fixture
def a_day(tmp_path: Path) -> str:
    return written(tmp_path, page(figures(day(), WINDOW), "tapes.example.org"))


def written(place: Path, made: str) -> str:
    file = place / "report.html"
    file.write_text(made, "ascii")
    return file.as_uri()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [320, 360, 768, 1600])
def test_it_fits_the_screen(browser: Browser, a_day: str, width: int, scheme: str) -> None:
    browser.open(a_day, width=width, scheme=scheme)
    assert browser.find("innerWidth") == width
    assert browser.find("document.documentElement.scrollWidth") <= width
    assert browser.find(OUTSIDE) == []


@pytest.mark.parametrize("length", [MINUTE, HOUR, DAY, 7 * DAY, 30 * DAY, 365 * DAY, MOST])
def test_no_words_cover_others(browser: Browser, tmp_path: Path, length: float) -> None:
    end = BEGIN + 77_777
    many = [entry(1, at=77_777 - length * part / 40, reason=reason) for part in range(40) for reason in COLOURED]
    address = written(tmp_path, page(figures(many, Window(end - length, end)), "here"))
    labels = """[...document.querySelectorAll('.plot .%s')].map(one => one.getBoundingClientRect())
        .filter(one => one.width).map(one => [one.left, one.right, one.top, one.bottom])"""
    for width in (320, 360, 800, 1600):
        browser.open(address, width=width)
        times = sorted(browser.find(labels % "x"))
        assert len(times) >= 2
        assert browser.find(labels % "x b"), "a day or a year"
        assert all(one[1] < other[0] for one, other in pairwise(times)), times
        numbers = sorted(browser.find(labels % "y"), key=lambda one: one[2])
        assert len(numbers) >= 3
        assert all(one[3] <= other[2] for one, other in pairwise(numbers)), numbers


def test_it_fits_paper_and_is_light_there(browser: Browser, a_day: str) -> None:
    browser.open(a_day, width=740, scheme="dark", media="print")
    assert browser.find("document.documentElement.scrollWidth") <= 740
    assert browser.find("getComputedStyle(document.body).color") == "rgb(26, 33, 41)"


def test_light_and_dark_follow_the_system(browser: Browser, a_day: str) -> None:
    grounds = []
    for scheme in ("light", "dark"):
        browser.open(a_day, scheme=scheme)
        grounds.append(browser.find("getComputedStyle(document.body).backgroundColor"))
    assert grounds == ["rgb(244, 246, 248)", "rgb(16, 19, 24)"]


def test_the_picture_of_it_is_not_blank(browser: Browser, a_day: str) -> None:
    browser.open("data:text/html,.html", width=800)
    blank = len(browser.picture())
    browser.open(a_day, width=800)
    assert len(browser.picture()) > 5 * blank
    painted = browser.find("""[...document.querySelectorAll('.plot g rect:not(.hit)')].filter(one =>
        one.getBoundingClientRect().height > 0 && getComputedStyle(one).fill != 'rgb(0, 0, 0)').length""")
    assert painted == sum(len(counts) for counts in figures(day(), WINDOW).bars.counts)


def test_who_cannot_see_it_can_find_his_way(browser: Browser, a_day: str) -> None:
    browser.open(a_day)
    assert browser.find("[...document.querySelectorAll('h1, h2')].map(one => one.tagName).join()") == "H1" + ",H2" * 6
    assert browser.find("[...document.querySelectorAll('section')].every(one => one.ariaLabelledByElements.length)")
    unnamed = "[...document.querySelectorAll('table')].filter(one => !one.caption && !one.closest('details')).length"
    assert browser.find(unnamed) == 0
    drawn = browser.find("document.querySelector('.plot svg').getAttribute('aria-label')")
    assert drawn.startswith("Bar chart of 640 time-outs; the most, ")
    browser.open(a_day, width=360)
    reached = (
        "[...document.querySelectorAll('.scroll')].filter(one => one.scrollWidth > one.clientWidth && one.tabIndex)"
    )
    assert browser.find(f"{reached}.length") == 0  # what scrolls can be reached with the keyboard


def test_the_figures_on_the_page_are_those_of_the_history(browser: Browser, a_day: str) -> None:
    browser.open(a_day)
    made = figures(day(), WINDOW)
    tiles = browser.find(TILES)
    shown = [int(tiles[name].replace("\u202f", "")) for name in ("Time-outs", "Sources", "Networks", "Dropped")]
    assert shown == [made.totals.timeouts, made.totals.sources, made.totals.networks, made.totals.dropped]
    assert {name: int(count) for name, _, count, _ in browser.find(ROWS % "reasons")} == dict(made.reasons)
    assert {name: int(count) for name, _, count, _ in browser.find(ROWS % "spoke")} == dict(made.looks)
    networks = [(row[0], int(row[2]), int(row[3])) for row in browser.find(ROWS % "networks")]
    assert networks == [(one.network, one.timeouts, one.sources) for one in made.networks]
    repeats = [(row[0], int(row[1])) for row in browser.find(ROWS % "repeats")]
    assert repeats == [(one.source, one.timeouts) for one in made.repeaters]
    assert len(browser.find(ROWS % "latest")) == 50


def test_a_strangers_bytes_are_text(browser: Browser, tmp_path: Path) -> None:
    foreign = [entry(number, looks=EVIL, first=EVIL, note=EVIL, reason=EVIL, state=EVIL) for number in (1, 2)]
    browser.open(written(tmp_path, page(figures(foreign, Window(BEGIN, BEGIN + DAY)), EVIL)), width=360)
    assert browser.find("document.querySelectorAll('script, img, [onerror]').length") == 0
    assert browser.find("document.querySelector('h1').innerText") == f"Time-outs of {EVIL}"
    assert browser.find("document.querySelector('td code').innerText") == EVIL
    assert browser.find("document.documentElement.scrollWidth") <= 360


def test_even_what_got_into_the_page_would_neither_run_nor_load(started: Browser, tmp_path: Path, a_day: str) -> None:
    with socket.create_server((HOST, 0)) as listener:
        listener.setblocking(False)
        address = f"http://{HOST}:{listener.getsockname()[1]}/x"
        bad = (
            f"<script>document.title='run'</script><img src={address} onerror=\"document.title='run'\">"
            f"<iframe src={address}></iframe><link rel=stylesheet href={address}><script src={address}></script>"
        )
        made = page(figures([entry(1)], Window(BEGIN, BEGIN + DAY)), "here").replace("</main>", f"{bad}</main>")
        started.complaints.clear()
        started.open(written(tmp_path, made))
        assert started.find("document.title").startswith("Time-outs of here")
        # So it is heard when a page breaks the rules; each question brings what the browser has said till then.
        until("five complaints", lambda: started.find("true") and len(started.complaints) >= 5)
        with pytest.raises(BlockingIOError):
            listener.accept()


def test_a_report_of_a_real_server_after_an_attack(browser: Browser, tmp_path: Path) -> None:
    with Process(tmp_path, "--timeout", "60") as server:
        spoken = {
            "127.0.0.2": b"GET / HTTP/1.1\r\n\r\n",
            "127.0.0.3": b"SSH-2.0-<script>\r\n",
            "127.0.1.9": b"\r\n\r\n",
        }
        for source, first in spoken.items():
            with server.connect(source) as peer:
                peer.sendall(first)
                assert ended(peer) == b""
            server.await_timed_out(source)
        for _ in range(4):
            until("a dropped connection", lambda: server.drops("127.0.0.2"))
        run(server, "bans", "remove", "127.0.0.3")
        server.send_http("127.0.0.3")
        run(server, "bans", "add", "192.0.2.77", "--reason", "<b>by hand</b>")
        said = run(server, "bans", "report", "--since", "1h", "-o", str(tmp_path / "report.html"), "--name", "a<b>c")
        assert said == f"{tmp_path}/report.html: 5 time-outs of 4 sources\n"
        which = argparse.Namespace(control=None, data=tmp_path / "data")
        *held, _ = ask(which, {"do": "bans.history"})
    browser.open((tmp_path / "report.html").as_uri())
    assert browser.find(TILES)["Time-outs"] == "5" == str(len(held))
    reasons = {name: int(count) for name, _, count, _ in browser.find(ROWS % "reasons")}
    assert reasons == Counter(item["reason"] for item in held) == {"not_protocol": 4, "operator": 1}
    assert [row[0] for row in browser.find(ROWS % "networks")] == ["127.0.0.0/24", "127.0.1.0/24", "192.0.2.0/24"]
    assert [row[0] for row in browser.find(ROWS % "repeats")] == ["127.0.0.3"]
    latest: list[Any] = browser.find(ROWS % "latest")
    assert [(row[1], row[2]) for row in latest] == [(item["source"], item["reason"]) for item in reversed(held)]
    assert [row[4] for row in latest] == ["running", "running", "running", "lifted", "running"]
    sent = browser.find("[...document.querySelectorAll('#latest ~ * .below')].map(one => one.innerText.trim())")
    assert sent[3] == "SSH \xb7 SSH-2.0-<script>\\r\\n"
    assert sent[0] == "<b>by hand</b>"
    assert browser.find("document.querySelector('h1').innerText") == "Time-outs of a<b>c"
    (tmp_path / "saved").write_text("".join(f"{output.json_text(item)}\n" for item in held))
    made = subprocess.run(
        [TT, "bans", "report", "--from", "saved", "-o", "-"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert made.stdout.count("<code>SSH-2.0-&lt;script&gt;") == 1


def run(server: Process, *words: str) -> str:
    """What a command prints that must succeed."""
    done = subprocess.run(
        [TT, *words, "--data", str(server.place / "data")],
        env=server.environ, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done
    return done.stdout


def test_the_picture_in_the_documents_is_small() -> None:
    data = PICTURE.read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    assert 50_000 < len(data) <= 150_000
