"""`make profile`: our server under a chosen load, sampled by perf(1), drawn as a flame graph.

The server has one processor, generator and perf the other.  A sample is taken every 2 ms of the server's CPU time (the
software clock: a virtual machine may have no counters), with the kernel's stack and a copy of its own, which
perf unwinds afterwards by the libraries' unwind tables (DWARF): interpreter and OpenSSL keep no frame pointers.
Rules: only the load is sampled, not start, login or end; the names of stacks are made readable here, and only here.
It must not know how a graph is drawn.
"""

import argparse
import os
import platform
import random
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

from bench import flame, kernel, kit
from bench.catalog import SEED, VOLUMES, Stocked, exchange, get, volumes
from bench.kit import NotMeasuredError, Side
from bench.servers import HONEST, HOSTILE, SOURCES, Ours
from bench.userspace import CONNECTIONS

FOLDER = kit.ROOT / "build/profile"
FREQUENCY = 499  # samples a second of CPU time; a prime, so as not to keep step with anything
STACK = 16384  # bytes of the stack that go with each sample: from the loop to its top and more
LOOP = "Server.run_[t]"  # everything the server does for peers is below it
MOST_LISTED = 15

# ---- the loads ------------------------------------------------------------------------------------------------------


@contextmanager
def pings(seconds: int) -> Iterator[tuple[Ours, Side]]:
    """Encrypted pings, one outstanding on each of 50 connections."""
    options = {"connections": CONNECTIONS, "sources": 64, "seconds": seconds}
    with Ours() as ours, kit.turns("tt", ours.port, block=HONEST, key=ours.key, pid=ours.pid, **options) as turn:
        yield ours, turn


@contextmanager
def gets(seconds: int) -> Iterator[tuple[Ours, Side]]:
    """`volume.get` of 10,000 Volumes in an order by chance, one outstanding; 16 connections, for each has to log in."""
    names = [volume.name for volume in volumes(VOLUMES)]
    random.Random(SEED).shuffle(names)  # noqa: S311 - an order that is the same at every run
    with Stocked() as ours:
        with ours.client() as client:
            frames = [exchange(client, [get(name)]) for name in names]
        with ours.turns(frames, connections=16, seconds=seconds) as turn:
            yield ours, turn


@contextmanager
def flood(seconds: int) -> Iterator[tuple[Ours, Side]]:
    """Connections from 65,536 timed-out sources, 64 at a time."""
    options = {"connections": 64, "block": HOSTILE, "sources": SOURCES, "seconds": seconds}
    with Ours() as ours:
        ours.time_out_hostile()
        yield ours, lambda: kit.load("drop", "plain", ours.port, pid=ours.pid, **options)


@contextmanager
def handshakes(seconds: int) -> Iterator[tuple[Ours, Side]]:
    """Full handshakes, a connection and a source each, 32 at a time."""
    options = {"connections": 32, "block": HONEST, "sources": SOURCES, "seconds": seconds}
    with Ours() as ours:
        yield ours, lambda: kit.load("handshake", "tt", ours.port, pid=ours.pid, key=ours.key, **options)


LOADS: Mapping[str, Callable[[int], AbstractContextManager[tuple[Ours, Side]]]] = {
    "pings": pings, "gets": gets, "flood": flood, "handshakes": handshakes,
}  # fmt: skip


# ---- how Python's functions get their names -------------------------------------------------------------------------


@dataclass(frozen=True)
class Naming:
    """What an interpreter needs so that perf(1) knows Python's functions, and what a reader of the graph must know."""

    note: str
    environment: Mapping[str, str]
    call_graph: str = f"dwarf,{STACK}"
    inject: bool = False  # `perf inject --jit` puts the functions in


def naming(version: tuple[int, int], trampoline: bool, frame_pointers: bool) -> Naming:
    """By the interpreter's version, whether it was built with the trampoline, and whether with frame pointers.

    docs.python.org/3/howto/perf_profiling.html: 3.12 has the trampoline (PYTHONPERFSUPPORT), which only frame pointers
    lead through; 3.13 describes it to the unwinder too (PYTHON_PERF_JIT_SUPPORT).
    """
    if version >= (3, 13) and trampoline:
        return Naming("Python functions by name", {"PYTHON_PERF_JIT_SUPPORT": "1"}, inject=True)
    if version >= (3, 12) and trampoline and frame_pointers:
        return Naming("Python functions by name", {"PYTHONPERFSUPPORT": "1"}, call_graph="fp")
    why = "not built with frame pointers" if trampoline else "without the trampoline of 3.12 and newer"
    return Naming(f"Python's functions have no names ({why})", {})


def own_naming() -> Naming:
    flags = f"{sysconfig.get_config_var('CFLAGS')} {sysconfig.get_config_var('PY_CORE_CFLAGS')}"
    trampoline = sysconfig.get_config_var("PY_HAVE_PERF_TRAMPOLINE") == 1
    return naming(sys.version_info[:2], trampoline, "-fno-omit-frame-pointer" in flags)


# ---- perf -----------------------------------------------------------------------------------------------------------


@contextmanager
def sampling(pid: int, data: Path, named: Naming) -> Iterator[None]:
    """perf(1) writes into `data` what that process does meanwhile.  NotMeasuredError: it cannot."""
    if shutil.which("perf") is None:
        raise NotMeasuredError("perf is not installed: apt-get install linux-perf")
    said = data.with_suffix(".said")
    with ExitStack() as ends, said.open("wb") as log:
        orders, orders_in = _pipe(ends)
        answers, answers_in = _pipe(ends)
        # Disabled at first (--delay -1), and told through a pipe: nothing depends on how soon perf is ready.
        words = (
            "perf", "record", "--event", "cpu-clock", "--freq", FREQUENCY, "--call-graph", named.call_graph,
            "--no-buildid-cache", "--clockid", "mono", "--delay", "-1", "--pid", pid, "--output", data,
            "--control", f"fd:{orders.fileno()},{answers_in.fileno()}",
        )  # fmt: skip
        process = subprocess.Popen(  # noqa: S603
            kit.command(*words, cpu=kit.LOAD_CPU), stdout=log, stderr=log,
            pass_fds=(orders.fileno(), answers_in.fileno()),
        )  # fmt: skip
        ends.enter_context(process)
        ends.callback(process.send_signal, signal.SIGINT)
        orders.close()
        answers_in.close()  # so that perf's end is the end of its answers

        def tell(word: str) -> None:
            with suppress(BrokenPipeError):
                orders_in.write(f"{word}\n".encode())
            if b"ack" not in answers.readline():
                process.wait()
                raise NotMeasuredError(f"perf cannot sample here: {' '.join(said.read_text(errors='replace').split())}")

        tell("enable")
        yield
        tell("disable")


def _pipe(ends: ExitStack) -> tuple[FileIO, FileIO]:
    """What is read from, and what is written to."""
    read, write = os.pipe()
    return ends.enter_context(FileIO(read)), ends.enter_context(FileIO(write, "w"))


def stacks_of(data: Path, named: Naming) -> dict[tuple[str, ...], int]:
    """What perf recorded, with readable names, the outermost function first."""
    if named.inject:
        injected = data.with_suffix(".injected")
        kit.output_of("perf", "inject", "--jit", "--input", data, "--output", injected)
        data = injected
    # --no-inline: to ask the debug information for every address takes minutes, and -O2 has inlined only small ones.
    return read_script(kit.output_of("perf", "script", "--no-inline", "--fields", "comm,ip,sym,dso", "--input", data))


# ---- readable stacks ------------------------------------------------------------------------------------------------


def read_script(text: str) -> dict[tuple[str, ...], int]:
    """Counted stacks from what `perf script --fields comm,ip,sym,dso` prints: a command, then its frames, innermost
    first, then an empty line."""
    stacks: dict[tuple[str, ...], int] = {}
    for block in text.split("\n\n"):
        command, *frames = block.strip("\n").splitlines() or [""]
        if not frames:
            continue
        stack = readable(command.strip(), [_frame(line) for line in reversed(frames)])
        stacks[stack] = stacks.get(stack, 0) + 1
    return stacks


def _frame(line: str) -> str:
    """One frame's name, marked with its kind (bench/flame.py)."""
    _, _, rest = line.strip().partition(" ")
    symbol, _, file = rest.rpartition(" (")
    file = file.removesuffix(")")
    name = Path(file).name
    symbol = symbol.replace(";", ":")
    if symbol.startswith("py::"):  # of the trampoline: py::NAME:FILE
        function, _, path = symbol.removeprefix("py::").partition(":")
        return f"{function} ({Path(path).name})_[j]"
    if file.startswith("[kernel") or file.endswith(".ko"):
        return f"{symbol}_[k]"
    if name.startswith("_core.") and Path(file).parent.name == "tt":
        return f"{plain(symbol)}_[t]"
    if symbol == "[unknown]":
        symbol = f"[{name.strip('[]')}]"
    return f"{symbol}_[i]" if re.match(r"(lib)?python3?", name) else symbol


def plain(symbol: str) -> str:
    """A Cython function's name as in ext/: __pyx_f_2tt_5_core_judge is judge, __pyx_pf_2tt_5_core_6Server_16run is
    Server.run.

    Cython writes a kind, module and class with their lengths before them, and the name; before that stands a number of
    its own where Python can see the function, which is to say in all kinds but "f".
    """
    match = re.match(r"__pyx_([a-z]+)_(?=\d)", symbol)
    if not match:
        return symbol
    rest = re.sub(r"\.(constprop|isra|part|cold|lto_priv)\b.*", "", symbol[match.end() :])
    parts: list[str] = []
    while number := re.match(r"\d+", rest):
        part = rest[number.end() :][: int(number[0])]
        rest_of_it = rest[number.end() + len(part) :]
        may_be_name = match[1] != "f" and len(parts) >= len(("tt", "_core"))
        if not rest_of_it.startswith("_") or (may_be_name and not part[:1].isupper()):
            rest = rest[number.end() :]
            break
        parts.append(part)
        rest = rest_of_it[1:]
    return ".".join([*(part for part in parts if part[:1].isupper()), rest])


def readable(command: str, stack: list[str]) -> tuple[str, ...]:
    """The loop's stacks begin at the loop, all others at their command's name: how the interpreter got there says
    nothing about the server."""
    if LOOP in stack:
        return tuple(stack[stack.index(LOOP) :])
    return (command.replace(";", ":"), *stack)


# ---- the command ----------------------------------------------------------------------------------------------------


def profile(load: str, seconds: int, folder: Path) -> dict[tuple[str, ...], int]:
    """The stacks of our server under that load, for so many seconds."""
    named = own_naming()
    os.environ.update(named.environment)  # which the server inherits
    with LOADS[load](seconds) as (ours, work):
        pid = ours.pid
        with sampling(pid, folder / "data", named):
            work()
    try:
        return stacks_of(folder / "data", named)
    finally:
        for pattern in (f"perf-{pid}.*", f"jit-{pid}.dump", f"jitted-{pid}-*.so"):  # of interpreter and perf inject
            for path in Path("/tmp").glob(pattern):  # noqa: S108 - both have this place fixed
                path.unlink()


def title(load: str) -> str:
    return f"TapeTrackServer under {load}: {own_naming().note}"


def subtitle(stacks: flame.Stacks, seconds: int) -> str:
    kernel_seen = any(name.endswith("_[k]") for stack in stacks for name in stack)
    words = [
        f"{sum(stacks.values())} samples of CPU time in {seconds} s ({FREQUENCY} a second)",
        f"Python {platform.python_version()}, Linux {platform.release()}",
    ]
    if not kernel_seen:
        words.append("the kernel's functions are missing: run it as root, or set kernel.perf_event_paranoid to 1")
    return "; ".join(words)


def main() -> int:
    parser = argparse.ArgumentParser(prog="make profile", description="Profile the server under a load: LOAD=NAME.")
    parser.add_argument("load", nargs="?", default="pings", help=f"one of {', '.join(LOADS)} (default: %(default)s)")
    parser.add_argument("--seconds", type=int, default=10, help="length of the load (default: %(default)s)")
    options = parser.parse_args()
    if options.load not in LOADS:
        parser.error(f"LOAD={options.load}: no such load; there are {', '.join(LOADS)}")
    if not 1 <= options.seconds <= 600:
        parser.error(f"--seconds {options.seconds}: it must be 1..600")
    if (os.cpu_count() or 1) < 2:
        parser.error("one processor: server and generator need one each")
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # so that all is cleaned up then, too
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="profile_")))
        if os.geteuid() == 0:
            stack.enter_context(kernel.namespaces(folder))
        try:
            stacks = profile(options.load, options.seconds, folder)
        except (NotMeasuredError, RuntimeError) as error:
            print(f"profile: {error}", file=sys.stderr)
            return 1
    return report(stacks, options.load, options.seconds)


def report(stacks: flame.Stacks, load: str, seconds: int) -> int:
    """Writes the folded stacks and the graph, and prints what took most."""
    total = sum(stacks.values())
    if not total:
        print(f"profile: no sample in {seconds} s: the server did nothing", file=sys.stderr)
        return 1
    FOLDER.mkdir(parents=True, exist_ok=True)
    folded, picture = FOLDER / f"{load}.folded", FOLDER / f"{load}.svg"
    folded.write_text(flame.fold(stacks))
    picture.write_text(flame.svg(stacks, title(load), subtitle(stacks, seconds)))
    print(f"{title(load)}\n{subtitle(stacks, seconds)}\n\nitself  function")
    for name, count in list(flame.own_counts(stacks).items())[:MOST_LISTED]:
        function, kind = flame.kind_of(name)
        print(f"{count / total:6.1%}  {function[: flame.LONGEST]} ({flame.KINDS[kind][0]})")
    print(f"\n{picture.relative_to(kit.ROOT)}, {folded.relative_to(kit.ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
