"""Instruction counts of what runs most: the guard against getting slower unnoticed.

callgrind(1) counts instructions, not time, so a busy machine changes nothing.  What ext/ inlines is called alone
(inline.pyx); handshake, ping and get are asked, one after the other, of the server as it is shipped, from this process.
Rules: a count is the least of several, since what disturbs (a timer, the collector) only adds; it belongs to one build,
that is to compiler, interpreter and libraries, and is compared with no other's.
It must not know what is done about a difference.
"""

import ast
import os
import platform
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from importlib.metadata import version
from itertools import count, islice
from pathlib import Path

from bench import kit
from bench.catalog import Stocked, get, volumes
from tt.client import Client

Counts = dict[str, float]  # instructions for one
Build = dict[str, str]

HERE = Path(__file__).parent
ROUNDS = {"look_ups": 2, "verdicts": 2000}
NAMES = {"look_ups": "table look-up", "verdicts": "frame verdict"}
WINDOWS = 5  # of which the least counts
WARM = 300  # more than the small integers that Python keeps: nonces beyond are made anew, for ever
VOLUMES = 100
PACKAGES = ("cryptography", "msgspec", "zstandard")


# ---- what a count belongs to ----------------------------------------------------------------------------------------


def compiled_build() -> Build:
    """What the instructions of the extension depend on, beside its source."""
    return {"machine": platform.machine(), "compiler": f"gcc {kit.output_of('gcc', '-dumpfullversion').strip()}"}


def server_build() -> Build:
    """And those of the whole server.  libc and OpenSSL choose their code by the processor that valgrind shows them,
    which has AVX2 where the real one has, and nothing newer."""
    flags = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith(("flags", "Feat")))
    optimized = "--enable-optimizations" in (sysconfig.get_config_var("CONFIG_ARGS") or "")
    return compiled_build() | {
        "processor": "AVX2" if " avx2 " in f"{flags} " else "no AVX2",
        "python": f"{platform.python_version()} {platform.python_compiler()}{' optimized' if optimized else ''}",
        "libc": platform.libc_ver()[1],
        **{name: version(name) for name in PACKAGES},
    }


# ---- what is inlined ------------------------------------------------------------------------------------------------


def release_flags() -> list[str]:
    """Those of setup.py, which cannot be imported without building."""
    for node in ast.parse((kit.ROOT / "setup.py").read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "FLAVOURS":
            flags: list[str] = ast.literal_eval(node.value)["release"]
            return flags
    raise RuntimeError("setup.py has no FLAVOURS")


def compile_inline(ext: Path, folder: Path) -> None:
    """inline.so into the folder, from the declarations in `ext`."""
    code, module = folder / "inline.c", folder / "inline.so"
    kit.output_of(sys.executable, "-m", "cython", "-3", "-I", ext, "-o", code, HERE / "inline.pyx")
    include = sysconfig.get_path("include")
    kit.output_of(
        "gcc", "-std=gnu11", *release_flags(), "-fPIC", "-shared", f"-I{ext}", f"-I{include}", "-o", module, code
    )


def inline_counts(folder: Path, ext: Path = kit.ROOT / "ext") -> Counts:
    """Table look-up and frame verdict, of the declarations in `ext`; the folder takes what is made meanwhile."""
    compile_inline(ext, folder)
    out = folder / "inline.out"
    script = f"import sys; sys.path[:0] = [{str(folder)!r}]; import inline"
    script += "".join(f"; print(inline.{name}({rounds}))" for name, rounds in ROUNDS.items())
    said = kit.output_of(*_callgrind(out), sys.executable, "-I", "-S", "-c", script)
    dumps = _parts(out)
    return {NAMES[name]: _total(next(dumps)) / int(done) for name, done in zip(ROUNDS, said.split(), strict=True)}


def _callgrind(out: Path) -> tuple[str, ...]:
    return "valgrind", "--quiet", "--tool=callgrind", "--instr-atstart=no", f"--callgrind-out-file={out}"


def _parts(out: Path) -> Iterator[Path]:
    """The files of the dumps, in their order."""
    return (out.with_name(f"{out.name}.{number}") for number in count(1))


def _total(dump: Path) -> int:
    """Instructions in a dump, of all threads."""
    lines = dump.read_text(errors="replace").splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("totals:"))


# ---- the server -----------------------------------------------------------------------------------------------------


class Counted(Stocked):
    """Our server under callgrind, which begins to count when told."""

    def __init__(self) -> None:
        super().__init__(VOLUMES)
        self._out = self.folder / "callgrind"
        self._dumps = _parts(self._out)

    def command(self) -> tuple[object, ...]:
        # Its interpreter by name: valgrind does not follow the first line of a script.
        return (*_callgrind(self._out), sys.executable, *super().command())

    def tell(self, *words: str) -> None:
        """A word to callgrind; not by callgrind_control, which looks for a command line that our server overwrites."""
        subprocess.run(["vgdb", f"--pid={self.pid}", *words], capture_output=True, check=True, timeout=60)  # noqa: S603, S607

    def dump(self) -> int:
        """Instructions since the last dump."""
        self.tell("dump")
        return _total(next(self._dumps))

    def measure(self, work: Callable[[], object], times: int) -> float:
        """Instructions for one, where `work` is done so many times."""
        least = []
        self.dump()
        for _ in range(WINDOWS):
            for _ in range(times):
                work()
            least.append(self.dump())
        return min(least) / times


def server_counts() -> Counts:
    """Handshake, ping and get: of a server on the loopback network, which has one request at a time."""
    sources = (f"127.9.{number >> 8}.{number & 255}" for number in count(1))
    names = [volume.name for volume in islice(volumes(VOLUMES), 16)]

    with ExitStack() as stack:
        hash_seed = os.environ.get("PYTHONHASHSEED")
        stack.callback(_set, "PYTHONHASHSEED", hash_seed)
        _set("PYTHONHASHSEED", "0")
        server = stack.enter_context(Counted())
        client = stack.enter_context(server.client())
        key = bytes.fromhex(server.key)

        def handshake() -> None:
            with Client("127.0.0.1", server.port, key=key, source=next(sources), timeout=60):
                pass

        asked = count()
        works: Mapping[str, tuple[Callable[[], object], int]] = {
            "ping": (client.ping, 200),
            "volume.get": (lambda: client.call(*get(names[next(asked) % len(names)])), 200),
            "handshake": (handshake, 20),
        }
        for work, times in works.values():
            for _ in range(WARM if times > 100 else times):
                work()
        server.tell("instrumentation", "on")
        return {name: server.measure(work, times) for name, (work, times) in works.items()}


def _set(name: str, value: str | None) -> None:
    os.environ.pop(name, None)
    if value is not None:
        os.environ[name] = value
