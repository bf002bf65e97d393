"""Fixtures that several test modules share."""

import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from catalog_kit import Desk
from faults import Faults
from harness import Running
from hypothesis import HealthCheck, settings
from process import need

# An example may take as long as the machine does: how fast something is, is for the bench.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")

# What runs the tests in the background may ignore Ctrl-C; programs that they start would inherit that and never end.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def run_server(tmp_path: Path) -> Iterator[Callable[..., Running]]:
    """Starts servers (harness.Running) that end, checked, with the test."""
    with ExitStack() as servers:
        count = 0

        def start(operations=None, **options) -> Running:
            nonlocal count
            count += 1
            return servers.enter_context(Running(options.pop("data", tmp_path / f"data{count}"), operations, **options))

        yield start


@pytest.fixture
def faults(tmp_path: Path) -> Iterator[Faults]:
    need("gcc")
    made = Faults(tmp_path)
    yield made
    made.close()


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    """A catalogue to ask without a server."""
    with Desk(tmp_path) as made:
        yield made
