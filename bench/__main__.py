"""`make bench`: all measurements, or those named; the table at the end, and a JSON file in bench/results/.

As root everything runs in network and mount namespaces of its own, with its own BPF file system: nothing of the host is
touched, and nothing stays.  Otherwise what needs root is "not measured".
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from bench import catalog, kernel, kit, siege, synload, userspace, xdp
from bench.kit import NotMeasuredError, OthersWatch, Report

MEASUREMENTS: dict[str, Callable[[Report], None]] = {
    "drops": userspace.drops,
    "pings": userspace.pings,
    "handshakes": userspace.handshakes,
    "table": userspace.table,
    "memory": userspace.memory,
    "verdicts": kernel.verdicts,
    "additions": kernel.additions,
    "packets": kernel.packets,
    "segments": kernel.segments,
    "siege": siege.siege,
    "ladder": xdp.ladder,
    "program": xdp.program,
    "synload": synload.synload,
    "gets": catalog.gets,
    "updates": catalog.updates,
    "sizes": catalog.sizes,
    "growth": catalog.growth,
}
BUSY = 0.1  # of the machine, from which on other work is said to disturb


def main() -> int:
    parser = argparse.ArgumentParser(prog="bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a few short runs: shows that all works, not how fast")
    parser.add_argument("names", nargs="*", help=f"of {', '.join(MEASUREMENTS)}; all where none is named")
    options = parser.parse_args()
    unknown = [name for name in options.names if name not in MEASUREMENTS]
    if unknown:
        parser.error(f"{unknown[0]}: no such measurement; there are {', '.join(MEASUREMENTS)}")
    if (os.cpu_count() or 1) < 2:
        parser.error("one processor: server and generator need one each")
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # so that all is cleaned up then, too
    report = Report(options.quick, machine=kit.machine())
    for name, value in report.machine.items():
        print(f"{name}: {value}")
    with ExitStack() as stack:
        if os.geteuid() == 0:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="bench_"))
            stack.enter_context(kernel.namespaces(Path(folder)))
        watch, failed = OthersWatch(), list[str]()
        for name in options.names or MEASUREMENTS:
            print(f"-- {name}", flush=True)
            try:
                MEASUREMENTS[name](report)
            except NotMeasuredError as error:
                report.missing.append(f"{name}: {error}")
                print(f"not measured: {error}", flush=True)
            except (OSError, RuntimeError, subprocess.SubprocessError) as error:  # the others are measured all the same
                failed.append(name)
                print(f"FAILED: {name}: {error}", flush=True)
        report.machine["other_work"] = round(watch.part(), 3)
    path = report.write()
    print("\n" + kit.markdown(report))
    if report.machine["other_work"] > BUSY:
        print(
            f"other work took {report.machine['other_work']:.0%} of the machine meanwhile: repeat this when it is idle"
        )
    for reason in report.missing:
        print(f"not measured: {reason}")
    print(f"written to {path.relative_to(kit.ROOT)}")
    missed = [row.name for row in report.rows if row.met() is False]
    print(f"figures missed: {', '.join(missed)}" if missed else "no figure missed")
    if failed:
        print(f"failed, see above: {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
