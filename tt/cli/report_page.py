"""The page of a report on time-outs: one file of HTML that loads nothing and runs nothing.

Rules: every text that is not ours passes through `text`, which leaves no markup, no control character and no change of
writing direction; the policy in the head forbids what would get past that.  The page is ASCII, so that a wrong charset
harms nothing.  Must not know where the figures come from.
"""

import time
from collections.abc import Iterable, Sequence
from datetime import datetime
from html import escape
from itertools import zip_longest

from tt import __version__
from tt._core import REASONS
from tt.cli.output import printable
from tt.cli.report_chart import clock, duration, number, over_time, row_bar, span
from tt.cli.report_figures import TOP, Entry, Figures, Window, in_order
from tt.cli.report_style import STYLE, reason_class
from tt.spoke import UNKNOWN

KINDS = 12  # of what they spoke, that have a row of their own
POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
MEANINGS = {name: meaning for name, _, meaning in REASONS}
MINUTE_FORM = "%Y-%m-%d %H:%M"
SECOND_FORM = "%Y-%m-%d %H:%M:%S"


def page(figures: Figures, name: str) -> str:
    """The whole page, in ASCII; `name` is whose time-outs they are."""
    title = f"Time-outs of {text(name)}"
    body = _sections(figures) if figures.totals.timeouts else _nothing(figures)
    made = (
        "<!doctype html>\n"
        '<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="referrer" content="no-referrer"><meta name="robots" content="noindex">\n'
        f"<title>{title}, {_window(figures.window)}</title>\n<style>\n{STYLE}</style></head>\n<body><main>\n"
        f"<header><h1>{title}</h1>\n{_head(figures)}</header>\n{body}"
        f"<footer>Made by tt {__version__}. Times are UTC. Networks are /24 of IPv4 and /48 of IPv6.</footer>\n"
        "</main></body></html>\n"
    )
    return made.encode("ascii", "xmlcharrefreplace").decode("ascii")


def text(words: str) -> str:
    """Somebody else's text, to stand in HTML or in a quoted attribute."""
    return escape(printable(words))


# ---- the head -------------------------------------------------------------------------------------------------------


def _head(figures: Figures) -> str:
    window = figures.window
    local = "this host's clock is UTC" if _is_utc(window) else f"{_local(window.begin)} to {_local(window.end)}"
    about = f"{_window(window)} ({duration(window.end - window.begin)}); {local}"
    parts = [f'<p class="soft">{about}</p>\n', _lead(figures)]
    if window.lost:
        held, first = figures.totals.timeouts, figures.first_held
        since = f"the last {number(held)} since {clock(first, MINUTE_FORM)} UTC" if first is not None else "none"
        words = f"The server no longer holds all of them: this is {since}. {number(window.lost)} older ones are gone."
        parts.append(f'<p class="gap">{words}</p>\n')
    return "".join(parts)


def _window(window: Window) -> str:
    return f"{clock(window.begin, MINUTE_FORM)} to {clock(window.end, MINUTE_FORM)} UTC"


def _is_utc(window: Window) -> bool:
    return not any(time.localtime(moment).tm_gmtoff for moment in window[:2])


def _local(moment: float) -> str:
    return text(datetime.fromtimestamp(moment).astimezone().strftime(f"{MINUTE_FORM} %Z"))


def _lead(figures: Figures) -> str:
    """What the page says, in one sentence."""
    if not figures.totals.timeouts:
        return ""
    (reason, count), *_ = figures.reasons
    words = f"{percent(count, figures.totals.timeouts)} were <b>{text(reason)}</b>"
    if spoke := next((looks for looks, _ in figures.looks if looks != UNKNOWN), None):
        words += f"; what they spoke was most often <b>{text(spoke)}</b>"
    return f'<p class="lead">{words}.</p>\n'


def percent(part: int, whole: int) -> str:
    """A share, in whole percent; what is not nothing or all does not look like it."""
    share = 100 * part / whole
    if 0 < share < 1:
        return "&lt;&nbsp;1&nbsp;%"
    if 99 < share < 100:
        return "&gt;&nbsp;99&nbsp;%"
    return f"{share:.0f}&nbsp;%"


# ---- its parts ------------------------------------------------------------------------------------------------------


def _nothing(figures: Figures) -> str:
    lost = "that are still held " if figures.window.lost else ""
    return f'<p class="lead">No time-outs {lost}in this window.</p>\n'


def _sections(figures: Figures) -> str:
    return (
        f"{_tiles(figures)}{_over_time(figures)}"
        f'<div class="two">{_reasons(figures)}{_looks(figures)}</div>\n'
        f"{_networks(figures)}{_repeaters(figures)}{_latest(figures.latest)}"
    )


def _tiles(figures: Figures) -> str:
    totals = figures.totals
    unknown = f"; of {number(totals.unknown)} not known yet" if totals.unknown else ""
    longest = totals.longest
    tiles = [
        ("Time-outs", number(totals.timeouts), f"{number(totals.running)} still running"),
        ("Sources", number(totals.sources), "IPv4 addresses, IPv6 prefixes"),
        ("Networks", number(totals.networks), "/24 or /48"),
        ("Dropped", number(totals.dropped), f"connections{unknown}"),
        ("Longest time-out", duration(longest.seconds) if longest else "", text(longest.source) if longest else ""),
        ("Repeats", percent(totals.repeats, totals.timeouts), "of a source that had one before"),
    ]
    made = "".join(
        f"<div><dt>{term}</dt><dd><b>{value}</b><small>{more}</small></dd></div>\n" for term, value, more in tiles
    )
    return f'<dl class="tiles">\n{made}</dl>\n'


def _over_time(figures: Figures) -> str:
    bars = figures.bars
    legend = "".join(f"<li>{_swatch(reason)}{text(reason)}</li>" for reason, _ in figures.reasons)
    rows = [
        [span(bars.begin + place * bars.step, bars.step), number(counts.total()),
         ", ".join(f"{text(reason)} {number(count)}" for reason, count in in_order(counts))]
        for place, counts in enumerate(bars.counts) if counts
    ]  # fmt: skip
    if figures.window.lost:
        legend += '<li><span class="swatch unheld"></span>no longer held</li>'
    table = _table("", [("Time", "a"), ("Time-outs", "n"), ("Reasons", "")], rows)
    held = figures.first_held if figures.window.lost else None
    return (
        '<section aria-labelledby="over-time"><h2 id="over-time">Over time</h2>\n'
        f"<figure><figcaption>Time-outs in each {duration(bars.step)}, by reason</figcaption>\n"
        f'{over_time(bars, held, text)}\n<ul class="legend">{legend}</ul></figure>\n'
        f"<details><summary>The same as a table</summary>{table}</details></section>\n"
    )


def _swatch(reason: str) -> str:
    return f'<span class="swatch {reason_class(reason)}"></span>'


def _reasons(figures: Figures) -> str:
    most, total = figures.reasons[0][1], figures.totals.timeouts
    rows = [
        [f"{_swatch(reason)}{text(reason)}", row_bar(count, most, reason_class(reason)), number(count),
         percent(count, total)]
        for reason, count in figures.reasons
    ]  # fmt: skip
    below = [MEANINGS.get(reason, "a reason that this version does not know") for reason, _ in figures.reasons]
    heads = [("Reason", "a"), ("", "bar"), ("Time-outs", "n"), ("Share", "n")]
    return _section("reasons", "By reason", _table("Why they were timed out", heads, rows, map(text, below)))


def _looks(figures: Figures) -> str:
    """The most frequent, and the rest in one row."""
    if not figures.looks:
        return _section("spoke", "By what they spoke", '<p class="soft">All were timed out by hand.</p>')
    shown = [(text(looks), count) for looks, count in figures.looks[:KINDS]]
    if rest := figures.looks[KINDS:]:
        shown.append((f"{len(rest)} others", sum(count for _, count in rest)))
    most, total = max(count for _, count in shown), sum(count for _, count in shown)
    rows = [[name, row_bar(count, most, "r-plain"), number(count), percent(count, total)] for name, count in shown]
    heads = [("Protocol", ""), ("", "bar"), ("Time-outs", "n"), ("Share", "n")]
    caption = "What the first bytes of the connection look like"
    return _section("spoke", "By what they spoke", _table(caption, heads, rows))


def _networks(figures: Figures) -> str:
    most = figures.networks[0].timeouts
    rows = [
        [text(one.network), row_bar(one.timeouts, most, "r-plain"), number(one.timeouts), number(one.sources),
         number(one.dropped), _time(one.first, MINUTE_FORM), _time(one.last, MINUTE_FORM)]
        for one in figures.networks
    ]  # fmt: skip
    heads = [
        ("Network", "a"), ("", "bar"), ("Time-outs", "n"), ("Sources", "n"), ("Dropped", "n"), ("First", "t"),
        ("Last", "t"),
    ]  # fmt: skip
    caption = f"{_of(len(rows), figures.totals.networks)}, those with the most time-outs first"
    return _section("networks", "Networks", _table(caption, heads, rows))


def _repeaters(figures: Figures) -> str:
    if not figures.repeaters:
        return _section("repeats", "Who came again", '<p class="soft">No source was timed out twice.</p>')
    rows = [
        [text(one.source), number(one.timeouts), duration(one.longest), number(one.dropped), text(one.looks),
         _time(one.last, MINUTE_FORM)]
        for one in figures.repeaters
    ]  # fmt: skip
    heads = [
        ("Source", "a"), ("Times", "n"), ("Longest", "n"), ("Dropped", "n"), ("Spoke", "a"), ("Last", "t"),
    ]  # fmt: skip
    caption = f"At most {TOP} sources; counted with the time-outs before this window that the server remembers"
    return _section("repeats", "Who came again", _table(caption, heads, rows))


def _latest(latest: Sequence[Entry]) -> str:
    rows = [
        [_time(entry.at_s, SECOND_FORM), text(entry.source), text(entry.reason), duration(entry.seconds),
         text(entry.state), "" if entry.dropped is None else number(entry.dropped)]
        for entry in latest
    ]  # fmt: skip
    heads = [("Time", "t"), ("Source", "a"), ("Reason", "a"), ("For", "n"), ("State", "a"), ("Dropped", "n")]
    caption = f"The last {len(rows)}, the newest first; below each what it sent, escaped as in the log"
    return _section("latest", "Latest", _table(caption, heads, rows, map(_said, latest)))


def _said(entry: Entry) -> str:
    """What that looks like which it sent, its first bytes, and what is remarked."""
    parts = [text(entry.looks)] if entry.looks != UNKNOWN else []
    parts += [f"<code>{text(entry.first)}</code>"] if entry.first else []
    parts += ["behind a proxy"] * entry.proxied + ([text(entry.note)] if entry.note else [])
    return " &middot; ".join(parts)


# ---- what they are made of ------------------------------------------------------------------------------------------


def _section(name: str, heading: str, inside: str) -> str:
    return f'<section aria-labelledby="{name}"><h2 id="{name}">{heading}</h2>\n{inside}</section>\n'


def _table(
    caption: str, heads: Sequence[tuple[str, str]], rows: Sequence[Sequence[str]], below: Iterable[str] = ()
) -> str:
    """The first cell of a row is its heading; a head's second text is the class of its column.

    `below` is what stands under each row, as wide as the table.
    """
    classes = [f' class="{name}"' if name else "" for _, name in heads]
    # An empty heading is that of a bar, which says what the column beside it says.
    head = "".join(
        f'<th scope="col"{c}>{words}</th>' if words else f"<td{c}></td>"
        for (words, _), c in zip(heads, classes, strict=True)
    )
    made = "".join(
        f'<tr><th scope="row"{classes[0]}>{first}</th>'
        + "".join(f"<td{c}>{cell}</td>" for cell, c in zip(cells, classes[1:], strict=True))
        + "</tr>\n"
        + (f'<tr class="below"><td colspan="{len(heads)}">{more}</td></tr>\n' if more else "")
        for (first, *cells), more in zip_longest(rows, below)
    )
    titled = f"<caption><span>{caption}</span></caption>\n" if caption else ""
    label = caption or "As a table"
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{label}"><table>{titled}'
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{made}</tbody></table></div>"
    )


def _time(moment: float, form: str) -> str:
    return f'<time datetime="{clock(moment, "%Y-%m-%dT%H:%M:%SZ")}">{clock(moment, form)}</time>'


def _of(shown: int, there: int) -> str:
    return f"The first {shown} of {number(there)}" if shown < there else f"All {number(there)}"
