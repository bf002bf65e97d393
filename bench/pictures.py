"""A picture of each comparison, drawn from the JSON of a run: our side and the peers', medians with least and most.

    python -m bench.pictures [FILE]     of bench/results/quoted.json, into bench/pictures/, and the table into README.md

Rules: nothing is measured or judged here; the same file gives the same bytes; SVG with text as text, so that the files
are small.  Bars where sides are compared, lines where the same is done at several sizes.
It must not know how a figure was measured.
"""

import io
import re
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench import kit
from bench.kit import NotMeasuredError, Report, Row, Run, column

QUOTED = kit.RESULTS / "quoted.json"
FOLDER = kit.ROOT / "bench/pictures"
README = kit.ROOT / "bench/README.md"
BEGIN, END = "<!-- the table: make bench-figures -->", "<!-- end of the table -->"
OURS = "ours"
BLUE, DARK_BLUE, GREY = "#2a6fbb", "#174a80", "#b4b4b4"
LINES = {  # of those that have lines
    "asyncio": "#c58b00", "uvloop": "#7a9a01", "redis GET, TLS": "#b3382c", "memcached get, TLS": "#6a4c93",
    "HAProxy": "#666666",
}  # fmt: skip
WIDE = 30  # from this ratio of the largest to the least on a scale is logarithmic
MORE, LESS = "more is better", "less is better"


@dataclass
class Panel:
    """Bars on one scale: for each group, the sides and their values."""

    unit: str
    groups: dict[str, dict[str, list[float]]] = field(default_factory=dict)

    def put(self, group: str, side: str, values: Sequence[float]) -> None:
        if values:
            self.groups.setdefault(group, {}).setdefault(side, list(values))

    @property
    def title(self) -> str:
        return f"{self.unit}  ({MORE if self.unit.startswith(('/s', 'connections/s')) else LESS})"


# ---- what is drawn --------------------------------------------------------------------------------------------------


def of_rows(rows: Iterable[Row]) -> list[Panel]:
    """A panel a unit; a group a figure."""
    panels: dict[str, Panel] = {}
    for row in rows:
        panel = panels.setdefault(row.unit, Panel(row.unit))
        panel.put(row.name, OURS, row.ours)
        panel.put(row.name, row.peer_name, row.peer)
    return [panel for panel in panels.values() if panel.groups]


def of_runs(details: dict[str, dict[str, list[Run]]], units: Sequence[tuple[str, str, float]]) -> list[Panel]:
    """A panel for each of unit, key and scale; a group for what is kept under a name."""
    panels = [Panel(unit) for unit, _, _ in units]
    for group, sides in details.items():
        for side, runs in sides.items():
            for panel, (_, key, scale) in zip(panels, units, strict=True):
                panel.put(group, side, column(runs, key, scale))
    return panels


RATE_AND_P99 = (("/s", "rate", 1.0), ("us, 99 of 100", "p99_ns", 1000.0))
LINE_PANELS = {  # measurement: what is along the bottom; the panels: their title, the keys with their style, a scale
    "pings": (
        "requests outstanding on each of 50 connections",
        (
            (f"/s  ({MORE})", {"rate": "-"}, 1.0),
            (f"us of server CPU a reply  ({LESS})", {"server_ns": "-"}, 1000.0),
            (f"ms until the reply: 50 (solid) and 99 (dotted) of 100  ({LESS})", {"p50_ns": "-", "p99_ns": ":"}, 1e6),
        ),
    ),
    "connections": (
        "connections, one request outstanding on each",
        ((f"/s  ({MORE})", {"rate": "-"}, 1.0), (f"us of server CPU a reply  ({LESS})", {"server_ns": "-"}, 1000.0)),
    ),
    "timeouts": (
        "sources timed out",
        ((f"us of server CPU a connection that is dropped  ({LESS})", {"server_ns": "-"}, 1000.0),),
    ),
}
TITLES = {
    "drops": "A connection from a timed-out source: accepted and closed",
    "ladder": "What drops a SYN of a timed-out source, each with one processor",
    "packets": "Attempts of timed-out sources turned away",
    "blocks": "From an offence until the kernel drops its sender",
    "verdicts": "From the first hostile byte to the entry in the kernel's map",
    "additions": "Time-outs written to the kernel's map",
    "siege": "Honest clients under attack",
    "synload": "Honest clients under 400,000 SYNs a second",
    "pings": "Requests answered, encrypted",
    "gets": "Look-ups of a Volume",
    "handshakes": "Full handshakes",
    "updates": "Updates that are on the disk when they are answered",
    "sizes": "Bytes on the wire",
    "memory": "Memory of an idle connection",
    "connections": "Answers among many connections",
    "timeouts": "Drops among many time-outs",
    "volumes": "The catalogue, grown a hundredfold",
    "listing": "Listing 50,000 time-outs under attack",
    "table": "Look-ups in the time-out table",
    "program": "The XDP program alone",
    "segments": "What the listener filter costs a data segment",
}


def panels_of(report: Report, name: str) -> list[Panel]:
    details = report.details.get(name, {})
    if name == "siege":
        return of_runs(details, RATE_AND_P99)
    if name == "ladder":
        return of_runs({"SYNs": details.get("ladder", {})}, (("/s and core", "rate", 1.0),))
    return of_rows(row for row in report.rows if row.measurement == name)


# ---- drawing --------------------------------------------------------------------------------------------------------


def draw(report: Report, folder: Path) -> list[Path]:
    """One SVG for each measurement that the run has, and no other stays there."""
    try:
        import matplotlib  # noqa: PLC0415 - the bench does without
    except ImportError:
        raise NotMeasuredError("matplotlib is not in .venv: run: make bench") from None
    matplotlib.use("svg")
    settings: Any = {"svg.fonttype": "none", "svg.hashsalt": "tt", "font.size": 9, "axes.spines.top": False,
                "axes.spines.right": False, "axes.axisbelow": True, "path.simplify": True}  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    with matplotlib.rc_context(settings):
        for name, title in TITLES.items():
            make: Callable[[Report, str, str], Any] = _lines if name in LINE_PANELS else _bars
            if (figure := make(report, name, title)) is not None:
                path = folder / f"{name}.svg"
                text = io.StringIO()
                figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None}, bbox_inches="tight")
                path.write_text(smaller(text.getvalue()))
                drawn.append(path)
    for path in set(folder.glob("*.svg")) - set(drawn):
        path.unlink()
    return drawn


def smaller(svg: str) -> str:
    """The same without what nobody sees: hundredths of a point, indentation, comments."""
    svg = re.sub(r"<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r"(\d\.\d\d)\d+", r"\1", svg)
    return re.sub(r"\s*\n\s*", "\n", svg)


def _figure(columns: int, width: float, height: float, title: str) -> tuple[Any, Sequence[Any]]:
    from matplotlib.figure import Figure  # noqa: PLC0415

    figure = Figure(figsize=(width, height), layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
    return figure, figure.subplots(1, columns, squeeze=False)[0]


def _bars(report: Report, name: str, title: str) -> Any:
    panels = panels_of(report, name)
    if not any(panel.groups for panel in panels):
        return None
    rows = max(sum(len(sides) + 1 for sides in panel.groups.values()) for panel in panels)
    figure, places = _figure(len(panels), 5.6 * len(panels), 0.7 + 0.21 * rows, title)
    for place, panel in zip(places, panels, strict=True):
        _draw_panel(place, panel)
    return figure


def _draw_panel(place: Any, panel: Panel) -> None:
    values = [of_side for sides in panel.groups.values() for of_side in sides.values()]
    medians = [statistics.median(of_side) for of_side in values]
    places, sides, at = [], [], 0.0
    for group, of_group in panel.groups.items():
        place.text(
            0, at, f" {group}", transform=place.get_yaxis_transform(), va="center", fontweight="bold", fontsize=8
        )
        places += [at + 1 + number for number in range(len(of_group))]
        sides += list(of_group)
        at += 1 + len(of_group)
    wide = min(medians) > 0 and max(medians) / min(medians) > WIDE
    least = [median - min(of_side) for median, of_side in zip(medians, values, strict=True)]
    most = [max(of_side) - median for median, of_side in zip(medians, values, strict=True)]
    place.barh(places, medians, height=0.72, color=[_color(side) for side in sides], log=wide)
    whiskers = {"color": "black", "linewidth": 0.9, "capsize": 2, "linestyle": "none"}
    place.errorbar(medians, places, xerr=[least, most], **whiskers)
    for median, of_side, where in zip(medians, values, places, strict=True):
        place.annotate(
            kit.show([median]),
            (max(of_side), where),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
        )
    place.set_yticks(places, sides, fontsize=8)
    place.set_ylim(at - 0.4, -0.6)
    largest = max(map(max, values))
    place.set_xlim(min(map(min, values)) / 3 if wide else 0, largest * (5 if wide else 1.25))
    _plain(place.xaxis, logarithmic=wide)
    place.set_title(panel.title, fontsize=9, loc="left")
    place.tick_params(axis="y", length=0)
    place.grid(axis="x", color="#e4e4e4", linewidth=0.6)


def _color(side: str) -> str:
    return BLUE if side == OURS else DARK_BLUE if side.startswith((OURS, "XDP", "listener")) else GREY


def _plain(axis: Any, *, logarithmic: bool) -> None:
    """Numbers that are read at a glance: 20,000 and not 2x10^4."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator  # noqa: PLC0415

    low, high = axis.get_view_interval()
    steps = (1,) if logarithmic and high / low > 1000 else (1, 2, 5)
    axis.set_major_locator(LogLocator(subs=steps) if logarithmic else MaxNLocator(5))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda number, _: f"{number:,.10g}"))


def _lines(report: Report, name: str, title: str) -> Any:
    sizes: dict[str, dict[str, list[Run]]] = report.details.get(name, {})
    if not sizes:
        return None
    from matplotlib.ticker import NullLocator  # noqa: PLC0415

    bottom, panels = LINE_PANELS[name]
    figure, places = _figure(len(panels), 4.4 * len(panels), 3.6, title)
    sides = list(next(iter(sizes.values())))
    for place, (words, keys, scale) in zip(places, panels, strict=True):
        for side in sides:
            for key, style in keys.items():
                values = {float(size): column(runs[side], key, scale) for size, runs in sizes.items() if side in runs}
                _draw_line(place, side, values, style, whiskers=len(keys) == 1)
        place.set_xscale("log")
        place.set_yscale("log")
        _plain(place.yaxis, logarithmic=True)
        place.set_xticks([float(size) for size in sizes], [f"{int(size):,}" for size in sizes], fontsize=8)
        place.xaxis.set_minor_locator(NullLocator())
        place.set_title(words, fontsize=9, loc="left")
        place.set_xlabel(bottom, fontsize=8)
        place.grid(color="#e4e4e4", linewidth=0.6)
    places[0].legend(fontsize=8, frameon=False)
    return figure


def _draw_line(place: Any, side: str, values: dict[float, list[float]], style: str, *, whiskers: bool) -> None:
    medians = [statistics.median(of_size) for of_size in values.values()]
    least = [median - min(of_size) for median, of_size in zip(medians, values.values(), strict=True)]
    most = [max(of_size) - median for median, of_size in zip(medians, values.values(), strict=True)]
    ours = side == OURS
    place.errorbar(
        list(values), medians, yerr=[least, most] if whiskers else None, linestyle=style, capsize=2, marker="o",
        markersize=3, elinewidth=0.7, linewidth=2.2 if ours else 1.2, zorder=3 if ours else 2,
        color=BLUE if ours else LINES.get(side, GREY), label=side if style == "-" else None,
    )  # fmt: skip


# ---- the table in README.md -----------------------------------------------------------------------------------------


def with_table(text: str, report: Report) -> str:
    """That text with the table of the run between the two marks."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{README.name} has not both marks, {BEGIN} and {END}")
    return f"{before}{BEGIN}\n\n{figures(report)}\n{END}{after}"


def figures(report: Report) -> str:
    """What the run was, and each measurement's table below its picture."""
    parts = [f"{_machine(report)}\n"]
    for name, title in TITLES.items():
        rows = [row for row in report.rows if row.measurement == name]
        missing = report.missing.get(name, [])
        if not rows and not missing:
            continue
        parts.append(f"### {title} (`{name}`)\n")
        if rows:
            parts.append(f"![{title}](pictures/{name}.svg)\n\n{kit.markdown(rows)}\n")
        if notes := [f"- {row.name}, {row.unit}: {row.note}" for row in rows if row.note]:
            parts.append("\n".join(notes) + "\n")
        parts.extend(f"Not measured: {reason}.\n" for reason in missing)
    return "\n".join(parts)


def _machine(report: Report) -> str:
    versions = {name: str(value) for name, value in report.machine.items()}
    once = ("when", "commit", "cpu", "cores", "memory_gib", "kernel", "distribution", "other_work")
    lines = [f"- {name.replace('_', ' ')}: {versions[name]}" for name in once if name in versions]
    peers = [f"{name} {_short(value)}" for name, value in versions.items() if name not in once]
    later = {
        name: part
        for name, part in report.parts.items()
        if part["commit"] != report.machine.get("commit") or part["other_work"] > 0.1
    }
    lines.append(f"- versions: {', '.join(peers)}")
    lines.extend(
        f"- `{name}`: commit {part['commit']}, other work {part['other_work']:.0%}" for name, part in later.items()
    )
    return "\n".join(lines)


def _short(version: str) -> str:
    found = re.search(r"\d+\.\d[\w.~+:-]*(?: with OpenSSL [\d.]+)?", version)
    return found[0] if found else version


def main(words: Sequence[str]) -> int:
    path = Path(words[0]) if words else QUOTED
    try:
        report = Report.read(path)
        drawn = draw(report, FOLDER)
        README.write_text(with_table(README.read_text(), report))
    except (OSError, ValueError, TypeError, KeyError, NotMeasuredError) as error:
        print(f"bench.pictures: {path}: {error}", file=sys.stderr)
        return 2
    print(f"{len(drawn)} pictures in {FOLDER.relative_to(kit.ROOT)}, and the table in {README.relative_to(kit.ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
