"""`tt config`: check a configuration file, and show each option with its value and where that comes from.

A check gives every error of a file, and warns of what reads well but will not do what it seems.  Of the host it looks
at nothing: a group, a map, an address that is not there the start of the server names.
Must not know how a value is read, nor its range: tt.config and tt.option_kinds do.
"""

import argparse
import os
import textwrap
from collections.abc import Iterable, Iterator
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from tt import __version__, config, exemptions
from tt.cli import output, serve

COLUMNS = ("OPTION", "FROM", "CHANGES AT", "VALUE")
WIDTH = 118  # characters of a comment line in TOML
SITE, HOST = 48, 64  # bits of what one site and what one network of hosts has of IPv6 (RFC 6177)
# An option that does nothing without another: the other one, the value of that which turns it off, and the remedy.
NEEDS = (
    ("timeout_vouched", "vouching", False, "set vouching = true"),
    ("timeout_max", "escalate", False, "set escalate = true"),
    ("listener_filter", "block_map", (), "name a block_map"),
)
# Of two options the first is meant to be no more than the second.
NO_MORE = (
    ("timeout_vouched", "timeout", "a source with a good login waits longer than one without"),
    ("output_limit_before_login", "output_limit", "a peer is owed more before its login than after it"),
    ("connections_per_source", "max_connections", "one source can have all connections"),
)


def register(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `tt config check` and `show`."""
    text = "Check a configuration file, or show what is configured and where each value comes from."
    parser = commands.add_parser("config", help=text, description=text)
    actions = parser.add_subparsers(metavar="ACTION", required=True, title="actions")

    text = "Name every error of a configuration file, and what in it will not do what it seems."
    check = actions.add_parser(
        "check", help=text, description=f"{text} The exit code is 2 where there is an error, and 0 where there is none."
    )
    check.add_argument("file", type=Path, metavar="FILE", help="A TOML file, as for `tt serve -c`.")
    check.set_defaults(run=_check)

    text = "Show the value that each option has for a server started like this, and where it comes from."
    show = actions.add_parser(
        "show",
        help=text,
        description=f"{text} Takes the options of `tt serve`, and the environment. What changes at SIGHUP a running "
        "server reads again; the rest needs a restart.",
    )
    form = show.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="Print one JSON object an option.")
    form.add_argument("--toml", action="store_true", help="Print a configuration file with all options, explained.")
    show.add_argument("-c", "--config", type=Path, metavar="FILE", help="The file that the server is given.")
    serve.add_flags(show)
    show.set_defaults(run=_show)


# ---- tt config check ------------------------------------------------------------------------------------------------


def _check(args: argparse.Namespace) -> int:
    loaded, errors = config.examine(args.file, {}, {})
    for text in errors:
        output.message(text)
    if errors:
        return output.USAGE
    warned = list(warnings(loaded))
    for text in warned:
        output.message(f"{args.file}: warning: {text}")
    word = f"no error, warnings: {len(warned)}" if warned else "good"
    output.message(f"{args.file}: {word}; options set: {len(loaded.origins)} of {len(config.OPTIONS)}")
    return output.OK


def warnings(loaded: config.Config) -> Iterator[str]:
    """What is allowed, and will not do what it seems: each one line with the remedy."""
    for network in loaded.exempt:
        yield from (f"exempt = {network}: {why}" for why in exemptions.caveats(network, loaded.ipv6_prefix))
    yield from _about_addresses(loaded.listen)
    if loaded.observe:
        yield "observe = true: nobody is timed out, only logged; leave it out once the log is as you wish"
    if loaded.ipv6_prefix > HOST:
        yield (
            f"ipv6_prefix = {loaded.ipv6_prefix}: a host has a /{HOST} of addresses, so one that is timed out comes "
            f"from the next; use {HOST}"
        )
    if loaded.ipv6_prefix < SITE:
        yield f"ipv6_prefix = {loaded.ipv6_prefix}: one time-out is for many sites; use {SITE} to {HOST}"
    without_effect = [one for one in NEEDS if one[0] in loaded.origins and getattr(loaded, one[1]) == one[2]]
    for name, needs, _, remedy in without_effect:
        yield f"{_written(loaded, name)}: no effect, since {_written(loaded, needs)}; {remedy}, or leave it out"
    for name, other, what in NO_MORE:
        if name in (one[0] for one in without_effect):
            continue
        if getattr(loaded, name) > getattr(loaded, other) > 0:
            yield f"{_written(loaded, name)}: more than {_written(loaded, other)}: {what}; lower it"
    for name in ("data", "block_map"):
        paths = getattr(loaded, name) if config.OPTIONS[name].kind.many else [getattr(loaded, name)]
        for path in paths if name in loaded.origins else ():
            if not path.is_absolute():
                yield f"{name} = {path}: depends on the folder that the server is started in; give the whole path"


def _about_addresses(addresses: Iterable[config.Address]) -> Iterator[str]:
    every = [one for one in addresses if ip_address(one.host).is_unspecified]
    for one in addresses:
        version = ip_address(one.host).version
        if one.port == 0:
            yield f"listen = {one}: another port at each start, which no client knows; name one"
        elif any(
            other != one and (ip_address(other.host).version, other.port) == (version, one.port) for other in every
        ):
            yield f"listen = {one}: the start will fail, since another address of `listen` has it already; leave it out"


def _written(loaded: config.Config, name: str) -> str:
    return f"{name} = {config.show(name, getattr(loaded, name))}"


# ---- tt config show -------------------------------------------------------------------------------------------------


def _show(args: argparse.Namespace) -> int:
    loaded, errors = config.examine(args.config, os.environ, serve.overrides(args))
    for text in errors:
        output.message(text)
    if errors:
        return output.USAGE
    if args.toml:
        output.lines(toml_file(loaded))
    elif args.json:
        output.lines(output.json_text(_described(loaded, name)) for name in config.OPTIONS)
    else:
        output.lines(_aligned([COLUMNS, *(_row(loaded, name) for name in config.OPTIONS)]))
    return output.OK


def _row(loaded: config.Config, name: str) -> tuple[str, ...]:
    origin = str(loaded.sources.path) if _from(loaded, name) == "file" else loaded.origin(name)
    return name, origin, changes_at(name), config.show(name, getattr(loaded, name))


def _described(loaded: config.Config, name: str) -> dict[str, object]:
    return {
        "option": name,
        "value": _plain(getattr(loaded, name)),
        "default": _plain(config.default(name)),
        "from": _from(loaded, name),
        "changes_at": changes_at(name),
    }


def _from(loaded: config.Config, name: str) -> str:
    origin = loaded.origin(name)
    if origin == f"{loaded.sources.path}: {name}":
        return "file"
    return {"environment": "environment", "option": "command line"}.get(origin.partition(" ")[0], origin)


def changes_at(name: str) -> str:
    """When a new value of the option is taken."""
    return "SIGHUP" if config.OPTIONS[name].reload else "restart"


def _plain(value: Any) -> object:
    """The value in types of JSON: seconds, bytes, counts, truth values, texts and lists of texts."""
    if isinstance(value, tuple):
        return [str(item) for item in value]
    return value if isinstance(value, (bool, int, float)) else str(value)


def _aligned(rows: list[tuple[str, ...]]) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


# ---- a file of all options ------------------------------------------------------------------------------------------


def toml_file(loaded: config.Config) -> Iterator[str]:
    """The lines of a TOML file that has every option; what has its default is commented out.

    Raises output.Exit where a value cannot stand in TOML, which is UTF-8.
    """
    yield f"# Options of TapeTrackServer {__version__}, for `tt serve -c FILE`; `tt config check FILE` checks them."
    yield "# What is commented out has its default."
    for name, option in config.OPTIONS.items():
        if name in config.SECTIONS:
            yield from ("", "", f"# ---- {config.SECTIONS[name]} ----")
        yield ""
        rule = "; ".join(filter(None, (option.kind.rule, config.limits(name))))
        text = f"{option.help[0].upper()}{option.help[1:]}. It must be {rule}. Changes at {changes_at(name)}."
        yield from textwrap.wrap(text, WIDTH, initial_indent="# ", subsequent_indent="# ")
        unset = "#" if loaded.origin(name) == config.DEFAULT else ""
        yield f"{unset}{name} = {_toml(name, getattr(loaded, name))}"


def _toml(name: str, value: Any) -> str:
    kind = config.OPTIONS[name].kind
    if kind.many:
        return f"[{', '.join(_toml_text(name, kind.show(item)) for item in value)}]"
    if isinstance(value, bool):
        return kind.show(value)
    if isinstance(value, (int, float)):
        shown = kind.show(value)
        # As a person would write it, where that is the value exactly and not a bare number.
        return f'"{shown}"' if shown[-1].isalpha() and str in kind.toml and kind.read(shown) == value else repr(value)
    return _toml_text(name, kind.show(value))


def _toml_text(name: str, text: str) -> str:
    """A basic string (TOML 1.0), with all escaped that is not printable."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise output.Exit(output.FAILED, f"{name} = {text!a}: it is not UTF-8, which a TOML file must be") from None
    escaped = (f"\\{c}" if c in '"\\' else c if c.isprintable() else f"\\U{ord(c):08x}" for c in text)
    return f'"{"".join(escaped)}"'
