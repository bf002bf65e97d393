"""counts.json: the instruction counts that are held to, by the build that they belong to.

    {"compiled" | "server": [{"build": {field: text}, "counts": {name: instructions for one}}]}

Rules: only counts of the very same build are compared; another build, such as a new interpreter, has none until
`make counts` has been run on it, and that is said.  A count that fell is a difference too: who does not write it down
gives the gain away to the next change.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from bench.counts import HERE, Build, Counts

FILE = HERE / "counts.json"
TOLERANCE = 0.03  # two runs of one build differ by up to 0.01
UPDATE = "run `make counts` and commit bench/counts/counts.json"


@dataclass
class Book:
    parts: dict[str, list[tuple[Build, Counts]]]

    @classmethod
    def read(cls, path: Path = FILE) -> Self:
        saved = json.loads(path.read_text()) if path.exists() else {}
        return cls({part: [(one["build"], one["counts"]) for one in entries] for part, entries in saved.items()})

    def write(self, path: Path = FILE) -> None:
        saved = {
            part: [{"build": build, "counts": counts} for build, counts in entries]
            for part, entries in self.parts.items()
        }
        path.write_text(json.dumps(saved, indent=1) + "\n")

    def find(self, part: str, build: Build) -> Counts | None:
        return next((counts for kept, counts in self.parts.get(part, []) if kept == build), None)

    def keep(self, part: str, build: Build, counts: Counts) -> None:
        """In the place of what was held for that build."""
        others = [(kept, of_it) for kept, of_it in self.parts.get(part, []) if kept != build]
        self.parts[part] = [*others, (build, {name: round(value, 1) for name, value in counts.items()})]

    def why_not(self, part: str, build: Build) -> str:
        """What to say where there is none: in what the build differs from the one most like it."""
        kept = [entry for entry, _ in self.parts.get(part, [])]
        nearest = min(kept, key=lambda one: len(_differences(one, build)), default=None)
        what = "" if nearest is None else f" ({', '.join(_differences(nearest, build))})"
        return f"no counts for this build{what}: {UPDATE}"


def _differences(kept: Build, build: Build) -> list[str]:
    return [f"{name} {build.get(name)}, not {value}" for name, value in kept.items() if build.get(name) != value]


def differences(kept: Mapping[str, float], counts: Mapping[str, float]) -> list[str]:
    """A line for each count that is not what it was, to within TOLERANCE."""
    lines = [f"{name}: is not counted any more: {UPDATE}" for name in kept if name not in counts]
    for name, count in counts.items():
        if name not in kept:
            lines.append(f"{name}: is not in counts.json: {UPDATE}")
        elif abs(change := count / kept[name] - 1) > TOLERANCE:
            remedy = "look why; where it has to be" if change > 0 else "a gain; to hold it"
            lines.append(
                f"{name}: {count:,.0f} instructions, {change:+.1%} to the {kept[name]:,.0f} in counts.json: "
                f"{remedy}, {UPDATE}"
            )
    return lines
