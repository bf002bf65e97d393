"""What the keys of `tt top` do: which time-out is chosen, what is asked before it is done, and the line at the foot.

`press` takes one key, by the names of tt.cli.top_terminal, and returns what is to be asked of the server, if anything.
Rule: nothing is changed on the server without a "y" to a question that names what will change.
Must not know a terminal, the picture, nor how the server is asked.
"""

from collections.abc import Callable, Mapping, Sequence
from ipaddress import IPv4Network, IPv6Network, ip_network
from typing import Any

from tt.cli.report_figures import Entry
from tt.cli.top_model import Model, network_of

Request = Mapping[str, Any]  # what goes to the control socket

QUIT: Request = {}
PAGE = 10  # entries
MOST_TYPED = 64  # characters
NEWEST, OLDEST = -(1 << 30), 1 << 30  # steps that reach the end of any list
STEPS = {
    "down": 1, "j": 1, "up": -1, "k": -1, "pagedown": PAGE, "pageup": -PAGE, "home": NEWEST, "end": OLDEST,
}  # fmt: skip
HINTS = "q quit   arrows choose   / filter   p pause   ? help"
HINTS_CHOSEN = "l lift   e exempt   Esc the newest   / filter   p pause   ? help   q quit"
HELP = (
    "tt top: what the server on this host does, and who is timed out",
    "",
    "  up, down, k, j    choose a time-out; Page Up, Page Down, Home, End go further",
    "  l                 lift the chosen time-out, and forget its source's repeats",
    "  e                 exempt its network: the /24 of IPv4 or /48 of IPv6, or",
    "                    whatever network you write instead",
    "  /                 show only time-outs that have a text: an address, a network,",
    "                    a reason, what they spoke; Enter keeps it",
    "  p                 pause; what happens meanwhile comes when it goes on",
    "  Esc               leave a question, the choice, the filter: one at a time",
    "  Ctrl-L            paint the screen anew",
    "  q, Ctrl-C         end",
    "",
    "  now, 1 min, peak  a second: since the last sample; the mean of a minute; the",
    "                    highest column.  A chart is as high as its own peak",
    "  drops             connections of timed-out sources that the server closed;",
    "                    what the kernel dropped before is in its line above",
    "  left              how long a time-out still runs, or how it ended",
    "",
    "any key goes back",
)


class Keys:
    """What was pressed until now, and what that means for the picture."""

    def __init__(self) -> None:
        self.chosen: int | None = None  # the number of an entry; None: the list follows the newest
        self.filter = ""
        self.paused = False
        self.helping = False
        self.failure = ""  # why the server does not answer, "" where it does
        self._says = ("", "")  # what was done, and its style, until the next key
        self._question = ""  # to be answered with y
        self._then: Callable[[], Request] = dict
        self._typing: str | None = None  # the text so far
        self._prompt = ""
        self._entered: Callable[[str], None] = self._set_filter

    def say(self, text: str, style: str = "") -> None:
        """Show a line at the foot until the next key."""
        self._says = (text, style)

    def foot(self) -> tuple[str, str]:
        """The last line of the screen: its text and style."""
        if self._question:
            return f"{self._question} (y/n)", "ask"
        if self._typing is not None:
            return f"{self._prompt}{self._typing}_", "ask"
        if self._says[0]:
            return self._says
        if self.failure:
            return self.failure, "alarm"
        if self.chosen is not None:
            return HINTS_CHOSEN, "dim"
        return HINTS, "dim"

    def first_shown(self, entries: Sequence[Entry], room: int) -> int:
        """Where a list of so many lines begins, so that the chosen entry is in its middle."""
        place = self._place(entries)
        return 0 if place is None else max(0, min(place - room // 2, len(entries) - room))

    def press(self, key: str, model: Model) -> Request | None:
        """What to ask the server, QUIT, or None."""
        self._says = ("", "")
        if key == "ctrl-c":
            return QUIT
        if self._question:
            return self._answer(key)
        if self._typing is not None:
            self._type(key)
        elif self.helping:
            self.helping = False
        elif key in STEPS:
            self._choose(model.latest(self.filter), STEPS[key])
        elif key == "q":
            return QUIT
        else:
            self._command(key, model)
        return None

    def _command(self, key: str, model: Model) -> None:
        match key:
            case "?":
                self.helping = True
            case "p":
                self.paused = not self.paused
            case "/":
                self._ask_text("show only what has: ", self.filter, self._set_filter)
            case "escape":
                self.chosen, self.filter = None, self.filter if self.chosen is not None else ""
            case "l" | "e":
                self._about_chosen(key, model)

    # ---- the chosen entry -------------------------------------------------------------------------------------------

    def _place(self, entries: Sequence[Entry]) -> int | None:
        return next((place for place, entry in enumerate(entries) if entry.number == self.chosen), None)

    def _choose(self, entries: Sequence[Entry], step: int) -> None:
        """A step down the list; one up from its top ends the choice."""
        place = self._place(entries)
        there = (-1 if place is None else place) + step
        if not entries or (there < 0 and step == -1):
            self.chosen = None
        else:
            self.chosen = entries[max(0, min(there, len(entries) - 1))].number

    def _about_chosen(self, key: str, model: Model) -> None:
        entries = model.latest(self.filter)
        place = self._place(entries)
        if place is None:
            self.say("choose a time-out first, with the arrows or j and k", "warn")
            return
        entry = entries[place]
        if key == "l":
            self._ask(f"lift the time-out of {entry.source}?", lambda: {"do": "bans.remove", "source": entry.source})
        else:
            self._ask_text("exempt network: ", network_of(entry.source), lambda text: self._exempt(text, entry, model))

    def _exempt(self, text: str, entry: Entry, model: Model) -> None:
        try:
            network = ip_network(text.strip())
        except ValueError as error:
            self._ask_text(f"{error}; exempt network: ", text, lambda again: self._exempt(again, entry, model))
            return
        inside = model.within(network)
        lifted = f", and lift its {inside:,} time-out{_s(inside)} listed here" if inside else ""
        reason = f"tt top: {entry.reason} of {entry.source}"
        self._ask(
            f"exempt {network}: {_size(network)}{lifted}?",
            lambda: {"do": "exempt.add", "network": str(network), "reason": reason},
        )

    # ---- questions --------------------------------------------------------------------------------------------------

    def _ask(self, question: str, then: Callable[[], Request]) -> None:
        self._question, self._then = question, then

    def _answer(self, key: str) -> Request | None:
        self._question = ""
        if key == "y":
            return self._then()
        self.say("nothing was changed")
        return None

    def _ask_text(self, prompt: str, text: str, entered: Callable[[str], None]) -> None:
        self._prompt, self._typing, self._entered = prompt, text, entered

    def _type(self, key: str) -> None:
        text = self._typing or ""
        if key == "enter":
            self._typing = None
            self._entered(text)
        elif key == "escape":
            self._typing = None
            if self._entered == self._set_filter:
                self.filter = ""
        else:
            self._typing = _edited(text, key)
            if self._entered == self._set_filter:  # seen while it is written
                self.filter = self._typing

    def _set_filter(self, text: str) -> None:
        self.filter = text


def _edited(text: str, key: str) -> str:
    if key == "backspace":
        return text[:-1]
    if key == "ctrl-u":
        return ""
    return (text + key)[:MOST_TYPED] if len(key) == 1 else text


def _size(network: IPv4Network | IPv6Network) -> str:
    """How many sources that are, where one of IPv6 is a /64."""
    if network.version == 6 and network.prefixlen <= 64:
        count = 1 << 64 - network.prefixlen
        return f"{count:,} network{_s(count)} /64"
    count = network.num_addresses
    return "1 address" if count == 1 else f"{count:,} addresses"


def _s(count: int) -> str:
    return "" if count == 1 else "s"
