"""What stands in front of the server, said once."""

from collections.abc import Iterator

import pytest
from harness import LOGIN, Events, ended, until
from test_proxy import BEHIND, proxy_header, send

from tt import log
from tt.front import ARRIVALS, COMPLAINT_INTERVAL, Front

HIDDEN = "all clients and strangers arrive from one private address: a NAT or a proxy hides who they are"
HEADERLESS = "connections of a proxy closed: no PROXY protocol v2 header"
HTTP = b"GET / HTTP/1.1\r\n\r\n"


@pytest.fixture
def said() -> Iterator[Events]:
    events = Events()
    log.LOGGER.addHandler(events)
    yield events
    log.LOGGER.removeHandler(events)


def arrive(front: Front, *clients: str, strangers: tuple[str, ...] = ()) -> None:
    for source in strangers:
        front.arrived(source, stranger=True)
    for source in clients:
        front.arrived(source, stranger=False)


def test_clients_and_strangers_from_one_private_address_are_said_once_with_the_remedy(said):
    front = Front()
    arrive(front, *["10.0.0.1"] * (ARRIVALS - 2), strangers=("10.0.0.1",))
    assert not said.of(HIDDEN)
    arrive(front, *["10.0.0.1"] * 100)
    (event,) = said.of(HIDDEN)
    assert "--proxy-from 10.0.0.1/32" in event["remedy"]
    assert "tt exempt add 10.0.0.1" in event["remedy"]


@pytest.mark.parametrize(
    ("clients", "strangers"),
    [
        (["10.0.0.1"] * 100, []),  # an office of one: nobody is locked out
        ([], ["10.0.0.1"] * 100),  # a stranger in the house
        (["10.0.0.1"] * 100, ["192.0.2.1"]),
        (["10.0.0.1", "10.0.0.2"] * 100, ["10.0.0.1"]),
        (["8.8.8.8"] * 100, ["8.8.8.8"]),
        (["fd00::/64"] * 100, ["fd00::/64"]),
    ],
)
def test_who_is_seen_with_addresses_of_their_own_is_not_said(said, clients, strangers):
    arrive(Front(), *clients, strangers=tuple(strangers))
    assert not said.of(HIDDEN)


def test_a_proxy_without_headers_is_said_at_most_once_a_minute(said):
    front = Front()
    front.tick(0, 100.0)
    assert not said.of(HEADERLESS)
    for now, count in ((101.0, 3), (102.0, 9), (101.0 + COMPLAINT_INTERVAL, 9), (500.0, 9)):
        front.tick(count, now)
    assert [event["count"] for event in said.of(HEADERLESS)] == [3, 6]
    assert "send-proxy-v2" in said.of(HEADERLESS)[0]["remedy"]


def test_the_server_says_that_everybody_comes_from_one_address(run_server):
    server = run_server(LOGIN, exempt=["127.0.0.9/32"])
    assert ended(send(server, HTTP, source="127.0.0.9")) == b""
    for _ in range(ARRIVALS):
        server.handshake("127.0.0.9")
    until("said", lambda: server.events.of(HIDDEN))


def test_the_server_does_not_wonder_about_clients_behind_a_proxy_that_tells(run_server):
    server = run_server(LOGIN, proxy_from=[f"{BEHIND}/32"])
    assert ended(send(server, proxy_header("10.0.0.1") + HTTP)) == b""
    for _ in range(ARRIVALS):
        with server.client("127.0.0.2") as client:
            client.ping()
    assert ended(send(server, HTTP)) == b""
    until("said", lambda: server.events.of(HEADERLESS))
    assert not server.events.of(HIDDEN)
