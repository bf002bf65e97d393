"""The picture of `tt top`: what the model knows as lines for a width and a height.

Pure functions: the same lines go to a terminal, to --once and to the tests.  Every line is as wide as the screen, so
that it can be written over another.  Rules: what is shown passes `row`, which escapes what a terminal would act on; a
colour is for what an operator may have to do something about.
Must not know a terminal, nor how the server is asked.
"""

import time
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Any, NamedTuple
from unicodedata import combining, east_asian_width

from tt.cli import output
from tt.cli.arguments import length
from tt.cli.report_figures import Entry
from tt.cli.top_keys import HELP, Keys
from tt.cli.top_model import MINUTE, Model
from tt.option_kinds import MIB

LEAST = 80, 24  # columns and lines
CHART_SECONDS = 300  # that the chart looks back at least
MOST_CHART_LINES = 3  # of one rate
NEARLY_FULL = 0.9  # of a table
SLOW_COMMIT = 0.5  # s
DAY = 86400
BLOCKS = " \u2581\u2582\u2583\u2584\u2585\u2586\u2587\u2588"  # lower one eighth to full block
ASCII_BLOCKS = " .:-=+*#@"
RATES = ("accepts", "drops", "time-outs", "handshakes", "frames")
# Columns of the rates: name, now, 1 min, peak.
RATE_ROW = "{:<10}{:>8}{:>8}{:>8}  "
REASON_ROW = "{:<16}{:>6}{:>9}  "
NETWORK_ROW = "{:<24}{:>9}{:>9}"


class Span(NamedTuple):
    """A piece of a line; `style` is one of tt.cli.top_terminal's, "" for none."""

    text: str
    style: str = ""


Line = Sequence[Span]


class Screen(NamedTuple):
    """What the picture is made for: a size in cells, and whether it can show more than ASCII."""

    width: int
    height: int
    unicode: bool = True


def plain(line: Line) -> str:
    """The text of a line."""
    return "".join(span.text for span in line).rstrip()


def frame(model: Model, keys: Keys, screen: Screen, now: float) -> list[Line]:
    """The whole picture, a line for each of the screen's; `now`: s since 1970."""
    if screen.width < LEAST[0] or screen.height < LEAST[1]:
        words = f"tt top needs {LEAST[0]} columns and {LEAST[1]} lines; here are {screen.width} and {screen.height}"
        pieces = [words[start : start + screen.width] for start in range(0, len(words), screen.width)]
        return [row(screen, Span(piece)) for piece in [*pieces, *[""] * screen.height][: screen.height]]
    if keys.helping:
        lines = [row(screen, Span(text)) for text in HELP]
    else:
        lines = [*_head(model, keys, screen)]
        rest = screen.height - len(lines) - 1
        tall = min(MOST_CHART_LINES, max(1, (rest - 16) // len(RATES)))
        lines += _rates(model, screen, tall)
        lines += _reasons_and_networks(model, screen, 3 if screen.height < 32 else 6, now)
        lines += _latest(model, keys, screen, screen.height - len(lines) - 1, now)
    lines = lines[: screen.height - 1]
    lines += [row(screen)] * (screen.height - 1 - len(lines))
    return [*lines, _foot(keys, screen)]


def row(screen: Screen, *spans: Span, fill: str = "") -> Line:
    """A line of these spans, cut or filled up with spaces, in the style `fill`, to the width of the screen."""
    room = screen.width
    line = []
    for span in spans:
        text = cut(output.printable(span.text) if screen.unicode else ascii_only(span.text), room)
        room -= cells(text)
        line.append(Span(text, span.style))
    return [*line, Span(" " * room, fill)]


def heading(screen: Screen, text: str) -> Line:
    return row(screen, Span(text, "heading"), fill="heading")


def cells(text: str) -> int:
    """How wide a terminal shows it."""
    if text.isascii():
        return len(text)
    return sum(0 if combining(c) else 2 if east_asian_width(c) in "WF" else 1 for c in text)


def cut(text: str, width: int) -> str:
    """As much of it as goes into so many cells."""
    while cells(text) > width:
        text = text[: width if len(text) > width else -1]
    return text


def ascii_only(text: str) -> str:
    return output.printable(text).encode("ascii", "backslashreplace").decode("ascii")


# ---- numbers --------------------------------------------------------------------------------------------------------


def figure(value: float | None) -> str:
    """A rate or count in at most 6 characters: 0.4, 12, 3.4k, 120k, 1.2M; "-" where it is not known."""
    if value is None:
        return "-"
    if value < 0.095:
        return f"{value:.2f}" if value else "0"
    for unit in ("", "k", "M", "G"):
        if value < 9.95:
            return f"{value:.1f}{unit}"
        if value < 999.5:
            return f"{value:.0f}{unit}"
        value /= 1000
    return f"{value:.0f}T"


def span_of(seconds: float) -> str:
    """A length of time: 9:58, 2:00:00, 3d 4h."""
    days, rest = divmod(round(seconds), DAY)
    return f"{days}d {rest // 3600}h" if days > 0 else length(seconds)


def small_time(seconds: float | None) -> str:
    """Of a commit: 850 us, 1.2 ms, 1.2 s."""
    if seconds is None:
        return "-"
    if seconds < 0.001:
        return f"{seconds * 1e6:.0f} us"
    return f"{seconds * 1e3:.1f} ms" if seconds < 1 else f"{seconds:.1f} s"


def moment(at: float, now: float) -> str:
    """When, in UTC, in 8 characters: the time of day, or the day where that is longer ago than one."""
    return time.strftime("%H:%M:%S" if now - at < DAY else "%d %b", time.gmtime(at))


def chart(rates: Sequence[float | None], top: float, lines: int, blocks: str) -> list[str]:
    """Columns as high as the rates, `lines` high where a rate is `top`; what is above 0 is seen in any case."""
    steps = len(blocks) - 1
    levels = [0 if not rate or top <= 0 else max(1, round(min(rate / top, 1) * lines * steps)) for rate in rates]
    floors = range((lines - 1) * steps, -1, -steps)
    return ["".join(blocks[max(0, min(level - floor, steps))] for level in levels) for floor in floors]


# ---- the parts, from the top ----------------------------------------------------------------------------------------


def _head(model: Model, keys: Keys, screen: Screen) -> list[Line]:
    status, table = model.status, model.status["table"]
    connections = status["connections"]
    states = ", ".join(f"{name} {count}" for name, count in connections.items())
    fill = table["running"] / table["size"]
    running = f"{table['running']:,} of {table['size']:,} run ({fill:.0%}), {table['remembered']:,} remembered"
    ended = f", {status['timeouts_expired']:,} expired, {status['timeouts_lifted']:,} lifted"
    return [
        _title(model, keys, screen),
        row(screen, _name("connections"), Span(f"{sum(connections.values())}: {states}")),
        row(
            screen,
            _name("time-outs"),
            Span(running, "alarm" if fill > NEARLY_FULL else ""),
            Span(ended),
            Span(f", {table['evictions']:,} gave way" if table["evictions"] else "", "alarm"),
        ),
        row(screen, _name("process"), *_process(model, status["process"])),
        row(screen, _name("kernel"), *_gate(model, status["gate"])),
        row(screen, _name("catalogue"), *_catalog(model, status["catalog"])),
    ]


def _title(model: Model, keys: Keys, screen: Screen) -> Line:
    status = model.status
    mode = Span("only observing", "warn") if status["observe"] else Span("timing out", "bold")
    count = len(status["exempt"])
    exempt = f", {count} network{'s' * (count != 1)} exempt" if count else ", nobody exempt"
    left = f"tt {status['version']}, pid {status['pid']}, up {span_of(status['uptime_s'])}"
    state = Span("  NO ANSWER", "alarm") if keys.failure else Span("  paused", "warn") if keys.paused else Span("")
    return row(screen, _name("server"), Span(f"{left}; "), mode, Span(exempt), state)


def _name(text: str) -> Span:
    return Span(f"{text:<12}", "name")


def _process(model: Model, process: Mapping[str, Any] | None) -> list[Span]:
    lost = model.status["log_dropped_lines"]
    log = Span(f", {lost:,} lines of the log lost" if lost else "", "alarm")
    if process is None:
        return [Span("not known: its host has no /proc"), log]
    cpu = model.rate("cpu")
    used, limit = process["descriptors"], process["descriptor_limit"]
    descriptors = f"at most {limit:,}" if used is None else f"{used:,} of {limit:,}"
    return [
        Span(f"memory {process['rss_bytes'] / MIB:.1f} MiB, cpu {'-' if cpu is None else f'{cpu:.0%}'}, "),
        Span(f"descriptors {descriptors}", "alarm" if used is not None and used > NEARLY_FULL * limit else ""),
        Span(f", threads {process['threads']}"),
        log,
    ]


def _gate(model: Model, gate: Mapping[str, Any] | None) -> list[Span]:
    if gate is None:
        return [Span("no map (-B): the server itself drops who is timed out")]
    spans = []
    for one in gate["maps"]:
        full = one["missing"] > 0 or any(one["errors"].values())
        text = f"{one['family']} {one['entries']:,} of {one['size']:,}"
        trouble = f", {one['missing']:,} missing, {sum(one['errors'].values()):,} errors" if full else ""
        spans += [Span(text + trouble, "alarm" if full else ""), Span("; ")]
    attached = gate["filter"]
    if not attached["attached"]:
        return [*spans, Span(f"filter not attached: {attached['why']}", "warn")]
    rate = figure(model.rate("kernel drops"))
    return [*spans, Span(f"filter dropped {attached['dropped']:,} SYNs, {rate}/s")]


def _catalog(model: Model, catalog: Mapping[str, Any] | None) -> list[Span]:
    if catalog is None:
        return [Span("none")]
    worst, failed = catalog["commit_seconds_max"], catalog["commit_failures"]
    mean = small_time(model.mean("commit seconds", "commits"))
    return [
        Span(f"{figure(model.rate('commits'))} commits/s, mean {mean}, "),
        Span(f"worst {small_time(worst or None)}", "warn" if worst > SLOW_COMMIT else ""),
        Span(" in 1 min; "),
        Span(f"{failed:,} failed; " if failed else "", "alarm"),
        Span(f"volumes {catalog['volumes']:,}"),
    ]


def _rates(model: Model, screen: Screen, tall: int) -> list[Line]:
    titles = RATE_ROW.format("a second", "now", "1 min", "peak")
    width = screen.width - len(titles)
    step = max(1, -(-CHART_SECONDS // width))
    lines = [heading(screen, f"{titles}{_since(width * step, step)}")]
    blocks = BLOCKS if screen.unicode else ASCII_BLOCKS
    for name in RATES:
        rates = model.chart(name, width, step)
        peak = max((rate for rate in rates if rate is not None), default=None)
        figures = RATE_ROW.format(name, figure(model.rate(name)), figure(model.rate(name, MINUTE)), figure(peak))
        for number, text in enumerate(chart(rates, peak or 0, tall, blocks)):
            left = figures if number == tall - 1 else " " * len(figures)
            lines.append(row(screen, Span(left), Span(text, "chart")))
    return lines


def _since(seconds: int, step: int) -> str:
    return f"the last {seconds // 60} min {seconds % 60:02} s, {step} s a column"


def _reasons_and_networks(model: Model, screen: Screen, count: int, now: float) -> list[Line]:
    titles = REASON_ROW.format("reason", "1 min", "in all") + NETWORK_ROW.format("network", "10 min", "last")
    reasons = [REASON_ROW.format(name, figure_of(minute), figure_of(all_)) for name, minute, all_ in model.reasons(now)]
    if len(reasons) > count:
        reasons = [*reasons[: count - 1], f"and {len(reasons) - count + 1} more reasons"]
    networks = [
        NETWORK_ROW.format(one.name, figure_of(one.timeouts), moment(one.last, now)) for one in model.networks(now)
    ]
    blank = REASON_ROW.format("", "", "")
    pairs = [*zip_longest(reasons[:count], networks[:count], fillvalue=""), *[("", "")] * count][:count]
    return [heading(screen, titles), *(row(screen, Span(f"{one:<{len(blank)}}{two}")) for one, two in pairs)]


def figure_of(count: int) -> str:
    """A count in at most 7 characters."""
    return f"{count:,}" if count < 1_000_000 else figure(count)


def _latest(model: Model, keys: Keys, screen: Screen, room: int, now: float) -> list[Line]:
    entries = model.latest(keys.filter)
    first = keys.first_shown(entries, room - 1)
    shown = entries[first : first + room - 1]
    source = max([len(entry.source) for entry in shown] + [15])
    looks = min(max([cells(_spoke(entry)) for entry in shown] + [16]), 24)
    layout = f" {{:<8}} {{:<{source}}} {{:<12}} {{:>8}} {{:<{looks}}} {{}}"
    count = _count(model, keys, len(entries))
    title = layout.format("time", "source", "reason", "left", "spoke", "first")[: screen.width - len(count)]
    lines = [heading(screen, title.ljust(screen.width - len(count)) + count)]
    for entry in shown:
        spoke = cut(_spoke(entry), looks)
        text = layout.format(
            moment(entry.at_s, now), entry.source, entry.reason, _left(entry, now),
            spoke + " " * (looks - cells(spoke)), entry.first or "",
        )  # fmt: skip
        chosen = entry.number == keys.chosen
        style = "chosen" if chosen else "" if entry.state == "running" else "dim"
        lines.append(row(screen, Span((">" if chosen else " ") + text[1:], style), fill=style))
    if not entries:
        lines.append(row(screen, Span(f" nobody was timed out{_with(keys)}", "dim")))
    return lines


def _count(model: Model, keys: Keys, count: int) -> str:
    """How many are in the list, and of how many that ever were where it is not all."""
    begun = model.status["history"]["begun"]
    return f" ({count:,})" if count == begun else f" ({count:,} of {begun:,}{_with(keys)})"


def _with(keys: Keys) -> str:
    return f" with {cut(keys.filter, 20)!r}" if keys.filter else ""


def _spoke(entry: Entry) -> str:
    return output.printable(entry.note or entry.looks)


def _left(entry: Entry, now: float) -> str:
    left = entry.at_s + entry.seconds - now
    if entry.state != "running":
        return entry.state
    return span_of(left) if left > 0 else "expired"


def _foot(keys: Keys, screen: Screen) -> Line:
    text, style = keys.foot()
    return row(screen, Span(f" {text}", style), fill=style)
