"""A real server with metrics for the tests: the loop, a catalogue, and the endpoint that asks both."""

import http.client
import socket
from pathlib import Path
from typing import Any

import pytest
from harness import HOST, PATIENCE
from prometheus_client.parser import text_string_to_metric_families
from test_control import Controlled

from tt import metrics, metrics_http
from tt.catalog.service import Service
from tt.config import Address
from tt.metrics_http import Endpoint, open_listeners
from tt.status import Status

LONG = 60.0  # s: what a test waits for ends long before
Values = dict[tuple[str, str], float]  # by name and the text of all labels' values


class Measured(Controlled):
    """Use it in a `with` statement; `take` may be replaced before that."""

    def __init__(self, data: Path, **options: Any) -> None:
        super().__init__(data, **options)
        self.catalog = Service(data, self.settings, lambda _source: None)
        self.application.offer(self.catalog, self.dispatcher)
        self.status = Status(self.server, self.table, self.guard, self.dispatcher, self.catalog)
        self.take = self.status.counts

    def __enter__(self) -> "Measured":
        listeners = open_listeners([Address(HOST, 0)])
        self.endpoint = Endpoint(listeners, self.server, self.take, metrics.page_now, metrics.CONTENT_TYPE)
        (self._listener,) = listeners
        self.http = self._listener.getsockname()[1]
        super().__enter__()
        return self

    def __exit__(self, *reason: Any) -> None:
        try:
            super().__exit__(*reason)
        finally:
            self.endpoint.close()
            self._listener.close()
            self.catalog.close()

    def browse(self, *, timeout: float = PATIENCE) -> socket.socket:
        """A connection to the endpoint; closed at the end of the test."""
        peer = socket.create_connection((HOST, self.http), timeout)
        self._open.append(peer)
        return peer

    def get(self, path: str = "/metrics", method: str = "GET", body: bytes | None = None) -> tuple[int, str, Any]:
        """Status, body and headers of a reply."""
        client = http.client.HTTPConnection(HOST, self.http, timeout=PATIENCE)
        try:
            client.request(method, path, body)
            reply = client.getresponse()
            return reply.status, reply.read().decode(), reply.headers
        finally:
            client.close()

    def values(self) -> Values:
        """All samples of the page as it is now."""
        status, text, _ = self.get()
        assert status == 200, text
        self.last_page = text
        return parsed(text)


def parsed(page: str) -> Values:
    """The samples of a page, which must be one that Prometheus' own client reads."""
    found: Values = {}
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            key = sample.name, " ".join(sample.labels.values())
            assert key not in found, f"twice: {key}"
            found[key] = sample.value
    return found


def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """No reply is given up because the machine is busy: that is for tests of the deadlines themselves."""
    monkeypatch.setattr(metrics_http, "PATIENCE", LONG)
    monkeypatch.setattr(metrics_http, "DEADLINE", LONG)


def always_fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every page is of its own moment, however long that takes."""
    patient(monkeypatch)
    monkeypatch.setattr(metrics_http, "PAGE_AGE", 0.0)
