"""What stands in front of the server: a NAT that hides its clients, or a proxy that does not say who they are.

Either gives all clients one address, and then one stranger's time-out locks everybody out.  Rules: says it in the log,
with the remedy, and changes nothing; the clock is an argument, in s of CLOCK_MONOTONIC.
Must not know: the time-out table, connections, frames.
"""

import logging
from ipaddress import ip_address

from tt import log

ARRIVALS = 20  # peers from one address and from no other, before that is said
COMPLAINT_INTERVAL = 60.0  # s


class Front:
    """Hears who arrives directly, not behind a proxy of `proxy_from`."""

    def __init__(self) -> None:
        self._address: str | None = None
        self._arrivals = {False: 0, True: 0}  # clients, strangers
        self._over = False  # said, or more than one address has come
        self._headerless = 0
        self._complained = float("-inf")

    def arrived(self, source: str, *, stranger: bool) -> None:
        """A client was welcomed, or a stranger's first packet judged."""
        if self._over:
            return
        if self._address is None:
            self._address = source
        # An IPv6 source is many hosts, and a public address of a first client is nothing to wonder at.
        if source != self._address or ":" in source or not ip_address(source).is_private:
            self._over = True
            return
        self._arrivals[stranger] += 1
        if all(self._arrivals.values()) and sum(self._arrivals.values()) >= ARRIVALS:
            self._over = True
            words = "all clients and strangers arrive from one private address: a NAT or a proxy hides who they are"
            remedy = (
                f"forward without changing the source address; or let the proxy send PROXY protocol v2, and serve with "
                f"--proxy-from {source}/32; until then: tt exempt add {source}"
            )
            log.event(logging.WARNING, words, address=source, remedy=remedy)

    def tick(self, headerless: int, now: float) -> None:
        """About once a second, with the number of a proxy's connections that were closed as `bad_proxy`."""
        if headerless > self._headerless and now - self._complained >= COMPLAINT_INTERVAL:
            count, self._headerless, self._complained = headerless - self._headerless, headerless, now
            words = "connections of a proxy closed: no PROXY protocol v2 header"
            remedy = "let it send one (HAProxy: send-proxy-v2), or take it out of proxy_from"
            log.event(logging.WARNING, words, count=count, remedy=remedy)
