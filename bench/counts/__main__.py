"""`make counts`: counts, shows each beside what it was, and keeps it in counts.json."""

import os
import sys
import tempfile
from pathlib import Path

from bench import counts, kit
from bench.counts.book import FILE, Book


def main() -> int:
    flavour = os.environ.get("TT_BUILD", "release")
    if flavour != "release":
        print(f"counts: TT_BUILD is {flavour}: only the release build is counted", file=sys.stderr)
        return 2
    book = Book.read()
    with tempfile.TemporaryDirectory(prefix="counts_") as folder:
        measured = {
            "compiled": (counts.compiled_build(), counts.inline_counts(Path(folder))),
            "server": (counts.server_build(), counts.server_counts()),
        }
    for part, (build, of_part) in measured.items():
        kept = book.find(part, build) or {}
        print(", ".join(build.values()))
        for name, count in of_part.items():
            before = f"  before {kept[name]:12,.1f}  {count / kept[name] - 1:+.1%}" if name in kept else ""
            print(f"  {name:14} {count:12,.1f} instructions{before}")
        book.keep(part, build, of_part)
    book.write()
    print(f"written to {FILE.relative_to(kit.ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
