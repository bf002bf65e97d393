"""What every measurement shares: alternating runs, medians, ratios, the table, and what the machine was.

Rules: both sides of a comparison run by turns, and each pair in the other order than the last, so that a drift of the
machine meets both.  A figure is a median with its least and most; a ratio is the median of the ratios of the pairs.
Where the ratios differ by more than a fifth, the runs are doubled once, and the spread is said.  No absolute time is
judged anywhere.  A side that cannot be had is "not measured", with the reason.
It must not know any server.
"""

import json
import os
import platform
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any, Self

ROOT = Path(__file__).resolve().parents[1]
PROGRAMS = ROOT / "build/bench"
RESULTS = ROOT / "bench/results"
SERVER_CPU, LOAD_CPU = 1, 0
IN_NAMESPACE = os.geteuid() == 0  # bench.kernel.namespaces() makes it so
SPREAD = 0.2  # of the ratios, from which on the runs are doubled
FEWEST_DOUBLED = 4  # runs: fewer are a quick look

Run = Mapping[str, float]
Side = Callable[[], Run]


class NotMeasuredError(Exception):
    """A side cannot be had here; the text is the reason and, where there is one, the remedy."""


@dataclass
class Row:
    """One line of the table: a figure of ours, and of one peer."""

    name: str
    unit: str
    ours: list[float]
    peer_name: str = ""
    peer: list[float] = field(default_factory=list)
    ratio: list[float] = field(default_factory=list)  # of the pairs; above 1 is for us, but where `wanted` is "at most"
    wanted: str = ""  # "at least 1.5", "at most 1.05": of the median ratio, or of ours where there is no peer
    note: str = ""
    measurement: str = ""  # Report.add() fills it in

    def judged(self) -> float | None:
        values = self.ratio or (self.ours if not self.peer_name else [])
        return statistics.median(values) if values else None

    def met(self) -> bool | None:
        value = self.judged()
        if not self.wanted or value is None:
            return None
        words, bound = self.wanted.rsplit(" ", 1)
        return value >= float(bound) if words == "at least" else value <= float(bound)


@dataclass
class Report:
    """All of one run, by measurement; `write` makes the JSON file.  What is repeated replaces its part."""

    quick: bool
    machine: dict[str, Any] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    details: dict[str, dict[str, Any]] = field(default_factory=dict)
    missing: dict[str, list[str]] = field(default_factory=dict)
    parts: dict[str, dict[str, Any]] = field(default_factory=dict)  # when, how long, of which commit, beside what else
    _now: str = ""  # the measurement under way

    @classmethod
    def read(cls, path: Path) -> Self:
        saved = json.loads(path.read_text())
        return cls(**saved | {"rows": [Row(**row) for row in saved["rows"]]})

    @contextmanager
    def measuring(self, name: str) -> Iterator[None]:
        """The part of that measurement; what an earlier run had of it goes when this one has ended."""
        old = [row for row in self.rows if row.measurement == name]
        details, missing = self.details.pop(name, None), self.missing.pop(name, None)
        watch, begun = OthersWatch(), time.monotonic()
        self._now = name
        try:
            yield
        except BaseException:
            self.rows = [row for row in self.rows if row.measurement != name or row in old]
            if details is not None:
                self.details[name] = details
            if missing is not None:
                self.missing[name] = missing
            raise
        finally:
            self._now = ""
        self.rows = [row for row in self.rows if row not in old]
        self.parts[name] = {
            "when": datetime.now(UTC).isoformat(timespec="seconds"),
            "seconds": round(time.monotonic() - begun, 1),
            "commit": self.machine.get("commit", "unknown"),
            "other_work": round(watch.part(), 3),
        }

    def keep(self, name: str, results: Any) -> None:
        """The single runs behind the rows."""
        self.details.setdefault(self._now, {})[name] = results

    def not_measured(self, reason: object) -> None:
        self.missing.setdefault(self._now, []).append(str(reason))
        print(f"not measured: {reason}", flush=True)

    def add(self, *rows: Row) -> None:
        for row in rows:
            row.measurement = self._now
            self.rows.append(row)
            print(format_row(row), flush=True)

    def write(self, path: Path | None = None) -> Path:
        """Into the file, or a new one in bench/results/."""
        if path is None:
            RESULTS.mkdir(parents=True, exist_ok=True)
            stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
            path = RESULTS / f"{stamp}{'-quick' if self.quick else ''}.json"
        saved = {name: value for name, value in asdict(self).items() if not name.startswith("_")}
        path.write_text(json.dumps(saved, indent=1) + "\n")
        return path


# ---- running --------------------------------------------------------------------------------------------------------


def command(*words: object, cpu: int | None = None) -> list[str]:
    """The command line, held on a processor."""
    place = ["taskset", "-c", str(cpu)] if cpu is not None else []
    return place + [str(word) for word in words]


@contextmanager
def on_load_cpu() -> Iterator[None]:
    """This process runs on the generator's processor."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {LOAD_CPU})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def output_of(*words: object, cpu: int | None = None, stdin: str | None = None) -> str:
    """Standard output of a program that must succeed."""
    done = subprocess.run(command(*words, cpu=cpu), input=stdin, capture_output=True, text=True, check=False)  # noqa: S603
    if done.returncode:
        raise RuntimeError(f"{words[0]}: {done.stderr.strip() or f'exit code {done.returncode}'}")
    return done.stdout


def program(name: str) -> Path:
    path = PROGRAMS / name
    if not path.exists():
        raise NotMeasuredError(f"{path.relative_to(ROOT)} is not built: run make bench")
    return path


def source(block: int, number: int = 0) -> str:
    """An IPv4 address of this host, of a block of 65,536 (beyond it, of the next): in our own namespace of RFC 6598's
    100.64.0.0/10, since a loopback address gets warnings of its own in our log; else of the loopback network.
    """
    first = f"100.{64 + block}" if IN_NAMESPACE else f"127.{1 + block}"
    return str(IPv4Address(f"{first}.0.0") + number)


def load(work: str, protocol: str, port: int, *, block: int, **options: object) -> dict[str, float]:
    """One run of bench/load.c, from the sources of a block; rates a second, times in ns."""
    result: dict[str, float] = json.loads(output_of(*_load(work, protocol, port, block, options), cpu=LOAD_CPU))
    return result


def _load(work: str, protocol: str, port: int, block: int, options: Mapping[str, object]) -> Sequence[object]:
    words = [f"from={source(block)}", *(f"{name}={value}" for name, value in options.items())]
    return (program("load"), work, protocol, "127.0.0.1", port, *words)


@contextmanager
def loading(work: str, protocol: str, port: int, *, block: int, **options: object) -> Iterator[subprocess.Popen[str]]:
    """bench/load.c under way; SIGTERM makes it tell its result."""
    words = command(*_load(work, protocol, port, block, options), cpu=LOAD_CPU)
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as generator:  # noqa: S603
        try:
            yield generator
        finally:
            generator.kill()


@contextmanager
def turns(protocol: str, port: int, *, block: int, **options: object) -> Iterator[Side]:
    """As load("request", ...), a run a call, with connections that are made, and log in, once."""
    words = command(*_load("request", protocol, port, block, options | {"turns": 1}), cpu=LOAD_CPU)
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as generator:  # noqa: S603
        assert generator.stdin is not None  # noqa: S101 - a fact for the type checker
        assert generator.stdout is not None  # noqa: S101
        to_it, from_it = generator.stdin, generator.stdout

        def said() -> Run:
            line = from_it.readline()
            if not line:
                raise RuntimeError("the generator failed: see above")
            result: dict[str, float] = json.loads(line)
            return result

        def turn() -> Run:
            to_it.write("\n")
            to_it.flush()
            return said()

        try:
            said()  # that all connections are ready
            yield turn
        finally:
            generator.terminate()


def alternate(sides: Mapping[str, Side], runs: int) -> dict[str, list[Run]]:
    """Each side `runs` times, by turns, every second round backwards."""
    results: dict[str, list[Run]] = {name: [] for name in sides}
    for number in range(runs):
        names = list(sides) if number % 2 == 0 else list(sides)[::-1]
        for name in names:
            results[name].append(sides[name]())
    return results


def compare(sides: Mapping[str, Side], runs: int, key: str) -> dict[str, list[Run]]:
    """As alternate(); doubled once where the pairs' ratios of `key` are too far apart.  The first side is ours."""
    results = alternate(sides, runs)
    ours, *peers = results
    few = runs < FEWEST_DOUBLED
    if not few and any(spread(ratios(results[ours], results[peer], key)) > SPREAD for peer in peers):
        for name, more in alternate(sides, runs).items():
            results[name] += more
    return results


def ratios(over: Sequence[Run], under: Sequence[Run], key: str) -> list[float]:
    return [a[key] / b[key] for a, b in zip(over, under, strict=True)]


def spread(values: Sequence[float]) -> float:
    """The middle half of the values, as a part of their median: what one disturbed run cannot stretch."""
    if len(values) < 4:
        return (max(values) - min(values)) / statistics.median(values)
    low, _, high = statistics.quantiles(values, n=4)
    return (high - low) / statistics.median(values)


def column(runs: Sequence[Run], key: str, scale: float = 1) -> list[float]:
    return [run[key] / scale for run in runs]


# ---- the table ------------------------------------------------------------------------------------------------------


def show(values: Sequence[float]) -> str:
    if not values:
        return "-"
    median = statistics.median(values)
    digits = 0 if median >= 1000 else 1 if median >= 100 else 2
    text = f"{median:,.{digits}f}"
    return text if len(values) == 1 else f"{text} ({min(values):,.{digits}f}-{max(values):,.{digits}f})"


def format_row(row: Row) -> str:
    words = [f"{row.name}: {show(row.ours)} {row.unit}"]
    if row.peer_name:
        words.append(f"{row.peer_name} {show(row.peer)}" if row.peer else f"{row.peer_name} not measured")
    if row.ratio:
        words.append(f"ratio {show(row.ratio)}, spread {spread(row.ratio):.0%}, {len(row.ratio)} pairs")
    if row.wanted and row.ours:
        words.append(f"wanted {row.wanted}: {'met' if row.met() else 'MISSED'}")
    return "; ".join([*words, row.note] if row.note else words)


def markdown(rows: Iterable[Row]) -> str:
    """The table of bench/README.md."""
    lines = ["| figure | unit | ours | peer | ratio | wanted |", "| --- | --- | --- | --- | --- | --- |"]
    for row in rows:
        peer = f"{row.peer_name} {show(row.peer) if row.peer else 'not measured'}" if row.peer_name else ""
        met = {True: " (met)", False: " (missed)", None: ""}[row.met()]
        ratio = f"**{show(row.ratio)}**" if row.ratio else ""
        lines.append(f"| {row.name} | {row.unit} | {show(row.ours)} | {peer} | {ratio} | {row.wanted}{met} |")
    return "\n".join(lines)


# ---- the machine ----------------------------------------------------------------------------------------------------


def _version(*words: str) -> str:
    if shutil.which(words[0]) is None:
        return "not here"
    # Without the sanitizer's library, with which this may run: psql is a Perl script, and Perl hangs with it.
    plain = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    done = subprocess.run(words, env=plain, capture_output=True, text=True, check=False)  # noqa: S603
    if done.returncode and words[1] == "-c":
        return "not here"
    return ((done.stdout + done.stderr).strip().splitlines() or ["?"])[0]


def _package(name: str) -> str:
    """A version as Debian counts it, of what has more to say about itself than that."""
    with suppress(RuntimeError, OSError):
        return output_of("dpkg-query", "--show", "--showformat", "${Version}", name)
    return "not here"


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or "unknown"


def _commit() -> str:
    with suppress(RuntimeError, OSError):
        commit = output_of("git", "-C", ROOT, "rev-parse", "--short", "HEAD").strip()
        changed = output_of("git", "-C", ROOT, "status", "--porcelain", "--", "tt", "ext", "bpf").strip()
        return f"{commit} with changes" if changed else commit
    return "unknown"


def machine() -> dict[str, Any]:
    """What the figures belong to."""
    distribution = platform.freedesktop_os_release().get("PRETTY_NAME", "unknown")
    return {
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "kernel": platform.release(),
        "distribution": distribution,
        "python": platform.python_version(),
        "cryptography": _version(str(ROOT / ".venv/bin/python"), "-c", _CRYPTOGRAPHY),
        "redis": _version("redis-server", "--version"),
        "nginx": _version("nginx", "-v"),
        "haproxy": _version("haproxy", "-v"),
        "memcached": _version("memcached", "-V"),
        "postgresql": _version("psql", "--version"),
        "fail2ban": _version("fail2ban-server", "--version"),
        "crowdsec": _package("crowdsec"),
        "crowdsec bouncer": _package("crowdsec-firewall-bouncer"),
        "nftables": _version("nft", "--version"),
        "uvloop": _version(str(ROOT / ".venv/bin/python"), "-c", "import uvloop; print(uvloop.__version__)"),
        "openssl": _version("openssl", "version"),
    }


_CRYPTOGRAPHY = (
    "import cryptography; from cryptography.hazmat.backends.openssl import backend; "
    "print(cryptography.__version__, 'with', backend.openssl_version_text())"
)


class OthersWatch:
    """How busy the machine's other work kept it meanwhile: the part of all processors' time that was not idle and not
    of the programs that the bench started.
    """

    def __init__(self) -> None:
        self._begun = time.monotonic()
        self._busy = self._total()
        self._own = self._children()

    @staticmethod
    def _total() -> float:
        fields = [int(word) for word in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]]
        idle = fields[3] + fields[4]
        return (sum(fields[:8]) - idle) / os.sysconf("SC_CLK_TCK")

    @staticmethod
    def _children() -> float:
        used = os.times()
        return used.user + used.system + used.children_user + used.children_system

    def part(self) -> float:
        """Only programs that have ended count as ours: ask when the servers are stopped."""
        others = self._total() - self._busy - (self._children() - self._own)
        part = others / (time.monotonic() - self._begun) / (os.cpu_count() or 1)
        return min(1.0, max(0.0, part))  # ticks of 10 ms are coarse where a measurement is short
