"""A real browser for the tests: Chromium without a window, driven over a pipe by the DevTools protocol.

`Browser` starts it with an empty profile of its own and no name that it could look up, opens files, answers what a
script finds on the page, and keeps every request and every message of the console.  Messages are JSON, each ended by a
zero byte.
"""

import base64
import json
import os
import select
import subprocess
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from process import need, plain_environment

SLOW = 120.0  # s that the browser may take for an answer, or to end, on a loaded machine
OPTIONS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--disable-domain-reliability",
    "--hide-scrollbars", "--host-resolver-rules=MAP * ~NOTFOUND", "--remote-debugging-pipe",
)  # fmt: skip


class Browser:
    """One tab; use it in a `with` statement."""

    def __init__(self, place: Path) -> None:
        need("chromium")
        self.requests: list[str] = []  # the addresses that pages asked for
        self.complaints: list[str] = []  # of the console, and exceptions
        self._count = 0
        self._session: str | None = None
        self._events: list[dict[str, Any]] = []
        to_browser, self._write = os.pipe()
        read, from_browser = os.pipe()
        # It reads descriptor 3 and writes 4.  Of ours the one to read is the lower, so it is not overwritten before it
        # is moved.  Not with sh: where that is dash, it knows no descriptor of two digits.
        with (place / "chromium.log").open("wb") as log:
            self._process = subprocess.Popen(
                ["bash", "-c", f'exec 3<&{to_browser} 4>&{from_browser}; exec "$@"', "bash", "chromium", *OPTIONS,
                 f"--user-data-dir={place / 'profile'}"],
                pass_fds=(to_browser, from_browser), env=plain_environment() | {"HOME": str(place)},
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=log,
            )  # fmt: skip
        os.close(to_browser)
        os.close(from_browser)
        self._read = read
        self._arrived = bytearray()

    def __enter__(self) -> "Browser":
        try:
            target = self.call("Target.createTarget", url="about:blank")["targetId"]
            self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
            for domain in ("Page", "Network", "Runtime", "Log"):
                self.call(f"{domain}.enable")
            self.call("Page.setLifecycleEventsEnabled", enabled=True)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """It ends with its pipe."""
        os.close(self._write)
        try:
            self._process.wait(SLOW)
        finally:
            self._process.kill()
            self._process.wait()
            os.close(self._read)

    # ---- what tests do with it --------------------------------------------------------------------------------------

    def open(
        self, address: str, *, width: int = 1600, height: int = 1000, scheme: str = "light", media: str = ""
    ) -> None:
        """Load a page on a screen of that size; `scheme` is light or dark, `media` print or empty."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.call("Emulation.setEmulatedMedia", media=media, features=features)
        went = self.call("Page.navigate", url=address)
        assert "errorText" not in went, f"{address}: {went['errorText']}"
        self._await_load(went["loaderId"])

    def find(self, script: str) -> Any:
        """What an expression of JavaScript is on the page."""
        found = self.call("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def picture(self) -> bytes:
        """A PNG of what is seen."""
        return base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"])

    # ---- the protocol -----------------------------------------------------------------------------------------------

    def call(self, method: str, **arguments: Any) -> Any:
        """The result of one command; the events that come before it are kept."""
        self._count += 1
        message = {"id": self._count, "method": method, "params": arguments}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while (answer := self._next()).get("id") != self._count:
            self._note(answer)
        assert "error" not in answer, (method, answer)
        return answer["result"]

    def _await_load(self, loader: str) -> None:
        """Until that document is whole; word of the one before, such as the empty one of a new tab, may come late."""
        while not any(
            event["method"] == "Page.lifecycleEvent"
            and (event["params"]["loaderId"], event["params"]["name"]) == (loader, "load")
            for event in self._events
        ):
            self._note(self._next())
        self._events.clear()

    def _note(self, event: dict[str, Any]) -> None:
        self._events.append(event)
        found: Mapping[str, Any] = event["params"]
        match event["method"]:
            case "Network.requestWillBeSent":
                self.requests.append(found["request"]["url"])
            case "Log.entryAdded":
                self.complaints.append(found["entry"]["text"])
            case "Runtime.consoleAPICalled" | "Runtime.exceptionThrown":
                self.complaints.append(json.dumps(found))

    def _next(self) -> dict[str, Any]:
        while (end := self._arrived.find(0)) < 0:
            ready, _, _ = select.select([self._read], [], [], SLOW)
            part = os.read(self._read, 1 << 20) if ready else b""
            assert part, "the browser has gone" if ready else "the browser does not answer"
            self._arrived += part
        message, self._arrived = self._arrived[:end], self._arrived[end + 1 :]
        made: dict[str, Any] = json.loads(message)
        return made
