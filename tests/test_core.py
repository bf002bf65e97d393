"""The loop, on a real server: what it does with connections, from accept to close."""

from harness import ended


def test_a_ping_is_answered(run_server):
    server = run_server()
    with server.client() as client:
        assert client.ping().size == 25


def test_the_first_packet_that_is_not_the_protocol_times_out_and_the_next_connection_is_closed_at_once(run_server):
    server = run_server()
    peer = server.connect("127.0.0.9")
    peer.sendall(b"GET / HTTP/1.1\r\nHost: example.org\r\n\r\n")
    assert ended(peer) == b""
    event = server.await_timed_out("127.0.0.9")
    assert event["reason"] == "not_protocol"
    assert event["looks"] == "HTTP request"
    assert server.is_dropped("127.0.0.9")
    server.await_closed("timed_out")
    with server.client("127.0.0.1") as client:
        client.ping()
