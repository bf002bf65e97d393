"""`make bench`: all measurements, or those named; at the end the table, a JSON file in bench/results/, pictures.

As root everything runs in network and mount namespaces of its own, with its own BPF file system: nothing of the host is
touched, and nothing stays.  Otherwise what needs root is "not measured".
"""

import argparse
import os
import resource
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

from bench import blocks, catalog, growth, kernel, kit, latency, listing, pictures, siege, synload, userspace, xdp
from bench.kit import NotMeasuredError, OthersWatch, Report

MEASUREMENTS: dict[str, Callable[[Report], None]] = {
    "drops": userspace.drops,
    "ladder": xdp.ladder,
    "packets": kernel.packets,
    "blocks": blocks.blocks,
    "verdicts": kernel.verdicts,
    "additions": kernel.additions,
    "siege": siege.siege,
    "synload": synload.synload,
    "pings": latency.pings,
    "gets": catalog.gets,
    "handshakes": userspace.handshakes,
    "updates": catalog.updates,
    "sizes": catalog.sizes,
    "memory": growth.memory,
    "connections": growth.connections,
    "timeouts": growth.timeouts,
    "volumes": catalog.growth,
    "listing": listing.listing,
    "table": userspace.table,
    "program": xdp.program,
    "segments": kernel.segments,
}
TRIES = 2  # of a measurement: one stall of the machine, as long as a deadline, fails it, but not the whole run
BUSY = 0.1  # of the machine, from which on other work is said to disturb
DESCRIPTORS = 1 << 18  # for the many connections; a server and the generator each


def options_of(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a few short runs: shows that all works, not how fast")
    parser.add_argument(
        "--into", type=Path, metavar="FILE", help="put what is measured into this run's file, in the place of the same"
    )
    parser.add_argument("names", nargs="*", help=f"of {', '.join(MEASUREMENTS)}; all where none is named")
    options = parser.parse_args(words)
    unknown = [name for name in options.names if name not in MEASUREMENTS]
    if unknown:
        parser.error(f"{unknown[0]}: no such measurement; there are {', '.join(MEASUREMENTS)}")
    return options


def measure(report: Report, names: Sequence[str]) -> list[str]:
    """All of these; what cannot be had here is said, and the names of those that failed are returned."""
    failed = [name for name in names if not any(measured(report, name) for _ in range(TRIES))]
    order = list(MEASUREMENTS)
    report.rows.sort(key=lambda row: order.index(row.measurement))
    return failed


def measured(report: Report, name: str) -> bool:
    """False: it failed, which is said."""
    print(f"-- {name}", flush=True)
    try:
        with report.measuring(name):
            try:
                MEASUREMENTS[name](report)
            except NotMeasuredError as error:
                report.not_measured(error)
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:  # the others are measured all the same
        print(f"FAILED: {name}: {error}", flush=True)
        return False
    return True


def report_to_fill(options: argparse.Namespace) -> Report:
    machine = kit.machine()
    if options.into and options.into.exists():
        report = Report.read(options.into)
        report.machine = machine
        report.quick = report.quick or options.quick
        return report
    return Report(options.quick, machine)


def main(words: Sequence[str] | None = None) -> int:
    options = options_of(words)
    if (os.cpu_count() or 1) < 2:
        print("bench: one processor: server and generator need one each", file=sys.stderr)
        return 2
    try:
        report = report_to_fill(options)
    except (OSError, ValueError, TypeError, KeyError) as error:
        print(f"bench: --into {options.into}: no run of this bench ({error}): remove it", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # so that all is cleaned up then, too
    for name, value in report.machine.items():
        print(f"{name}: {value}")
    with ExitStack() as stack:
        if os.geteuid() == 0:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="bench_"))
            stack.enter_context(kernel.namespaces(Path(folder)))
            with suppress(ValueError, OSError):  # fewer are measured then
                resource.setrlimit(resource.RLIMIT_NOFILE, (DESCRIPTORS, DESCRIPTORS))
        watch = OthersWatch()
        failed = measure(report, options.names or list(MEASUREMENTS))
        report.machine["other_work"] = round(watch.part(), 3)
    path = report.write(options.into)
    print("\n" + kit.markdown(report.rows))
    return said(report, path, failed)


def said(report: Report, path: Path, failed: Sequence[str]) -> int:
    """What stands below the table; the exit code."""
    if report.machine["other_work"] > BUSY:
        print(
            f"other work took {report.machine['other_work']:.0%} of the machine meanwhile: repeat this when it is idle"
        )
    for name, reasons in report.missing.items():
        for reason in reasons:
            print(f"not measured: {name}: {reason}")
    print(f"written to {path}")
    try:
        drawn = pictures.draw(report, kit.PROGRAMS / "pictures")
        print(f"{len(drawn)} pictures in {kit.PROGRAMS / 'pictures'}")
    except (OSError, NotMeasuredError) as error:
        print(f"not drawn: {error}")
    missed = [f"{row.name} ({row.unit})" for row in report.rows if row.met() is False]
    print(f"figures missed: {', '.join(missed)}" if missed else "no figure missed")
    if failed:
        print(f"failed, see above: {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
