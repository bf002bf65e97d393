"""A flame graph: stacks with their counts, drawn as one SVG file that needs nothing else.

    folded stacks    the outermost function first: main;read_turn_[t];tcp_recvmsg_[k] 17
    `_[x]`           the kind of a function: k kernel, t our extension, j Python by name, i interpreter; none: a library

Widths are counts, neighbours of one name are one box, and order is by name: left and right mean nothing.  The file
has its own script: a click zooms, Ctrl-F or "search" marks what a regular expression finds and says its part.
It must not know where stacks come from.
"""

import html
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

Stacks = Mapping[tuple[str, ...], int]

WIDTH = 1200  # px
ROW = 17
MARGIN = 10
HEAD = 68  # title, subtitle, legend
LETTER = 6.6  # px of a letter in a box; a little more than any browser's monospaced 11 px
LONGEST = 100  # letters of a name; the compiler's names of Rust functions have hundreds
NARROWEST = 0.4  # px: what is narrower is not drawn, and its place is empty

# Fills on which black text has a contrast of at least 7, and that differ in lightness too.
KINDS = {
    "k": ("kernel", "#f2b35d"),
    "t": ("tt._core", "#6fc18c"),
    "j": ("Python", "#7fb2f0"),
    "i": ("interpreter", "#c3d5ea"),
    "": ("libraries", "#eeb0a8"),
}


@dataclass
class Box:
    """A function below one chain of callers; `count` has what it called in it."""

    name: str
    count: int = 0
    called: "dict[str, Box]" = field(default_factory=dict)

    def of(self, name: str) -> "Box":
        return self.called.setdefault(name, Box(name))

    def depth(self) -> int:
        return 1 + max((box.depth() for box in self.called.values()), default=0)


def fold(stacks: Stacks) -> str:
    """The folded text, a line a stack; no name may have a ";"."""
    return "".join(f"{';'.join(stack)} {count}\n" for stack, count in sorted(stacks.items()))


def unfold(text: str) -> dict[tuple[str, ...], int]:
    """What fold() wrote.  Raises ValueError, which names the line."""
    stacks: dict[tuple[str, ...], int] = {}
    for number, line in enumerate(text.splitlines(), 1):
        names, _, count = line.rpartition(" ")
        if not names or not count.isdecimal():
            raise ValueError(f"line {number} is {line!r}: it must be NAME;NAME... COUNT")
        stack = tuple(names.split(";"))
        stacks[stack] = stacks.get(stack, 0) + int(count)
    return stacks


def kind_of(name: str) -> tuple[str, str]:
    """A name without its mark, and the mark's letter or ""."""
    match = re.fullmatch(r"(.*)_\[([a-z])\]", name, re.DOTALL)
    return (match[1], match[2]) if match and match[2] in KINDS else (name, "")


def own_counts(stacks: Stacks) -> dict[str, int]:
    """What each function, named with its mark, took itself, most first."""
    own: dict[str, int] = {}
    for stack, count in stacks.items():
        own[stack[-1]] = own.get(stack[-1], 0) + count
    return dict(sorted(own.items(), key=lambda item: (-item[1], item[0])))


def tree(stacks: Stacks) -> Box:
    root = Box("all")
    for stack, count in stacks.items():
        root.count += count
        at = root
        for name in stack:
            at = at.of(name)
            at.count += count
    return root


def svg(stacks: Stacks, title: str, subtitle: str) -> str:
    """The document.  Raises ValueError where there is nothing to draw."""
    root = tree(stacks)
    if not root.count:
        raise ValueError("no stack has a count: there is nothing to draw")
    height = HEAD + root.depth() * ROW + 2 * MARGIN
    size = f'viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}"'
    boxes = "\n".join(_Picture(root.count, height - MARGIN).draw(root, 0, 0))
    style = "".join(f".{kind or 'l'} rect,rect.{kind or 'l'}{{fill:{fill}}}" for kind, (_, fill) in KINDS.items())
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" {size}>',
            f"<style>{_STYLE}{style}</style>",
            f'<rect width="{WIDTH}" height="{height}" fill="#fff"/>',
            f'<text class="title" x="{MARGIN}" y="22">{html.escape(title)}</text>',
            f'<text x="{MARGIN}" y="40">{html.escape(subtitle)}</text>',
            *_legend(),
            f'<text id="found" x="{WIDTH - MARGIN}" y="60" text-anchor="end"></text>',
            f'<text id="search" x="{WIDTH - MARGIN}" y="22" text-anchor="end">search (Ctrl-F)</text>',
            f'<text id="reset" x="{WIDTH - 130}" y="22" text-anchor="end">whole</text>',
            f'<g id="boxes">\n{boxes}\n</g>',
            f"<script>//<![CDATA[\n{_SCRIPT}//]]></script>",
            "</svg>\n",
        ]
    )


def _legend() -> Iterator[str]:
    x = MARGIN
    for kind, (name, _) in KINDS.items():
        yield f'<rect class="{kind or "l"}" x="{x}" y="50" width="12" height="12"/>'
        yield f'<text x="{x + 17}" y="60">{name}</text>'
        x += 30 + int(len(name) * LETTER) + 12


@dataclass(frozen=True)
class _Picture:
    total: int  # of all counts: the whole width
    base: float  # px from above to the lower edge

    def draw(self, box: Box, first: int, level: int) -> Iterator[str]:
        """A box that begins at that count, and what it called: a title for the pointer, the rectangle, perhaps text."""
        scale = (WIDTH - 2 * MARGIN) / self.total
        width = box.count * scale
        if width < NARROWEST:
            return
        name, kind = kind_of(box.name)
        mark = (kind or "l") if level else "all"
        name = name if len(name) <= LONGEST else name[: LONGEST - 2] + ".."
        part = f"{box.count} of {self.total}, {box.count / self.total:.1%}"
        x, y = MARGIN + first * scale, self.base - (level + 1) * ROW
        label = fitting(name, width)
        text = f'<text x="{x + 3:.1f}" y="{y + 12}">{html.escape(label)}</text>' if label else ""
        yield (
            f'<g class="{mark}"><title>{html.escape(name)} ({part})</title>'
            f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="{ROW - 1}"/>{text}</g>'
        )
        for called in sorted(box.called.values(), key=lambda one: one.name):
            yield from self.draw(called, first, level + 1)
            first += called.count


def fitting(name: str, width: float) -> str:
    """As much of the name as a box of that width holds, or nothing."""
    room = int((width - 6) / LETTER)
    if len(name) <= room:
        return name
    return name[: room - 2] + ".." if room > 4 else ""


_STYLE = (
    "text{font:12px sans-serif}.title{font-size:16px;font-weight:bold}"
    ".all rect{fill:#ddd}#boxes text{font:11px monospace;pointer-events:none}"
    "#boxes g:hover rect{stroke:#000}#boxes g.found rect{fill:#d64cd6}#boxes g.above{opacity:.45}"
    "#search,#reset{cursor:pointer;text-decoration:underline}"
)

# Positions are read back from the drawing, so that it stands alone without the script too (an <img> runs none).
_SCRIPT = r"""
const boxes = [...document.querySelectorAll('#boxes g')].map(g => {
  const rect = g.querySelector('rect'), title = g.querySelector('title').textContent;
  return {g, rect, y: +rect.getAttribute('y'), x: +rect.getAttribute('x'), w: +rect.getAttribute('width'),
          name: title.replace(/ \(\d+ of \d+, [\d.]+%\)$/, ''), count: +title.match(/\((\d+) of/)[1]};
});
const whole = boxes[0], found = document.getElementById('found');
function place(b, x, w) {
  b.g.style.display = w < 0.3 ? 'none' : '';
  b.rect.setAttribute('x', x); b.rect.setAttribute('width', Math.max(w, 0));
  let text = b.g.querySelector('text');
  const room = Math.floor((w - 6) / LETTER);
  const label = b.name.length <= room ? b.name : room > 4 ? b.name.slice(0, room - 2) + '..' : '';
  if (!text && label) {
    text = b.g.appendChild(document.createElementNS('http://www.w3.org/2000/svg', 'text'));
    text.setAttribute('y', b.y + 12);
  }
  if (text) { text.setAttribute('x', x + 3); text.textContent = label; }
}
function zoom(to) {
  const scale = whole.w / to.w, e = 0.06;
  for (const b of boxes) {
    const caller = b.y >= to.y && b.x <= to.x + e && b.x + b.w >= to.x + to.w - e;
    const inside = b.y <= to.y && b.x >= to.x - e && b.x + b.w <= to.x + to.w + e;
    b.g.classList.toggle('above', caller && b !== to && to !== whole);
    if (caller) place(b, whole.x, whole.w);
    else if (inside) place(b, whole.x + (b.x - to.x) * scale, b.w * scale);
    else b.g.style.display = 'none';
  }
}
function search() {
  const words = prompt('Mark the functions that this regular expression finds (empty: none):', '');
  if (words === null) return;
  let pattern = null;
  try { pattern = words && new RegExp(words, 'i'); } catch (error) { found.textContent = error.message; return; }
  let sum = 0;
  const spans = [];  // of marked boxes: what one of them has called is not counted again
  for (const b of boxes) {
    const hit = Boolean(pattern) && pattern.test(b.name);
    b.g.classList.toggle('found', hit);
    if (hit && !spans.some(s => b.y < s.y && b.x >= s.x - 0.06 && b.x + b.w <= s.x + s.w + 0.06)) {
      spans.push(b);
      sum += b.count;
    }
  }
  found.textContent = pattern ? `${words}: ${(100 * sum / whole.count).toFixed(1)} %` : '';
}
for (const b of boxes) b.g.addEventListener('click', () => zoom(b));
document.getElementById('reset').addEventListener('click', () => zoom(whole));
document.getElementById('search').addEventListener('click', search);
addEventListener('keydown', event => {
  if ((event.ctrlKey || event.metaKey) && event.key === 'f') { event.preventDefault(); search(); }
});
""".replace("LETTER", str(LETTER))
