"""`tt bpf`: put the XDP program on interfaces, show what it does, take it off; make and clean the pinned maps.

Must not know how a program is loaded (tt.xdp), nor what is in a map (tt.block_maps).
"""

import argparse
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any

from tt import block_maps, xdp
from tt.cli import output
from tt.kernel_gate import BlockMap, GateError

DEFAULT_PORT = 5000
REMAINS = "a server that runs goes on with its own hold on them, which the next load does not see: start it after that"


def register(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `tt bpf load`, `status`, `unload` and `clean`."""
    text = "Drop timed-out sources before the network stack: put the XDP program on interfaces, watch it, take it off."
    actions = commands.add_parser("bpf", help=text, description=text).add_subparsers(
        metavar="ACTION", required=True, title="actions"
    )

    text = (
        "Attach the program to interfaces, and make the pinned maps that are missing. Doing it twice changes nothing."
    )
    load = actions.add_parser("load", help=text, description=text)
    load.add_argument("--dev", metavar="IF", action="append", required=True, help="An interface. May be repeated.")
    _add_map(load, "One that is missing is made, the first for IPv4, the second for IPv6.")
    load.add_argument(
        "--port", type=_number(1, 65535), metavar="N", action="append",
        help=f"The server's TCP port (default: {DEFAULT_PORT}). May be repeated, up to {xdp.MAX_PORTS} times.",
    )  # fmt: skip
    load.add_argument(
        "--mode", choices=xdp.ATTEMPTS, default="auto",
        help="native: in the driver; generic: behind it, slower, on any interface; auto: native, and where the driver "
        "refuses that, generic, with the reason (default: auto).",
    )  # fmt: skip
    load.add_argument(
        "--all-packets", action="store_true",
        help="Drop every TCP packet of a timed-out source, not its SYNs alone: cuts connections that are open, too.",
    )  # fmt: skip
    load.add_argument(
        "--entries", type=_number(1, 1 << 24), metavar="N",
        help=f"Size of a map that is made (default: {block_maps.ENTRIES}).",
    )  # fmt: skip
    load.add_argument(
        "--value", type=int, choices=(4, 8),
        help=f"Bytes of its values: 4, ends in seconds; 8, in nanoseconds (default: {block_maps.VALUE_SIZE}).",
    )  # fmt: skip
    load.set_defaults(run=_guarded(_load))

    text = "Show where the program is attached and in which mode, what it counted, and what is in the maps."
    status = actions.add_parser("status", help=text, description=text)
    _add_map(status)
    status.add_argument("--entries", action="store_true", help="List every entry of the maps, too.")
    status.add_argument("--json", action="store_true", help="Print one JSON object.")
    status.set_defaults(run=_guarded(_status))

    text = "Take the program off, and remove the maps that `tt bpf load` made; those that were there before stay."
    unload = actions.add_parser("unload", help=text, description=text)
    unload.add_argument("--dev", metavar="IF", action="append", help="From this interface alone. May be repeated.")
    _add_map(unload)
    unload.add_argument("--keep-maps", action="store_true", help="Remove no map: for a load with other options.")
    unload.set_defaults(run=_guarded(_unload))

    text = "Remove ended entries from the maps; for maps that no server looks after, since a server does it itself."
    clean = actions.add_parser("clean", help=text, description=text)
    _add_map(clean)
    clean.set_defaults(run=_guarded(_clean))


def _add_map(parser: argparse.ArgumentParser, more: str = "") -> None:
    default = " and ".join(map(str, block_maps.DEFAULTS))
    text = f"A pinned map of timed-out sources, as the server's -B (default: {default}). May be repeated. {more}"
    parser.add_argument("--map", type=Path, metavar="PATH", action="append", help=text.strip())


def _number(least: int, most: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        if not text.isascii() or not text.isdigit() or not least <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"{text!r}: it must be a whole number, {least} to {most}")
        return int(text)

    return read


def _guarded(run: Callable[[argparse.Namespace], int]) -> Callable[[argparse.Namespace], int]:
    """With the exit codes of what tt.xdp and tt.block_maps raise."""

    def guarded(args: argparse.Namespace) -> int:
        try:
            return run(args)
        except GateError as error:
            raise output.Exit(output.USAGE, str(error)) from error
        except xdp.XdpError as error:
            raise output.Exit(output.FAILED, str(error)) from error
        except PermissionError as error:
            raise output.Exit(output.DENIED, str(error.strerror)) from error

    return guarded


def _load(args: argparse.Namespace) -> int:
    ports = tuple(dict.fromkeys(args.port or [DEFAULT_PORT]))
    if len(ports) > xdp.MAX_PORTS:
        raise output.Exit(output.USAGE, f"{len(ports)} ports: the program takes {xdp.MAX_PORTS}: leave out some --port")
    paths = args.map or block_maps.DEFAULTS
    with xdp.lock():
        made = block_maps.make_missing(paths, args.entries, args.value)
        try:
            with block_maps.opened(paths) as maps:
                by_family = {one.family: one.map for one in maps}
                done = xdp.load(args.dev, by_family, xdp.Settings(ports, args.all_packets), args.mode)
        except BaseException:
            block_maps.remove(made)
            raise
    for path in made:
        output.message(f"made {path}")
    for one in done:
        refused = f" (not native: {one.refused})" if one.refused else ""
        output.message(f"{one.interface}: {'already ' if one.before else ''}attached, mode {one.mode}{refused}")
    return output.OK


def _unload(args: argparse.Namespace) -> int:
    with xdp.lock():
        links = xdp.pinned()
        chosen = [link for link in links if args.dev is None or link.interface in args.dev]
        if strangers := set(args.dev or ()) - {link.interface for link in chosen}:
            raise output.Exit(output.FAILED, f"not attached to {', '.join(sorted(strangers))}: see tt bpf status")
        paths = args.map or block_maps.DEFAULTS
        removing = not args.keep_maps and len(chosen) == len(links)
        if removing:
            _check_maps_named(links, paths)
        xdp.unload(chosen)
        removed = block_maps.remove(paths) if removing else []
    for link in chosen:
        output.message(f"{link.interface}: taken off")
    if removed:
        output.message(f"removed {' and '.join(map(str, removed))}: {REMAINS}")
    if not chosen and not removed:
        output.message("nothing was loaded")
    return output.OK


def _check_maps_named(links: Iterable[xdp.Link], paths: Sequence[Path]) -> None:
    """What is removed must be all that was made: a map that is pinned elsewhere would stay behind."""
    program = xdp.program_of(links)
    if program is None:
        return
    with closing(program), block_maps.opened([path for path in paths if path.exists()]) as maps:
        known = {xdp.object_id(one.map.fd) for one in maps}
        if any(block_maps.is_ours(name) and number not in known for number, name in program.map_names().items()):
            raise output.Exit(
                output.USAGE,
                "the program reads a map made by tt bpf load that is at none of the paths given: "
                "name it with --map to remove it, or leave it there with --keep-maps",
            )


def _clean(args: argparse.Namespace) -> int:
    with block_maps.opened(_present(args)) as maps:
        for one in maps:
            count = block_maps.clean(one)
            output.message(f"{one.map.path}: {count} ended entr{'y' if count == 1 else 'ies'} removed")
    return output.OK


def _present(args: argparse.Namespace) -> list[Path]:
    """The maps that were named, else the defaults that are there."""
    return args.map or [path for path in block_maps.DEFAULTS if path.exists()]


# ---- status ---------------------------------------------------------------------------------------------------------


def _status(args: argparse.Namespace) -> int:
    links = xdp.pinned()
    program = xdp.program_of(links)
    with block_maps.opened(_present(args)) as maps, closing(program) if program else nullcontext():
        shown: dict[str, Any] = {
            "interfaces": [_interface(link) for link in links],
            "program": _program(program) if program else None,
            "maps": [_map(one, program, args.entries) for one in maps],
        }
    if args.json:
        output.json_line(shown)
    else:
        for text in _lines(shown):
            output.line(text)
    return output.OK


def _interface(link: xdp.Link) -> dict[str, Any]:
    is_now = xdp.attached(link.number) if link.number else None
    mode = "elsewhere" if link.number else "gone"
    if is_now is not None and is_now.program == link.program:
        mode = is_now.mode
    return {"interface": link.interface, "mode": mode, "program": link.program, "pin": str(link.pin)}


def _program(program: xdp.Program) -> dict[str, Any]:
    settings = program.settings()
    return {
        "ports": list(settings.ports),
        "all_packets": settings.all_packets,
        "counters": program.counters(),
    }


def _map(one: BlockMap, program: xdp.Program | None, listing: bool) -> dict[str, Any]:
    entries = list(block_maps.entries(one))
    ends = [entry["ends_in_s"] for entry in entries]
    shown = {
        "map": one.map.path,
        "family": f"IPv{one.family}",
        "kind": one.map.kind,
        "value_bytes": one.map.value_size,
        "size": one.map.max_entries,
        "running": sum(end is not None and end > 0 for end in ends),
        "ended": sum(end is not None and end <= 0 for end in ends),
        "preloaded": ends.count(None),
        "read_by_program": program is not None and xdp.object_id(one.map.fd) in program.map_ids,
    }
    return shown | ({"entries": entries} if listing else {})


def _lines(shown: dict[str, Any]) -> Iterator[str]:
    words = {"elsewhere": "attached, in another network namespace", "gone": "the interface is gone: tt bpf unload"}
    for one in shown["interfaces"]:
        yield f"{'interface':<12} {one['interface']}: {words.get(one['mode'], one['mode'])}"
    if not shown["interfaces"]:
        yield f"{'interface':<12} none: tt bpf load --dev IF attaches the program"
    if program := shown["program"]:
        ports = ", ".join(map(str, program["ports"]))
        yield f"{'drops':<12} {'every packet' if program['all_packets'] else 'SYNs'} to TCP port {ports}"
        counted = program["counters"]
        for word in ("dropped", "passed"):
            yield f"{word:<12} {counted[f'{word}_packets']} packets, {counted[f'{word}_bytes']} bytes"
    for one in shown["maps"]:
        form = f"{one['family']}, {one['kind']}, values of {one['value_bytes']} bytes"
        fill = f"{one['running']} running, {one['ended']} ended, {one['preloaded']} preloaded of {one['size']}"
        unread = "" if one["read_by_program"] else "; no program of tt bpf reads it"
        yield f"{'map':<12} {one['map']}: {form}: {fill}{unread}"
        for entry in one.get("entries", ()):
            end = entry["ends_in_s"]
            yield f"  {entry['source']:<43} {'for ever' if end is None else 'ended' if end <= 0 else f'{end:.0f} s'}"
