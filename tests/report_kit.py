"""A day of a server on the open internet, made up, for the pages that tests look at and for the picture in the docs.

It is the same day each time.  Addresses are of the networks that RFC 5737, 2544 and 3849 keep free for such use.
To make the picture again: .venv/bin/python tests/report_kit.py docs/report.png
"""

import random
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tt import log
from tt.cli.report_figures import DAY, HOUR, Entry, Window, figures
from tt.cli.report_page import page

END = 1795402320.0  # 2026-11-23 02:52 UTC
WINDOW = Window(END - DAY, END)
SPOKE = {
    "TLS ClientHello": b"\x16\x03\x01\x00\xee\x01\x00\x00\xea\x03\x03" + bytes(range(128, 149)),
    "HTTP request": b"GET / HTTP/1.1\r\nHost: 192.0.2.10",
    "SSH": b"SSH-2.0-Go\r\n",
    "blank lines": b"\r\n\r\n",
    "RDP": b"\x03\x00\x00\x13\x0e\xe0\x00\x00\x00\x00\x00\x01\x00\x08\x00\x03\x00\x00\x00",
    "Redis": b"*1\r\n$4\r\nINFO\r\n",
    "SMB": b"\x00\x00\x00\x85\xffSMBr\x00\x00\x00\x00\x18\x53\xc8",
    "SOCKS5": b"\x05\x01\x00",
    "MQTT": b"\x10\x10\x00\x04MQTT\x04\x02\x00\x3c\x00\x04scan",
    "unknown": b"\x00\x0e\x38\x9c\xf0\x31\x22",
}
OFTEN = (38, 24, 9, 8, 6, 4, 3, 3, 2, 3)


def day(count: int = 640) -> list[Entry]:
    """That many time-outs, the oldest first: a low tide, two sweeps, and some who come again."""
    dice = random.Random(5000)
    times = sorted(_time(dice) for _ in range(count))
    before: dict[str, int] = {}
    made = []
    for number, at in enumerate(times, 1):
        source = _source(dice)
        reason = dice.choices(("not_protocol", "tampered", "bad_hello", "stalled", "login_failed"), (86, 2, 4, 7, 2))[0]
        looks = dice.choices(tuple(SPOKE), OFTEN)[0]
        earlier = before.get(source, 0)
        seconds = {"bad_hello": 30.0, "stalled": 10.0, "login_failed": 300.0}.get(
            reason, min(600.0 * 2**earlier, 21600)
        )
        of_ours = reason in ("tampered", "bad_hello", "login_failed")
        before[source] = earlier + 1
        running = at + seconds > END
        made.append(
            Entry(
                number, source, reason, at, seconds, earlier, "unknown" if of_ours else looks,
                None if of_ours else log.escape(SPOKE[looks]), None, False,
                "running" if running else "expired", None if running else int(dice.paretovariate(0.7)) - 1,
            )
        )  # fmt: skip
    by_hand = {"state": "lifted", "dropped": 3, "note": "the new scanner of the auditors: see ticket 4711"}
    made[-7] = Entry(made[-7].number, "203.0.113.20", "operator", made[-7].at_s, 7200.0, **by_hand)
    return made


def _time(dice: random.Random) -> float:
    sweeps = ((END - 17.4 * HOUR, 900.0), (END - 5.2 * HOUR, 2400.0))
    kind = dice.random()
    if kind < 0.2:
        return sweeps[0][0] + abs(dice.gauss(0, sweeps[0][1]))
    if kind < 0.45:
        return sweeps[1][0] + dice.gauss(0, sweeps[1][1])
    return END - dice.random() * DAY


def _source(dice: random.Random) -> str:
    kind = dice.random()
    if kind < 0.12:
        return f"203.0.113.{dice.choice((7, 19, 20, 66, 67, 201))}"
    if kind < 0.3:
        return f"198.51.100.{dice.randrange(1, 90)}"
    if kind < 0.4:
        return f"2001:db8:{dice.choice((5, 77)):x}:{dice.randrange(1, 30):x}::/64"
    return f"198.{dice.choice((18, 19))}.{int(dice.paretovariate(0.8)) % 256}.{dice.randrange(1, 255)}"


def _pictures(target: Path) -> Iterator[str]:
    from browser import Browser  # noqa: PLC0415  the page alone needs none

    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        (place / "report.html").write_text(page(figures(day(), WINDOW), "tapes.example.org"))
        with Browser(place) as browser:
            browser.open((place / "report.html").as_uri(), width=1040)
            end = browser.find("document.querySelector('.two').getBoundingClientRect().bottom")
            browser.open((place / "report.html").as_uri(), width=1040, height=round(end + 8))
            target.write_bytes(browser.picture())
            yield str(target)


if __name__ == "__main__":
    print(*_pictures(Path(sys.argv[1])))
