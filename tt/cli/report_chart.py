"""The charts of a report: SVG that stretches, with its labels in HTML beside it, so that text keeps its size.

The unit of a drawing's x is a bar, of its y a time-out.  What a bar says under the mouse is its <title>: no script.
Must not know where the figures come from, nor the colours.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from html import escape

from tt.cli.report_figures import DAY, HOUR, MINUTE, STEPS, Bars, floor_to, in_order
from tt.cli.report_style import reason_class

LINES = 7  # horizontal ones, at most
TICKS = 8  # of the axis of time, at most
TICK_STEPS = (*STEPS, 56 * DAY, 112 * DAY, 224 * DAY)  # s
WIDTH = 0.84  # of a bar, as part of its place

Text = Callable[[str], str]


def number(value: float) -> str:
    """With a thin gap between the thousands, which no country reads as a decimal point."""
    return f"{value:,}".replace(",", "\u202f")


def clock(time: float, form: str) -> str:
    """A time of UTC, as strftime() has it."""
    return datetime.fromtimestamp(time, UTC).strftime(form)


def over_time(bars: Bars, held: float | None, text: Text) -> str:
    """Stacked bars; what lies before `held` is marked as not known.  `text` makes a text safe to stand in HTML."""
    totals = [count.total() for count in bars.counts]
    lines = list(_lines(max(totals, default=0)))
    top, many = lines[-1], len(totals)
    most = max(range(many), key=totals.__getitem__)
    summary = f"Bar chart of {number(sum(totals))} time-outs; the most, {number(totals[most])}, {_span(bars, most)}"
    grid = "".join(f'<line class="gridline" x1="0" x2="{many}" y1="{top - y}" y2="{top - y}"/>' for y in lines)
    gap = 0.0 if held is None else min(max(held - bars.begin, 0) / bars.step, many)
    unheld = (
        f'<rect class="unheld" width="{gap:.2f}" height="{top}"><title>no longer held</title></rect>' if gap else ""
    )
    drawn = "".join(_bar(bars, place, top, text) for place in range(many))
    labels = "".join(f'<span class="y" style="bottom:{100 * y / top:.2f}%">{number(y)}</span>' for y in lines)
    return (
        f'<div class="plot"><svg viewBox="0 0 {many} {top}" preserveAspectRatio="none" role="img"'
        f' aria-label="{escape(summary)}">{unheld}{grid}{drawn}</svg>{labels}{"".join(_ticks(bars))}</div>'
    )


def _bar(bars: Bars, place: int, top: int, text: Text) -> str:
    counts = bars.counts[place]
    if not counts:
        return ""
    height, rects = 0, []
    for reason, count in stacked(counts):
        height += count
        rects.append(
            f'<rect class="{reason_class(reason)}" x="{place + (1 - WIDTH) / 2:.2f}" y="{top - height}"'
            f' width="{WIDTH}" height="{count}"/>'
        )
    words = ", ".join(f"{text(reason)} {number(count)}" for reason, count in in_order(counts))
    return (
        f"<g><title>{_span(bars, place)}: {words}</title>"
        f'<rect class="hit" x="{place}" width="1" height="{top}"/>{"".join(rects)}</g>'
    )


def stacked(counts: Counter[str]) -> list[tuple[str, int]]:
    """From the ground up: in one order for all bars, so that a reason keeps its place."""
    return [(reason, counts[reason]) for reason, _ in in_order(Counter(dict.fromkeys(counts, 1)))]


def _span(bars: Bars, place: int) -> str:
    return span(bars.begin + place * bars.step, bars.step)


def span(begin: float, step: int) -> str:
    """The time that a bar stands for, in words."""
    if step >= DAY:
        last = begin + step - DAY
        return clock(begin, "%Y-%m-%d") + (f" to {clock(last, '%Y-%m-%d')}" if step > DAY else "") + " (UTC)"
    form = "%H:%M" if step >= MINUTE else "%H:%M:%S"
    return f"{clock(begin, f'%Y-%m-%d {form}')} to {clock(begin + step, form)} UTC"


def _lines(most: int) -> Iterator[int]:
    """0 and up, by a step of 1, 2 or 5 times a power of ten, until one is not below `most`."""
    steps = (digit * 10**power for power in range(20) for digit in (1, 2, 5))
    step = next(step for step in steps if step * (LINES - 1) >= most)
    yield from range(0, max(-(-most // step), 1) * step + 1, step)


def _ticks(bars: Bars) -> Iterator[str]:
    """Labels of the axis.  On a narrow screen every other one is left out: never one that says the day or the year."""
    length = bars.end - bars.begin
    step = next(step for step in TICK_STEPS if length / step <= TICKS)
    tick, marked = floor_to(bars.begin, step), ""
    while tick <= bars.end:
        odd = tick // step % 2 == 1  # midnight is even
        words, mark = _tick(tick, step)
        if not odd and mark != marked and tick >= bars.begin:
            words, marked = f"{words}<b>{mark}</b>", mark
        left = 100 * (tick - bars.begin) / length
        if left >= 0:
            yield f'<span class="x{" odd" * odd}" style="left:{left:.2f}%">{words}</span>'
        tick += step


def _tick(time: float, step: int) -> tuple[str, str]:
    """What a label says, and what it says below where that has changed."""
    day = clock(time, "%d %b").lstrip("0")
    if step >= DAY:
        return day, clock(time, "%Y")
    return clock(time, "%H:%M" if step >= MINUTE else "%H:%M:%S"), day


def row_bar(count: int, most: int, name: str) -> str:
    """A bar in a row of a table; the number beside it says the same, so it is hidden from who hears the page."""
    return (
        '<svg viewBox="0 0 100 10" preserveAspectRatio="none" aria-hidden="true">'
        f'<rect class="{name}" width="{max(100 * count / most, 0.8):.2f}" height="10"/></svg>'
    )


def duration(seconds: float) -> str:
    """In its two largest units: 600 is 10 min, 21,690 is 6 h 1 min.  A number and its unit stay on one line."""
    left, parts = round(seconds), list[str]()
    for size, unit in ((DAY, "d"), (HOUR, "h"), (MINUTE, "min"), (1, "s")):
        if left >= size or (unit == "s" and not parts):
            parts.append(f"{left // size}\u00a0{unit}")
            left %= size
    return " ".join(parts[:2])
