"""Every option and limit of the server: name, unit, default, range and help, each stated once.

A value comes from the TOML file, is overridden by the environment (TT_ + the name in capitals), and that by the
command line; `Config.origins` remembers which.  The option's name is the field's name: a TOML key as it stands,
--with-dashes on the command line.  An option that is right in form and out of range is an error, never clamped.
In the environment a variable that is a near miss of an option is an error; others that begin with TT_ are not ours.

Rules: every error is one line that names the place, the rule and the remedy.  A Config is frozen; `reload` makes
the next.
Must not know: sockets, the loop, the log.
"""

import difflib
import math
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import Field, dataclass, field, fields, replace
from ipaddress import IPv4Network, IPv6Network
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from tt.option_kinds import (
    ADDRESSES,
    COUNT,
    DAY,
    DIRECTORY,
    DURATION,
    EXEMPTIONS,
    GROUP,
    HOUR,
    KIB,
    MAPS,
    MIB,
    MINUTE,
    NETWORKS,
    RATE,
    SIZE,
    SWITCH,
    USER,
    Address,
    Exempt,
    Kind,
    choice,
)

__all__ = [
    "CONTROL_SOCKET", "DAY", "DEFAULT", "DURATION", "ENVIRONMENT", "OPTIONS", "SECTIONS", "SWITCH",
    "Address", "Config", "ConfigError", "Exempt", "Option", "Sources",
    "default", "examine", "flag", "limits", "load", "reload", "show",
]  # fmt: skip

ENVIRONMENT = "TT_"
CONTROL_SOCKET = "control.sock"  # in the data directory
DEFAULT = "default"  # the origin of a value that nobody set


class ConfigError(Exception):
    """The configuration cannot be used; the text is one line for the operator."""


class Sources(NamedTuple):
    """What `load` was given."""

    path: Path | None
    environ: Mapping[str, str]
    overrides: Mapping[str, Any]


class Option(NamedTuple):
    """What is known of one option besides its name and default."""

    kind: Kind
    help: str
    least: float
    most: float
    reload: bool  # a SIGHUP makes a new value effective; otherwise the next start
    flag: bool  # is on the command line too
    short: str | None  # its one-letter form there


# ---- the options --------------------------------------------------------------------------------------------------


def _option(  # noqa: PLR0913 - one row of the table below; every column but the first three is named where it is used
    kind: Kind,
    default: Any,
    help: str,  # noqa: A002 - the word that argparse uses
    *,
    least: float = 0,
    most: float = math.inf,
    reload: bool = True,
    flag: bool = False,
    short: str | None = None,
) -> Any:
    return field(default=default, metadata={"option": Option(kind, help, least, most, reload, flag, short)})


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """The values in force.  Durations are float seconds, sizes bytes, rates per second; lists are tuples."""

    listen: tuple[Address, ...] = _option(
        ADDRESSES,
        (Address("0.0.0.0", 5000), Address("::", 5000)),  # noqa: S104 - serving every interface is the purpose
        "address and port to listen on",
        reload=False,
        flag=True,
    )
    data: Path = _option(  # noqa: RUF009 - a field, as all the others
        DIRECTORY,
        Path("var"),
        "data directory: the server's key, the saved time-outs",
        reload=False,
        flag=True,
    )
    user: str = _option(
        USER,
        "",
        "user to become once ports and maps are open; from then on without any capability",
        reload=False,
        flag=True,
    )
    control_group: str = _option(
        GROUP,
        "",
        "group whose members may use `tt bans`, `tt exempt`, `tt status` and `tt top`, as root and its user may",
        reload=False,
        flag=True,
    )
    metrics: tuple[Address, ...] = _option(
        ADDRESSES,
        (),
        "address and port where Prometheus gets metrics, by HTTP and without a password",
        reload=False,
        flag=True,
    )

    timeout: float = _option(
        DURATION,
        600.0,
        "time-out of a source that sent what is not the protocol, or tampered with it",
        least=1,
        most=30 * DAY,
        flag=True,
    )
    timeout_bad_hello: float = _option(
        DURATION, 30.0, "time-out for a HELLO that does not authenticate", least=1, most=30 * DAY
    )
    timeout_stalled: float = _option(
        DURATION, 10.0, "time-out for beginning a HELLO and not ending it", least=1, most=30 * DAY
    )
    timeout_login_failed: float = _option(
        DURATION, 300.0, "time-out for repeated failed logins", least=1, most=30 * DAY
    )
    vouching: bool = _option(SWITCH, True, "let a good login shorten `not_protocol` of its source for 24 h")
    timeout_vouched: float = _option(
        DURATION, 30.0, "that time-out of such a source, which no repeat doubles", least=1, most=30 * DAY
    )
    escalate: bool = _option(SWITCH, True, "double the time-out of a source at each repeat within 24 h")
    timeout_max: float = _option(
        DURATION, 6.0 * HOUR, "the longest time-out that doubling leads to", least=1, most=30 * DAY
    )
    bad_version_limit: int = _option(
        COUNT,
        5,
        "frames of an unknown version from a source in a minute; the last one times it out",
        least=1,
        most=1000,
    )
    exempt: tuple[Exempt, ...] = _option(
        EXEMPTIONS, (), "source that is disconnected and logged, but never timed out", flag=True
    )
    proxy_from: tuple[IPv4Network | IPv6Network, ...] = _option(
        NETWORKS,
        (),
        "proxy whose connections begin with a PROXY protocol v2 header, which says who the client is",
        flag=True,
    )
    observe: bool = _option(SWITCH, False, "log what would be timed out, and time nobody out", flag=True)
    ipv6_prefix: int = _option(
        COUNT, 64, "bits of an IPv6 address that make one source", least=32, most=128, reload=False, flag=True
    )
    table_size: int = _option(
        COUNT,
        65536,
        "sources the time-out table holds, for IPv4 and IPv6 each",
        least=1024,
        most=1 << 20,
        reload=False,
        flag=True,
    )
    save_interval: float = _option(
        DURATION, 30.0, "time between saves of a changed time-out table", least=1, most=1 * HOUR
    )

    block_map: tuple[Path, ...] = _option(
        MAPS,
        (),
        "pinned eBPF map that gets the timed-out sources, so that the kernel drops them",
        reload=False,
        flag=True,
        short="-B",
    )
    listener_filter: bool = _option(
        SWITCH,
        True,
        "with a map, attach the filter that reads it to the listening sockets",
        reload=False,
        flag=True,
    )

    backlog: int = _option(
        COUNT,
        4096,
        "connections the kernel holds until they are accepted",
        least=1,
        most=65535,
        reload=False,
        flag=True,
    )
    max_connections: int = _option(
        COUNT, 0, "connections at a time; 0: as many as the descriptor limit allows", most=1 << 20, reload=False
    )
    connections_per_source: int = _option(
        COUNT, 64, "connections of one source that have not logged in", least=1, most=65535
    )
    hello_deadline: float = _option(DURATION, 10.0, "time from accept to a whole HELLO", least=1, most=5 * MINUTE)
    idle_before_login: float = _option(
        DURATION, 60.0, "silence before login that ends a connection", least=1, most=1 * DAY
    )
    idle_after_login: float = _option(
        DURATION, 600.0, "silence after login that ends a connection", least=1, most=7 * DAY
    )
    frame_deadline: float = _option(
        DURATION, 30.0, "time from a frame's first byte to its last", least=1, most=1 * HOUR
    )
    output_limit: int = _option(
        SIZE, 1 * MIB, "unsent output that makes a peer a slow reader", least=64 * KIB, most=64 * MIB
    )
    output_limit_before_login: int = _option(
        SIZE, 16 * KIB, "the same before login, where a peer is owed little", least=4 * KIB, most=1 * MIB
    )
    drain_limit: int = _option(SIZE, 64 * KIB, "bytes read and thrown away at a graceful close", most=16 * MIB)
    drain_deadline: float = _option(DURATION, 1.0, "time a graceful close may take", least=0.01, most=1 * MINUTE)

    hello_rate: int = _option(RATE, 20, "HELLOs of one source that are served", least=1, most=1_000_000)
    hello_burst: int = _option(
        COUNT, 100, "HELLOs of one source served at once, ahead of the rate", least=1, most=1_000_000
    )
    handshakes_per_turn: int = _option(COUNT, 16, "handshakes in one turn of the loop", least=1, most=4096)
    accepts_per_turn: int = _option(COUNT, 256, "accepted connections in one turn of the loop", least=1, most=65536)
    read_per_turn: int = _option(
        SIZE, 256 * KIB, "bytes read from one connection in one turn of the loop", least=4 * KIB, most=16 * MIB
    )

    login_failures: int = _option(
        COUNT,
        5,
        "failed logins of a source, each with another name or password; the last one times it out",
        least=1,
        most=1000,
    )
    login_window: float = _option(DURATION, 600.0, "time for which a failed login counts", least=1, most=1 * DAY)
    login_delay: float = _option(
        DURATION, 4.0, "the longest that the answer to a failed login is held back; 0: not at all", most=1 * MINUTE
    )
    password_queue: int = _option(
        COUNT,
        64,
        "passwords that wait to be checked; further logins are told to come again",
        least=1,
        most=65536,
        reload=False,
    )
    cached_volumes: int = _option(COUNT, 200_000, "Volumes held in memory", least=1000, most=100_000_000, reload=False)

    log_format: str = _option(
        choice("text", "json", "journal"),
        "text",
        "form of the log: lines on stderr, or entries of systemd's journal",
        reload=False,
        flag=True,
    )
    log_buffer: int = _option(
        SIZE,
        256 * KIB,
        "log lines held while they are not read; further ones are dropped and counted",
        least=4 * KIB,
        most=64 * MIB,
        reload=False,
    )
    log_timeouts_per_second: int = _option(
        RATE, 100, "log lines of time-outs; the others of the second become one count", least=1, most=100_000
    )

    origins: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)
    sources: Sources = field(default=Sources(None, {}, {}), compare=False, repr=False)

    def origin(self, name: str) -> str:
        """Where the value of this option comes from; DEFAULT when nobody set it."""
        return self.origins.get(name, DEFAULT)


OPTIONS: Mapping[str, Option] = {item.name: item.metadata["option"] for item in fields(Config) if item.metadata}
# The headings of every list of options, each with its first one.
SECTIONS: Mapping[str, str] = {
    "listen": "Where and as whom",
    "timeout": "Time-outs",
    "block_map": "The kernel",
    "backlog": "Connections",
    "hello_rate": "Work",
    "login_failures": "The catalogue",
    "log_format": "The log",
}
_FIELDS: Mapping[str, Field[Any]] = {item.name: item for item in fields(Config)}


def flag(name: str) -> str:
    """The option as the command line spells it."""
    return "--" + name.replace("_", "-")


def show(name: str, value: Any) -> str:
    """A value of this option as a person would write it; lists with commas."""
    kind = OPTIONS[name].kind
    return ", ".join(kind.show(item) for item in value) or "none" if kind.many else kind.show(value)


def default(name: str) -> Any:
    """The value of an option that nobody sets."""
    return _FIELDS[name].default


def limits(name: str) -> str:
    """The range of the option's value as a person would write it; "" for what is no number."""
    option = OPTIONS[name]
    return "" if option.most == math.inf else f"{option.kind.show(option.least)} to {option.kind.show(option.most)}"


# ---- loading ------------------------------------------------------------------------------------------------------


def load(path: Path | None, environ: Mapping[str, str], overrides: Mapping[str, Any]) -> Config:
    """The configuration from a TOML file (None: no file), the environment, and the command line's options.

    `overrides` holds option names with the text typed (lists of it for options that may be repeated), or with values
    of the types that the file may use.  Raises ConfigError, with the first of the errors.
    """
    config, errors = examine(path, environ, overrides)
    if errors:
        raise ConfigError(errors[0])
    return config


def examine(path: Path | None, environ: Mapping[str, str], overrides: Mapping[str, Any]) -> tuple[Config, list[str]]:
    """What `load` gives, and all errors, one line each; an option with one has the value that it has without it."""
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    errors: list[str] = []
    wrong: set[str] = set()
    given = chain(
        _from_file(path, errors), _from_environment(environ, errors), _from_command_line(overrides, errors)
    )  # fmt: skip
    for origin, name, raw in given:
        value, refused = _parse(origin, name, raw)
        if refused:
            errors += refused
            wrong.add(name)
        else:
            values[name], origins[name] = value, origin
    config = Config(**values, origins=origins, sources=Sources(path, dict(environ), dict(overrides)))
    return config, errors + [text for names, text in _broken_rules(config) if wrong.isdisjoint(names)]


def reload(running: Config) -> tuple[Config, list[str]]:
    """Read the same file again: the configuration to go on with, and the changed options that need a restart.

    Those keep the value they have.  Raises ConfigError, and nothing has changed.
    """
    loaded = load(*running.sources)
    keep = {name: getattr(running, name) for name, option in OPTIONS.items() if not option.reload}
    held = [name for name, value in keep.items() if getattr(loaded, name) != value]
    origins = {name: origin for name, origin in loaded.origins.items() if name not in keep}
    origins |= {name: origin for name, origin in running.origins.items() if name in keep}
    return replace(loaded, **keep, origins=origins), held


def _from_file(path: Path | None, errors: list[str]) -> Iterable[tuple[str, str, Any]]:
    if path is None:
        return
    table: dict[str, Any] = {}
    try:
        table = tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        errors.append(f"{path}: {error.strerror}: name a readable file with -c, or leave -c out")
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        errors.append(f"{path}: not TOML: {error}: write a line per option, like timeout = 600")
    for name, raw in table.items():
        if name in OPTIONS:
            yield f"{path}: {name}", name, raw
        else:
            errors.append(f"{path}: {name!r}: no such option; {_nearest(name, OPTIONS, 'see `tt serve --help`')}")


def _from_environment(environ: Mapping[str, str], errors: list[str]) -> Iterable[tuple[str, str, Any]]:
    variables = {ENVIRONMENT + name.upper(): name for name in OPTIONS}
    for variable in sorted(environ):
        if variable in variables:
            name = variables[variable]
            raw = environ[variable]
            many = OPTIONS[name].kind.many
            yield f"environment {variable}", name, [item for item in raw.split(",") if item.strip()] if many else raw
        elif variable.startswith(ENVIRONMENT) and (near := _near(variable, variables)):
            errors.append(f"environment {variable}: no such option; did you mean {near}?")


def _from_command_line(overrides: Mapping[str, Any], errors: list[str]) -> Iterable[tuple[str, str, Any]]:
    for name, raw in overrides.items():
        if name in OPTIONS:
            yield f"option {flag(name)}", name, raw
        else:
            errors.append(f"option {flag(name)}: no such option; {_nearest(name, OPTIONS, 'see `tt serve --help`')}")


def _near(name: str, names: Iterable[str]) -> str | None:
    # 0.85 takes one wrong, missing or swapped letter; what an orchestrator sets for a service called `tt` stays below.
    return next(iter(difflib.get_close_matches(name, names, 1, 0.85)), None)


def _nearest(name: str, names: Iterable[str], otherwise: str) -> str:
    near = _near(name, names)
    return f"did you mean {near!r}?" if near else otherwise


def _parse(origin: str, name: str, raw: Any) -> tuple[Any, list[str]]:
    """One option's value, checked for type and range, and what is wrong with it: of a list, each item that is."""
    kind = OPTIONS[name].kind
    # The text of a variable or of the command line has every type.
    in_file = not origin.startswith(("environment ", "option "))
    items: list[Any] = []
    errors: list[str] = []
    if kind.many and not isinstance(raw, (list, tuple)):
        return None, [_refusal(origin, name, raw, f"it must be a list; each item: {kind.rule}")]
    for item in raw if kind.many else [raw]:
        try:
            items.append(_parse_item(origin, name, item, in_file=in_file))
        except ConfigError as error:
            errors.append(str(error))
    return tuple(dict.fromkeys(items)) if kind.many else next(iter(items), None), errors


def _parse_item(origin: str, name: str, raw: Any, *, in_file: bool) -> Any:
    option = OPTIONS[name]
    kind = option.kind
    types = kind.toml if in_file else (*kind.toml, str)
    # bool is an int to Python: `timeout = true` is a wrong type all the same.
    if not isinstance(raw, types) or (isinstance(raw, bool) and bool not in types):
        raise ConfigError(_refusal(origin, name, raw, f"it must be {kind.rule}"))
    try:
        value = kind.read(raw)
    except (ValueError, OverflowError, RuntimeError):  # RuntimeError: a home directory that does not exist
        raise ConfigError(_refusal(origin, name, raw, f"it must be {kind.rule}")) from None
    if isinstance(value, (int, float)) and not option.least <= value <= option.most:
        raise ConfigError(_refusal(origin, name, raw, f"out of range: it must be {limits(name)}"))
    return value


def _refusal(origin: str, name: str, raw: Any, rule: str) -> str:
    # repr, cut: a value may hold anything, and the answer is one line.
    text = ascii(raw)
    text = text if len(text) <= 60 else text[:57] + "..."
    return f"{origin} = {text}: {rule}; leave it out for {show(name, default(name))}"


def _broken_rules(config: Config) -> Iterable[tuple[set[str], str]]:
    """What is wrong with options that are right each by itself: which ones, and the error."""
    if not config.listen:
        yield {"listen"}, f"{config.origin('listen')}: empty: name at least one ADDR:PORT to listen on"
    if config.escalate and config.timeout_max < config.timeout:
        text = (
            f"{_source(config, 'timeout')} is longer than {_source(config, 'timeout_max')}: "
            "raise timeout_max, or set escalate = false"
        )
        yield {"escalate", "timeout_max", "timeout"}, text


def _source(config: Config, name: str) -> str:
    return f"{name} {show(name, getattr(config, name))} ({config.origin(name)})"
