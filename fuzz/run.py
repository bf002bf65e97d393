"""Builds the fuzzers and runs them: `run.py [--runs N] [TARGET...]`; without arguments a short run of each.

The targets in *.pyx become programs of their own, with libFuzzer, AddressSanitizer and UndefinedBehaviorSanitizer: the
inline functions of ext/*.pxd without an interpreter running.  The one in decoders.py is Python under atheris.  Each
starts from its corpus, and leaves what it finds beyond that in build/fuzz; the corpus changes by hand alone.
"""

# ruff: noqa: S603, S607  The commands are made of our own paths.

import argparse
import subprocess
import sys
import sysconfig
from pathlib import Path

FUZZ = Path(__file__).parent
EXT = FUZZ.parent / "ext"
BUILD = FUZZ.parent / "build/fuzz"
SHORT = {"frame_verdict": 1_000_000, "proxy_header": 500_000, "table_stream": 10_000, "decoders": 20_000}  # runs
LONGEST = {"frame_verdict": 300, "proxy_header": 120, "table_stream": 401, "decoders": 2000}  # bytes of an input
FLAGS = ("-g", "-O1", "-fno-omit-frame-pointer", "-fsanitize=fuzzer,address,undefined", "-fno-sanitize-recover=all")


def command(target: str, build: Path) -> list[str]:
    """What runs a target, which is built for it where that is needed."""
    if target == "decoders":
        return [sys.executable, str(FUZZ / "decoders.py")]
    build.mkdir(parents=True, exist_ok=True)
    code, program = build / f"{target}.c", build / target
    cython = [sys.executable, "-m", "cython", "-3", "-X", "cdivision=True", "-I", EXT, FUZZ / f"{target}.pyx"]
    subprocess.run([*cython, "-o", code], check=True)
    library = sysconfig.get_config_var("LIBDIR")
    # The module that Cython makes around the target is never run, but the linker wants its symbols.
    python = (f"-L{library}", f"-Wl,-rpath,{library}", f"-lpython{sysconfig.get_config_var('LDVERSION')}")
    headers = ("-I", sysconfig.get_path("include"), "-I", str(EXT))
    subprocess.run(["clang", *FLAGS, *headers, "-o", program, code, *python], check=True)
    return [str(program)]


def run(target: str, runs: int, build: Path = BUILD) -> None:
    """Raises subprocess.CalledProcessError: it found something, which it has said, or could not be built."""
    found = build / "found" / target
    found.mkdir(parents=True, exist_ok=True)
    options = [f"-runs={runs}", f"-max_len={LONGEST[target]}", f"-artifact_prefix={found}/", "-print_final_stats=1"]
    subprocess.run([*command(target, build), *options, found, FUZZ / "corpus" / target], check=True)


def main() -> int:
    parser = argparse.ArgumentParser(prog="run.py")
    parser.add_argument("--runs", type=int, help="how many inputs each target gets (default: a short run)")
    parser.add_argument("target", nargs="*", help=f"of {', '.join(SHORT)} (default: all)")
    args = parser.parse_args()
    if unknown := sorted(set(args.target) - set(SHORT)):
        parser.error(f"no target {unknown[0]}: there are {', '.join(SHORT)}")
    for target in args.target or SHORT:
        print(f"fuzz: {target}", flush=True)
        try:
            run(target, args.runs or SHORT[target])
        except subprocess.CalledProcessError as error:
            program = Path(error.cmd[0]).name
            print(f"fuzz: {target}: {program} ended with {error.returncode}; what it found is in {BUILD}/found")
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
